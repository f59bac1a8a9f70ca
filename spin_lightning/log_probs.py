"""Log-probabilities of responses: a model and a batch in, one number a response out.

No tokenizer, no loading, no Lightning. Each prompt is computed once for all its responses, and only the places that
predict a response token reach the LM head. Models that cannot do one or the other, found by trying it on the model
itself at its first batch, take the longer way to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from spin_lightning import head, shared_prompt
from spin_lightning.batches import pack
from spin_lightning.cpu_memory import round_up
from spin_lightning.rms_norm import fuse_rms_norms, unfuse_rms_norms
from spin_lightning.terminal import say
from spin_lightning.types import PairBatch, PairLogProbs, ResponseBatch

#: How closely two ways through one model must agree, in nats a token on average. A prompt that is not seen, or another
#: response that is, costs about 2 on a real model; rounding a tenth of this.
AGREEMENT = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


def response_log_probs(model: nn.Module, batch: ResponseBatch) -> Tensor:
    """Log-probability of each response given its prompt: the SUM over its tokens, in nats.

    Args:
        model: A Hugging Face causal language model.
        batch: Prompts with their responses.

    Returns:
        Shape ``(R,)``, float32 (float64 for a float64 model). A response without tokens gives 0.

    Source: log p(y|x) = sum_j log p(y_j | x, y_<j), Chen et al. 2024 (arXiv:2401.01335), section 3.
    """
    values = way_through(model)(model, batch)
    return values.new_zeros(len(batch)).index_add(0, batch.response_index, values)


def pair_log_probs(model: nn.Module, batch: PairBatch) -> PairLogProbs:
    """Log-probs of the real and generated (and, where present, initial) responses of pairs, in one forward pass."""
    log_probs, lengths = response_log_probs(model, batch.responses), batch.responses.response_lengths
    return PairLogProbs(
        log_probs[batch.real],
        log_probs[batch.generated],
        lengths[batch.real],
        lengths[batch.generated],
        None if batch.initial_response is None else log_probs[batch.initial_response],
    )


Way = Callable[[nn.Module, ResponseBatch], Tensor]
_chosen: WeakKeyDictionary[nn.Module, Way] = WeakKeyDictionary()


def way_through(model: nn.Module) -> Way:
    """How a model computes the log-probs of a batch's response tokens: the fastest way that proves right on it.

    The first call for a model tries each way on six short responses and compares with the model's plain forward pass. A
    model that cannot share prompts, or whose head cannot be taken apart, is told in a printed note.
    """
    if model not in _chosen:
        _chosen[model] = _choose(model)
    return _chosen[model]


def _shared(model: nn.Module, batch: ResponseBatch, is_linear: bool) -> Tensor:
    """Each prompt once, responses side by side."""
    hidden = shared_prompt.hidden_states(head.decoder_of(model), batch)
    predictors, targets = round_up(batch.predictors), round_up(batch.input_ids[batch.scored])
    values = head.token_log_probs(model, hidden.index_select(0, predictors), targets, is_linear=is_linear)
    return values[: len(batch.scored)]


def _separate(model: nn.Module, batch: ResponseBatch, is_linear: bool) -> Tensor:
    """Each response behind a prompt of its own: in padded rows, or end to end for FlashAttention, which wants no padding."""
    decoder, targets = head.decoder_of(model), batch.input_ids[batch.scored]
    if str(decoder.config._attn_implementation).startswith("flash_attention"):
        places, predictors = _end_to_end(batch)
        ids, positions = batch.input_ids[places], batch.position_ids[places]
        hidden = decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False).last_hidden_state[0]
    else:
        places, mask, predictors = _in_rows(batch)
        output = decoder(input_ids=batch.input_ids[places], attention_mask=mask, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)
    return head.token_log_probs(model, hidden.index_select(0, predictors), targets, is_linear=is_linear)


def _plain(model: nn.Module, batch: ResponseBatch) -> Tensor:
    """Rows, and the whole model as it comes: what the other ways are compared with."""
    places, mask, predictors = _in_rows(batch)
    output = model(input_ids=batch.input_ids[places], attention_mask=mask, use_cache=False)
    logits = output.logits.flatten(0, 1)[predictors]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, batch.input_ids[batch.scored][:, None]).squeeze(1) - logits.logsumexp(1)


def _sequences(batch: ResponseBatch) -> Iterator[tuple[int, list[int]]]:
    """For each response the length of its prompt, and the places of its prompt's tokens and its own."""
    start = 0
    for prompt_length, *lengths in batch.lengths:
        prompt = range(start, start + prompt_length)
        start += prompt_length
        for length in lengths:
            yield prompt_length, [*prompt, *range(start, start + length)]
            start += length


def _end_to_end(batch: ResponseBatch) -> tuple[Tensor, Tensor]:
    """Places in the batch of all sequences one after the other, and where in these each scored token is predicted."""
    places: list[int] = []
    predictors: list[int] = []
    for prompt_length, sequence in _sequences(batch):
        first = max(prompt_length, 1) - 1
        predictors += range(len(places) + first, len(places) + len(sequence) - 1)
        places += sequence
    device = batch.input_ids.device
    return torch.tensor(places, device=device), torch.tensor(predictors, dtype=torch.long, device=device)


def _in_rows(batch: ResponseBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The same in right padded rows ``(R, L)``, with their mask; predictors count through the flattened rows."""
    sequences = list(_sequences(batch))
    longest = max(len(sequence) for _, sequence in sequences)
    places, mask = torch.zeros(2, len(sequences), longest, dtype=torch.long)
    predictors: list[int] = []
    for row, (prompt_length, sequence) in enumerate(sequences):
        places[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
        predictors += range(row * longest + max(prompt_length, 1) - 1, row * longest + len(sequence) - 1)
    device = batch.input_ids.device
    return places.to(device), mask.to(device), torch.tensor(predictors, dtype=torch.long, device=device)


@torch.no_grad()
def _choose(model: nn.Module) -> Way:
    if not hasattr(model, "get_output_embeddings"):  # not a model of transformers: nothing is known about its parts
        return _plain
    config: Any = model.config
    was_training, attention = model.training, config._attn_implementation
    model.eval()
    failures = []
    chosen: Way = _plain
    try:
        probe = _probe(model)
        expected, is_linear = _plain(model, probe), head.is_linear(model)
        for name, way in (
            ("share a prompt between its responses", _shared),
            ("hand over its hidden states", _separate),
        ):
            chosen = partial(way, is_linear=is_linear)
            try:
                if way is _shared:
                    shared_prompt.share_prompts(model)
                    fuse_rms_norms(model)
                difference = float((chosen(model, probe) - expected).abs().mean())
            except Exception as error:  # whatever a model's code does when it is used otherwise than it expects
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            else:
                if difference <= AGREEMENT[compute_dtype(probe.input_ids.device, model)]:
                    break
                reason = f"log-probs would differ by {difference:.1g} nats a token"
            failures.append(f"cannot {name} ({reason})")
            config._attn_implementation = attention
            unfuse_rms_norms(model)
        else:
            chosen = _plain
    finally:
        model.train(was_training)
    if failures:
        say(f"note: {type(model).__name__} {', and '.join(failures)}; its log-probs are computed the longer way.")
    return chosen


def compute_dtype(device: torch.device, model: nn.Module) -> torch.dtype:
    """The dtype the matrix products of a model run in, here and now."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next(model.parameters()).dtype


def _probe(model: nn.Module) -> ResponseBatch:
    """Two prompts and three responses of different lengths, over the whole vocabulary."""
    embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    tokens = [(7919 * place + 13) % len(embeddings) for place in range(19)]
    batch = pack([(tokens[:6], [tokens[6:10], tokens[10:13]]), (tokens[13:16], [tokens[16:]])])
    return move_data_to_device(batch, embeddings.device)
