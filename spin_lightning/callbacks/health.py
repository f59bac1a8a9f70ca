"""Watches the game and says in plain words what it sees; can end it."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L

from spin_lightning.callbacks.progress import starting_metrics
from spin_lightning.pair_store import PairStore
from spin_lightning.terminal import say
from spin_lightning.types import UserError

#: Above this share of identical pairs the few others alone would drive the optimiser, at full step size.
EQUILIBRIUM_SHARE = 0.95
#: Held-out NLL may rise by this share over that of the model the game started from before it counts as harm.
HARM_SHARE = 0.02


class Health(L.Callback):
    """Reads real-answer reward, accuracy, lengths, clipped and identical shares, and held-out NLL each iteration.

    Args:
        stop: ``equilibrium`` ends the game when nearly all generated answers equal the real ones. ``harm`` does so too, and
            when the held-out NLL is worse than that of the model the game started from. ``never`` only speaks.

    Attributes:
        remarks: What was said, as ``(iteration, sentence)``.
    """

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
        identical, clipped = report["identical_share"], report["generated_clipped_share"]
        if identical >= EQUILIBRIUM_SHARE:
            self._say(
                iteration,
                f"{identical:.0%} of the generated answers equal the real ones: the game is at its equilibrium on this data",
            )
            if self.stop != "never":
                trainer.datamodule.game.stop(f"equilibrium: {identical:.0%} of the answers are identical")  # type: ignore[attr-defined]
        elif identical >= 0.5:
            self._say(
                iteration,
                f"{identical:.0%} of the pairs are identical and teach nothing, so this iteration is shorter; it may be the last useful one",
            )
        if clipped > report["real_clipped_share"] + 0.1:
            self._say(
                iteration,
                f"{clipped:.0%} of the generated answers hit the length cap (real {report['real_clipped_share']:.0%}): the opponent may not know how to stop, or max_new_tokens is small",
            )
        if report["empty_share"] > 0.05:
            self._say(
                iteration, f"{report['empty_share']:.0%} of the generated answers are empty: check the prompt template"
            )
        gap = report["generated_mean_length"] / report["real_mean_length"]
        if not 2 / 3 <= gap <= 1.5:
            self._say(
                iteration,
                f"generated answers are {gap:.1f} times as long as real ones: length alone tells them apart, and the policy may learn only that",
            )

    def on_iteration_end(
        self, trainer: L.Trainer, module: L.LightningModule, iteration: int, summary: dict[str, Any]
    ) -> None:
        metrics, nll = summary["epoch_metrics"], summary["val_nll"]
        if metrics["rewards/real"] < 0:
            self._say(
                iteration,
                f"the policy finds the real answers less likely than the opponent did (reward {metrics['rewards/real']:.3f}): lower the learning rate, raise beta, or give the loss an nll_weight",
            )
        if metrics["rewards/accuracies"] > 0.95:
            self._say(
                iteration,
                f"the policy tells {metrics['rewards/accuracies']:.0%} of the pairs apart: they are memorised, or a trivial cue such as length or format gives them away",
            )
        if nll is None:
            return
        if self.nll and nll > self.nll[0] * (1 + HARM_SHARE):
            self._say(iteration, f"held-out NLL is {nll:.3f}, worse than the {self.nll[0]:.3f} measured first")
            if self.stop == "harm":
                trainer.datamodule.game.stop(f"harm: held-out NLL {nll:.3f} against {self.nll[0]:.3f} at the start")  # type: ignore[attr-defined]
        elif self.nll and nll > self.nll[-1]:
            self._say(iteration, f"held-out NLL rose from {self.nll[-1]:.3f} to {nll:.3f} in this iteration")
        elif self.nll:
            self._say(iteration, f"held-out NLL went from {self.nll[-1]:.3f} to {nll:.3f}")
        self.nll.append(nll)

    def _say(self, iteration: int, sentence: str) -> None:
        self.remarks.append((iteration, sentence))
        say(f"health, iteration {iteration}: {sentence}.")
