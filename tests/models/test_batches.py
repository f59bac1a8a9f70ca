"""Packing: nothing padded, nothing computed twice, nothing lost, and the gradient is that of the plain batch."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from helpers import tiny_model
from torch import Tensor, nn

from spin_lightning.data.loader import ResumableSampler
from spin_lightning.losses import SpinLoss
from spin_lightning.models import forward_paths
from spin_lightning.models.batches import collate_pairs, collate_prompts, pack, pack_rows
from spin_lightning.models.log_probs import pair_log_probs, response_log_probs
from spin_lightning.stages.optim import sum_in_passes
from spin_lightning.types import Prompt, Row


def make_pairs(
    num_prompts: int = 6, answers: int = 3, seed: int = 0, with_initial: bool = False
) -> list[dict[str, Any]]:
    """Pairs of different lengths; those of one prompt share its real response."""
    rng = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [rng.randrange(3, 32) for _ in range(rng.randint(least, most))]

    pairs: list[dict[str, Any]] = []
    for prompt_id in range(num_prompts):
        prompt, real = ids(2, 12), ids(1, 9)
        for _ in range(answers):
            pairs.append(
                {
                    "pair_id": len(pairs), "prompt_id": prompt_id, "prompt_ids": prompt, "real_ids": real,
                    "generated_ids": ids(1, 9), "initial_ids": ids(1, 4) if with_initial else None,
                    "opponent_real_log_prob": -3.0 - prompt_id, "opponent_generated_log_prob": -5.0 - len(pairs),
                    "initial_real_log_prob": None, "initial_generated_log_prob": None,
                }
            )  # fmt: skip
    return pairs


def test_pairs_of_one_prompt_hold_it_and_their_real_response_once() -> None:
    pairs = make_pairs(2, 3)
    (batch,) = collate_pairs(pairs, 1000)
    firsts = [pairs[0], pairs[3]]
    expected = sum(len(pair["prompt_ids"]) + len(pair["real_ids"]) for pair in firsts)
    assert len(batch.responses.input_ids) == expected + sum(len(pair["generated_ids"]) for pair in pairs)
    assert batch.real.tolist() == [0, 0, 0, 4, 4, 4] and batch.generated.tolist() == [1, 2, 3, 5, 6, 7]
    assert batch.opponent.real.tolist() == [-3.0] * 3 + [-4.0] * 3
    assert batch.opponent.generated.tolist() == [-5.0, -6.0, -7.0, -8.0, -9.0, -10.0]
    assert batch.opponent.generated_lengths.tolist() == [len(pair["generated_ids"]) for pair in pairs]
    assert batch.initial is None and batch.initial_response is None and len(batch) == 6


@pytest.mark.parametrize("max_tokens", [30, 60, 1000])
def test_a_batch_has_as_many_passes_for_each_process_where_it_has_the_prompts(max_tokens: int) -> None:
    pairs = make_pairs(7, 2)
    one = collate_pairs(pairs, max_tokens)
    for processes in (1, 2, 3, 4):
        passes = collate_pairs(pairs, max_tokens, multiple_of=processes)
        assert sorted(pair for part in passes for pair in part.pair_ids.tolist()) == list(range(14))
        assert len(passes) >= len(one) and (len(passes) % processes == 0 or len(passes) == 7)
        lengths = [len(part.responses.input_ids) for part in passes]
        assert max(lengths) <= max(max_tokens, max(len(part.responses.input_ids) for part in collate_pairs(pairs, 1)))
    assert [part.pair_ids.tolist() for part in collate_pairs(pairs, max_tokens, multiple_of=1)] == [
        part.pair_ids.tolist() for part in one
    ]
    assert len(collate_pairs(make_pairs(1, 3), max_tokens, multiple_of=2)) == 1  # of one prompt, which is not cut


def test_in_every_layout_a_token_is_predicted_at_the_place_before_it() -> None:
    """Worked out by hand: an empty prompt, an empty response, and two responses to one prompt among them."""
    batch = pack([([5, 6], [[7, 2], [8]]), ([], [[9, 3]]), ([4], [[], [1]])])
    assert batch.input_ids.tolist() == [5, 6, 7, 2, 8, 9, 3, 4, 1]
    assert (batch.scored.tolist(), batch.predictors.tolist()) == ([2, 3, 4, 6, 8], [1, 2, 1, 5, 7])
    assert (batch.response_index.tolist(), batch.response_lengths.tolist()) == ([0, 0, 1, 2, 4], [2, 1, 2, 0, 1])
    places, predictors = forward_paths._lay_end_to_end(batch)
    assert batch.input_ids[places].tolist() == [5, 6, 7, 2, 5, 6, 8, 9, 3, 4, 4, 1]
    assert predictors.tolist() == [1, 2, 5, 7, 10]
    places, mask, predictors = forward_paths._pad_in_rows(batch)  # 4 wide; none for the response without a token
    assert batch.input_ids[places][mask.bool()].tolist() == [5, 6, 7, 2, 5, 6, 8, 9, 3, 4, 1]
    assert predictors.tolist() == [1, 2, 5, 8, 12]


@pytest.mark.parametrize("max_tokens", [1, 30, 50, 80, 10_000])
@pytest.mark.parametrize("with_initial", [False, True])
def test_every_pair_is_in_one_pass_with_its_own_tokens(max_tokens: int, with_initial: bool) -> None:
    pairs = make_pairs(with_initial=with_initial)
    sides = ["real_ids", "generated_ids", *(["initial_ids"] if with_initial else [])]
    seen = []
    for rows, batch, indices in pack_rows(pairs, sides, max_tokens):
        spans, start = [], 0
        for prompt, *lengths in batch.lengths:
            ids = batch.input_ids[start : start + prompt].tolist()
            start += prompt
            for length in lengths:
                spans.append((ids, batch.input_ids[start : start + length].tolist()))
                start += length
        assert start == len(batch.input_ids)  # no padding
        for row, index in zip(rows, indices.tolist(), strict=True):
            assert [spans[i] for i in index] == [(pairs[row]["prompt_ids"], pairs[row][side]) for side in sides]
        seen += rows
        assert len(batch.input_ids) <= max_tokens or len(rows) == 1
    assert sorted(seen) == list(range(len(pairs)))


def test_passes_are_few_and_of_about_equal_size() -> None:
    for seed in range(20):
        pairs = make_pairs(40, 1, seed)
        sizes = [len(batch.input_ids) for _, batch, _ in pack_rows(pairs, ["real_ids", "generated_ids"], 150)]
        assert len(sizes) <= -(-sum(sizes) // 150) + 1
        assert max(sizes) - min(sizes) <= 30


def test_answers_of_one_prompt_are_cut_apart_where_they_do_not_fit() -> None:
    pairs = make_pairs(1, 16)
    parts = collate_pairs(pairs, 60)
    assert len(parts) > 1 and all(len(part.responses.input_ids) <= 60 for part in parts)
    assert sorted(int(i) for part in parts for i in part.pair_ids) == list(range(16))


def test_real_responses_alone_are_packed_for_sft() -> None:
    row = Row(({"role": "user", "content": ""},), "")
    prompts = [Prompt(i, row, [1] * (i + 1), [2] * (3 - i), "stop") for i in range(3)]
    (batch,) = collate_prompts(prompts, 100)
    assert batch.lengths == ((1, 3), (2, 2), (3, 1)) and len(batch) == 3
    assert [len(part) for part in collate_prompts(prompts, 4)] == [1, 1, 1]


# --- The gradient ---------------------------------------------------------------------------------------------------


def slow_loss(model: nn.Module, pairs: list[dict[str, Any]]) -> Tensor:
    """The mean loss over padded pairs, one row a response, with whole softmaxes: as preference trainers do it."""
    rows = [[*pair["prompt_ids"], *pair[side]] for side in ("real_ids", "generated_ids") for pair in pairs]
    longest = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    picked = logits[:, :-1].gather(2, input_ids[:, 1:, None]).squeeze(2)
    sums = torch.stack(
        [picked[i, len(pairs[i % len(pairs)]["prompt_ids"]) - 1 : len(row) - 1].sum() for i, row in enumerate(rows)]
    )
    real, generated = sums.chunk(2)
    opponent = [torch.tensor([pair[f"opponent_{side}_log_prob"] for pair in pairs]) for side in ("real", "generated")]
    return nn.functional.softplus(-0.1 * (real - opponent[0] - generated + opponent[1])).mean()


@pytest.mark.parametrize("max_tokens", [25, 60, 10_000])
def test_gradient_is_that_of_the_plain_padded_batch_in_float64(max_tokens: int) -> None:
    model, pairs, loss = tiny_model(32).double(), make_pairs(), SpinLoss()
    expected = slow_loss(model, pairs)
    expected.backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    def loss_of(part: Any) -> Tensor:
        return loss(pair_log_probs(model, part), part.opponent, 0.1, None).losses.sum() / len(pairs)

    found = sum_in_passes(loss_of, collate_pairs(pairs, max_tokens), list(model.parameters()))
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):  # its norms are taken in float32
        assert (parameter.grad - gradient).norm() <= 2e-6 * gradient.norm()


def test_passes_add_up_scale_and_leave_unused_weights_alone() -> None:
    used, unused = (torch.tensor([value], requires_grad=True) for value in (3.0, 5.0))
    parts = [1.0, 2.0, 4.0]
    total = sum_in_passes(lambda part: (part * used**2).sum(), parts, [used, unused])
    assert total.item() == 63.0 and used.grad is None  # nothing before the backward pass asks
    (0.5 * total).backward()
    assert used.grad.tolist() == [21.0] and unused.grad is None
    used.grad = None
    sum_in_passes(lambda part: (part * used**2).sum(), parts, [used]).backward()
    sum_in_passes(lambda part: (part * used**2).sum(), parts, [used]).backward()
    assert used.grad.tolist() == [84.0]  # accumulation
    with torch.no_grad():
        assert float(sum_in_passes(lambda part: (part * used**2).sum(), parts, [used])) == 63.0


def test_only_one_part_is_in_memory_at_a_time() -> None:
    alive: list[int] = []
    count = 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return weight.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            nonlocal count
            alive.append(count)
            count -= 1
            return grad

    weight = torch.tensor(1.0, requires_grad=True)
    sum_in_passes(lambda part: Counted.apply(weight) * part, [1.0, 2.0, 3.0], [weight]).backward()
    assert alive == [1, 1, 1] and float(weight.grad) == 6.0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_response_has_the_same_log_prob_to_the_bit_wherever_it_is_packed(dtype: torch.dtype) -> None:
    """So an iteration's first loss is ln 2 although pairs were scored in other batches than they are trained in."""
    model = tiny_model(32).to(dtype).eval()
    pairs = make_pairs(8, 1)
    values = []
    for max_tokens in (1, 40, 90, 10_000):
        found = torch.zeros(8, 2)
        for rows, batch, indices in pack_rows(pairs, ["real_ids", "generated_ids"], max_tokens):
            found[rows] = response_log_probs(model, batch)[indices]
        values.append(found)
    for other in values[1:]:
        assert (other - values[0]).abs().max() <= (1e-5 if dtype is torch.float32 else 0.1)


# --- The order ------------------------------------------------------------------------------------------------------


def order(prompt_ids: list[int], epoch: int, seed: int = 0, start: int = 0, together: bool = False) -> list[int]:
    sampler = ResumableSampler(prompt_ids, seed, together)
    sampler.set_epoch(epoch)
    sampler.start = start
    assert len(sampler) == len(prompt_ids)
    return list(sampler)


@pytest.mark.parametrize("together", [False, True])
def test_order_is_a_function_of_seed_and_epoch_and_can_begin_in_its_middle(together: bool) -> None:
    prompt_ids = [i % 10 for i in range(25)]  # as the pairs of this iteration and of the last one stand in a table
    first = order(prompt_ids, 0, together=together)
    assert sorted(first) == list(range(25))
    assert first == order(prompt_ids, 0, together=together) != order(prompt_ids, 1, together=together)
    assert first != order(prompt_ids, 0, seed=1, together=together)
    assert order(prompt_ids, 0, start=11, together=together) == first[11:]
    runs = sum(prompt_ids[a] != prompt_ids[b] for a, b in itertools.pairwise(first))
    assert (runs == 9) == together
