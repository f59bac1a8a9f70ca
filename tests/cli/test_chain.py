"""A line of stages from one file: each from the last one's model, continued wherever it was killed, refused by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from games import read, without_seconds
from several import Forked, run_here, thorough

from spin_lightning import UserError
from spin_lightning.cli.chain import Line, remark_on_caps, table
from spin_lightning.cli.chain_file import Link, read_chain
from spin_lightning.cli.commands import config_folder, main
from spin_lightning.types import StageFailed

Chained = Callable[..., list[str]]


@pytest.fixture
def chained(model: str, rows: str, tmp_path: Path) -> Chained:
    """The command of a chain of SFT and a game, with changes to its file."""
    return partial(write_chain, tmp_path, model, rows)


def write_chain(folder: Path, model: str, rows: str, order: Any = None, **changes: Any) -> list[str]:
    content = {
        "output_dir": str(folder / "line"),
        "common": {
            "data": {
                "train_data": rows,
                "val_fraction": 0.2,
                "batch_size": 4,
                "generator": {"class_path": "several.MortalGenerator", "init_args": {"max_new_tokens": 5}},
            },
            "model": {"learning_rate": 1e-2},
            "trainer": {
                **{"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
                "callbacks": [{"class_path": "several.Mortal"}],
            },
            "checkpoint": {"every_n_steps": 1},
        },
        "stages": order or [{"sft": SFT(model)}, {"fit": FIT}],
        **changes,
    }
    path = folder / "line.yaml"
    path.write_text(yaml.safe_dump(content))
    return ["chain", str(path)]


def SFT(model: str) -> dict[str, Any]:
    return {"model": {"model_name_or_path": model}, "trainer": {"max_epochs": 2}}


START = {"model": {"model_name_or_path": "a/b"}}
FIT: dict[str, Any] = {"self_play": {"iterations": 2, "epochs": 1, "shard_size": 2}}


def words_of(commands: list[list[str]]) -> list[str]:
    return [command[3] for command in commands]


def weights_in(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name / "model.safetensors").read_bytes()
        for name in ("sft/policy", "fit/iteration_0/policy", "fit/iteration_1/policy")
    }


def kept_in(folder: Path) -> Any:
    return without_seconds(read(folder / "chain.json"))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of the stages that ran, all in this process."""
    return run_here(monkeypatch)


@pytest.fixture(scope="module")
def played(model: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same line, undisturbed: each stage by its own command."""
    folder = tmp_path_factory.mktemp("played")
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        main(write_chain(folder, model, rows))
    return folder / "line"


@pytest.fixture
def whole(played: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(played, tmp_path / "whole"))


def test_each_stage_starts_from_the_last_ones_model(
    chained: Chained, model: str, tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    main(chained())
    line = tmp_path / "line"
    assert words_of(commands) == ["sft", "fit"]
    sft, fit = (yaml.safe_load((line / name / "config.yaml").read_text()) for name in ("sft", "fit"))
    assert sft["model"]["model_name_or_path"] == model
    assert fit["model"]["model_name_or_path"] == str(line / "sft" / "policy")
    assert sft["data"]["max_response_tokens"] == 5  # the cap that sft reads off the generator of the common settings
    kept = read(line / "chain.json")["stages"]
    assert [of["response_cap"] for of in kept.values()] == [5, 5]
    summary, game = read(line / "sft" / "summary.json"), read(line / "fit" / "game.json")["iterations"]
    start = {name: read(line / name / "start.json")["val/nll"] for name in ("sft", "fit")}
    assert kept["sft"]["updates"] == 4 and kept["fit"]["updates"] == 2 + 4  # with the pairs of iteration 0
    assert kept["sft"]["nll"] == [start["sft"], summary["val_nll"]]
    assert kept["fit"]["nll"] == [start["fit"], game[-1]["val_nll"]]
    assert start["fit"] == pytest.approx(summary["val_nll"], abs=1e-5)  # the same model and held-out rows
    assert kept["fit"]["exported"] == "fit/iteration_1/policy"
    printed = capsys.readouterr().out
    assert table(kept) in printed and "stage 2 of 2: fit\n" in printed
    assert max(map(len, table(kept).splitlines())) <= 80
    commands.clear()
    main(chained())  # over
    assert not commands and table(kept) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "fate", "after"),
    [
        (1, "0 training 3 killed", ["sft", "fit"]),
        pytest.param(2, "0 generation 3 killed", ["fit"], marks=thorough),
        pytest.param(2, "0 export 2 killed", ["fit"], marks=thorough),
    ],
)
def test_a_killed_chain_goes_on_with_the_same_command(
    number: int, fate: str, after: list[str], chained: Chained, whole: Path, tmp_path: Path, forked: type[Forked],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    forked.fates[number] = fate
    with pytest.raises(SystemExit) as ended:
        main(chained())
    assert ended.value.code == 137
    assert f"error: the stage {('sft', 'fit')[number - 1]} was killed by SIGKILL." in capsys.readouterr().err
    forked.commands.clear()
    forked.fates.clear()
    main(chained())
    assert words_of(forked.commands) == after
    assert weights_in(tmp_path / "line") == weights_in(whole)
    found, expected = kept_in(tmp_path / "line")["stages"], kept_in(whole)["stages"]
    for name in ("sft", "fit"):
        assert {**found[name], "began_from": 0} == {**expected[name], "began_from": 0}


def test_a_signal_ends_the_stage_and_the_chain(
    chained: Chained, whole: Path, tmp_path: Path, forked: type[Forked], capsys: pytest.CaptureFixture[str]
) -> None:
    def send() -> None:
        while not list(tmp_path.glob("line/fit/iteration_0/pairs/*.parquet")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(SystemExit) as ended:
        main(chained())
    sender.join()
    assert ended.value.code == 143
    assert "stopped by SIGTERM; what is finished is saved" in capsys.readouterr().err
    main(chained())
    assert weights_in(tmp_path / "line") == weights_in(whole)


def test_a_changed_file_is_refused_with_what_differs(
    chained: Chained, whole: Path, model: str, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--output_dir", str(whole)]
    changed = {**SFT(model), "trainer": {"max_epochs": 3}}
    with pytest.raises(SystemExit) as ended:
        main([*chained([{"sft": changed}, {"fit": FIT}]), *folder])
    assert ended.value.code == 2 and words_of(commands) == ["sft"]
    printed = " ".join(capsys.readouterr().err.split())
    assert "trainer.max_epochs: 2 -> 3" in printed
    assert "mend that, and the same command continues" in printed
    assert f"Removing {whole / 'sft'} has that stage begin again." in printed
    commands.clear()
    faster = {**FIT, "data": {"micro_batch_tokens": 300}}  # no number of the game depends on it
    main([*chained([{"sft": SFT(model)}, {"fit": faster}]), *folder])
    assert words_of(commands) == ["fit"] and "is over; its models are in" in capsys.readouterr().out
    commands.clear()
    longer = {"self_play": {**FIT["self_play"], "iterations": 3}}  # as with `fit` itself
    main([*chained([{"sft": SFT(model)}, {"fit": longer}]), *folder])
    assert "fit/iteration_2/policy" in capsys.readouterr().out


def test_what_a_stage_began_from_is_not_another_now(
    chained: Chained, whole: Path, model: str, commands: list[list[str]], refusal: Callable[[Sequence[str]], str]
) -> None:
    path = whole / "sft" / "summary.json"
    path.write_text(path.read_text() + "\n")
    printed = refusal([*chained(), "--output_dir", str(whole)])
    assert "the stage 'fit' did not begin from what it would begin from now: sft is another or was trained" in printed
    assert f"Remove {whole / 'fit'} to have it begin again" in printed and not commands
    between = [{"sft": SFT(model)}, {"sft": {"name": "more", "model": {"max_updates": 1}}}, {"fit": FIT}]
    path.write_text(path.read_text()[:-1])
    assert "now: sft, more is another" in refusal([*chained(between), "--output_dir", str(whole)])
    assert words_of(commands) == ["sft"]


def test_links_name_models_and_files_of_stages_before(
    chained: Chained, model: str, tmp_path: Path, commands: list[list[str]]
) -> None:
    from_sft = {"model": {"model_name_or_path": {"from": "sft"}}, "data": {"train_data": {"from": "sft", "path": "x"}}}
    with pytest.raises(SystemExit):  # of the last stage, whose data are no data
        main(chained([{"sft": SFT(model)}, {"fit": FIT}, {"sft": {"name": "more", **from_sft}}]))
    assert words_of(commands) == ["sft", "fit"]
    main([*chained([{"sft": SFT(model)}, {"fit": FIT}, {"sft": {"name": "more"}}]), "--more.model.max_updates", "1"])
    config = yaml.safe_load((tmp_path / "line" / "more" / "config.yaml").read_text())
    assert config["model"]["model_name_or_path"] == str(tmp_path / "line" / "fit" / "iteration_1" / "policy")
    assert read(tmp_path / "line" / "chain.json")["stages"]["more"]["updates"] == 1


def test_the_stage_after_a_game_that_trained_nothing_says_why_it_cannot_begin(chained: Chained, tmp_path: Path) -> None:
    line = Line(read_chain(chained([{"fit": FIT | START}, {"dpo": {}}])[1:]))
    folder = tmp_path / "line" / "fit"
    folder.mkdir(parents=True)
    (folder / "game.json").write_text(json.dumps({"ended_because": "no pair is left", "iterations": []}))
    with pytest.raises(UserError, match="'fit' ended before it trained anything, because no pair is left"):
        line.args_of(line.chain.steps[1], tmp_path)
    assert line.records["fit"].why_untrained(folder) == "no pair is left"
    assert line.records["fit"].exported(folder) == folder / "iteration_0" / "policy"


def test_a_line_of_every_stage(
    chained: Chained, model: str, tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = {"train_data": {"from": "fit", "path": "iteration_1/pairs"}, "max_prompt_tokens": 64}
    preferred = tmp_path / "preferred.jsonl"
    rows = [{"prompt": f"{a}+1?", "chosen": str(a + 1), "rejected": "no"} for a in range(10)]
    preferred.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = {"class_path": "ModelReward", "init_args": {"folder": {"from": "reward"}}}
    stages = [
        {"sft": SFT(model)},
        {"fit": FIT},
        {"dpo": {"data": pairs, "model": {"beta": 0.5}}},
        {"reward": {"data": {"train_data": str(preferred)}, "model": {"model_name_or_path": {"from": "sft"}}}},
        {"ppo": {"rollouts": {"reward": judge, "iterations": 2, "prompts": 4, "cut": -1.0, "eval_every": 1}}},
        {"score": {"score": {"reward": {"class_path": "TextMatch"}}}},
    ]
    main(chained(stages))
    assert words_of(commands) == ["sft", "fit", "dpo", "reward", "ppo", "score"]
    kept = read(tmp_path / "line" / "chain.json")["stages"]
    starts = {
        name: next(arg.partition("=")[2] for arg in command if arg.startswith("--model.model_name_or_path="))
        for name, command in zip(list(kept)[1:], commands[1:], strict=True)
        if name != "reward"
    }
    line = tmp_path / "line"
    assert starts == {
        "fit": f"{line}/sft/policy",
        "dpo": f"{line}/fit/iteration_1/policy",
        "ppo": f"{line}/dpo/policy",  # the last policy before it, and not the reward model
        "score": f"{line}/ppo/policy",
    }
    assert list(kept["ppo"]["began_from"]) == ["reward", "dpo"] and kept["score"]["exported"] is None
    assert all(value is not None for value in [*kept["dpo"]["nll"], *kept["ppo"]["reward"], kept["reward"]["accuracy"]])
    assert kept["score"]["reward"] == [None, read(line / "score" / "summary.json")["mean"]]
    assert table(kept) in capsys.readouterr().out
    commands.clear()
    main(chained(stages))
    assert not commands


@pytest.mark.parametrize("name", ["sft_spin_dpo", "rlhf", "rlaif"])
def test_every_shipped_chain_is_one(name: str, rows: str, tmp_path: Path) -> None:
    """All of their settings are known, and every path is of a stage or of the user."""
    flags = [f"--output_dir={tmp_path / 'line'}", f"--common.data.train_data={rows}"]
    file = str(config_folder() / f"{name}.yaml")
    content = yaml.safe_load(Path(file).read_text())
    own = [word for stage in content["stages"] for word, settings in stage.items()
           if (settings.get("data") or {}).get("train_data") == "preferences.jsonl"]  # fmt: skip
    with pytest.raises(UserError, match=r"preferences.jsonl does not exist|rows.jsonl does not exist"):
        Line(read_chain([file])).check(tmp_path)
    line = Line(read_chain([file, *flags, *(f"--{word}.data.train_data={rows}" for word in own)]))
    line.check(tmp_path)
    assert not (tmp_path / "line").exists()


@thorough
def test_a_line_that_is_killed_in_every_stage_ends_as_an_undisturbed_one(
    chained: Chained, model: str, tmp_path: Path, forked: type[Forked]
) -> None:
    stages = [
        {"sft": SFT(model)},
        {"fit": FIT},
        {"dpo": {"data": {"train_data": {"from": "fit", "path": "iteration_1/pairs"}}, "model": {"beta": 0.5}}},
        {"ppo": {"rollouts": {"reward": {"class_path": "TextMatch"}, "iterations": 2, "prompts": 4}}},
    ]
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        main([*chained(stages), "--output_dir", str(tmp_path / "whole")])
    forked.fates.update(
        {1: "0 training 3 killed", 3: "0 generation 3 killed", 5: "0 training 2 killed", 7: "0 training 2 killed"}
    )
    for _ in range(4):
        with pytest.raises(SystemExit) as ended:
            main(chained(stages))
        assert ended.value.code == 137
    main(chained(stages))
    assert words_of(forked.commands) == ["sft", "sft", "fit", "fit", "dpo", "dpo", "ppo", "ppo"]
    for name in ("sft", "fit/iteration_1", "dpo", "ppo"):
        found, expected = (tmp_path / run / name / "policy/model.safetensors" for run in ("line", "whole"))
        assert found.read_bytes() == expected.read_bytes(), name


def test_configs_lie_beside_the_file_and_go_below_it(
    chained: Chained, model: str, tmp_path: Path, commands: list[list[str]]
) -> None:
    (tmp_path / "sft.yaml").write_text("data: {train_data: elsewhere.jsonl}\ntrainer: {max_epochs: 1}\n")
    stage = {"config": "sft.yaml", "model": {"model_name_or_path": model}, "data": {"seed": 3}}
    flags = ["--common.data.batch_size=8", "--common.data.seed=4", "--sft.model.learning_rate=1e-3"]
    main([*chained([{"sft": stage}]), *flags])
    config = yaml.safe_load((tmp_path / "line" / "sft" / "config.yaml").read_text())
    assert config["data"]["batch_size"] == 8 and config["model"]["learning_rate"] == 1e-3
    assert config["data"]["seed"] == 3  # a stage's own setting goes over what is common, wherever that is said
    assert config["trainer"]["max_epochs"] == 1 and config["data"]["train_data"].endswith("rows.jsonl")


@pytest.mark.parametrize(
    ("stages", "changes", "flags", "words"),
    [
        (None, {"stages": []}, [], "`stages` must be a list of stages, got []"),
        (["fitt"], {}, [], "ppo, dpo, reward, score. Did you mean fit?"),
        ([{"sft": {}, "fit": {}}], {}, [], "must be a word, or a word with settings under it"),
        (["sft", "fit", "sft"], {}, [], "two stages of {file!r} are called 'sft'. Give one a name of its own"),
        ([{"sft": {"name": "a/b"}}], {}, [], "must be letters, digits, - and _, as it names a folder, got 'a/b'"),
        ([{"sft": {"model": {"model_name_or_path": {"from": "fit"}}}}, "fit"], {}, [],
         "the stage 'sft' takes something from 'fit', which is no stage before it: there is none before it"),
        ([{"sft": {"config": "none.yaml"}}], {}, [], "in stage 0 of {file!r} (sft): the config "),
        ([{"sft": {"model": {"beta": 1}}}], {}, [], "in the stage 'sft' of {file}: there is no setting model.beta"),
        ([{"sft": {**START, "data": {"train_data": "none.jsonl"}}}], {}, [], "of {file}: none.jsonl does not"),
        ([{"sft": {"export": {"output_dir": "x"}}}], {}, [], "export.output_dir follows from output_dir and the stage"),
        ([{"sft": {**START, "trainer": {"fast_dev_run": True}}}], {}, [],
         "trainer.fast_dev_run cannot be True in a chain"),
        ([{"sft": {"launcher": "no_such_program"}}], {}, [], "launcher of sft: there is no program 'no_such_program'"),
        (None, {"comon": {}}, [], "'comon' is not one of output_dir, common, stages"),
        (None, {"common": {"data": {"bach_size": 4}}}, [], "no stage has a setting data.bach_size"),
        (None, {"output_dir": ""}, [], "output_dir must be a folder on this machine's disk, got ''"),
        (None, {}, ["--data.batch_size=4"], "--data: a setting on the command line begins with --common or the name"),
        (None, {}, ["--sft.model.learning_rate"], "got '--sft.model.learning_rate'"),
        (None, {}, ["--sft.model.learning_rate=x"], "in the stage 'sft' of {file}: model.learning_rate"),
    ],
)  # fmt: skip
def test_a_file_is_refused_before_anything_starts(
    stages: Any, changes: dict[str, Any], flags: list[str], words: str, chained: Chained, tmp_path: Path,
    commands: list[list[str]], refusal: Callable[[Sequence[str]], str],
) -> None:  # fmt: skip
    command = chained(stages, **changes)
    printed = refusal([*command, *flags])
    assert words.format(file=command[1]) in printed, printed
    assert not commands and not (tmp_path / "line").exists()


def test_a_file_that_a_stage_did_not_leave_is_answered_with_what_it_left(chained: Chained, whole: Path) -> None:
    (whole / "sft" / "chain.txt").write_text("")
    line = Line(read_chain([*chained()[1:], "--output_dir", str(whole)]))
    with pytest.raises(UserError, match=r"there is no \S+/sft/nonsuch\. \S+/sft has .*chain\.txt, .*policy, .*Correct"):
        line._place(Link("sft", "nonsuch"), must_exist=True)


def test_a_missing_file_is_named(refusal: Callable[[Sequence[str]], str]) -> None:
    assert "the chain 'none.yaml' is no file" in refusal(["chain", "none.yaml"])


def test_it_is_started_once(
    chained: Chained, monkeypatch: pytest.MonkeyPatch, refusal: Callable[[Sequence[str]], str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "chain starts the processes of a stage itself" in refusal(chained())


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            2,
            "sft ended with exit code 2. What is finished is saved; mend that, and the same command continues. "
            "Remove it.",
        ),
        (75, "sft ended with exit code 75. What is finished is saved, and the same command continues"),
        (-9, "sft was killed by SIGKILL. What is finished is saved, and the same command continues"),
    ],
)
def test_only_what_was_refused_is_to_be_mended(code: int, words: str) -> None:
    assert str(StageFailed("sft", code, "Remove it.")) == words


def test_a_stage_that_ends_early_ends_the_chain(
    chained: Chained, model: str, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    main([*chained(), "--sft.trainer.max_time", "00:00:00:00"])
    assert words_of(commands) == ["sft"]
    assert "the stage sft ended before it is over (a time limit, perhaps)" in capsys.readouterr().out


def test_nlls_under_different_caps_are_said_not_to_compare() -> None:
    def results(*caps: int | None) -> dict[str, dict[str, Any]]:
        return {f"stage{n}": {"nll": [9.0, 8.0], "response_cap": cap} for n, cap in enumerate(caps)}

    assert remark_on_caps(results(64, 5, 5)) == (
        "note: held-out responses were cut at 64 tokens in stage0, at 5 in stage1, at 5 in stage2: their NLLs do not "
        "compare."
    )
    assert remark_on_caps(results(5, None, 5)) == remark_on_caps({}) == ""  # of before, what was kept does not say
    assert remark_on_caps(results(5) | {"reward": {"nll": [None, None], "response_cap": 7}}) == ""


def test_the_table_of_a_line_of_four_is_80_columns_wide() -> None:
    results = {
        name: {"updates": 1234, "seconds": 5000.0, "nll": [120.25, 98.5], "reward": [0.25, 0.5], "exported": exported}
        for name, exported in (("sft", "sft/policy"), ("fit", "fit/iteration_1/policy"), ("ppo", "ppo/policy"))
    }
    results["reward"] = {"updates": 3, "seconds": 2.0, "nll": [None, None], "accuracy": 0.75, "exported": "reward/x"}
    lines = table(results).splitlines()
    assert max(map(len, lines)) <= 90
    assert lines[1].split() == "sft 1234 1 h 23 min 120.25 -> 98.50 0.250 -> 0.500 sft/policy".split()
    assert lines[4].split() == "reward 3 2 s accuracy 0.75 reward/x".split()
