"""When an iteration begins and when it is over, in Lightning's terms. What is done then is in ``iteration``.

One ``Trainer.fit`` plays all iterations: ``train_dataloader`` asks ``ensure_iteration`` for the training set of the
epoch about to begin, which is the moment a new iteration starts.

Any callback may define the game's hooks; they are called where they exist:
``on_iteration_start(trainer, module, iteration)``,
``on_iteration_resumed(trainer, module, iteration)``, where it continues after training steps: bring back what was set,
``on_generation_end(trainer, module, iteration, store, report)``,
``on_iteration_end(trainer, module, iteration, summary)``.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from spin_lightning.generation.synthetic_data import NOTHING, TrainingSet
from spin_lightning.losses import TokenLoss
from spin_lightning.models.loading import dtype_name
from spin_lightning.rewards.base import Reward, check_reward, refuse_without_real
from spin_lightning.runs import lightning_internals as internals
from spin_lightning.runs import processes, signals
from spin_lightning.runs.checkpoints import last_checkpoint
from spin_lightning.runs.files import read_json, refuse_links, run_folder, write_json
from spin_lightning.runs.run_checkpoint import HoldsFolder, RunCheckpoint
from spin_lightning.schedule import check_schedule
from spin_lightning.stages.export import name_models
from spin_lightning.stages.iteration import Iteration, Run, find_place, iteration_folder
from spin_lightning.stages.iterative import IterativeModule
from spin_lightning.stages.metrics import count_tokens, describe_retention, starting_metrics
from spin_lightning.stages.ranking import make_ranking
from spin_lightning.terminal import say
from spin_lightning.types import UserError


@dataclass
class Remembered:
    """What the clock knows of the iteration in progress. Checkpoints hold it, under these names.

    Attributes:
        manifest: Hash of the manifest of its table.
        first_step: Optimiser steps before its first.
        first_loss: Of its first update.
        last_loss: Of its last update so far.
        trained_tokens: Tokens of its training batches so far. None: of a run that was begun by a version that counted
            none.
        seconds: Spent on its table, and on training.
        training_since: When the training began that is not counted yet, on the monotonic clock. Not kept.
    """

    manifest: str | None = None
    first_step: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    trained_tokens: int | None = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"pairs": 0.0, "training": 0.0})
    training_since: float | None = None

    def keep_time(self) -> None:
        """Count the seconds of training until now."""
        if self.training_since is not None:
            now = time.monotonic()
            self.seconds["training"] += now - self.training_since
            self.training_since = now

    def note_loss(self, loss: float) -> None:
        """Note the loss of an update."""
        self.last_loss = loss
        if self.first_loss is None:
            self.first_loss = loss

    def note_tokens(self, tokens: int) -> None:
        """Note the tokens of a training batch."""
        if self.trained_tokens is not None:
            self.trained_tokens += tokens

    def kept(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {name: value for name, value in asdict(self).items() if name != "training_since"}


class IterationClock(HoldsFolder):
    """Plays iterations of any stage: a table is made, the policy trains on it and is exported, and again.

    What is done in an iteration the module's ``Iteration`` knows; what of the clock is a stage's own, a subclass says.

    Args:
        output_dir: Folder of the run. Everything the run makes is in it, under relative names.
        iterations: How many there are.
        epochs: Passes over an iteration's training set; one number, or a list with one number an iteration.
        reset_optimizer: Start each iteration with an empty optimiser state.
        shard_size: Prompts in one shard of a table: the most that is made again after a kill.

    Raises:
        UserError: A setting is outside its range.
    """

    #: The clock's section of a config, for messages.
    settings_section: ClassVar[str]
    #: What is written last in the run's folder.
    over_file: ClassVar[str]
    #: What a run is called.
    run_is: ClassVar[str] = "the run"
    #: The class of module that it plays with, for messages.
    plays_with: ClassVar[str] = "a module that has iterations"
    #: Whether one schedule of the learning rate spans all iterations, with one optimiser. Else each begins its own.
    schedule_spans_run: ClassVar[bool] = False
    #: Whether each iteration has a held-out NLL of its own.
    validates_each_iteration: ClassVar[bool] = True
    #: Play this stage of an iteration and end. None: all.
    stage: Literal["generate", "train"] | None = None

    def __init__(
        self, output_dir: str, iterations: int, epochs: int | list[int], reset_optimizer: bool, shard_size: int
    ) -> None:
        super().__init__()
        section = self.settings_section
        if iterations < 1:
            raise UserError(f"{section}.iterations must be at least 1, got {iterations!r}.")
        if shard_size < 1:
            raise UserError(f"{section}.shard_size must be at least 1, got {shard_size!r}.")
        self.iterations = iterations
        self.set_epochs(epochs)
        self.output_dir = run_folder(output_dir, f"{section}.output_dir")
        self.reset_optimizer = reset_optimizer
        self.shard_size = shard_size
        self.stopped_because: str | None = None
        self.trainer: Any = None
        self.remembered = Remembered()
        self.iteration = -1  # whose training set is loaded
        self._playing: Iteration | None = None
        self._training_set = NOTHING
        self._stage_is_over = False
        self._report: dict[str, Any] = {}  # of the training set; a checkpoint's until one is loaded

    def set_epochs(self, epochs: int | list[int]) -> None:
        """How often an iteration's training set is passed over: one number, or a list with one number an iteration.

        Raises:
            UserError: A number is below 1, or the list has another length.
        """
        check_schedule(f"{self.settings_section}.epochs", epochs, self.iterations)
        self.epochs = epochs if isinstance(epochs, list) else [epochs] * self.iterations
        if min(self.epochs) < 1:
            raise UserError(f"{self.settings_section}.epochs must be at least 1 in every iteration, got {epochs!r}.")
        #: What ``Trainer(max_epochs=...)`` has to be.
        self.total_epochs = sum(self.epochs)
        # epochs that begin an iteration; the epoch after the last one too
        self._boundaries = {0, *accumulate(self.epochs)}

    # --- what a stage may say of its own ----------------------------------------------------------------------------

    def folder(self, iteration: int) -> Path:
        """Where an iteration keeps what it made."""
        return iteration_folder(self.output_dir, iteration)

    def shorten(self, data: Any, batches: int) -> None:
        """Leave so few prompts that a trial of some batches is over at once."""
        data.shorten(data.batch_size * batches)

    def refuse_unplayable(self, trainer: Any, module: Any) -> None:
        """Refuse what would break the run, before anything is loaded. Extend it.

        Raises:
            UserError: The module, its data or a setting of the trainer does not suit.
        """
        refuse_unplayable(self, trainer, module)

    def finish(self, summaries: list[dict[str, Any]]) -> None:
        """Make what a run that is over leaves beside its iterations, before it is said to be over. Together.

        Args:
            summaries: Of the iterations, in their order.
        """

    def write_over(self, reason: str, iterations: list[dict[str, Any]]) -> None:
        """Write how the run ended, with a summary of each iteration that was played."""
        write_json(self.output_dir / self.over_file, {"ended_because": reason, "iterations": iterations})

    def say_over(self, reason: str) -> None:
        """Say how the run ended, and where its models are."""
        models = name_models(self.output_dir, "iteration_*/")
        result = f"Models: {models}" if models else f"Nothing was trained, so there is no model. {self.advice}"
        say(f"{self.run_is} is over: {reason}. {result}")

    @property
    def advice(self) -> str:
        """What to do where a run ended before it trained anything."""
        return f"Change what it ended by, and set {self.settings_section}.output_dir to another folder."

    def ends_iteration(self, epoch: int) -> int | None:
        """The iteration that is over with an epoch. None: it goes on."""
        ends = list(accumulate(self.epochs))
        return ends.index(epoch + 1) if epoch + 1 in ends else None

    @property
    def last_checkpoint(self) -> str | None:
        """The checkpoint to continue from (None: a new game): ``trainer.fit(..., ckpt_path=game.last_checkpoint)``."""
        return last_checkpoint(self.output_dir)

    def stop(self, reason: str) -> None:
        """End the game: before the next training step if pairs were just made, else after this step."""
        self.stopped_because = reason
        self.trainer.should_stop = True

    # --- an iteration begins --------------------------------------------------------------------------------------

    def ensure_iteration(self) -> TrainingSet:
        """The training set of the epoch about to begin; a new iteration starts here. Empty when the game is over.

        Raises:
            StopIteration: The game ended while the training set was made. Lightning's loop ends on it.
        """
        if self._stage_is_over:
            return NOTHING
        epoch = internals.epoch_to_begin(self.trainer)
        if self.stopped_because or (epoch >= self.total_epochs and not self.trainer.fast_dev_run):
            return NOTHING
        number = next((k for k, end in enumerate(accumulate(self.epochs)) if epoch < end), self.iterations - 1)
        is_first_load = self._playing is None
        if number != self.iteration:
            is_fresh = epoch in self._boundaries and not internals.resumes_inside_epoch(self.trainer)
            if is_first_load:  # not in setup: a command that is refused changes nothing
                self.trainer.datamodule.write_report(self.output_dir)
                if is_fresh and number > 0:
                    self._end_if_missed(number - 1)
            self.trainer.lightning_module.start_iteration(number, self.epochs[number], is_fresh=is_fresh)
            self._begin_iteration(number, is_fresh)
            if self._stage_is_over:
                return NOTHING
            # at the first load Lightning's loop has not begun, and sees should_stop
            if self.stopped_because and not is_first_load:
                raise StopIteration(self.stopped_because)
        return self._training_set

    def begins_iteration(self) -> bool:
        """Whether this fit begins with a new iteration, which needs the generator, as far as the run's folder tells."""
        number, updates = find_place(self.output_dir)
        return number < self.iterations and updates == 0

    def _begin_iteration(self, number: int, is_fresh: bool) -> None:
        started = time.monotonic()
        if any(isinstance(callback, RunCheckpoint) for callback in self.trainer.checkpoint_callbacks):
            signals.listen()
        self.trainer.datamodule.begin_iteration(number)
        # before all that depends on what a callback may set
        notify(self.trainer, "on_iteration_start" if is_fresh else "on_iteration_resumed", number)
        if is_fresh and self.reset_optimizer:  # new ones are made when its first epoch starts; pairs need the memory
            internals.forget_optimizers(self.trainer)
        iteration = self._make_iteration(number)
        store = iteration.open(self.remembered.manifest, is_fresh)
        is_next = "generate" if is_fresh and not store.is_complete else "train"
        if self.stage is not None and self.stage != is_next:
            self._end_stage(f"iteration {number}: there is nothing to {self.stage}. The next stage is {is_next}")
            return
        iteration.fill(store)
        if self.stage == "generate":
            processes.wait()
            self._end_stage(f"iteration {number}: its pairs are complete. The next stage is train")
            return
        self._training_set = training_set = iteration.training_set(store)
        processes.wait()
        if is_fresh:
            self.remembered = Remembered(store.sha256, seconds={"pairs": time.monotonic() - started, "training": 0.0})
        else:
            self.remembered.training_since = time.monotonic()
        self._report = training_set.report
        for logger in self.trainer.loggers if training_set.metrics else ():
            logger.log_metrics({**training_set.metrics, "iteration": float(number)}, step=self.trainer.global_step)
        if training_set.sentence:
            say(training_set.sentence)
        if training_set.rows.num_rows == 0:
            self.stop(training_set.if_empty)
        notify(self.trainer, "on_generation_end", number, store, self._report)
        self.iteration, self._playing = number, iteration

    def _end_stage(self, sentence: str) -> None:
        """End this fit, and leave the game to be continued by the other stage."""
        self._stage_is_over = True
        say(f"{sentence} (self_play.stage; left out, all are played).")

    def make_run(self) -> Run:
        """Where iterations are played, and with what."""
        return Run(self.output_dir, self.trainer.datamodule, self.shard_size, partial(end_if_asked, self.trainer))

    def _make_iteration(self, number: int) -> Any:
        iteration: Iteration = self.trainer.lightning_module.make_iteration(number, self.make_run())
        return iteration

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin an iteration's optimiser and schedule. Lightning skips this hook when it resumes in mid-epoch."""
        if trainer.current_epoch not in self._boundaries:
            return
        self.remembered.first_step, self.remembered.training_since = trainer.global_step, time.monotonic()
        if trainer.current_epoch == 0 or not self.schedule_spans_run:
            keeps_state = not self.reset_optimizer and trainer.current_epoch > 0
            states = [optimizer.state_dict() for optimizer in trainer.optimizers] if keeps_state else []
            internals.remake_optimizers(trainer)
            for optimizer, state in zip(trainer.optimizers, states, strict=False):
                optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})

    # --- and ends -------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        """Note the losses of an iteration's updates."""
        module: Any = pl_module
        self.remembered.note_tokens(count_tokens(args[0]))
        if module.update_is_complete and module.update_loss.isfinite():
            self.remembered.note_loss(float(module.update_loss))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End an iteration after its last epoch."""
        self.remembered.keep_time()
        if internals.was_cut_short(trainer) and not self.stopped_because:
            return
        if trainer.current_epoch + 1 in self._boundaries:
            assert self._playing is not None
            self._end_iteration(self._playing)
            if self.stage is not None and trainer.current_epoch + 1 < self.total_epochs and not self.stopped_because:
                self._end_stage(
                    f"iteration {self._playing.number} was trained and exported. The next stage is generate"
                )
                trainer.should_stop = True

    def _end_iteration(self, iteration: Iteration) -> None:
        nll = self.trainer.callback_metrics.get("val/nll")
        module: IterativeModule = self.trainer.lightning_module
        summary = {
            "iteration": iteration.number,
            "first_loss": self.remembered.first_loss,
            "last_loss": self.remembered.last_loss,
            "updates": self.trainer.global_step - self.remembered.first_step,
            **({} if (tokens := self.remembered.trained_tokens) is None else {"trained_tokens": tokens}),
            "seconds": self.remembered.seconds,
            "dtype": dtype_name(module.policy.dtype),
            "stored_dtype": module.stored_dtype,
            "val_nll": None if nll is None else float(nll),
            **module.describe_iteration(iteration.number),
            "pairs": self._report,
        }
        if summary["val_nll"] is not None:
            start = read_json(self.output_dir / "start.json")
            summary |= describe_retention(self.trainer.callback_metrics, start)
        self.trainer.lightning_module.gather_policy()
        if processes.is_first():
            iteration.close(summary)
        processes.wait()
        notify(self.trainer, "on_iteration_end", iteration.number, summary)

    def _end_if_missed(self, number: int) -> None:
        """Export the policy that a checkpoint saved between an iteration's last step and its export left out."""
        if processes.share(not (self.folder(number) / "summary.json").exists()):
            self._end_iteration(self._make_iteration(number))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The end of the game; a hook that Lightning also calls when it finds nothing left to train on."""
        if self._stage_is_over:
            return
        if trainer.fast_dev_run or (internals.was_cut_short(trainer) and not self.stopped_because):  # type: ignore[attr-defined]
            return
        if internals.epoch_to_begin(trainer) >= self.total_epochs:
            self._end_if_missed(self.iterations - 1)
        played = [read_json(self.folder(k) / "summary.json") for k in range(self.iterations)]
        if not self.stopped_because and played[-1] is None:
            return
        reason = self.stopped_because or f"all {self.iterations} iterations were played"
        iterations = [summary for summary in played if summary]
        self.finish(iterations)
        if processes.is_first():
            self.write_over(reason, iterations)
            self.say_over(reason)

    # --- Lightning's other hooks ----------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be played, and take the run's folder."""
        if stage != "fit":
            return
        self.trainer, self.iteration, self._playing, self.stopped_because = trainer, -1, None, None
        self._stage_is_over = False
        self.refuse_unplayable(trainer, pl_module)
        pl_module.is_trained = self.stage != "generate"  # type: ignore[assignment]
        refuse_links(self.output_dir)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a trial: few prompts, and nothing that a real run would meet again
            self.shorten(data, int(trainer.fast_dev_run))  # type: ignore[attr-defined]
            self.output_dir = self.output_dir / "fast_dev_run"
            if processes.is_first():
                shutil.rmtree(self.output_dir, ignore_errors=True)
        data.game = self
        self.hold(self.output_dir, trainer)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The held-out NLL of the model the game starts from: what every iteration is compared with."""
        if start := starting_metrics(trainer):
            for logger in trainer.loggers:
                logger.log_metrics(start, step=0)
            if processes.is_first():
                write_json(self.output_dir / "start.json", start)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Begin with the next epoch where a checkpoint was saved between an epoch's last batch and its end."""
        internals.end_finished_epoch(checkpoint)
        if self.stage == "generate":  # a large part of it, which nothing is done with
            checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        self.remembered.keep_time()
        return {"clock": self.remembered.kept(), "report": dict(self._report), "stopped_because": self.stopped_because}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what a checkpoint kept."""
        self.remembered, self._report = Remembered(**{"trained_tokens": None, **state["clock"]}), dict(state["report"])
        self.stopped_because = state["stopped_because"]


class SelfPlay(IterationClock):
    """Plays the iterations: opponent, pairs, training, export, and again.

    Args:
        output_dir: Folder of the run. Everything the game makes is in it, under relative names.
        iterations: How many times the policy becomes the next opponent. The paper played 4.
        epochs: Passes over the pairs in each iteration; one number, or a list with one number an iteration. The paper:
            2.
        reset_optimizer: Start each iteration with an empty optimiser state, as the paper does. The learning rate
            schedule starts anew in any case.
        shard_size: Prompts in one shard of pairs: the most that is generated again after a kill.
        pairs: What stands against what: ``real_generated``, the real response against each generated one;
            ``best_worst``, of a prompt's generated responses the one with the highest reward against the one with the
            lowest (online DPO, which needs no real responses); ``real_wrong``, the real response against those that are
            worth less.
        reward: What responses are worth, for ``best_worst`` and ``real_wrong``: ``NumberMatch``, ``TextMatch``,
            ``FunctionReward``, ``ModelReward``, ``JudgeReward``, ``SumOfRewards``, or the class path of your own.
        stage: Play one stage of an iteration and end: ``generate`` makes its pairs, ``train`` trains on them and
            exports. Nothing is done where the other is next. ``spin-lightning play`` sets it. None: all.

    Raises:
        UserError: A setting is outside its range.

    Example:
        >>> game = SelfPlay("runs/mine", iterations=3, epochs=[2, 2, 1])
        >>> game.total_epochs
        5
    """

    settings_section = "self_play"
    over_file = "game.json"
    run_is = "the game"
    plays_with = "a SpinLightningModule, or with another module that has iterations"

    def __init__(
        self,
        output_dir: str = "runs/spin",
        iterations: int = 3,
        epochs: int | list[int] = 2,
        reset_optimizer: bool = True,
        shard_size: int = 256,
        pairs: Literal["real_generated", "best_worst", "real_wrong"] = "real_generated",
        reward: Reward | None = None,
        stage: Literal["generate", "train"] | None = None,
    ) -> None:
        if stage not in (None, "generate", "train"):
            raise UserError(f"self_play.stage must be 'generate' or 'train', or be left out, got {stage!r}.")
        super().__init__(output_dir, iterations, epochs, reset_optimizer, shard_size)
        self.stage = stage
        self.pairs, self.reward = pairs, reward
        self.ranking = make_ranking(pairs, reward)
        #: What the data module asks: of the best and the worst generated response neither is the real one.
        self.needs_real = pairs != "best_worst"

    @property
    def advice(self) -> str:
        of = "the data" if self.ranking is None else f"the settings of {self.ranking.reward.name}"
        return (
            f"See {of}, data.answers_per_prompt and data.generator.max_new_tokens, and set self_play.output_dir to "
            "another folder."
        )

    def refuse_unplayable(self, trainer: Any, module: Any) -> None:
        super().refuse_unplayable(trainer, module)
        if self.ranking is None:
            return
        if isinstance(loss := getattr(module, "loss", None), TokenLoss):
            raise UserError(
                f"{type(loss).__name__} compares tokens, so there are no responses that self_play.reward could rank. "
                "Leave self_play.pairs and reward out, or use a loss of pairs."
            )
        check_reward(self.ranking.reward)
        refuse_without_real(self.ranking.reward, trainer.datamodule.prompts)
        if self.pairs == "best_worst" and trainer.datamodule.answers_per_prompt < 2:
            raise UserError(
                "self_play.pairs best_worst needs several responses to each prompt, got data.answers_per_prompt "
                f"{trainer.datamodule.answers_per_prompt}. Set it to 2 or more."
            )
        if self.pairs == "best_worst" and getattr(getattr(module, "loss", None), "needs_initial_response", False):
            raise UserError(
                f"{type(module.loss).__name__} compares with the first opponent's responses, which pairs of the best "
                "and the worst one have none of. Use another loss, or self_play.pairs: real_wrong."
            )

    def make_run(self) -> Run:
        return replace(super().make_run(), ranking=self.ranking)


def refuse_unplayable(clock: IterationClock, trainer: Any, module: Any) -> None:
    """Make sure that a trainer, a module and its data can play the iterations of a clock.

    Raises:
        UserError: One of them is of another kind, or a setting of the trainer would break the run.
    """
    name, section, epochs = type(clock).__name__, clock.settings_section, clock.epochs
    if not isinstance(module, IterativeModule):
        raise UserError(f"{name} plays with {clock.plays_with}, got {type(module).__name__}.")
    if not hasattr(data := trainer.datamodule, "game"):
        raise UserError(
            f"{name} needs a SyntheticDataModule, got {type(data).__name__}. Use trainer.fit(module, "
            "SyntheticDataModule(...))."
        )
    check_schedule("data.train_data", data.train_data, clock.iterations)
    processes.refuse_strategy(trainer)
    if trainer.reload_dataloaders_every_n_epochs != 1:
        raise UserError(
            "trainer.reload_dataloaders_every_n_epochs must be 1, so that no iteration trains on the pairs of another, "
            f"got {trainer.reload_dataloaders_every_n_epochs}."
        )
    if not trainer.fast_dev_run:
        if trainer.max_steps != -1:
            raise UserError(
                f"trainer.max_steps cannot be used with {name}, got {trainer.max_steps}. Set {section}.iterations and "
                "epochs."
            )
        if trainer.max_epochs != clock.total_epochs:
            raise UserError(
                f"trainer.max_epochs must be {clock.total_epochs}, the sum of {section}.epochs {epochs}, "
                f"got {trainer.max_epochs}. Use Trainer(max_epochs=game.total_epochs)."
            )
    if clock.validates_each_iteration and trainer.check_val_every_n_epoch != 1:
        raise UserError(
            "trainer.check_val_every_n_epoch must be 1, so that each iteration has a held-out NLL of its own, "
            f"got {trainer.check_val_every_n_epoch}."
        )
    module.check_schedules(len(epochs))


def notify(trainer: Any, hook: str, *args: Any) -> None:
    """Call one of the game's hooks wherever a callback has it."""
    for callback in trainer.callbacks:
        if (method := getattr(callback, hook, None)) is not None:
            method(trainer, trainer.lightning_module, *args)


def end_if_asked(trainer: Any) -> None:
    """Called between two responses, where a signal costs no more than the shard in progress.

    Raises:
        Interrupted: A signal was received; a ``SIGTERMException`` where Lightning received it, without a RunCheckpoint.
    """
    signals.end_if_asked()
    processes.end_if_another_did()
    if internals.received_sigterm(trainer):
        raise SIGTERMException
