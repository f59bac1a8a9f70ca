"""What an update is made of: the mean over its window of batches, its clipping, its schedule, its numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from games import Do, Game, read
from helpers import QUIET
from lightning import Trainer
from torch import Tensor

from spin_lightning import ExportPolicy, SftLightningModule, SpinLoss, SyntheticDataModule, UserError


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eleven rows whose answers have 1, 2, ... tokens: no two batches have as many."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "q{n}", "completion": "{"a" * n}"}}\n' for n in range(1, 12)))
    return str(path)


def gradients_into(steps: list[list[Tensor]]) -> Do:
    """Keeps every update's gradient, as the optimiser is about to see it."""

    def keep(trainer: Trainer, module: Any, *_: Any) -> None:
        steps.append([weight.grad.clone() for weight in module.policy.parameters()])

    return Do(on_before_optimizer_step=keep)


def sft(model: str, rows: str, folder: Path, batch_size: int, accumulate: int, **settings: Any) -> dict[str, Any]:
    steps: list[list[Tensor]] = []
    logged: list[float] = []

    def log(trainer: Trainer, module: Any, *_: Any) -> None:
        if module.update_is_complete:
            logged.append(float(trainer.callback_metrics["loss"]))

    module = SftLightningModule(
        model, learning_rate=1e-3, optimizer=torch.optim.SGD, lr_schedule="constant", warmup_ratio=0.0,
        average=settings.pop("average", "token"),
    )  # fmt: skip
    data = SyntheticDataModule(rows, batch_size=batch_size, val_fraction=0.0, micro_batch_tokens=60)
    trainer = Trainer(
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        precision="64-true",
        enable_checkpointing=False,
        callbacks=[gradients_into(steps), Do(on_train_batch_end=log), ExportPolicy(str(folder))],
        **QUIET,
        **settings,
    )
    trainer.fit(module, data)
    summary = read(folder / "summary.json")
    return {"steps": steps, "losses": logged, "ends": (summary["first_loss"], summary["last_loss"])}


def assert_same_steps(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    """To the rounding of float32, in which a Llama computes its norms whatever the precision."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        a, b = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (ours, theirs))
        assert float((a - b).norm() / b.norm()) < 1e-6


@pytest.mark.parametrize("average", ["token", "response"])
@pytest.mark.parametrize(
    ("batch_size", "accumulate", "whole", "limit"),
    [
        (1, 4, 4, 1.0),  # 11 rows: windows of 4, 4 and 3 batches
        (2, 2, 4, 1.0),  # 2 + 2, 2 + 2, 2 + 1: a short batch ends a full window
        (2, 4, 8, 1.0),  # 2 + 2 + 2 + 2, 2 + 1: a short batch ends a short window
        (2, 3, 6, 5),  # cut off by a limit: 2 + 2 + 2, 2 + 2
    ],
)
def test_accumulated_batches_are_one_batch_of_all_their_rows(
    average: str, batch_size: int, accumulate: int, whole: int, limit: float, model: str, rows: str, tmp_path: Path
) -> None:
    if limit == 5:
        rows = shorter(rows, tmp_path, 10)
    one = sft(model, rows, tmp_path / "one", whole, 1, average=average)
    many = sft(model, rows, tmp_path / "many", batch_size, accumulate, average=average, limit_train_batches=limit)
    assert_same_steps(many["steps"], one["steps"])
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert many["ends"] == pytest.approx((one["losses"][0], one["losses"][-1]), rel=1e-6)


def shorter(rows: str, folder: Path, count: int) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(Path(rows).read_text().splitlines(keepends=True)[:count]))
    return str(path)


@pytest.mark.parametrize(("batch_size", "accumulate", "whole"), [(1, 4, 4), (2, 4, 8)])
def test_accumulated_pairs_are_one_batch_of_all_their_pairs(
    batch_size: int, accumulate: int, whole: int, model: str, rows: str, tmp_path: Path
) -> None:
    """Over a whole game: 11 pairs, then 22, so that windows and batches end short."""
    games, gradients = {}, {}
    for name, size, times in (("one", whole, 1), ("many", batch_size, accumulate)):
        gradients[name] = []
        games[name] = Game(
            model, rows, tmp_path / name, callbacks=[gradients_into(gradients[name])],
            module={"optimizer": torch.optim.SGD, "learning_rate": 1e-3},
            data={"batch_size": size, "val_fraction": 0.0}, play={"epochs": 1},
            trainer={"precision": "64-true", "accumulate_grad_batches": times, "gradient_clip_val": 1.0},
        ).play()  # fmt: skip
    assert_same_steps(gradients["many"], gradients["one"])
    for k in range(2):
        one, many = (read(tmp_path / name / f"iteration_{k}/summary.json") for name in ("one", "many"))
        for key in ("first_loss", "last_loss", "updates"):
            assert many[key] == pytest.approx(one[key], rel=1e-6), key
        assert many["epoch_metrics"] == pytest.approx(one["epoch_metrics"], rel=1e-4, abs=1e-6)
    a, b = (torch.cat([w.detach().flatten() for w in games[name].module.policy.parameters()]) for name in games)
    assert float((a - b).norm() / b.norm()) < 1e-7


def test_reported_losses_and_metrics_are_those_of_whole_updates(model: str, rows: str, tmp_path: Path) -> None:
    """Five batches of 2, 2, 2, 2 and 1 pairs, two at a time: three updates, whose means come from single pairs."""
    pairs: list[list[float]] = []  # of each batch, the losses of its pairs
    margins: list[list[float]] = []
    reported: list[tuple[float, float]] = []

    class Watched(SpinLoss):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if torch.is_grad_enabled():
                pairs.append(output.losses.tolist())
                margins.append((output.real_rewards - output.generated_rewards).tolist())
            return output

    def look(trainer: Trainer, module: Any, *_: Any) -> None:
        if module.update_is_complete:
            metrics = trainer.callback_metrics
            reported.append((float(metrics["loss"]), float(metrics["rewards/margins"])))

    Game(
        model, shorter(rows, tmp_path, 9), tmp_path / "run", callbacks=[Do(on_train_batch_end=look)],
        module={"loss": Watched(), "learning_rate": 1e-3}, play={"iterations": 1, "epochs": 1},
        data={"batch_size": 2, "val_fraction": 0.0}, trainer={"accumulate_grad_batches": 2},
    ).play()  # fmt: skip
    assert [len(batch) for batch in pairs] == [2, 2, 2, 2, 1]

    def means(values: list[list[float]]) -> list[float]:
        windows = [[*values[0], *values[1]], [*values[2], *values[3]], values[4]]
        return [sum(window) / len(window) for window in windows]

    assert [loss for loss, _ in reported] == pytest.approx(means(pairs), rel=1e-5)
    assert [margin for _, margin in reported] == pytest.approx(means(margins), rel=1e-4, abs=1e-6)
    assert len(set(means(pairs))) == 3
    summary = read(tmp_path / "run/iteration_0/summary.json")
    assert summary["updates"] == 3 and summary["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert summary["last_loss"] == pytest.approx(means(pairs)[-1], rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_whole_update_s_gradient_is_clipped_and_its_norm_logged_before(
    accumulate: int, model: str, rows: str, tmp_path: Path
) -> None:
    """An update of plain SGD moves the weights by the learning rate times the norm that the gradient is clipped to."""
    gradients: list[list[Tensor]] = []
    weights: list[Tensor] = []
    norms: list[float] = []

    def flat(tensors: Any) -> Tensor:
        return torch.cat([tensor.detach().double().flatten() for tensor in tensors])

    def look(trainer: Trainer, module: Any, *_: Any) -> None:
        weights.append(flat(module.policy.parameters()))
        if "grad_norm" in trainer.callback_metrics:
            norms.append(float(trainer.callback_metrics["grad_norm"]))

    Game(
        model, rows, tmp_path, play={"iterations": 1, "epochs": 1},
        callbacks=[gradients_into(gradients), Do(on_train_start=look, on_train_batch_end=look)],
        module={"optimizer": torch.optim.SGD, "learning_rate": 0.5, "lr_schedule": "constant", "warmup_ratio": 0.0},
        data={"batch_size": 11, "val_fraction": 0.0, "answers_per_prompt": accumulate},
        trainer={"gradient_clip_val": 0.25, "accumulate_grad_batches": accumulate},
    ).play()  # fmt: skip
    (gradient,) = gradients
    norm = float(flat(gradient).norm())
    assert norm > 0.5 and norms[-1] == pytest.approx(norm, rel=1e-5)
    step = weights[-1] - weights[0]
    assert float(step.norm()) == pytest.approx(0.5 * 0.25, rel=1e-4)
    torch.testing.assert_close(step, -0.5 * 0.25 / norm * flat(gradient), rtol=1e-3, atol=1e-6)


def test_gradients_clipped_by_value_have_no_larger_entry(model: str, rows: str, tmp_path: Path) -> None:
    weights: list[Tensor] = []

    def look(trainer: Trainer, module: Any, *_: Any) -> None:
        weights.append(torch.cat([weight.detach().clone().flatten() for weight in module.policy.parameters()]))

    Game(
        model, rows, tmp_path, play={"iterations": 1, "epochs": 1},
        callbacks=[Do(on_train_start=look, on_train_batch_end=look)],
        module={"optimizer": torch.optim.SGD, "learning_rate": 1.0, "lr_schedule": "constant", "warmup_ratio": 0.0},
        data={"batch_size": 11, "val_fraction": 0.0},
        trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ).play()  # fmt: skip
    largest = float((weights[-1] - weights[0]).abs().max())
    assert largest == pytest.approx(0.01, rel=1e-3)


def test_the_schedule_counts_a_short_last_window_as_an_update(model: str, rows: str, tmp_path: Path) -> None:
    """Six batches, four at a time, are two updates an epoch: four in two epochs; the rate reaches 0 after the last."""
    game = Game(
        model, rows, tmp_path, play={"iterations": 1, "epochs": 2}, data={"batch_size": 2, "val_fraction": 0.0},
        module={"learning_rate": 1e-3, "warmup_ratio": 0.25}, trainer={"accumulate_grad_batches": 4},
    ).play()  # fmt: skip
    # one update of warm-up at half the rate, then 1, 2/3, 1/3; a window has one rate
    by_update = [0.5, 1, 2 / 3, 1 / 3]
    expected = [by_update[k] for k, batches in enumerate([4, 2, 4, 2]) for _ in range(batches)]
    assert list(game.recorder.rates.values()) == pytest.approx([1e-3 * factor for factor in expected])


@pytest.mark.parametrize(
    ("limit", "max_updates"),
    [
        ({"max_epochs": 9, "max_steps": 4}, None),
        ({"max_epochs": -1, "max_steps": 4}, None),
        ({"max_epochs": 9}, 4),
        ({"max_epochs": -1}, 4),
    ],
)
def test_the_schedule_of_sft_spans_as_many_updates_as_are_taken(
    limit: dict[str, int], max_updates: int | None, model: str, rows: str, tmp_path: Path
) -> None:
    rates: list[float] = []
    look = Do(on_train_batch_start=lambda trainer, *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"]))
    module = SftLightningModule(model, learning_rate=1e-3, warmup_ratio=0.0, max_updates=max_updates)
    trainer = Trainer(enable_checkpointing=False, callbacks=[look], **QUIET, **limit)
    trainer.fit(module, SyntheticDataModule(rows, batch_size=4, val_fraction=0.0))
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_a_schedule_without_a_length_is_refused_unless_it_is_constant(model: str, rows: str, tmp_path: Path) -> None:
    for schedule in ("linear", "constant"):
        module = SftLightningModule(model, learning_rate=1e-3, lr_schedule=schedule)
        limits: dict[str, Any] = {"max_epochs": -1, "max_time": "00:00:00:01"}
        trainer = Trainer(enable_checkpointing=False, **QUIET, **limits)
        data = SyntheticDataModule(rows, batch_size=4, val_fraction=0.0)
        if schedule == "linear":
            with pytest.raises(UserError, match=r"max_epochs -1 and nothing else gives the schedule .* no length"):
                trainer.fit(module, data)
        else:
            trainer.fit(module, data)
            assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3


def test_rows_of_an_update_that_is_not_finite_are_those_of_its_whole_window(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def poison(trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 6:  # the end of the short last window
            next(module.policy.parameters()).grad[0, 0] = float("nan")

    game = Game(
        model, rows, tmp_path, play={"iterations": 1, "epochs": 1}, data={"batch_size": 2, "val_fraction": 0.0},
        module={"on_non_finite": "skip"}, callbacks=[Do(on_after_backward=poison)],
        trainer={"accumulate_grad_batches": 4},
    ).play()  # fmt: skip
    said = capsys.readouterr().out
    assert "the gradient of update 1 is NaN or infinite (norm nan). The update is skipped" in said
    named = {line.strip() for line in said.splitlines() if line.startswith("  ...")}
    assert len(named) == 3  # 2 + 1 pairs of the last two batches, each with another prompt
    assert all(weight.isfinite().all() for weight in game.module.policy.parameters())


def test_a_rollback_takes_weights_and_optimiser_from_the_last_checkpoint(model: str, rows: str, tmp_path: Path) -> None:
    """Saved at update 3, and update 5 has a NaN gradient: what updates 4 and 5 did is gone, and the run goes on."""
    states: dict[int, tuple[Tensor, Tensor]] = {}

    def poison(trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == 5 and 6 not in states:
            next(module.policy.parameters()).grad[0, 0] = float("inf")

    def look(trainer: Trainer, module: Any, *_: Any) -> None:
        weights = torch.cat([weight.detach().flatten().clone() for weight in module.policy.parameters()])
        moments = torch.cat([state["exp_avg"].flatten().clone() for state in trainer.optimizers[0].state.values()])
        states[trainer.global_step] = weights, moments

    game = Game(
        model, rows, tmp_path, callbacks=[Do(on_after_backward=poison, on_train_batch_end=look)], every_n_steps=3,
        module={"on_non_finite": "rollback"}, data={"batch_size": 1, "val_fraction": 0.0},
        play={"iterations": 1, "epochs": 1},
    ).play()  # fmt: skip
    for found, at_3, at_5 in zip(states[6], states[3], states[5], strict=True):
        assert torch.equal(found, at_3) and not torch.equal(found, at_5)
    assert not torch.equal(states[7][0], states[6][0]) and len(game.losses) == 11


def test_only_updates_in_a_row_that_are_not_finite_end_the_run(model: str, rows: str, tmp_path: Path) -> None:
    poisoned: list[int] = []

    def poison(trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step % 2:
            poisoned.append(trainer.global_step)
            next(module.policy.parameters()).grad[0, 0] = float("nan")

    Game(
        model, rows, tmp_path, callbacks=[Do(on_after_backward=poison)], every_n_steps=None,
        module={"on_non_finite": "skip"}, data={"batch_size": 1, "val_fraction": 0.0},
        play={"iterations": 1, "epochs": 3},
    ).play()  # fmt: skip
    assert len(poisoned) == 16  # more than the ten that may follow each other
