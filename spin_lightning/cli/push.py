"""``spin-lightning push``: an exported model, or a game's pairs, to a repository of the hub, by ``huggingface_hub``."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from spin_lightning.cli.arguments import Arguments, as_bool
from spin_lightning.cli.pairs import main as write_pairs
from spin_lightning.cli.quiet import silence_libraries
from spin_lightning.models import hub
from spin_lightning.models.adapters import base_name_of
from spin_lightning.models.loading import check_model
from spin_lightning.models.model_card import is_hub_name, public_name, render_pairs_card
from spin_lightning.runs.redaction import find_secret
from spin_lightning.stages.evaluation import RESULTS
from spin_lightning.stages.export import find_exported
from spin_lightning.terminal import say
from spin_lightning.types import StorageError, UserError

#: What an exported model is made of. Nothing else in its folder is uploaded.
KINDS = (".safetensors", ".json", ".md", ".txt", ".jinja", ".model", ".py")
#: Seconds before each further try, where the hub does not answer or says that it cannot.
PAUSES = (2.0, 8.0)
_SAID_BY_HUB = {
    401: "the hub does not know the token in HF_TOKEN. Make one that may write: {endpoint}/settings/tokens",
    403: "the token in HF_TOKEN may not write to {repo}. It belongs to {user}; give it the role `write`, or push to "
    "{user}/...",
    404: "the hub has no {repo}, or the token in HF_TOKEN may not see it. Is the name of its owner right?",
}
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Upload:
    """A file of a repository: where it is here, or what it is to hold instead."""

    name: str
    path: Path
    changed: bytes | None = None

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.changed is None else len(self.changed)


def main(args: list[str]) -> None:
    """Show what will be uploaded, have it confirmed, and upload it in one commit.

    Args:
        args: The folder, the repository and flags.

    Raises:
        UserError: The folder is not whole or holds a secret, there is no token, or the hub refuses it.
        StorageError: The hub does not answer.
    """
    silence_libraries()
    given = parse(args)
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", given.repository, re.ASCII):
        raise UserError(f"the repository must be USER/NAME, got {given.repository!r}.")
    folder = Path(given.folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder {given.folder!r}. Give an exported model, or the folder of a run.")
    if given.pairs:
        with TemporaryDirectory() as place:
            _push(given, folder, collect_pairs(folder, Path(place)), [])
        return
    folder = find_exported(folder)
    _push(given, folder, *collect(folder, given.repository, given.base))


def _push(given: Any, folder: Path, files: list[_Upload], left_out: list[str]) -> None:
    if not (token := os.environ.get("HF_TOKEN", "").strip()):
        raise UserError(
            "there is no token in the environment. Put one that may write into the variable HF_TOKEN: it is not taken "
            "from flags or files."
        )
    if not hub.is_reachable():
        raise UserError(
            "the hub cannot be reached from here (no network, or HF_HUB_OFFLINE is set). Push it from elsewhere."
        )
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    with _explaining(given.repository):
        user = _persist(api.whoami)["name"]
    with _explaining(given.repository, user):
        is_private = _look_at(api, given)
        private = is_private if is_private is not None else given.private is not False
        if given.private is not None and given.private != private:
            shown, wanted = _as_word(private), _as_word(given.private)
            raise UserError(
                f"{given.repository} is there and {shown}, and --private {str(given.private).lower()} asks for a "
                f"{wanted} one. Change it at {api.endpoint}/{_url_of(given)}/settings, or leave --private out."
            )
        _show(folder, files, left_out, given, private, is_new=is_private is None)
        _confirm(given.yes)
        url = _upload(api, files, given, private)
    say(f"uploaded to {url}")


def parse(args: Sequence[str]) -> Any:
    """Read the arguments.

    Raises:
        UserError: They are not as they should be.
    """
    if secret := next((arg for arg in args if arg.startswith("--token")), None):
        raise UserError(
            f"push has no {secret.partition('=')[0]}: others may read a command line. Put it into HF_TOKEN."
        )
    parser = Arguments("push")
    parser.add_argument("folder")
    parser.add_argument("repository")
    parser.add_argument("--private", type=as_bool, nargs="?", const=True)
    parser.add_argument("--revision")
    parser.add_argument("--message")
    parser.add_argument("--base")
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--yes", action="store_true")
    return parser.parse_args(args)


def collect(folder: Path, repository: str, base: str | None = None) -> tuple[list[_Upload], list[str]]:
    """The files of an exported model as they are to be in a repository, and the names of those that stay here.

    The card's examples load the model from the repository. An adapter names its base as the hub does.

    Args:
        folder: Of the model.
        repository: Its name on the hub.
        base: Of an adapter, the name of its base on the hub, where the adapter has another one.

    Raises:
        UserError: The folder is not whole, or a file holds a secret.
    """
    _refuse_parts(folder)
    names = {path.name: path for path in sorted(folder.iterdir())}
    if links := [name for name, path in names.items() if path.is_symlink() and not path.is_file()]:
        raise UserError(f"{folder / links[0]} is a link to nothing. Remove it, or put the file there.")
    taken = {
        name: path
        for name, path in names.items()
        if path.is_file() and path.suffix in KINDS and name[0] != "." and name != RESULTS  # which names a path here
    }
    changed: dict[str, bytes] = {}
    if "adapter_config.json" in taken:
        before = base_name_of(str(folder))
        name = base or before
        if not is_hub_name(name):
            raise UserError(
                f"the adapter in {folder} was trained on {before!r}, which nobody else has under that name. Say what "
                "it is called on the hub: --base USER/NAME; or push the merged model (policy/)."
            )
        changed = {
            "adapter_config.json": _with(taken["adapter_config.json"], base_model_name_or_path=name),
            **({"base.json": _with(taken["base.json"], name=name)} if "base.json" in taken else {}),
        }
    elif base is not None:
        raise UserError("--base is for adapters, and this is a whole model. Leave it out.")
    card = taken["README.md"].read_text(encoding="utf-8")
    card = re.sub(r'(from_pretrained\((?:base, )?)"(?:policy|adapter|reward_model)"', rf'\1"{repository}"', card)
    if "adapter_config.json" in taken and base is not None:
        card = re.sub(r'(base = AutoModelForCausalLM\.from_pretrained\()"[^"\n]*"', rf'\1"{base}"', card)
    files = [_Upload(name, path, {**changed, "README.md": card.encode()}.get(name)) for name, path in taken.items()]
    for file in files:
        _refuse_secret(file)
    return files, [name for name in names if name not in taken]


def collect_pairs(run: Path, place: Path) -> list[_Upload]:
    """The pairs of all iterations of a game as files of a data set, which are made in a folder for the time being.

    Raises:
        UserError: There are none.
    """
    write_pairs([str(run), "--iteration", "all", "--output", str(place / "pairs.parquet")])
    beside = place / "pairs.parquet.provenance.json"
    provenance = json.loads(beside.read_text(encoding="utf-8"))
    for pairs in provenance["pairs"]:
        pairs["opponent"] = public_name(str(pairs["opponent"]))  # a path here is nobody's business
    beside.write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    (place / "README.md").write_text(render_pairs_card(provenance), encoding="utf-8")
    return [_Upload(path.name, path) for path in sorted(place.iterdir())]


def _refuse_parts(folder: Path) -> None:
    """Make sure that a folder holds a whole model, as far as names and the headers of its weights tell."""
    kind = folder.name.removesuffix(".partial")
    exported = kind in ("policy", "adapter", "reward_model")
    if exported and (kind != folder.name or not (folder.parent / "summary.json").is_file()):
        raise UserError(
            f"{folder} is not whole: its run writes {folder.parent / 'summary.json'} last, and that is not there. Run "
            "the same command again; or where this is a copy, give it another name."
        )
    is_adapter = (folder / "adapter_config.json").is_file()
    needed = ["README.md", "tokenizer_config.json", *(["adapter_model.safetensors"] if is_adapter else ["config.json"])]
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise UserError(f"{folder} is not whole: it has no {' and no '.join(missing)}.")
    if not is_adapter:
        check_model(str(folder))


def _with(path: Path, **values: Any) -> bytes:
    return (json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}, indent=2) + "\n").encode()


def _refuse_secret(file: _Upload) -> None:
    if file.path.suffix in (".safetensors", ".model"):
        return
    text = file.changed if file.changed is not None else file.path.read_bytes()
    if found := find_secret(text.decode("utf-8", errors="replace")):
        raise UserError(
            f"{file.path} has what looks like a secret ({found[:6]}...). Nothing was uploaded. Take it out, and have "
            "it made void if others have seen it."
        )


def _kind_of(given: Any) -> str:
    return "dataset" if given.pairs else "model"


def _url_of(given: Any) -> str:
    return f"datasets/{given.repository}" if given.pairs else str(given.repository)


def _look_at(api: Any, given: Any) -> bool | None:
    """Whether a repository is private; None if there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return bool(_persist(lambda: api.repo_info(given.repository, repo_type=_kind_of(given))).private)
    except RepositoryNotFoundError:
        return None


def _show(
    folder: Path, files: Sequence[_Upload], left_out: Sequence[str], given: Any, private: bool, is_new: bool
) -> None:
    width = max(len(file.name) for file in files)
    where = f"{given.repository}{f' ({given.revision})' if given.revision else ''}"
    repository = "data set" if given.pairs else "repository"
    state = f"a new {_as_word(private)} {repository}" if is_new else f"which is there, and {_as_word(private)}"
    lines = [
        f"from {folder} to {where}, {state}:",
        *(f"  {file.name.ljust(width)}  {_as_size(file.size)}" for file in files),
        f"  {'together'.ljust(width)}  {_as_size(sum(file.size for file in files))}",
    ]
    say("\n".join([*lines, *([f"note: {', '.join(left_out)} stays here."] if left_out else [])]), wraps=False)


def _confirm(is_sure: bool) -> None:
    """Have a person say yes.

    Raises:
        UserError: They do not, or nobody can be asked.
    """
    if is_sure:
        return
    if not sys.stdin.isatty():
        raise UserError("nobody is there to be asked. Nothing was uploaded: give --yes, if this is what you want.")
    say("Upload this? [y/N]")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("nothing was uploaded.")


def _upload(api: Any, files: Sequence[_Upload], given: Any, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd

    where = {"repo_id": given.repository, "repo_type": _kind_of(given)}
    url = _persist(lambda: api.create_repo(**where, private=private, exist_ok=True))
    if given.revision is not None:
        _persist(lambda: api.create_branch(**where, branch=given.revision, exist_ok=True))

    def commit() -> Any:
        return api.create_commit(
            **where,
            operations=[CommitOperationAdd(file.name, file.changed or str(file.path)) for file in files],
            commit_message=given.message or "Upload by spin_lightning",
            revision=given.revision,
        )

    _persist(commit)
    return str(url)


def _persist(call: Callable[[], Result]) -> Result:
    """What a call gives; where the hub cannot answer now, after a pause, and another.

    The library repeats some requests by itself, but not those that make a repository or a commit.
    """
    for pause in (*PAUSES, None):
        try:
            return call()
        except Exception as error:
            if pause is None or not _may_pass(error):
                raise
            time.sleep(pause)
    raise AssertionError


@contextmanager
def _explaining(repository: str, user: str = "nobody") -> Iterator[None]:
    """Have what the hub refuses said in a sentence."""
    from huggingface_hub import constants

    try:
        yield
    except (UserError, StorageError):
        raise
    except Exception as error:
        status, may_pass = _status_of(error), _may_pass(error)
        if status in _SAID_BY_HUB:
            said = _SAID_BY_HUB[status].format(repo=repository, user=user, endpoint=constants.ENDPOINT)
            raise UserError(said + ("" if said.endswith(("?", "...")) else ".")) from error
        if status is None and not may_pass:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if not may_pass:
            raise UserError(f"the hub refuses {repository}: {reason}.") from error
        raise StorageError(
            f"the hub does not answer as it should ({reason}). Nothing was changed there that the same command would "
            "not finish: try it again."
        ) from error


def _status_of(error: BaseException | None) -> int | None:
    """What the hub replied, where an error or what it came from is about that."""
    while error is not None:
        if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
            return int(status)
        error = error.__cause__
    return None


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may get another reply later: the hub is busy, or the network was gone."""
    status = _status_of(error)
    if status is not None:
        return status >= 500 or status == 429
    causes = (error, error.__cause__)
    return any(isinstance(one, OSError) or type(one).__module__.startswith("httpx") for one in causes)


def _as_word(private: bool) -> str:
    return "private" if private else "public"


def _as_size(size: int) -> str:
    return f"{size / 2**20:10.1f} MiB" if size >= 2**20 else f"{size / 2**10:10.1f} KiB"
