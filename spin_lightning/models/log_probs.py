"""Log-probabilities of responses: a model and a batch in, one number a response out.

No tokenizer, no loading, no Lightning. Which forward path the model takes is decided in ``forward_paths``.
"""

from __future__ import annotations

from torch import Tensor, nn

from spin_lightning.models.forward_paths import in_one_pass, token_log_probs
from spin_lightning.models.token_laws import token_batch_log_probs
from spin_lightning.types import PairBatch, PairLogProbs, ResponseBatch, TokenBatch, TokenLogProbs


def response_log_probs(model: nn.Module, batch: ResponseBatch) -> Tensor:
    """Log-probability of each response given its prompt: the SUM over its tokens, in nats.

    Args:
        model: A Hugging Face causal language model.
        batch: Prompts with their responses.

    Returns:
        Shape ``(R,)``, float32 (float64 for a float64 model). A response without tokens gives 0.

    Source: log p(y|x) = sum_j log p(y_j | x, y_<j), Chen et al. 2024 (arXiv:2401.01335), section 3.
    """
    return add_up(in_one_pass(model, token_log_probs, batch), batch)


def add_up(values: Tensor, batch: ResponseBatch) -> Tensor:
    """The sums over the tokens of each response, of values ``(N,)`` as ``batch.scored`` has the tokens."""
    # on a GPU this adds in a fixed order, which index_add does not
    return values.new_zeros(len(batch)).index_put((batch.response_index,), values, accumulate=True)


def batch_log_probs(model: nn.Module, batch: PairBatch | TokenBatch) -> PairLogProbs | TokenLogProbs:
    """What a loss asks of a model: log-probs of the responses of pairs, or of tokens and what may stand there."""
    return pair_log_probs(model, batch) if isinstance(batch, PairBatch) else token_batch_log_probs(model, batch)


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
