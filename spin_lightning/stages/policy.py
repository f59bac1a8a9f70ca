"""What every stage trains: a causal language model with its optimiser, its schedule and its held-out NLL.

Stages differ in their training step, and in what they do beside it. No data set, template or sampling here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric, Metric

from spin_lightning.models.adapters import LoraAdapter, base_of, trained_names
from spin_lightning.models.cpu_memory import keep_freed_memory
from spin_lightning.models.forward_paths import forget_forward_path, keep_forward_path
from spin_lightning.models.kernels import check_kernels, find_error, first_of, kernel_of, pin_kernels
from spin_lightning.models.loading import (
    ModelOrName,
    as_policy,
    check_model,
    disable_dropout,
    dtype_name,
    load_policy,
    refuse_ids_beyond,
    stored_dtype,
)
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.models.modes import calm, is_random
from spin_lightning.models.sharding import WholeModel, shard
from spin_lightning.runs import processes
from spin_lightning.runs.checkpoints import newest_checkpoint
from spin_lightning.runs.lightning_internals import (
    forward_context,
    keep_batches_as_collated,
    keep_weights_as_loaded,
    trainer_of,
)
from spin_lightning.runs.sharding import whole_norm
from spin_lightning.schedule import at_iteration
from spin_lightning.stages.optim import Float32Master, as_groups, fused, refuse_unusable, sum_in_passes
from spin_lightning.stages.retention import HeldOutLaws
from spin_lightning.terminal import say
from spin_lightning.types import NonFiniteError, ResponseBatch, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Updates in a row that may be skipped before the run stops: what is wrong then is not a row.
MOST_NON_FINITE = 10


@dataclass
class _Update:
    """What the batches of the update in progress add up to."""

    batches: list[Any] = field(default_factory=list)
    is_complete: bool = False  # with the batch in progress
    divisor: int = 0  # the first batch's count, which every batch's sum is divided by
    count: int = 0  # of what the mean is over, so far
    users: Any = 0  # of each trained weight, processes whose losses depended on it so far; asked if there are several
    total: Any = 0.0  # of the losses so far, divided by divisor


class PolicyModule(L.LightningModule):
    """A language model under training. Subclasses add ``training_step``, which returns what ``mean_of_update`` gives.

    An update's loss is one mean over all its batches, however many ``trainer.accumulate_grad_batches`` makes them and
    however long each is: batches that are accumulated train like one batch with all their rows. Every process has the
    whole batch, and takes its share of the passes.

    Given a model object instead of a name, it trains that object, in place; where self-play needs the weights it
    started with again (the resident opponent, alpha-SPIN), a copy of them is kept on the CPU.

    Its settings are those of every stage, declared here alone: a subclass takes ``**policy`` and hands it on.

    Args:
        model_name_or_path: The model to start from: a hub name, a Hugging Face folder or a ``.gguf`` file. In Python
            also a model of ``transformers``, which is then trained in place.
        learning_rate: Peak of the schedule.
        optimizer: Any torch optimiser, as a class path with its settings. Its lr is set by ``learning_rate``.
        lr_schedule: Shape of the decay after the warm-up; in self-play restarted each iteration.
        warmup_ratio: Share of the steps (in self-play: of an iteration's steps) that warm up.
        dropout: Keep the model's dropout on. Self-play wants it off, because policy and opponent must agree at the
            start.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        attn_implementation: The attention of ``transformers`` to use: sdpa, eager, flash_attention_2, ... None: its
            default.
        revision: Commit or tag of a hub model. Pin it for results that last.
        trust_remote_code: Run Python code that comes with a hub model. Only for code you have read.
        on_non_finite: What to do when a gradient is NaN or infinite: ``stop`` and name the rows, ``skip`` the update,
            or ``rollback`` to the last checkpoint's weights and go on with the next batch. Ten in a row stop the run in
            any case.
        kernels: How attention is computed on a CPU: ``prompt_attention`` by ``kernel`` or ``products``,
            ``decode_attention`` by ``grouped``, ``folded`` or ``compiled``; and ``layers``, on a GPU ``compiled``
            or ``plain``. What is not named is the first of these in float32; in bfloat16 one of attention's that a
            trial finds clearly faster takes its place. The run's record keeps the choice, and a resumed run takes the
            same.
        adapter: Train this on the frozen model instead of all its weights: ``LoraAdapter``, such as
            ``--model.adapter.r 16``. None: all weights are trained.

    Raises:
        UserError: A setting is outside its range.

    Attributes:
        update_loss: The loss of the update in progress: the mean over its batches so far.
        update_is_complete: Whether the batch in progress, or else the last one, is its update's last.
    """

    #: Names of the kernels with several candidates that a run of the stage needs.
    kernels_used: tuple[str, ...] = ("prompt_attention", "layers")
    policy: PreTrainedModel
    stored_dtype: str | None = None  # of the weights that came in
    has_no_name = False

    def __init__(
        self,
        model_name_or_path: ModelOrName,
        learning_rate: float | list[float] = 2e-5,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_schedule: Literal["linear", "cosine", "constant"] = "linear",
        warmup_ratio: float = 0.1,
        dropout: bool = False,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        on_non_finite: Literal["stop", "skip", "rollback"] = "stop",
        kernels: dict[str, str] | None = None,
        adapter: LoraAdapter | None = None,
    ) -> None:
        super().__init__()
        for rate in learning_rate if isinstance(learning_rate, list) else [learning_rate]:
            if not rate > 0:
                raise UserError(
                    f"model.learning_rate must be positive, got {rate!r}. The paper used 5e-7 and 1e-7 for 7B."
                )
        if not 0 <= warmup_ratio < 1:
            raise UserError(f"model.warmup_ratio must be in [0, 1), got {warmup_ratio!r}. The paper used 0.1.")
        if lr_schedule not in ("linear", "cosine", "constant"):
            raise UserError(f"model.lr_schedule must be one of ['linear', 'cosine', 'constant'], got {lr_schedule!r}.")
        if on_non_finite not in ("stop", "skip", "rollback"):
            raise UserError(f"model.on_non_finite must be one of ['stop', 'skip', 'rollback'], got {on_non_finite!r}.")
        check_kernels(kernels or {}, "model.kernels")
        if adapter is not None and adapter.dropout and not dropout:
            raise UserError(
                f"model.adapter.dropout {adapter.dropout!r} needs model.dropout: true, which sft can have; without it "
                "all dropout is off. Leave it out."
            )
        # a model object, later a copy of it; in a tuple, or it would be a part of this module
        self._given: tuple[Any, ...] = ()
        if isinstance(model_name_or_path, str | PathLike):
            model_name_or_path = str(model_name_or_path)
            check_model(model_name_or_path, attn_implementation, trust_remote_code)
        else:
            self._given = (_check_model(model_name_or_path, attn_implementation, revision),)
            self.has_no_name = not model_name_or_path.name_or_path
            model_name_or_path = model_name_or_path.name_or_path or type(model_name_or_path).__name__
        self.model_name_or_path: str = model_name_or_path
        self.learning_rate = learning_rate
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.warmup_ratio = warmup_ratio
        self.dropout = dropout
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.on_non_finite = on_non_finite
        self.kernels = kernels
        self.adapter = adapter
        if adapter is not None:
            self.register_state_dict_post_hook(_drop_frozen)
            self.register_load_state_dict_post_hook(_forgive_frozen)
        self._kernels_are_settled = False
        #: False where a fit only generates, so that an optimiser takes no memory.
        self.is_trained = True
        self.first_step = -1  # optimiser steps when the iteration in progress began
        self._non_finite_in_a_row = 0
        self._update = _Update()
        #: Which iteration the schedules are at, and how many epochs it has. The clock sets them; SFT is one iteration.
        self.iteration = 0
        self.epochs_in_iteration: int | None = None
        self._whole: WholeModel | None = None  # beside sharded weights
        self.held_out_nll = MeanMetric()
        self.held_out_nll_per_token = MeanMetric()
        self.other_nll = MeanMetric()
        self.other_nll_per_token = MeanMetric()
        self.held_out_kl = MeanMetric()
        self._held_out_laws = HeldOutLaws()

    def configure_model(self) -> None:
        if hasattr(self, "policy"):  # validate, or a second fit
            return
        if trainer_of(self) is not None:
            keep_weights_as_loaded(self.trainer)
        dtype = torch.get_default_dtype()  # which trainer.precision bf16-true sets to bfloat16 around this hook
        if self._given:
            (model,) = self._given
            self.stored_dtype = dtype_name(model.dtype)
            self.policy = self._adapt(as_policy(model, dtype, self.trust_remote_code))
            self._given = (copy.deepcopy(self.policy).cpu() if self.needs_start else None,)
        else:
            if self.trust_remote_code:
                say(f"note: trust_remote_code is on: Python code that comes with {self.model_name_or_path} is run.")
            self.stored_dtype = stored_dtype(
                self.model_name_or_path, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
            self.policy = self._load(dtype)
        if self.gradient_checkpointing:
            self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not self.dropout:
            disable_dropout(self.policy)
        self.policy.train()  # from_pretrained returns evaluation mode, and Lightning leaves the mode alone
        processes.wait()  # one process may load for long

    def shard(self) -> None:
        """Shard the policy over all processes; ``ShardedStrategy`` calls it. Together.

        Raises:
            UserError: The model or the precision does not allow it.
        """
        if self.compute_dtype is torch.float16:
            raise UserError(
                "trainer.precision 16-mixed scales gradients, which sharded weights get pass by pass. Use bf16-true, "
                "bf16-mixed or 32-true, or trainer.strategy: ddp."
            )
        self._whole = WholeModel(self.policy)
        shard(self.policy, processes.world_size())

    @property
    def plain_policy(self) -> PreTrainedModel:
        """The policy, or where it is sharded the whole model beside it, which has weights since ``gather_policy``."""
        return self.policy if self._whole is None else self._whole.model

    def gather_policy(self) -> PreTrainedModel:
        """The policy with the weights as they are now, in one piece, for anything but training. Together."""
        return self.policy if self._whole is None else self._whole.gather(self.policy)

    def _release_policy(self) -> None:
        if self._whole is not None:
            self._whole.release()

    @property
    def given_model(self) -> PreTrainedModel | None:
        """The model object that was given in the place of a name, until training begins."""
        return cast("PreTrainedModel", self._given[0]) if self._given else None

    @property
    def needs_start(self) -> bool:
        """Whether a run needs the weights it started with again, so that those of a model object are kept in memory."""
        return False

    def load_start(self) -> PreTrainedModel:
        """The model that the run started from, in the policy's dtype, on the CPU."""
        if self._given:
            return cast("PreTrainedModel", copy.deepcopy(self._given[0]))
        return self._load(next(self.policy.parameters()).dtype)

    def _load(self, dtype: torch.dtype) -> PreTrainedModel:
        return self._adapt(
            load_policy(
                self.model_name_or_path,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                attn_implementation=self.attn_implementation,
                dtype=dtype,
                quantize=None if self.adapter is None else self.adapter.quantize,
            )
        )

    def _adapt(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put the adapter of the settings into a model, drawn from the seed of the data: each time the same.

        Raises:
            UserError: There is none, and the model's weights are packed; or it cannot be put there.
        """
        if self.adapter is None:
            if getattr(model, "is_quantized", False):
                raise UserError(
                    f"the weights of {self.model_name_or_path} are packed and cannot be trained. Train an adapter on "
                    "them (model.adapter: LoraAdapter), or give the model as it was before."
                )
            return model
        data = getattr(trainer_of(self), "datamodule", None)
        policy: PreTrainedModel = self.adapter.apply(model, getattr(data, "seed", 0))
        return policy

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        base = base_of(self.policy)
        if self.adapter is not None and base is not None:  # which a checkpoint does not hold
            checkpoint["adapter"] = {**self.adapter.shape, "base_sha256": base.sha256}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another adapter or base, before its tensors are looked for in this policy.

        Raises:
            UserError: It is.
        """
        kept, base = checkpoint.get("adapter"), base_of(self.policy)
        if (kept is None) != (self.adapter is None):
            had, has = ("no adapter", "one") if kept is None else ("an adapter", "none")
            raise UserError(
                f"this run began with {had} (model.adapter), and this command gives {has}. Continue with the "
                "settings it began with, or use another folder."
            )
        if kept is None or self.adapter is None or base is None:
            return
        shape = self.adapter.shape
        if changed := [name for name in shape if shape[name] != kept[name]]:
            shown = "".join(f"\n  model.adapter.{name}: {kept[name]!r} -> {shape[name]!r}" for name in changed)
            raise UserError(
                f"this run began with another adapter than this command gives:{shown}\nContinue with the settings it "
                "began with, or use another folder."
            )
        if kept["base_sha256"] != base.sha256:
            raise UserError(
                f"the checkpoint holds an adapter only, and {self.model_name_or_path} does not hold the weights that "
                "it was trained on. Restore that model, or use another folder."
            )

    def on_fit_start(self) -> None:
        keep_batches_as_collated(self.trainer)
        self._refuse_other_vocabulary()
        self._measure_in_float32()
        if not self._kernels_are_settled:  # a run with checkpoints has settled them by its record
            self.settle_kernels(None)
        self._kernels_are_settled = False  # the next fit begins anew
        if not self.dropout:
            with self.precision_context():
                if is_random(self.gather_policy()):
                    for model in {self.policy, self.plain_policy}:
                        calm(model)
                    say(
                        f"note: {type(self.policy).__name__} is random in training mode, as the router of a mixture of "
                        "experts may be; it is trained as it answers, without that. model.dropout: true keeps it."
                    )
        if self.stored_dtype in ("bfloat16", "float16") and self.policy.dtype is torch.float32:
            say(
                f"note: the weights of {self.model_name_or_path} are stored in {self.stored_dtype}; they are trained "
                "and exported in float32, twice as large, for most of what training changes is too small for 16 bits. "
                "trainer.precision bf16-true keeps 16."
            )
        if self.device.type == "cpu":
            keep_freed_memory()

    def settle_kernels(self, recorded: Mapping[str, str] | None) -> dict[str, str]:
        """Fix how a run computes its kernels: by the setting, else by its record, else by a trial. Together.

        Where there are several processes, all take what the first one does.

        Args:
            recorded: What the run took before, by the names of the kernels; of one that is not among them the run
                knew no candidates, and it takes the first. None: the run begins.

        Raises:
            UserError: One that the setting names cannot be used here.
        """
        setting, choices = self.kernels or {}, {}
        if unused := sorted(setting.keys() - set(self.kernels_used)):
            say(f"note: model.kernels names {', '.join(unused)}, which {type(self).__name__} does not use.")
        with self.precision_context():
            pin_kernels(self.policy, {})
            if not processes.is_first():
                recorded = processes.share(recorded)
            for name in self.kernels_used:
                wanted = setting.get(name) or (None if recorded is None else recorded.get(name, first_of(name)))
                error = find_error(self.policy, name, wanted) if wanted else ""
                if error and name in setting:
                    raise UserError(f"model.kernels asks for {name} {wanted}, which cannot be used here: {error}.")
                if error:
                    say(
                        f"note: this run took {name} {wanted}, which cannot be used here ({error}). It goes on with "
                        "another, and its weights need not be those of an undisturbed run, bit by bit."
                    )
                choices[name] = wanted if wanted and not error else kernel_of(self.policy, name)
            if processes.is_first():
                processes.share(choices)
            pin_kernels(self.policy, choices)
        if self._whole is not None:
            keep_forward_path(self.policy)
        forget_forward_path(self.plain_policy)
        self._kernels_are_settled = True
        return choices

    def _refuse_other_vocabulary(self) -> None:
        encoder = getattr(self.trainer.datamodule, "encoder", None)  # type: ignore[attr-defined]
        if encoder is not None:
            rows = len(self.policy.get_input_embeddings().weight)  # type: ignore[arg-type]
            refuse_ids_beyond(rows, encoder.tokenizer, encoder.pad_id, encoder.terminator_id)

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":  # in a fit it is done already
            self._refuse_other_vocabulary()
            self.settle_kernels(None)
        self._measure_in_float32()
        self.gather_policy()
        self._held_out_laws.begin(self.trainer)

    def on_validation_end(self) -> None:
        self._held_out_laws.keep(self.trainer)
        self._release_policy()

    def _measure_in_float32(self) -> None:
        """A precision of bf16-true converts every module, and a mean kept in bfloat16 is a coarse one."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.set_dtype(torch.float32)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype the matrix products run in, which bounds how closely two passes can agree."""
        precision = str(self.trainer.precision) if trainer_of(self) is not None else "32-true"
        for name, dtype in (("bf16", torch.bfloat16), ("16", torch.float16), ("64", torch.float64)):
            if precision.startswith(name):
                return dtype
        return next(self.policy.parameters()).dtype

    def precision_context(self) -> AbstractContextManager[Any]:
        """The numerics of a training step, for passes outside of one: scoring and generation."""
        return forward_context(self.trainer)

    def configure_optimizers(self) -> Any:
        """One optimiser and one warm-up-and-decay schedule for one iteration."""
        refuse_unusable(self.optimizer)
        groups = self.weights_by_rate
        if not self.is_trained:  # an optimiser all the same, whose settings are compared with the run's
            groups = [([min(groups[0][0], key=Tensor.numel)], groups[0][1])]
        parts = [weights for weights, _ in groups]
        if any(weight.dtype in (torch.bfloat16, torch.float16) for weights in parts for weight in weights):
            optimizer: torch.optim.Optimizer = Float32Master(
                as_groups(parts), lambda weights: fused(self.optimizer(weights))
            )
        else:
            optimizer = fused(self.optimizer(as_groups(parts)))
        for group, (_, rate) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = rate
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self._lr_factor), "interval": "step", "name": "lr"},
        }

    @property
    def steps_per_iteration(self) -> float:
        """Optimiser steps of the current iteration; infinite until its training set exists."""
        trainer = self.trainer
        batches = trainer.num_training_batches
        if math.isinf(batches):
            return math.inf
        epochs = self.epochs_in_iteration or trainer.max_epochs or 1
        if epochs < 0 and trainer.max_steps > 0:  # Lightning's -1: as many epochs as the steps take
            return trainer.max_steps
        steps = math.ceil(batches / trainer.accumulate_grad_batches) * epochs
        return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps

    def _lr_factor(self, step: int) -> float:
        # read late: an iteration's loader does not exist when its optimiser is first made
        total = self.steps_per_iteration
        if math.isinf(total):
            return 0.0
        if total < 0 and self.lr_schedule != "constant":
            raise UserError(
                "trainer.max_epochs -1 and nothing else gives the schedule of the learning rate no length. Give a "
                "number of epochs or of updates, or set model.lr_schedule: constant."
            )
        warmup = round(self.warmup_ratio * total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}[
            self.lr_schedule
        ]

    def mean_of_update(self, sum_of: Callable[[Any], Tensor], parts: Sequence[Any], count: int) -> Tensor:
        """What a batch contributes to its update, as ``training_step`` returns it; logs the update's loss so far.

        Until an update's last batch is known, so is not what its mean is over. So all its batches are divided by the
        first one's count, and the gradient is put right once it is whole: not at all where all batches count alike.

        Args:
            sum_of: The sum of the losses of one part of the batch, a scalar. Called once for each part.
            parts: The parts of the batch, of which each process computes its share.
            count: Of what the loss is a mean in this batch: its pairs, responses or tokens.
        """
        update, several = self._update, processes.world_size()
        update.divisor = update.divisor or count
        own = processes.deal(parts)
        if self._whole is None:
            loss = self.sum_in_passes(lambda part: sum_of(part) / update.divisor, own)
        else:
            loss = self._go_back_in_passes(lambda part: sum_of(part) / update.divisor, own, parts)
        update.count += count
        update.total = update.total + processes.add_up(loss.detach())
        self.log("loss", self.update_loss, prog_bar=True, batch_size=sum(map(len, parts)))
        return loss if several == 1 else loss * several  # the gradients' mean over the processes is to be their sum

    def _go_back_in_passes(self, loss_of: Callable[[Any], Tensor], own: Sequence[Any], parts: Sequence[Any]) -> Tensor:
        """The sum of the losses, whose gradients the sharded weights get at once: each pass waits for all processes.

        One that has a pass less than others computes one without weight.
        """
        total: Any = 0.0
        for part in own:
            loss = loss_of(part)
            (loss * processes.world_size()).backward()
            total = total + loss.detach()
        if len(own) * processes.world_size() < len(parts):
            nothing = loss_of(parts[0]) * 0.0
            nothing.backward()
            total = total + nothing.detach()
        self._release_policy()
        return total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._whole is None:
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if self._whole is None:  # else gradients are there already, and on_train_batch_start removed the old ones
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    @property
    def update_loss(self) -> Tensor:
        """The mean loss of the update so far, NaN before its first batch."""
        update = self._update
        return update.total * (update.divisor / update.count) if update.count else torch.tensor(math.nan)

    @property
    def update_is_complete(self) -> bool:
        """Whether all batches of the update have been seen."""
        return self._update.is_complete

    def on_after_backward(self) -> None:
        """Make the gradient that of the update's mean before anything reads it. Lightning divides by the full count."""
        update = self._update
        if not update.is_complete or not update.count:  # a training step of one's own
            return
        if processes.world_size() > 1 and self._whole is None:
            for weight, users in zip(self._trained_weights(), update.users, strict=True):
                if not users:  # as in one process: an optimiser leaves it alone
                    weight.grad = None
        factor = self.trainer.accumulate_grad_batches * update.divisor / update.count
        if factor != 1:
            for weight in self._trained_weights():
                if weight.grad is not None:
                    weight.grad.mul_(factor)

    def sum_in_passes(self, loss_of: Callable[[Any], Tensor], parts: Sequence[Any]) -> Tensor:
        """The sum of the losses of a batch's parts, one part in memory at a time."""
        weights, several = self._trained_weights(), processes.world_size() > 1
        if self.compute_dtype is torch.float16:  # its gradients have to be scaled before they are taken
            losses = [loss_of(part) for part in parts]
            if several:  # DDP waits for the gradient of every weight
                losses += [0.0 * weight.flatten()[:1].float().sum() for weight in weights]
                self._update.users = torch.ones(len(weights))
            return torch.stack(losses).sum()
        if not several:
            return sum_in_passes(loss_of, parts, weights)
        unused: set[int] = set()
        loss = sum_in_passes(loss_of, parts, weights, unused)
        is_used = torch.tensor([float(index not in unused) for index in range(len(weights))])
        self._update.users = self._update.users + processes.add_up(is_used)
        return loss

    @property
    def weights_by_rate(self) -> list[tuple[list[Tensor], float]]:
        """What is trained: weights, and their peak of the schedule. Those of the policy are the first."""
        weights: list[Tensor] = [weight for weight in self.policy.parameters() if weight.requires_grad]
        return [(weights, at_iteration(self.learning_rate, self.iteration))]

    def _trained_weights(self) -> list[Tensor]:
        return [weight for weights, _ in self.weights_by_rate for weight in weights]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        num_batches = self.trainer.accumulate_grad_batches
        if batch_idx % num_batches == 0:
            self._update = _Update()
            if self._whole is not None:
                self.policy.zero_grad()
        self._update.batches.append(batch)
        self._update.is_complete = (batch_idx + 1) % num_batches == 0 or self.trainer.is_last_batch

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and let no update through whose gradient is NaN or infinite. The norm is computed once for both."""
        weights = [weight for weight in self._trained_weights() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights])  # type: ignore[misc]
        whole = whole_norm(norm)
        self.log("grad_norm", whole)
        if (
            self.compute_dtype is not torch.float16 and not whole.isfinite()
        ):  # a float16 scaler skips such steps by itself
            self._refuse_update(optimizer, float(whole))
            return
        self._non_finite_in_a_row = 0
        if gradient_clip_val and str(gradient_clip_algorithm or "norm").endswith("norm"):
            torch.nn.utils.clip_grads_with_norm_(weights, gradient_clip_val, norm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _refuse_update(self, optimizer: torch.optim.Optimizer, norm: float) -> None:
        """Leave the weights as they are, or as the last checkpoint has them, or stop.

        Raises:
            NonFiniteError: ``on_non_finite`` is stop, or no update was possible more than ten times in a row.
        """
        step = self.trainer.global_step
        what = f"the gradient of update {step} is NaN or infinite (norm {norm})"
        rows = "".join(f"\n  {line}" for line in self._rows_of_update())
        self._non_finite_in_a_row += 1
        if self.on_non_finite == "stop" or self._non_finite_in_a_row > MOST_NON_FINITE:
            raise NonFiniteError(
                f"{what}, and the run stops; its last checkpoint is whole. It came from these rows:{rows}\n"
                "Look at them, lower model.learning_rate, use float32, or set model.on_non_finite to skip or rollback."
            )
        optimizer.zero_grad()  # an optimiser leaves weights without a gradient alone
        if self.on_non_finite == "rollback":
            folders = [callback.folder for callback in self.trainer.checkpoint_callbacks if hasattr(callback, "folder")]
            path = newest_checkpoint(folders[0]) if folders else None
            if path is None:
                raise NonFiniteError(
                    f"{what}, and there is no checkpoint to roll back to. It came from these rows:{rows}"
                )
            checkpoint = self.trainer.strategy.checkpoint_io.load_checkpoint(path)
            if checkpoint["global_step"] > self.first_step:
                self.trainer.strategy.load_model_state_dict(checkpoint)
                self.trainer.strategy.load_optimizer_state_dict(checkpoint)
                what += f"; the weights are those of {path} again"
            else:  # its optimiser is another
                what += "; there is no checkpoint of this iteration yet, so the weights stay"
        say(f"note: {what}. The update is skipped. It came from these rows:{rows}")

    def _rows_of_update(self) -> list[str]:
        """The beginnings of the prompts whose gradient an update would have used."""
        tokenizer = self.trainer.datamodule.encoder.tokenizer  # type: ignore[attr-defined]
        lines = []
        for part in (part for batch in self._update.batches for part in batch):
            responses, start = getattr(part, "responses", part), 0
            for prompt_length, *lengths in responses.lengths:
                text = tokenizer.decode(responses.input_ids[start : start + prompt_length][-60:])
                lines.append(f"...{text!r}")
                start += prompt_length + sum(lengths)
        return lines

    def held_out_log_probs(self, part: Any) -> tuple[Tensor, Tensor]:
        """Log-probs and lengths of the real responses in one part of a held-out batch."""
        log_probs, divergences = self._held_out_laws.measure(self.plain_policy, part)
        if divergences is not None:
            self.held_out_kl.update(divergences)
        return log_probs, part.response_lengths

    def is_other(self, batch_idx: int) -> bool:
        """Whether a batch of a measurement has rows of other tasks (``data.other_data``) in place of held-out ones."""
        first = getattr(self.trainer.datamodule, "num_held_out_batches", None)  # type: ignore[attr-defined]
        return first is not None and batch_idx >= first

    def validation_step(self, batch: list[Any], batch_idx: int) -> None:
        """Held-out NLL of the real responses, and that of rows of other tasks: it needs no generation."""
        is_other = self.is_other(batch_idx)
        name = "val/other_nll" if is_other else "val/nll"
        nll, nll_per_token = self.held_out_nll, self.held_out_nll_per_token
        if is_other:
            nll, nll_per_token = self.other_nll, self.other_nll_per_token
        own = processes.deal(batch)
        if not own:  # a mean that was never told anything warns
            nll.update(torch.empty(0))
            nll_per_token.update(torch.empty(0))
        for part in own:
            log_probs, lengths = self._other_log_probs(part) if is_other else self.held_out_log_probs(part)
            nll.update(-log_probs)
            nll_per_token.update(-log_probs / lengths, weight=lengths)
        always: dict[str, Any] = {"on_epoch": True, "on_step": False, "batch_size": sum(map(len, batch))}
        self.log(name, nll, prog_bar=not is_other, **always)
        self.log(f"{name}_per_token", nll_per_token, **always)
        if self.held_out_kl.update_called and not is_other:
            self.log("val/kl_to_start", self.held_out_kl, **always)

    def _other_log_probs(self, part: ResponseBatch) -> tuple[Tensor, Tensor]:
        return response_log_probs(self.plain_policy, part), part.response_lengths


def _check_model(model: Any, attn_implementation: str | None, revision: str | None) -> Any:
    """A model object, if it is one and no setting is of how it is loaded."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"model_name_or_path must be a name or a model of transformers, got {type(model).__name__}. "
            "Of a model with an adapter give the base, and adapter=LoraAdapter(path=...)."
        )
    for name, value in (("attn_implementation", attn_implementation), ("revision", revision)):
        if value is not None:
            raise UserError(
                f"{name} {value!r} says how a model is loaded, but this {type(model).__name__} is loaded already. Load "
                "it so."
            )
    return model


def _drop_frozen(module: PolicyModule, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Leave the frozen weights out of a checkpoint: the model that training began with has them."""
    if hasattr(module, "policy"):
        kept = {f"{prefix}policy.{name}" for name in trained_names(module.policy)}
        for key in [key for key in state_dict if key.startswith(f"{prefix}policy.") and key not in kept]:
            del state_dict[key]


def _forgive_frozen(module: PolicyModule, incompatible: Any) -> None:
    wanted = {f"policy.{name}" for name in trained_names(module.policy)}
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not key.startswith("policy.") or key in wanted
    ]
