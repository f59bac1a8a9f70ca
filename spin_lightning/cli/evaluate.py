"""``spin-lightning evaluate``: what tasks of lm-evaluation-harness say of a model, and of two by comparison."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spin_lightning.cli.arguments import Arguments, as_bool, find_device
from spin_lightning.cli.quiet import silence_libraries
from spin_lightning.models.adapters import LoraAdapter, base_name_of
from spin_lightning.models.loading import load_policy, load_tokenizer, locate, stored_dtype
from spin_lightning.models.saving import weights_hash
from spin_lightning.runs.files import read_json, run_folder
from spin_lightning.stages.evaluation import (
    RESULTS,
    Difference,
    Evaluation,
    Outcome,
    compare,
    place_of,
    update_card,
)
from spin_lightning.stages.export import find_exported
from spin_lightning.stages.harness import PAPER, check_harness, harness_version
from spin_lightning.terminal import say
from spin_lightning.types import UserError

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class _Asked:
    """A model that tasks are asked of.

    Attributes:
        name: As it was given, or the folder that was found for it.
        folder: Where it is. None: on the hub.
        place: The folder that gets the results.
    """

    name: str
    folder: Path | None
    place: Path


def main(args: list[str]) -> None:
    """Evaluate a model and print what came out.

    Args:
        args: The model and flags.

    Raises:
        UserError: They cannot be used.
    """
    silence_libraries()
    given = parse(args)
    check_harness()
    evaluation = Evaluation(_split(given.tasks), _as_shots(given.shots), given.limit, given.batch_size, given.template)
    ours = _locate(given.model, given.output)
    other = None
    if given.against is not None:
        other = _locate(given.against, None if given.output is None else str(Path(given.output) / "against"))
        if other.place == ours.place:
            raise UserError(f"both models would have their results in {ours.place}. Give --output FOLDER.")
    device = find_device(given.device)
    evaluation.load()
    template, dtype = "on" if given.template else "off", "stored dtype" if given.dtype == "auto" else given.dtype
    part = f", the first {given.limit} documents of each task" if given.limit else ""
    say(f"chat template {template}, {dtype} on {device}, lm-evaluation-harness {harness_version()}{part}")
    found = _evaluate(evaluation, ours, given, device)[0]
    against: Mapping[str, Outcome] = {}
    gaps: Mapping[str, Difference | None] = {}
    if other is not None:
        against, sha256 = _evaluate(evaluation, other, given, device)
        gaps = compare(found, against, ours.place, other.name, sha256)
    say("\n".join(["", *render(found, against, gaps), ""]), wraps=False)
    say(f"Results are in {ours.place / RESULTS}" + (f" and {other.place / RESULTS}." if other else "."))


def parse(args: Sequence[str]) -> Any:
    """Read the arguments.

    Raises:
        UserError: They are not as they should be.
    """
    parser = Arguments("evaluate")
    parser.add_argument("model")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--shots", nargs="+")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--chat_template", dest="template", type=as_bool, nargs="?", const=True, default=False)
    parser.add_argument("--against")
    parser.add_argument("--output")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=list(_DTYPES), default="auto")
    parser.add_argument("--base")
    parser.add_argument("--revision")
    parser.add_argument("--trust_remote_code", type=as_bool, nargs="?", const=True, default=False)
    return parser.parse_args(args)


def _split(given: Sequence[str] | None) -> list[str] | None:
    """Names that are separated by blanks or commas, but for a file whose name has a comma."""
    if given is None:
        return None
    parts = [[text] if Path(text).exists() else text.strip("[]").split(",") for text in given]
    return [name.strip() for names in parts for name in names if name.strip()]


def _as_shots(given: Sequence[str] | None) -> list[int] | None:
    names = _split(given)
    try:
        return None if names is None else [int(name) for name in names]
    except ValueError:
        raise UserError(f"--shots must be numbers, one or one for each task, got {' '.join(given or ())!r}.") from None


def _locate(name: str, output: str | None) -> _Asked:
    """Where a model is and where its results go, before anything is loaded.

    Raises:
        UserError: There is no model.
    """
    folder = Path(name).expanduser()
    found = find_exported(folder) if folder.is_dir() else None
    if found is None:
        locate(name)
    if output is not None:
        place = run_folder(output, "--output")
    elif found is not None:
        place = place_of(found)
    else:  # a name on the hub, or a file
        place = Path("evaluations") / (folder.stem if folder.is_file() else name.replace("/", "--"))
    return _Asked(name if found is None else str(found), found, place)


def _evaluate(
    evaluation: Evaluation, asked: _Asked, given: Any, device: torch.device
) -> tuple[dict[str, Outcome], str]:
    """What tasks say of a model, which is in memory no longer than that; and the hash of its weights."""
    model, tokenizer = _load(asked, given)
    sha256 = weights_hash(model)
    dtype = _DTYPES[given.dtype]
    model = model.to(device) if dtype is None else model.to(device, dtype)
    say(f"{asked.name}:")
    found = evaluation.run(model, tokenizer, asked.place, sha256, asked.name)
    if asked.folder is not None:
        update_card(asked.folder, read_json(asked.place / RESULTS))
    del model
    gc.collect()
    return found, sha256


def _load(asked: _Asked, given: Any) -> tuple[Any, Any]:
    """A model in the dtype that it is stored in, and its tokenizer."""
    where = {"revision": given.revision, "trust_remote_code": given.trust_remote_code}
    is_adapter = asked.folder is not None and (asked.folder / "adapter_config.json").is_file()
    name = (given.base or base_name_of(asked.name)) if is_adapter else asked.name
    if is_adapter:
        say(f"note: {asked.name} is an adapter, and is put on {name} (--base gives another place of that model).")
    stored = stored_dtype(name, **where) or "float32"
    model: Any = load_policy(name, dtype=getattr(torch, stored), **where).eval()
    if is_adapter:
        model = LoraAdapter(path=asked.name).apply(model).eval()
    return model, load_tokenizer(asked.name, **({} if asked.folder is not None else where))


def render(
    found: Mapping[str, Outcome],
    against: Mapping[str, Outcome] | None = None,
    gaps: Mapping[str, Difference | None] | None = None,
) -> list[str]:
    """Results as the lines of a table: each number with its standard error.

    Args:
        found: What tasks say of a model.
        against: What they say of another one.
        gaps: The paired differences.
    """
    head = ["task", "metric", "shots", "documents", "value", *(["other", "difference"] if against else [])]
    rows = []
    for name, outcome in found.items():
        entry = outcome.entry
        row = [name, entry["metric"], str(entry["shots"]), str(entry["documents"]), _number(entry)]
        if against:
            gap = (gaps or {}).get(name)
            apart = "-" if gap is None else _both(gap.value, gap.stderr, "+.4f")
            row += [_number(against[name].entry), apart]
        rows.append(row)
    if found.keys() >= PAPER.keys():
        means = [
            sum(results[name].entry["value"] for name in PAPER) / len(PAPER) for results in (found, against) if results
        ]
        total = [f"{means[0] - means[1]:+.4f}"] if against else []
        rows.append(["mean of the six", "", "", "", *(f"{mean:.4f}" for mean in means), *total])
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]


def _number(entry: Mapping[str, Any]) -> str:
    return _both(entry["value"], entry["stderr"], ".4f")


def _both(value: float, error: float | None, form: str) -> str:
    return format(value, form) + ("" if error is None or not math.isfinite(error) else f" +- {error:.4f}")
