"""Watches the game and says in plain words what it sees; can end it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L

from spin_lightning.generation.pair_store import name_sides
from spin_lightning.losses import SelfPlayLoss, SpinLoss
from spin_lightning.runs import processes
from spin_lightning.runs.files import read_json, write_json
from spin_lightning.runs.shards import ShardStore
from spin_lightning.stages.metrics import starting_metrics
from spin_lightning.terminal import say
from spin_lightning.types import UserError

#: Above this share of identical pairs the few others alone would drive the optimiser, at full step size.
EQUILIBRIUM_SHARE = 0.95
#: Held-out NLL may rise by this share over that of the model the game started from before it counts as harm.
HARM_SHARE = 0.02
#: What of rollouts is worth a remark, and beyond which value: the name it is logged under, and the words.
NOTABLE: dict[str, tuple[float, str]] = {
    "kl/reference": (
        20.0,
        "responses are {:.1f} nats from the reference on average, where 10 are usual: the policy may be leaving the "
        "language it had. Raise model.beta, or lower the learning rate",
    ),
    "groups/flat": (
        0.8,
        "of {:.0%} of the prompts all responses have the same reward, and a baseline of the group learns nothing from "
        "them: take prompts that are neither too easy nor too hard, or more responses to each",
    ),
    "completions/cut": (
        0.05,
        "{:.0%} of the responses were cut: the policy may not know how to stop, or max_new_tokens is small "
        "(rollouts.cut says what they are worth)",
    ),
    "reward/none": (0.01, "{:.0%} of the responses have no reward, and are left out"),
    "reward/length_correlation": (
        0.9,
        "the reward follows the length of a response (correlation {:.2f}): the policy may learn length alone",
    ),
}
#: So many iterations a critic may know less than nothing.
UNTRAINED_CRITIC = 10


#: Where remarks are kept in a run's folder.
REMARKS = "health.json"


#: A reward of the chosen responses that is nearer to 0 than this needs no remark.
LEAST_FALL = 0.01
#: A margin nearer to 0 than this is that of a policy that has hardly left the opponent: the loss has fallen by 1.5 %.
LEAST_MARGIN = 0.02


class Health(L.Callback):
    """Reads real-response reward, accuracy, lengths, clipped and identical shares, and held-out NLL each iteration.

    In a run that learns from rewards it reads these, the divergence, lengths, how many responses differ, the critic.

    Args:
        stop: ``equilibrium`` ends the game when nearly all generated responses equal the real ones. ``harm`` does so
            too, and when the held-out NLL is worse than that of the model the game started from, or NaN; with rewards,
            when that of held-out prompts falls while that of the others rises. ``never`` only speaks.

    Attributes:
        remarks: What was said, as ``(iteration, sentence)``.
    """

    settings_section = "health"  # it may end the game, so its settings are guarded

    def __init__(self, stop: Literal["equilibrium", "harm", "never"] = "equilibrium") -> None:
        if stop not in ("equilibrium", "harm", "never"):
            raise UserError(f"health.stop must be equilibrium, harm or never, got {stop!r}.")
        self.stop = stop
        self.remarks: list[tuple[int, str]] = []
        self.nll: list[float] = []
        self.first: dict[str, float] = {}  # what the first iteration's rollouts were like
        self.noted: list[str] = []  # what was notable in the last iteration, and need not be said again
        self._folder: Path | None = None  # of the run, for its record of remarks

    def state_dict(self) -> dict[str, Any]:
        return {"nll": list(self.nll), "first": dict(self.first), "noted": list(self.noted)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.nll = list(state["nll"])
        self.first, self.noted = dict(state.get("first", {})), list(state.get("noted", []))

    def on_iteration_start(self, trainer: L.Trainer, module: L.LightningModule, iteration: int) -> None:
        self._open_record(trainer)
        if self._folder is not None:
            forget_remarks(self._folder, iteration)

    def on_iteration_resumed(self, trainer: L.Trainer, module: L.LightningModule, iteration: int) -> None:
        self._open_record(trainer)

    def _open_record(self, trainer: L.Trainer) -> None:
        game = getattr(trainer.datamodule, "game", None)  # type: ignore[attr-defined]
        self._folder = game.output_dir if game is not None and processes.is_first() else None

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if start := starting_metrics(trainer):
            self.nll = [start["val/nll"]]

    def on_generation_end(
        self, trainer: L.Trainer, module: L.LightningModule, iteration: int, store: ShardStore, report: dict[str, Any]
    ) -> None:
        if "completions/distinct" in report:
            compares = getattr(getattr(module, "advantage", None), "needs_group", True)
            self._judge_rollouts(trainer, iteration, {**report, **({} if compares else {"groups/flat": 0.0})})
        if "identical_share" not in report:  # of a stage without pairs
            return
        real, generated = name_sides(report)
        identical, clipped = report["identical_share"], report["generated_clipped_share"]
        if identical >= EQUILIBRIUM_SHARE:
            self._say(
                iteration,
                f"{identical:.0%} of the {generated} answers equal the {real} ones: the game is at its equilibrium on "
                "this data",
            )
            if self.stop != "never":
                trainer.datamodule.game.stop(f"equilibrium: {identical:.0%} of the answers are identical")  # type: ignore[attr-defined]
        elif identical >= 0.5:
            uses = "are identical and teach nothing, so this iteration is shorter"
            if _loss_of(module).learns_from_identical:
                uses = "are identical, which this loss trains on too"
            self._say(iteration, f"{identical:.0%} of the pairs {uses}; it may be the last useful one")
        if clipped > report["real_clipped_share"] + 0.1:
            self._say(
                iteration,
                f"{clipped:.0%} of the {generated} answers hit the length cap ({real} "
                f"{report['real_clipped_share']:.0%}): the opponent may not know how to stop, or max_new_tokens is "
                "small",
            )
        if report["empty_share"] > 0.05:
            self._say(
                iteration,
                f"{report['empty_share']:.0%} of the {generated} answers are empty: check the prompt template",
            )
        gap = report["generated_mean_length"] / report["real_mean_length"]
        if not 2 / 3 <= gap <= 1.5:
            self._say(
                iteration,
                f"{generated} answers are {gap:.1f} times as long as {real} ones: length alone tells them apart, and "
                "the policy may learn only that",
            )

    def on_iteration_end(
        self, trainer: L.Trainer, module: L.LightningModule, iteration: int, summary: dict[str, Any]
    ) -> None:
        if "completions/distinct" in summary.get("pairs", {}):  # real responses are not what it learns
            return
        if "epoch_metrics" in summary:
            self._judge_rewards(iteration, summary["epoch_metrics"], _loss_of(module))
        if (nll := summary["val_nll"]) is None:
            return
        first = self.nll[0] if self.nll else math.nan
        # NaN must not pass, so the condition asks for what is right
        if not (math.isfinite(nll) and not nll > first * (1 + HARM_SHARE)):
            worse = "worse than" if math.isfinite(nll) else "which is NaN or infinite, after"
            self._say(iteration, f"held-out NLL is {nll:.3f}, {worse} the {first:.3f} measured first")
            if self.stop == "harm":
                trainer.datamodule.game.stop(f"harm: held-out NLL {nll:.3f} against {first:.3f} at the start")  # type: ignore[attr-defined]
        elif self.nll and nll > self.nll[-1]:
            self._say(iteration, f"held-out NLL rose from {self.nll[-1]:.3f} to {nll:.3f} in this iteration")
        elif self.nll:
            self._say(iteration, f"held-out NLL went from {self.nll[-1]:.3f} to {nll:.3f}")
        self.nll.append(nll)

    def _judge_rollouts(self, trainer: L.Trainer, iteration: int, report: dict[str, float]) -> None:
        """Say what is notable, where it was not in the iteration before."""
        self.first = self.first or dict(report)
        found = {
            name: words.format(report[name])
            for name, (limit, words) in NOTABLE.items()
            if abs(report.get(name, 0.0)) > limit
        }
        distinct = report["completions/distinct"]
        if distinct < self.first["completions/distinct"] / 3:
            found["completions/distinct"] = (
                f"{distinct:.0%} of the responses are distinct, {self.first['completions/distinct']:.0%} were at first"
                ": the policy explores little. Raise model.beta, or lower the learning rate"
            )
        if iteration >= UNTRAINED_CRITIC and (share := report.get("value/explained_variance", 0.0)) < 0:
            found["value/explained_variance"] = (
                f"the critic says less than a constant would (explained variance {share:.2f}): raise model.value_coef "
                "or critic_warmup, or take a baseline of the group"
            )
        held_out, first = report.get("val/reward"), self.first.get("val/reward")
        if held_out is None or first is None:
            found |= {"val/reward": ""} if "val/reward" in self.noted else {}  # not measured: as it was
        elif held_out < first and report.get("reward/mean", first) > self.first.get("reward/mean", first):
            found["val/reward"] = (
                f"the reward rose from {self.first['reward/mean']:.3f} to {report['reward/mean']:.3f}, while that of "
                f"the held-out prompts fell from {first:.3f} to {held_out:.3f}: it may be hacked"
            )
        for name, sentence in found.items():
            if name not in self.noted:
                self._say(iteration, sentence)
        if self.stop == "harm" and found.get("val/reward"):
            trainer.datamodule.game.stop("harm: the held-out reward falls while the reward rises")  # type: ignore[attr-defined]
        self.noted = list(found)

    def _judge_rewards(self, iteration: int, metrics: dict[str, float], loss: SelfPlayLoss) -> None:
        reward, accuracy, margin = (metrics[f"rewards/{name}"] for name in ("real", "accuracies", "margins"))
        if loss.reference is not None and abs(margin) < LEAST_MARGIN:
            self._say(
                iteration,
                f"the margin is {margin:.3f}: the policy has hardly moved from {loss.reference}. If the answers "
                "differ, raise the learning rate or the epochs",
            )
        elif loss.reference is not None and reward < 0:
            self._say(
                iteration,
                f"the policy finds the real answers less likely than {loss.reference} did (reward {reward:.3f}): "
                f"{loss.remedy}",
            )
        if accuracy > 0.95:
            why = loss.if_all_apart
            if loss.reference is None:
                why = "this loss has no reference to compare with, so shorter answers are enough for that"
            self._say(iteration, f"the policy tells {accuracy:.0%} of the {loss.compares} apart: {why}")

    def _say(self, iteration: int, sentence: str) -> None:
        self.remarks.append((iteration, sentence))
        say(f"health, iteration {iteration}: {sentence}.")
        if self._folder is not None:
            keep_remark(self._folder, iteration, sentence)


def keep_remark(folder: Path, iteration: int | None, sentence: str) -> None:
    """Keep a remark in a run's folder, once, for reports. In the first process.

    Args:
        folder: Of the run.
        iteration: Which it is about. None: the run has none.
        sentence: Without a full stop.
    """
    remarks = _read_remarks(folder)
    remark = {"iteration": iteration, "sentence": sentence}
    if remark not in remarks:
        write_json(folder / REMARKS, {"remarks": [*remarks, remark]})


def forget_remarks(folder: Path, iteration: int) -> None:
    """Drop what was said of an iteration that begins again, and of those after it. In the first process."""
    remarks = _read_remarks(folder)
    kept = [remark for remark in remarks if (remark.get("iteration") or 0) < iteration]
    if kept != remarks:
        write_json(folder / REMARKS, {"remarks": kept})


def _read_remarks(folder: Path) -> list[dict[str, Any]]:
    try:
        return [dict(remark) for remark in read_json(folder / REMARKS)["remarks"]]
    except (UserError, TypeError, KeyError, ValueError):  # none yet; or damaged, which no run should end by
        return []


def remarks_on_preferences(report: Mapping[str, Any]) -> list[str]:
    """What recorded pairs tell before any training, in sentences without a full stop.

    Args:
        report: ``longer_wins``, the mean lengths of both sides, and how many were cut.
    """
    remarks = []
    longer, gap = report["longer_wins"], report["chosen_mean_length"] / report["rejected_mean_length"]
    if abs(longer - 0.5) >= 0.1:
        which = "longer" if longer > 0.5 else "shorter"
        remarks.append(
            f"the {which} answer is the better one in {max(longer, 1 - longer):.0%} of the pairs: length alone tells "
            f"them apart (chosen answers are {gap:.2f} times as long as rejected ones), and the policy may learn only "
            f"to write {which} ones. LengthNormalizedLoss takes that away"
        )
    if report["chosen_cut"] > 0.05 * report["pairs"]:
        remarks.append(
            f"{report['chosen_cut'] / report['pairs']:.0%} of the chosen answers are cut and never end: "
            "raise data.max_response_tokens, or leave them out with data.too_long: drop"
        )
    return remarks


def remarks_on_rewards(metrics: Mapping[str, float], report: Mapping[str, Any], loss: SelfPlayLoss) -> list[str]:
    """What the rewards of recorded pairs tell after training, in sentences without a full stop.

    Args:
        metrics: The means over the last epoch.
        report: As in ``remarks_on_preferences``.
        loss: What the rewards mean.
    """
    remarks = []
    chosen, rejected, accuracy = (metrics[f"rewards/{name}"] for name in ("real", "generated", "accuracies"))
    if loss.reference is not None and chosen < -LEAST_FALL:
        both = f", and so are the rejected ones ({rejected:.3f})" if rejected < 0 else ""
        remarks.append(
            f"the chosen answers are less likely than at the start (reward {chosen:.3f}){both}. A pair's loss asks for "
            "their difference alone, so this is expected and no error; where the chosen ones are to stay likely, "
            f"{loss.remedy}, or take DpopLoss"
        )
    longer = max(report["longer_wins"], 1 - report["longer_wins"])
    if 0.5 < accuracy <= longer and longer >= 0.6:
        remarks.append(f"the policy tells {accuracy:.0%} of the pairs apart, and their lengths alone tell {longer:.0%}")
    return remarks


def _loss_of(module: Any) -> SelfPlayLoss:
    """What the rewards and the pairs of a module mean."""
    return getattr(module, "loss", None) or SpinLoss()
