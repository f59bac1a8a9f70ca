"""Reinforcement learning as a Lightning module: a policy, perhaps a critic, and the clipped ratio loss.

What a token was worth is in ``advantages``, the losses in ``ppo_loss``, the clock in ``rollouts``, and what is done in
an iteration in ``rollout_iteration``. Rewards, templates and sampling are not known here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spin_lightning.advantages import Advantage, Gae, sum_by_response
from spin_lightning.models.forward_paths import rounding_of, token_log_probs
from spin_lightning.models.loading import ModelOrName, check_model, disable_dropout, load_policy
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.models.modes import evaluating
from spin_lightning.ppo_loss import clipped_ratio_losses, is_clipped, k3, value_losses
from spin_lightning.runs import processes
from spin_lightning.runs.lightning_internals import trainer_of
from spin_lightning.stages.critic import Critic
from spin_lightning.stages.gate import check_start
from spin_lightning.stages.iteration import Run
from spin_lightning.stages.iterative import IterativeModule
from spin_lightning.stages.rollout_iteration import PpoIteration, RolloutRun, Scorer, refuse_sums_alone
from spin_lightning.stages.stage import Stage, played_enough
from spin_lightning.types import ResponseBatch, RolloutBatch, UserError

#: How far a critic's values may be from the stored ones at an iteration's first step, as a share of their size.
VALUE_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2, torch.float16: 0.2, torch.bfloat16: 0.3}


class PpoLightningModule(IterativeModule):
    """Trains a policy on rewards of its own responses (PPO, RLOO, GRPO, best of n).

    Maximises ``E[R - beta log(pi / pi_ref)]``, whose best policy is ``pi_ref exp(R / beta) / Z``; ``pi_ref`` is the
    model that the run starts from. The divergence is a part of the reward, and gamma is 1. Takes every setting of
    ``PolicyModule`` too.

    Args:
        model_name_or_path: The model to start from, mostly one that ``sft`` trained: a hub name, a Hugging Face folder
            or a ``.gguf`` file. In Python also a model of ``transformers``, which is then trained in place.
        beta: What a nat of divergence from the reference costs. 0 loads no reference, and may collapse.
        advantage: What a token was worth, as a class path with its settings: ``Gae`` with a critic; ``LeaveOneOut``
            (RLOO), ``GroupNormalized`` (GRPO) or ``BestOfGroup`` by the other responses to the prompt.
        learning_rate: Peak of the schedule, which spans the run.
        lr_schedule: Shape of the decay after the warm-up, over the whole run.
        warmup_ratio: Share of the run's steps that warm up.
        clip: A token's ratio has no further gradient beyond ``1 - clip`` and ``1 + clip``.
        value_coef: Weight of the critic's loss.
        value_clip: The critic's loss counts a move beyond this from its old value as if it had not gone there. In units
            of the reward. None: not at all.
        value_scale: What the critic's head is multiplied by, so that it learns so many times as fast.
        critic: Folder of a model with the policy's tokens that becomes a critic of its own, such as a reward model.
            None: a head on the policy's hidden states.
        critic_learning_rate: Of a critic of its own.
        critic_warmup: In so many iterations only the critic learns.
        average: ``token`` divides an update's losses by its response tokens, ``response`` by its responses.
        sampler_cap: Weigh each token by the policy's probability over the sampler's, at most this (truncated importance
            sampling), for a generator that computes otherwise. It has to give the log-prob of each token, and not
            their sum alone as servers and vLLM do here. None: 1.

    Raises:
        UserError: A setting is outside its range.

    Example:
        >>> from spin_lightning import LeaveOneOut
        >>> module = PpoLightningModule("HuggingFaceTB/SmolLM2-135M-Instruct", advantage=LeaveOneOut())
    """

    needs_real = False

    def __init__(
        self,
        model_name_or_path: ModelOrName,
        beta: float = 0.05,
        advantage: Advantage | None = None,
        learning_rate: float = 1e-6,
        lr_schedule: Literal["linear", "cosine", "constant"] = "constant",
        warmup_ratio: float = 0.0,
        clip: float = 0.2,
        value_coef: float = 0.1,
        value_clip: float | None = None,
        value_scale: float = 100.0,
        critic: str | None = None,
        critic_learning_rate: float = 1e-5,
        critic_warmup: int = 0,
        average: Literal["token", "response"] = "token",
        sampler_cap: float | None = None,
        **policy: Any,
    ) -> None:
        super().__init__(
            model_name_or_path,
            learning_rate=learning_rate,
            lr_schedule=lr_schedule,
            warmup_ratio=warmup_ratio,
            **policy,
        )
        if isinstance(learning_rate, list):
            raise UserError(
                "model.learning_rate must be one number: its schedule spans the run. See model.lr_schedule."
            )
        if not 0 <= beta < math.inf:
            raise UserError(f"model.beta must be 0 or positive, got {beta!r}. 0.05 keeps a policy near its reference.")
        if advantage is not None and not isinstance(advantage, Advantage):
            raise UserError(
                f"model.advantage must be an Advantage, got {advantage!r}. Such as Gae, LeaveOneOut, GroupNormalized "
                "or BestOfGroup."
            )
        if not 0 < clip < 1:
            raise UserError(f"model.clip must be between 0 and 1, got {clip!r}. 0.2 is what everybody takes.")
        for name, value in (
            ("value_scale", value_scale),
            ("critic_learning_rate", critic_learning_rate),
            ("value_clip", value_clip),
            ("sampler_cap", sampler_cap),
        ):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"model.{name} must be positive, got {value!r}.")
        if not value_coef >= 0 or critic_warmup < 0:
            raise UserError(
                f"model.value_coef and critic_warmup must be 0 or more, got {value_coef!r} and {critic_warmup!r}."
            )
        if average not in ("token", "response"):
            raise UserError(f"model.average must be token or response, got {average!r}.")
        self.beta = beta
        self.advantage = advantage if advantage is not None else Gae()
        if (critic is not None or critic_warmup) and not self.advantage.needs_values:
            raise UserError(
                "model.critic and critic_warmup are for an advantage with a critic, and "
                f"{type(self.advantage).__name__} has none. Leave them out, or take Gae."
            )
        if critic is not None:
            check_model(critic, self.attn_implementation, self.trust_remote_code, needs_head=False)
        self.clip = clip
        self.value_coef = value_coef
        self.value_clip = value_clip
        self.value_scale = value_scale
        self.critic = critic
        self.critic_learning_rate = critic_learning_rate
        self.critic_warmup = critic_warmup
        self.average = average
        self.sampler_cap = sampler_cap
        self.critic_model: Critic | None = None
        self._reference: list[Any] = []  # not a part of this module: checkpoints do not hold it
        self._gate_is_due = False
        self._held_out_nll: Tensor | None = None

    # --- what is trained --------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        self._refuse_no_clock()
        is_first = not hasattr(self, "policy")
        super().configure_model()
        if not is_first or not self.advantage.needs_values:
            return
        model = self.policy if self.critic is None else self._load_critic()
        width = model.get_output_embeddings().weight.shape[-1]  # type: ignore[operator, union-attr]
        self.critic_model = Critic(width, self.value_scale, None if model is self.policy else model)

    def _load_critic(self) -> Any:
        assert self.critic is not None
        model = load_policy(
            self.critic,
            trust_remote_code=self.trust_remote_code,
            attn_implementation=self.attn_implementation,
            dtype=torch.get_default_dtype(),
            needs_head=False,
        )
        rows = [len(part.get_input_embeddings().weight) for part in (model, self.policy)]  # type: ignore[arg-type]
        if rows[0] < rows[1]:
            raise UserError(
                f"model.critic {self.critic!r} knows {rows[0]} tokens, and the policy {rows[1]}: it reads the policy's "
                "ids, so it must have the same tokenizer."
            )
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not self.dropout:
            disable_dropout(model)
        return model.train()

    def shard(self) -> None:
        raise UserError("ppo does not shard weights. Set trainer.strategy: ddp, or auto with trainer.devices: 1.")

    @property
    def weights_by_rate(self) -> list[tuple[list[Tensor], float]]:
        groups = super().weights_by_rate
        if self.critic_model is not None:
            groups[0][0].append(self.critic_model.head)
            if self.critic_model.trunk is not None:
                trained: list[Tensor] = [
                    weight for weight in self.critic_model.trunk.parameters() if weight.requires_grad
                ]
                groups.append((trained, self.critic_learning_rate))
        return groups

    @property
    def steps_per_iteration(self) -> float:
        """Updates of the whole run: one schedule spans it."""
        clock: Any = self.trainer.datamodule.game  # type: ignore[attr-defined]
        return float(clock.count_updates(self.trainer))

    # --- what an iteration asks -------------------------------------------------------------------------------------

    def make_iteration(self, number: int, run: Run) -> PpoIteration:
        assert isinstance(run, RolloutRun)
        scorer = Scorer(self.advantage, self.beta, self.evaluate, self.critic_model, self._load_reference)
        return PpoIteration(number, run, self.policy_view, scorer)

    @property
    def needs_start(self) -> bool:
        return self.beta > 0

    def _load_reference(self) -> nn.Module:
        """The model that the run started from. It is loaded once, and stays."""
        if not self._reference:
            self._reference.append(self.policy_view.load(None).eval().requires_grad_(False))
        reference: nn.Module = self._reference[0]
        return reference

    def start_iteration(self, iteration: int, epochs: int, *, is_fresh: bool) -> None:
        super().start_iteration(iteration, epochs, is_fresh=is_fresh)
        self._gate_is_due = is_fresh
        self._held_out_nll = None

    def on_validation_end(self) -> None:
        super().on_validation_end()
        self._held_out_nll = self.trainer.callback_metrics.get("val/nll")

    def describe_iteration(self, iteration: int) -> dict[str, Any]:
        nll = self._held_out_nll  # of this iteration: not each has one
        return {"beta": self.beta, "val_nll": None if nll is None else float(nll)}

    def _refuse_no_clock(self) -> None:
        trainer = trainer_of(self)
        if trainer is not None and trainer.state.fn == "fit" and getattr(trainer.datamodule, "game", None) is None:
            raise UserError(
                "PpoLightningModule needs the Rollouts callback, which makes the responses, and a SyntheticDataModule. "
                "Use Trainer(callbacks=[Rollouts(...), ...]).fit(module, SyntheticDataModule(...))."
            )

    # --- and a training step ----------------------------------------------------------------------------------------

    def evaluate(self, batch: ResponseBatch) -> tuple[Tensor, Tensor | None]:
        """The policy's log-prob of each response token, and what the critic expects before it, both ``(N,)``."""
        if self.critic_model is None:
            return token_log_probs(self.policy, batch), None
        log_probs, values = self.critic_model(self.policy, batch, not self._only_critic_learns)
        return log_probs, values

    @property
    def _only_critic_learns(self) -> bool:
        return self.iteration < self.critic_warmup

    def training_step(self, batch: list[RolloutBatch], batch_idx: int) -> Tensor:
        """The clipped ratio loss of one batch, and the critic's: its share of the mean over the update."""
        by_token = self.average == "token"
        count = sum(part.num_tokens if by_token else part.num_responses for part in batch)
        seen: list[Tensor] = []

        def sum_of(part: RolloutBatch) -> Tensor:
            log_probs, values = self.evaluate(part.responses)
            if self._gate_is_due:
                self._check_gate(part, log_probs, values)
                self._gate_is_due = False
            now = log_probs[part.tokens]
            losses = clipped_ratio_losses(now, part.log_probs, part.advantages, self.clip)
            if self.sampler_cap is not None:
                losses = losses * self._sampler_weights(part)
            policy_loss = losses.sum()
            value_loss = policy_loss.new_zeros(())
            if values is not None and part.returns is not None and part.values is not None:
                own = values[part.tokens]
                value_loss = value_losses(own, part.returns, part.values, self.value_clip).sum()
            seen.append(self._describe_part(part, now, policy_loss, value_loss))
            return policy_loss + self.value_coef * value_loss

        loss = self.mean_of_update(sum_of, batch, count)
        self._gate_is_due = False  # of a process that had no pass, too
        sums = torch.stack(seen).sum(0) if seen else torch.zeros(5)
        tokens, clipped, step, policy_loss, value_loss = processes.add_up(sums).tolist()
        found = {"ratio/clipped": clipped / tokens, "kl/step": step / tokens, "loss/policy": policy_loss / count}
        if self.critic_model is not None:
            found["loss/value"] = value_loss / count
        self.log_dict(found, batch_size=max(1, sum(map(len, batch))))
        return loss

    @torch.no_grad()
    def _describe_part(self, part: RolloutBatch, now: Tensor, policy_loss: Tensor, value_loss: Tensor) -> Tensor:
        """What is logged of a pass, as sums over its tokens."""
        clipped = is_clipped(now, part.log_probs, part.advantages, self.clip).sum()
        moved = k3(part.log_probs - now).sum()
        return torch.stack(
            [now.new_tensor(len(now)), clipped.to(now), moved, policy_loss.detach(), value_loss.detach()]
        )

    def _sampler_weights(self, part: RolloutBatch) -> Tensor:
        if part.sampler_log_probs is None:
            refuse_sums_alone(self.trainer.datamodule.generator)  # type: ignore[attr-defined]
        assert self.sampler_cap is not None and part.sampler_log_probs is not None
        return (part.log_probs - part.sampler_log_probs).exp().clamp_max(self.sampler_cap)

    def _check_gate(self, part: RolloutBatch, log_probs: Tensor, values: Tensor | None) -> None:
        """Compare policy and critic with what they said when the responses were made."""

        def recompute(is_evaluating: bool) -> Tensor:
            with evaluating(self.policy) if is_evaluating else ExitStack():
                return response_log_probs(self.policy, part.responses)[owner]

        first = part.lengths.cumsum(0) - part.lengths
        owner = part.responses.response_index[part.tokens[first]]
        check_start(
            sum_by_response(part.log_probs, part.lengths),
            sum_by_response(log_probs.detach()[part.tokens].to(part.log_probs), part.lengths),
            part.lengths,
            dtype=self.compute_dtype,
            iteration=self.iteration,
            recompute=recompute,
            rounding=partial(rounding_of, self.plain_policy, part.responses),
        )
        if values is None or part.values is None:
            return
        moved, size = (values.detach()[part.tokens] - part.values).abs().mean(), part.values.abs().mean()
        if not moved <= VALUE_TOLERANCE[self.compute_dtype] * (size + 1e-3):
            raise UserError(
                f"iteration {self.iteration} does not start where it should: the critic's values are "
                f"{float(moved):.3g} from those that were stored (their size is {float(size):.3g}), on average. Likely "
                "cause: dropout in the critic, or responses of another critic. Remove this iteration's folder, and run "
                "the same command again."
            )


def _count_epochs(iterations: int, epochs: int) -> int:
    return iterations * epochs


def _count_epochs_between(eval_every: int, iterations: int, epochs: int) -> int:
    return (eval_every or iterations) * epochs


def _is_over(result: dict[str, Any], settings: Any) -> bool:
    return played_enough(result, settings.rollouts.iterations)


def _check(module: PpoLightningModule, callbacks: Mapping[str, Any]) -> None:
    module.check_schedules(callbacks["rollouts"].iterations)


#: ``spin-lightning ppo``.
STAGE = Stage(
    module="spin_lightning.stages.ppo.PpoLightningModule",
    data="spin_lightning.generation.synthetic_data.SyntheticDataModule",
    callbacks={
        "rollouts": "spin_lightning.stages.rollouts.Rollouts",
        "health": "spin_lightning.stages.health.Health",
    },
    folder="rollouts",
    over_file="rollouts.json",
    mark="rollouts.",
    defaults={
        "checkpoint.every_n_iterations": 10,
        "data.answers_per_prompt": 4,
        "data.batch_size": 64,
        "data.generator": {"class_path": "spin_lightning.ContinuousGenerator"},
        "data.history": 0,
        "data.keep_prompts_together": True,
        "model.advantage": {"class_path": "spin_lightning.Gae"},
        "trainer.gradient_clip_val": 1.0,
    },
    links={
        "trainer.max_epochs": (("rollouts.iterations", "rollouts.epochs"), _count_epochs),
        "trainer.check_val_every_n_epoch": (
            ("rollouts.eval_every", "rollouts.iterations", "rollouts.epochs"),
            _count_epochs_between,
        ),
    },
    is_over=_is_over,
    check=_check,
)
