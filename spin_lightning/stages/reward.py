"""Reward models: what people, or a judge, prefer of two responses becomes one number for any response.

``s(x, y) = w . h`` at the response's terminator, trained on pairs by the loss of Bradley and Terry. Both responses of a
pair and their prompt take one pass. ``models/reward_model.py`` has the head and the folder, ``rewards/model.py`` asks
what was exported.

What may surprise: the loss sees differences of scores only, so where their zero lies means nothing until the held-out
pairs tell; and no response is ever cut, for a cut one has no terminator to read a score at.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from spin_lightning.losses import bradley_terry
from spin_lightning.models.loading import ModelOrName, load_config
from spin_lightning.models.model_card import render_reward_card
from spin_lightning.models.reward_model import (
    add_score_head,
    check_classifier,
    choose_pad,
    refuse_without_classifier,
    save_reward_model,
    scores_of,
)
from spin_lightning.runs import processes
from spin_lightning.runs.files import write_json
from spin_lightning.runs.lightning_internals import remake_optimizers
from spin_lightning.runs.settings import versions
from spin_lightning.stages.export import ExportPolicy, origin_of
from spin_lightning.stages.metrics import wins
from spin_lightning.stages.policy import PolicyModule
from spin_lightning.stages.stage import Stage, cap_of
from spin_lightning.terminal import say
from spin_lightning.types import PairBatch, UserError

#: What is measured on the held-out pairs, by its name in the log and, with ``val_``, in the summary.
MEASURED = ("loss", "accuracy", "longer_wins", "length_correlation")
#: Fewer held-out pairs tell shift and scale with an error that is worth a remark.
FEW_PAIRS = 20
#: Scores that deviate by less are equal but for rounding, and are not scaled.
LEAST_DEVIATION = 1e-6


class RewardLightningModule(PolicyModule):
    """A reward model on pairs of responses (Bradley-Terry, as in InstructGPT, arXiv:2203.02155).

    The loss is ``-[p log sigmoid(d) + (1 - p) log sigmoid(-d)] + centring (s + s')^2`` with ``d = s - s' - margin``;
    ``p`` and ``margin`` are the data's columns ``preference`` and ``margin``, 1 and 0 where there are none. It begins
    at ln 2, since every score does at 0.

    Takes every setting of ``PolicyModule`` too.

    Args:
        model_name_or_path: The model to start from, best the one that will be trained by the rewards: a hub name, a
            Hugging Face folder or a ``.gguf`` file. In Python also a model of ``transformers``, which is then trained
            in place.
        learning_rate: Peak of the schedule. InstructGPT used 9e-6; an adapter wants ten times as much.
        centring: Weight of the squared sum of a pair's scores, which keeps their mean near 0; 0.01 is usual where it is
            wanted (arXiv:2312.09244).

    Raises:
        UserError: A setting is outside its range.

    Attributes:
        held_out: What was last measured on all held-out pairs: loss, accuracy, how often the longer response is the
            better one, the correlation of score and length, and the mean and deviation of the scores. Empty where there
            are none.

    Example:
        >>> module = RewardLightningModule("HuggingFaceTB/SmolLM2-135M-Instruct", centring=0.01)
    """

    #: What the display says.
    what_is_measured = "held-out pairs"

    def __init__(
        self,
        model_name_or_path: ModelOrName,
        learning_rate: float = 1e-5,
        centring: float = 0.0,
        **policy: Any,
    ) -> None:
        super().__init__(model_name_or_path, learning_rate=learning_rate, **policy)
        if not (math.isfinite(centring) and centring >= 0):
            raise UserError(f"model.centring must be 0 or positive, got {centring!r}. 0.01 is usual.")
        if self.adapter is not None and not self.adapter.merged:
            raise UserError(
                "a reward model is exported whole, base and adapter as one. Set model.adapter.merged: true."
            )
        self.centring = centring
        self.held_out: dict[str, float] = {}
        #: The token that an exported model pads rows with. Chosen when a fit begins.
        self.pad_id = -1
        self._of_update: list[Tensor] = []  # scores of the batches of the update in progress, (2, pairs) each
        self._held_out_pairs: list[Tensor] = []
        self._gate_is_due = False

    def configure_model(self) -> None:
        if hasattr(self, "policy"):
            return
        config = (
            load_config(self.model_name_or_path, revision=self.revision, trust_remote_code=self.trust_remote_code)
            if self.given_model is None
            else self.given_model.config
        )
        refuse_without_classifier(config, self.trust_remote_code)
        if any("ForSequenceClassification" in str(name) for name in getattr(config, "architectures", None) or ()):
            say(f"note: {self.model_name_or_path} is a reward model already; it is trained further, its score from 0.")
        super().configure_model()
        add_score_head(self.policy, self.trust_remote_code)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not getattr(data, "needs_rejected", False):
            raise UserError(
                "RewardLightningModule learns from two responses to each prompt. Use PreferenceDataModule(...)."
            )
        if getattr(data, "too_long", "") != "drop":
            raise UserError(
                "a response that is cut has no terminator to read a score at, so a reward model leaves those that are "
                "too long out. Set data.too_long: drop."
            )
        self.pad_id = choose_pad(data.encoder.tokenizer, data.encoder.end_ids, data.encoder.pad_id)
        prompt = data.prompts[0]
        ids = [*prompt.prompt_ids, *prompt.real_ids]
        policy: Any = self.gather_policy()
        self._gate_is_due = self.trainer.ckpt_path is None and not policy.score.weight.any()  # else a second fit
        with self.precision_context():
            check_classifier(policy, self.pad_id, ids, self.trust_remote_code)
        self._release_policy()

    def on_train_start(self) -> None:
        # the schedule that was made before the loader knew no length, and would waste the first step
        if self.trainer.global_step == 0:
            remake_optimizers(self.trainer)

    def training_step(self, batch: list[PairBatch], batch_idx: int) -> Tensor:
        """The Bradley-Terry loss of one batch of pairs: its share of the mean over the update's pairs."""
        seen = []

        def sum_of(part: PairBatch) -> Tensor:
            real, generated = self._score(self.policy, part)
            seen.append(torch.stack([real, generated]).detach())
            self._check_first(seen[-1])
            return bradley_terry(real, generated, part.preference, part.margin, self.centring).sum()

        if not self._update.count:
            self._of_update = []
        loss = self.mean_of_update(sum_of, batch, sum(map(len, batch)))
        own = seen[: len(processes.deal(batch))]  # without a pass that had no weight
        self._of_update.append(processes.join(torch.cat([loss.new_empty(2, 0), *own], 1)))
        real, generated = torch.cat(self._of_update, 1)
        self.log_dict(
            {
                "rewards/real": real.mean(),
                "rewards/generated": generated.mean(),
                "rewards/margins": (real - generated).mean(),
                "rewards/accuracies": wins(real, generated).mean(),
            },
            batch_size=sum(map(len, batch)),
        )
        return loss

    def _score(self, model: Any, part: PairBatch) -> tuple[Tensor, Tensor]:
        scores = scores_of(model, part.responses)
        return scores[part.real], scores[part.generated]

    def _check_first(self, scores: Tensor) -> None:
        """The gate: a run begins with scores of 0, so that its first loss is ln 2 where there is no margin.

        Raises:
            UserError: It does not.
        """
        if self._gate_is_due and self.trainer.global_step == 0 and scores.any():
            raise UserError(
                "a reward model does not start where it should: every score must be 0 at its first step, and one is "
                f"{float(scores.abs().max()):.3g}. Its hidden states are NaN or infinite: its weights are damaged, or "
                "the dtype overflows. Try float32, or another model."
            )

    def validation_step(self, batch: list[Any], batch_idx: int) -> None:
        """Scores of the held-out pairs; what they tell is known at the end. Rows of other tasks have no scores."""
        if self.is_other(batch_idx):
            return
        for part in processes.deal(batch):
            real, generated = self._score(self.plain_policy, part)
            losses = bradley_terry(real, generated, part.preference, part.margin, self.centring)
            lengths = part.responses.response_lengths
            columns = (part.pair_ids, real, generated, lengths[part.real], lengths[part.generated], losses)
            self._held_out_pairs.append(torch.stack([column.cpu().double() for column in columns]))

    def on_validation_epoch_end(self) -> None:
        found = processes.join(torch.cat([torch.empty(6, 0, dtype=torch.float64), *self._held_out_pairs], 1))
        self._held_out_pairs = []
        if not found.shape[1]:
            return
        self.held_out = measure(found[:, found[0].argsort()])  # added up in one order, whoever computed them
        self.log_dict(
            {f"val/{name}": self.held_out[name] for name in MEASURED},
            prog_bar=True,
            sync_dist=processes.world_size() > 1,
        )
        if not self.trainer.sanity_checking:
            say(
                "held-out pairs: the better response has the higher score in {accuracy:.0%} of {pairs}, is the longer "
                "one in {longer_wins:.0%}; loss {loss:.3f}".format(**self.held_out)
            )


def measure(pairs: Tensor) -> dict[str, float]:
    """What the scores of held-out pairs say of a reward model.

    Args:
        pairs: Shape ``(6, B)``, float64: the pair's number, the scores of the better and of the other response, their
            lengths in tokens, and the loss.

    Returns:
        The mean ``loss``; ``accuracy``, and ``longer_wins``, that of taking the longer response for the better one,
        both with one half for a tie; ``length_correlation`` of score and length over all responses, 0 where one of them
        does not vary; ``shift`` and ``scale``, the mean and the deviation of all scores, with which
        ``(s - shift) / scale`` has mean 0 and deviation 1, the scale 1 where one pair or equal scores tell no
        deviation; and the number of ``pairs``.

    Example:
        >>> pairs = [[0, 1], [2.0, 1.0], [0.0, 1.0], [3, 5], [3, 4], [0.1, 0.7]]
        >>> measure(torch.tensor(pairs, dtype=torch.float64))["accuracy"]
        0.75
    """
    _, real, generated, real_lengths, generated_lengths, losses = pairs
    scores, lengths = torch.cat([real, generated]), torch.cat([real_lengths, generated_lengths])
    spread, of_lengths = scores.std(correction=0), lengths.std(correction=0)
    covariance = ((scores - scores.mean()) * (lengths - lengths.mean())).mean()
    varies = bool(spread * of_lengths > 0)
    return {
        "loss": float(losses.mean()),
        "accuracy": float(wins(real, generated).double().mean()),
        "longer_wins": float(wins(real_lengths, generated_lengths).double().mean()),
        "length_correlation": float(covariance / (spread * of_lengths)) if varies else 0.0,
        "shift": float(scores.mean()),
        "scale": float(spread) if len(losses) > 1 and spread > LEAST_DEVIATION else 1.0,
        "pairs": len(losses),
    }


class ExportRewardModel(ExportPolicy):
    """Writes ``reward_model/`` and ``summary.json`` when training ends.

    The folder is one of ``AutoModelForSequenceClassification``, verified by reloading it, with a ``reward.json`` that
    has ``shift`` and ``scale`` of the held-out scores.

    Args:
        output_dir: Folder of the run.
    """

    def __init__(self, output_dir: str = "runs/reward") -> None:
        super().__init__(output_dir)

    def read_held_out(self, trainer: L.Trainer) -> dict[str, Any]:
        held_out = getattr(trainer.lightning_module, "held_out", None)
        return {"held_out": dict(held_out), "held_out_at": trainer.global_step} if held_out else {}

    def write(self, policy: Any, trainer: L.Trainer, summary: dict[str, Any]) -> None:
        module: Any = trainer.lightning_module
        encoder = trainer.datamodule.encoder  # type: ignore[attr-defined]
        held_out, measured_at = summary.pop("held_out", {}), summary.pop("held_out_at", None)
        summary.pop("val_nll")
        if not held_out:
            say("note: no pair is held out, so reward.json has shift 0 and scale 1, and scores are as they come.")
        elif measured_at != trainer.global_step:
            say(f"note: the held-out pairs were last scored at update {measured_at}; shift and scale are of that one.")
        if held_out and held_out["pairs"] < FEW_PAIRS:
            pairs = f"{held_out['pairs']} held-out pair{'s' * (held_out['pairs'] != 1)}"
            say(f"note: shift and scale rest on {pairs}: hold out more (data.val_fraction).")
        measured = {f"val_{name}": held_out.get(name) for name in MEASURED}
        scaling = {"shift": held_out.get("shift", 0.0), "scale": held_out.get("scale", 1.0)}
        summary = {**summary, **measured, "val_pairs": held_out.get("pairs", 0), **scaling}
        kept = {
            **scaling,
            **measured,
            "val_pairs": summary["val_pairs"],
            "terminator_id": encoder.terminator_id,
            "template_time": encoder.time,
        }
        origin = origin_of(module.model_name_or_path, trainer.datamodule)  # type: ignore[attr-defined]
        card = render_reward_card(summary, origin, versions())
        folder = self.find_model()
        save_reward_model(policy, encoder.tokenizer, folder, card, module.pad_id, kept, module.trust_remote_code)
        write_json(self.output_dir / "summary.json", summary)

    def find_model(self) -> Path:
        return self.output_dir / "reward_model"


def _refuse_cutting(settings: Any) -> None:
    if settings.data.get("too_long") != "drop":
        raise UserError(
            "data.too_long must be 'drop' here: a response that is cut has no terminator to read a score at. Leave it "
            "out."
        )
    if settings.trainer.max_epochs == -1 and not settings.trainer.max_time and settings.trainer.max_steps == -1:
        raise UserError("trainer.max_epochs -1 has no end. Give a number, or an end: trainer.max_time.")
    if 0 in (settings.trainer.max_epochs, settings.trainer.max_steps):
        raise UserError("trainer.max_epochs and max_steps must be at least 1, got 0: nothing would be trained.")


def _find_exported(folder: Path) -> Path:
    return folder / "reward_model"


#: ``spin-lightning reward``.
STAGE = Stage(
    module="spin_lightning.stages.reward.RewardLightningModule",
    data="spin_lightning.data.preferences.PreferenceDataModule",
    callbacks={"export": "spin_lightning.stages.reward.ExportRewardModel"},
    folder="export",
    over_file="summary.json",
    mark="model.centring",
    reads_over={
        "data.generator": cap_of,
        "data.answers_per_prompt": None,
        "data.history": None,
        "data.keep_prompts_together": None,
    },
    defaults={"trainer.max_epochs": 1, "data.too_long": "drop", "export.output_dir": "runs/reward"},
    refuse=_refuse_cutting,
    exported=_find_exported,
    makes_policy=False,
)
