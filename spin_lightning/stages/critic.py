"""What is expected of a response before each of its tokens: a linear head on the hidden states of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spin_lightning.models.forward_paths import log_probs_and_hidden, predicting_hidden, token_log_probs
from spin_lightning.types import ResponseBatch


class Critic(nn.Module):
    """``V(s_t) = scale * w . h_t`` with ``h_t`` the last hidden state that predicts token t. ``w`` is 0 at the start.

    Computed in float32 (float64 for a float64 model). The scale is there for the optimiser: under Adam, whose steps
    have one size, it multiplies the learning rate of the head.

    Args:
        width: Of the hidden states.
        scale: What the head's output is multiplied by.
        trunk: The model whose hidden states are taken. None: the policy's, which learn from the values too.
    """

    def __init__(self, width: int, scale: float, trunk: Any = None) -> None:
        super().__init__()
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.head = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.scale = scale
        self.trunk = trunk
        head = None if trunk is None else trunk.get_output_embeddings()
        if head is not None and head.weight is not trunk.get_input_embeddings().weight:
            head.requires_grad_(False)  # no value depends on it

    def forward(self, policy: nn.Module, batch: ResponseBatch, trains_policy: bool = True) -> tuple[Tensor, Tensor]:
        """The policy's log-prob of each response token, and what was expected before it; both of shape ``(N,)``.

        Args:
            policy: Whose log-probs are wanted.
            batch: Prompts with their responses.
            trains_policy: Whether gradients flow into it.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains_policy):
            if self.trunk is None:
                log_probs, hidden = log_probs_and_hidden(policy, batch)
            else:
                log_probs = token_log_probs(policy, batch)
        if self.trunk is not None:
            hidden = predicting_hidden(self.trunk, batch)
        with torch.autocast(hidden.device.type, enabled=False):
            return log_probs, self.scale * (hidden.to(self.head.dtype) @ self.head)
