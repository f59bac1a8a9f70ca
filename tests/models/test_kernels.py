"""How a candidate is chosen: what may be chosen, when it is worth it, and who has the last word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from spin_lightning.models import kernels
from spin_lightning.models.kernels import Kernel, check_kernels, kernel_of, pin_kernels
from spin_lightning.types import UserError


def fail(x: Tensor) -> Tensor:
    raise NotImplementedError("no such kernel")


CANDIDATES: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda x: x * 3,
    "other": lambda x: x + x + x,
    "wrong": lambda x: x * 3.5,
    "broken": fail,
}


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the candidates that are equal are found to take, in their order."""
    took = [3.0, 1.0]
    monkeypatch.setattr(
        kernels, "KERNELS", {"times_three": Kernel(CANDIDATES, lambda model, dtype: (sample(dtype),), 1.5)}
    )
    monkeypatch.setattr(kernels, "_tried", {})
    monkeypatch.setattr(kernels, "_pinned", {})
    monkeypatch.setattr(kernels, "_time_candidates", lambda functions, inputs: took[: len(functions)])
    return took


def sample(dtype: torch.dtype) -> Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype)


def make_model(dtype: torch.dtype = torch.bfloat16) -> Any:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes)).to(dtype)


def test_the_fastest_that_is_equal_is_taken_and_named_once(
    seconds: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernel_of(make_model(), "times_three") == "other"
    said = "note: times_three is other, here 3.0 times as fast as first (model.kernels can pin it).\n"
    assert capsys.readouterr().out == said
    seconds[:] = [1.0, 3.0]
    assert kernel_of(make_model(), "times_three") == "other"  # for the whole process
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("took", [[1.4, 1.0], [1.0, 1.0], [1.0, 5.0]])
def test_what_is_not_clearly_faster_is_not_taken(
    took: list[float], seconds: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    seconds[:] = took
    assert kernel_of(make_model(), "times_three") == "first"
    assert capsys.readouterr().out == ""


def test_what_is_not_equal_or_does_not_run_is_not_timed(seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Any] = []
    monkeypatch.setattr(kernels, "_time_candidates", lambda functions, _: timed.extend(functions) or [2.0, 1.0])
    kernel_of(make_model(), "times_three")
    assert timed == [CANDIDATES["first"], CANDIDATES["other"]]


def test_in_float32_there_is_no_trial(seconds: list[float]) -> None:
    assert kernel_of(make_model(torch.float32), "times_three") == "first"
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel_of(make_model(torch.float32), "times_three") == "other"


def test_what_is_pinned_is_taken_by_every_model_of_that_dtype(seconds: list[float]) -> None:
    """By copies of a policy too, such as its opponent; and not by what computes in float32 later."""
    seconds[:] = [1.0, 3.0]
    pin_kernels(make_model(), {"times_three": "other"})
    assert kernel_of(make_model(), "times_three") == "other"
    assert kernel_of(make_model(torch.float32), "times_three") == "first"
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel_of(make_model(torch.float32), "times_three") == "other"
    pin_kernels(make_model(), {})
    assert kernel_of(make_model(), "times_three") == "first"


@pytest.mark.parametrize("first", [fail, lambda x: x * torch.nan])
def test_without_a_first_candidate_to_compare_with_there_is_no_other(
    first: Callable[[Tensor], Tensor], seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = {**CANDIDATES, "first": first}
    monkeypatch.setitem(kernels.KERNELS, "times_three", Kernel(candidates, lambda model, dtype: (sample(dtype),), 1.5))
    assert kernel_of(make_model(), "times_three") == "first"


def test_a_model_whose_config_does_not_say_its_shape_takes_the_first(
    seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 4 has heads of two widths, and refuses to name one."""

    def refuse(model: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        raise RuntimeError("ambiguous")

    monkeypatch.setitem(kernels.KERNELS, "times_three", Kernel(CANDIDATES, refuse, 1.5))
    assert kernel_of(make_model(), "times_three") == "first"
    assert kernels.find_error(make_model(), "times_three", "other") == ""


def test_a_candidate_of_another_version_is_an_error_in_words() -> None:
    assert "this version has grouped, folded, compiled" in kernels.find_error(make_model(), "decode_attention", "bent")


def test_the_clock_takes_turns_and_keeps_the_least() -> None:
    calls: list[str] = []
    times = kernels._time_candidates([lambda: calls.append("a"), lambda: calls.append("b")], ())
    assert calls == ["a", "b"] * kernels.TRIAL_CALLS
    assert all(0 <= time < kernels.TRIAL_SECONDS for time in times)


@pytest.mark.parametrize(
    ("choices", "named"),
    [({"decode_atention": "folded"}, "'decode_atention' of 'folded'"), ({"decode_attention": "bent"}, "of 'bent'")],
)
def test_an_unknown_name_is_refused_with_those_that_there_are(choices: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=rf"model\.kernels knows no .*{named}. .*grouped or folded or compiled"):
        check_kernels(choices, "model.kernels")
