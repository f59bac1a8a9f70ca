"""What the clock asks of a module: a policy that is trained in iterations."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from spin_lightning.models.loading import load_policy
from spin_lightning.schedule import check_schedule
from spin_lightning.stages.iteration import Iteration, PolicyView, Run
from spin_lightning.stages.policy import PolicyModule


class IterativeModule(PolicyModule):
    """A policy that is trained in iterations, each on data made at its start: what the clock asks of a module."""

    kernels_used: tuple[str, ...] = ("prompt_attention", "decode_attention", "layers")

    @abstractmethod
    def make_iteration(self, number: int, run: Run) -> Iteration:
        """What is done in an iteration of this stage."""

    @property
    def policy_view(self) -> PolicyView:
        """The policy as an iteration sees it."""

        def load(folder: Path | None) -> Any:
            model: Any
            if folder is None:
                model = self.load_start()
            else:
                model = load_policy(
                    str(folder),
                    trust_remote_code=self.trust_remote_code,
                    dtype=next(self.policy.parameters()).dtype,
                    attn_implementation=self.attn_implementation,
                )
            return model.to(self.device)

        return PolicyView(
            self.gather_policy(),
            self.model_name_or_path,
            self.compute_dtype,
            self.precision_context,
            load,
            self.trust_remote_code,
            None if self.adapter is None else self.adapter.path,
        )

    def check_schedules(self, iterations: int) -> None:
        """Refuse lists that do not fit the number of iterations, before anything is loaded.

        Raises:
            UserError: A list is too short or too long, or a setting does not suit another.
        """
        check_schedule("model.learning_rate", self.learning_rate, iterations)

    def start_iteration(self, iteration: int, epochs: int, *, is_fresh: bool) -> None:
        """Move every schedule to this iteration. ``is_fresh`` is False when it resumes after steps were taken."""
        self.iteration = iteration
        self.epochs_in_iteration = epochs
        self.first_step = self.trainer.global_step if is_fresh else -1

    def describe_iteration(self, iteration: int) -> dict[str, Any]:
        """What this stage adds to an iteration's summary, as JSON holds it."""
        return {}
