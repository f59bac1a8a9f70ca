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
from spin_lightning.runs import processes
from spin_lightning.runs.files import replacing, sha256_of
from spin_lightning.types import ResponseBatch

#: Tokens of a law that are kept one by one: 12 bytes each.
TOKENS_OF_A_LAW = 64
#: Response tokens whose laws are kept: 13 MB.
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


class HeldOutLaws:
    """The start's laws where a run's held-out rows stand: taken before the first update, and kept in the run's folder.

    In runs of one process alone; elsewhere there are none.
    """

    def __init__(self) -> None:
        self._laws: StartLaws | None = None
        self._is_start = False

    def begin(self, trainer: Any) -> None:
        """Have the laws at hand where a fit measures its held-out rows."""
        self._is_start = bool(trainer.sanity_checking and trainer.global_step == 0)
        if trainer.state.fn != "fit" or processes.world_size() > 1:
            self._laws = None
        elif self._is_start:
            self._laws = StartLaws()
        elif self._laws is None:  # of a run that continues
            self._laws = StartLaws()
            if (path := _place_in_run(trainer)) is not None:
                self._laws.load(path, trainer.datamodule.held_out_hash)

    def measure(self, model: Any, part: Any) -> tuple[Tensor, Tensor | None]:
        """What :func:`measure` gives of a part of a held-out batch; of the start it takes the laws."""
        if self._laws is None or not isinstance(part, ResponseBatch):
            return response_log_probs(model, part), None
        log_probs, divergences = measure(model, part, self._laws.of(part))
        if divergences is None and self._is_start:
            self._laws.add(model, part)
        return log_probs, divergences

    def keep(self, trainer: Any) -> None:
        """Write them into the run's folder, after they were taken."""
        path = _place_in_run(trainer)
        if self._is_start and self._laws is not None and len(self._laws) and path is not None:
            self._laws.save(path, trainer.datamodule.held_out_hash)


def _place_in_run(trainer: Any) -> Path | None:
    folders = [callback.folder for callback in trainer.checkpoint_callbacks if hasattr(callback, "folder")]
    return Path(folders[0]).parent / "held_out_laws.safetensors" if folders else None


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
