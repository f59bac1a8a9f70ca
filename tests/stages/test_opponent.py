"""The two opponents: equal in what they say, and only one of them holds weights."""

from __future__ import annotations

import pytest
import torch
from helpers import LOSSES, scored_batch, tiny_model
from torch import nn

from spin_lightning.models.log_probs import pair_log_probs
from spin_lightning.models.saving import weights_hash
from spin_lightning.stages.opponent import ResidentOpponent, StoredOpponent


class Game(nn.Module):
    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self.opponent = ResidentOpponent()


def test_resident_and_stored_opponent_give_the_same_losses() -> None:
    policy = tiny_model().train()
    resident, stored, batch = ResidentOpponent(), StoredOpponent(), scored_batch(policy)
    for opponent in (resident, stored):
        opponent.become(policy)
    with torch.no_grad():  # training moves the policy on
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    moved = pair_log_probs(policy, batch)
    for make, beta in LOSSES.values():
        loss = make()
        a, b = (loss(moved, opponent.log_probs(batch), beta, batch.initial).losses for opponent in (resident, stored))
        assert torch.equal(a, b)
    assert not torch.equal(moved.real, batch.opponent.real)
    assert not resident.log_probs(batch).real.requires_grad
    assert (resident.holds_weights, stored.holds_weights) == (True, False)


def test_resident_opponent_is_a_frozen_copy_until_it_becomes_the_policy_again() -> None:
    policy, batch = tiny_model(attention_dropout=0.5).train(), scored_batch(tiny_model())
    opponent = ResidentOpponent()
    opponent.become(policy)
    first = opponent.log_probs(batch).real
    assert torch.equal(opponent.log_probs(batch).real, first)  # evaluation mode: no dropout
    assert not any(parameter.requires_grad for parameter in opponent.parameters())
    with torch.no_grad():
        policy.model.norm.weight.mul_(1.5)
    assert torch.equal(opponent.log_probs(batch).real, first)
    kept = opponent.model
    opponent.become(policy)
    assert opponent.model is kept  # no third model in memory
    assert not torch.equal(opponent.log_probs(batch).real, first)
    assert policy.training and all(parameter.requires_grad for parameter in policy.parameters())


def test_resident_weights_stay_out_of_checkpoints_and_nothing_else_does() -> None:
    game = Game(tiny_model())
    before = game.state_dict()
    game.opponent.become(game.policy)
    saved = game.state_dict()
    assert list(saved) == list(before) and all(name.startswith("policy.") for name in saved)
    fresh = Game(tiny_model(seed=4))
    fresh.opponent.become(fresh.policy)
    held = weights_hash(fresh.opponent.model)
    fresh.load_state_dict(saved, strict=True)
    assert weights_hash(fresh.policy) == weights_hash(game.policy)
    assert weights_hash(fresh.opponent.model) == held


def test_missing_policy_weights_are_still_refused() -> None:
    game = Game(tiny_model())
    game.opponent.become(game.policy)
    for name in list(game.policy.state_dict()):
        saved = game.state_dict()
        del saved[f"policy.{name}"]
        with pytest.raises(RuntimeError, match=rf"Missing key.*policy\.{name}"):
            game.load_state_dict(saved, strict=True)


def test_an_opponent_of_ones_own_that_holds_weights_has_them_again_where_an_iteration_continues() -> None:
    class Mine(StoredOpponent):
        was: tuple[nn.Module, ...] = ()

        def become(self, policy: nn.Module) -> None:
            self.was = (policy,)

    class Holding(Mine):
        holds_weights = True

    model, opponents = tiny_model(), (Mine(), Holding())
    for opponent in opponents:
        opponent.restore(lambda: model)
    assert [opponent.was for opponent in opponents] == [(), (model,)]
