"""Classes of the user's own that return, raise or take the wrong thing: one sentence that names them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import tiny_model

from spin_lightning import SpinLoss
from spin_lightning.cli.settings_errors import explaining_plugins
from spin_lightning.stages.gate import check_gate
from spin_lightning.stages.optim import refuse_unusable
from spin_lightning.types import PairLogProbs, UserError


class Idle(torch.optim.Optimizer):
    """Does not compute the gradient that it steps by."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        pass


class Broken(torch.optim.SGD):
    def __init__(self, params: Any) -> None:
        raise KeyError("no such table")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (torch.optim.LBFGS, "the optimiser LBFGS computes the gradient .* times in one step.*not for batches"),
        (torch.optim.SparseAdam, "the optimiser SparseAdam cannot be used"),
        (Idle, "the optimiser Idle computes the gradient 0 times.*must call the closure"),
        (Broken, "the optimiser Broken cannot be made: 'no such table'. Change model.optimizer"),
    ],
)
def test_an_optimiser_that_cannot_train_is_named_before_training(kind: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        refuse_unusable(kind)


def test_ordinary_optimisers_are_left_alone() -> None:
    for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Rprop, torch.optim.Adafactor):
        refuse_unusable(kind)


class Plugin:
    def on_start(self, number: int) -> int:
        return {0: 1}[number]


def test_what_code_of_ones_own_raises_is_told_with_its_place() -> None:
    with (
        pytest.raises(
            UserError, match=r"Plugin.on_start \(.*test_plugins.py, line \d+\) ends with KeyError: 5. It is code of"
        ),
        explaining_plugins(),
    ):
        Plugin().on_start(5)


def test_code_of_ones_own_that_is_called_otherwise_is_named() -> None:
    """As a callback whose hook takes too few arguments: the error comes up where it is called, in a library."""
    text = "Plugin.on_start() takes 1 positional argument but 6 were given"
    with (
        pytest.raises(UserError, match=r"the call of Plugin.on_start \(.*test_plugins.py, line \d+\)"),
        explaining_plugins(),
    ):
        raise_inside_the_package(TypeError(text))


def raise_inside_the_package(error: Exception) -> None:
    from spin_lightning import schedule

    code = compile("def fail(error):\n    raise error", schedule.__file__, "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    names["fail"](error)


def test_an_error_of_the_package_itself_is_no_error_of_a_plugin() -> None:
    with pytest.raises(TypeError, match="ours"), explaining_plugins():
        raise_inside_the_package(TypeError("ours() takes 1 positional argument but 2 were given"))


def log_probs(**changes: Any) -> PairLogProbs:
    values = torch.tensor([-3.0, -4.0])
    return replace(PairLogProbs(values, values, torch.tensor([2, 2]), torch.tensor([2, 2])), **changes)


class WholeNumbers(SpinLoss):
    def forward(self, *args: Any) -> Any:
        output = super().forward(*args)
        return replace(output, losses=output.losses.long())


class NoNumber(SpinLoss):
    def forward(self, *args: Any) -> Any:
        output = super().forward(*args)
        return replace(output, losses=output.losses * torch.nan)


def test_a_loss_of_whole_numbers_or_of_none_is_named() -> None:
    with pytest.raises(UserError, match=r"WholeNumbers must return .*; got losses of torch.int64"):
        WholeNumbers()(log_probs(), log_probs(), 1.0, None)
    batch: Any = type("Batch", (), {"opponent": log_probs(), "initial": None})
    with pytest.raises(UserError, match="the loss: NoNumber gives NaN or infinity for a model against itself"):
        check_gate(NoNumber(), 1.0, batch, log_probs(), torch.float32, 0, lambda _: log_probs())


@pytest.mark.parametrize("ids", [[5, 300], [-1, 5]])
def test_a_generator_whose_ids_the_model_does_not_know_is_named(ids: list[int]) -> None:
    from spin_lightning.generation.responding import Responder
    from spin_lightning.types import Response

    class Mine:
        max_new_tokens = 8

        def generate(self, *args: Any) -> Any:
            yield 0, Response(ids, "length", -1.0)

    generator: Any = Mine()
    encoder: Any = type("Encoder", (), {"end_ids": (2,), "pad_id": 0})
    with pytest.raises(
        UserError, match=f"Mine gave the ids {min(ids)} to {max(ids)}, and the model has rows for 0 to 263"
    ):
        list(Responder(generator, encoder, tiny_model(), lambda: None).respond([[1]], [0]))


@pytest.mark.parametrize(
    "sampling", [{"nucleus": 0.5}, {"max_new_tokens": 4, "temperature": 1, "top_p": 1, "by": object}]
)
def test_a_generator_whose_sampling_cannot_be_kept_is_named(sampling: dict[str, Any]) -> None:
    from spin_lightning import SyntheticDataModule, TransformersGenerator

    class Mine(TransformersGenerator):
        @property
        def sampling(self) -> dict[str, Any]:
            return sampling

    with pytest.raises(UserError, match=r"Mine.sampling must be a dict that JSON can hold, with max_new_tokens"):
        SyntheticDataModule("rows.jsonl", generator=Mine())


def test_a_generator_of_another_form_is_named() -> None:
    from spin_lightning import SyntheticDataModule, TransformersGenerator

    class Old(TransformersGenerator):
        def generate(self, model, prompts, seeds, terminator_ids, pad_id=0): ...  # type: ignore

    class Short(TransformersGenerator):
        def generate(self, prompts, seeds): ...  # type: ignore

    for kind, got in ((Old, r"\(model, prompts, seeds, terminator_ids, pad_id=0\)"), (Short, r"\(prompts, seeds\)")):
        with pytest.raises(UserError, match=rf"generate must take .*, got {got}. The model is self.opponent.model"):
            SyntheticDataModule("rows.jsonl", generator=kind())
