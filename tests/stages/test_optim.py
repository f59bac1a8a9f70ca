"""Float32 master weights: AdamW as in float32, for a model in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spin_lightning.stages.optim import Float32Master, sum_in_passes


def master_of(weights: list[Tensor], rate: float = 0.01) -> Float32Master:
    return Float32Master(weights, lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.1))


def random_steps(
    weights: list[Tensor], optimizer: torch.optim.Optimizer, steps: range, others: list[Tensor] | None = None
) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for index, weight in enumerate(weights):
            gradient = torch.randn(weight.shape, generator=generator).to(torch.bfloat16)
            weight.grad = gradient.to(weight.dtype)
            if others:
                others[index].grad = gradient.float()
        optimizer.step()


def bfloat16_weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(99)
    return [torch.randn(shape, generator=generator).to(torch.bfloat16).requires_grad_() for shape in ((3, 5), (7,))]


def test_updates_too_small_for_bfloat16_add_up() -> None:
    weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    plain = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    optimizers = (
        Float32Master([weight], lambda parameters: torch.optim.SGD(parameters, lr=1e-4)),
        torch.optim.SGD([plain], lr=1e-4),
    )
    for _ in range(100):
        weight.grad, plain.grad = torch.ones_like(weight), torch.ones_like(plain)
        for optimizer in optimizers:
            optimizer.step()
    assert plain.item() == 1.0  # every single update of 0.0001 was rounded away
    assert weight.item() == 253 / 256  # 1 - 100 * 0.0001 = 0.99, and 253.44 / 256 rounds down
    assert optimizers[0].master_weights[0].item() == pytest.approx(0.99, abs=1e-5)


def test_equals_float32_adamw_on_the_same_gradients() -> None:
    weights = bfloat16_weights()
    plain = [weight.detach().float().requires_grad_() for weight in weights]
    master, reference = master_of(weights), torch.optim.AdamW(plain, lr=0.01, weight_decay=0.1)
    for step in range(30):
        for group in (*master.param_groups, *reference.param_groups):  # a schedule at work
            group["lr"] = 0.01 / (step + 1)
        random_steps(weights, master, range(step, step + 1), plain)
        reference.step()
        for weight, master_weight, other in zip(weights, master.master_weights, plain, strict=True):
            assert torch.equal(master_weight, other)
            assert torch.equal(weight, other.to(torch.bfloat16)) and weight.dtype == torch.bfloat16


def test_restored_optimiser_continues_to_the_bit(tmp_path: Path) -> None:
    whole = bfloat16_weights()
    random_steps(whole, master_of(whole), range(20))

    parts = bfloat16_weights()
    optimizer = master_of(parts)
    random_steps(parts, optimizer, range(9))
    torch.save({"weights": parts, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt")
    restored = [weight.detach().clone().requires_grad_() for weight in saved["weights"]]
    continued = master_of(restored, rate=0.5)  # what the state says counts
    continued.load_state_dict(saved["optimizer"])
    assert continued.param_groups[0]["lr"] == 0.01
    random_steps(restored, continued, range(9, 20))
    for a, b in zip(whole, restored, strict=True):
        assert torch.equal(a, b)


def test_weights_without_gradient_stay_as_they_are() -> None:
    weights = bfloat16_weights()
    before = weights[1].detach().clone()
    optimizer = master_of(weights)
    weights[0].grad = torch.ones_like(weights[0])
    optimizer.step()
    assert torch.equal(weights[1], before)
    optimizer.zero_grad()
    assert weights[0].grad is None


def test_closure_is_run_with_gradients_and_its_loss_returned() -> None:
    weights = bfloat16_weights()
    optimizer = master_of(weights)

    def closure() -> Tensor:
        loss = (weights[0] ** 2).sum()
        loss.backward()
        return loss

    before = float((weights[0].detach() ** 2).sum())
    with torch.no_grad():
        assert float(optimizer.step(closure)) == before
    assert float((weights[0].detach() ** 2).sum()) < before


def test_passes_add_up_in_one_block_as_plain_sums_do() -> None:
    torch.manual_seed(0)
    shared, single, unused = (torch.randn(3, 5).requires_grad_(), torch.randn(70).requires_grad_(), torch.ones(1))
    weights = [shared, single, unused.requires_grad_(), torch.randn(4, dtype=torch.float64).requires_grad_()]
    parts = [torch.randn(3, 5) for _ in range(3)]
    held: list[int] = []

    def loss_of(part: Tensor) -> Tensor:
        held.append(sum(weight.grad is not None for weight in weights))
        loss = (shared * part).sin().sum() + shared.square().sum() + weights[3].exp().sum().float()
        return loss if len(held) % 3 == 1 else loss + (single * part.sum()).cos().sum()

    expected: list[Tensor | None] = [None] * 4
    for part in parts:
        new = torch.autograd.grad(loss_of(part), weights, allow_unused=True)
        expected = [b if a is None else a if b is None else a + b for a, b in zip(expected, new, strict=True)]
    for factor in (1.0, 0.5):
        (factor * sum_in_passes(loss_of, parts, weights)).backward()
        assert weights[2].grad is None and not any(held)
        for weight, gradient in zip(weights, expected, strict=True):
            if gradient is not None:
                assert weight.grad is not None and torch.equal(weight.grad, factor * gradient)
        blocks = {weight.grad.untyped_storage().data_ptr() for weight in weights[:2] if weight.grad is not None}
        assert len(blocks) == 1
        for weight in weights:
            assert not weight._backward_hooks
            weight.grad = None
