"""A run keeps the kernels that it began with, whatever a trial would say later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from games import Do, Game, Stopped, answers_of, read
from helpers import QUIET, save_tiny_model, tiny_model
from lightning import Trainer

from spin_lightning import ContinuousGenerator, SftLightningModule, SpinLightningModule, UserError
from spin_lightning.data.module import RowDataModule
from spin_lightning.models import kernels
from spin_lightning.runs.settings import SETTINGS
from spin_lightning.stages import policy
from spin_lightning.stages.opponent import ResidentOpponent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Whose heads are wide enough for the kernel in C."""
    return save_tiny_model(tmp_path_factory.mktemp("model"), head_dim=16)


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Which candidate a trial finds to be the fastest."""
    names = {"prompt_attention": "products", "decode_attention": "compiled", "layers": "plain"}

    def find(name: str, *_: Any) -> str:
        return names[name]

    monkeypatch.setattr(kernels, "_try_candidates", find)
    monkeypatch.setattr(kernels, "_tried", {})
    monkeypatch.setattr(kernels, "_pinned", {})
    if error := kernels.find_error(tiny_model(head_dim=16).bfloat16(), "decode_attention", "compiled"):
        pytest.skip(error)
    return names


def make_game(model: Any, rows: str, folder: Path, *, precision: str = "bf16-true", **module: Any) -> Game:
    data = {"generator": ContinuousGenerator(max_new_tokens=5, batch_size=3)}
    trainer, play = {"precision": precision}, {"iterations": 2, "epochs": 1}
    callbacks = module.pop("callbacks", ())
    return Game(model, rows, folder, data=data, trainer=trainer, play=play, module=module, callbacks=callbacks)


def stop(*_: Any) -> None:
    raise Stopped


def kernels_in(folder: Path) -> Any:
    return read(folder / SETTINGS)["kernels"]


def taken_by(game: Game) -> dict[str, str]:
    model = game.module.policy
    attention = model.config._attn_implementation.rpartition("+")[2]
    return {
        "prompt_attention": attention,
        "decode_attention": kernels.kernel_of(model, "decode_attention"),
        "layers": "plain",
    }


@pytest.mark.parametrize("opponent", ["stored", "resident"])
def test_a_continued_game_takes_the_kernels_of_its_record(
    opponent: str, fastest: dict[str, str], model: str, rows: str, tmp_path: Path
) -> None:
    """All its models do."""
    whole = make_game(model, rows, tmp_path / "whole", opponent=opponent).play()
    callbacks = [Do(on_generation_end=stop)]
    with pytest.raises(Stopped):
        make_game(model, rows, tmp_path / "stopped", opponent=opponent, callbacks=callbacks).play()
    before, after = dict(fastest), {"prompt_attention": "kernel", "decode_attention": "grouped", "layers": "plain"}
    assert kernels_in(tmp_path / "stopped") == before
    fastest |= after
    kernels._tried.clear()
    continued = make_game(model, rows, tmp_path / "stopped", opponent=opponent).play()
    assert kernels_in(tmp_path / "stopped") == taken_by(continued) == before
    if isinstance(continued.module.opponent, ResidentOpponent):
        assert continued.module.opponent.model.config._attn_implementation.endswith("+products")
    assert continued.weights == whole.weights
    other = make_game(model, rows, tmp_path / "other", opponent=opponent).play()
    assert kernels_in(tmp_path / "other") == taken_by(other) == after


def test_a_setting_has_the_last_word_and_a_run_keeps_it(
    fastest: dict[str, str], model: str, rows: str, tmp_path: Path
) -> None:
    game = make_game(
        model, rows, tmp_path / "run", kernels={"decode_attention": "grouped"}, callbacks=[Do(on_train_start=stop)]
    )
    with pytest.raises(Stopped):
        game.play()
    assert kernels_in(tmp_path / "run") == {
        "prompt_attention": "products",
        "decode_attention": "grouped",
        "layers": "plain",
    }
    make_game(model, rows, tmp_path / "run", kernels={"decode_attention": "grouped"}).play()
    with pytest.raises(UserError, match=r"model\.kernels: .*'grouped'.* -> None"):
        make_game(model, rows, tmp_path / "run").play()


def test_a_run_from_elsewhere_goes_on_with_another_kernel_and_says_so(
    fastest: dict[str, str],
    model: str,
    rows: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(Stopped):
        make_game(model, rows, tmp_path / "run", callbacks=[Do(on_train_start=stop)]).play()
    fastest["decode_attention"] = "folded"
    kernels._tried.clear()
    errors = {"compiled": "there is no compiler"}
    monkeypatch.setattr(policy, "find_error", lambda model, name, candidate: errors.get(candidate, ""))
    capsys.readouterr()
    make_game(model, rows, tmp_path / "run").play()
    said = "note: this run took decode_attention compiled, which cannot be used here (there is no compiler)."
    assert said in capsys.readouterr().out
    assert kernels_in(tmp_path / "run") == {
        "prompt_attention": "products",
        "decode_attention": "folded",
        "layers": "plain",
    }


def test_a_run_begun_before_there_were_kernels_takes_the_first(
    fastest: dict[str, str], model: str, rows: str, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        make_game(model, rows, tmp_path / "run", callbacks=[Do(on_train_start=stop)]).play()
    record = read(tmp_path / "run" / SETTINGS)
    del record["kernels"]
    (tmp_path / "run" / SETTINGS).write_text(json.dumps(record))
    make_game(model, rows, tmp_path / "run").play()
    assert kernels_in(tmp_path / "run") == {
        "prompt_attention": "kernel",
        "decode_attention": "grouped",
        "layers": "plain",
    }


def test_after_a_run_other_precisions_are_not_bound_by_it(
    fastest: dict[str, str], model: str, rows: str, tmp_path: Path
) -> None:
    game = make_game(model, rows, tmp_path / "run", precision="bf16-mixed").play()
    policy = game.module.policy
    assert kernels.kernel_of(policy, "decode_attention") == "grouped"  # its weights are in float32
    assert len(answers_of(ContinuousGenerator(max_new_tokens=5), policy, [[5, 6, 7]], [0], 4)) == 1
    again = make_game(policy, rows, tmp_path / "again", precision="32-true").play()
    assert kernels_in(tmp_path / "again") == {
        "prompt_attention": "kernel",
        "decode_attention": "grouped",
        "layers": "plain",
    }
    assert again.module.policy is policy


def test_a_kernel_that_a_stage_does_not_use_is_named(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = SftLightningModule(model, kernels={"decode_attention": "grouped"})
    Trainer(max_steps=1, default_root_dir=tmp_path, **QUIET).fit(module, RowDataModule(rows, val_fraction=0))
    said = "note: model.kernels names decode_attention, which SftLightningModule does not use."
    assert said in capsys.readouterr().out


def test_what_a_setting_asks_for_must_be_possible(model: str, rows: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.kernels asks for decode_attention compiled.*not of torch\.float32"):
        make_game(model, rows, tmp_path / "run", precision="32-true", kernels={"decode_attention": "compiled"}).play()
    with pytest.raises(UserError, match=r"model\.kernels knows no 'attention' of 'folded'"):
        SpinLightningModule("model", kernels={"attention": "folded"})
