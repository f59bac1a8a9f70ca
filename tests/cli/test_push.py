"""``spin-lightning push`` against a hub on this machine, by the hub's own client."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub
from games import Game
from helpers import QUIET
from huggingface_hub import DatasetCard, ModelCard, constants
from lightning import Trainer

from spin_lightning import ExportPolicy, LoraAdapter, RowDataModule, SftLightningModule
from spin_lightning.cli import commands as cli
from spin_lightning.cli import push
from spin_lightning.models import hub as look

Refusal = Callable[[Sequence[str]], str]
#: Of the hub's client, about how it calls its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage has a server of its own
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr(push, "PAUSES", (0.0, 0.0))
    look._try_hub.cache_clear()
    yield hub
    look._try_hub.cache_clear()
    hub.close()


@pytest.fixture(scope="module")
def exported(model: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of SFT of an adapter, which has it merged too."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    module = SftLightningModule(model, adapter=LoraAdapter(r=2))
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, callbacks=[ExportPolicy(str(folder))], **QUIET)
    trainer.fit(module, RowDataModule(rows, batch_size=8))
    return folder


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "run"))


def test_a_runs_last_policy_becomes_a_private_repository_with_a_card_that_names_it(
    hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]
):
    (run / "policy" / "training.pkl").write_bytes(b"x")
    before = {path.name: path.read_bytes() for path in (run / "policy").iterdir()}
    cli.main(["push", str(run), "me/mine", "--yes"])
    said = capsys.readouterr().out
    there = hub.repositories["me/mine"]
    files = there["branches"]["main"]
    assert there["private"] and files.keys() == before.keys() - {"training.pkl"} and len(hub.messages) == 1
    assert {name for name in files if files[name] != before[name]} == {"README.md"}
    card = ModelCard(files["README.md"].decode())
    assert 'AutoModelForCausalLM.from_pretrained("me/mine")' in card.text and '"policy"' not in card.text
    assert f"from {run / 'policy'} to me/mine, a new private repository:\n" in said
    assert (
        f"  {len(before['model.safetensors']) / 1024:10.1f} KiB\n" in said and "note: training.pkl stays here." in said
    )
    assert said.rstrip().endswith(f"uploaded to {hub.url}/me/mine")
    assert {path.name: path.read_bytes() for path in (run / "policy").iterdir()} == before
    cli.main(["push", str(run), "me/mine", "--yes", "--revision", "v2", "--message", "again"])
    assert there["branches"]["v2"].keys() == files.keys() and hub.messages[-1] == "again"
    assert "to me/mine (v2), which is there, and private" in capsys.readouterr().out


def test_a_repository_is_public_only_where_that_is_said_and_stays_what_it_is(hub: FakeHub, run: Path, refusal: Refusal):
    cli.main(["push", str(run), "me/open", "--private", "false", "--yes"])
    assert not hub.repositories["me/open"]["private"]
    printed = refusal(["push", str(run), "me/open", "--private", "--yes"])
    assert "me/open is there and public, and --private true asks for a private one" in printed
    assert len(hub.messages) == 1


def test_an_adapter_names_its_base_as_the_hub_does(hub: FakeHub, run: Path, model: str, refusal: Refusal):
    adapter = str(run / "adapter")
    printed = refusal(["push", adapter, "me/small", "--yes"])
    assert f"was trained on '{model}', which nobody else has under that name" in printed and not hub.repositories
    cli.main(["push", adapter, "me/small", "--base", "org/base", "--yes"])
    files = hub.repositories["me/small"]["branches"]["main"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert json.loads(files["base.json"])["name"] == "org/base"
    card = files["README.md"].decode()
    assert 'from_pretrained("org/base")' in card and 'PeftModel.from_pretrained(base, "me/small")' in card
    assert not any(model.encode() in content for content in files.values())


def test_somebody_is_asked_where_somebody_is_there(
    hub: FakeHub, run: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert "nobody is there to be asked. Nothing was uploaded: give --yes" in refusal(["push", str(run), "me/mine"])
    for answer, uploads in (("\n", 0), ("n\n", 0), ("y\n", 1)):
        monkeypatch.setattr(sys, "stdin", Person(answer))
        if uploads:
            cli.main(["push", str(run), "me/mine"])
        else:
            assert "nothing was uploaded." in refusal(["push", str(run), "me/mine"])
        assert len(hub.messages) == uploads == len(hub.repositories)


class Person:
    """Types an answer on a terminal."""

    def __init__(self, answer: str) -> None:
        self.readline = lambda: answer
        self.isatty = lambda: True


@pytest.mark.parametrize(
    ("path", "status", "code", "words"),
    [
        ("/api/whoami-v2", [401], 2, "the hub does not know the token in HF_TOKEN. Make one that may write: {url}/"),
        ("/api/repos/create", [403], 2, "may not write to me/mine. It belongs to me; give it the role `write`"),
        ("/api/models/me/mine/preupload", [404], 2, "the hub has no me/mine, or the token in HF_TOKEN may not see it"),
        ("/api/models/me/mine/commit", [400], 2, "the hub refuses me/mine: "),
        ("/api/models/me/mine/commit", [500, 503, 500], 75, "the hub does not answer as it should ("),
        ("/api/repos/create", [500, 503], 0, ""),
        ("/api/models/me/mine/commit", [429, 502], 0, ""),
        ("/blobs", [500], 0, ""),
    ],
)
def test_refusals_are_said_in_a_sentence_and_passing_faults_outlived(
    hub: FakeHub,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    status: list[int],
    code: int,
    words: str,
):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.refuses[path] = list(status)
    if code == 0:
        cli.main(["push", str(run), "me/mine", "--yes"])
        assert "model.safetensors" in hub.repositories["me/mine"]["branches"]["main"] and not hub.refuses[path]
        return
    with pytest.raises(SystemExit) as stop:
        cli.main(["push", str(run), "me/mine", "--yes"])
    printed = capsys.readouterr().err
    assert stop.value.code == code and words.format(url=hub.url) in printed.replace("\n", " ")
    assert "Traceback" not in printed and hub.token not in printed


def test_another_owner_is_refused_by_name(hub: FakeHub, run: Path, refusal: Refusal):
    assert "may not write to you/mine. It belongs to me" in refusal(["push", str(run), "you/mine", "--yes"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: (run / "summary.json").unlink(), "there is no model in '{run}'"),
        (lambda run: (run / "policy/model.safetensors").write_bytes(b"12345678"), "model.safetensors is not whole"),
        (lambda run: (run / "policy/model.safetensors").unlink(), "has no model.safetensors"),
        (lambda run: (run / "policy/README.md").unlink(), "{run}/policy is not whole: it has no README.md"),
        (lambda run: (run / "policy/notes.md").write_text("key hf_" + "aB3" * 9), "looks like a secret (hf_aB3...)"),
        (lambda run: (run / "policy/link.json").symlink_to("nowhere"), "policy/link.json is a link to nothing"),
    ],
)
def test_a_folder_that_is_not_whole_or_holds_a_secret_is_refused(
    hub: FakeHub, run: Path, refusal: Refusal, change: Callable[[Path], Any], words: str
):
    change(run)
    assert words.format(run=run) in refusal(["push", str(run), "me/mine", "--yes"]).replace("\n", " ")
    assert not hub.asked


def test_a_model_without_the_summary_that_is_written_last_is_refused(hub: FakeHub, run: Path, refusal: Refusal):
    (run / "summary.json").unlink()
    printed = refusal(["push", str(run / "policy"), "me/mine", "--yes"])
    assert f"{run}/policy is not whole: its run writes {run}/summary.json last" in printed
    (run / "policy").rename(run / "mine")
    cli.main(["push", str(run / "mine"), "me/mine", "--yes"])  # a copy under a name of its own
    assert len(hub.messages) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["{run}", "mine", "--yes"], "the repository must be USER/NAME, got 'mine'"),
        (["nowhere", "me/mine"], "there is no folder 'nowhere'"),
        (["{run}", "me/mine", "--token", "hf_x"], "push has no --token: others may read a command line"),
        (["{run}", "me/mine", "--base", "org/base"], "--base is for adapters, and this is a whole model"),
        (["{run}", "me/mine", "--privat"], "push has no '--privat'. Did you mean --private?"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(
    hub: FakeHub, run: Path, refusal: Refusal, flags: Sequence[str], words: str
):
    assert words in refusal(["push", *(flag.format(run=run) for flag in flags)]).replace("\n", " ")
    assert not hub.asked


def test_without_a_token_or_a_network_it_is_said_at_once(
    hub: FakeHub, run: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached from here" in refusal(["push", str(run), "me/mine", "--yes"])
    monkeypatch.setenv("HF_TOKEN", " ")  # as of a secret that is not set
    assert "there is no token in the environment" in refusal(["push", str(run), "me/mine", "--yes"])
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token in the environment" in refusal(["push", str(run), "me/mine", "--yes"])
    assert not hub.asked


def test_the_pairs_of_a_game_become_a_data_set(
    hub: FakeHub, plain: Game, model: str, capsys: pytest.CaptureFixture[str]
):
    cli.main(["push", str(plain.clock.output_dir), "me/pairs", "--pairs", "--yes"])
    there = hub.repositories["me/pairs"]
    files = there["branches"]["main"]
    assert (there["kind"], there["private"]) == ("dataset", True)
    assert files.keys() == {"README.md", "pairs.parquet", "pairs.parquet.provenance.json"}
    rows = pq.read_table(io.BytesIO(files["pairs.parquet"])).to_pylist()
    assert {row["iteration"] for row in rows} == {0, 1} and rows[0]["chosen"][0]["role"] == "assistant"
    card = DatasetCard(files["README.md"].decode())
    assert f"{len(rows)} pairs: `chosen`" in card.text and "| 1 | `iteration_0/policy` |" in card.text
    assert "preference" in card.data.tags and not any(model.encode() in content for content in files.values())
    assert "to me/pairs, a new private data set:" in capsys.readouterr().out


@pytest.mark.slow
def test_the_endpoint_is_that_of_the_environment(hub: FakeHub, run: Path):
    """As a program of its own, which reads it as it starts."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": hub.token}
    command = [sys.executable, "-m", "spin_lightning", "push", str(run), "me/mine", "--yes"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert hub.repositories["me/mine"]["private"]
