"""What a run says of what it forgets: NLL on rows of other tasks, and how far it is from its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from games import Do, Game, Stopped, read, without_seconds
from helpers import QUIET, load, tiny_model, write_rows
from lightning import Trainer

from spin_lightning import ExportPolicy, RowDataModule, RunCheckpoint, SftLightningModule, UserError
from spin_lightning.models.batches import pack
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.stages.retention import StartLaws, measure


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("others") / "others.jsonl", 3)


def nll_of(model: Any, prompts: Any) -> float:
    """The mean NLL, one row at a time."""
    batches = [pack([(prompt.prompt_ids, [prompt.real_ids])]) for prompt in prompts]
    with torch.no_grad():
        return -sum(float(response_log_probs(model, batch)) for batch in batches) / len(batches)


def kl_of(policy: Any, start: Any, prompts: Any) -> float:
    """The whole KL(policy || start) in nats a response token, from all logits."""
    total, tokens = 0.0, 0
    for prompt in prompts:
        ids = torch.tensor([[*prompt.prompt_ids, *prompt.real_ids]])
        with torch.no_grad():
            here, there = (model(ids).logits[0, len(prompt.prompt_ids) - 1 : -1].double() for model in (policy, start))
        p, q = here.log_softmax(-1), there.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        tokens += len(prompt.real_ids)
    return total / tokens


def test_a_game_says_what_it_forgets_and_plays_as_without(model: str, rows: str, others: str, tmp_path: Path) -> None:
    plain = Game(model, rows, tmp_path / "plain").play()
    game = Game(model, rows, tmp_path / "run", data={"other_data": others}).play()
    assert game.losses == plain.losses and game.weights == plain.weights
    start = read(tmp_path / "run" / "start.json")
    assert start["val/other_nll"] == pytest.approx(nll_of(load(model), game.data.other_prompts), rel=1e-5)
    for number, iteration in enumerate(read(tmp_path / "run" / "game.json")["iterations"]):
        policy, found = load(tmp_path / "run" / f"iteration_{number}" / "policy"), iteration["retention"]
        assert found["other_nll"] == pytest.approx(nll_of(policy, game.data.other_prompts), rel=1e-5)
        assert found["start"] == {name: start[f"val/{name}"] for name in ("other_nll", "other_nll_per_token")}
        whole = kl_of(policy, load(model), game.data.val_prompts)
        assert 0.1 * whole < found["kl_to_start"] <= whole * (1 + 1e-4)  # 64 tokens and the rest: a lower bound
        of_plain = read(tmp_path / "plain" / f"iteration_{number}" / "summary.json")
        assert of_plain["retention"] == {"kl_to_start": found["kl_to_start"]}  # without any setting
        assert of_plain["val_nll"] == iteration["val_nll"]


def test_a_run_that_continues_measures_against_the_same_start(
    model: str, rows: str, others: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"data": {"other_data": others}}
    whole = Game(model, rows, tmp_path / "whole", **settings).play()

    def stop(trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        Game(model, rows, tmp_path / "run", callbacks=[Do(on_train_batch_start=stop)], **settings).play()
    assert Game(model, rows, tmp_path / "run", **settings).play().weights == whole.weights
    kept = [without_seconds(read(tmp_path / name / "game.json")) for name in ("run", "whole")]
    assert kept[0] == kept[1] and "kl_to_start" in kept[0]["iterations"][1]["retention"]
    # one that was begun by a version without it goes on, and does not say what it cannot know
    (tmp_path / "run" / "held_out_laws.safetensors").unlink()
    longer = {**settings, "play": {"iterations": 3}}
    Game(model, rows, tmp_path / "run", **longer).play()
    assert read(tmp_path / "run" / "game.json")["iterations"][2]["retention"].keys() == {
        *("other_nll", "other_nll_per_token", "start")
    }


def test_sft_says_it_of_the_weights_that_it_exports(model: str, rows: str, others: str, tmp_path: Path) -> None:
    data = RowDataModule(rows, batch_size=4, val_fraction=0.2, max_response_tokens=5, other_data=others)
    module = SftLightningModule(model, learning_rate=0.3, lr_schedule="constant")
    callbacks = [ExportPolicy(str(tmp_path), keep="best"), RunCheckpoint(str(tmp_path / "checkpoints"))]
    Trainer(max_epochs=3, val_check_interval=1, num_sanity_val_steps=-1, callbacks=callbacks, **QUIET).fit(module, data)
    summary, policy = read(tmp_path / "summary.json"), load(tmp_path / "policy")
    assert 0 < summary["best_step"] < 6
    assert summary["retention"]["other_nll"] == pytest.approx(nll_of(policy, data.other_prompts), rel=1e-5)
    assert 0 < summary["retention"]["kl_to_start"] <= kl_of(policy, load(model), data.val_prompts) * (1 + 1e-4)


@pytest.mark.parametrize(("steps", "is_known"), [(1, False), (2, False), (3, True), (-1, True)])
def test_a_start_of_which_not_all_other_rows_were_measured_is_not_compared_with(
    steps: int, is_known: bool, model: str, rows: str, others: str, tmp_path: Path
) -> None:
    data = RowDataModule(rows, batch_size=2, val_fraction=0.2, max_response_tokens=5, other_data=others)
    callbacks = [ExportPolicy(str(tmp_path)), RunCheckpoint(str(tmp_path / "checkpoints"))]
    Trainer(max_epochs=1, num_sanity_val_steps=steps, callbacks=callbacks, **QUIET).fit(SftLightningModule(model), data)
    assert "val/nll" in read(tmp_path / "start.json")
    assert ("start" in read(tmp_path / "summary.json")["retention"]) == is_known


def test_one_pass_gives_the_bits_of_the_log_probs_and_no_distance_to_oneself() -> None:
    model = tiny_model().eval()
    batch = pack([([5, 6, 7], [[8, 9], [10]]), ([11], [[12, 13, 14]])])
    laws = StartLaws(most_tokens=6)
    with torch.no_grad():
        laws.add(model, batch)
        laws.add(model, pack([([1], [[2]])]))  # no room is left for it
        assert len(laws) == 6 and laws.of(pack([([1], [[2]])])) is None
        log_probs, divergences = measure(model, batch, laws.of(batch))
        assert torch.equal(log_probs, response_log_probs(model, batch))
        assert divergences is not None and torch.equal(divergences, torch.zeros(6))


def test_other_data_without_held_out_rows_is_refused(rows: str, model: str, others: str) -> None:
    data = RowDataModule(rows, val_fraction=0, other_data=others, tokenizer_name_or_path=model)
    with pytest.raises(UserError, match=r"data.other_data is measured whenever held-out rows are, and no row is held"):
        data.setup("fit")
