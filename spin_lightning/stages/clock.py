"""The clock of the game: when an iteration begins, what happens then, and when it is over.

No maths and no file formats. One ``Trainer.fit`` plays all iterations: ``train_dataloader`` asks ``ensure_iteration``
for the pairs of the epoch about to begin, which is the moment a new iteration starts.

Any callback may define the game's hooks; they are called where they exist:
``on_iteration_start(trainer, module, iteration)``,
``on_generation_end(trainer, module, iteration, store, report)``,
``on_iteration_end(trainer, module, iteration, summary)``.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
from filelock import FileLock
from lightning.pytorch.utilities.exceptions import SIGTERMException

from spin_lightning.generation.pair_maker import PairMaker, own_pairs
from spin_lightning.generation.pair_store import TRAINING_COLUMNS, PairStore, describe_pairs, identical
from spin_lightning.generation.synthetic_data import SyntheticDataModule
from spin_lightning.models.batches import collate_pairs
from spin_lightning.models.loading import dtype_name, load_policy
from spin_lightning.models.model_card import render_model_card
from spin_lightning.models.rope import refuse_crossing
from spin_lightning.models.saving import save_model, weights_hash
from spin_lightning.runs import signals
from spin_lightning.runs.checkpoints import last_checkpoint
from spin_lightning.runs.files import hold, need_space, read_json, refuse_links, run_folder, sha256_of, write_json
from spin_lightning.runs.lightning_internals import starting_metrics, was_cut_short
from spin_lightning.runs.run_checkpoint import RunCheckpoint
from spin_lightning.runs.settings import versions
from spin_lightning.schedule import at_iteration, check_schedule
from spin_lightning.stages.spin import SpinLightningModule
from spin_lightning.terminal import say
from spin_lightning.types import UserError


@dataclass(frozen=True)
class TrainingSet:
    """The pairs of an epoch, and what makes batches of them."""

    rows: pa.Table
    collate: Callable[..., list[Any]] = collate_pairs


class SelfPlay(L.Callback):
    """Plays the iterations: opponent, pairs, training, export, and again.

    Args:
        output_dir: Folder of the run. Everything the game makes is in it, under relative names.
        iterations: How many times the policy becomes the next opponent. The paper played 4.
        epochs: Passes over the pairs in each iteration; one number, or a list with one number an iteration. The paper: 2.
        reset_optimizer: Start each iteration with an empty optimiser state, as the paper does. The learning rate schedule
            starts anew in any case.
        shard_size: Prompts in one shard of pairs: the most that is generated again after a kill.

    Raises:
        UserError: A setting is outside its range.

    Example:
        >>> game = SelfPlay("runs/mine", iterations=3, epochs=[2, 2, 1])
        >>> game.total_epochs
        5
    """

    settings_section = "self_play"

    def __init__(
        self,
        output_dir: str = "runs/spin",
        iterations: int = 3,
        epochs: int | list[int] = 2,
        reset_optimizer: bool = True,
        shard_size: int = 256,
    ) -> None:
        if iterations < 1:
            raise UserError(f"self_play.iterations must be at least 1, got {iterations!r}.")
        if shard_size < 1:
            raise UserError(f"self_play.shard_size must be at least 1, got {shard_size!r}.")
        check_schedule("self_play.epochs", epochs, iterations)
        self.epochs = epochs if isinstance(epochs, list) else [epochs] * iterations
        if min(self.epochs) < 1:
            raise UserError(f"self_play.epochs must be at least 1 in every iteration, got {epochs!r}.")
        self.output_dir = run_folder(output_dir, "self_play.output_dir")
        self.iterations = iterations
        self.reset_optimizer = reset_optimizer
        self.shard_size = shard_size
        self.iteration = -1  # whose pairs are loaded
        self.stopped_because: str | None = None
        self.trainer: Any = None
        self._lock: FileLock | None = None
        self._pairs: pa.Table | None = None
        self._report: dict[str, Any] = {}
        self._clock: dict[str, Any] = {}  # of the iteration in progress; saved in checkpoints

    # --- where the game stands ------------------------------------------------------------------------------------

    @property
    def total_epochs(self) -> int:
        """What ``Trainer(max_epochs=...)`` has to be."""
        return sum(self.epochs)

    @property
    def last_checkpoint(self) -> str | None:
        """The checkpoint to continue from, or None for a new game: ``trainer.fit(..., ckpt_path=game.last_checkpoint)``."""
        return last_checkpoint(self.output_dir)

    def folder(self, iteration: int) -> Path:
        return self.output_dir / f"iteration_{iteration}"

    def stop(self, reason: str) -> None:
        """End the game: before the next training step if pairs were just made, else after this step."""
        self.stopped_because = reason
        self.trainer.should_stop = True

    def _iteration_of(self, epoch: int) -> int:
        ends = accumulate(self.epochs)
        return next((k for k, end in enumerate(ends) if epoch < end), self.iterations - 1)

    def _is_first_epoch(self, epoch: int) -> bool:
        return epoch in (0, *accumulate(self.epochs))  # the epoch after the last one too

    # --- the clock ------------------------------------------------------------------------------------------------

    def ensure_iteration(self) -> TrainingSet:
        """The training set of the epoch that is about to begin; a new iteration starts here. Empty when the game is over.

        Raises:
            StopIteration: The game ended while the pairs were made. Lightning's loop ends on it.
        """
        loop = self.trainer.fit_loop
        epoch = loop.epoch_progress.current.processed  # current_epoch is one behind after an end-of-epoch resume
        if self.stopped_because or (epoch >= self.total_epochs and not self.trainer.fast_dev_run):
            return TrainingSet(pa.table({}))
        iteration = self._iteration_of(epoch)
        if iteration != self.iteration:
            is_first_load = self.iteration < 0
            if is_first_load:  # not in setup: a command that is refused changes nothing
                self.trainer.datamodule.write_report(self.output_dir)
            took_steps = loop.restarting and loop.epoch_loop.batch_progress.current.ready > 0
            is_fresh = self._is_first_epoch(epoch) and not took_steps
            module: SpinLightningModule = self.trainer.lightning_module
            if is_first_load and is_fresh and iteration > 0:
                self._end_if_missed(iteration - 1, module)
            module.start_iteration(iteration, self.epochs[iteration], is_fresh=is_fresh)
            if is_fresh:
                self._begin(iteration, module)
            else:
                self._continue(iteration, module)
            self.iteration = iteration
            # at the first load Lightning's loop has not begun, and sees should_stop
            if self.stopped_because and not is_first_load:
                raise StopIteration(self.stopped_because)
        assert self._pairs is not None
        return TrainingSet(self._pairs)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_first_epoch(trainer.current_epoch):  # Lightning skips this hook when it resumes in mid-epoch
            states = [optimizer.state_dict() for optimizer in trainer.optimizers]
            trainer.strategy.setup_optimizers(trainer)
            if not self.reset_optimizer and trainer.current_epoch > 0:
                for optimizer, state in zip(trainer.optimizers, states, strict=True):
                    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
            self._clock.update(first_step=trainer.global_step, started=time.monotonic())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        module: Any = pl_module
        if module.update_is_complete and module.update_loss.isfinite():
            self._clock["last_loss"] = float(module.update_loss)
            self._clock.setdefault("first_loss", self._clock["last_loss"])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep_time()
        if was_cut_short(trainer) and not self.stopped_because:
            return
        if self._is_first_epoch(trainer.current_epoch + 1):
            self._end(trainer.lightning_module)  # type: ignore[arg-type]

    def _begin(self, iteration: int, module: SpinLightningModule) -> None:
        """The policy becomes the opponent, answers and scores."""
        started = time.monotonic()
        module.opponent.become(module.policy)
        self._notify("on_iteration_start", iteration)
        data: SyntheticDataModule = self.trainer.datamodule
        data.refuse_longer_than(getattr(module.policy.config, "max_position_embeddings", math.inf))
        lengths = [len(prompt.prompt_ids) for prompt in data.prompts]
        refuse_crossing(module.policy, lengths, data.generator.max_new_tokens)
        settings = self._settings(module)
        combined = set(range(max(0, iteration - data.history), iteration))
        for k in combined | ({0} if module.loss.needs_initial_response and iteration else set()):
            earlier = PairStore(self.folder(k) / "pairs")
            _refuse_other_settings(earlier, settings, ("prompts_sha256", "encoding_sha256", *_LAYOUT))
        previous = self._check_chain(iteration - 1)
        binding = {
            "iteration": iteration,
            "opponent_sha256": weights_hash(module.policy),
            "previous_pairs_sha256": previous,
            **settings,
        }
        store = PairStore(self.folder(iteration) / "pairs", binding)
        if not store.is_complete:
            self._make_pairs(iteration, module, store)
        self._clock = {
            "manifest": sha256_of(store.manifest_path),
            "seconds": {"pairs": time.monotonic() - started, "training": 0.0},
        }
        self._use(iteration, module, store)

    def _check_chain(self, last: int) -> str | None:
        """The hash of an iteration's manifest, which itself names the hash of the one before: no other game's can slip in.

        Raises:
            UserError: The pairs of an earlier iteration are not those of this game.
        """
        known = newest = self._clock.get("manifest") if last >= 0 else None
        for k in range(last, -1, -1):
            store = PairStore(self.folder(k) / "pairs")
            if sha256_of(store.manifest_path) != known:
                raise UserError(
                    f"the pairs in {store.folder} are not those that this game made for iteration {k}. "
                    "Restore the folder, or use another self_play.output_dir."
                )
            known = store.manifest["binding"]["previous_pairs_sha256"]  # type: ignore[index]
        return newest

    def _continue(self, iteration: int, module: SpinLightningModule) -> None:
        """Back in the middle of an iteration: the pairs and the opponent are those it began with."""
        store = PairStore(self.folder(iteration) / "pairs")
        if sha256_of(store.manifest_path) != self._clock.get("manifest"):
            raise UserError(
                f"the pairs in {store.folder} are not those that iteration {iteration} began with, so it cannot be continued. "
                "Restore the folder, or use another self_play.output_dir."
            )
        given = ("prompts_sha256", "encoding_sha256", "sampling", "seed", "history", *_LAYOUT)
        _refuse_other_settings(store, self._settings(module), given)
        if module.opponent.holds_weights:
            assert store.manifest is not None
            name, refusal = (
                store.manifest["opponent"],
                f"so iteration {iteration} cannot be continued. Restore it from a copy, or use another self_play.output_dir.",
            )
            try:
                opponent = self._load(module, iteration - 1)
            except UserError as error:
                raise UserError(f"the opponent {name} cannot be read, {refusal} ({error})") from error
            if weights_hash(opponent) != store.manifest["binding"]["opponent_sha256"]:
                raise UserError(
                    f"{name} does not hold the weights of the opponent that the pairs were made by, {refusal}"
                )
            module.opponent.become(opponent.to(module.device))
        self._clock["started"] = time.monotonic()
        self._use(iteration, module, store)

    def _use(self, iteration: int, module: SpinLightningModule, store: PairStore) -> None:
        """Load the training set, leaving out pairs that cannot teach this loss anything."""
        table = store.read(TRAINING_COLUMNS)
        assert store.manifest is not None
        self._report = {**store.manifest["statistics"], "training_pairs": table.num_rows}
        if not module.loss.learns_from_identical:
            table = table.filter(pa.array(~identical(table)))
        self._pairs = table
        self._report["training_pairs_dropped"] = self._report["training_pairs"] - table.num_rows
        self._report["training_pairs"] = table.num_rows
        self._log_report(iteration)
        if table.num_rows == 0:
            self.stop("every generated answer equals the real one: there is nothing left to tell apart")
        self._notify("on_generation_end", iteration, store, self._report)

    def _end_if_missed(self, iteration: int, module: SpinLightningModule) -> None:
        """Export what a checkpoint of another callback, saved between an iteration's last step and its export, left out."""
        if not (self.folder(iteration) / "summary.json").exists():
            self.iteration = iteration
            self._end(module)

    def _end(self, module: SpinLightningModule) -> None:
        """Export the policy: a model people can use, and the next opponent."""
        folder, iteration = self.folder(self.iteration), self.iteration
        nll = self.trainer.callback_metrics.get("val/nll")
        summary = {
            "iteration": iteration,
            "beta": at_iteration(module.beta, iteration),
            "first_loss": self._clock.get("first_loss"),
            "last_loss": self._clock.get("last_loss"),
            "updates": self.trainer.global_step - self._clock["first_step"],
            "seconds": self._clock["seconds"],
            "dtype": dtype_name(module.policy.dtype),
            "stored_dtype": module.stored_dtype,
            "val_nll": None if nll is None else float(nll),
            "epoch_metrics": {name: float(value) for name, value in module.metrics.compute().items()},
            "pairs": self._report,
        }
        data: SyntheticDataModule = self.trainer.datamodule
        card = render_model_card(summary, PairStore(folder / "pairs").manifest)  # type: ignore[arg-type]
        save_model(
            module.policy,
            data.encoder.tokenizer,
            folder / "policy",
            card,
            data.encoder.end_ids,
            trust_remote_code=module.trust_remote_code,
        )
        write_json(folder / "summary.json", summary)
        self._notify("on_iteration_end", iteration, summary)

    # --- making pairs ---------------------------------------------------------------------------------------------

    def _make_pairs(self, iteration: int, module: SpinLightningModule, store: PairStore) -> None:
        data: SyntheticDataModule = self.trainer.datamodule
        sampling = data.generator.sampling
        say(
            f"iteration {iteration}: the opponent answers {len(data.prompts)} prompts, {data.answers_per_prompt} each, "
            f"temperature {sampling['temperature']:g}, top_p {sampling['top_p']:g}, at most {sampling['max_new_tokens']} tokens"
        )
        initial = None
        if module.loss.needs_initial_log_probs:
            initial = self._load_initial(module) if iteration else module.policy
        if any(isinstance(callback, RunCheckpoint) for callback in self.trainer.checkpoint_callbacks):
            signals.listen()
        weights = sum(weight.numel() * weight.element_size() for weight in module.policy.parameters())
        tokens = len(data.prompts) * data.answers_per_prompt * (data.max_prompt_tokens + 2 * sampling["max_new_tokens"])
        need_space(self.folder(iteration), weights + 8 * tokens * (1 + data.history), f"iteration {iteration}")
        assert store.manifest is not None
        maker = PairMaker(
            model=module.policy,
            encoder=data.encoder,
            generator=data.generator,
            prompts=data.prompts,
            iteration=iteration,
            answers_per_prompt=data.answers_per_prompt,
            seed=data.seed,
            micro_batch_tokens=data.micro_batch_tokens,
            opponent_sha256=store.manifest["binding"]["opponent_sha256"],
            numerics=module.precision_context,
            poll=self._poll,
            initial=initial,
            initial_responses=module.loss.needs_initial_response,
            shard_size=self.shard_size,
        )
        earlier = {k: PairStore(self.folder(k) / "pairs") for k in range(iteration)}
        names = maker.make(store, earlier, data.history)
        store.finish(
            names,
            opponent=f"iteration_{iteration - 1}/policy" if iteration else module.model_name_or_path,
            versions=versions(),
            statistics=describe_pairs(own_pairs(_read_all(store, names), iteration)),
        )

    def _load_initial(self, module: SpinLightningModule) -> Any:
        initial = self._load(module, -1).to(module.device).eval()
        first = PairStore(self.folder(0) / "pairs").manifest
        assert first is not None
        if weights_hash(initial) != first["binding"]["opponent_sha256"]:
            raise UserError(
                f"{module.model_name_or_path} does not hold the weights that this game began with, whose log-probs "
                f"{type(module.loss).__name__} needs. Restore it, or use another self_play.output_dir."
            )
        return initial

    def _settings(self, module: SpinLightningModule) -> dict[str, Any]:
        """What pairs depend on beside the opponent: the same in every iteration of a game. Hashes all prompts."""
        data: SyntheticDataModule = self.trainer.datamodule
        return {
            "prompts_sha256": data.prompts_hash,
            "encoding_sha256": data.encoder.fingerprint,
            "sampling": data.generator.sampling,
            "answers_per_prompt": data.answers_per_prompt,
            "history": data.history,
            "seed": data.seed,
            "shard_size": self.shard_size,
            "dtype": str(module.compute_dtype),
            "initial_log_probs": module.loss.needs_initial_log_probs,
            "initial_responses": module.loss.needs_initial_response,
        }

    def _load(self, module: SpinLightningModule, iteration: int) -> Any:
        """The policy exported after an iteration; before the first one, the model the game started from."""
        if iteration < 0:
            return module.load_start()
        return load_policy(
            str(self.folder(iteration) / "policy"),
            trust_remote_code=module.trust_remote_code,
            dtype=next(module.policy.parameters()).dtype,
            attn_implementation=module.attn_implementation,
        )

    # --- Lightning's other hooks ----------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.trainer, self.iteration, self.stopped_because = trainer, -1, None
        if not isinstance(pl_module, SpinLightningModule):
            raise UserError(f"SelfPlay plays with a SpinLightningModule, got {type(pl_module).__name__}.")
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, SyntheticDataModule):
            raise UserError(
                f"SelfPlay needs a SyntheticDataModule, got {type(data).__name__}. Use trainer.fit(module, SyntheticDataModule(...))."
            )
        if trainer.world_size > 1:
            raise UserError(f"self-play runs in one process so far, got {trainer.world_size}. Set trainer.devices: 1.")
        if trainer.reload_dataloaders_every_n_epochs != 1:
            raise UserError(
                "trainer.reload_dataloaders_every_n_epochs must be 1, so that no iteration trains on the pairs of another, "
                f"got {trainer.reload_dataloaders_every_n_epochs}."
            )
        if not trainer.fast_dev_run:
            if trainer.max_steps != -1:
                raise UserError(
                    f"trainer.max_steps cannot be used with self-play, got {trainer.max_steps}. Set self_play.iterations and epochs."
                )
            if trainer.max_epochs != self.total_epochs:
                raise UserError(
                    f"trainer.max_epochs must be {self.total_epochs}, the sum of self_play.epochs {self.epochs}, "
                    f"got {trainer.max_epochs}. Use Trainer(max_epochs=game.total_epochs)."
                )
        if trainer.check_val_every_n_epoch != 1:
            raise UserError(
                "trainer.check_val_every_n_epoch must be 1, so that each iteration has a held-out NLL of its own, "
                f"got {trainer.check_val_every_n_epoch}."
            )
        pl_module.check_schedules(self.iterations)
        refuse_links(self.output_dir)
        if trainer.fast_dev_run:  # a trial: few prompts, and nothing that a real run would meet again
            data.prompts = data.prompts[: data.batch_size * int(trainer.fast_dev_run)]
            self.output_dir = self.output_dir / "fast_dev_run"
            shutil.rmtree(self.output_dir, ignore_errors=True)
        data.game = self
        self._lock = hold(self.output_dir)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._let_go()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The held-out NLL of the model the game starts from: what every iteration is compared with."""
        if start := starting_metrics(trainer):
            for logger in trainer.loggers:
                logger.log_metrics(start, step=0)
            write_json(self.output_dir / "start.json", start)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint saved after an epoch's last batch but before its end makes Lightning resume inside the finished
        epoch, and skip the start of the next. Rewrite it as saved at the epoch's end."""
        loop = checkpoint["loops"]["fit_loop"]
        epoch, batch = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
        if batch["is_last_batch"] and epoch["current"]["processed"] == epoch["current"]["started"] - 1:
            for scope in ("current", "total"):
                epoch[scope]["processed"] += 1
                batch[scope]["completed"] = batch[scope]["processed"]
            loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1

    def state_dict(self) -> dict[str, Any]:
        self._keep_time()
        clock = {key: value for key, value in self._clock.items() if key != "started"}
        return {"clock": clock, "report": dict(self._report), "stopped_because": self.stopped_because}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._clock, self._report = dict(state["clock"]), dict(state["report"])
        self.stopped_because = state["stopped_because"]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The end of the game; a hook that Lightning also calls when it finds nothing left to train on."""
        if trainer.fast_dev_run or (was_cut_short(trainer) and not self.stopped_because):  # type: ignore[attr-defined]
            return
        if trainer.fit_loop.epoch_progress.current.processed >= self.total_epochs:  # type: ignore[attr-defined]
            self._end_if_missed(self.iterations - 1, trainer.lightning_module)  # type: ignore[arg-type]
        played = [read_json(self.folder(k) / "summary.json") for k in range(self.iterations)]
        if self.stopped_because or played[-1] is not None:
            reason = self.stopped_because or f"all {self.iterations} iterations were played"
            write_json(self.output_dir / "game.json", {"ended_because": reason, "iterations": [s for s in played if s]})
            say(f"the game is over: {reason}. Models: {self.output_dir}/iteration_*/policy")

    # --- small things ---------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        """Between two answers a signal costs no more than the shard in progress."""
        signals.end_if_asked()
        if self.trainer.received_sigterm:  # without a RunCheckpoint; Lightning itself looks only after a training batch
            raise SIGTERMException

    def _keep_time(self) -> None:
        if started := self._clock.get("started"):
            self._clock["seconds"]["training"] += time.monotonic() - started
            self._clock["started"] = time.monotonic()

    def _log_report(self, iteration: int) -> None:
        report = self._report
        if report["pairs"] == 0:
            return
        values = {
            "completions/mean_length": report["generated_mean_length"],
            "completions/clipped_ratio": report["generated_clipped_share"],
            "completions/identical_ratio": report["identical_share"],
            "iteration": float(iteration),
        }
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.trainer.global_step)
        say(
            f"iteration {iteration}: {report['training_pairs']} pairs to train on ({report['training_pairs_dropped']} identical ones dropped); "
            f"generated answers have {report['generated_mean_length']:.1f} tokens on average (real {report['real_mean_length']:.1f}), "
            f"{report['generated_clipped_share']:.0%} hit the cap, {report['empty_share']:.0%} are empty, {report['identical_share']:.0%} equal the real one"
        )

    def _notify(self, hook: str, *args: Any) -> None:
        for callback in self.trainer.callbacks:
            if (method := getattr(callback, hook, None)) is not None:
                method(self.trainer, self.trainer.lightning_module, *args)


#: Settings that decide how a store's shards are cut and which columns they have.
_LAYOUT = ("answers_per_prompt", "shard_size", "initial_log_probs", "initial_responses")


def _refuse_other_settings(store: PairStore, settings: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Pairs are combined or continued only with what was made from the same rows, ids and settings."""
    assert store.manifest is not None
    made_by = store.manifest["binding"]
    if differing := [key for key in keys if made_by[key] != settings[key]]:
        raise UserError(
            f"the pairs in {store.folder} were made with other settings than this run has now; what differs: "
            f"{', '.join(differing)}. Use the settings they were made with, or another self_play.output_dir."
        )


def _read_all(store: PairStore, names: list[str]) -> pa.Table:
    columns = ["iteration", "real_ids", "generated_ids", "real_finish_reason", "generated_finish_reason"]
    return pa.concat_tables([store.read_shard(name, columns) for name in names])
