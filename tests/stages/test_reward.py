"""Reward models: what is trained, what is measured, what is exported, and what a kill leaves of it."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from games import Do, DoLast, Recorder, Stopped, moments_of, read, weight_bits, without_seconds
from helpers import QUIET, args_of, load
from lightning import Trainer
from several import together
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, CohereConfig, CohereForCausalLM

from spin_lightning import (
    AtomicCheckpointIO,
    ExportRewardModel,
    LoraAdapter,
    ModelReward,
    PreferenceDataModule,
    RewardLightningModule,
    RowDataModule,
    RunCheckpoint,
    UserError,
    last_checkpoint,
)
from spin_lightning.cli.commands import main
from spin_lightning.models.reward_model import score_padded
from spin_lightning.rewards import Answer, scored
from spin_lightning.stages.reward import measure


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten sums, right and wrong, of several lengths; two share a prompt, some are doubtful, some have a margin."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": f"{a}+{a + 1}?", "chosen": str(2 * a + 1), "rejected": "no" * (a % 3) + str(2 * a + 2)}
        for a in range(9)
    ]
    rows.append({"prompt": "3+4?", "chosen": "It is 7.", "rejected": "8"})
    for number, row in enumerate(rows):
        row |= {"preference": 0.7 if number % 4 == 1 else 1.0, "margin": 0.5 if number % 3 == 2 else 0.0}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_of(pairs: str, **settings: Any) -> PreferenceDataModule:
    return PreferenceDataModule(pairs, **{"batch_size": 2, "val_fraction": 0.2, "too_long": "drop", **settings})


def fit(
    model: Any,
    data: Any,
    folder: Path,
    callbacks: Sequence[Any] = (),
    module: dict[str, Any] | None = None,
    **trainer: Any,
) -> tuple[Any, Recorder]:
    """Train or continue a reward model, as the command line does."""
    trained = RewardLightningModule(model, **{"learning_rate": 1e-2, **(module or {})})
    recorder = Recorder()
    settings: dict[str, Any] = {
        **QUIET,
        "max_epochs": 2,
        "num_sanity_val_steps": -1,
        "reload_dataloaders_every_n_epochs": 1,
        "plugins": [AtomicCheckpointIO()],
        "callbacks": [
            ExportRewardModel(str(folder)),
            recorder,
            RunCheckpoint(str(folder / "checkpoints"), every_n_steps=1),
            *callbacks,
        ],
    }
    Trainer(**{**settings, **trainer}).fit(trained, data, ckpt_path=last_checkpoint(folder))
    return trained, recorder


# --- What is trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_tokens", [1, 60, 1000])
def test_the_first_two_updates_are_those_of_plain_rows(
    micro_batch_tokens: int, model: str, pairs: str, tmp_path: Path
) -> None:
    """Both responses and their prompt in one pass; there one row at a time, by the whole formula, in float64."""
    gradients: list[dict[str, torch.Tensor]] = []
    keep = Do(
        on_before_optimizer_step=lambda trainer, module, *_: gradients.append(
            {name: weight.grad.clone() for name, weight in module.policy.named_parameters()}
        )
    )
    data = data_of(pairs, batch_size=8, micro_batch_tokens=micro_batch_tokens)
    settings = {"centring": 0.05, "optimizer": torch.optim.SGD, "lr_schedule": "constant", "warmup_ratio": 0.0}
    _, recorder = fit(model, data, tmp_path, [keep], settings, precision="64-true")
    reference = load(model, torch.float64)
    head = torch.zeros(16, dtype=torch.float64, requires_grad=True)

    def score(prompt: list[int], response: list[int]) -> torch.Tensor:
        output = reference(torch.tensor([prompt + response]), output_hidden_states=True, use_cache=False)
        return output.hidden_states[-1][0, -1] @ head

    weights = {**dict(reference.named_parameters()), "score.weight": head}
    for update in range(2):
        total: Any = 0.0
        for prompt in data.prompts:
            assert prompt.rejected_ids is not None
            p, margin = prompt.row.preference, prompt.row.margin
            real, generated = (score(prompt.prompt_ids, ids) for ids in (prompt.real_ids, prompt.rejected_ids))
            lead = real - generated - margin
            total = total - p * F.logsigmoid(lead) - (1 - p) * F.logsigmoid(-lead) + 0.05 * (real + generated) ** 2
        loss = total / len(data.prompts)
        found = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))
        assert recorder.losses[update] == pytest.approx(loss.item(), rel=1e-9)
        for name, gradient in gradients[update].items():
            expected = found[name] if found[name] is not None else torch.zeros_like(gradient)
            torch.testing.assert_close(gradient.flatten(), expected.flatten(), rtol=1e-4, atol=1e-9, msg=name)
        with torch.no_grad():
            for name, weight in weights.items():
                if found[name] is not None:
                    weight -= 1e-2 * found[name]
    assert sorted({prompt.row.preference for prompt in data.prompts}) == [0.7, 1.0]
    assert sorted({prompt.row.margin for prompt in data.prompts}) == [0.0, 0.5]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_the_first_loss_is_ln_2_and_it_learns(precision: Any, model: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{a}+1?", "chosen": "yes", "rejected": "no"} for a in range(12)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module, recorder = fit(model, data_of(str(path)), tmp_path / "run", precision=precision, max_epochs=4)
    assert recorder.losses[0] == pytest.approx(math.log(2), abs=1e-7)
    assert module.held_out["accuracy"] == 1.0 and module.held_out["loss"] < 0.5
    summary = read(tmp_path / "run" / "summary.json")
    assert summary["first_loss"] == recorder.losses[0] and summary["val_accuracy"] == 1.0
    assert summary["val_longer_wins"] == 1.0 and summary["val_length_correlation"] > 0.9  # and so would a ruler


def test_scores_that_are_not_zero_at_first_end_a_run(model: str, pairs: str, tmp_path: Path) -> None:
    def damage(trainer: Any, module: Any) -> None:
        with torch.no_grad():
            module.policy.model.norm.weight[0] = math.inf

    with pytest.raises(UserError, match="every score must be 0 at its first step, and one is nan"):
        fit(model, data_of(pairs), tmp_path / "run", [Do(on_train_start=damage)])


def test_a_module_may_be_trained_twice(model: str, pairs: str, tmp_path: Path) -> None:
    """Its second fit begins with the scores that the first one left."""
    module = RewardLightningModule(model, learning_rate=1e-2)
    for _ in range(2):
        recorder = Recorder()
        Trainer(max_epochs=2, callbacks=[recorder], enable_checkpointing=False, **QUIET).fit(module, data_of(pairs))
    assert recorder.losses[0] != pytest.approx(math.log(2), abs=1e-4)


# --- What is measured -----------------------------------------------------------------------------------------------


def test_what_scores_say_by_hand() -> None:
    """Three pairs: won, lost, tied. The longer response is the better one, the other one, neither."""
    found = measure(
        torch.tensor(
            [[0, 1, 2], [2.0, -1.0, 0.5], [1.0, 0.0, 0.5], [4, 2, 3], [2, 4, 3], [0.3, 1.3, 0.7]], dtype=torch.float64
        )
    )
    assert found["accuracy"] == 0.5 and found["longer_wins"] == 0.5 and found["pairs"] == 3
    assert found["loss"] == pytest.approx(2.3 / 3)
    assert found["shift"] == pytest.approx(0.5)  # of 2, 1, -1, 0, 1/2, 1/2
    assert found["scale"] == pytest.approx((5 / 6) ** 0.5)  # squares 2.25, .25, 2.25, .25, 0, 0
    # lengths 4, 2, 3, 2, 4, 3 less 3: products 1.5, -1.5, 0 | -.5, -.5, 0
    lengths = [(2.0, 4), (-1.0, 2), (0.5, 3), (1.0, 2), (0.0, 4), (0.5, 3)]
    covariance = sum((score - 0.5) * (length - 3) for score, length in lengths) / 6
    assert found["length_correlation"] == pytest.approx(covariance / ((5 / 6) ** 0.5 * (4 / 6) ** 0.5))
    flat = measure(torch.tensor([[0], [0.0], [0.0], [3], [3], [0.7]], dtype=torch.float64))
    assert (flat["accuracy"], flat["scale"], flat["length_correlation"]) == (0.5, 1.0, 0.0)
    one = measure(torch.tensor([[0], [2.0001], [2.0], [3], [4], [0.7]], dtype=torch.float64))
    assert (one["shift"], one["scale"]) == (pytest.approx(2.00005), 1.0)  # one pair tells no deviation
    alike = [[0, 1], [0.0, 1e-8], [0.0, 0.0], [3, 3], [3, 3], [0.7, 0.7]]
    assert measure(torch.tensor(alike, dtype=torch.float64))["scale"] == 1.0


def test_the_summary_says_what_the_exported_model_does(
    model: str, pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_of(pairs, val_fraction=0.4)
    module, _ = fit(model, data, tmp_path)
    reward = ModelReward(str(tmp_path / "reward_model"))
    answers = [
        [Answer(prompt.row.prompt, str(text)) for prompt in data.val_prompts for text in [getattr(prompt.row, side)]]
        for side in ("real", "rejected")
    ]
    real, generated = (torch.tensor(scored(reward, some), dtype=torch.float64) for some in answers)
    both = torch.cat([real, generated])
    assert float(both.mean()) == pytest.approx(0, abs=1e-3) and float(both.std(correction=0)) == pytest.approx(1, 1e-3)
    summary, kept = read(tmp_path / "summary.json"), read(tmp_path / "reward_model" / "reward.json")
    assert summary["val_accuracy"] == float(((real > generated) + 0.5 * (real == generated)).double().mean())
    assert summary["val_pairs"] == 4 == kept["val_pairs"] and summary["updates"] == 6
    assert "note: shift and scale rest on 4 held-out pairs: hold out more (data.val_f" in capsys.readouterr().out
    assert (kept["shift"], kept["scale"]) == (summary["shift"], summary["scale"])
    assert kept["terminator_id"] == data.encoder.terminator_id
    # by hand, as its README says
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "reward_model")
    library: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward_model").eval()
    rows = [[*prompt.prompt_ids, *prompt.real_ids] for prompt in data.val_prompts]
    assert tokenizer.pad_token_id == library.config.pad_token_id != data.encoder.terminator_id
    with torch.no_grad():
        for side in ("left", "right"):
            theirs = score_padded(library, rows, tokenizer.pad_token_id, side)
            ours = real * kept["scale"] + kept["shift"]
            torch.testing.assert_close(theirs.double(), ours, rtol=1e-4, atol=1e-5)
    assert weight_bits(library.model) == weight_bits(module.policy.model)
    card = (tmp_path / "reward_model" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and f"- val_accuracy: {summary['val_accuracy']}" in card


def test_without_held_out_pairs_scores_are_as_they_come(
    model: str, pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(model, data_of(pairs, val_fraction=0), tmp_path)
    kept, summary = read(tmp_path / "reward_model" / "reward.json"), read(tmp_path / "summary.json")
    assert (kept["shift"], kept["scale"], summary["val_accuracy"]) == (0.0, 1.0, None)
    assert "note: no pair is held out, so reward.json has shift 0 and scale 1" in capsys.readouterr().out


# --- What is refused and left out -----------------------------------------------------------------------------------


def test_what_cannot_be_a_reward_model_is_refused_before_it_is_trained(
    model: str, rows: str, pairs: str, tmp_path: Path
) -> None:
    def refusal(words: str, model: Any = model, data: Any = None, **module: Any) -> None:
        with pytest.raises(UserError, match=words):
            fit(model, data or data_of(pairs), tmp_path / "run", module=module)

    refusal(r"model.centring must be 0 or positive, got -1", centring=-1)
    refusal("exported whole, base and adapter as one", adapter=LoraAdapter(merged=False))
    refusal("learns from two responses to each prompt. Use PreferenceDataModule", data=RowDataModule(rows))
    refusal(r"leaves those that are too long out. Set data.too_long: drop", data=data_of(pairs, too_long="cut"))
    config = CohereConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    CohereForCausalLM(config).save_pretrained(tmp_path / "cohere")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "cohere")
    refusal("no class that would hold a reward model of the architecture 'cohere'", str(tmp_path / "cohere"))
    assert not (tmp_path / "run" / "summary.json").exists()


def test_too_long_a_response_is_left_out_and_counted_never_cut(model: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    texts = [("12", "345"), ("1" * 9, "2"), ("3", "4" * 9), ("56", "7"), ("8", "99")]
    path.write_text(
        "".join(json.dumps({"prompt": f"{n}?", "chosen": a, "rejected": b}) + "\n" for n, (a, b) in enumerate(texts))
    )
    data = data_of(str(path), max_response_tokens=5, val_fraction=0)
    fit(model, data, tmp_path / "run", max_epochs=1)
    assert [prompt.row.real for prompt in data.prompts] == ["12", "56", "8"]
    assert read(tmp_path / "run" / "data_report.json")["train"]["long_answers"]["count"] == 2
    assert all(prompt.real_ids[-1] == data.encoder.terminator_id for prompt in data.prompts)


# --- The command ----------------------------------------------------------------------------------------------------


def flags(model: str, pairs: str, folder: Path, *more: str) -> list[str]:
    return [
        "reward", f"--model.model_name_or_path={model}", f"--data.train_data={pairs}",
        f"--export.output_dir={folder}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        "--trainer.logger=false", "--data.batch_size=2", "--data.val_fraction=0.2", "--model.learning_rate=1e-2", *more,
    ]  # fmt: skip


def test_the_command_trains_for_one_epoch_and_its_run_is_over(
    model: str, pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: Any
) -> None:
    main(flags(model, pairs, tmp_path / "run"))
    said = capsys.readouterr().out
    assert "held-out pairs: the better response has the higher score in" in said
    assert f"the model is in {tmp_path / 'run' / 'reward_model'}" in said
    assert read(tmp_path / "run" / "summary.json")["updates"] == 4
    main(flags(model, pairs, tmp_path / "run"))
    assert "is over; its models are in" in capsys.readouterr().out
    assert "model.centring: 0.0 -> 0.01" in refusal(flags(model, pairs, tmp_path / "run", "--model.centring=0.01"))
    assert "data.too_long must be 'drop' here" in refusal(
        flags(model, pairs, tmp_path / "other", "--data.too_long=cut")
    )
    assert "a run of another stage (reward)" in refusal(
        args_of("sft", model, pairs, tmp_path / "unfinished", "--trainer.accelerator=cpu")
        if (shutil.copytree(tmp_path / "run", tmp_path / "unfinished") / "summary.json").unlink() is None
        else []
    )


def test_an_adapter_is_exported_in_its_base(model: str, pairs: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    before = weight_bits(load(model))
    data = data_of(pairs)
    module, recorder = fit(model, data, tmp_path, module={"adapter": LoraAdapter(r=4), "learning_rate": 5e-2})
    assert recorder.losses[0] == pytest.approx(math.log(2), abs=0.5)
    trained = [name for name, weight in module.policy.named_parameters() if weight.requires_grad]
    assert "score.weight" in trained and all("lora" in name or name == "score.weight" for name in trained)
    checkpoint = torch.load(str(last_checkpoint(tmp_path)), weights_only=True)["state_dict"]
    assert "policy.score.weight" in checkpoint and not any("embed_tokens" in name for name in checkpoint)
    library: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward_model").eval()
    rows = [[*prompt.prompt_ids, *prompt.real_ids] for prompt in data.val_prompts]
    with torch.no_grad():
        theirs = score_padded(library, rows, library.config.pad_token_id)
        output = module.policy(torch.tensor([rows[0]]), output_hidden_states=True, use_cache=False)
        ours = output.hidden_states[-1][0, -1] @ module.policy.score.weight[0]
    torch.testing.assert_close(theirs[0], ours, rtol=1e-3, atol=1e-4)
    assert weight_bits(load(model)) == before and weight_bits(library.model) != weight_bits(load(model).model)


# --- After a kill ---------------------------------------------------------------------------------------------------


def continues_from(moment: Path, whole: Any, folder: Path, model: str, pairs: str, **settings: Any) -> None:
    for log in moment.rglob("*.lock"):
        log.unlink()
    module, recorder = fit(model, data_of(pairs), moment, **settings)
    losses = whole[1].losses
    assert recorder.losses == {number: losses[number] for number in recorder.losses}, moment
    assert weight_bits(module.policy) == weight_bits(whole[0].policy), moment
    summaries = [without_seconds(read(path / "summary.json")) for path in (moment, folder)]
    assert summaries[0] == summaries[1], moment
    for name in ("model.safetensors", "reward.json"):
        ours, theirs = (path / "reward_model" / name for path in (moment, folder))
        assert ours.read_bytes() == theirs.read_bytes(), (moment, name)


def play_moments(model: str, pairs: str, tmp_path: Path, **settings: Any) -> tuple[Any, list[Path]]:
    whole: list[Any] = []
    folder = tmp_path / "run"
    moments = moments_of(
        folder, tmp_path / "moments", lambda: whole.extend(fit(model, data_of(pairs), folder, **settings))
    )
    assert len(moments) > 20
    return whole, [moment for moment, _ in moments]


def test_a_run_killed_at_any_moment_ends_in_the_same_model(model: str, pairs: str, tmp_path: Path) -> None:
    """Some of the moments, the last ones among them: around the export and its summary."""
    whole, moments = play_moments(model, pairs, tmp_path)
    chosen = random.Random(0).sample(moments[:-8], 4)
    for moment in [*chosen, *moments[-8::2]]:
        continues_from(moment, whole, tmp_path / "run", model, pairs)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_killed_at_every_moment_ends_in_the_same_model(
    precision: str, adapter: bool, model: str, pairs: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"precision": precision, "accumulate_grad_batches": 3}
    settings["module"] = {"adapter": LoraAdapter(r=4)} if adapter else {}
    whole, moments = play_moments(model, pairs, tmp_path, **settings)
    for moment in moments:
        continues_from(moment, whole, tmp_path / "run", model, pairs, **copy.deepcopy(settings))


def test_a_run_stopped_between_training_and_export_only_exports(model: str, pairs: str, tmp_path: Path) -> None:
    whole, _ = fit(model, data_of(pairs), tmp_path / "whole")

    def stop(*_: Any) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        fit(model, data_of(pairs), tmp_path / "run", [DoLast(on_train_end=stop)])
    assert not (tmp_path / "run" / "summary.json").exists()
    module, recorder = fit(model, data_of(pairs), tmp_path / "run")
    assert recorder.losses == {} and weight_bits(module.policy) == weight_bits(whole.policy)
    assert without_seconds(read(tmp_path / "run" / "summary.json")) == without_seconds(
        read(tmp_path / "whole" / "summary.json")
    )


# --- Several processes ----------------------------------------------------------------------------------------------


def test_a_glance_at_some_held_out_pairs_decides_no_shift_and_scale(model: str, pairs: str, tmp_path: Path) -> None:
    """Lightning's check before a fit sees two batches, unless it is told to see all of them."""

    def play(**trainer: Any) -> dict[str, Any]:
        fit(model, data_of(pairs, val_fraction=0.6), tmp_path, num_sanity_val_steps=1, **trainer)
        return read(tmp_path / "reward_model" / "reward.json")

    whole = play()
    (tmp_path / "summary.json").unlink()  # as if it was killed before
    assert play() == whole and whole["val_pairs"] == 6


def train_together(model: str, pairs: str, folder: Path, strategy: str = "") -> None:
    strategy_ = {"strategy": strategy, "devices": 2} if strategy else {}
    if strategy == "fsdp2":
        from spin_lightning import ShardedStrategy

        strategy_["strategy"] = ShardedStrategy()
    fit(model, data_of(pairs, batch_size=4), folder, num_sanity_val_steps=0, **strategy_)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_train_the_reward_model_of_one(strategy: str, model: str, pairs: str, tmp_path: Path) -> None:
    train_together(model, pairs, tmp_path / "one")
    ended = together(tmp_path, train_together, model, pairs, tmp_path / "two", strategy)
    assert ended.codes == [0, 0], ended.printed
    one, two = (read(tmp_path / name / "summary.json") for name in ("one", "two"))
    for name, value in without_seconds(one).items():
        assert two[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value), name
    models: list[Any] = [
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "reward_model") for name in ("one", "two")
    ]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


# --- The page -------------------------------------------------------------------------------------------------------


def test_the_page_on_reward_models_can_be_followed_to_the_letter(
    model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its command, and its two pieces of Python on what the command exported: they give the same rewards."""
    page = (Path(__file__).parents[2] / "docs" / "reward_model.md").read_text()
    command, *python = (re.findall(rf"```{kind}\n(.*?)```", page, re.S) for kind in ("", "python"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(pairs, "pairs.jsonl")
    shutil.copytree(model, "runs/sft/policy")
    _, *args = shlex.split(command[0])
    small = ["--trainer.enable_progress_bar=false", "--data.batch_size=2", "--data.val_fraction=0.4"]
    main([*args, "--trainer.accelerator=cpu", *small])
    by_hand: dict[str, Any] = {}
    exec(compile(python[0][0], "reward_model.md", "exec"), by_hand)
    capsys.readouterr()
    exec(compile(python[0][1], "reward_model.md", "exec"), {})
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == pytest.approx(by_hand["rewards"], abs=1e-3) and printed[0] != pytest.approx(printed[1], abs=1e-4)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{a}+1?"}) + "\n" for a in range(9)))
    _, *args = shlex.split(command[1].replace("\\\n", ""))
    few = [
        "--data.batch_size=4",
        "--rollouts.iterations=1",
        "--rollouts.prompts=4",
        "--data.generator.max_new_tokens=12",
    ]
    main([*args, *few, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"])
    assert Path("runs/ppo/policy/model.safetensors").exists()
