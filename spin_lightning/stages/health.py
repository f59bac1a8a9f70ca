"""Watches the game and says in plain words what it sees; can end it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import lightning as L

from spin_lightning.generation.pair_store import PairStore, name_sides
from spin_lightning.losses import PairLoss, SpinLoss
from spin_lightning.stages.metrics import starting_metrics
from spin_lightning.terminal import say
from spin_lightning.types import UserError

#: Above this share of identical pairs the few others alone would drive the optimiser, at full step size.
EQUILIBRIUM_SHARE = 0.95
#: Held-out NLL may rise by this share over that of the model the game started from before it counts as harm.
HARM_SHARE = 0.02


class Health(L.Callback):
    """Reads real-response reward, accuracy, lengths, clipped and identical shares, and held-out NLL each iteration.

    Args:
        stop: ``equilibrium`` ends the game when nearly all generated responses equal the real ones. ``harm`` does so
            too, and when the held-out NLL is worse than that of the model the game started from, or NaN. ``never``
            only speaks.

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

    def state_dict(self) -> dict[str, Any]:
        return {"nll": list(self.nll)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.nll = list(state["nll"])

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if start := starting_metrics(trainer):
            self.nll = [start["val/nll"]]

    def on_generation_end(
        self, trainer: L.Trainer, module: L.LightningModule, iteration: int, store: PairStore, report: dict[str, Any]
    ) -> None:
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

    def _judge_rewards(self, iteration: int, metrics: dict[str, float], loss: PairLoss) -> None:
        reward, accuracy = metrics["rewards/real"], metrics["rewards/accuracies"]
        if loss.reference is not None and reward < 0:
            self._say(
                iteration,
                f"the policy finds the real answers less likely than {loss.reference} did (reward {reward:.3f}): "
                f"{loss.remedy}",
            )
        if accuracy > 0.95:
            why = "they are memorised, or a trivial cue such as length or format gives them away"
            if loss.reference is None:
                why = "this loss has no reference to compare with, so shorter answers are enough for that"
            self._say(iteration, f"the policy tells {accuracy:.0%} of the pairs apart: {why}")

    def _say(self, iteration: int, sentence: str) -> None:
        self.remarks.append((iteration, sentence))
        say(f"health, iteration {iteration}: {sentence}.")


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
            f"{report['chosen_cut'] / report['pairs']:.0%} of the chosen answers are cut at the cap and never end: "
            "raise data.max_response_tokens, or leave them out with data.too_long: drop"
        )
    return remarks


def remarks_on_rewards(metrics: Mapping[str, float], report: Mapping[str, Any], loss: PairLoss) -> list[str]:
    """What the rewards of recorded pairs tell after training, in sentences without a full stop.

    Args:
        metrics: The means over the last epoch.
        report: As in ``remarks_on_preferences``.
        loss: What the rewards mean.
    """
    remarks = []
    chosen, rejected, accuracy = (metrics[f"rewards/{name}"] for name in ("real", "generated", "accuracies"))
    if loss.reference is not None and chosen < 0:
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


def _loss_of(module: Any) -> PairLoss:
    """What the rewards and the pairs of a module mean."""
    return getattr(module, "loss", None) or SpinLoss()
