"""How far a policy has moved from the model it started from, where the held-out real responses stand.

The start's next-token laws are taken once, cut to the likeliest tokens, and kept in the run's folder; the policy's are
then had from the pass that measures the held-out NLL.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spin_lightning.models.log_probs import add_up, response_log_probs
from spin_lightning.models.token_laws import TokenLaws, coarse_kl, cut_laws, law_log_probs, top_laws
from spin_lightning.runs.files import replacing, sha256_of
from spin_lightning.types import ResponseBatch

#: Tokens of a law that are kept one by one: 8 bytes each.
TOKENS_OF_A_LAW = 64
#: Response tokens whose laws are kept: 8 MB.
MOST_TOKENS = 16_384


class StartLaws:
    """The laws of the start at the response tokens of some passes.

    Args:
        most_tokens: Response tokens whose laws are kept; passes beyond them have none.
    """

    def __init__(self, most_tokens: float = MOST_TOKENS) -> None:
        self.most_tokens = most_tokens
        self._laws: dict[str, TokenLaws] = {}  # by a hash of their pass

    def __len__(self) -> int:
        return sum(map(len, self._laws.values()))

    def add(self, model: Any, batch: ResponseBatch) -> None:
        """Take the laws of a model in the places of a pass, where there is still room for them."""
        if 0 < len(batch.scored) <= self.most_tokens - len(self):
            laws = top_laws(model, batch, TOKENS_OF_A_LAW)
            self._laws[_key_of(batch)] = TokenLaws(laws.ids.cpu(), laws.log_probs.cpu(), laws.rest.cpu())

    def of(self, batch: ResponseBatch) -> TokenLaws | None:
        """The laws in the places of a pass, on its device. None: they were not kept, or the pass is cut otherwise."""
        laws = self._laws.get(_key_of(batch)) if self._laws else None
        if laws is None:
            return None
        device = batch.input_ids.device
        return TokenLaws(laws.ids.to(device), laws.log_probs.to(device), laws.rest.to(device))

    def save(self, path: Path, of: str) -> None:
        """Write them into a file.

        Args:
            path: The file.
            of: What they belong to, such as a hash of the rows.
        """
        tensors = {
            name: torch.cat([getattr(laws, name) for laws in self._laws.values()]).contiguous()
            for name in ("ids", "log_probs", "rest")
        }
        passes = json.dumps([[key, len(laws)] for key, laws in self._laws.items()])
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"of": of, "passes": passes})

    def load(self, path: Path, of: str) -> None:
        """Read them from a file, if it is there and belongs to the same."""
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            kept = file.metadata()
            if kept.get("of") != of:
                return
            passes = json.loads(kept["passes"])
            parts: list[Iterator[Tensor]] = [
                iter(file.get_tensor(name).split([count for _, count in passes]))
                for name in ("ids", "log_probs", "rest")
            ]
        self._laws = {key: TokenLaws(*(next(part) for part in parts)) for key, _ in passes}


def measure(model: Any, batch: ResponseBatch, laws: TokenLaws | None) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the responses of a pass, and how far the model is from a law in the place of each token.

    One forward pass for both; the log-probs have the bits of ``response_log_probs``.

    Args:
        model: A causal language model.
        batch: The pass.
        laws: What ``StartLaws.of`` has of it.

    Returns:
        Shape ``(R,)``; and ``KL(model || laws)`` in nats, shape ``(N,)``, a lower bound, or None without laws.
    """
    if laws is None:
        return response_log_probs(model, batch), None
    targets = torch.cat([batch.input_ids[batch.scored][:, None], laws.ids], 1)
    values = law_log_probs(model, batch, targets)
    return add_up(values[:, 0], batch), coarse_kl(cut_laws(model, laws.ids, values[:, 1:]), laws)


def _key_of(batch: ResponseBatch) -> str:
    return sha256_of(json.dumps([batch.input_ids.tolist(), batch.lengths]))
