"""The scores that a reward model of ``transformers`` gives to conversations, each prompt once for all its responses.

A score is what ``AutoModelForSequenceClassification`` gives to the row alone: read at the last token that is not its
pad token. Where a model's prompts can be shared is tried on the model itself; one that cannot gets padded rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torch.nn import functional as F

from spin_lightning.models import rope, shared_prompt
from spin_lightning.models.attention import set_attention
from spin_lightning.models.batches import pack_rows, sequences
from spin_lightning.models.reward_model import AGREEMENT, score_padded
from spin_lightning.terminal import name_error, say
from spin_lightning.types import ResponseBatch

#: Tokens of the longest sequence that a model is tried on.
PROBE_TOKENS = 96
_shares: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@torch.no_grad()
def classifier_scores(
    classifier: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], max_tokens: int = 4096
) -> list[float]:
    """The score of each conversation, given as the ids of a prompt and of what follows it.

    Args:
        classifier: Of ``AutoModelForSequenceClassification`` with ``num_labels`` 1, in evaluation mode.
        rows: Those with the same prompt ids share a pass.
        max_tokens: Tokens in one pass. A row that is longer by itself gets a pass of its own.
    """
    cut = [_cut_at_pad(*row, classifier.config.get_text_config().pad_token_id) for row in rows]
    if classifier not in _shares:
        _shares[classifier] = _can_share(classifier)
    return (_score_shared if _shares[classifier] else _score_in_rows)(classifier, cut, max_tokens)


def shares_prompts(classifier: Any) -> bool:
    """Whether a model that was asked already computes a prompt once for all its responses."""
    return _shares.get(classifier, False)


def _cut_at_pad(prompt: Sequence[int], response: Sequence[int], pad_id: int | None) -> tuple[list[int], list[int]]:
    """A row up to the token at which it is read, which is the last of its second part."""
    ids = [*prompt, *response]
    end = next((place for place in range(len(ids), 0, -1) if ids[place - 1] != pad_id), 1)
    cut = len(prompt) if end > len(prompt) else 0
    return ids[:cut], ids[cut:end]


def _score_shared(classifier: Any, rows: Sequence[tuple[list[int], list[int]]], max_tokens: int) -> list[float]:
    numbers: dict[tuple[int, ...], int] = {}
    table = [
        {"prompt_id": numbers.setdefault(tuple(prompt), len(numbers)), "prompt_ids": prompt, "ids": response}
        for prompt, response in rows
    ]
    scores = [0.0] * len(rows)
    for some, batch, indices in pack_rows(table, ["ids"], max_tokens):
        found = _score_pass(classifier, move_data_to_device(batch, classifier.device)).tolist()
        for row, (index,) in zip(some, indices.tolist(), strict=True):
            scores[row] = found[index]
    return scores


def _score_pass(classifier: Any, batch: ResponseBatch) -> Tensor:
    hidden = shared_prompt.hidden_states(classifier.base_model, batch)
    last = torch.tensor([places[-1] for _, places in sequences(batch.lengths)], device=hidden.device)
    read, head = hidden[last], classifier.score
    if type(head) is nn.Linear:  # in bfloat16 scores within 1/256 of each other would be ties
        bias = None if head.bias is None else head.bias.float()
        return F.linear(read.float(), head.weight.float(), bias)[:, 0]
    found: Tensor = head(read)[:, 0].float()
    return found


def _score_in_rows(classifier: Any, rows: Sequence[tuple[list[int], list[int]]], max_tokens: int) -> list[float]:
    """By the model as it comes, in rows of about the same length; one by one where positions depend on the length."""
    pad_id = classifier.config.get_text_config().pad_token_id
    alone = pad_id is None or rope.boundary_of(classifier) is not None
    ids = [prompt + response for prompt, response in rows]
    order = sorted(range(len(rows)), key=lambda row: -len(ids[row]))
    scores = [0.0] * len(rows)
    while order:
        rope.settle(classifier)
        some = order[: 1 if alone else max(1, max_tokens // len(ids[order[0]]))]
        order = order[len(some) :]
        found = score_padded(classifier, [ids[row] for row in some], pad_id or 0).tolist()
        for row, score in zip(some, found, strict=True):
            scores[row] = score
    return scores


def _can_share(classifier: Any) -> bool:
    """Whether a model gives the scores of rows alone where responses share a prompt. A printed note says why not."""
    base, config = classifier.base_model, classifier.base_model.config
    own = shared_prompt.own_attention_of(config)
    try:
        if rope.boundary_of(classifier) is not None:
            raise NotImplementedError("its positions depend on the length of a pass")
        probe = _make_probe(classifier)
        expected = torch.cat([score_padded(classifier, [prompt + response], 0) for prompt, response in probe])
        shared_prompt.share_prompts(base)
        found = torch.tensor(_score_shared(classifier, probe, 10**6), dtype=torch.float32)
        difference = (found - expected.cpu()).abs().max()
        if not difference <= AGREEMENT[base.dtype] * expected.std():
            raise NotImplementedError(f"scores would differ by {float(difference):.1g}")
    except Exception as error:  # whatever a model's code does when it is used otherwise than it expects
        set_attention(config, own)
        say(
            f"note: {type(classifier).__name__} is asked in padded rows, prompts again and again ({name_error(error)})."
        )
        return False
    return True


def _make_probe(classifier: Any) -> list[tuple[list[int], list[int]]]:
    """Five conversations with two prompts, over the whole vocabulary, none of which ends with the pad token."""
    size, pad_id = classifier.get_input_embeddings().num_embeddings, classifier.config.get_text_config().pad_token_id
    most = getattr(classifier.config.get_text_config(), "max_position_embeddings", None) or PROBE_TOKENS
    longest = min(PROBE_TOKENS, most)
    tokens = [(7919 * place + 13) % size for place in range(6 * longest)]
    tokens = [(token + 1) % size if token == pad_id else token for token in tokens]
    lengths = (longest // 4, longest // 2, longest // 3, longest // 8, longest // 4, longest // 2, longest // 3)
    starts = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    first, a, b, c, second, d, e = (tokens[start:end] for start, end in pairwise(starts))
    return [(first, a), (first, b), (first, c), (second, d), (second, e)]
