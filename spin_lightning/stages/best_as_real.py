"""A target that rises with the policy: the best of several responses takes the place of a real one that is worth less.

What was sampled and what the reward said of it is kept in the run's folder, ``iteration_N/candidates``, before anything
is made of it: after a kill nothing but the shard in progress is sampled again, and no judge is asked twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import pyarrow as pa
import torch

from spin_lightning.generation.base import Player, opened, seed_of
from spin_lightning.generation.responding import Responder
from spin_lightning.models.modes import evaluating
from spin_lightning.models.saving import weights_hash
from spin_lightning.progress import progress
from spin_lightning.rewards.base import Reward, check_reward, make_answer, scored, settings_kept
from spin_lightning.runs import processes
from spin_lightning.runs.shards import ShardStore, refuse_other_binding
from spin_lightning.stages.clock import end_if_asked
from spin_lightning.stages.iteration import iteration_folder
from spin_lightning.terminal import say
from spin_lightning.types import Prompt, UserError


class CandidateStore(ShardStore):
    """Responses that may take the place of real ones, and what each of them and the real one is worth."""

    schema = pa.schema(
        [
            ("prompt_id", pa.int64()),
            ("candidates", pa.list_(pa.list_(pa.int32()))),
            ("texts", pa.list_(pa.string())),
            ("finish_reasons", pa.list_(pa.string())),
            ("rewards", pa.list_(pa.float64())),  # null: cannot be judged
            ("real_reward", pa.float64()),
            ("best", pa.int32()),  # which of them becomes the real response; -1: none
        ]
    )
    rows_are = "candidates"


class BestAsReal(L.Callback):
    """Before each iteration the policy answers every prompt several times, and its best response becomes the real one.

    That is, if a reward values it more than the real response that the data have; of equals the data's own stays. A
    response that was cut never takes its place. Each iteration begins from the data's responses again.

    Args:
        reward: What a response is worth.
        responses: How many the policy gives to each prompt.
        first_iteration: The first one with other real responses.

    Raises:
        UserError: A setting is outside its range.

    Example:
        >>> from spin_lightning import NumberMatch
        >>> BestAsReal(NumberMatch(), responses=8).responses
        8
    """

    settings_section = "best_as_real"

    def __init__(self, reward: Reward, responses: int = 4, first_iteration: int = 0) -> None:
        if not isinstance(reward, Reward):
            raise UserError(f"BestAsReal.reward must be a Reward, got {reward!r}. Such as NumberMatch.")
        if responses < 1 or first_iteration < 0:
            raise UserError(
                f"BestAsReal.responses must be at least 1 and first_iteration at least 0, got {responses!r} and "
                f"{first_iteration!r}."
            )
        self.reward, self.responses, self.first_iteration = reward, responses, first_iteration

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_reward(self.reward)

    def on_iteration_start(self, trainer: L.Trainer, module: Any, iteration: int) -> None:
        """Make the candidates of an iteration, or find them, and serve the best ones."""
        if iteration < self.first_iteration:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        view = module.policy_view
        weights = weights_hash(view.model)
        processes.refuse_different(weights, f"the weights at the start of iteration {iteration}")
        store = CandidateStore(
            self._folder(trainer, iteration), {"policy_sha256": weights, **self._depends_on(trainer, iteration)}
        )
        if not store.is_complete:
            self._fill(store, view, trainer, iteration)
        self._serve(store, data, trainer, iteration)

    def on_iteration_resumed(self, trainer: L.Trainer, module: Any, iteration: int) -> None:
        """Serve what the iteration began with.

        Raises:
            UserError: What is in the folder was not made from these rows and settings.
        """
        if iteration >= self.first_iteration:
            store = CandidateStore(self._folder(trainer, iteration))
            depends_on = self._depends_on(trainer, iteration)
            refuse_other_binding(store, depends_on, depends_on.keys())
            self._serve(store, trainer.datamodule, trainer, iteration)  # type: ignore[attr-defined]

    def _folder(self, trainer: Any, iteration: int) -> Any:
        return iteration_folder(trainer.datamodule.game.output_dir, iteration) / "candidates"

    def _depends_on(self, trainer: Any, iteration: int) -> dict[str, Any]:
        """What the candidates depend on beside the policy."""
        data = trainer.datamodule
        return {
            "iteration": iteration,
            "prompts_sha256": data.prompts_hash,
            "encoding_sha256": data.encoder.fingerprint,
            "sampling": data.generator.sampling,
            "responses": self.responses,
            "first_response": data.answers_per_prompt,
            "seed": data.seed,
            "shard_size": data.game.shard_size,
            "reward": settings_kept(self.reward),
        }

    def _fill(self, store: CandidateStore, view: Any, trainer: Any, iteration: int) -> None:
        data = trainer.datamodule
        starts = range(0, len(data.prompts), data.game.shard_size)
        names = [f"candidates-{start:09d}.parquet" for start in starts]
        own = [(name, start) for name, start in processes.deal(list(zip(names, starts, strict=True)))]
        missing = [(name, start) for name, start in own if not store.has_shard(name)]
        exported = iteration_folder(data.game.output_dir, iteration - 1) / "policy"
        folder = exported if iteration and exported.is_dir() else None
        if data.generator.needs_folder and folder is None:
            raise UserError(
                f"{type(data.generator).__name__} reads its model from a folder, and iteration {iteration} has none "
                "yet. Set first_iteration of BestAsReal to 1, or export adapters merged."
            )
        say(
            f"iteration {iteration}: the policy gives {self.responses} responses to each of {len(data.prompts)} prompts"
        )
        responder = Responder(data.generator, data.encoder, view.model, partial(end_if_asked, trainer))
        size = sum(len(data.prompts[start : start + data.game.shard_size]) for _, start in missing) * self.responses
        try:
            with (
                torch.no_grad(),
                view.numerics(),
                evaluating(view.model),
                opened(data.generator, Player(view.model, folder))
                if processes.largest(bool(missing))
                else nullcontext(),
                progress("answering", size, "responses") as phase,
            ):
                for name, start in missing:
                    prompts = data.prompts[start : start + data.game.shard_size]
                    store.write_shard(name, self._make_rows(prompts, responder, data, iteration, phase))
        finally:
            self.reward.close()
        store.gather()
        store.finish(names)

    def _make_rows(
        self, prompts: list[Prompt], responder: Responder, data: Any, iteration: int, phase: Any
    ) -> list[dict[str, Any]]:
        # numbered on from those that will be paired with the real ones: no response is both
        numbers = range(data.answers_per_prompt, data.answers_per_prompt + self.responses)
        wanted = [(prompt, number) for prompt in prompts for number in numbers]
        seeds = [seed_of(data.seed, iteration, prompt.prompt_id, number) for prompt, number in wanted]
        found = {}
        for index, response in responder.respond([prompt.prompt_ids for prompt, _ in wanted], seeds):
            found[index] = response
            phase.advance(1, tokens=len(response.ids))
        responses = [found[index] for index in range(len(wanted))]
        texts = [data.encoder.decode(response.ids) for response in responses]
        answers = [
            make_answer(prompt, response.ids, text, response.finish_reason)
            for (prompt, _), response, text in zip(wanted, responses, texts, strict=True)
        ]
        real = [make_answer(prompt, None, prompt.row.real, prompt.real_finish_reason) for prompt in prompts]
        rewards = scored(self.reward, [*answers, *real])
        rows = []
        for place, prompt in enumerate(prompts):
            part = slice(place * self.responses, (place + 1) * self.responses)
            own, real_reward = rewards[part], rewards[len(answers) + place]
            reasons = [response.finish_reason for response in responses[part]]
            row = {
                "prompt_id": prompt.prompt_id,
                "candidates": [response.ids for response in responses[part]],
                "texts": texts[part],
                "finish_reasons": reasons,
                "rewards": own,
                "real_reward": real_reward,
                "best": _find_best(own, reasons, real_reward),
            }
            rows.append(row)
        return rows

    def _serve(self, store: CandidateStore, data: Any, trainer: Any, iteration: int) -> None:
        rows = {row["prompt_id"]: row for row in store.read().to_pylist()}
        prompts = [_with_best(prompt, rows[prompt.prompt_id]) for prompt in data.prompts]
        replaced = sum(rows[prompt.prompt_id]["best"] >= 0 for prompt in prompts)
        before, after = [], []
        for prompt in prompts:
            row = rows[prompt.prompt_id]
            if row["real_reward"] is not None:
                before.append(row["real_reward"])
                after.append(row["real_reward"] if row["best"] < 0 else row["rewards"][row["best"]])
        data.replace_real(prompts)
        means = [sum(values) / len(values) for values in (before, after)] if before else [float("nan")] * 2
        say(
            f"iteration {iteration}: {replaced} of {len(prompts)} real responses are replaced by better ones; mean "
            f"reward {means[0]:.4g} -> {means[1]:.4g}"
        )
        metrics = {"real/replaced": replaced / len(prompts), "real/reward": means[1]}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


def _find_best(rewards: list[float | None], reasons: Sequence[str], real_reward: float | None) -> int:
    """Which of some responses becomes the real one: the first with the highest reward, if that is above the real one's.

    Example:
        >>> _find_best([0.0, 1.0, 1.0], ["stop"] * 3, 0.5), _find_best([0.0, 1.0], ["stop", "length"], 0.0)
        (1, -1)
    """
    if real_reward is None:
        return -1
    best, most = -1, real_reward
    for number, (reward, reason) in enumerate(zip(rewards, reasons, strict=True)):
        if reward is not None and reason == "stop" and reward > most:
            best, most = number, reward
    return best


def _with_best(prompt: Prompt, row: dict[str, Any]) -> Prompt:
    """A prompt with the best of its candidates as its real response, if there is a better one."""
    best = row["best"]
    if best < 0:
        return prompt
    changed = replace(prompt.row, real=row["texts"][best], real_extras={}, real_finish_reason="stop")
    return replace(prompt, row=changed, real_ids=row["candidates"][best], real_finish_reason="stop")
