"""What is done in an iteration: a table is opened, filled and read, and after training the policy is exported.

``Iteration`` is what the clock runs, and all that it knows of a stage that plays. ``SpinIteration`` is that of
self-play. Both are handed the run and a view of the policy, and know no Lightning.
"""

from __future__ import annotations

import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from spin_lightning.generation.base import Player
from spin_lightning.generation.pair_maker import PairMaker, own_pairs
from spin_lightning.generation.pair_store import (
    DESCRIBED_COLUMNS,
    REWARD_COLUMNS,
    TRAINING_COLUMNS,
    PairStore,
    RankedPairStore,
    describe_gap,
    describe_pairs,
    describe_rewards,
    identical,
    name_sides,
    unranked,
)
from spin_lightning.generation.synthetic_data import SyntheticDataModule, TrainingSet
from spin_lightning.losses import PairLoss
from spin_lightning.models.adapters import exported_bytes
from spin_lightning.models.batches import collate_pairs
from spin_lightning.models.model_card import render_model_card
from spin_lightning.models.rope import refuse_crossing
from spin_lightning.models.saving import save_model, weights_hash
from spin_lightning.runs import processes
from spin_lightning.runs.checkpoints import checkpoint_folder, checkpoints_in
from spin_lightning.runs.files import need_space, read_json
from spin_lightning.runs.settings import versions
from spin_lightning.runs.shards import ShardStore, refuse_broken_chain, refuse_other_binding
from spin_lightning.stages.export import export_policy, origin_of
from spin_lightning.stages.opponent import Opponent
from spin_lightning.stages.ranking import Ranking
from spin_lightning.terminal import say
from spin_lightning.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: The tables that an iteration of self-play may make, by their folders.
TABLES = ("pairs", "laws")


def iteration_folder(run: Path, iteration: int) -> Path:
    """Where an iteration keeps what it made, in the folder of its run."""
    return run / f"iteration_{iteration}"


def find_place(run: Path) -> tuple[int, int]:
    """How many iterations of a run were exported, and how many updates its newest checkpoint has made after the last.

    As far as names and summaries in its folder tell. Below zero: the checkpoint that belongs to the export is missing.

    Example:
        >>> find_place(Path("/no/run/is/here"))
        (0, 0)
    """
    updates, number = 0, 0
    while (summary := read_json(iteration_folder(run, number) / "summary.json")) is not None:
        updates, number = updates + summary["updates"], number + 1
    checkpoints = checkpoints_in(Path(checkpoint_folder(str(run))))
    return number, (int(checkpoints[0].stem.removeprefix("step_")) if checkpoints else 0) - updates


@dataclass(frozen=True)
class Run:
    """Where an iteration is played, and with what.

    Attributes:
        folder: Of the run.
        data: Prompts, encoder, generator and their settings.
        shard_size: Prompts in one shard.
        poll: Called between responses; raises to interrupt.
        ranking: What a reward makes of an opponent's responses. None: each is paired with the real one.
    """

    folder: Path
    data: SyntheticDataModule
    shard_size: int
    poll: Callable[[], None]
    ranking: Ranking | None = None


@dataclass(frozen=True)
class PolicyView:
    """The model under training, as an iteration sees it.

    Attributes:
        model: Its weights as they are now.
        name: The model that the run started from, as it was named.
        dtype: Of its matrix products.
        numerics: A context with the precision of a training step.
        load: The policy exported in a folder, on the model's device; with None the model that the run started from.
        trust_remote_code: Whether code that comes with the model may run.
        adapter: The folder of the adapter that the run started from on that model. None: there is none.
    """

    model: PreTrainedModel
    name: str
    dtype: torch.dtype
    numerics: Callable[[], AbstractContextManager[Any]]
    load: Callable[[Path | None], PreTrainedModel]
    trust_remote_code: bool = False
    adapter: str | None = None


class Iteration(ABC):
    """One iteration of a stage that plays: made by the stage's module, run by the clock.

    What it makes is kept in the run's folder, so that a run can be killed between any two of these calls and go on.
    Every process makes all of these calls but ``close``, which the first one makes alone; in ``fill`` they share the
    work, and each writes shards of its own.

    Args:
        number: From 0.
        run: Where it is played, and with what.
        policy: The model under training.
    """

    def __init__(self, number: int, run: Run, policy: PolicyView) -> None:
        self.number, self.run, self.policy = number, run, policy
        self.folder = iteration_folder(run.folder, number)

    @abstractmethod
    def open(self, known: str | None, is_fresh: bool) -> ShardStore:
        """The table of this iteration, empty or as far as it was filled before.

        Args:
            known: The hash of the newest manifest that the run's checkpoint knows: if the iteration is fresh, that of
                the iteration before; else that of this one.
            is_fresh: Whether the iteration begins. Else it continues after training steps, and its table is complete.

        Raises:
            UserError: What is in the folder does not belong to this run.
        """

    @abstractmethod
    def fill(self, store: Any) -> None:
        """Make what is missing in the table, and finish it. Returns at once where nothing is."""

    @abstractmethod
    def training_set(self, store: Any) -> TrainingSet:
        """What to train on."""

    def refuse_other_table(self, store: ShardStore, known: str | None) -> None:
        """Make sure that a table is the one that this iteration began with, where it continues in its middle.

        Raises:
            UserError: It is another.
        """
        if store.sha256 != known:
            raise UserError(
                f"the {store.rows_are} in {store.folder} are not those that iteration {self.number} began with, so it "
                "cannot be continued. Restore the folder, or use another output_dir."
            )

    def close(self, summary: Mapping[str, Any]) -> None:
        """Export the policy, a model people can use, with a summary beside it."""
        policy, encoder = self.policy, self.run.data.encoder
        export_policy(policy.model, encoder, self.folder, self.card(summary), summary, policy.trust_remote_code)

    def card(self, summary: Mapping[str, Any]) -> str:
        """The README of the exported policy."""
        return f"# Policy after iteration {self.number}\n"


#: Of every game.
_LAYOUT = ("answers_per_prompt", "shard_size", "initial_log_probs", "initial_responses")


class SpinIteration(Iteration):
    """The opponent answers every prompt of the data, and the pairs of real and generated responses are trained on.

    Args:
        opponent: Becomes the policy where the iteration begins.
        loss: Says what has to be stored with the pairs, and which teach it anything.
    """

    def __init__(self, number: int, run: Run, policy: PolicyView, opponent: Opponent, loss: PairLoss) -> None:
        super().__init__(number, run, policy)
        self.opponent, self.loss = opponent, loss

    def open(self, known: str | None, is_fresh: bool) -> PairStore:
        if not is_fresh:
            return self._reopen(known)
        self.opponent.become(self.policy.model)
        data, model, number = self.run.data, self.policy.model, self.number
        data.refuse_longer_than(getattr(model.config, "max_position_embeddings", math.inf))
        refuse_crossing(model, [len(prompt.prompt_ids) for prompt in data.prompts], data.generator.max_new_tokens)
        depends_on = self._depends_on()
        self._refuse_other_rows(depends_on)
        refuse_broken_chain([self._pairs_of(k) for k in range(number - 1, -1, -1)], known)
        weights = weights_hash(model)
        processes.refuse_different(weights, f"the weights at the start of iteration {number}")
        binding = {
            "iteration": number,
            "opponent_sha256": weights,
            PairStore.chained_by: known if number else None,
            **depends_on,
            **({"engine": engine} if (engine := data.generator.engine) else {}),
        }
        kind = PairStore if self.run.ranking is None else RankedPairStore
        return kind(self.folder / "pairs", binding)

    def _refuse_other_rows(self, depends_on: Mapping[str, Any]) -> None:
        """Make sure that the pairs of earlier iterations can be combined with these.

        Raises:
            UserError: They were made with other settings; or of other rows, where rows stay or have to.
        """
        data, number = self.run.data, self.number
        of_rows = () if data.rows_move else ("prompts_sha256",)
        combined = set(range(max(0, number - data.history), number))
        needs_first = self.loss.needs_initial_response and number > 0
        for k in combined | ({0} if needs_first else set()):
            refuse_other_binding(self._pairs_of(k), depends_on, (*of_rows, "encoding_sha256", *self._layout))
        if needs_first and self._pairs_of(0).binding["prompts_sha256"] != depends_on["prompts_sha256"]:
            raise UserError(
                f"{type(self.loss).__name__} compares with the responses of iteration 0 to the same prompts, and the "
                f"rows of iteration {number} are others. Give all iterations the same rows, or take another loss."
            )

    def _reopen(self, known: str | None) -> PairStore:
        """Back in the middle of the iteration: the pairs and the opponent are those it began with."""
        store = self._pairs_of(self.number)
        self.refuse_other_table(store, known)
        keys = ("prompts_sha256", "encoding_sha256", "sampling", "seed", "history", *self._layout)
        refuse_other_binding(store, self._depends_on(), keys)
        self.opponent.restore(lambda: self._load_opponent(store))
        return store

    def fill(self, store: PairStore) -> None:
        if store.is_complete:
            return
        data, number, sampling = self.run.data, self.number, self.run.data.generator.sampling
        say(
            f"iteration {number}: the opponent answers {len(data.prompts)} prompts, {data.answers_per_prompt} each, "
            f"temperature {sampling['temperature']:g}, top_p {sampling['top_p']:g}, at most "
            f"{sampling['max_new_tokens']} tokens"
        )
        if kept := sum(shard["rows"] for shard in store.manifest["shards"]):
            say(f"continuing iteration {number} with the {kept} pairs that are there already")
        initial = None
        if self.loss.needs_initial_log_probs:
            initial = self._load_initial() if number else self.policy.model
        folder = self._opponent_folder
        if folder is not None and not folder.is_dir():  # an adapter need not be exported merged
            folder = None
        writes = data.generator.needs_folder and folder is None
        if processes.is_first():
            self._need_space(sampling["max_new_tokens"], 1 + writes)
        if writes:
            folder = self.folder / "opponent"
            if processes.is_first():
                ends, trusted = data.encoder.end_ids, self.policy.trust_remote_code
                card = f"# The opponent of iteration {number}\n"
                save_model(self.policy.model, data.encoder.tokenizer, folder, card, ends, trust_remote_code=trusted)
            processes.wait()
        ranking = self.run.ranking
        maker = PairMaker(
            opponent=Player(self.policy.model, folder),
            encoder=data.encoder,
            generator=data.generator,
            prompts=data.prompts,
            iteration=number,
            answers_per_prompt=data.answers_per_prompt,
            seed=data.seed,
            micro_batch_tokens=data.micro_batch_tokens,
            opponent_sha256=store.binding["opponent_sha256"],
            numerics=self.policy.numerics,
            poll=self.run.poll,
            initial=initial,
            initial_responses=self.loss.needs_initial_response,
            shard_size=self.run.shard_size,
            **({} if ranking is None else ranking.for_maker(data, map(self._pairs_of, range(number)))),
        )
        try:
            names = maker.make(store, {k: self._pairs_of(k) for k in range(number)}, data.history)
        finally:
            if ranking is not None:
                ranking.reward.close()
        store.gather()
        columns = [*DESCRIBED_COLUMNS, *([] if ranking is None else ["prompt_id", *REWARD_COLUMNS, "rewards"])]
        own = own_pairs(store.read_shards(names, columns), number)
        statistics = describe_pairs(own) | ({} if ranking is None else {"rewards": describe_rewards(own)})
        if "engine" in store.binding:
            gap = describe_gap(own)
            say(
                "the sampler's log-probs and the opponent's differ by {mean:.3f} nats a token, at most by {most:.3f} "
                "(signed {signed:+.4f})".format(**gap)
            )
            statistics["sampler_gap"] = gap
        if writes and processes.is_first():  # before the pairs are complete: nobody comes back for it then
            shutil.rmtree(self.folder / "opponent")
        start = {} if self.number or not self.policy.adapter else {"opponent_adapter": self.policy.adapter}
        store.finish(names, opponent=self._opponent_name, **start, versions=versions(), statistics=statistics)

    def training_set(self, store: PairStore) -> TrainingSet:
        """All pairs but those that cannot teach this loss anything."""
        ranking = self.run.ranking
        table = whole = store.read([*TRAINING_COLUMNS, *([] if ranking is None else REWARD_COLUMNS)])
        if ranking is not None:
            table = table.filter(pc.invert(unranked(table))).select(TRAINING_COLUMNS)
        if not self.loss.learns_from_identical:
            table = table.filter(pa.array(~identical(table)))
        statistics = store.manifest["statistics"]
        dropped = whole.num_rows - table.num_rows
        report = {**statistics, "training_pairs": table.num_rows, "training_pairs_dropped": dropped}
        if ranking is not None and ranking.pairs == "best_worst":
            report["sides"] = ["best", "worst"]
        why = "every generated answer equals the real one: there is nothing left to tell apart"
        if ranking is not None:
            why = f"no pair is left that {ranking.reward.name} tells apart"
        if not report["pairs"]:
            return TrainingSet(table, collate_pairs, report, if_empty=why)
        metrics = {
            "completions/mean_length": report["generated_mean_length"],
            "completions/clipped_ratio": report["generated_clipped_share"],
            "completions/identical_ratio": report["identical_share"],
        }
        what = f"{dropped} identical ones dropped"
        if ranking is not None:
            what = f"{ranking.in_words}; {dropped} dropped that it does not tell apart, or that are identical"
            metrics |= {
                f"reward/{name}": float(value) for name, value in statistics["rewards"].items() if value is not None
            }
            if (mean := statistics["rewards"]["mean"]) is not None:
                what += f"; all answers are worth {mean:.3f} on average"
        real, generated = name_sides(report)
        sentence = (
            f"iteration {self.number}: {table.num_rows} pairs to train on ({what}); "
            f"{generated} answers have {report['generated_mean_length']:.1f} tokens on average ({real} "
            f"{report['real_mean_length']:.1f}), {report['generated_clipped_share']:.0%} hit the cap, "
            f"{report['empty_share']:.0%} are empty, {report['identical_share']:.0%} equal the {real} one"
        )
        return TrainingSet(table, collate_pairs, report, metrics, sentence, why)

    def card(self, summary: Mapping[str, Any]) -> str:
        origin = origin_of(self.policy.name, self.run.data)
        return render_model_card(summary, self._pairs_of(self.number).manifest, origin)

    def _pairs_of(self, iteration: int) -> PairStore:
        """The finished pairs of an iteration."""
        return PairStore(iteration_folder(self.run.folder, iteration) / "pairs")

    def _depends_on(self) -> dict[str, Any]:
        """What pairs depend on beside the opponent: the same in every iteration of a game. Hashes all prompts."""
        data = self.run.data
        return {
            "prompts_sha256": data.prompts_hash,
            "encoding_sha256": data.encoder.fingerprint,
            "sampling": data.generator.sampling,
            "answers_per_prompt": data.answers_per_prompt,
            "history": data.history,
            "seed": data.seed,
            "shard_size": self.run.shard_size,
            "dtype": str(self.policy.dtype),
            "initial_log_probs": self.loss.needs_initial_log_probs,
            "initial_responses": self.loss.needs_initial_response,
            **({} if self.run.ranking is None else self.run.ranking.settings),
        }

    @property
    def _layout(self) -> tuple[str, ...]:
        """Settings that decide how a store's shards are cut and which columns they have."""
        return (*_LAYOUT, *(() if self.run.ranking is None else self.run.ranking.settings))

    @property
    def _opponent_folder(self) -> Path | None:
        """Where the last iteration exported the opponent; None in iteration 0."""
        return iteration_folder(self.run.folder, self.number - 1) / "policy" if self.number else None

    @property
    def _opponent_name(self) -> str:
        return f"iteration_{self.number - 1}/policy" if self.number else self.policy.name

    def _load_opponent(self, store: PairStore) -> PreTrainedModel:
        refusal = (
            f"so iteration {self.number} cannot be continued. Restore it from a copy, or use another "
            "self_play.output_dir."
        )
        name = store.manifest["opponent"]
        try:
            opponent = self.policy.load(self._opponent_folder)
        except UserError as error:
            raise UserError(f"the opponent {name} cannot be read, {refusal} ({error})") from error
        if weights_hash(opponent) != store.binding["opponent_sha256"]:
            raise UserError(f"{name} does not hold the weights of the opponent that the pairs were made by, {refusal}")
        return opponent

    def _load_initial(self) -> PreTrainedModel:
        initial = self.policy.load(None).eval()
        if weights_hash(initial) != self._pairs_of(0).binding["opponent_sha256"]:
            raise UserError(
                f"{self.policy.name} does not hold the weights that this game began with, whose log-probs "
                f"{type(self.loss).__name__} needs. Restore it, or use another self_play.output_dir."
            )
        return initial

    def _need_space(self, max_new_tokens: int, num_models: int) -> None:
        data = self.run.data
        weights = exported_bytes(self.policy.model)
        tokens = len(data.prompts) * data.answers_per_prompt * (data.max_prompt_tokens + 2 * max_new_tokens)
        need_space(self.folder, num_models * weights + 8 * tokens * (1 + data.history), f"iteration {self.number}")
