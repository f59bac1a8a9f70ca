"""``spin-lightning plan``: what a run takes, before a weight is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import save_tiny_model, write_rows
from jsonargparse import Namespace

from spin_lightning import ResponseGenerator
from spin_lightning.cli import commands as cli
from spin_lightning.cli import plan
from spin_lightning.types import UserError


class Engine(ResponseGenerator):
    """A generator that is none of transformers."""

    def generate(self, prompts, seeds, terminator_ids, pad_id):
        yield from ()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model folder with its weights."""
    return save_tiny_model(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def model(tmp_path, whole):
    """A model folder without them."""
    folder = tmp_path / "model"
    save_tiny_model(folder)
    (folder / "model.safetensors").unlink()
    return str(folder)


@pytest.fixture
def flags(tmp_path, model):
    return [
        f"--data.train_data={write_rows(tmp_path / 'rows.jsonl')}",
        f"--model.model_name_or_path={model}",
        "--data.val_fraction=0",
        "--trainer.accelerator=cpu",
        "--data.generator.max_new_tokens=8",
        f"--self_play.output_dir={tmp_path / 'run'}",
    ]


def made(flags, *more):
    return plan.make_plan(*plan.take_options([*flags, *more]))


def test_a_plan_is_made_without_weights_and_leaves_nothing_behind(flags, tmp_path, capsys):
    before = set(tmp_path.rglob("*"))
    plan.main(flags)
    printed = capsys.readouterr().out
    assert set(tmp_path.rglob("*")) == before
    table = printed[printed.index("rows  ") :]
    assert max(map(len, table.splitlines())) <= 80
    for words in (
        "rows            12 to train on, 0 held out",
        r"prompts       median 23, 90 % up to 25, most 25 tokens",
        r"responses     median 3, 90 % up to 3, most 3 tokens",
        r"updates         4 \+ 6 \+ 6 = 16",
        r"memory of each device, 1 x cpu +training +generation",
        r"interpreter and libraries +500 MiB +500 MiB",
        r"fits +fits",
        r"disk, at most .* free",
    ):
        assert re.search(words, table), words


def test_the_numbers_of_a_plan(flags):
    told = made(flags, "--trainer.precision=bf16-true", "--self_play.epochs=1", "--self_play.iterations=2")
    weights = told["model"]["weights"]
    training = told["memory"]["training"]
    assert (training["weights"], training["gradients"], training["optimiser"]) == (
        2 * weights,
        2 * weights,
        12 * weights,
    )
    # 12 rows in batches of 8; in iteration 1 those of iteration 0 too
    assert told["updates"]["per_iteration"] == [2, 3]
    assert told["updates"]["pairs"] == 8 and told["updates"]["passes"] == 1
    assert told["disk"]["checkpoints"] == 3 * 14 * weights and told["disk"]["exports"] == 2 * 2 * weights


def test_token_level_self_play_generates_nothing(flags, whole, capsys):
    game = ["--model.loss=TokenSpinLoss", "--model.loss.top_k=4", "--self_play.epochs=1", "--self_play.iterations=2"]
    rows = ["--rows=12", "--prompt-tokens=20", "--response-tokens=3"]
    told = made(flags, *game, *rows)
    assert told["memory"].keys() == {"training"} and told["updates"]["per_iteration"] == [2, 2]
    assert told["updates"]["scored_tokens"] == [12 * (20 + 3)] * 2 and told["updates"]["generated_tokens"] == 0
    assert told["disk"]["laws"] == 2 * 12 * 3 * (8 * 4 + 12) and told["disk"]["pairs"] == 0
    seconds = made(flags, *game, f"--model.model_name_or_path={whole}", "--probe")["time"]["seconds"]
    assert seconds["generation"] == 0 < seconds["scoring"]
    capsys.readouterr()
    plan.main([*flags, *game])
    assert re.search(r"of each       8 rows, in .*\n.*\n.*to train on\n", capsys.readouterr().out)


def test_sft_is_planned_from_its_own_settings(flags, tmp_path):
    sft = [flag for flag in flags if "generator" not in flag and "self_play" not in flag]
    told = made(sft, "--model.average=token", "--trainer.max_epochs=3", f"--export.output_dir={tmp_path / 'sft'}")
    assert told["stage"] == "sft" and told["updates"]["per_iteration"] == [6]
    assert told["memory"].keys() == {"training"} and told["disk"]["pairs"] == 0


@pytest.mark.parametrize(("optimizer", "state"), [("AdamW", 8), ("RMSprop", 4), ("SGD", 0), ("Adagrad", 4)])
def test_the_state_of_an_optimiser_is_found_out(flags, optimizer, state):
    told = made(flags, f"--model.optimizer=torch.optim.{optimizer}")
    assert told["memory"]["training"]["optimiser"] == state * told["model"]["weights"]


def test_devices_share_passes_and_batches_stay_as_large(flags):
    alone = made(flags, "--data.micro_batch_tokens=40")
    both = made(flags, "--data.micro_batch_tokens=40", "--devices", "2")
    assert (alone["devices"]["count"], both["devices"]["count"]) == (1, 2)
    assert alone["updates"]["passes"] == 8 and both["updates"]["passes"] == 4
    assert alone["updates"]["per_iteration"] == both["updates"]["per_iteration"]


def test_what_does_not_fit_is_told_with_what_would_help(flags, capsys):
    rows = ["--rows=10000", "--prompt-tokens=20", "--response-tokens=8"]
    plan.main([*flags, *rows, "--memory=500MiB", "--data.micro_batch_tokens=200000", "--data.batch_size=10000"])
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed and "what would help" in printed
    assert re.search(r"training   data.micro_batch_tokens: 100000 +\d+ MiB", printed)
    assert "10,000 to train on, 0 held out (assumed)" in printed
    assert max(len(line) for line in printed.splitlines() if "/" not in line) <= 80


def test_what_would_help_is_planned_with_and_what_would_not_is_left_out(flags, model):
    """Each setting by a plan of its own; of a model of 40 million weights."""
    path = Path(model) / "config.json"
    larger = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    path.write_text(json.dumps({**json.loads(path.read_text()), **larger, "num_key_value_heads": 8, "head_dim": 64}))
    flags = [*flags, "--memory=100GiB", "--data.micro_batch_tokens=16", "--data.generator.batch_size=4096"]

    def planned(*more: str) -> float:
        return sum(made(flags, *more)["memory"]["training"].values())

    assert made(flags)["advice"] == []
    needs = planned()
    advice = {entry["setting"]: entry for entry in made(flags, f"--memory={int(0.9 * needs) >> 20}MiB")["advice"]}
    assert all(entry["fits"] or entry["takes"] < 0.9 * needs for entry in advice.values())
    expected = {
        "trainer.precision: bf16-true": ["--trainer.precision=bf16-true"],
        "model.adapter: LoraAdapter, r 16": ["--model.adapter.r=16"],
        "trainer.strategy: fsdp2 on 2 devices": ["--trainer.strategy=fsdp2", "--devices=2"],
    }
    for setting, more in expected.items():
        if setting in advice:
            assert advice[setting]["takes"] == pytest.approx(planned(*more), rel=0.01), setting
    assert {"model.adapter: LoraAdapter, r 16", "trainer.strategy: fsdp2 on 2 devices"} <= advice.keys()
    # passes are as short as the longest row already, and little is left that could be computed again
    assert not any(name in setting for setting in advice for name in ("micro_batch", "checkpointing"))
    # of 12 rows no more are answered at once
    generation = [entry["setting"] for entry in made(flags, "--memory=800MiB")["advice"] if entry["what"] != "training"]
    assert generation == ["data.generator.batch_size: 8"]
    few = made(flags, "--data.generator.batch_size=8", "--memory=400MiB")["advice"]
    assert "generation" not in {entry["what"] for entry in few}  # less than the libraries take


def test_an_adapter_that_is_continued_has_the_settings_of_its_folder(tmp_path):
    def found(**given):
        adapter = Namespace(class_path="spin_lightning.LoraAdapter", init_args=Namespace(**given))
        return plan.find_adapter(Namespace(model=Namespace(adapter=adapter)))

    assert found(r=8, quantize="nf4") == {"r": 8, "quantize": "nf4"}
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "target_modules": ["q_proj"], "lora_alpha": 8}')
    assert found(r=16, path=str(tmp_path)) == {"r": 4, "target_modules": ["q_proj"], "path": str(tmp_path)}
    assert plan.find_adapter(Namespace(model=Namespace())) is None


def test_json_is_all_that_stands_on_stdout(flags, capsys):
    cli.main(["plan", *flags, "--json", "--memory", "24GiB"])
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["devices"]["memory"] == 24 * 2**30 and told["data"]["rows"] == 12
    assert "detected" in err or "messages" in err  # what was read


def test_a_probe_takes_the_time_of_the_run(flags, whole, capsys):
    args = [flag for flag in flags if "model_name" not in flag] + [f"--model.model_name_or_path={whole}"]
    told = made(args, "--probe", "--price-per-hour=3600", "--trainer.precision=bf16-true")["time"]
    assert all(seconds > 0 for name, seconds in told["seconds"].items() if name != "validation")
    assert told["cost"] == pytest.approx(sum(told["seconds"].values()))
    assert all(rate > 0 for rate in told["tokens_per_second"].values())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--memory=24"], "--memory must be a size such as 24GiB or 80GB, got '24'"),
        (["--memory"], "--memory must be a size such as 24GiB or 80GB, got ''"),
        (["--rows=0"], "--rows must be a whole number, at least 1, got '0'"),
        (["--rows=10"], "--rows, --prompt-tokens and --response-tokens stand in for the data together, got only rows"),
        (["--price-per-hour=2.5"], "--price-per-hour is the price of the time that --probe takes, and there is no"),
        (["--price-per-hour=cheap"], "--price-per-hour must be a number, the price of one device, got 'cheap'"),
        (["--trainer.precision=transformer-engine"], "plan knows no trainer.precision 'transformer-engine'"),
        (["--trainer.strategy=fsdp"], "trainer.strategy 'fsdp' is not one that a run takes"),
        (["--rows=9", "--prompt-tokens=999", "--response-tokens=9"], "prompts of 999 tokens"),
        (
            ["--rows=9", "--prompt-tokens=9", "--response-tokens=9", "--probe"],
            "--probe needs rows to compute, and --rows stands in for them",
        ),
        (["--devices=0"], "plan needs a number of devices, at least 1, got trainer.devices 0"),
        (["--data.train_data=nothing.jsonl"], "nothing.jsonl"),
        (["--model.learning_rat=1"], "learning_rate"),
        (["--model.model_name_or_path=nobody/no-such-model"], "'nobody/no-such-model'"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(flags, capsys, args, words):
    with pytest.raises(UserError, match=re.escape(words)):
        plan.main([*flags, *args])
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", *flags, *args])
    assert stop.value.code == 2


def test_help_names_every_option(capsys):
    cli.main(["plan", "--help"])
    printed = capsys.readouterr().out
    for name in (
        "memory",
        "devices",
        "rows",
        "prompt-tokens",
        "response-tokens",
        "sample",
        "probe",
        "price-per-hour",
        "json",
    ):
        assert f"--{name}" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert "within 10 % of ten measurements on an H200" in " ".join(printed.split())


def test_dpo_is_planned_with_both_responses_of_a_pair(flags, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f'{{"prompt": "q{n}", "chosen": "yes", "rejected": "no"}}\n' for n in range(8)))
    dpo = [flag for flag in flags if "generator" not in flag and "self_play" not in flag and "train_data" not in flag]
    told = made(dpo, f"--data.train_data={path}", "--model.beta=0.2", f"--export.output_dir={tmp_path / 'dpo'}")
    assert (told["stage"], told["updates"]["per_iteration"], told["updates"]["generated_tokens"]) == ("dpo", [1], 0)
    assert told["updates"]["scored_tokens"][0] > 8 * 2 * len("yes")
