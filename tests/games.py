"""Small whole games for the tests: they play in well under a second, and remember what happened."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from fake_vllm import FakeVllm, Sampler
from helpers import QUIET, load
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from spin_lightning import (
    AtomicCheckpointIO,
    Health,
    ResponseGenerator,
    RunCheckpoint,
    SelfPlay,
    SpinLightningModule,
    SpinLoss,
    SyntheticDataModule,
    TransformersGenerator,
)
from spin_lightning.generation.base import Player, opened
from spin_lightning.generation.pair_store import PairStore
from spin_lightning.types import Response


class Recorder(L.Callback):
    """The loss, learning rate and pairs of every training batch, by the number of the batch in the whole run."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.rates: dict[int, float] = {}
        self.pairs: list[tuple[int, list[int]]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.number = trainer.fit_loop.epoch_loop.total_batch_idx
        self.rates[self.number] = trainer.optimizers[0].param_groups[0]["lr"]
        if hasattr(batch[0], "pair_ids"):
            self.pairs.append((trainer.current_epoch, [pair for part in batch for pair in part.pair_ids.tolist()]))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses[self.number] = float(outputs["loss"]) * trainer.accumulate_grad_batches

    def order_of(self, epoch: int) -> list[int]:
        """The pairs of an epoch, in the order they were trained on."""
        return [pair for number, pairs in self.pairs if number == epoch for pair in pairs]


class Do(L.Callback):
    """Calls functions at named hooks, Lightning's and the game's: ``Do(on_generation_end=print)``."""

    def __init__(self, **actions: Callable[..., Any]) -> None:
        for name, action in actions.items():
            setattr(self, name, action)


class DoLast(Do, Checkpoint):
    """The same, after the run's checkpoint was written: Lightning puts checkpoint callbacks last, in their order."""


class SecretiveLoss(SpinLoss):
    """Has a setting that its run must not keep."""

    def __init__(self, push_token: str = "") -> None:
        super().__init__()
        self.push_token = push_token


class FakeGenerator(ResponseGenerator):
    """Answers by a rule instead of a model: ``rule(prompt_ids, seed)`` gives the ids, without a terminator."""

    def __init__(self, rule: Callable[[list[int], int], list[int]], max_new_tokens: int = 8) -> None:
        super().__init__(max_new_tokens=max_new_tokens)
        self.rule = rule

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], terminator_id: int, pad_id: int
    ) -> Iterator[tuple[int, Response]]:
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            ids = [*self.rule(prompt, seed), terminator_id]
            reason = "stop" if len(ids) <= self.max_new_tokens else "length"
            yield index, Response(ids[: self.max_new_tokens], reason, -1.0)


class CountingGenerator(TransformersGenerator):
    """Counts its answers, and breaks down after a given number of them."""

    answered = 0
    breaks_after: int | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        return {**super().sampling, "generator": "counting"}

    def generate(self, *args: Any) -> Iterator[tuple[int, Response]]:
        for item in super().generate(*args):
            if self.answered == self.breaks_after:
                raise Stopped("in the middle of generation")
            self.answered += 1
            yield item


def answering(
    generator: ResponseGenerator,
    model: Any,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    ends: int | Collection[int],
    pad_id: int = 0,
) -> Iterator[tuple[int, Response]]:
    """The numbers of prompts and their answers as a generator finishes them: the one call of it that tests make."""
    with opened(generator, Player(model)):
        yield from generator.generate(prompts, seeds, ends, pad_id)


def answers_of(
    generator: ResponseGenerator,
    model: Any,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    ends: int | Collection[int],
    pad_id: int = 0,
) -> list[Response]:
    """A generator's answers, in the order of their prompts; each prompt has exactly one."""
    found = sorted(answering(generator, model, prompts, seeds, ends, pad_id), key=lambda item: item[0])
    assert [index for index, _ in found] == list(range(len(prompts)))
    return [response for _, response in found]


class FromModel:
    """Samples by the package's own sampler from a model, as it is in a folder or in memory."""

    def __init__(self, model: Any) -> None:
        self.lock = threading.Lock()
        self.become(model)

    def become(self, model: Any) -> None:
        self.model = (load(model) if isinstance(model, str) else model).eval()

    @torch.no_grad()
    def __call__(self, prompt: list[int], seed: int, most: int, ends: list[int]) -> tuple[list[int], list[float]]:
        with self.lock:
            (response,) = answers_of(TransformersGenerator(most), self.model, [prompt], [seed], ends)
            ids = response.ids
            logits = self.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            return ids, logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def serving(sample: Sampler) -> FakeVllm:
    server = FakeVllm(sample)
    if isinstance(sample, FromModel):
        server.reload = sample.become
    return server


class Stopped(Exception):
    """What a test raises to stop a game somewhere."""


class Game:
    """One game as a user would write it, with small settings; ``play()`` plays or continues it."""

    def __init__(
        self,
        model: str,
        rows: str,
        folder: Path | str,
        *,
        callbacks: Sequence[L.Callback] = (),
        last: Sequence[DoLast] = (),
        module: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        play: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        every_n_steps: int | None = 1,
        allow_changes: list[str] | None = None,
        health: Health | None = None,
    ) -> None:
        self.module = SpinLightningModule(model, **{"learning_rate": 1e-2, **(module or {})})
        defaults: dict[str, Any] = {
            "batch_size": 4,
            "val_fraction": 0.2,
            "generator": TransformersGenerator(max_new_tokens=5),
        }
        self.data = SyntheticDataModule(rows, **{**defaults, **(data or {})})
        self.clock = SelfPlay(str(folder), **{"iterations": 2, "epochs": 2, "shard_size": 5, **(play or {})})
        self.recorder = Recorder()
        self.health = health or Health()
        settings: dict[str, Any] = {
            **QUIET,
            "max_epochs": self.clock.total_epochs,
            "reload_dataloaders_every_n_epochs": 1,
            "num_sanity_val_steps": -1,
            "plugins": [AtomicCheckpointIO()],
            "log_every_n_steps": 1,
            "callbacks": [
                *callbacks,
                self.clock,
                self.recorder,
                RunCheckpoint(every_n_steps=every_n_steps, allow_changes=allow_changes),
                *last,
                self.health,
            ],
        }
        self.trainer = L.Trainer(**{**settings, **(trainer or {})})

    def play(self) -> Game:
        self.trainer.fit(self.module, self.data, ckpt_path=self.clock.last_checkpoint)
        return self

    @property
    def losses(self) -> list[float]:
        return list(self.recorder.losses.values())

    @property
    def weights(self) -> bytes:
        return weight_bits(self.module.policy)


def weight_bits(model: nn.Module) -> bytes:
    """All weights of a model as bytes, in the order of their names."""
    tensors = (tensor for _, tensor in sorted(model.state_dict().items()))
    return b"".join(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors)


def without_seconds(value: Any) -> Any:
    """A summary without its times, which no two runs share."""
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if key != "seconds"}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def read(path: Path) -> Any:
    return json.loads(path.read_text())


class Secretive(L.Callback):
    """Takes a secret, as loggers and hub callbacks do."""

    def __init__(self, api_key: str) -> None:
        self.length = len(api_key)


def pairs_of(folder: Path, iteration: int) -> list[dict[str, Any]]:
    """The pairs of an iteration, as they are kept."""
    return PairStore(folder / f"iteration_{iteration}" / "pairs").read().to_pylist()


def moments_of(folder: Path, copies: Path, run: Callable[[], Any], note: Callable[[], Any] = lambda: None) -> list[Any]:
    """Run, and copy a folder before and after each file in it gets its final name, or loses it: what a kill can leave.

    Returns:
        The copies, in their order, each with what ``note`` said at that moment.
    """
    moments: list[Any] = []

    def keep() -> None:
        moments.append((copies / str(len(moments)), note()))
        shutil.copytree(folder, moments[-1][0])

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*args: Any, **kwargs: Any) -> Any:
            keep()
            result = function(*args, **kwargs)
            keep()
            return result

        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", around(os.replace))
        patch.setattr(Path, "rename", around(Path.rename))
        run()
    return moments
