"""Direct preference optimisation: a policy learns from recorded pairs, a better and a worse response to each prompt.

The clock of self-play, for one iteration: the pairs are scored by the model that the run starts from, once, and stored;
training reads nothing else of it. So the first loss is ln 2, and the gate holds the run to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from spin_lightning.data.preferences import Pairs, PreferenceDataModule
from spin_lightning.generation.pair_maker import add_log_probs
from spin_lightning.generation.pair_store import SCHEMA, TRAINING_COLUMNS, PairStore
from spin_lightning.generation.synthetic_data import TrainingSet
from spin_lightning.losses import PairLoss, with_preference
from spin_lightning.models.adapters import exported_bytes
from spin_lightning.models.batches import collate_pairs
from spin_lightning.models.forward_paths import forward_path_of
from spin_lightning.models.loading import ModelOrName
from spin_lightning.models.log_probs import pair_log_probs
from spin_lightning.models.modes import evaluating
from spin_lightning.models.rope import refuse_crossing
from spin_lightning.models.saving import weights_hash
from spin_lightning.progress import track
from spin_lightning.runs import processes
from spin_lightning.runs.files import need_space, write_json
from spin_lightning.runs.settings import versions
from spin_lightning.runs.shards import refuse_other_binding
from spin_lightning.stages.clock import IterationClock
from spin_lightning.stages.export import name_models, origin_of, plain_card
from spin_lightning.stages.health import keep_remark, remarks_on_preferences, remarks_on_rewards
from spin_lightning.stages.iteration import Iteration, PolicyView, Run
from spin_lightning.stages.metrics import RewardAccuracy
from spin_lightning.stages.opponent import StoredOpponent
from spin_lightning.stages.pairs import PairModule
from spin_lightning.stages.policy import PolicyModule
from spin_lightning.stages.stage import Stage, cap_of
from spin_lightning.terminal import say
from spin_lightning.types import PairBatch, PairLogProbs, UserError

#: What a pair has beside what every pair store keeps.
_OF_PREFERENCES = ("preference", "margin")


class PreferenceStore(PairStore):
    """Recorded pairs with the log-probs of the model that a run starts from."""

    schema = pa.schema([*SCHEMA, *(pa.field(name, pa.float64()) for name in _OF_PREFERENCES)])


class DpoIteration(Iteration):
    """The pairs of the data are scored by the policy as it is when the run begins, and trained on.

    Held-out pairs are scored too, and kept apart.
    """

    def __init__(self, number: int, run: Run, policy: PolicyView) -> None:
        super().__init__(number, run, policy)
        self.folder = run.folder
        #: Log-probs of the held-out pairs under the model that the run started from, in their order.
        self.held_out: PairLogProbs | None = None

    def open(self, known: str | None, is_fresh: bool) -> PreferenceStore:
        data, model, folder = self.run.data, self.policy.model, self.folder / "pairs"
        if not is_fresh:
            store = PreferenceStore(folder)
            self.refuse_other_table(store, known)
            refuse_other_binding(store, self._depends_on(data.prompts_hash), ("prompts_sha256", "encoding_sha256"))
            return store
        data.refuse_longer_than(getattr(model.config, "max_position_embeddings", math.inf))
        refuse_crossing(model, [len(prompt.prompt_ids) for prompt in data.prompts], data.max_response_tokens)
        weights = weights_hash(model)
        processes.refuse_different(weights, "the weights at the start of the run")
        return PreferenceStore(folder, {"opponent_sha256": weights, **self._depends_on(data.prompts_hash)})

    def fill(self, store: PreferenceStore) -> None:
        if store.is_complete:
            return
        data, policy = self.run.data, self.policy
        if processes.is_first():
            tokens = (len(data.prompts) + len(data.val_prompts)) * (
                data.max_prompt_tokens + 2 * data.max_response_tokens
            )
            need_space(self.folder, exported_bytes(policy.model) + 8 * tokens, "the run")
        held_out = self._held_out_store({**store.binding, **self._depends_on(data.held_out_hash)})
        with torch.no_grad(), policy.numerics(), evaluating(policy.model):
            forward_path_of(policy.model)
            if held_out is not None and not held_out.is_complete:
                self._score(Pairs(data.val_prompts), held_out, "scoring held-out pairs")
            self._score(Pairs(data.prompts), store, "scoring pairs")

    def _score(self, pairs: Pairs, store: PreferenceStore, what: str) -> None:
        """Write the pairs with the log-probs of the policy as it is, each process its share of the shards."""
        size, tokens = self.run.shard_size, self.run.data.micro_batch_tokens
        starts = range(0, len(pairs), size)
        names = [f"pairs-{start:09d}.parquet" for start in starts]
        own = processes.deal([*zip(starts, names, strict=True)])
        for start, name in track(own, what, len(own), "shards"):
            if store.has_shard(name):
                continue
            rows = [pairs[index] for index in range(start, min(start + size, len(pairs)))]
            add_log_probs("opponent", self.policy.model, rows, ["real", "generated"], tokens, self.run.poll)
            of_initial = ("initial_real_log_prob", "initial_generated_log_prob")  # one model, for the losses that ask
            store.write_shard(
                name, [{**row, **{key: row[key.replace("initial", "opponent")] for key in of_initial}} for row in rows]
            )
        store.gather()
        store.finish(names, opponent=self.policy.name, versions=versions())

    def training_set(self, store: PreferenceStore) -> TrainingSet:
        if (held_out := self._held_out_store(None)) is not None:
            self.held_out = _read_log_probs(held_out)
        table = store.read([*TRAINING_COLUMNS, "real_finish_reason", "generated_finish_reason", *_OF_PREFERENCES])
        report = describe_preferences(table)
        soft = f", {report['soft']} of them with a preference below 1" if report["soft"] else ""
        sentence = (
            f"{report['pairs']} pairs to train on{soft}; chosen responses have {report['chosen_mean_length']:.1f} "
            f"tokens on average, rejected ones {report['rejected_mean_length']:.1f}"
        )
        metrics = {f"pairs/{name}": float(value) for name, value in report.items()}
        return TrainingSet(table, collate_pairs, report, metrics, sentence)

    def card(self, summary: Mapping[str, Any]) -> str:
        origin = origin_of(self.policy.name, self.run.data)
        return plain_card("dpo", "Policy after direct preference optimisation", summary, origin)

    def _held_out_store(self, binding: Mapping[str, Any] | None) -> PreferenceStore | None:
        """The held-out pairs; None if there are none."""
        return PreferenceStore(self.folder / "held_out", binding) if self.run.data.val_prompts else None

    def _depends_on(self, prompts_hash: str) -> dict[str, Any]:
        return {
            "prompts_sha256": prompts_hash,
            "encoding_sha256": self.run.data.encoder.fingerprint,
            "shard_size": self.run.shard_size,
            "dtype": str(self.policy.dtype),
        }


def describe_preferences(table: pa.Table) -> dict[str, Any]:
    """What a person should know of pairs before training on them.

    ``longer_wins`` is how often the longer response is the better one; a tie counts one half.
    """
    chosen, rejected = (pc.list_value_length(table[f"{side}_ids"]).to_numpy() for side in ("real", "generated"))
    p = table["preference"].to_numpy()
    longer = 0.5 + 0.5 * ((chosen > rejected).astype(float) - (chosen < rejected))
    return {
        "pairs": table.num_rows,
        "soft": int((p < 1).sum()),
        "chosen_mean_length": float(chosen.mean()),
        "rejected_mean_length": float(rejected.mean()),
        "chosen_cut": int(pc.sum(pc.equal(table["real_finish_reason"], "length")).as_py()),
        "rejected_cut": int(pc.sum(pc.equal(table["generated_finish_reason"], "length")).as_py()),
        "longer_wins": float((p * longer + (1 - p) * (1 - longer)).mean()),
    }


def _read_log_probs(store: PreferenceStore) -> PairLogProbs:
    """The stored log-probs of all pairs of a store."""
    table = store.read([f"opponent_{side}_log_prob" for side in ("real", "generated")])
    real, generated = (torch.tensor(column.to_pylist(), dtype=torch.float32) for column in table.columns)
    nothing = torch.empty(0)
    return PairLogProbs(real, generated, nothing, nothing)


class DpoLightningModule(PairModule):
    """Direct preference optimisation of one language model (Rafailov et al. 2023, arXiv:2305.18290).

    Takes every setting of ``PolicyModule`` too.

    Args:
        model_name_or_path: The model to start from, which is the reference too: a hub name, a Hugging Face folder or a
            ``.gguf`` file. In Python also a model of ``transformers``, which is then trained in place.
        beta: How close to the reference the policy stays, the scale of the KL penalty that the optimum pays: the
            lower, the further it may go.
        loss: The pair loss, as a class path with its settings. The default is DPO's own, the logistic one.
        learning_rate: Peak of the schedule. 5e-7 suits 7B; small models and adapters want more.

    Raises:
        UserError: A setting is outside its range.

    Example:
        >>> module = DpoLightningModule("HuggingFaceTB/SmolLM2-135M-Instruct", beta=0.1, learning_rate=1e-6)
    """

    kernels_used = PolicyModule.kernels_used

    def __init__(
        self,
        model_name_or_path: ModelOrName,
        beta: float = 0.1,
        loss: PairLoss | None = None,
        learning_rate: float = 5e-7,
        **policy: Any,
    ) -> None:
        super().__init__(model_name_or_path, learning_rate=learning_rate, **policy)
        self.learn_from_pairs(beta, loss, StoredOpponent())
        self.held_out_loss = MeanMetric()
        self.held_out_margin = MeanMetric()
        self.held_out_accuracy: Any = RewardAccuracy()
        self._playing: DpoIteration | None = None

    def make_iteration(self, number: int, run: Run) -> DpoIteration:
        self._playing = DpoIteration(number, run, self.policy_view)
        return self._playing

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if getattr(self.trainer.datamodule, "game", None) is None:  # type: ignore[attr-defined]
            raise UserError(
                "DpoLightningModule needs the RecordedPairs callback, which scores and stores the pairs, and a "
                "PreferenceDataModule. Use Trainer(callbacks=[RecordedPairs(...), ...]).fit(module, "
                "PreferenceDataModule(...))."
            )

    def describe_iteration(self, iteration: int) -> dict[str, Any]:
        found = self.trainer.callback_metrics
        names = [name for name in ("loss", "accuracy", "margin") if f"val/{name}" in found]
        held_out = {name: float(found[f"val/{name}"]) for name in names}
        return {**super().describe_iteration(iteration), "held_out": held_out or None}

    def held_out_log_probs(self, part: PairBatch) -> tuple[Tensor, Tensor]:
        policy = pair_log_probs(self.plain_policy, part)
        known = None if self._playing is None else self._playing.held_out
        if known is not None:
            real, generated = (side[part.pair_ids.cpu()].to(policy.real) for side in (known.real, known.generated))
            reference = PairLogProbs(real, generated, policy.real_lengths, policy.generated_lengths)
            output = with_preference(self.loss, part.preference, policy, reference, self.beta_now, reference)
            self.held_out_loss.update(output.losses)
            self.held_out_margin.update(output.real_rewards - output.generated_rewards)
            self.held_out_accuracy.update(output.real_rewards, output.generated_rewards)
        return policy.real, policy.real_lengths

    def validation_step(self, batch: list[Any], batch_idx: int) -> None:
        """Held-out NLL of the better responses; and once the reference has scored them, loss and accuracy of pairs."""
        super().validation_step(batch, batch_idx)
        if self.is_other(batch_idx):
            return
        if self._playing is not None and self._playing.held_out is not None:
            size = sum(map(len, batch))
            for name in ("loss", "accuracy", "margin"):
                metric = getattr(self, f"held_out_{name}")
                self.log(f"val/{name}", metric, on_epoch=True, on_step=False, batch_size=size)


class RecordedPairs(IterationClock):
    """Scores and stores the pairs of the data, has the policy trained on them, and exports it.

    ``pairs/`` and ``held_out/`` are Parquet, ``policy/`` is a Hugging Face folder, verified by reloading it, and
    ``summary.json`` is written last.

    Args:
        output_dir: Folder of the run.
        shard_size: Pairs in one shard: the most that is scored again after a kill.

    Raises:
        UserError: A setting is outside its range.
    """

    settings_section = "export"
    over_file = "summary.json"
    plays_with = "a DpoLightningModule"

    def __init__(self, output_dir: str = "runs/dpo", shard_size: int = 1024) -> None:
        super().__init__(output_dir, iterations=1, epochs=1, reset_optimizer=True, shard_size=shard_size)

    def folder(self, iteration: int) -> Path:
        return self.output_dir

    def shorten(self, data: Any, batches: int) -> None:
        super().shorten(data, batches)
        data.val_prompts = data.val_prompts[: data.batch_size * batches]

    def refuse_unplayable(self, trainer: Any, module: Any) -> None:
        _refuse_epochs(trainer.max_epochs)
        self.set_epochs(trainer.max_epochs)
        if not isinstance(data := trainer.datamodule, PreferenceDataModule):
            raise UserError(
                f"RecordedPairs needs a PreferenceDataModule, got {type(data).__name__}. Use trainer.fit(module, "
                "PreferenceDataModule(...))."
            )
        super().refuse_unplayable(trainer, module)

    def write_over(self, reason: str, iterations: list[dict[str, Any]]) -> None:
        if not iterations:  # else the summary is there, beside the policy
            write_json(self.output_dir / self.over_file, {"ended_because": reason})

    def say_over(self, reason: str) -> None:
        where = f"the model is in {name_models(self.output_dir)}"
        say(where if self.stopped_because is None else f"the run ended: {reason}")

    def on_generation_end(
        self, trainer: L.Trainer, module: L.LightningModule, iteration: int, store: PairStore, report: dict[str, Any]
    ) -> None:
        """Say what the pairs alone tell."""
        self._remark(remarks_on_preferences(report))

    def on_iteration_end(
        self, trainer: L.Trainer, module: L.LightningModule, iteration: int, summary: dict[str, Any]
    ) -> None:
        """Say what the rewards tell."""
        policy: Any = module
        self._remark(remarks_on_rewards(summary["epoch_metrics"], summary["pairs"], policy.loss))

    def _remark(self, remarks: list[str]) -> None:
        for remark in remarks:
            say(f"health: {remark}.")
            if processes.is_first():
                keep_remark(self.output_dir, None, remark)


def _refuse_epochs(max_epochs: int | None) -> None:
    if max_epochs is None or max_epochs < 1:
        raise UserError(f"trainer.max_epochs must be at least 1, got {max_epochs!r}. DPO usually takes 1.")


def _refuse_no_end(settings: Any) -> None:
    _refuse_epochs(settings.trainer.max_epochs)
    if settings.trainer.max_steps != -1:
        raise UserError(
            f"trainer.max_steps cannot be used here, got {settings.trainer.max_steps}. Set trainer.max_epochs, or "
            "data.max_rows for fewer rows."
        )


def _check_schedules(module: DpoLightningModule, callbacks: Mapping[str, Any]) -> None:
    module.check_schedules(1)


#: ``spin-lightning dpo``.
STAGE = Stage(
    module="spin_lightning.stages.dpo.DpoLightningModule",
    data="spin_lightning.data.preferences.PreferenceDataModule",
    callbacks={"export": "spin_lightning.stages.dpo.RecordedPairs"},
    folder="export",
    over_file="summary.json",
    mark="export.shard_size",
    reads_over={
        "data.generator": cap_of,
        "data.answers_per_prompt": None,
        "data.history": None,
        "data.keep_prompts_together": None,
    },
    defaults={"trainer.max_epochs": 1, "model.loss": {"class_path": "spin_lightning.SpinLoss"}},
    refuse=_refuse_no_end,
    check=_check_schedules,
)
