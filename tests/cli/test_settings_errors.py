"""A wrong setting ends with exit code 2 and one line that names it, whoever refused it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import args_of, write_rows
from lightning.fabric.utilities.exceptions import MisconfigurationException

from spin_lightning import UserError
from spin_lightning.cli import score
from spin_lightning.cli.commands import COMMANDS, main
from spin_lightning.cli.config_files import check_configs
from spin_lightning.cli.settings_errors import explaining_settings, in_a_sentence
from spin_lightning.cli.stage_cli import parse_settings
from spin_lightning.runs.checkpoints import hash_file
from spin_lightning.runs.files import sha256_of


@pytest.fixture
def said(model, tmp_path, refusal, monkeypatch):
    """What a command says with one more flag."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    rows = write_rows(tmp_path / "rows.jsonl")

    def run(command: str, *flags: str) -> str:
        common = [
            "--data.max_response_tokens=4" if command == "sft" else "--data.generator.max_new_tokens=4",
            "--data.batch_size=4",
            *([] if any("accelerator" in flag for flag in flags) else ["--trainer.accelerator=cpu"]),
            *([] if command == "sft" else ["--self_play.iterations=1", "--self_play.epochs=1"]),
        ]
        error = refusal(args_of(command, model, rows, tmp_path / "run", *common, *flags))
        last = error[error.index("spin-lightning: error: ") :].strip()
        assert "\n" not in last
        return last.removeprefix("spin-lightning: error: ")

    return run


FLAGS_OF_SPARSE = [
    "fit",
    "--model.model_name_or_path=x/y",
    "--data.train_data=x",
    "--model.optimizer=torch.optim.SparseAdam",
]


# --- the trainer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fit", "sft"])
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (
            "overfit_batches=1",
            "trainer.overfit_batches cannot be 1 here. Set trainer.limit_train_batches, or data.max_rows",
        ),
        ("overfit_batches=0.5", "trainer.overfit_batches cannot be 0.5 here"),
        ("barebones=true", "trainer.barebones cannot be True here"),
        ("enable_checkpointing=false", "trainer.enable_checkpointing cannot be False here"),
        ("limit_train_batches=0", "Nothing would be trained on"),
        ("accumulate_grad_batches=0", "at least 1"),
        ("val_check_interval=0", "trainer.val_check_interval cannot be 0 here"),
        ("gradient_clip_val=-1", "trainer.gradient_clip_val cannot be -1 here"),
        ("strategy=ddp_spawn", "trainer.strategy DDPStrategy starts its processes by spawn or fork"),
        ("strategy=fsdp", "trainer.strategy 'fsdp' shards weights in a form"),
        ("callbacks+=LearningRateFinder", "LearningRateFinder trains before the run"),
        ("callbacks=EarlyStopping", "EarlyStopping' cannot be used: the following arguments are required: monitor."),
        ("plugins=AsyncCheckpointIO", "multiple values for CheckpointIO"),
        ("accelerator=warp", "Change trainer.accelerator (now 'warp')"),
        ("strategy=ddpx", "Change trainer.strategy (now 'ddpx')"),
        ("precision=7", "trainer.precision must be 64 or 32 or 16 or"),
        ("max_time=soon", "trainer.max_time (now 'soon')"),
        ("profiler=nope", "trainer.profiler (now 'nope')"),
        ("gradient_clip_algorithm=foo", "trainer.gradient_clip_algorithm (now 'foo')"),
        ("limit_train_batches=1.5", "trainer.limit_train_batches (now 1.5)"),
        ("fast_dev_run=-1", "trainer.fast_dev_run (now -1)"),
        ("deterministic=maybe", "trainer.deterministic must be bool or 'warn' or null, got 'maybe'."),
        ("callbacks+=lightning.pytorch.callbacks.EarlyStopping", "EarlyStopping' cannot be used: "),
    ],
)
def test_a_setting_of_the_trainer(said, command, flag, words):
    assert words in said(command, f"--trainer.{flag}")


def test_an_accelerator_that_is_not_there(said, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    for command in ("fit", "sft", "validate"):
        assert said(command, "--trainer.accelerator=gpu").endswith("Change trainer.accelerator (now 'gpu').")


def test_a_logger_whose_package_is_missing(said):
    words = said("fit", "--trainer.logger=CometLogger")
    assert words.startswith("'lightning.pytorch.loggers.CometLogger' cannot be used: ") and "comet" in words


def test_what_follows_from_other_settings(said):
    words = (
        "trainer.max_epochs follows from self_play.iterations and self_play.epochs: leave it out, and set "
        "self_play.epochs."
    )
    assert said("fit", "--trainer.max_epochs=4") == words
    assert said("fit", "--checkpoint.dirpath=x") == (
        "checkpoint.dirpath follows from self_play.output_dir: leave it out, and set self_play.output_dir."
    )


@pytest.mark.parametrize(
    "generator",
    [
        {"class_path": "spin_lightning.ContinuousGenerator", "init_args": {"max_new_tokens": 32, "top_p": 0.9}},
        {"max_new_tokens": 32},
    ],
)
def test_sft_takes_a_config_of_the_game_and_of_its_sampler_the_cap(generator, tmp_path, capsys):
    data = {"train_data": "x.jsonl", "generator": generator, "history": 2, "answers_per_prompt": 4}
    (tmp_path / "both.json").write_text(json.dumps({"model": {"model_name_or_path": "m"}, "data": data}))
    settings = parse_settings("sft", [f"--config={tmp_path / 'both.json'}"])
    assert settings.data.max_response_tokens == 32
    assert not {"generator", "history", "answers_per_prompt"} & set(vars(settings.data))
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "note: sft has no data.generator; data.max_response_tokens 32 is taken from it.",
        "note: sft has no data.answers_per_prompt.",
        "note: sft has no data.history.",
    ]
    given = parse_settings("sft", [f"--config={tmp_path / 'both.json'}", "--data.max_response_tokens=7"])
    assert given.data.max_response_tokens == 7
    for flag in ("--data.generator.max_new_tokens=9", "--data.generator.init_args.max_new_tokens=9"):
        if "class_path" in generator or "init_args" not in flag:
            later = parse_settings("sft", [f"--config={tmp_path / 'both.json'}", flag])
            assert later.data.max_response_tokens == 9  # flags that follow a config win
    flags = ["--model.model_name_or_path=m", "--data.train_data=x", "--data.generator.max_new_tokens=5"]
    assert parse_settings("sft", flags).data.max_response_tokens == 5


def test_a_cap_of_a_sampler_that_is_none_is_refused_by_sft(said):
    expected = "data.generator.max_new_tokens must be a number of tokens, at least 1, got 'few'."
    assert said("sft", "--data.generator.max_new_tokens=few") == expected


def test_a_run_of_sft_without_an_end(said):
    assert "trainer.max_epochs -1 has no end" in said("sft", "--trainer.max_epochs=-1")
    for flag in ("--trainer.max_epochs=0", "--trainer.max_steps=0"):
        assert said("sft", flag).endswith("nothing would be trained.")


def test_what_is_asked_of_every_command_before_a_model_is_loaded(said, tmp_path, monkeypatch):
    monkeypatch.setattr("spin_lightning.stages.policy.PolicyModule.configure_model", None)
    for path in ("best", "last", "x" * 300):
        assert said("validate", f"--ckpt_path={path}").startswith(f"there is no checkpoint {path!r}.")
    assert "local disk only" in said("fit", "--ckpt_path=s3://x/y")
    assert said("fit", "--model.optimizer=torch.optim.SparseAdam").startswith("the optimiser SparseAdam cannot be used")
    assert said("fit", "--model.optimizer.betas=[2, 2]").endswith("Change model.optimizer.")
    assert said("fit", f"--data.seed={10**22}").startswith("data.seed must have less than 64 bits")
    assert said("validate", "--data.val_fraction=0").startswith("no row is held out, so there is nothing to measure.")
    assert "must be 'auto' or one of" in said("fit", "--data.format=mesages") + said("sft", "--data.format=mesages")
    assert not (tmp_path / "run").exists()


def test_a_learning_rate_of_the_optimizer_is_said_to_be_none(said, capsys):
    for value, is_said in ((0.5, True), (0.001, False)):  # its own default is in every printed config
        with pytest.raises(SystemExit):
            main([*FLAGS_OF_SPARSE, f"--model.optimizer.lr={value}"])
        assert ("model.optimizer.lr 0.5 is not used" in capsys.readouterr().out) == is_said


def test_a_setting_that_is_not_there_is_looked_for_by_its_last_word_and_its_section(said, tmp_path):
    assert said("fit", "--output_dir=x") == "unrecognized arguments: --output_dir=x. Did you mean self_play.output_dir?"
    assert said("fit", "--model.lr=1").endswith("Did you mean model.learning_rate?")
    (tmp_path / "c.yaml").write_text("export:\n  output_dir: x\n")
    assert said("fit", "--config=c.yaml") == (
        "there is no setting export.output_dir. The section export is of spin-lightning sft; this is fit."
    )
    (tmp_path / "c.yaml").write_text("fit:\n  model:\n    beta: 1\n")
    assert said("fit", "-c=c.yaml").endswith("and not in one called fit.")
    assert said("fit", "--model=x").startswith("model is a section: give its settings, as --model.KEY VALUE")


def test_what_lightning_an_optimizer_or_the_seed_refuses(said):
    assert said("fit", "--trainer.val_check_interval=99").endswith("Change the trainer setting that this is about.")
    assert said("sft", "--model.optimizer=torch.optim.SGD", "--model.optimizer.momentum=-1").endswith(
        "Change model.optimizer."
    )
    assert said("fit", "--seed_everything=-1").endswith("Change seed_everything.")


def test_errors_that_are_no_refusal_of_a_setting_pass_as_they_are():
    for error in (ValueError("a bug of ours"), RuntimeError("CUDA error"), KeyError("x"), TypeError("None + 1")):
        with pytest.raises(type(error)) as caught, explaining_settings({"trainer.precision": "16"}):
            raise error
        assert caught.value is error


def test_a_refusal_inside_what_the_parser_wraps_is_found():
    def wrapping() -> None:
        try:
            raise UserError("inner")
        except UserError as inner:
            raise ValueError("a wall of text") from inner

    with pytest.raises(UserError, match=r"^inner$") as caught, explaining_settings():
        wrapping()
    assert type(caught.value) is UserError


# --- classes of the user's own ----------------------------------------------------------------------------------------


@pytest.fixture
def plugins(tmp_path):
    """Modules in the current folder, under names that no other test imports."""
    (tmp_path / "edge_good.py").write_text(
        "from spin_lightning import SpinLoss\nclass MyLoss(SpinLoss): pass\nclass Plain: pass\n"
        "class Broken(SpinLoss):\n    def __init__(self):\n        raise RuntimeError('boom')\n"
    )
    (tmp_path / "edge_needs.py").write_text("import no_such_package_at_all\nclass L: pass\n")
    (tmp_path / "edge_syntax.py").write_text("x = 1\nclass L(:\n    pass\n")
    (tmp_path / "edge_raises.py").write_text("x = {}\nx['gone']\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("edge_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "key", ["model.loss", "data.generator", "trainer.callbacks", "trainer.logger", "model.optimizer"]
)
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("edge_needs.L", "the module 'edge_needs' needs 'no_such_package_at_all', which is not installed. Install it."),
        ("edge_syntax.L", "edge_syntax.py, line 2: "),
        ("edge_raises.L", "importing 'edge_raises' ends with KeyError: 'gone' ("),
        ("edge_good.MyLos", "the module 'edge_good' has no 'MyLos'. Did you mean MyLoss?"),
        (
            "edge_god.MyLoss",
            "there is no module 'edge_god', in the current folder or installed. Did you mean edge_good?",
        ),
    ],
)
def test_a_class_that_cannot_be_imported_says_why(said, plugins, key, path, words):
    sentence = said("fit", f"--{key}={path}")
    assert sentence.startswith(f"{key}: {path!r} cannot be used: ") and words in sentence


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("my-losses.MyLoss", "that is no import path"),
        ("./mylosses.py", "that is no import path"),
        ("..MyLoss", "that is no import path"),
        ("spin_lightning.losses.PairLoss", "it does not say what forward does"),
    ],
)
def test_what_is_no_import_path_and_what_is_abstract_are_told(said, path, words):
    assert said("fit", f"--model.loss={path}").startswith(f"model.loss: {path!r} cannot be used: {words}")


def test_a_secret_in_a_setting_is_not_in_the_error(said):
    assert "pw" not in said("fit", "--ckpt_path=https://me:pw@host/x") + said("fit", "--model.api_key=pw")
    with (
        pytest.raises(UserError, match=r"Change trainer.api_key \(now '\*\*\*'\)"),
        explaining_settings({"trainer.api_key": "pw"}),
    ):
        raise MisconfigurationException("no")
    assert said("fit", "--data.train_data=https://me:pw@host/x").startswith(
        "data are files on this machine or the name of"
    )
    for name in ("", "x" * 300 + ".jsonl"):
        assert "data" in said("fit", f"--data.train_data={name}")


def test_a_class_of_another_kind_or_that_cannot_be_made_or_takes_something_else(said, plugins):
    assert (
        said("fit", "--model.loss=edge_good.Plain")
        == "model.loss: 'edge_good.Plain' cannot be used: it is no SelfPlayLoss."
    )
    assert said("fit", "--model.loss=edge_good.Broken") == "'edge_good.Broken' cannot be made: boom."
    words = said("fit", "--model.loss=SpinLoss", "--model.loss.lnk=x")
    assert "'spin_lightning.SpinLoss' cannot be used" in words and "Did you mean link?" in words
    words = said("fit", "--model.loss=SpimLoss")
    assert (
        "no class is called 'SpimLoss'. Give its import path" in words
        and "Did you mean SpinLoss or TSpinLoss?" in words
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--model.loss.link=zz"],
            "model.loss.link must be 'logistic' or 'hinge' or 'exponential' or 'correlation', got 'zz'.",
        ),
        (["--model.optimizer.lr=x"], "model.optimizer.lr must be float or Tensor, got 'x'."),
        (["--model.optimizer=adamw"], "model.optimizer: no class is called 'adamw'. Give its import path"),
        (
            ["--model.optimizer.bogus=1"],
            "model.optimizer: 'torch.optim.AdamW' cannot be used: Option 'bogus' is not accepted. It takes ",
        ),
    ],
)
def test_a_setting_of_a_class(said, flags, words):
    assert words in said("fit", *flags)


def test_a_folder_of_another_stage_is_refused(said, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000000001.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"x")
    hash_file(checkpoint).write_text(sha256_of(checkpoint))
    for command, other, key in (("sft", "fit", "self_play.epochs"), ("fit", "sft", "model.max_updates")):
        (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": {key: 1}, "changes": [], "versions": {}}))
        assert f"run holds a run of another stage ({other}). Set --" in said(command)


@pytest.mark.parametrize(("command", "section"), [("fit", "self_play"), ("sft", "export")])
def test_the_folder_of_the_start_model_is_no_run_folder(command, section, model, refusal):
    where = f"--{section}.output_dir={model}/../{Path(model).name}"
    assert "is the folder of the model that the run starts from" in refusal(
        [command, f"--model.model_name_or_path={model}", "--data.train_data=x", where]
    )


@pytest.mark.parametrize(
    ("command", "other", "mark"),
    [
        ("dpo", "sft", "model.max_updates"),
        ("sft", "ppo", "rollouts.answers_per_prompt"),
        ("reward", "dpo", "export.shard_size"),
        ("ppo", "reward", "model.centring"),
    ],
)
def test_a_folder_of_another_stage_that_is_over_is_refused_too(command, other, mark, model, tmp_path, refusal):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": {mark: 1}, "changes": [], "versions": {}}))
    (tmp_path / "run" / "summary.json").write_text("{}")
    section = "rollouts" if command == "ppo" else "export"
    args = [f"--model.model_name_or_path={model}", "--data.train_data=x", f"--{section}.output_dir={tmp_path / 'run'}"]
    args += (
        ["--rollouts.reward=NumberMatch", "--trainer.accelerator=cpu"]
        if command == "ppo"
        else ["--trainer.accelerator=cpu"]
    )
    assert f"run holds a run of another stage ({other}). Set --{section}.output_dir to another" in refusal(
        [command, *args]
    )


def test_a_class_in_the_current_folder_is_found_behind_what_is_installed(said, plugins, capsys, model):
    (plugins / "yaml.py").write_text("raise SystemExit('the file in the current folder was imported')")
    args = [f"--model.model_name_or_path={model}", "--data.train_data=rows.jsonl", "--data.generator.max_new_tokens=4"]
    main(["check", *args, "--model.loss=edge_good.MyLoss"])
    assert "to train on" in capsys.readouterr().out
    assert sys.path[-1] == str(plugins)


# --- configs and commands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"model:\n  beta: [1, 2\n", "line 3, column 1 is not YAML"),
        (b"model:\n\tbeta: 1\n", "line 2, column 1 is not YAML"),
        (b"- a\n- b\n", "must hold sections with settings, got a list"),
        (b"hello\n", "got a str"),
        (b"", "got nothing"),
        (b"model:\n  beta: 1\n  beta: 2\n", "line 3, column 3 is not YAML: 'beta' is there a second time"),
        (b"a: &a [*a]\n", "an alias (*...) is inside of what it stands for"),
        (b"data:\n- a\n", "'data' must be the name of a section"),
        (b"1: 2\n", "1 must be the name of a section"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (None, "is no file (looked at "),
    ],
)
@pytest.mark.parametrize("style", ["--config={}", "--config {}"])
def test_a_config_that_cannot_be_read_is_named_with_its_line(tmp_path, text, words, style):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError) as caught:
        check_configs(["fit", *style.format(path).split()])
    assert f"the config {str(path)!r}" in str(caught.value) and words in str(caught.value)


def test_a_config_s_name_may_be_too_long_and_its_merged_keys_may_be_set_again(tmp_path):
    with pytest.raises(UserError, match="is no file"):
        check_configs(["fit", "-c", "x" * 300])
    (tmp_path / "c.yaml").write_text("a: &a {beta: 1}\nmodel:\n  <<: *a\n  beta: 2\n")
    check_configs(["fit", "--config", str(tmp_path / "c.yaml")])


def test_a_folder_is_no_config_and_a_key_in_a_config_is_suggested(said, tmp_path):
    assert "is no file" in said("fit", f"--config={tmp_path}")
    for text, words in (
        ("modle:\n  beta: 1\n", "Did you mean model.beta?"),
        ("data:\n  batch_size: many\n", "must be int, got 'many'."),
    ):
        (tmp_path / "c.yaml").write_text(text)
        assert words in said("fit", "--config=c.yaml")


@pytest.mark.parametrize("command", ["frobnicate", "test", "predict", "fitt", "FIT", "--config=c.yaml", "--model.beta"])
def test_an_unknown_command_is_answered_with_all_that_there_are(command, refusal):
    error = refusal([command])
    assert f"there is no command {command!r}; the commands are {', '.join(COMMANDS)}." in error
    assert ("Did you mean fit?" in error) == (command.lower() in ("fitt", "fit"))


def test_missing_settings_are_asked_for_as_they_are_given(refusal):
    for command in ("fit", "sft", "validate", "check"):
        assert "required: --model.model_name_or_path, --data.train_data" in refusal([command])


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (
            'Parser key "trainer.precision":\n  Does not validate against any of the Union subtypes\n  Subtypes: '
            "[typing.Literal[64, 32], "
            "typing.Literal['16-true'], <class 'NoneType'>]\n  Errors:\n    - Expected a typing.Literal[64, 32]\n  "
            "Given value type: <class 'str'>\n  Given value: 8",
            "trainer.precision must be 64 or 32 or '16-true' or null, got '8'.",
        ),
        (
            "argument f(a.b, a.c) --> d.e: invalid Optional value: '4'",
            "d.e follows from a.b and a.c: leave it out, and set a.c.",
        ),
        ("something\n  else", "something else"),
    ],
)
def test_a_parser_s_message_becomes_one_line(message, sentence):
    assert in_a_sentence(message) == sentence


@pytest.mark.parametrize(
    ("section", "setting", "wrong", "meant"),
    [
        ("rollouts", "reward", "NumberMach", "NumberMatch"),
        ("model", "advantage", "GroupNormalised", "GroupNormalized"),
        ("model", "loss", "IpoLos", "IpoLoss"),
    ],
)
def test_a_misspelt_class_of_a_file_is_named_as_that_of_a_flag_is(section, setting, wrong, meant, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({section: {setting: {"class_path": wrong}}}))
    with pytest.raises(UserError, match=rf"^{section}\.{setting}: no class is called '{wrong}'.* Did you mean {meant}"):
        parse_settings(
            "dpo" if setting == "loss" else "ppo", ["--model.model_name_or_path=x", "--data.train_data=x", f"-c={path}"]
        )


@pytest.mark.parametrize("command", ["score", "ppo"])
def test_a_function_where_a_reward_belongs_is_named_with_the_class_that_takes_it(command, tmp_path, monkeypatch):
    (tmp_path / "polite_rewards.py").write_text("def is_polite(answer):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    section = "score" if command == "score" else "rollouts"
    args = ["--model.model_name_or_path=x", "--data.train_data=x", f"--{section}.reward=polite_rewards.is_polite"]
    words = f"{section}.reward: polite_rewards.is_polite is a function: use FunctionReward with function "
    with pytest.raises(UserError, match=f"^{words}polite_rewards:is_polite"):
        score.parse(args) if command == "score" else parse_settings(command, args)


def test_a_question_to_score_ends_without_a_full_stop():
    with pytest.raises(UserError, match=r"Did you mean NumberMatch\? spin-lightning score --help shows"):
        score.parse(["--score.reward=NumberMach"])
