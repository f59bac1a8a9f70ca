"""Next-token laws where response tokens stand: the most likely tokens and "the rest", all others as one outcome.

What such a law says of single tokens is exact; what it leaves out is how the rest divides among them. A law of another
model can be had of the same outcomes, so that two models are compared outcome by outcome.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spin_lightning.models.forward_paths import in_one_pass, token_log_probs, top_log_probs
from spin_lightning.models.head import head_of
from spin_lightning.types import PairLogProbs, ResponseBatch, TokenBatch, TokenLogProbs
from spin_lightning.types import TokenLaws as TokenLaws


def top_laws(model: nn.Module, batch: ResponseBatch, k: int) -> TokenLaws:
    """A model's law of the next token where each response token stands: its k most likely tokens, and the rest.

    Args:
        model: A Hugging Face causal language model.
        batch: Prompts with their responses, which have N tokens.
        k: How many tokens. With as many as the vocabulary has, or more, the law is whole.

    Returns:
        Without gradient, the likeliest token first, log-probs in float32 (float64 for a float64 model).

    Raises:
        UserError: The model is not a causal language model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from spin_lightning.models.batches import pack
        >>> config = LlamaConfig(
        ...     vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> laws = top_laws(LlamaForCausalLM(config), pack([([5, 6], [[7, 2], [8]])]), k=4)
        >>> laws.ids.shape, laws.rest.shape
        (torch.Size([3, 4]), torch.Size([3]))
    """
    return top_says(model, batch, k).laws


def top_says(model: nn.Module, batch: ResponseBatch, k: int) -> TokenLogProbs:
    """What :func:`top_laws` gives, and from the same pass the log-probs of the response tokens. Without gradient."""
    real, ids, log_probs = top_log_probs(model, batch, k)
    return TokenLogProbs(real, cut_laws(model, ids, log_probs))


def law_log_probs(model: nn.Module, batch: ResponseBatch, ids: Tensor) -> Tensor:
    """Log-probs of given tokens in the places of the response tokens, in nats, with gradient.

    Args:
        model: A Hugging Face causal language model.
        batch: Prompts with their responses, which have N tokens.
        ids: Token ids, shape ``(N, m)``, in the order of ``batch.scored``.

    Returns:
        Shape ``(N, m)``, float32 (float64 for a float64 model). A column with the response tokens themselves has the
        numbers of ``token_log_probs``.
    """
    return in_one_pass(model, lambda model, batch: token_log_probs(model, batch, ids), batch)


def laws_of(model: nn.Module, batch: ResponseBatch, ids: Tensor) -> TokenLaws:
    """A model's law of the next token of given outcomes, such as those of another's law, with gradient.

    Args:
        model: A Hugging Face causal language model.
        batch: Prompts with their responses, which have N tokens.
        ids: Token ids, shape ``(N, k)``, no token twice in a row.
    """
    return cut_laws(model, ids, law_log_probs(model, batch, ids))


def says_of(model: nn.Module, batch: ResponseBatch, ids: Tensor) -> TokenLogProbs:
    """What :func:`laws_of` gives, and from the same pass the log-probs of the response tokens, all with gradient."""
    values = law_log_probs(model, batch, torch.cat([batch.input_ids[batch.scored, None], ids], 1))
    return TokenLogProbs(values[:, 0], cut_laws(model, ids, values[:, 1:]))


def cut_laws(model: nn.Module, ids: Tensor, log_probs: Tensor) -> TokenLaws:
    """The laws of which a model gave these log-probs ``(N, k)``: what is missing to 1 is the rest, with gradient."""
    return TokenLaws(ids, log_probs, _log_rest(model, log_probs))


def token_batch_log_probs(model: nn.Module, batch: TokenBatch) -> TokenLogProbs:
    """What a model says of the response tokens of a batch and of the opponent's outcomes, in one pass."""
    return says_of(model, batch.responses, batch.opponent.laws.ids)


def sum_of_responses(says: TokenLogProbs, batch: TokenBatch) -> PairLogProbs:
    """What a model says of the tokens of a batch, summed over each response, as it would say it of a pair.

    In the place of the generated response stands what the opponent may say at each place, in the mean over its law.
    """
    of_opponent = batch.opponent.laws.outcomes
    is_possible = of_opponent > -torch.inf
    mean = (of_opponent.exp() * says.laws.outcomes.masked_fill(~is_possible, 0.0)).sum(1)
    index, lengths = (batch.responses.response_index,), batch.responses.response_lengths
    real, generated = (
        values.new_zeros(len(lengths)).index_put(index, values, accumulate=True) for values in (says.real, mean)
    )
    return PairLogProbs(real, generated, lengths, lengths)


def coarse_kl(a: TokenLaws, b: TokenLaws) -> Tensor:
    """KL divergence ``KL(a || b)`` of laws of the same outcomes, in nats, one a place.

    The rest counts as one outcome, so it is a lower bound of the divergence of the whole laws: what they disagree on
    within the rest is not seen. Exact where the k tokens are the whole vocabulary.

    Args:
        a: The law that the mean is over. Outcomes of probability 0 count nothing.
        b: A law of the same tokens.

    Returns:
        Shape ``(N,)``, with the gradients of both.

    Example:
        >>> ids, half = torch.tensor([[3]]), torch.tensor([0.5]).log()
        >>> skewed = torch.tensor([0.25, 0.75]).log()
        >>> coarse_kl(TokenLaws(ids, half[None], half), TokenLaws(ids, skewed[None, :1], skewed[1:]))
        tensor([0.1438])
    """
    of_a, of_b = a.outcomes, b.outcomes
    is_possible = of_a > -torch.inf
    of_a, of_b = of_a.masked_fill(~is_possible, 0.0), of_b.masked_fill(~is_possible, 0.0)
    return (of_a.exp() * is_possible * (of_a - of_b)).sum(1)


def _log_rest(model: nn.Module, log_probs: Tensor) -> Tensor:
    """What k tokens leave to all others, as a log-prob, never below the resolution of the dtype.

    One and the same function of the log-probs for every law, so that equal ones have the same rest, bit for bit.
    """
    if log_probs.shape[1] >= _vocabulary_of(model):
        return log_probs.new_full((len(log_probs),), -torch.inf)
    tokens = log_probs.logsumexp(1).clamp(max=-torch.finfo(log_probs.dtype).eps)
    return torch.log(-torch.expm1(tokens))


def _vocabulary_of(model: Any) -> int:
    """How many tokens a model's logits are of."""
    weight = getattr(head_of(model), "weight", None)
    return int(model.config.get_text_config(decoder=True).vocab_size) if weight is None else len(weight)
