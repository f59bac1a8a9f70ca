"""The clock of PPO: some prompts an iteration, their responses made, scored, rewarded and stored before it trains."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L

from spin_lightning.rewards.base import Reward, check_reward, refuse_without_real
from spin_lightning.runs import processes
from spin_lightning.runs.files import write_json
from spin_lightning.stages.clock import IterationClock
from spin_lightning.stages.export import name_models
from spin_lightning.stages.rollout_iteration import RolloutRun, refuse_sums_alone
from spin_lightning.terminal import say
from spin_lightning.types import UserError


class Rollouts(IterationClock):
    """Plays the iterations of PPO: prompts, responses, rewards, training, and again.

    One optimiser and one schedule span the run. Its responses are kept, so that after a kill the iterations since the
    last checkpoint are trained again without a generator or a reward.

    Args:
        output_dir: Folder of the run. Everything it makes is in it, under relative names.
        reward: What responses are worth, which must be given: ``NumberMatch``, ``TextMatch``, ``FunctionReward``,
            ``ModelReward``, ``JudgeReward``, or the path of a class of yours, with its settings.
        iterations: How many there are.
        prompts: Prompts of an iteration; each gets ``data.answers_per_prompt`` responses.
        epochs: Passes over the responses of an iteration.
        cut: What a response is worth that was cut at ``max_new_tokens``: what the reward says of it (``score``), a
            number, or nothing, so that it is left out (``drop``).
        eval_every: Every so many iterations, and at both ends of the run, the most likely responses to the held-out
            prompts are rewarded. 0: never.
        export_every: Every so many iterations the policy is exported. 0: only at the end.
        shard_size: Prompts in one shard of responses: the most that is made again after a kill.

    Raises:
        UserError: A setting is outside its range.

    Example:
        >>> from spin_lightning import NumberMatch
        >>> rollouts = Rollouts("runs/grpo", reward=NumberMatch(), iterations=200, prompts=32, epochs=2)
        >>> rollouts.total_epochs
        400
    """

    settings_section = "rollouts"
    over_file = "rollouts.json"
    plays_with = "a PpoLightningModule"
    schedule_spans_run = True
    validates_each_iteration = False

    def __init__(
        self,
        output_dir: str = "runs/ppo",
        reward: Reward | None = None,
        iterations: int = 100,
        prompts: int = 64,
        epochs: int = 1,
        cut: float | Literal["score", "drop"] = "score",
        eval_every: int = 10,
        export_every: int = 0,
        shard_size: int = 64,
    ) -> None:
        super().__init__(output_dir, iterations, epochs, reset_optimizer=False, shard_size=shard_size)
        if reward is None:
            raise UserError(
                "rollouts.reward is missing: what responses are worth. Such as NumberMatch, or FunctionReward with a "
                "function of yours."
            )
        if not isinstance(reward, Reward):
            raise UserError(f"rollouts.reward must be a Reward, got {reward!r}. Such as NumberMatch.")
        if prompts < 1:
            raise UserError(f"rollouts.prompts must be at least 1, got {prompts!r}.")
        if eval_every < 0 or export_every < 0:
            raise UserError(
                f"rollouts.eval_every and export_every must be 0 or more, got {eval_every!r} and {export_every!r}."
            )
        is_number = isinstance(cut, int | float) and not isinstance(cut, bool) and math.isfinite(cut)
        if cut not in ("score", "drop") and not is_number:
            raise UserError(f"rollouts.cut must be score, drop or a number, got {cut!r}.")
        self.reward = reward
        self.prompts = prompts
        self.cut = cut
        self.eval_every = eval_every
        self.export_every = export_every
        self._held_out: dict[str, float] = {}  # of the last policy

    def shorten(self, data: Any, batches: int) -> None:
        super().shorten(data, batches)
        self.prompts = min(self.prompts, len(data.prompts))

    def refuse_unplayable(self, trainer: Any, module: Any) -> None:
        super().refuse_unplayable(trainer, module)
        data, advantage = trainer.datamodule, getattr(module, "advantage", None)
        if advantage is None:
            raise UserError(f"Rollouts plays with a PpoLightningModule, got {type(module).__name__}.")
        sampling = data.generator.sampling
        if (sampling["temperature"], sampling["top_p"]) != (1, 1):
            raise UserError(
                "PPO learns from responses of the policy as it is, so data.generator must have temperature 1 and top_p "
                f"1, got {sampling['temperature']!r} and {sampling['top_p']!r}. Otherwise no ratio is right."
            )
        if module.sampler_cap is not None and not data.generator.gives_token_log_probs:
            refuse_sums_alone(data.generator)
        if advantage.needs_group and data.answers_per_prompt < 2:
            raise UserError(
                f"{type(advantage).__name__} compares the responses to one prompt, so data.answers_per_prompt must be "
                f"at least 2, got {data.answers_per_prompt}. Take 4 or more, or Gae with its critic."
            )
        check_reward(self.reward)
        refuse_without_real(self.reward, data.prompts)
        if self.cut == "score" and not self.reward.judges_cut:
            raise UserError(
                f"{self.reward.name} never saw a response without an end, so it cannot score one that was cut. Set "
                "rollouts.cut to drop, or to a number."
            )
        data.keep_prompts_together = True  # so that a batch has whole groups

    def count_updates(self, trainer: Any) -> int:
        """Updates of the whole run, if no response is left out."""
        data = trainer.datamodule
        batches = math.ceil(self.prompts * data.answers_per_prompt / data.batch_size)
        return math.ceil(batches / trainer.accumulate_grad_batches) * self.total_epochs

    def make_run(self) -> RolloutRun:
        return RolloutRun(
            **vars(super().make_run()),
            reward=self.reward,
            prompts=self.prompts,
            cut=self.cut,
            eval_every=self.eval_every,
            export_every=self.export_every,
        )

    def finish(self, summaries: list[dict[str, Any]]) -> None:
        """Export the last policy into the run's folder, and say what its held-out responses are worth."""
        number = len(summaries)
        iteration: Any = self._make_iteration(number)
        held_out = {}
        if self.eval_every and self.trainer.datamodule.val_prompts:
            # Lightning has moved it to the CPU, as it does where a fit ends
            self.trainer.lightning_module.to(self.trainer.strategy.root_device)
            held_out = iteration.evaluate()
            for logger in self.trainer.loggers:
                logger.log_metrics({**held_out, "iteration": float(number)}, step=self.trainer.global_step)
            start = summaries[0]["pairs"].get("val/reward") if summaries else None
            say(
                _describe_unjudged(held_out["val/cut"], len(self.trainer.datamodule.val_prompts))
                if "val/reward" not in held_out
                else f"held-out reward {held_out['val/reward']:.3f}"
                + ("" if start is None else f", {start:.3f} at the start")
            )
        if processes.is_first():
            last = {**summaries[-1], **held_out} if summaries else held_out
            iteration.export(self.output_dir, last)
        processes.wait()
        self._held_out = held_out

    def write_over(self, reason: str, iterations: list[dict[str, Any]]) -> None:
        result = {"ended_because": reason, "iterations": iterations, "held_out": self._held_out}
        write_json(self.output_dir / self.over_file, result)

    def say_over(self, reason: str) -> None:
        say(f"{self.run_is} is over: {reason}. The model is in {name_models(self.output_dir)}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.reward.close()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.reward.close()
        super().on_exception(trainer, pl_module, exception)


def _describe_unjudged(share_cut: float, count: int) -> str:
    """What to say of held-out responses none of which has a reward.

    Example:
        >>> _describe_unjudged(1.0, 8)
        'no held-out response could be judged (8 of 8 cut; raise data.generator.max_new_tokens)'
    """
    advice = "; raise data.generator.max_new_tokens" if share_cut else ""
    return f"no held-out response could be judged ({share_cut * count:.0f} of {count} cut{advice})"
