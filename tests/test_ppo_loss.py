"""The losses of PPO against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from spin_lightning.ppo_loss import clipped_ratio_losses, is_clipped, k3, value_losses


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [(1, 1.3, -1.2, 0), (1, 0.7, -0.7, -1), (-1, 1.3, 1.3, 1), (-1, 0.7, 0.8, 0), (2, 1.0, -2.0, -2)],
)
def test_a_ratio_is_clipped_where_an_update_went_far_enough(
    advantage: float, ratio: float, loss: float, gradient: float
) -> None:
    log_prob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    found = clipped_ratio_losses(log_prob, old, advantages, clip=0.2)
    assert found.item() == pytest.approx(loss)
    found.sum().backward()
    assert log_prob.grad is not None
    assert float(log_prob.grad) / ratio == pytest.approx(gradient)  # by the ratio
    assert bool(is_clipped(log_prob.detach(), old, advantages, 0.2)) == (gradient == 0)


@pytest.mark.parametrize(
    ("value", "clip", "loss", "gradient"),
    [(0.9, 0.2, 0.045, 0.0), (0.5, 0.2, 0.125, -0.5), (0.9, None, 0.005, -0.1), (0.2, 0.2, 0.32, -0.8)],
)
def test_a_value_is_clipped_around_the_old_one(value: float, clip: float | None, loss: float, gradient: float) -> None:
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    found = value_losses(values, torch.ones(1).double(), torch.full((1,), 0.5).double(), clip)
    assert found.item() == pytest.approx(loss)
    found.sum().backward()
    assert values.grad is not None
    assert float(values.grad) == pytest.approx(gradient)


def test_the_estimate_of_the_divergence_by_hand() -> None:
    ratios = torch.tensor([0.5, -0.5], dtype=torch.float64)
    assert k3(ratios).tolist() == pytest.approx([0.106531, 0.148721], abs=5e-7)


def test_the_estimate_is_unbiased() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    divergence = float((q * (q / p).log()).sum())
    assert float((q * k3((q / p).log())).sum()) == pytest.approx(divergence)


def test_a_bandit_moves_towards_the_best_mixture() -> None:
    """pi_ref (.5, .3, .2), rewards (0, .1, 1): the best policies and what they reach, by hand."""
    reference, rewards = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.0, 0.1, 1.0]).double()
    for beta, policy, objective in [
        (1.0, (0.363581, 0.241092, 0.395327), 0.318605),
        (0.5, (0.213289, 0.156307, 0.630403), 0.425979),
        (0.1, (0.000113, 0.000185, 0.999701), 0.839086),
    ]:
        logits = torch.tensor(policy).double().log()
        best = torch.softmax(reference.log() + rewards / beta, 0)
        assert best.tolist() == pytest.approx(list(policy), abs=1e-6)
        worth = rewards - beta * (best / reference).log()
        assert float((best * worth).sum()) == pytest.approx(objective, abs=1e-6)
        # so no arm is better than another there, and the loss has no gradient
        logits = best.log().requires_grad_()
        now = logits.log_softmax(0)
        losses = clipped_ratio_losses(now, now.detach(), worth - float((best * worth).sum()), clip=0.2)
        (losses * best).sum().backward()
        assert logits.grad is not None
        assert logits.grad.abs().max() < 1e-12
