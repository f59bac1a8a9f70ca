"""Iterations of PPO on a tiny model: what is stored, what is trained on, and what is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pytest
import torch
from games import Do, DoLast, Recorder, Stopped, read, weight_bits, without_seconds
from helpers import QUIET, load, log_prob_by_hand, save_tiny_model
from safetensors.torch import load_file
from several import thorough, together
from transformers import LlamaConfig, LlamaForSequenceClassification

from spin_lightning import (
    AtomicCheckpointIO,
    ContinuousGenerator,
    Gae,
    Health,
    LeaveOneOut,
    NumberMatch,
    PpoLightningModule,
    Reward,
    Rollouts,
    RunCheckpoint,
    SpinLightningModule,
    SumOfRewards,
    SyntheticDataModule,
    UserError,
)
from spin_lightning.generation.answer_store import AnswerStore
from spin_lightning.models.batches import collate_rollouts
from spin_lightning.rewards.base import Answer
from spin_lightning.stages import export, rollout_iteration
from spin_lightning.stages.critic import Critic
from spin_lightning.stages.rollout_iteration import prompts_of_iteration
from spin_lightning.types import Response


class Vowels(Reward):
    """The share of vowels; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        self.asked += len(answers)
        return [sum(letter in "aeiou01" for letter in answer.text) / max(1, len(answer.text)) for answer in answers]


class Run:
    """A run as a user would write it, with small settings; ``play()`` begins or continues it."""

    def __init__(
        self,
        model: Any,
        rows: str,
        folder: Path,
        *,
        module: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        rollouts: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        checkpoint: dict[str, Any] | None = None,
        callbacks: Sequence[L.Callback] = (),
        last: Sequence[L.Callback] = (),
    ) -> None:
        self.reward = Vowels()
        self.module = PpoLightningModule(model, **{"learning_rate": 1e-2, **(module or {})})
        of_data: dict[str, Any] = {
            "batch_size": 4,
            "val_fraction": 0.2,
            "answers_per_prompt": 2,
            "generator": ContinuousGenerator(max_new_tokens=6),
        }
        self.data = SyntheticDataModule(rows, **{**of_data, **(data or {})})
        of_clock = {"reward": self.reward, "iterations": 3, "prompts": 3, "epochs": 2, "shard_size": 2, "eval_every": 2}
        self.rollouts = Rollouts(str(folder), **{**of_clock, **(rollouts or {})})
        self.recorder, self.health = Recorder(), Health()
        settings: dict[str, Any] = {
            **QUIET,
            "max_epochs": self.rollouts.total_epochs,
            "reload_dataloaders_every_n_epochs": 1,
            "num_sanity_val_steps": -1,
            "check_val_every_n_epoch": 4,
            "plugins": [AtomicCheckpointIO()],
            "callbacks": [
                *callbacks,
                self.rollouts,
                self.recorder,
                RunCheckpoint(**(checkpoint or {})),
                *last,
                self.health,
            ],
        }
        self.trainer = L.Trainer(**{**settings, **(trainer or {})})

    def play(self) -> Run:
        self.trainer.fit(self.module, self.data, ckpt_path=self.rollouts.last_checkpoint)
        return self


def answers_of(folder: Path, iteration: int) -> list[dict[str, Any]]:
    return AnswerStore(folder / f"iteration_{iteration}" / "answers").read().to_pylist()


@pytest.fixture(scope="module")
def plain(model: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One ordinary run, for the tests that only look at what it left behind."""
    folder = tmp_path_factory.mktemp("ppo") / "run"
    run = Run(model, rows, folder).play()
    run.folder = folder  # type: ignore[attr-defined]
    return run


def test_a_run_leaves_its_responses_and_its_policy(plain: Any) -> None:
    over = read(plain.folder / "rollouts.json")
    assert over["ended_because"] == "all 3 iterations were played"
    assert [summary["updates"] for summary in over["iterations"]] == [4, 4, 4]  # 6 responses in batches of 4, twice
    table = answers_of(plain.folder, 1)
    assert sorted((row["answer"], len(row["response_ids"])) for row in table) == [(0, 6)] * 3 + [(1, 6)] * 3
    assert weight_bits(load(plain.folder / "policy")) == weight_bits(plain.module.policy)
    assert not (plain.folder / "iteration_2" / "policy").exists()
    assert torch.equal(load_file(plain.folder / "critic.safetensors")["head"], plain.module.critic_model.head)
    # the start model first, then every second iteration, and the last policy
    rewards = [summary["pairs"].get("val/reward") for summary in over["iterations"]]
    assert rewards[1] is None and None not in (rewards[0], rewards[2], over["held_out"]["val/reward"])


def test_held_out_responses_that_were_all_cut_have_a_sentence_and_no_reward(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(
        model, rows, tmp_path, data={"generator": ContinuousGenerator(max_new_tokens=1)}, rollouts={"cut": "drop"}
    ).play()
    printed, kept = capsys.readouterr().out, (tmp_path / "rollouts.json").read_text()
    assert "no held-out response could be judged (2 of 2 cut; raise data.generator.max_new_tokens)" in printed
    assert "nan" not in printed and "NaN" not in kept and "val/reward" not in kept


def test_stored_log_probs_are_those_of_plain_passes(plain: Any, model: str) -> None:
    start = load(model, torch.float64)
    for row in answers_of(plain.folder, 0):
        ids, prompt = row["response_ids"], row["prompt_ids"]
        by_hand = [log_prob_by_hand(start, prompt + ids[:t], ids[t : t + 1]) for t in range(len(ids))]
        assert row["log_probs"] == pytest.approx(by_hand, abs=1e-5)
        assert row["sampler_log_probs"] == pytest.approx(by_hand, abs=1e-5)
        assert row["reference_log_probs"] == row["log_probs"] and row["values"] == [0.0] * len(ids)
    later = answers_of(plain.folder, 1)[0]
    of_start = log_prob_by_hand(start, later["prompt_ids"], later["response_ids"])
    assert sum(later["reference_log_probs"]) == pytest.approx(of_start, abs=1e-4)
    assert abs(sum(later["log_probs"]) - of_start) > 0.1  # the policy has moved


def test_prompts_come_in_permutations() -> None:
    two_passes = [index for t in range(5) for index in prompts_of_iteration(10, 0, t, 4)]
    assert sorted(two_passes[:10]) == sorted(two_passes[10:]) == list(range(10))
    assert two_passes[:10] != two_passes[10:] and prompts_of_iteration(10, 1, 0, 4) != two_passes[:4]


def test_a_prompt_that_comes_twice_gets_other_responses(model: str, rows: str, tmp_path: Path) -> None:
    Run(model, rows, tmp_path, rollouts={"iterations": 1, "prompts": 10, "eval_every": 0}).play()  # 8 rows to train on
    table = answers_of(tmp_path, 0)
    assert len({(row["prompt_id"], row["answer"]) for row in table}) == len({row["seed"] for row in table}) == 20
    assert sorted(Counter(row["prompt_id"] for row in table).values()) == [2] * 6 + [4] * 2


def test_the_last_evaluation_is_where_the_training_was(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning moves a module to the CPU where a fit ends, and only then says so."""
    run, moves = Run(model, rows, tmp_path, rollouts={"iterations": 1}), []

    def note(owner: Any, name: str) -> None:
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *args: moves.append((name, *args)) or own(self, *args))

    note(PpoLightningModule, "cpu")
    note(PpoLightningModule, "to")
    note(rollout_iteration.PpoIteration, "evaluate")
    run.play()
    assert moves[-3:] == [("cpu",), ("to", torch.device("cpu")), ("evaluate",)]


# --- the loss against a second implementation ------------------------------------------------------------------------


def rollout_rows(critic: bool) -> list[dict[str, Any]]:
    """Three prompts; two responses to the first are equal, and are worth different things."""
    draw = torch.Generator().manual_seed(7)

    def numbers(count: int) -> list[float]:
        return torch.randn(count, generator=draw).tolist()

    def row(prompt_id: int, prompt: list[int], ids: list[int]) -> dict[str, Any]:
        names = ["log_probs", "advantages", *(["values", "returns"] if critic else [])]
        empty = dict.fromkeys(("values", "returns", "sampler_log_probs"))
        numbered = {name: numbers(len(ids)) for name in names}
        numbered["log_probs"] = [-5.0 + value for value in numbered["log_probs"]]
        return {**empty, "prompt_id": prompt_id, "prompt_ids": prompt, "response_ids": ids, **numbered}

    same = [9, 8, 7]
    return [
        *(row(0, [5, 6], ids) for ids in (same, [4, 3], same)),
        *(row(1, [11], ids) for ids in ([12, 13, 14, 15], [2])),
        row(2, [21, 22, 23], [24, 25, 26]),
    ]


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("max_tokens", [1000, 14, 1])
def test_the_gradient_is_that_of_separate_rows_in_any_passes(model: str, critic: bool, max_tokens: int) -> None:
    module = PpoLightningModule(
        model, advantage=Gae() if critic else LeaveOneOut(), value_clip=0.2, value_coef=0.5, average="token"
    )
    module.policy = load(model, torch.float64)
    if critic:
        module.critic_model = Critic(16, 2.0)
        head = torch.randn(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 10
        module.critic_model.head = torch.nn.Parameter(head)
    rows = rollout_rows(critic)
    batch = collate_rollouts(rows, max_tokens)
    assert (len(batch) > 1) == (max_tokens < 1000)
    assert sum(len(part.responses) for part in batch if max_tokens == 1000) in (0, 5)  # of 6, two are equal
    module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module.on_train_batch_start = lambda *args: None  # type: ignore[method-assign]
    module.training_step(batch, 0).backward()
    weights = list(module.policy.parameters()) + ([module.critic_model.head] if module.critic_model else [])
    found = [weight.grad.clone() for weight in weights]

    total: Any = 0.0
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        output = module.policy(ids, output_hidden_states=True)
        first = len(row["prompt_ids"]) - 1
        log_probs = output.logits[0, first:-1].log_softmax(-1).gather(1, ids[0, first + 1 :, None])[:, 0]
        old, worth = torch.tensor(row["log_probs"]), torch.tensor(row["advantages"])
        ratio = (log_probs - old).exp()
        total = total - torch.minimum(ratio * worth, ratio.clamp(0.8, 1.2) * worth).sum()
        if critic:
            values = 2.0 * output.hidden_states[-1][0, first:-1] @ module.critic_model.head  # type: ignore[union-attr]
            before, after = torch.tensor(row["values"]), torch.tensor(row["returns"])
            near = before + (values - before).clamp(-0.2, 0.2)
            total = total + 0.5 * torch.maximum((values - after) ** 2, (near - after) ** 2).sum() / 2
    for weight in weights:
        weight.grad = None
    (total / sum(len(row["response_ids"]) for row in rows)).backward()
    for mine, weight in zip(found, weights, strict=True):
        assert (mine - weight.grad).abs().max() < 1e-6 * weight.grad.abs().max(), (mine - weight.grad).abs().max()


def test_responses_that_teach_nothing_are_counted_and_not_computed() -> None:
    rows = [{**row, "advantages": [0.0] * len(row["response_ids"])} for row in rollout_rows(False)]
    rows[3]["advantages"][0] = 1.0
    (batch,) = collate_rollouts(rows, 1000)
    assert (len(batch), len(batch.responses.input_ids), batch.num_responses, batch.num_tokens) == (1, 5, 6, 16)
    (flat,) = collate_rollouts(rows[:3], 1000)  # a batch has a gradient, be it zero
    assert (len(flat), flat.num_responses, flat.num_tokens) == (1, 3, 8)
    assert len(collate_rollouts(rollout_rows(True), 1000)[0]) == 6


def test_a_token_that_the_sampler_found_likelier_weighs_less(model: str) -> None:
    """Truncated importance sampling: min(pi_old / sampler, cap)."""
    module = PpoLightningModule(model, sampler_cap=2.0)
    rows = rollout_rows(True)
    for row in rows:
        row["sampler_log_probs"] = [value + 0.5 for value in row["log_probs"]]
    rows[0]["sampler_log_probs"] = [value - 3.0 for value in rows[0]["log_probs"]]
    (part,) = collate_rollouts(rows, 1000)
    weights = module._sampler_weights(part)
    assert weights.tolist() == pytest.approx([2.0] * 3 + [math.exp(-0.5)] * 13)


def test_a_cap_needs_log_probs_token_by_token(model: str, rows: str, tmp_path: Path) -> None:
    class SumsAlone(ContinuousGenerator):
        def generate(self, *args: Any) -> Any:
            for index, response in super().generate(*args):
                yield index, Response(response.ids, response.finish_reason, response.log_prob)

    data = {"generator": SumsAlone(max_new_tokens=6)}
    with pytest.raises(UserError, match="SumsAlone gives their sum alone"):
        Run(model, rows, tmp_path / "a", module={"sampler_cap": 2.0}, data=data).play()
    Run(model, rows, tmp_path / "b", data=data, rollouts={"iterations": 1}).play()
    assert answers_of(tmp_path / "b", 0)[0]["sampler_log_probs"] is None


# --- resuming --------------------------------------------------------------------------------------------------------


class Breaks:
    """Has a method raise before or after its n-th call, until the first time it does."""

    def __init__(self, owner: Any, name: str, call: int, after: bool = False) -> None:
        self.owner, self.name, self.call, self.after = owner, name, call, after

    def __enter__(self) -> None:
        own, left = getattr(self.owner, self.name), [self.call]

        def breaking(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and not self.after:
                raise Stopped
            result = own(*args, **kwargs)
            if left[0] == 0:
                raise Stopped
            return result

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(self.owner, self.name, breaking)

    def __exit__(self, *args: Any) -> None:
        self.patch.undo()


#: Where a run of 3 iterations of 2 shards and 4 updates, and 2 evaluations besides the last, can be stopped.
STATES = {
    "in the held-out responses": Breaks(Vowels, "score", 1),
    "before a shard's rewards": Breaks(Vowels, "score", 5),
    "after a shard's rewards": Breaks(Vowels, "score", 5, after=True),
    "between two shards": Breaks(AnswerStore, "write_shard", 5, after=True),
    "between shards and manifest": Breaks(AnswerStore, "finish", 3),
    "before the first update": Breaks(PpoLightningModule, "training_step", 5),
    "in the middle of an epoch": Breaks(PpoLightningModule, "training_step", 6),
    "in the middle of an evaluated one": Breaks(PpoLightningModule, "training_step", 10),
    "between two epochs": Breaks(PpoLightningModule, "training_step", 7),
    "before an iteration's summary": Breaks(rollout_iteration, "write_json", 2),
    "between summary and checkpoint": Breaks(rollout_iteration, "write_json", 2, after=True),
    "in the last evaluation": Breaks(Rollouts, "finish", 1),
    "between export and the end": Breaks(Rollouts, "finish", 1, after=True),
}
QUICK = ["after a shard's rewards", "in the middle of an evaluated one", "between export and the end"]


def state_of(folder: Path) -> Any:
    tables = [answers_of(folder, number) for number in range(3)]
    held_out = [AnswerStore(folder / f"iteration_{number}" / "held_out").read().to_pylist() for number in (0, 2, 3)]
    return tables, held_out, without_seconds(read(folder / "rollouts.json"))


@pytest.mark.parametrize("every", [{"every_n_iterations": 2}, {"every_n_steps": 1}], ids=["iterations", "steps"])
@pytest.mark.parametrize(
    "state", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in STATES]
)
def test_it_continues_bit_for_bit_from_every_state(
    model: str, rows: str, tmp_path: Path, plain: Any, state: str, every: dict[str, int]
) -> None:
    first = Run(model, rows, tmp_path, checkpoint=every)
    with pytest.raises(Stopped), STATES[state]:
        first.play()
    second = Run(model, rows, tmp_path, checkpoint=every).play()
    assert weight_bits(second.module) == weight_bits(plain.module)
    assert {**first.recorder.losses, **second.recorder.losses} == plain.recorder.losses
    assert state_of(tmp_path) == state_of(plain.folder)
    assert not [*tmp_path.glob("*.set_aside")]
    # whatever was stored is not asked about again: at most a shard of two prompts is
    assert first.reward.asked + second.reward.asked <= plain.reward.asked + 4


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_it_continues_between_an_export_and_its_summary(
    model: str, rows: str, tmp_path: Path, plain: Any, after: bool
) -> None:
    each = {"rollouts": {"export_every": 1}, "checkpoint": {"every_n_iterations": 2}}
    with pytest.raises(Stopped), Breaks(export, "write_json", 2, after=after):
        Run(model, rows, tmp_path, **each).play()
    assert (tmp_path / "iteration_1" / "policy").exists()
    second = Run(model, rows, tmp_path, **each).play()
    assert weight_bits(second.module) == weight_bits(plain.module)
    assert state_of(tmp_path) == state_of(plain.folder)
    for number in range(3):
        assert load_file(tmp_path / f"iteration_{number}" / "critic.safetensors")["head"].any()


def test_after_a_kill_stored_responses_are_trained_on_again(model: str, rows: str, tmp_path: Path, plain: Any) -> None:
    every = {"every_n_iterations": 5}  # none before the end
    first = Run(model, rows, tmp_path, checkpoint=every)
    with pytest.raises(Stopped), Breaks(PpoLightningModule, "training_step", 11):
        first.play()
    assert not list(tmp_path.glob("checkpoints/*.ckpt")) and first.reward.asked == plain.reward.asked - 2
    second = Run(model, rows, tmp_path, checkpoint=every).play()
    assert second.reward.asked == 2 and weight_bits(second.module) == weight_bits(plain.module)  # the last evaluation


class Gold(Vowels):
    """What a column says."""

    columns = ("gold",)

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        super().score(answers)
        return [float(answer.column("gold")) for answer in answers]


def test_what_a_reward_reads_may_not_change_under_stored_rewards(model: str, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"

    def play(gold: float) -> None:
        data.write_text("".join(json.dumps({"prompt": f"{i}?", "real": "x", "gold": gold}) + "\n" for i in range(10)))
        Run(model, str(data), tmp_path / "run", rollouts={"reward": Gold(), "eval_every": 0}).play()

    with pytest.raises(Stopped), Breaks(AnswerStore, "write_shard", 1, after=True):
        play(0.0)
    with pytest.raises(UserError, match=r"what differs: columns_sha256"):
        play(1.0)
    play(0.0)


def test_another_future_sets_the_stored_one_aside(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a device that adds up in another order."""
    with pytest.raises(Stopped), Breaks(PpoLightningModule, "training_step", 11):
        Run(model, rows, tmp_path, checkpoint={"every_n_iterations": 5}).play()

    def nudge(trainer: L.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            module.policy.model.norm.weight.data[0] += 0.01

    Run(model, rows, tmp_path, last=[DoLast(on_train_batch_end=nudge)], checkpoint={"every_n_iterations": 5}).play()
    printed = capsys.readouterr().out
    assert "the weights at the start of iteration 1 are not those that made what is stored there" in printed
    assert "set aside iteration_1 to iteration_2, and made anew" in printed
    assert read(tmp_path / "rollouts.json")["ended_because"] == "all 3 iterations were played"
    assert (tmp_path / "iteration_1.set_aside").exists() and (tmp_path / "iteration_2.set_aside").exists()


# --- the critic ------------------------------------------------------------------------------------------------------


def test_in_the_warm_up_only_the_critic_learns(model: str, rows: str, tmp_path: Path) -> None:
    seen: dict[int, tuple[bytes, Any]] = {}

    def look(trainer: L.Trainer, module: Any, iteration: int, summary: Any) -> None:
        seen[iteration] = weight_bits(module.policy), module.critic_model.head.detach().clone()

    Run(model, rows, tmp_path, module={"critic_warmup": 2}, callbacks=[Do(on_iteration_end=look)]).play()
    assert seen[0][0] == seen[1][0] == weight_bits(load(model)) != seen[2][0]
    assert seen[0][1].any() and not torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_critic_of_its_own_has_a_learning_rate_of_its_own(
    model: str, rows: str, tmp_path: Path, precision: str
) -> None:
    settings = {"critic": model, "critic_learning_rate": 3e-4, "learning_rate": 1e-3}
    run = Run(model, rows, tmp_path, module=settings, trainer={"precision": precision}, rollouts={"iterations": 2})
    run.play()
    trunk = run.module.critic_model.trunk  # type: ignore[union-attr]
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    assert weight_bits(trunk) not in (weight_bits(load(model, dtype)), weight_bits(run.module.policy))
    assert [group["lr"] for group in run.trainer.optimizers[0].param_groups] == [1e-3, 3e-4]
    assert run.module.critic_model.head.dtype is torch.float32  # type: ignore[union-attr]
    assert "trunk.model.norm.weight" in load_file(tmp_path / "critic.safetensors")


def test_a_reward_model_becomes_a_critic(model: str, rows: str, tmp_path: Path) -> None:
    """Its folder has no head over tokens, and yet a run continues with the critic that it began with."""
    config = LlamaConfig.from_pretrained(model, num_labels=1, tie_word_embeddings=False)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    settings = {"critic": str(tmp_path / "reward"), "critic_learning_rate": 1e-3}
    first, second = (Run(model, rows, tmp_path / "run", module=settings, rollouts={"iterations": 1}) for _ in range(2))
    with pytest.raises(Stopped), Breaks(PpoLightningModule, "training_step", 2):
        first.play()
    second.play()
    trunk = second.module.critic_model.trunk  # type: ignore[union-attr]
    own = load_file(tmp_path / "reward" / "model.safetensors")
    assert not torch.equal(trunk.model.layers[0].mlp.up_proj.weight, own["model.layers.0.mlp.up_proj.weight"])
    assert not trunk.lm_head.weight.requires_grad
    assert "trunk.lm_head.weight" not in load_file(tmp_path / "run" / "critic.safetensors")


def test_group_advantages_have_no_critic(model: str, rows: str, tmp_path: Path) -> None:
    run = Run(model, rows, tmp_path, module={"advantage": LeaveOneOut()}, rollouts={"iterations": 1}).play()
    assert run.module.critic_model is None and not (tmp_path / "critic.safetensors").exists()
    assert {row["values"] for row in answers_of(tmp_path, 0)} == {None}


# --- what does not fit -----------------------------------------------------------------------------------------------


class Strange(Vowels):
    """None for one response in so many, or a number that is none."""

    def __init__(self, every: int = 3, says: str | None = None) -> None:
        super().__init__()
        self.every, self.says = every, says

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        scores = super().score(answers)
        says = None if self.says is None else float(self.says)
        return [says if place % self.every == 0 else score for place, score in enumerate(scores)]


def test_a_response_without_a_reward_is_left_out_and_counted(model: str, rows: str, tmp_path: Path) -> None:
    run = Run(model, rows, tmp_path, rollouts={"reward": Strange(), "iterations": 1, "shard_size": 9}).play()
    (summary,) = read(tmp_path / "rollouts.json")["iterations"]
    assert summary["pairs"]["reward/none"] == pytest.approx(2 / 6)
    assert sum(row["reward"] is None for row in answers_of(tmp_path, 0)) == 2
    assert any("have no reward" in sentence for _, sentence in run.health.remarks)


def test_a_reward_that_is_no_number_ends_the_run_in_a_sentence(model: str, rows: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the reward Strange"):
        Run(model, rows, tmp_path, rollouts={"reward": Strange(says="nan")}).play()


@pytest.mark.parametrize(("cut", "reward"), [(-0.5, -0.5), ("drop", None)])
def test_what_a_response_without_an_end_is_worth(
    model: str, rows: str, tmp_path: Path, cut: Any, reward: float | None
) -> None:
    run = Run(model, rows, tmp_path, rollouts={"cut": cut, "iterations": 1, "eval_every": 0})
    if cut == "drop":  # every response of this model is cut
        run.play()
        assert read(tmp_path / "rollouts.json")["ended_because"].startswith("every response was cut")
    else:
        run.play()
    assert {row["reward"] for row in answers_of(tmp_path, 0)} == {reward}
    assert run.reward.asked == 0


class SumsAlone(ContinuousGenerator):
    gives_token_log_probs = False


class WholeOnly(Vowels):
    judges_cut = False  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"generator": ContinuousGenerator(max_new_tokens=6, temperature=0.7)}}, "temperature 1 and top_p 1"),
        ({"data": {"answers_per_prompt": 1}, "module": {"advantage": LeaveOneOut()}}, "LeaveOneOut compares the"),
        ({"module": {"advantage": LeaveOneOut(), "critic_warmup": 1}}, "LeaveOneOut has none"),
        (
            {"data": {"generator": SumsAlone(max_new_tokens=6)}, "module": {"sampler_cap": 2.0}},
            "SumsAlone gives their sum alone",
        ),
        ({"module": {"advantage": "gae"}}, r"model\.advantage must be an Advantage, got 'gae'"),
        ({"module": {"beta": -0.1}}, r"model\.beta must be 0 or positive, got -0\.1"),
        ({"module": {"clip": 1.5}}, r"model\.clip must be between 0 and 1, got 1\.5"),
        ({"module": {"learning_rate": [1e-3, 1e-4]}}, "its schedule spans the run"),
        ({"module": {"average": "answer"}}, r"model\.average must be token or response, got 'answer'"),
        ({"module": {"critic": "/nowhere/at/all"}}, "/nowhere/at/all"),
        ({"rollouts": {"reward": WholeOnly()}}, "it cannot score one that was cut. Set rollouts.cut to drop"),
        (
            {"rollouts": {"reward": SumOfRewards({"a": WholeOnly()})}},
            "SumOfRewards never saw a response without an end",
        ),
        ({"rollouts": {"reward": NumberMatch()}, "rows": "prompts"}, "NumberMatch can judge nothing"),
        ({"rollouts": {"reward": None}}, r"rollouts\.reward is missing"),
        ({"rollouts": {"cut": "never"}}, r"rollouts\.cut must be score, drop or a number, got 'never'"),
        ({"rollouts": {"prompts": 0}}, r"rollouts\.prompts must be at least 1, got 0"),
        ({"rollouts": {"eval_every": -1}}, "eval_every and export_every must be 0 or more, got -1"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_a_model_is_loaded(
    model: str, rows: str, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    given = dict(settings)
    if given.pop("rows", None):
        rows = str(tmp_path / "prompts.jsonl")
        Path(rows).write_text("".join(json.dumps({"prompt": f"{number}?"}) + "\n" for number in range(9)))

    def play() -> None:
        run = Run(model, rows, tmp_path, **given)
        run.module.configure_model = lambda: pytest.fail("a model was loaded")  # type: ignore[method-assign]
        run.play()

    with pytest.raises(UserError, match=message):
        play()


def test_another_module_is_refused(model: str, rows: str, tmp_path: Path) -> None:
    run = Run(model, rows, tmp_path)
    with pytest.raises(UserError, match="Rollouts plays with a PpoLightningModule, got SpinLightningModule"):
        run.trainer.fit(SpinLightningModule(model), run.data)
    run = Run(model, rows, tmp_path)
    alone = L.Trainer(**QUIET, max_epochs=1)
    with pytest.raises(UserError, match="PpoLightningModule needs the Rollouts callback"):
        alone.fit(run.module, run.data)


def test_stale_responses_are_caught_at_the_first_step(model: str, rows: str, tmp_path: Path) -> None:
    with pytest.raises(Stopped), Breaks(PpoLightningModule, "training_step", 1):
        Run(model, rows, tmp_path).play()
    store = AnswerStore(tmp_path / "iteration_0" / "answers")
    patch = pytest.MonkeyPatch()
    own = AnswerStore.read

    def read_other(self: AnswerStore, columns: list[str] | None = None) -> Any:
        table = own(self, columns).to_pylist()
        return pa.Table.from_pylist([{**row, "log_probs": [x - 0.1 for x in row["log_probs"]]} for row in table])

    assert store.is_complete
    patch.setattr(AnswerStore, "read", read_other)
    with pytest.raises(UserError, match=r"iteration 0 does not start where it should.*stale responses"):
        Run(model, rows, tmp_path).play()
    patch.undo()
    Run(model, rows, tmp_path, rollouts={"iterations": 3}).play()


def test_dropout_is_named_at_the_first_step(rows: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", attention_dropout=0.5)
    with pytest.raises(UserError, match="the policy is random"):
        Run(folder, rows, tmp_path / "run", module={"dropout": True}).play()


# --- several processes ----------------------------------------------------------------------------------------------


def play_in_processes(model: str, rows: str, folder: Path, strategy: str = "") -> None:
    several = {"devices": 2, "strategy": strategy} if strategy else {}
    settings = {"advantage": Gae(0.95), "learning_rate": 1e-3, "value_scale": 1.0}
    Run(model, rows, folder, module=settings, data={"micro_batch_tokens": 64}, trainer=several).play()


@thorough
def test_two_processes_learn_what_one_does(model: str, rows: str, tmp_path: Path) -> None:
    play_in_processes(model, rows, tmp_path / "one")
    assert together(tmp_path, play_in_processes, model, rows, tmp_path / "two", "ddp").codes == [0, 0]
    tables = [[answers_of(tmp_path / name, number) for number in range(3)] for name in ("one", "two")]
    for mine, theirs in zip(*tables, strict=True):
        assert [row["response_ids"] for row in mine] == [row["response_ids"] for row in theirs]
        assert [row["reward"] for row in mine] == [row["reward"] for row in theirs]
        for row, other in zip(mine, theirs, strict=True):
            assert row["values"] == pytest.approx(other["values"], abs=1e-4)
    one, two = (load(tmp_path / name / "policy").state_dict() for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=0)
