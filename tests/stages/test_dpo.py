"""DPO: the loss and gradient of an independent oracle, the optimum of the theory, exact resumes, and bad input."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from games import Do, DoLast, Recorder, Stopped, read, weight_bits, without_seconds
from helpers import QUIET, load
from several import thorough, together
from torch import Tensor
from torch.nn import functional as F

from spin_lightning import (
    AlphaSpinLoss,
    AtomicCheckpointIO,
    DpoLightningModule,
    DpopLoss,
    IpoLoss,
    LengthNormalizedLoss,
    LoraAdapter,
    PairLoss,
    PreferenceDataModule,
    RecordedPairs,
    RowDataModule,
    RunCheckpoint,
    SpinLoss,
    last_checkpoint,
)
from spin_lightning.cli import main
from spin_lightning.losses import with_preference
from spin_lightning.stages.dpo import PreferenceStore
from spin_lightning.types import PairLogProbs, UserError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten pairs, two of them of one prompt, some with a preference below 1."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"{n // 2 if n < 2 else n}+1?", "chosen": str(n + 1), "rejected": f"it is {n}", "preference": p}
        for n, p in enumerate([1.0, 0.7, 1.0, 0.2, 1.0, 1.0, 0.9, 1.0, 1.0, 0.5])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(
    model: Any,
    pairs: str,
    folder: Path,
    *callbacks: Any,
    module: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **trainer: Any,
) -> tuple[L.Trainer, DpoLightningModule, Recorder]:
    """Train or continue, as the command line does."""
    policy, recorder = DpoLightningModule(model, **{"learning_rate": 1e-2, **(module or {})}), Recorder()
    rows = PreferenceDataModule(pairs, **{"batch_size": 4, "val_fraction": 0.2, **(data or {})})
    settings: dict[str, Any] = {
        **QUIET,
        "max_epochs": 2,
        "reload_dataloaders_every_n_epochs": 1,
        "num_sanity_val_steps": -1,
        "plugins": [AtomicCheckpointIO()],
        "callbacks": [RecordedPairs(str(folder), shard_size=3), recorder, RunCheckpoint(every_n_steps=1), *callbacks],
    }
    made = L.Trainer(**{**settings, **trainer})
    made.fit(policy, rows, ckpt_path=last_checkpoint(folder))
    return made, policy, recorder


# --- The loss against an oracle ---------------------------------------------------------------------------------------


def log_prob(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Of one response, from a plain forward pass over prompt and response."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), list(response)].sum()


#: Each loss, and by hand its value for log-ratios of both responses.
ORACLES: dict[str, tuple[PairLoss, Callable[..., Tensor]]] = {
    "dpo": (SpinLoss(), lambda r, s, lengths, beta: -F.logsigmoid(beta * (r - s))),
    "hinge": (SpinLoss(link="hinge"), lambda r, s, lengths, beta: F.relu(1 - beta * (r - s))),
    "ipo": (IpoLoss(), lambda r, s, lengths, beta: (r - s - 1 / (2 * beta)) ** 2),
    "dpop": (
        DpopLoss(penalty_weight=5.0),
        lambda r, s, lengths, beta: -F.logsigmoid(beta * (r - s - 5.0 * torch.clamp(-r, min=0))),
    ),
    "length": (
        LengthNormalizedLoss(),
        lambda r, s, lengths, beta: -F.logsigmoid(beta * (r / lengths[0] - s / lengths[1])),
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_loss_and_gradient_are_those_of_plain_passes_over_separate_rows(
    name: str, model: str, pairs: str, tmp_path: Path
) -> None:
    loss, oracle = ORACLES[name]
    start, found = load(model, torch.float64), []

    def compare(trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        policy = copy.deepcopy(module.policy).eval()
        data = trainer.datamodule  # type: ignore[attr-defined]
        losses = []
        for pair in module._update.batches[0][0].pair_ids.tolist():
            prompt = data.prompts[pair]
            sides = (prompt.real_ids, prompt.rejected_ids)
            with torch.no_grad():
                reference = [log_prob(start, prompt.prompt_ids, side) for side in sides]
            r, s = (log_prob(policy, prompt.prompt_ids, side) - of for side, of in zip(sides, reference, strict=True))
            (n, k), p = map(len, sides), prompt.row.preference
            losses.append(p * oracle(r, s, (n, k), 0.3) + (1 - p) * oracle(s, r, (k, n), 0.3))
        mean = torch.stack(losses).mean()
        policy.zero_grad()
        mean.backward()
        of_module = [weight.grad for weight in module.policy.parameters()]
        differences = [
            float((a - b.grad).abs().max()) / max(float(b.grad.abs().max()), 1e-3)
            for a, b in zip(of_module, policy.parameters(), strict=True)
        ]
        error = abs(float(module.update_loss) - float(mean.detach())) / max(1.0, float(mean.detach()))
        found.append((error, max(differences)))

    # stored log-probs have 32 bits
    train(
        model, pairs, tmp_path, Do(on_before_optimizer_step=compare), precision="64-true", max_epochs=3,
        module={"loss": loss, "beta": 0.3, "optimizer": torch.optim.SGD},
    )  # fmt: skip
    compared = found[name == "dpop" :]  # whose penalty has a kink where the run begins
    assert len(found) == 6 and max(difference for pair in compared for difference in pair) < 2e-5, found


def test_the_first_loss_is_ln_2_and_stored_pairs_have_the_reference_log_probs(
    model: str, pairs: str, tmp_path: Path
) -> None:
    trainer, module, recorder = train(model, pairs, tmp_path)
    assert recorder.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    store, start, data = PreferenceStore(tmp_path / "pairs"), load(model), trainer.datamodule  # type: ignore[attr-defined]
    table = store.read().to_pylist()
    assert [(row["real_ids"], row["generated_ids"]) for row in table] == [
        (prompt.real_ids, prompt.rejected_ids) for prompt in data.prompts
    ]
    for row in table:
        for side in ("real", "generated"):
            expected = float(log_prob(start, row["prompt_ids"], row[f"{side}_ids"]).detach())
            assert row[f"opponent_{side}_log_prob"] == pytest.approx(expected, abs=1e-4)
    assert [row["preference"] for row in table] == [prompt.row.preference for prompt in data.prompts]
    assert weight_bits(load(tmp_path / "policy")) == weight_bits(module.policy)
    summary = read(tmp_path / "summary.json")
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert summary["last_loss"] < summary["first_loss"]
    assert summary["pairs"]["pairs"] == 8 and summary["updates"] == 4


def test_held_out_pairs_are_judged_by_the_same_loss(model: str, pairs: str, tmp_path: Path) -> None:
    trainer, module, _ = train(model, pairs, tmp_path, module={"beta": 0.3})
    start, policy, losses, margins = load(model), module.policy.eval(), [], []
    for prompt in trainer.datamodule.val_prompts:  # type: ignore[attr-defined]
        with torch.no_grad():
            r, s = (
                log_prob(policy, prompt.prompt_ids, side) - log_prob(start, prompt.prompt_ids, side)
                for side in (prompt.real_ids, prompt.rejected_ids)
            )
        p, margin = prompt.row.preference, 0.3 * (r - s)
        losses.append(float(-p * F.logsigmoid(margin) - (1 - p) * F.logsigmoid(-margin)))
        margins.append(float(margin))
    held_out = read(tmp_path / "summary.json")["held_out"]
    assert held_out["loss"] == pytest.approx(sum(losses) / 2, abs=1e-4)
    assert held_out["margin"] == pytest.approx(sum(margins) / 2, abs=1e-4)
    assert held_out["accuracy"] == sum(margin > 0 for margin in margins) / 2
    assert "val/loss" not in read(tmp_path / "start.json")  # nobody has scored them then


# --- What the loss leads to -------------------------------------------------------------------------------------------


def minimised(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """By Newton's method, for a convex function."""
    point = start
    for _ in range(50):
        gradient = torch.autograd.functional.jacobian(objective, point)
        hessian = torch.autograd.functional.hessian(objective, point)
        point = point - torch.linalg.solve(hessian, gradient)
        if float(gradient.abs().max()) < 1e-15:
            break
    return point


def test_population_dpo_on_bradley_terry_pairs_lands_on_the_optimum_of_the_kl_objective() -> None:
    """All 40 responses of up to 3 of 3 letters; ``pi* = pi_ref exp(r / beta) / Z``, from preferences alone."""
    generator = torch.Generator().manual_seed(0)
    size, beta = sum(3**n for n in range(4)), 0.5
    left, right = torch.triu_indices(size, size, 1)
    lengths = torch.ones(len(left), dtype=torch.long)
    for _ in range(2):  # prompts
        reference = torch.randn(size, generator=generator, dtype=torch.float64).log_softmax(0)
        reward = torch.randn(size, generator=generator, dtype=torch.float64)
        is_better = reward[left] >= reward[right]
        real, generated = torch.where(is_better, left, right), torch.where(is_better, right, left)
        preference = torch.sigmoid(reward[real] - reward[generated])
        weights = (reference[real] + reference[generated]).exp()

        def loss_of(free: Tensor) -> Tensor:
            policy = torch.cat([free, free.new_zeros(1)]).log_softmax(0)
            sides = [
                PairLogProbs(of[real], of[generated], lengths, lengths)  # noqa: B023
                for of in (policy, reference)  # noqa: B023
            ]
            return weights @ with_preference(SpinLoss(), preference, *sides, beta).losses  # noqa: B023

        free = minimised(loss_of, reference[:-1] - reference[-1])
        policy = torch.cat([free, free.new_zeros(1)]).log_softmax(0)
        optimum = (reference + reward / beta).log_softmax(0)
        assert float((reference.exp() * (reference - optimum)).sum()) > 0.5  # where it began
        assert abs(float((policy.exp() * (policy - optimum)).sum())) < 1e-12


def pair_of(real: Tensor, generated: Tensor) -> PairLogProbs:
    return PairLogProbs(real, generated, torch.tensor([2]), torch.tensor([3]))


def test_a_preference_of_seven_tenths_is_least_at_its_logit_and_one_changes_nothing() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    reference, best = pair_of(zero, zero), math.log(0.7 / 0.3)
    assert best == pytest.approx(0.847298, abs=1e-6)
    margin = torch.tensor([best], dtype=torch.float64, requires_grad=True)
    preference = torch.tensor([0.7], dtype=torch.float64)
    (loss,) = with_preference(SpinLoss(), preference, pair_of(margin, zero), reference, 1.0).losses
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.610864, abs=1e-6) and abs(float(margin.grad)) < 1e-12  # type: ignore[arg-type]
    # zero times a loss that overflows is no number, so certain pairs are left alone
    far = pair_of(torch.tensor([500.0]), torch.tensor([-500.0]).requires_grad_())
    certain = with_preference(SpinLoss(link="exponential"), torch.ones(1), far, reference, 1.0).losses
    assert torch.equal(certain, SpinLoss(link="exponential")(far, reference, 1.0).losses)


@pytest.mark.parametrize("loss", [IpoLoss(), DpopLoss(), LengthNormalizedLoss(), AlphaSpinLoss(0.5)])
def test_soft_labels_are_the_expectation_of_any_loss_over_labels(loss: PairLoss) -> None:
    policy, reference = (
        pair_of(torch.tensor([-3.0]), torch.tensor([-4.0])),
        pair_of(torch.tensor([-5.0]), torch.tensor([-3.5])),
    )
    swapped = [PairLogProbs(of.generated, of.real, of.generated_lengths, of.real_lengths) for of in (policy, reference)]
    expected = 0.8 * loss(policy, reference, 0.3, reference).losses + 0.2 * loss(*swapped, 0.3, swapped[1]).losses
    found = with_preference(loss, torch.tensor([0.8]), policy, reference, 0.3, reference)
    assert torch.allclose(found.losses, expected) and found.real_rewards.shape == (1,)


# --- Stopped and continued --------------------------------------------------------------------------------------------


def stop_at(trainer: L.Trainer, number: int) -> None:
    if trainer.global_step == number:
        raise Stopped


def test_a_run_stopped_anywhere_continues_bit_by_bit(
    model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(model, pairs, tmp_path / "whole")
    expected = without_seconds(read(tmp_path / "whole" / "summary.json"))
    places: dict[str, Any] = {
        f"update {n}": DoLast(on_train_batch_end=lambda t, *_, n=n: stop_at(t, n)) for n in range(1, 5)
    }
    for hook in ("on_train_epoch_end", "on_train_end"):
        places[hook] = DoLast(**{hook: lambda *_: (_ for _ in ()).throw(Stopped)})
    write = PreferenceStore.write_shard

    def write_and_stop(self: PreferenceStore, name: str, rows: Any) -> None:
        write(self, name, rows)
        if next(shards) == 2:  # one of the held-out pairs, one of the others
            raise Stopped

    for name, stop in {"scoring": None, **places}.items():
        folder, shards = tmp_path / name.replace(" ", "_"), iter(range(1, 99))
        if stop is None:
            monkeypatch.setattr(PreferenceStore, "write_shard", write_and_stop)
        with pytest.raises(Stopped):
            train(model, pairs, folder, *([stop] if stop else []))
        monkeypatch.undo()
        before = {str(path): path.stat().st_mtime_ns for path in folder.glob("*/*.parquet")}
        _, module, recorder = train(model, pairs, folder)
        assert weight_bits(module.policy) == weight_bits(whole[1].policy), name
        assert recorder.losses == {n: whole[2].losses[n] for n in recorder.losses}, name
        assert without_seconds(read(folder / "summary.json")) == expected, name
        after = {str(path): path.stat().st_mtime_ns for path in folder.glob("*/*.parquet")}
        assert before.items() <= after.items() and len(before) >= 2, name  # nothing is scored twice


def test_other_pairs_or_another_model_do_not_continue_a_run(model: str, pairs: str, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(model, pairs, tmp_path / "run", DoLast(on_train_batch_end=lambda t, *_: stop_at(t, 2)))
    other = tmp_path / "other.jsonl"
    other.write_text(Path(pairs).read_text().replace('"preference": 0.7', '"preference": 0.8'))
    with pytest.raises(UserError, match=r"data\.(prompts|held_out)_sha256: "):
        train(model, str(other), tmp_path / "run")
    with pytest.raises(UserError, match=r"trainer\.max_epochs: 2 -> 3"):
        train(model, pairs, tmp_path / "run", max_epochs=3)
    manifest = tmp_path / "run" / "pairs_manifest.json"
    manifest.write_text(manifest.read_text().replace(" ", "  "))
    with pytest.raises(UserError, match="are not those that iteration 0 began with"):
        train(model, pairs, tmp_path / "run")


def test_an_adapter_is_trained_and_exported_merged_and_apart(model: str, pairs: str, tmp_path: Path) -> None:
    adapter = {"adapter": LoraAdapter(r=2)}
    trainer, module, recorder = train(model, pairs, tmp_path / "run", module=adapter)
    assert recorder.losses[0] == pytest.approx(math.log(2), abs=1e-5) and recorder.losses[3] < recorder.losses[0]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    prompt = trainer.datamodule.prompts[0]  # type: ignore[attr-defined]
    merged, start = load(tmp_path / "run" / "policy"), load(model)
    with torch.no_grad():
        values = [
            float(log_prob(of, prompt.prompt_ids, prompt.real_ids)) for of in (merged, module.policy.eval(), start)
        ]
    assert values[0] == pytest.approx(values[1], abs=1e-3) and abs(values[0] - values[2]) > 1e-2
    stop = DoLast(on_train_batch_end=lambda t, *_: stop_at(t, 3))
    with pytest.raises(Stopped):
        train(model, pairs, tmp_path / "again", stop, module={"adapter": LoraAdapter(r=2)})
    _, continued, _ = train(model, pairs, tmp_path / "again", module={"adapter": LoraAdapter(r=2)})
    assert weight_bits(continued.policy) == weight_bits(module.policy)


# --- As a user gives it -----------------------------------------------------------------------------------------------


def args(model: str, pairs: str, folder: Path, *flags: str) -> list[str]:
    return [
        "dpo", f"--model.model_name_or_path={model}", f"--data.train_data={pairs}", f"--export.output_dir={folder}",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.batch_size=4", *flags,
    ]  # fmt: skip


def test_the_command_says_what_it_learned_from_and_is_over_when_it_is(
    model: str, pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = args(model, pairs, tmp_path / "run", "--model.learning_rate=0.003")
    main(command)
    printed = capsys.readouterr().out
    assert "1 prefer the second answer, which was made the first" in printed
    assert re.search(r"pairs to train on, [34] of them with a preference below 1; chosen responses have", printed)
    assert "health: the shorter answer is the better one in" in printed
    assert f"the model is in {tmp_path / 'run'}/policy" in printed
    settings = read(tmp_path / "run" / "run.json")["settings"]
    assert (settings["model.beta"], settings["trainer.max_epochs"], settings["export.shard_size"]) == (0.1, 1, 1024)
    main(command)
    assert "is over; its models are in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"prompt": "q", "chosen": "a"}], [], "A row of preferences needs two answers to one prompt"),
        ([{"prompt": "q", "completion": "a"}], [], "expected for(.|\n)*chosen_rejected: chosen, rejected"),
        ([{"prompt": "q", "chosen": "a", "rejected": "a"}], [], r"all 1 rows .* same_answers 1"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b", "preference": -1}], [], "from 0 to 1, got -1.0"),
        (None, ["--trainer.max_epochs=0"], r"trainer\.max_epochs must be at least 1, got 0"),
        (None, ["--trainer.max_steps=3"], r"trainer\.max_steps cannot be used here, got 3"),
        (None, ["--model.beta=0"], r"model\.beta must be positive, got 0"),
        (None, ["--self_play.iterations=2"], "The section self_play is of spin-lightning fit; this is dpo"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    rows: Any, flags: list[str], message: str, model: str, pairs: str, tmp_path: Path, refusal: Any
) -> None:
    if rows is not None:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs = str(path)
    printed = refusal(args(model, pairs, tmp_path / "run", "--data.val_fraction=0", *flags))
    assert re.search(message, printed), printed
    assert not (tmp_path / "run").exists()


def test_it_needs_its_clock_and_its_data(model: str, pairs: str, rows: str) -> None:
    with pytest.raises(UserError, match="DpoLightningModule needs the RecordedPairs callback"):
        L.Trainer(**QUIET, max_epochs=1).fit(DpoLightningModule(model), PreferenceDataModule(pairs, batch_size=2))
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=[RecordedPairs()])
    with pytest.raises(UserError, match="RecordedPairs needs a PreferenceDataModule, got RowDataModule"):
        trainer.fit(DpoLightningModule(model), RowDataModule(rows, batch_size=2))


def test_a_game_and_then_dpo_on_its_own_pairs(model: str, rows: str, tmp_path: Path) -> None:
    cap = "--data.generator.max_new_tokens=5"
    game = [
        "fit", f"--model.model_name_or_path={model}", f"--data.train_data={rows}", cap, "--self_play.iterations=1",
        f"--self_play.output_dir={tmp_path / 'spin'}", "--self_play.epochs=1", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--data.batch_size=4",
    ]  # fmt: skip
    main(game)
    folder = tmp_path / "spin" / "iteration_0"
    main(args(str(folder / "policy"), str(folder / "pairs"), tmp_path / "dpo", "--data.max_response_tokens=5"))
    assert read(tmp_path / "dpo" / "summary.json")["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    recorded = PreferenceStore(tmp_path / "dpo" / "pairs").read(["generated_finish_reason"]).to_pylist()
    assert {row["generated_finish_reason"] for row in recorded} <= {"stop", "length"}


def test_the_python_of_the_docs_trains_a_policy(
    model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "dpo.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for name, value in {"runs/sft/policy": model, "my_pairs.jsonl": pairs, "runs/dpo": str(tmp_path / "run")}.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(value))
    monkeypatch.chdir(tmp_path)  # where Lightning logs
    exec(compile(code, "docs/dpo.md", "exec"), {})
    assert read(tmp_path / "run" / "summary.json")["updates"] == 2  # 10 pairs


# --- Several processes ------------------------------------------------------------------------------------------------


def train_in_float64(model: str, pairs: str, folder: Path, **trainer: Any) -> None:
    losses: list[float] = []
    note = Do(on_train_batch_end=lambda made, module, *_: losses.append(float(module.update_loss)))
    made, module, _ = train(
        model, pairs, folder, note, precision="64-true", data={"micro_batch_tokens": 60}, **trainer
    )  # two passes in a batch
    (folder / f"losses_{made.global_rank}.json").write_text(json.dumps(losses))
    (folder / f"weights_{made.global_rank}").write_bytes(weight_bits(module.gather_policy()))


def train_by_two(model: str, pairs: str, folder: Path, strategy: str) -> None:
    train_in_float64(model, pairs, folder, devices=2, strategy=strategy)


@thorough
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_score_and_train_as_one_does(strategy: str, model: str, pairs: str, tmp_path: Path) -> None:
    train_in_float64(model, pairs, tmp_path / "one")
    ended = together(tmp_path, train_by_two, model, pairs, tmp_path / "two", strategy)
    assert ended.codes == [0, 0], ended.printed
    one = json.loads((tmp_path / "one" / "losses_0.json").read_text())
    for rank in (0, 1):
        assert json.loads((tmp_path / "two" / f"losses_{rank}.json").read_text()) == pytest.approx(one, abs=1e-6, rel=0)
    stores = [PreferenceStore(tmp_path / name / "pairs").read().to_pylist() for name in ("one", "two")]
    assert len(stores[0]) == 8
    for a, b in zip(*stores, strict=True):
        assert {key: value for key, value in a.items() if "log_prob" not in key} == {
            key: value for key, value in b.items() if "log_prob" not in key
        }
        assert a["opponent_real_log_prob"] == pytest.approx(b["opponent_real_log_prob"], abs=1e-9)
    summaries = [read(tmp_path / name / "summary.json") for name in ("one", "two")]
    assert summaries[1]["held_out"] == pytest.approx(summaries[0]["held_out"], abs=1e-5)
    weights = [
        torch.frombuffer(bytearray((tmp_path / name).read_bytes()), dtype=torch.float64)
        for name in ("one/weights_0", "two/weights_0", "two/weights_1")
    ]
    assert torch.equal(weights[1], weights[2]) and float((weights[0] - weights[1]).abs().max()) < 1e-5
