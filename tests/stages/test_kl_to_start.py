"""Supervised fine-tuning with a term that keeps the policy near the model it starts from."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from games import Do, DoLast, Recorder, Stopped, read, weight_bits, without_seconds
from helpers import QUIET, load
from lightning import Trainer
from several import thorough, together
from test_resume import stop_at
from torch import Tensor

from spin_lightning import (
    AtomicCheckpointIO,
    ExportPolicy,
    LoraAdapter,
    RowDataModule,
    RunCheckpoint,
    SftLightningModule,
    UserError,
    last_checkpoint,
)
from spin_lightning.stages import law_table, sft


def train(
    model: str, rows: str, folder: Path, callbacks: Any = (), trainer: Any = None, data: Any = None, **module: Any
) -> tuple[SftLightningModule, Recorder]:
    """A run of three epochs of two batches, or its continuation."""
    recorder = Recorder()
    made = SftLightningModule(model, **{"learning_rate": 1e-2, "warmup_ratio": 0.0, **module})
    parts = [
        ExportPolicy(str(folder)),
        RunCheckpoint(str(folder / "checkpoints"), every_n_steps=1),
        recorder,
        *callbacks,
    ]
    settings = {
        **QUIET, "max_epochs": 3, "num_sanity_val_steps": -1, "callbacks": parts, "plugins": [AtomicCheckpointIO()],
        **(trainer or {}),
    }  # fmt: skip
    rows_of = RowDataModule(rows, **{"batch_size": 4, "val_fraction": 0.2, "max_response_tokens": 5, **(data or {})})
    Trainer(**settings).fit(made, rows_of, ckpt_path=last_checkpoint(str(folder)))
    return made, recorder


def whole_laws(model: Any, prompts: Any) -> tuple[Tensor, Tensor]:
    """Log-probs of the whole vocabulary at each response token, one row at a time, and the tokens themselves."""
    laws, tokens = [], []
    for prompt in prompts:
        ids = torch.tensor([[*prompt.prompt_ids, *prompt.real_ids]])
        laws.append(model(ids).logits[0, len(prompt.prompt_ids) - 1 : -1].log_softmax(-1))
        tokens += prompt.real_ids
    return torch.cat(laws), torch.tensor(tokens)


def cut(laws: Tensor, ids: Tensor) -> Tensor:
    return torch.cat([laws.gather(1, ids), laws.scatter(1, ids, -math.inf).logsumexp(1, keepdim=True)], 1)


@pytest.mark.parametrize("average", ["token", "response"])
def test_the_gradient_is_that_of_the_whole_softmax(average: Any, model: str, rows: str, tmp_path: Path) -> None:
    """Of the second update, when policy and start differ; the laws of the start are cut to 64 tokens of 264."""
    found: list[list[Tensor]] = []
    policies: list[Any] = []
    logged: list[float] = []

    def keep(trainer: Any, module: Any, *_: Any) -> None:
        found.append([p.grad.clone() for p in module.policy.parameters()])
        policies.append(copy.deepcopy(module.policy.state_dict()))

    note = Do(
        on_before_optimizer_step=keep,
        on_train_batch_end=lambda trainer, *_: logged.append(float(trainer.callback_metrics["kl_from_start"])),
    )
    trainer = {"precision": "64-true", "max_epochs": 2}
    module, recorder = train(
        model, rows, tmp_path, [note], trainer, {"batch_size": 8}, kl_to_start=0.7, average=average
    )
    start, policy = load(model, torch.float64), load(model, torch.float64)
    policy.load_state_dict(policies[1])
    prompts = module.trainer.datamodule.prompts  # type: ignore[attr-defined]
    with torch.no_grad():
        of_start, tokens = whole_laws(start, prompts)
        ids = of_start.topk(64).indices
    of_policy, _ = whole_laws(policy, prompts)
    p, q = cut(of_start, ids), cut(of_policy, ids)
    divergence = (p.exp() * (p - q)).sum()
    nll = -of_policy.gather(1, tokens[:, None]).sum()
    loss = (nll + 0.7 * divergence) / (len(tokens) if average == "token" else len(prompts))
    assert recorder.losses[1] == pytest.approx(loss.item(), rel=1e-6)
    assert logged == pytest.approx([0.0, divergence.item() / len(tokens)], rel=1e-5, abs=1e-6)
    assert logged[1] > 0.01
    for gradient, expected in zip(found[1], torch.autograd.grad(loss, list(policy.parameters())), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_without_a_weight_nothing_is_kept_and_no_bit_moves(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = train(model, rows, tmp_path / "plain")
    monkeypatch.setattr(law_table, "top_says", lambda *_: pytest.fail("the start was asked"))
    zero, recorder = train(model, rows, tmp_path / "zero", kl_to_start=0.0)
    assert weight_bits(plain.policy) == weight_bits(zero.policy) and len(recorder.losses) == 6
    assert not list(tmp_path.rglob("start_laws*"))


def test_a_large_weight_keeps_the_policy_near_the_start(model: str, rows: str, tmp_path: Path) -> None:
    divergences = []
    for weight in (0.0, 1.0, 100.0):
        module, _ = train(model, rows, tmp_path / str(weight), kl_to_start=weight)
        with torch.no_grad():
            prompts = module.trainer.datamodule.prompts  # type: ignore[attr-defined]
            p, q = (whole_laws(each, prompts)[0] for each in (load(model), module.policy))
        divergences.append(float((p.exp() * (p - q)).sum(1).mean()))
    assert divergences[0] > divergences[1] > 5 * divergences[2] and divergences[2] < 0.05 < 0.3 < divergences[0]


@pytest.mark.parametrize("kind", ["plain", "adapter", "accumulated"])
def test_a_stopped_run_continues_bit_for_bit(kind: str, model: str, rows: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "plain": {},
        "adapter": {"adapter": LoraAdapter(r=4)},
        "accumulated": {"trainer": {"accumulate_grad_batches": 2}},
    }[kind]
    whole, reference = train(model, rows, tmp_path / "whole", kl_to_start=0.5, **settings)
    stop = DoLast(on_train_batch_end=lambda trainer, *_: stop_at(trainer, 3))
    with pytest.raises(Stopped):
        train(model, rows, tmp_path / "run", [stop], kl_to_start=0.5, **settings)
    module, recorder = train(model, rows, tmp_path / "run", kl_to_start=0.5, **settings)
    assert weight_bits(module.policy) == weight_bits(whole.policy)
    assert recorder.losses == {n: reference.losses[n] for n in recorder.losses}
    ends = [without_seconds(read(tmp_path / name / "summary.json")) for name in ("whole", "run")]
    assert ends[0] == ends[1]


def test_a_stop_while_the_start_scores_costs_one_shard_and_a_changed_table_is_refused(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "START_SHARD", 3)
    whole, _ = train(model, rows, tmp_path / "whole", kl_to_start=0.5)
    scored, real = [], law_table.top_says

    def watched(policy: Any, batch: Any, k: int) -> Any:
        scored.append(len(batch))
        if len(scored) == 2:
            raise Stopped
        return real(policy, batch, k)

    monkeypatch.setattr(law_table, "top_says", watched)
    with pytest.raises(Stopped):
        train(model, rows, tmp_path / "run", kl_to_start=0.5)
    stop = DoLast(on_train_batch_end=lambda trainer, *_: stop_at(trainer, 3))
    with pytest.raises(Stopped):
        train(model, rows, tmp_path / "run", [stop], kl_to_start=0.5)
    assert scored == [3, 3, 3, 2]
    path = tmp_path / "run" / "start_laws_manifest.json"
    before = path.read_text()
    path.write_text(before + " ")
    with pytest.raises(UserError, match=r"the next-token laws in .*start_laws are not those that this run began with"):
        train(model, rows, tmp_path / "run", kl_to_start=0.5)
    path.write_text(before)
    module, _ = train(model, rows, tmp_path / "run", kl_to_start=0.5)
    assert weight_bits(module.policy) == weight_bits(whole.policy) and scored == [3, 3, 3, 2]


def train_it(model: str, rows: str, folder: Path, devices: int) -> None:
    trainer = {"precision": "64-true", "devices": devices, **({"strategy": "ddp"} if devices > 1 else {})}
    train(model, rows, folder, trainer=trainer, data={"batch_size": 5, "micro_batch_tokens": 60}, kl_to_start=0.5)


@thorough
def test_two_processes_train_as_one(model: str, rows: str, tmp_path: Path) -> None:
    train_it(model, rows, tmp_path / "one", 1)
    ended = together(tmp_path, train_it, model, rows, tmp_path / "two", 2)
    assert ended.codes == [0, 0], ended.printed
    one, two = (load(tmp_path / name / "policy", torch.float64).state_dict() for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-12, rtol=0)


def test_what_cannot_be_is_refused_and_a_trial_leaves_nothing_for_the_run(
    model: str, rows: str, tmp_path: Path
) -> None:
    for value in (-0.1, math.nan, math.inf):
        with pytest.raises(UserError, match=r"model\.kl_to_start must be 0 or positive, got"):
            SftLightningModule(model, kl_to_start=value)
    module, data = SftLightningModule(model, kl_to_start=0.5), RowDataModule(rows)
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **{**QUIET, "num_sanity_val_steps": 0})
    with pytest.raises(UserError, match=r"which the ExportPolicy callback names, and there is none\. Add"):
        trainer.fit(module, data)
    train(model, rows, tmp_path / "run", trainer={"fast_dev_run": True}, kl_to_start=0.5)
    assert {path.name for path in (tmp_path / "run").glob("*")} == {"fast_dev_run"}
