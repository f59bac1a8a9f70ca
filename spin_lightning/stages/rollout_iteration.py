"""An iteration of PPO: the policy responds, the responses are scored and rewarded, and what they were worth is told.

Knows no Lightning. What was sampled, scored and rewarded is kept in shards before anything trains on it: a reward is
asked once about a response, and after a kill the same training follows from the same table.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from safetensors.torch import save_file
from torch import Tensor, nn

from spin_lightning.advantages import Advantage, Trajectories
from spin_lightning.generation.answer_store import (
    TRAINING_COLUMNS,
    AnswerStore,
    describe_answers,
    describe_critic,
    flat,
)
from spin_lightning.generation.base import Player, ResponseGenerator, opened, seed_of
from spin_lightning.generation.responding import Responder
from spin_lightning.generation.synthetic_data import TrainingSet
from spin_lightning.models.adapters import exported_bytes
from spin_lightning.models.batches import collate_rollouts, pack_rows
from spin_lightning.models.forward_paths import forward_path_of, token_log_probs
from spin_lightning.models.modes import evaluating
from spin_lightning.models.rope import refuse_crossing
from spin_lightning.models.saving import save_model, weights_hash
from spin_lightning.progress import Phase, progress
from spin_lightning.rewards.base import Reward, make_answer, scored_with_parts, settings_kept
from spin_lightning.runs import processes
from spin_lightning.runs.files import need_space, read_json, replacing, sha256_of, write_json
from spin_lightning.runs.settings import versions
from spin_lightning.runs.shards import refuse_other_binding
from spin_lightning.stages.export import export_policy, origin_of, plain_card
from spin_lightning.stages.iteration import Iteration, PolicyView, Run, iteration_folder
from spin_lightning.terminal import say
from spin_lightning.types import Prompt, ResponseBatch, UserError

#: Settings that a table was made with, which may not change while it is trained on.
_SETTINGS = ("prompts_sha256", "encoding_sha256", "sampling", "seed", "prompts", "answers_per_prompt", "shard_size")


@dataclass(frozen=True, kw_only=True)
class RolloutRun(Run):
    """Where an iteration is played, and with what.

    Attributes:
        reward: What responses are worth.
        prompts: How many prompts an iteration has.
        cut: What a response without an end is worth: what the reward says of it (``score``), a number, or nothing, so
            that it is left out (``drop``).
        eval_every: Every so many iterations held-out prompts are responded to. 0: never.
        export_every: Every so many iterations the policy is exported. 0: only at the end.
    """

    reward: Reward
    prompts: int
    cut: float | Literal["score", "drop"]
    eval_every: int
    export_every: int


@dataclass(frozen=True)
class Scorer:
    """What the module knows of responses.

    Attributes:
        advantage: From rewards to what each token was worth.
        beta: How much a nat of divergence from the reference costs. 0: there is no reference.
        score: The policy's log-prob of each response token, and what the critic expected before it, if there is one.
        critic: The critic, if there is one.
        load_reference: The model that the run started from.
    """

    advantage: Advantage
    beta: float
    score: Callable[[ResponseBatch], tuple[Tensor, Tensor | None]]
    critic: nn.Module | None
    load_reference: Callable[[], nn.Module]


class PpoIteration(Iteration):
    """Some prompts of the data, K responses to each, and what they were worth.

    Args:
        number: From 0.
        run: Where it is played, and with what.
        policy: The model under training.
        scorer: What the module knows of responses.
    """

    run: RolloutRun

    def __init__(self, number: int, run: RolloutRun, policy: PolicyView, scorer: Scorer) -> None:
        super().__init__(number, run, policy)
        self.scorer = scorer
        self._held_out: dict[str, float] = {}
        self._is_fresh = True

    # --- the table --------------------------------------------------------------------------------------------------

    def open(self, known: str | None, is_fresh: bool) -> AnswerStore:
        self._is_fresh = is_fresh
        if not is_fresh:
            store = self._answers_of(self.number)
            self.refuse_other_table(store, known)
            refuse_other_binding(store, self._depends_on(), _SETTINGS)
            return store
        data, model = self.run.data, self.policy.model
        if self.number == 0:
            data.refuse_longer_than(getattr(model.config, "max_position_embeddings", math.inf))
            lengths = [len(prompt.prompt_ids) for prompt in data.prompts]
            if not min(lengths):
                raise UserError("a prompt has no token, so nothing predicts its response's first. Give it a template.")
            refuse_crossing(model, lengths, data.generator.max_new_tokens)
        else:
            self._refuse_other_past(known)
        binding = {
            "iteration": self.number,
            AnswerStore.chained_by: known,
            **self._depends_on(),
            **({"engine": engine} if (engine := data.generator.engine) else {}),
        }
        return self._open_store("answers", binding)

    def _refuse_other_past(self, known: str | None) -> None:
        before = self._answers_of(self.number - 1)
        if before.sha256 != known:
            raise UserError(
                f"the responses in {before.folder} are not those that this run made for iteration {self.number - 1}. "
                "Restore the folder, or use another rollouts.output_dir."
            )

    def _open_store(self, name: str, settings: Mapping[str, Any]) -> AnswerStore:
        """A table of this iteration, bound to the weights of now and to some settings."""
        weights = weights_hash(self.policy.model)
        processes.refuse_different(weights, f"the weights at the start of iteration {self.number}")
        critic = self.scorer.critic
        binding = {
            **settings,
            "policy_sha256": weights,
            "critic_sha256": None if critic is None else weights_hash(critic),
        }
        folder = self.folder / name
        if self.number and processes.is_first():
            old = (read_json(folder.with_name(f"{name}_manifest.json")) or {}).get("binding", binding)
            if {key for key in {**old, **binding} if old.get(key) != binding.get(key)} & {
                "policy_sha256",
                "critic_sha256",
            }:
                self._set_aside()
        return AnswerStore(folder, binding)

    def _set_aside(self) -> None:
        """Make room for another future: the run continued from a checkpoint, and trained otherwise than before."""
        names = []
        number = self.number
        while (folder := iteration_folder(self.run.folder, number)).exists():
            aside = folder.with_name(f"{folder.name}.set_aside")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            names.append(folder.name)
            number += 1
        say(
            f"note: the weights at the start of iteration {self.number} are not those that made what is stored there, "
            f"as where a device adds up in another order; set aside {names[0]}"
            + (f" to {names[-1]}" if names[1:] else "")
            + ", and made anew"
        )

    def _depends_on(self) -> dict[str, Any]:
        """What responses depend on beside the weights."""
        data, run = self.run.data, self.run
        chosen = [[prompt.prompt_id, prompt.prompt_ids, prompt.real_ids, answer] for prompt, answer in self._wanted]
        columns = [json.dumps(prompt.row.columns, sort_keys=True, default=str) for prompt, _ in self._wanted]
        return {
            "prompts_sha256": sha256_of(chosen),
            **({"columns_sha256": sha256_of(columns)} if run.reward.columns else {}),
            "encoding_sha256": data.encoder.fingerprint,
            "sampling": data.generator.sampling,
            "prompts": run.prompts,
            "answers_per_prompt": data.answers_per_prompt,
            "seed": data.seed,
            "shard_size": run.shard_size,
            "dtype": str(self.policy.dtype),
            "reward": settings_kept(run.reward),
            "cut": run.cut,
            "beta": self.scorer.beta,
            "reference_sha256": self._reference_hash,
        }

    @property
    def _reference_hash(self) -> str | None:
        """Of the model that the run started from, where it is a reference."""
        if not self.scorer.beta:
            return None
        return self._answers_of(0).binding["policy_sha256"] if self.number else weights_hash(self.policy.model)

    def _answers_of(self, iteration: int) -> AnswerStore:
        """The finished responses of an iteration."""
        return AnswerStore(iteration_folder(self.run.folder, iteration) / "answers")

    @property
    def _wanted(self) -> list[tuple[Prompt, int]]:
        """The prompts of this iteration, each with the number of its first response.

        A prompt that comes twice has a group twice as large, and no response twice.
        """
        data, seen = self.run.data, dict[int, int]()
        wanted = []
        for index in prompts_of_iteration(len(data.prompts), data.seed, self.number, self.run.prompts):
            wanted.append((data.prompts[index], seen.get(index, 0)))
            seen[index] = seen.get(index, 0) + data.answers_per_prompt
        return wanted

    # --- what is in it ----------------------------------------------------------------------------------------------

    def fill(self, store: AnswerStore) -> None:
        """Make what is missing: the held-out responses where they are due, then those of the iteration."""
        held_out = self._find_held_out()
        self._make([(held_out, self.run.data.val_prompts), (store, [prompt for prompt, _ in self._wanted])])
        if held_out is not None:
            self._held_out = describe_held_out(held_out)

    def evaluate(self) -> dict[str, float]:
        """What the policy's most likely responses to the held-out prompts are worth, under the names loggers get."""
        store = self._open_held_out()
        self._make([(store, self.run.data.val_prompts)])
        return describe_held_out(store)

    def _find_held_out(self) -> AnswerStore | None:
        """The held-out responses of this iteration, if it has any; in its middle, those of the policy it began with."""
        every = self.run.eval_every
        if not every or self.number % every or not self.run.data.val_prompts:
            return None
        if self._is_fresh:
            return self._open_held_out()
        folder = self.folder / "held_out"
        return AnswerStore(folder) if folder.is_dir() else None

    def _open_held_out(self) -> AnswerStore:
        data = self.run.data
        with greedy(data.generator):
            settings = {
                "iteration": self.number,
                "prompts_sha256": data.held_out_hash,
                "encoding_sha256": data.encoder.fingerprint,
                "sampling": data.generator.sampling,
                "dtype": str(self.policy.dtype),
                "reward": settings_kept(self.run.reward),
                "cut": self.run.cut,
            }
            return self._open_store("held_out", settings)

    def _make(self, tables: Sequence[tuple[AnswerStore | None, Sequence[Prompt]]]) -> None:
        """Fill and finish those tables that are not complete. Of several processes each makes its share of shards."""
        missing = [(store, prompts) for store, prompts in tables if store is not None and not store.is_complete]
        if not missing:
            return
        data, model = self.run.data, self.policy.model
        folder = None
        if data.generator.needs_folder:
            folder = self.folder / "sampler"
            if processes.is_first():
                ends, trusted = data.encoder.end_ids, self.policy.trust_remote_code
                card = f"# The policy of iteration {self.number}\n"
                save_model(model, data.encoder.tokenizer, folder, card, ends, trust_remote_code=trusted)
            processes.wait()
        with torch.no_grad(), self.policy.numerics(), evaluating(model), opened(data.generator, Player(model, folder)):
            forward_path_of(model)  # before the first response, so that all are computed alike
            responder = Responder(data.generator, data.encoder, model, self.run.poll)
            for store, prompts in missing:
                self._fill_table(store, prompts, responder)
        if folder is not None and processes.is_first():
            shutil.rmtree(folder)

    def _fill_table(self, store: AnswerStore, prompts: Sequence[Prompt], responder: Responder) -> None:
        is_held_out = store.folder.name == "held_out"
        count = 1 if is_held_out else self.run.data.answers_per_prompt
        if kept := sum(shard["rows"] for shard in store.manifest["shards"]):
            say(f"continuing iteration {self.number} with the {kept} responses that are there already")
        size = self.run.shard_size
        starts = range(0, len(prompts), size)
        own = processes.deal(starts)
        firsts = [0] * len(prompts) if is_held_out else [answer for _, answer in self._wanted]
        total = sum(len(prompts[start : start + size]) for start in own) * count
        with (
            greedy(self.run.data.generator) if is_held_out else nullcontext(),
            progress("answering held-out prompts" if is_held_out else "answering", total, "responses") as phase,
        ):
            for start in own:
                some = list(zip(prompts[start : start + size], firsts[start : start + size], strict=True))
                if store.has_shard(name := _shard_name(start)):
                    phase.skip(len(some) * count)
                    continue
                wanted = [(prompt, first + answer) for prompt, first in some for answer in range(count)]
                rows = self._respond(wanted, responder, phase)
                if not is_held_out:
                    self._score(rows)
                self._judge([prompt for prompt, _ in wanted], rows)
                store.write_shard(name, rows)
        store.gather()
        names = [_shard_name(start) for start in starts]
        statistics = describe_answers(store.read_shards(names, TRAINING_COLUMNS))
        store.finish(names, versions=versions(), statistics=statistics)

    def _respond(
        self, wanted: Sequence[tuple[Prompt, int]], responder: Responder, phase: Phase
    ) -> list[dict[str, Any]]:
        data, decode = self.run.data, self.run.data.encoder.decode
        seeds = [seed_of(data.seed, self.number, prompt.prompt_id, answer) for prompt, answer in wanted]
        responses = {}
        for index, response in responder.respond([prompt.prompt_ids for prompt, _ in wanted], seeds):
            responses[index] = response
            phase.advance(1, tokens=len(response.ids))
        return [
            {
                "iteration": self.number,
                "prompt_id": prompt.prompt_id,
                "answer": answer,
                "prompt": [{"role": turn["role"], "content": turn["content"]} for turn in prompt.row.prompt],
                "response": [{"role": "assistant", "content": decode(responses[index].ids)}],
                "prompt_ids": prompt.prompt_ids,
                "response_ids": responses[index].ids,
                "finish_reason": responses[index].finish_reason,
                "seed": seeds[index],
                "sampler_log_prob": responses[index].log_prob,
                "sampler_log_probs": responses[index].log_probs,
            }
            for index, (prompt, answer) in enumerate(wanted)
        ]

    def _score(self, rows: list[dict[str, Any]]) -> None:
        """Add log-probs of policy and reference and the critic's values to rows, in the numerics of a training step."""
        scorer, device = self.scorer, next(self.policy.model.parameters()).device
        reference = self._load_reference() if scorer.beta and self.number else None
        passes = pack_rows(rows, ["response_ids"], self.run.data.micro_batch_tokens)
        with (
            evaluating(scorer.critic) if scorer.critic is not None else nullcontext(),
            progress("scoring", len(rows), "responses") as phase,
        ):
            for indices, batch, places in passes:
                self.run.poll()
                batch = move_data_to_device(batch, device)
                log_probs, values = scorer.score(batch)
                columns = {"log_probs": log_probs, "values": values, "reference_log_probs": None}
                if scorer.beta:
                    columns["reference_log_probs"] = (
                        log_probs if reference is None else token_log_probs(reference, batch)
                    )
                for name, of_tokens in columns.items():
                    pieces = None if of_tokens is None else of_tokens.cpu().split(batch.response_lengths.tolist())
                    for index, place in zip(indices, places[:, 0].tolist(), strict=True):
                        rows[index][name] = None if pieces is None else pieces[place].tolist()
                phase.advance(len(indices), tokens=len(batch.input_ids))

    def _load_reference(self) -> nn.Module:
        reference = self.scorer.load_reference()
        if weights_hash(reference) != self._reference_hash:
            raise UserError(
                f"{self.policy.name} does not hold the weights that this run began with, which are the reference. "
                "Restore it, or use another rollouts.output_dir."
            )
        return reference

    def _judge(self, prompts: Sequence[Prompt], rows: list[dict[str, Any]]) -> None:
        """Add rewards to rows. One that was cut is judged only if it is to be."""
        cut = self.run.cut
        asked = [i for i, row in enumerate(rows) if cut == "score" or row["finish_reason"] == "stop"]
        answers = [
            make_answer(
                prompts[i], rows[i]["response_ids"], rows[i]["response"][0]["content"], rows[i]["finish_reason"]
            )
            for i in asked
        ]
        values, parts = scored_with_parts(self.run.reward, answers)
        for row in rows:
            row["reward"], row["rewards"] = (None if cut == "drop" else cut), None
        for place, index in enumerate(asked):
            rows[index]["reward"] = values[place]
            rows[index]["rewards"] = [{"name": name, "value": of[place]} for name, of in parts.items()] or None

    # --- what is trained on -----------------------------------------------------------------------------------------

    def training_set(self, store: AnswerStore) -> TrainingSet:
        """All responses that have a reward, with what each of their tokens was worth."""
        table = store.read(TRAINING_COLUMNS)
        report = {**store.manifest["statistics"], **self._held_out}
        table = table.filter(pc.is_valid(table["reward"])).combine_chunks()
        if table.num_rows:
            table, of_critic = add_advantages(table, self.scorer.advantage, self.scorer.beta)
            report |= of_critic
        metrics = {name: float(value) for name, value in report.items() if name != "answers"}
        why = "every response was cut or could not be judged (rollouts.cut): there is nothing to learn from"
        return TrainingSet(table, collate_rollouts, report, metrics, self._describe(report), why)

    def _describe(self, report: Mapping[str, float]) -> str:
        reward = f"reward {report['reward/mean']:.3f}" if "reward/mean" in report else "no response could be judged"
        parts = [f"iteration {self.number}: {reward}"]
        if "kl/reference" in report:
            parts.append(f"{report['kl/reference']:.2f} nats from the reference")
        parts.append(f"{report['completions/mean_length']:.1f} tokens a response")
        for name, words in {
            "completions/cut": "cut",
            "groups/flat": "of the prompts with equal rewards",
            "reward/none": "without a reward",
        }.items():
            if report.get(name):
                parts.append(f"{report[name]:.0%} {words}")
        if "val/reward" in report:
            parts.append(f"held-out reward {report['val/reward']:.3f}")
        elif "val/cut" in report:
            parts.append(f"no held-out response could be judged ({report['val/cut']:.0%} cut)")
        return ", ".join(parts)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write a summary, and where it is due export the policy. The critic lies beside it."""
        every = self.run.export_every
        if every and (self.number + 1) % every == 0:
            need_space(self.folder, exported_bytes(self.policy.model), f"the policy of iteration {self.number}")
            self.export(self.folder, summary)
        else:
            write_json(self.folder / "summary.json", summary)

    def export(self, folder: Any, summary: Mapping[str, Any]) -> None:
        """Export the policy, and its critic beside it, into a folder."""
        if self.scorer.critic is not None:
            weights = self.scorer.critic.named_parameters()  # tied ones once
            tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights if weight.requires_grad}
            with replacing(folder / "critic.safetensors") as temporary:
                save_file(tensors, temporary)
        policy, encoder = self.policy, self.run.data.encoder
        export_policy(policy.model, encoder, folder, self.card(summary), summary, policy.trust_remote_code)

    def card(self, summary: Mapping[str, Any]) -> str:
        title = f"Policy after {summary.get('iteration', -1) + 1} iterations of PPO"
        return plain_card("ppo", title, summary, origin_of(self.policy.name, self.run.data))


def add_advantages(table: pa.Table, advantage: Advantage, beta: float) -> tuple[pa.Table, dict[str, float]]:
    """A table of rewarded responses with the columns ``advantages`` and ``returns``; and how well the critic foresaw.

    A pure function of the table, in double precision.
    """
    log_probs, reference, values = (flat(table, name) for name in ("log_probs", "reference_log_probs", "values"))
    assert log_probs is not None
    made = advantage.estimate(
        Trajectories(
            torch.tensor(table["reward"].to_pylist(), dtype=torch.float64),
            torch.tensor(table["prompt_id"].to_pylist()),
            torch.tensor(pc.list_value_length(table["response_ids"]).to_pylist()),
            torch.zeros_like(log_probs) if reference is None else log_probs - reference,
            beta,
            values,
        )
    )
    offsets = [0, *torch.tensor(pc.list_value_length(table["log_probs"]).to_pylist()).cumsum(0).tolist()]

    def as_lists(of_tokens: Tensor | None) -> pa.Array:
        if of_tokens is None:
            return pa.nulls(table.num_rows, pa.list_(pa.float64()))
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(of_tokens.numpy()))

    table = table.append_column("advantages", as_lists(made.advantages))
    table = table.append_column("returns", as_lists(made.returns))
    is_judged = made.returns is not None and values is not None
    return table, describe_critic(values, made.returns) if is_judged else {}  # type: ignore[arg-type]


def prompts_of_iteration(count: int, seed: int, iteration: int, size: int) -> list[int]:
    """Which of ``count`` prompts an iteration has: its part of an endless sequence of permutations of them all.

    Example:
        >>> sorted(prompts_of_iteration(6, 0, 0, 4) + prompts_of_iteration(6, 0, 1, 4)[:2])
        [0, 1, 2, 3, 4, 5]
    """
    places = range(iteration * size, (iteration + 1) * size)
    return [_permutation(count, seed, place // count)[place % count] for place in places]


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, which: int) -> list[int]:
    return random.Random(f"rollouts/{seed}/{which}").sample(range(count), count)


@contextmanager
def greedy(generator: ResponseGenerator) -> Iterator[None]:
    """The generator takes the most likely token while this lasts."""
    temperature, generator.temperature = generator.temperature, 0.0
    try:
        yield
    finally:
        generator.temperature = temperature


def refuse_sums_alone(generator: ResponseGenerator) -> NoReturn:
    """Say that tokens cannot be weighed by what a generator says of whole responses.

    Raises:
        UserError: Always.
    """
    raise UserError(
        f"model.sampler_cap needs the sampler's log-prob of each token, and {type(generator).__name__} gives their sum "
        "alone. Take ContinuousGenerator or TransformersGenerator, or leave sampler_cap out."
    )


def describe_held_out(store: AnswerStore) -> dict[str, float]:
    """What is logged of held-out responses: their rewards, their length and how many were cut."""
    statistics: dict[str, float] = store.manifest["statistics"]
    rewards = {name: value for name, value in statistics.items() if name.startswith("reward/")}
    named = {
        "val/reward": rewards.pop("reward/mean", None),
        **{f"val/{name}": value for name, value in rewards.items() if name not in _OF_TRAINING},
        "val/mean_length": statistics["completions/mean_length"],
        "val/cut": statistics["completions/cut"],
    }
    return {name: value for name, value in named.items() if value is not None}


_OF_TRAINING = ("reward/std", "reward/none", "reward/length_correlation")


def _shard_name(start: int) -> str:
    return f"answers-{start:09d}.parquet"
