"""How one token is chosen from logits: the law, and the random numbers, that every generator here shares."""

from __future__ import annotations

import torch
from torch import Tensor


def uniforms_of(seed: int, max_new_tokens: int) -> Tensor:
    """The random numbers of one answer, one for each token it may have, shape ``(max_new_tokens,)``.

    Of the seed only the lower 32 bits count: torch's generator on the CPU, a Mersenne Twister, begins with no more.
    """
    return torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=dtype_of_uniforms())


def dtype_of_uniforms() -> torch.dtype:
    """float32, or a wider default: under bf16-true the default is bfloat16, and would draw from 256 numbers only."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def choose_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Sample a token for each row, and say how likely it was.

    One uniform number a token, looked up in the cumulative distribution: much cheaper than a random number for
    every entry of the vocabulary, and what makes an answer a function of its seed.

    Args:
        logits: Shape ``(B, V)``, any floating dtype.
        uniforms: Numbers in [0, 1), shape ``(B,)``.
        temperature: Divides the logits. 0 takes the most likely token.
        top_p: Keeps the smallest set of tokens that has this much probability.

    Returns:
        Tokens, and their log-probs in nats under the untouched distribution, both ``(B,)``.
    """
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)
    log_normalizer = None
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        weights = logits.exp() if temperature == 1 else (logits / temperature).exp_()
        if top_p < 1:
            ordered, order = weights.sort(dim=-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            ordered.masked_fill_(before >= top_p * weights.sum(-1, keepdim=True), 0.0)
            weights = torch.zeros_like(weights).scatter_(1, order, ordered)
        cumulative = weights.cumsum_(-1)
        total = cumulative[:, -1:].contiguous()
        # `right`: a token of probability zero is never taken, not even for a uniform number of exactly 0. Nor for
        # one that rounding makes 1: the first entry that reaches the total belongs to a possible token
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)
        tokens = torch.minimum(tokens, torch.searchsorted(cumulative, total))
        if temperature == 1 and top_p == 1:
            log_normalizer = total.log()  # a pass over the vocabulary saved
    if log_normalizer is None:
        log_normalizer = logits.logsumexp(-1, keepdim=True)
    return tokens.squeeze(1), (logits.gather(1, tokens) - log_normalizer).squeeze(1)
