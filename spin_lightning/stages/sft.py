"""Supervised fine-tuning on the same rows, encoding and loader: the stage before self-play, and its control."""

from __future__ import annotations

import math
import shutil
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from spin_lightning.data.training_set import TrainingSet
from spin_lightning.models.batches import collate_laws
from spin_lightning.models.loading import ModelOrName
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.models.saving import weights_hash
from spin_lightning.models.token_laws import coarse_kl, token_batch_log_probs
from spin_lightning.runs import processes
from spin_lightning.runs.lightning_internals import remake_optimizers
from spin_lightning.runs.shards import refuse_other_binding
from spin_lightning.stages.clock import end_if_asked
from spin_lightning.stages.export import ExportPolicy
from spin_lightning.stages.law_table import LawStore, fill_laws
from spin_lightning.stages.policy import PolicyModule
from spin_lightning.stages.stage import Stage, cap_of
from spin_lightning.terminal import say
from spin_lightning.types import ResponseBatch, TokenBatch, UserError

#: Tokens of the start's laws that are kept for ``kl_to_start``, and responses that are scored again after a kill.
START_TOP_K, START_SHARD = 64, 256


class SftLightningModule(PolicyModule):
    """Maximum likelihood on the real responses; the prompt is not scored.

    Takes every setting of ``PolicyModule`` too.

    Args:
        model_name_or_path: The model to start from: a hub name, a Hugging Face folder or a ``.gguf`` file. In Python
            also a model of ``transformers``, which is then trained in place.
        learning_rate: Peak of the schedule.
        average: ``token`` divides an update's NLL by its number of response tokens, as SFT does elsewhere;
            ``response`` by its number of responses, the scale of the gradient self-play has at beta = 2.
        kl_to_start: Weight of a term that keeps the policy near the model it starts from: at each real token the
            divergence KL(start || policy) of the next-token laws, of the start's 64 likeliest tokens and the rest as
            one, in nats. The start scores the rows once, into the run's folder. 0: no such term.
        max_updates: End after this many optimiser steps, which the schedule then spans. Unlike ``trainer.max_steps``,
            which Lightning does not resume exactly at an epoch's end. None: ``trainer.max_epochs`` decides.

    Raises:
        UserError: A setting is outside its range.
    """

    def __init__(
        self,
        model_name_or_path: ModelOrName,
        learning_rate: float = 2e-5,
        average: Literal["token", "response"] = "token",
        max_updates: int | None = None,
        kl_to_start: float = 0.0,
        **policy: Any,
    ) -> None:
        super().__init__(model_name_or_path, learning_rate=learning_rate, **policy)
        if average not in ("token", "response"):
            raise UserError(f"model.average must be token or response, got {average!r}.")
        if max_updates is not None and max_updates < 1:
            raise UserError(f"model.max_updates must be at least 1, got {max_updates!r}.")
        if not 0 <= kl_to_start < math.inf:
            raise UserError(f"model.kl_to_start must be 0 or positive, got {kl_to_start!r}. 0.3 retains noticeably.")
        self.average = average
        self.max_updates = max_updates
        self.kl_to_start = kl_to_start
        self._start_laws: str | None = None  # the hash of the table's manifest
        self._training_set: TrainingSet | None = None

    @property
    def steps_per_iteration(self) -> float:
        """Updates of the whole training, at most ``max_updates``."""
        steps = super().steps_per_iteration
        if steps < 0 and self.max_updates is not None:  # trainer.max_epochs -1
            return self.max_updates
        return min(steps, self.max_updates or math.inf)

    def on_train_batch_end(self, *args: Any) -> None:
        self._stop_after_max_updates()

    def _stop_after_max_updates(self) -> None:
        if self.max_updates is not None and self.trainer.global_step >= self.max_updates:
            self.trainer.should_stop = True

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if getattr(self.trainer.datamodule, "game", None) is not None:  # type: ignore[attr-defined]
            raise UserError(
                "SftLightningModule has no opponent, so it takes no SelfPlay callback. Remove the callback."
            )
        self._training_set = None
        self.trainer.datamodule.make_training_set = self._make_training_set if self.kl_to_start else None  # type: ignore[attr-defined]

    def on_train_start(self) -> None:
        self._stop_after_max_updates()  # a kill may have left a run whose last step is done
        # the schedule that was made before the loader knew no length, and would waste the first step
        if self.trainer.global_step == 0:
            remake_optimizers(self.trainer)

    def training_step(self, batch: list[ResponseBatch] | list[TokenBatch], batch_idx: int) -> Tensor:
        """Negative log-likelihood of the real responses, and with ``kl_to_start`` the divergence from the start."""
        by_token = self.average == "token"
        responses = [part.responses if isinstance(part, TokenBatch) else part for part in batch]
        count = sum(int(part.response_lengths.sum()) if by_token else len(part) for part in responses)
        if not self.kl_to_start:
            return self.mean_of_update(lambda part: -response_log_probs(self.policy, part).sum(), batch, count)
        seen: list[Tensor] = []

        def sum_of(part: TokenBatch) -> Tensor:
            says = token_batch_log_probs(self.policy, part)
            divergence = coarse_kl(part.opponent.laws, says.laws).sum()
            seen.append(divergence.detach())
            return self.kl_to_start * divergence - says.real.sum()

        loss = self.mean_of_update(sum_of, batch, count)
        tokens = sum(len(part.scored) for part in responses)
        own = seen[: len(processes.deal(batch))]  # without a pass that had no weight
        total = processes.add_up(sum(own, torch.zeros((), device=self.device)))
        self.log("kl_from_start", total / max(1, tokens), batch_size=tokens)
        return loss

    # --- what the start says ----------------------------------------------------------------------------------------

    def _make_training_set(self) -> TrainingSet:
        """The real responses with the start's next-token laws, scored where the run begins."""
        if self._training_set is None:
            store = self._open_start_laws()
            if not store.is_complete:
                data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
                say(f"the start model scores {len(data.prompts)} real responses, for model.kl_to_start")
                fill_laws(
                    store,
                    data.prompts,
                    self.gather_policy(),
                    numerics=self.precision_context,
                    name=self.model_name_or_path,
                    top_k=START_TOP_K,
                    shard_size=START_SHARD,
                    micro_batch_tokens=data.micro_batch_tokens,
                    poll=partial(end_if_asked, self.trainer),
                )
            self._start_laws = store.sha256
            self._training_set = TrainingSet(store.read(), collate_laws, store.manifest["statistics"])
        return self._training_set

    def _open_start_laws(self) -> LawStore:
        """The table of this run, empty or as far as it was filled; after training steps the one that it began with.

        Raises:
            UserError: It is another, or there is no folder for it.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        folder = next((each.output_dir for each in self.trainer.callbacks if isinstance(each, ExportPolicy)), None)  # type: ignore[attr-defined]
        if folder is None:
            raise UserError(
                "model.kl_to_start keeps what the start model says in the run's folder, which the ExportPolicy "
                "callback names, and there is none. Add ExportPolicy(...) to the trainer's callbacks."
            )
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # a trial leaves nothing that a run would meet again
            data.shorten(data.batch_size * int(self.trainer.fast_dev_run))  # type: ignore[attr-defined]
            folder = folder / "fast_dev_run"
            if processes.is_first():
                shutil.rmtree(folder, ignore_errors=True)
        depends_on = {
            "prompts_sha256": data.prompts_hash,
            "encoding_sha256": data.encoder.fingerprint,
            "top_k": START_TOP_K,
            "shard_size": START_SHARD,
            "dtype": str(self.compute_dtype),
        }
        if self.trainer.global_step:
            store = LawStore(folder / "start_laws")
            if store.sha256 != self._start_laws:
                raise UserError(
                    f"the {store.rows_are} in {store.folder} are not those that this run began with. Restore the "
                    "folder, or use another output_dir."
                )
            refuse_other_binding(store, depends_on, depends_on.keys())
            return store
        weights = weights_hash(self.gather_policy())
        processes.refuse_different(weights, "the weights at the start of the run")
        return LawStore(folder / "start_laws", {"start_sha256": weights, **depends_on})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._start_laws is not None:
            checkpoint["start_laws"] = self._start_laws

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._start_laws = checkpoint.get("start_laws")


def _refuse_no_end(settings: Any) -> None:
    limits = [settings.model.get("max_updates"), settings.trainer.max_time, settings.trainer.max_steps != -1 or None]
    if settings.trainer.max_epochs == -1 and not any(limits):
        raise UserError(
            "trainer.max_epochs -1 has no end. Give a number, or an end: model.max_updates or trainer.max_time."
        )
    if 0 in (settings.trainer.max_epochs, settings.trainer.max_steps):
        raise UserError("trainer.max_epochs and max_steps must be at least 1, got 0: nothing would be trained.")


#: ``spin-lightning sft``.
STAGE = Stage(
    module="spin_lightning.stages.sft.SftLightningModule",
    data="spin_lightning.data.module.RowDataModule",
    callbacks={"export": "spin_lightning.stages.export.ExportPolicy"},
    folder="export",
    over_file="summary.json",
    mark="model.max_updates",
    reads_over={
        "data.generator": cap_of,
        "data.answers_per_prompt": None,
        "data.history": None,
        "data.keep_prompts_together": None,
    },
    defaults={"trainer.max_epochs": 1},
    refuse=_refuse_no_end,
)
