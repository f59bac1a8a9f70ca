"""The small parts between the data and the trainer: gate, opponents, metrics, optimiser, files, models."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import byte_tokenizer, save_tiny_model, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from spin_lightning import losses
from spin_lightning.data.encoding import Encoder
from spin_lightning.models import forward_paths
from spin_lightning.models.batches import collate_pairs, pack
from spin_lightning.models.forward_paths import rounding_of
from spin_lightning.models.loading import disable_dropout, load_policy, load_tokenizer, locate
from spin_lightning.models.log_probs import pair_log_probs
from spin_lightning.models.model_card import render_model_card
from spin_lightning.models.saving import save_model, weights_hash
from spin_lightning.runs.files import read_json, replacing, sha256_of, write_json
from spin_lightning.schedule import at_iteration, check_schedule
from spin_lightning.stages.gate import FLOOR, check_gate
from spin_lightning.stages.metrics import PairMetrics, RewardAccuracy
from spin_lightning.stages.opponent import ResidentOpponent, StoredOpponent
from spin_lightning.stages.optim import Float32Master
from spin_lightning.types import PairBatch, PairLogProbs, PairLossOutput, UserError

# --- Gate -----------------------------------------------------------------------------------------------------------


def scored_batch(model: nn.Module, initial: nn.Module | None = None) -> PairBatch:
    """Three pairs with the log-probs that this model gave them."""
    generator = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 60, (count,), generator=generator).tolist()

    pairs: list[dict[str, Any]] = [
        {
            "pair_id": i,
            "prompt_id": i,
            "prompt_ids": ids(4 + i),
            "real_ids": ids(3 + i),
            "generated_ids": ids(7 - 2 * i),
            "initial_ids": ids(2),
        }
        for i in range(3)
    ]
    for row in pairs:
        row |= {
            f"{player}_{side}_log_prob": 0.0 for player in ("opponent", "initial") for side in ("real", "generated")
        }
    (batch,) = collate_pairs(pairs, max_tokens=1000)
    was_training = model.training
    with torch.no_grad():
        batch.opponent = pair_log_probs(model.eval(), batch)
        batch.initial = pair_log_probs((initial or model).eval(), batch)
    model.train(was_training)
    return batch


def run_gate(
    model: nn.Module,
    batch: PairBatch,
    loss: losses.PairLoss | None = None,
    beta: float = 0.1,
    dtype: torch.dtype = torch.float32,
    rounding: Callable[[], float] | None = None,
) -> None:
    def recompute(evaluating: bool) -> PairLogProbs:
        was_training = model.training
        model.train(was_training and not evaluating)
        found = pair_log_probs(model, batch)
        model.train(was_training)
        return found

    check_gate(loss or losses.SpinLoss(), beta, batch, recompute(False), dtype, 2, recompute, rounding)


LOSSES: dict[str, tuple[Callable[[], losses.PairLoss], float]] = {
    **{link: (lambda link=link: losses.SpinLoss(link=link), 0.1) for link in losses.LINKS},
    "nll": (lambda: losses.SpinLoss(nll_weight=0.5), 0.1),
    "smoothing": (lambda: losses.SpinLoss(label_smoothing=0.2), 5.0),
    "alpha": (lambda: losses.AlphaSpinLoss(alpha=0.5), 1.0),
    "tspin": (losses.TSpinLoss, 1.0),
    "space": (losses.SpaceLoss, 1.0),
    "ipo": (losses.IpoLoss, 0.1),
    "dpop": (losses.DpopLoss, 0.1),
    "length": (losses.LengthNormalizedLoss, 2.0),
}


def test_every_loss_of_the_package_is_in_the_list_above() -> None:
    listed = {type(make()) for make, _ in LOSSES.values()}
    known = {value for value in vars(losses).values() if isinstance(value, type) and issubclass(value, losses.PairLoss)}
    assert listed == known - {losses.PairLoss}


@pytest.mark.parametrize("iteration", [0, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_gate_lets_every_loss_start(name: str, iteration: int) -> None:
    make, beta = LOSSES[name]
    loss = make()
    loss.iteration = iteration
    model = tiny_model().train()
    run_gate(model, scored_batch(model, initial=tiny_model(seed=9)), loss, beta)


@pytest.mark.parametrize("name", LOSSES)
def test_gate_stops_every_loss_with_stale_pairs(name: str) -> None:
    make, beta = LOSSES[name]
    with pytest.raises(UserError, match=r"stale pairs\. Remove this iteration's folder"):
        run_gate(tiny_model(seed=1).train(), scored_batch(tiny_model(seed=0)), make(), beta)


def test_gate_message_says_what_was_expected_and_what_came() -> None:
    model, batch = tiny_model(seed=1).train(), scored_batch(tiny_model(seed=0))
    found = pair_log_probs(model, batch)
    margins = 0.1 * ((found.real - batch.opponent.real) - (found.generated - batch.opponent.generated))
    loss = float(torch.log1p(torch.exp(-margins.double())).mean())
    lengths = [3, 4, 5, 7, 5, 3]
    ratios = torch.cat([found.real - batch.opponent.real, found.generated - batch.opponent.generated]).abs().tolist()
    ratio, length = max(zip(ratios, lengths, strict=True), key=lambda pair: pair[0] / pair[1] ** 0.5)
    with pytest.raises(UserError) as caught:
        run_gate(model, batch)
    message = str(caught.value)
    assert message.startswith("iteration 2 does not start where it should")
    assert f"every log-ratio 0 (within {0.002 * length**0.5:.3g} nats for a response of {length} tokens)" in message
    assert "must be 0.693147" in message and f"but the loss is {loss:.6f}" in message
    assert f"the log-ratio of such a response {ratio:.3g} nats" in message


def test_gate_names_dropout() -> None:
    model = tiny_model(attention_dropout=0.3).train()
    with pytest.raises(
        UserError, match=r"two passes over one batch differ, so dropout is on\. Set model\.dropout: false"
    ):
        run_gate(model, scored_batch(model))
    disable_dropout(model)
    run_gate(model, scored_batch(model))


def test_gate_names_a_policy_that_differs_in_training_mode() -> None:
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda _module, _args, logits: logits * 1.5 if model.training else logits)
    with pytest.raises(UserError, match="otherwise in training mode than in evaluation mode"):
        run_gate(model.train(), scored_batch(model))
    run_gate(model.eval(), scored_batch(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_names_the_dtype(dtype: torch.dtype) -> None:
    model = tiny_model().train()
    batch = scored_batch(model)
    batch.opponent.real += 1.2 * FLOOR[dtype] * batch.opponent.real_lengths.sqrt()
    with pytest.raises(UserError, match=rf"Likely cause: the dtype: {dtype} rounds more.*float32"):
        run_gate(model, batch, dtype=dtype)
    batch.opponent.real += 30 * FLOOR[dtype] * batch.opponent.real_lengths.sqrt()
    with pytest.raises(UserError, match="stale pairs"):
        run_gate(model, batch, dtype=dtype)


@pytest.mark.parametrize("side", ["real", "generated"])
@pytest.mark.parametrize("factor", [0.9, 1.1, -1.1])
def test_gate_allows_rounding_and_no_more_on_both_sides(side: str, factor: float) -> None:
    """A nat over sqrt(tokens) in one response of one pair, where means would hide it: the floor, or what was measured too."""
    model = tiny_model().train()
    for rounding, limit in ((None, 0.002), (lambda: 0.01, 0.002 + 5 * 0.01)):
        batch = scored_batch(model)
        getattr(batch.opponent, side)[1] += factor * limit * (4 if side == "real" else 5) ** 0.5
        if abs(factor) < 1:
            run_gate(model, batch, rounding=rounding)
        else:
            with pytest.raises(UserError, match="stale pairs"):
                run_gate(model, batch, rounding=rounding)


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_gate_allows_less_where_all_responses_are_off(factor: float) -> None:
    """Of six responses 0.5 + 1 / sqrt(6) of what one of them may be off by."""
    model = tiny_model().train()
    batch = scored_batch(model)
    for side in ("real", "generated"):  # to the same side, so that the loss stays
        lengths = getattr(batch.opponent, f"{side}_lengths")
        off = factor * 0.002 * (0.5 + 6**-0.5) * lengths.sqrt()
        setattr(batch.opponent, side, getattr(batch.opponent, side) + off)
    if factor < 1:
        run_gate(model, batch)
    else:
        with pytest.raises(UserError, match="stale pairs"):
            run_gate(model, batch)


@pytest.mark.parametrize("a_token", [0.01, 0.05, 0.24])
def test_gate_stops_a_wrong_opponent_in_bfloat16_however_long_the_answers(a_token: float) -> None:
    """The first loss would be 2 to 48 in place of 0.69."""
    lengths = torch.full((8,), 100)
    opponent = PairLogProbs(torch.full((8,), -150.0), torch.full((8,), -120.0), lengths, lengths)
    policy = PairLogProbs(opponent.real - 100 * a_token, opponent.generated + 100 * a_token, lengths, lengths)
    responses = pack([([1], [[1] * 100, [2] * 100])] * 8)
    places = torch.arange(16)
    batch = PairBatch(responses, places[::2], places[1::2], None, opponent, None, torch.arange(8))
    with pytest.raises(UserError, match="does not start where it should"):
        check_gate(losses.SpinLoss(), 1.0, batch, policy, torch.bfloat16, 0, lambda is_evaluating: policy)


def test_rounding_is_measured_only_where_it_could_matter() -> None:
    model = tiny_model().train()
    asked = []
    run_gate(model, scored_batch(model), rounding=lambda: asked.append(1) or 0.0)
    assert not asked
    batch = scored_batch(model)
    batch.opponent.real += 1.0
    with pytest.raises(UserError):
        run_gate(model, batch, rounding=lambda: asked.append(1) or 0.0)
    assert asked == [1]


def test_rounding_is_the_distance_a_token_of_two_forward_paths_through_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model().to(torch.bfloat16).train()
    batch = pack([([5, 6, 7], [[8, 9], [10]]), ([11], [[12, 13]])])
    seen = []

    def rows(model: nn.Module, batch: Any, is_linear: bool) -> Tensor:
        seen.append(batch.lengths)
        return forward_paths._shared(model, batch, is_linear) + torch.tensor(
            [0.02, -0.02, 0.1, 0.0, 0.06, -0.04, 0.0, 0.1, 0.1]
        )

    monkeypatch.setattr(forward_paths, "_separate", rows)
    # whole sequences: prompts make more numbers; the responses alone are no further off
    assert rounding_of(model, batch) == pytest.approx(
        ((2 * 0.02**2 + 3 * 0.1**2 + 0.06**2 + 0.04**2) / 9) ** 0.5, rel=0.01
    )
    assert seen == [((0, 5), (0, 4), (0, 3))] and model.training


def test_dropout_is_no_rounding() -> None:
    model = tiny_model(attention_dropout=0.5).train()
    assert rounding_of(model, scored_batch(model).responses) < 1e-4


def test_gate_passes_bfloat16_of_the_same_weights() -> None:
    model = tiny_model().to(torch.bfloat16).train()
    run_gate(model, scored_batch(model), dtype=torch.bfloat16)


@pytest.mark.parametrize("place", ["policy", "stored"])
def test_gate_does_not_pass_nan(place: str) -> None:
    model = tiny_model().train()
    batch = scored_batch(model)
    if place == "policy":
        with torch.no_grad():
            model.model.norm.weight[0] = math.nan
        cause = "log-probs of the policy that are not numbers"
    else:
        batch.opponent.generated[2] = math.nan
        cause = "stale pairs"
    with pytest.raises(UserError, match=f"the log-ratio of such a response inf nats. Likely cause: .*{cause}"):
        run_gate(model, batch)


class Lopsided(losses.SpinLoss):
    """Agrees in every log-ratio, and still has another loss: it looks at the gradient's presence."""

    def forward(self, policy: PairLogProbs, opponent: PairLogProbs, beta: float, initial: Any = None) -> PairLossOutput:
        output = super().forward(policy, opponent, beta, initial)
        return PairLossOutput(
            output.losses + 5.0 * (policy is not opponent) * policy.real.requires_grad, *list(vars(output).values())[1:]
        )


def test_gate_compares_the_loss_as_well_as_the_log_ratios() -> None:
    model = tiny_model().train()
    with pytest.raises(UserError, match=r"the loss must be 0\.693147 .* but the loss is 5\.693147"):
        run_gate(model, scored_batch(model), Lopsided())


# --- Opponents ------------------------------------------------------------------------------------------------------


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


# --- Metrics --------------------------------------------------------------------------------------------------------


def test_accuracy_counts_a_tie_one_half() -> None:
    accuracy = RewardAccuracy()
    accuracy.update(torch.zeros(4), torch.zeros(4))
    assert accuracy.compute() == 0.5  # an iteration's first step
    accuracy.update(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 4.0, -1.0]))  # win, tie, loss, win
    assert accuracy.compute() == pytest.approx((4 * 0.5 + 2.5) / 8)


def output_of(real: list[float], generated: list[float]) -> tuple[PairLossOutput, PairLogProbs]:
    rewards = torch.tensor(real), torch.tensor(generated)
    lengths = torch.ones(len(real), dtype=torch.long)
    log_probs = PairLogProbs((rewards[0] - 10).requires_grad_(), (rewards[1] - 20).requires_grad_(), lengths, lengths)
    return PairLossOutput(torch.zeros(len(real)), *rewards), log_probs


def test_means_weigh_every_pair_alike_however_it_was_batched() -> None:
    metrics = PairMetrics()
    first = metrics([output_of([1.0, 2.0, 3.0], [0.0, 2.0, 5.0])])
    second = metrics([output_of([10.0], [2.0])])
    assert float(first["rewards/real"]) == 2.0 and float(second["rewards/real"]) == 10.0  # a batch's own values
    assert float(first["rewards/accuracies"]) == 0.5 and float(second["rewards/accuracies"]) == 1.0
    expected = {
        "rewards/real": 16 / 4, "rewards/generated": 9 / 4, "rewards/margins": 7 / 4,
        "logps/real": 16 / 4 - 10, "logps/generated": 9 / 4 - 20, "rewards/accuracies": 2.5 / 4,
    }  # fmt: skip
    aliases = {"real": "chosen", "generated": "rejected"}
    for kind in ("rewards", "logps"):
        for ours, theirs in aliases.items():
            expected[f"{kind}/{theirs}"] = expected[f"{kind}/{ours}"]
    found = metrics.compute()
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)
    assert not any(value.requires_grad for value in found.values())
    metrics.reset()
    metrics([output_of([1.0], [3.0])])
    assert float(metrics.compute()["rewards/margins"]) == -2.0 and float(metrics.compute()["rewards/accuracies"]) == 0.0


def test_an_epochs_means_survive_a_checkpoint(tmp_path: Path) -> None:
    whole, before, after = PairMetrics(), PairMetrics(), PairMetrics()
    batches = [output_of([1.0, 2.0, 3.0], [0.0, 2.0, 5.0]), output_of([10.0], [2.0])]
    for batch in batches:
        whole([batch])
    before([batches[0]])
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after.load_state_dict(torch.load(tmp_path / "state.pt"), strict=True)
    after([batches[1]])
    assert {name: float(value) for name, value in after.compute().items()} == {
        name: float(value) for name, value in whole.compute().items()
    }


# --- Float32 master weights -----------------------------------------------------------------------------------------


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


# --- Schedule and files ---------------------------------------------------------------------------------------------


def test_schedule_takes_one_value_or_one_for_each_iteration() -> None:
    assert [at_iteration([5e-7, 5e-7, 1e-7], t) for t in range(3)] == [5e-7, 5e-7, 1e-7]
    assert [at_iteration(0.1, t) for t in range(3)] == [0.1] * 3
    check_schedule("beta", 0.1, 4)
    check_schedule("beta", [0.1] * 4, 4)
    for values in ([0.1] * 3, [0.1] * 5, []):
        with pytest.raises(
            UserError, match=rf"beta is a list of {len(values)} values .*has 4 iterations\. Give one value .*list of 4"
        ):
            check_schedule("beta", values, 4)


def test_replaced_file_is_old_or_new_and_never_half(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [child.name for child in path.parent.iterdir()] == ["file.txt"]


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {"name": "Größe 日本", "numbers": [1, 0.1, 1e-7, None, True], "nested": {"a": {}}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "Größe" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "b.json") is None
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert read_json(tmp_path / "a.json") == value


def test_hashes_of_bytes_text_files_and_values(tmp_path: Path) -> None:
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(b"abc") == sha256_of("abc") == sha256_of(tmp_path / "file") == abc
    assert sha256_of({"a": 1, "b": [2]}) == sha256_of({"b": [2], "a": 1}) != sha256_of({"a": 1, "b": [3]})


# --- Models ---------------------------------------------------------------------------------------------------------


def test_locate_tells_folders_files_and_hub_names_apart(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert locate(str(tmp_path)) == {"pretrained_model_name_or_path": str(tmp_path)}
    assert locate(str(tmp_path / "model.gguf")) == {
        "pretrained_model_name_or_path": str(tmp_path),
        "gguf_file": "model.gguf",
    }
    for name in ("gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert locate(name) == {"pretrained_model_name_or_path": name}


@pytest.mark.parametrize(
    "name", ["./nothing", "/nowhere/at/all", "~/nowhere-at-all", "runs/iteration_0/policy", "lost.gguf"]
)
def test_locate_refuses_a_path_where_nothing_is(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"model_name_or_path '{name}' does not exist \(looked at /.*\.gguf file, or a hub name"
    ):
        locate(name)


def test_folder_without_a_model_is_a_user_error(tmp_path: Path) -> None:
    for what, load in (("model", load_policy), ("tokenizer", load_tokenizer)):
        with pytest.raises(
            UserError, match=rf"no {what} could be loaded from '{tmp_path}': .*Give a Hugging Face folder"
        ):
            load(str(tmp_path))


def test_policy_is_loaded_in_the_dtype_asked_for(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert {parameter.dtype for parameter in load_policy(path, dtype=dtype).parameters()} == {dtype}


def test_disable_dropout_makes_training_mode_repeatable() -> None:
    llama = tiny_model(attention_dropout=0.5)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    )
    ids = torch.arange(5, 25)[None]
    for model in (llama, gpt2):
        model.train()
        with torch.no_grad():
            assert not torch.equal(model(ids).logits, model(ids).logits)
            disable_dropout(model)
            assert model.training
            first, second = model(ids).logits, model(ids).logits
            assert torch.equal(first, second)
            torch.testing.assert_close(first, model.eval()(ids).logits)
    assert llama.model.layers[0].self_attn.attention_dropout == 0.0
    assert gpt2.transformer.drop.p == 0.0


def test_weights_hash_sees_one_bit_a_name_and_a_dtype() -> None:
    model = tiny_model()
    start = weights_hash(model)
    assert weights_hash(copy.deepcopy(model).train()) == start == weights_hash(tiny_model())
    assert weights_hash(tiny_model(seed=1)) != start
    assert weights_hash(copy.deepcopy(model).to(torch.bfloat16)) != start
    changed = copy.deepcopy(model)
    with torch.no_grad():
        bits = changed.model.norm.weight.view(torch.int32)
        bits[3] ^= 1
    assert weights_hash(changed) != start
    plain, renamed = nn.Sequential(nn.Linear(2, 2)), nn.Sequential()
    renamed.add_module("first", plain[0])
    assert weights_hash(plain) != weights_hash(renamed)


def test_weights_hash_does_not_depend_on_memory_layout() -> None:
    wide, turned = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    turned.weight = nn.Parameter(wide.weight.detach().T.contiguous().T)
    assert not turned.weight.is_contiguous()
    assert weights_hash(wide) == weights_hash(turned)
    narrow = nn.Linear(2, 3, bias=False)  # the same bytes in another shape
    narrow.weight = nn.Parameter(wide.weight.detach().reshape(3, 2))
    assert weights_hash(narrow) != weights_hash(wide)


def exported(folder: Path, model: nn.Module, template: str | None = None) -> Encoder:
    encoder = Encoder(byte_tokenizer(), template)
    save_model(model, encoder.tokenizer, folder, "# A card\n", encoder.terminator_id)
    return encoder


def test_saved_model_is_a_folder_others_can_use(tmp_path: Path) -> None:
    model, folder = tiny_model(), tmp_path / "policy"
    encoder = exported(folder, model, "alpaca")
    again, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert weights_hash(again) == weights_hash(model)
    assert (folder / "README.md").read_text() == "# A card\n"
    assert list(folder.glob("*.safetensors"))
    assert tokenizer.chat_template == encoder.chat_template
    assert again.generation_config.eos_token_id == encoder.terminator_id
    assert again.generation_config.pad_token_id == encoder.pad_id
    assert again.generation_config.do_sample is True
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_saving_replaces_an_older_folder_and_what_a_crash_left(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    exported(folder, tiny_model(seed=0))
    (folder / "old.txt").write_text("x")
    (tmp_path / "policy.partial").mkdir()
    (tmp_path / "policy.partial" / "half.txt").write_text("x")
    exported(folder, tiny_model(seed=1))
    assert weights_hash(AutoModelForCausalLM.from_pretrained(folder)) == weights_hash(tiny_model(seed=1))
    assert not (folder / "old.txt").exists() and not (folder / "half.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_model_that_reloads_otherwise_does_not_get_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "policy"
    exported(folder, tiny_model(seed=0))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_args, **_settings: tiny_model(seed=2))
    with pytest.raises(RuntimeError, match=r"policy\.partial reloads with other weights.*Nothing was replaced"):
        exported(folder, tiny_model(seed=1))
    monkeypatch.undo()
    assert weights_hash(AutoModelForCausalLM.from_pretrained(folder)) == weights_hash(tiny_model(seed=0))


@pytest.mark.parametrize(
    "own",
    [{"temperature": 0.6, "top_p": 0.9}, {"num_beams": 1, "early_stopping": True}, {"do_sample": True, "top_k": 20}],
)
def test_odd_generation_settings_of_the_base_model_do_not_stop_the_export(tmp_path: Path, own: dict[str, Any]) -> None:
    model = tiny_model()
    model.generation_config = own_settings = GenerationConfig(**own)
    exported(tmp_path / "policy", model)
    assert model.generation_config is own_settings
    saved = json.loads((tmp_path / "policy" / "generation_config.json").read_text())
    assert saved["do_sample"] is True and not set(own) & (set(saved) - {"do_sample"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_saved_model_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    exported(tmp_path / "policy", model)
    assert weights_hash(load_policy(str(tmp_path / "policy"), dtype=dtype)) == weights_hash(model)


# --- Model card -----------------------------------------------------------------------------------------------------


def card(**changes: Any) -> str:
    summary = {
        "iteration": 1, "beta": 0.1, "first_loss": math.log(2), "last_loss": 0.5, "updates": 1556, "val_nll": 12.34567,
        "epoch_metrics": {"rewards/real": 0.25, "rewards/chosen": 0.25, "logps/rejected": 1, "rewards/accuracies": .75},
        "pairs": {"training_pairs": 99584, "training_pairs_dropped": 12},
    }  # fmt: skip
    manifest = {
        "binding": {"sampling": {"temperature": 1.0, "top_p": 1.0}, "opponent_sha256": "0123abcd" * 8, "seed": 7},
        "opponent": "runs/a|b`c", "versions": {"spin_lightning": "9.8.7", "torch": "2"},
    }  # fmt: skip
    return render_model_card({**summary, **changes}, manifest)


def test_model_card_says_what_made_the_model() -> None:
    text = card()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["spin", "self-play", "spin-lightning"],
    }  # fmt: skip
    for line in (
        "# Self-play fine-tuned policy, iteration 1",
        "| opponent | `runs/a/b'c` (weights sha256 `0123abcd0123abcd`) |",
        "| pairs | 99584 trained on, 12 identical ones dropped |",
        "| sampling | temperature 1.0, top_p 1.0 |",
        "| seed | 7 |",
        "| beta | 0.1 |",
        "| updates | 1556 |",
        "| loss, first and last step | 0.693147, 0.500000 |",
        "| held-out NLL | 12.3457 nats a response |",
        "| rewards/real | 0.2500 |",
        "| rewards/accuracies | 0.7500 |",
    ):
        assert line in body.splitlines()
    assert "`spin_lightning` 9.8.7" in body
    assert "chosen" not in body and "rejected" not in body  # the same numbers under other names


def test_model_card_of_a_game_that_did_not_measure() -> None:
    lines = card(val_nll=None, first_loss=None, last_loss=None).splitlines()
    assert "| held-out NLL | not measured |" in lines
    assert "| loss, first and last step | -, - |" in lines
