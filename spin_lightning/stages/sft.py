"""Supervised fine-tuning on the same rows, encoding and loader: the stage before self-play, and its control."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from spin_lightning.models.loading import ModelOrName
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.runs.lightning_internals import remake_optimizers
from spin_lightning.stages.policy import PolicyModule
from spin_lightning.stages.stage import Stage, cap_of
from spin_lightning.types import ResponseBatch, UserError


class SftLightningModule(PolicyModule):
    """Maximum likelihood on the real responses; the prompt is not scored.

    Takes every setting of ``PolicyModule`` too.

    Args:
        model_name_or_path: The model to start from: a hub name, a Hugging Face folder or a ``.gguf`` file. In Python
            also a model of ``transformers``, which is then trained in place.
        learning_rate: Peak of the schedule.
        average: ``token`` divides an update's NLL by its number of response tokens, as SFT does elsewhere;
            ``response`` by its number of responses, the scale of the gradient self-play has at beta = 2.
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
        **policy: Any,
    ) -> None:
        super().__init__(model_name_or_path, learning_rate=learning_rate, **policy)
        if average not in ("token", "response"):
            raise UserError(f"model.average must be token or response, got {average!r}.")
        if max_updates is not None and max_updates < 1:
            raise UserError(f"model.max_updates must be at least 1, got {max_updates!r}.")
        self.average = average
        self.max_updates = max_updates

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

    def on_train_start(self) -> None:
        self._stop_after_max_updates()  # a kill may have left a run whose last step is done
        # the schedule that was made before the loader knew no length, and would waste the first step
        if self.trainer.global_step == 0:
            remake_optimizers(self.trainer)

    def training_step(self, batch: list[ResponseBatch], batch_idx: int) -> Tensor:
        """Negative log-likelihood of the real responses."""
        by_token = self.average == "token"
        count = sum(int(part.response_lengths.sum()) if by_token else len(part) for part in batch)
        return self.mean_of_update(lambda part: -response_log_probs(self.policy, part).sum(), batch, count)


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
