"""The loss of a reward model, by hand and where its optimum is known."""

from __future__ import annotations

import math

import pytest
import torch

from spin_lightning.losses import bradley_terry


def one(real: float, generated: float, p: float = 1.0, margin: float = 0.0, c: float = 0.0) -> float:
    tensors = [torch.tensor([value], dtype=torch.float64) for value in (real, generated, p, margin)]
    return float(bradley_terry(*tensors, centring=c))


def test_values_by_hand() -> None:
    assert one(0.3, 0.3) == pytest.approx(math.log(2), abs=1e-15)
    assert one(1, 0) == pytest.approx(0.313262, abs=5e-7)
    assert one(1, 0, margin=0.5) == pytest.approx(0.474077, abs=5e-7)
    assert one(2, 0.5, c=0.01) == pytest.approx(0.263913, abs=5e-7)
    assert one(1, 0, p=0.7) == pytest.approx(0.7 * 0.313262 + 0.3 * 1.313262, abs=1e-6)
    assert one(0, 1, p=0.3) == pytest.approx(one(1, 0, p=0.7), abs=1e-15)  # the sides are no more than names
    assert one(200, 0, p=0.9) == pytest.approx(20) and one(-200, 0) == pytest.approx(200)  # no overflow


def test_without_preference_and_margin_it_is_that_of_certain_pairs() -> None:
    real, generated = torch.tensor([0.5, -1.0]), torch.tensor([0.2, 3.0])
    assert torch.equal(bradley_terry(real, generated), bradley_terry(real, generated, torch.ones(2), torch.zeros(2)))


def test_a_preference_of_0_7_is_met_at_its_log_odds() -> None:
    lead = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([lead], max_iter=100, tolerance_grad=1e-12, tolerance_change=0)
    p = torch.tensor([0.7], dtype=torch.float64)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = bradley_terry(lead[None], torch.zeros(1, dtype=torch.float64), p).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert lead.item() == pytest.approx(0.847298, abs=5e-7) and closure().item() == pytest.approx(0.610864, abs=5e-7)


@pytest.mark.parametrize("centring", [0.0, 0.01])
def test_the_scores_of_three_items_are_recovered_from_their_preferences(centring: float) -> None:
    """Exact probabilities of all pairs: differences to 1e-6. Centring also says where they lie, at a small price."""
    true = torch.tensor([0.0, 1.3, -0.7], dtype=torch.float64)
    first, second = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    p = torch.sigmoid(true[first] - true[second])
    scores = torch.full((3,), 5.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=500, tolerance_grad=1e-13, tolerance_change=0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = bradley_terry(scores[first], scores[second], p, centring=centring).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = scores.detach()
    gaps, expected = found[first] - found[second], true[first] - true[second]
    if centring:
        assert abs(float(found.sum())) < 0.1 and (gaps - expected).abs().max() < 0.2
    else:
        assert (gaps - expected).abs().max() < 1e-6
        assert float(found.mean()) == pytest.approx(5.0, abs=1e-6)  # only differences matter
