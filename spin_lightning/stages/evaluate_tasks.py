"""``EvaluateTasks``: tasks of lm-evaluation-harness at each iteration's end, asked of the policy in memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from spin_lightning.models.saving import weights_hash
from spin_lightning.runs import processes
from spin_lightning.runs.files import read_json
from spin_lightning.stages.clock import end_if_asked
from spin_lightning.stages.evaluation import RESULTS, Evaluation, update_card
from spin_lightning.stages.policy import PolicyModule
from spin_lightning.stages.reward import RewardLightningModule
from spin_lightning.terminal import say
from spin_lightning.types import Interrupted, UserError


class EvaluateTasks(L.Callback):
    """Asks the policy tasks where an iteration ends, and in stages without iterations where the model is exported.

    The run's numbers are the same bits with and without it. Results are written beside the summary
    (``evaluation.json``), put on the exported model's card, and logged as ``eval/TASK``. A run that is continued asks
    what is missing, and nothing twice. Of several processes the first one asks, and the others wait. A signal that ends
    the run ends the asking too.

    Args:
        tasks: Names of lm-evaluation-harness, YAML files, folders of them, or JSONL files of rows with question,
            choices and answer, or prompt and target.
        shots: Examples before each question, one number or one for each task. None: the paper's, or the task's own.
        limit: Ask the first so many documents of each task only. None: all, which takes hours on the paper's tasks.
        batch_size: Sequences in one pass.
        chat_template: Ask in messages, by the model's chat template.

    Raises:
        UserError: A setting is outside its range, or lm-eval is not installed.

    Example:
        >>> EvaluateTasks(["arc_challenge"], limit=200).evaluation.limit
        200
    """

    def __init__(
        self,
        tasks: list[str],
        shots: int | list[int] | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        chat_template: bool = False,
    ) -> None:
        self.evaluation = Evaluation(tasks, shots, limit, batch_size, chat_template)
        self._over: Path | None = None  # whose results this process has seen to

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read the tasks, so that what is missing is said before anything is trained."""
        if stage != "fit":
            return
        if not isinstance(pl_module, PolicyModule) or isinstance(pl_module, RewardLightningModule):
            raise UserError(f"EvaluateTasks asks a policy, and a {type(pl_module).__name__} trains none. Leave it out.")
        if processes.is_first():
            self.evaluation.load()
        processes.wait()

    def on_iteration_end(self, trainer: L.Trainer, module: Any, iteration: int, summary: Any) -> None:
        self._evaluate(trainer, module, self._clock_of(trainer).folder(iteration))

    def on_iteration_start(self, trainer: L.Trainer, module: Any, iteration: int) -> None:
        """Ask what a run that was killed at the end of the iteration before left unasked."""
        if iteration > 0:
            self._evaluate(trainer, module, self._clock_of(trainer).folder(iteration - 1))

    def on_export(self, trainer: L.Trainer, module: Any, folder: Path) -> None:
        """Ask in a stage without iterations, where its model was exported, with the weights that were chosen for it."""
        self._evaluate(trainer, module, folder)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask what a run that was killed at its last iteration's end left unasked."""
        clock = self._clock_of(trainer)
        if clock is not None and (clock.folder(clock.iterations - 1) / "summary.json").exists():
            self._evaluate(trainer, pl_module, clock.folder(clock.iterations - 1))

    def _clock_of(self, trainer: Any) -> Any:
        return getattr(trainer.datamodule, "game", None)

    def _evaluate(self, trainer: Any, module: Any, place: Path) -> None:
        """Ask the policy as it is now what was not asked yet. Together."""
        if trainer.fast_dev_run or self._over == place:
            return
        module.to(trainer.strategy.root_device)  # where a fit ends, Lightning has moved it to the CPU
        policy = module.gather_policy()
        if processes.is_first():
            self._ask(trainer, module, policy, place)
            for kind in ("policy", "adapter"):
                update_card(place / kind, read_json(place / RESULTS))
        processes.wait()
        self._over = place

    def _ask(self, trainer: Any, module: Any, policy: Any, place: Path) -> None:
        sha256 = weights_hash(policy)
        if not self.evaluation.is_complete(place, sha256):
            say(f"{place.name}: the policy is asked {', '.join(task.name for task in self.evaluation.load())}")
            tokenizer, poll = trainer.datamodule.encoder.tokenizer, partial(end_if_asked, trainer)
            try:
                with module.precision_context():
                    outcomes = self.evaluation.run(policy, tokenizer, place, sha256, place.name, poll)
            except Interrupted:  # the run ends where its checkpoint is saved, which is not here
                rest = f"A continued run asks the rest, or spin-lightning evaluate {place}"
                say(f"note: not all tasks were asked. {rest}.")
                return
            metrics = {f"eval/{name}": outcome.entry["value"] for name, outcome in outcomes.items()}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
