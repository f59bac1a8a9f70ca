"""vLLM's process: its environment is one of the tests' own, and its model finds every token equally likely."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import make_environment
from games import Do, Game, Stopped, pairs_of, read
from helpers import byte_tokenizer, load, save_tiny_model

from spin_lightning import SpinLightningModule, UserError, VLLMGenerator
from spin_lightning.generation import openai, vllm
from spin_lightning.generation.base import Player, opened
from spin_lightning.runs import signals
from spin_lightning.types import Interrupted

END = 258


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose embeddings are 0, and with them its logits and gradients: training does not change it."""
    folder = tmp_path_factory.mktemp("flat")
    save_tiny_model(folder)
    model = load(folder)
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def opponent(flat: str) -> Player:
    return Player(load(flat).eval(), Path(flat))


@pytest.fixture
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where sockets and logs are, under a short name."""
    return tmp_path_factory.mktemp("p")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, private: Path) -> Iterator[None]:
    """No test leaves a process behind."""
    monkeypatch.setattr(openai, "PAUSES", (0.05, 0.1))
    monkeypatch.setattr(vllm, "GRACE_SECONDS", 1)
    monkeypatch.setattr("tempfile.tempdir", str(private))
    yield
    for facts in started(tmp_path):
        assert not is_running(facts["pid"]) and not is_running(facts["child"])


def started(folder: Path) -> list[dict[str, Any]]:
    """The servers that were started."""
    path = folder / "env" / "started"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def reloaded(folder: Path) -> list[str]:
    path = folder / "env" / "reloaded"
    return path.read_text().splitlines() if path.exists() else []


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(is_true: Callable[[], bool], seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while not is_true() and time.monotonic() < until:
        time.sleep(0.02)
    return is_true()


def play(flat: str, rows: str, folder: Path, generator: VLLMGenerator, **settings: Any) -> Game:
    return Game(flat, rows, folder, data={"generator": generator}, **settings).play()


def test_a_game_starts_vllm_once_and_ends_it(flat: str, rows: str, tmp_path: Path, private: Path) -> None:
    python = make_environment(tmp_path / "env")
    during = []
    tell = Do(on_train_batch_start=lambda *_: during.append(is_running(started(tmp_path)[0]["pid"])))
    args = ["--enforce-eager", "--max-num-seqs", 9, "--quantization=fp8"]
    generator = VLLMGenerator(python, args, max_new_tokens=5, batch_size=3)
    play(flat, rows, tmp_path / "run", generator, callbacks=[tell])
    (server,) = started(tmp_path)
    assert server["model"] == str(tmp_path / "run/iteration_0/opponent")
    assert reloaded(tmp_path) == [str(tmp_path / "run/iteration_0/policy")]
    assert during and all(during)
    assert not is_running(server["pid"]) and not is_running(server["child"])
    assert list(private.iterdir()) == []
    assert server["args"] == [
        "--served-model-name", "opponent", "--dtype", "float32", "--generation-config", "vllm",
        "--disable-uvicorn-access-log", "--enforce-eager", "--max-num-seqs", "9", "--quantization=fp8",
    ]  # fmt: skip
    for number in (0, 1):
        manifest = read(tmp_path / f"run/iteration_{number}/pairs_manifest.json")
        assert manifest["binding"]["engine"] == {
            "server": "vllm", "version": "0.32.0", "mode": "eager", "args": ["--enforce-eager", "--quantization=fp8"],
        }  # fmt: skip
        assert manifest["statistics"]["sampler_gap"]["most"] < 1e-5
        for row in pairs_of(tmp_path / "run", number):
            assert row["generated_log_prob"] == pytest.approx(-math.log(259) * len(row["generated_ids"]), abs=1e-4)


def test_what_leads_vllm_astray_is_kept_from_it(
    opponent: Player, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    python = make_environment(tmp_path / "env", version="0.32.0+cpu")
    generator = VLLMGenerator(python, devices="2,3", max_new_tokens=5)
    with opened(generator, opponent):
        pass
    generator.shut_down()
    (server,) = started(tmp_path)
    seen = server["environment"]
    assert seen["PYTHONPATH"] == str(tmp_path / "env" / "site")  # of the environment, and nothing of ours
    assert not any(name in seen for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"))
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["VLLM_CPU_KVCACHE_SPACE"]) == ("2,3", "7")
    assert (seen["VLLM_SERVER_DEV_MODE"], seen["VLLM_NO_USAGE_STATS"]) == ("1", "1")
    assert "--no-enable-chunked-prefill" in server["args"]  # on a CPU


def test_the_server_sees_the_trainer_s_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = VLLMGenerator()
    assert generator._visible_devices(torch.device("cpu")) == {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert generator._visible_devices(torch.device("cuda", 3)) == {"CUDA_VISIBLE_DEVICES": "3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert generator._visible_devices(torch.device("cuda", 1)) == {"CUDA_VISIBLE_DEVICES": "7"}
    assert VLLMGenerator(devices=6)._visible_devices(torch.device("cuda", 1)) == {"CUDA_VISIBLE_DEVICES": "6"}


def test_a_server_that_cannot_reload_is_started_anew(
    flat: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = make_environment(tmp_path / "env", cannot_reload=True)
    play(flat, rows, tmp_path / "run", VLLMGenerator(python, max_new_tokens=5))
    assert [Path(facts["model"]).name for facts in started(tmp_path)] == ["opponent", "policy"]
    assert "note: vLLM did not read the weights while it ran (status 500" in capsys.readouterr().out


def test_on_a_cpu_a_server_of_a_tied_model_is_started_anew(flat: str, rows: str, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env", version="0.32.0+cpu")
    play(flat, rows, tmp_path / "run", VLLMGenerator(python, max_new_tokens=5))
    assert len(started(tmp_path)) == 2 and reloaded(tmp_path) == []


def test_in_training_the_server_gives_its_memory_back_if_asked(flat: str, rows: str, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    during = []
    tell = Do(on_train_batch_start=lambda *_: during.append(any(is_running(s["pid"]) for s in started(tmp_path))))
    play(flat, rows, tmp_path / "run", VLLMGenerator(python, in_training="stop", max_new_tokens=5), callbacks=[tell])
    assert during and not any(during)
    assert len(started(tmp_path)) == 2


def test_a_server_that_dies_is_named_with_its_reason_and_the_same_command_continues(
    flat: str, rows: str, tmp_path: Path, private: Path
) -> None:
    python = make_environment(tmp_path / "env", dies_after=7)
    words = (
        r"vLLM ended with exit code 3\. It said: RuntimeError: the engine is out of memory \(all of it is in (\S+)\)"
    )
    with pytest.raises(UserError, match=rf"{words}\. Mend that .*run the same command again") as raised:
        play(flat, rows, tmp_path / "run", VLLMGenerator(python, max_new_tokens=5, batch_size=1))
    (log,) = private.glob("*/log")
    assert str(log) in str(raised.value)
    assert len(read(tmp_path / "run/iteration_0/pairs_manifest.json")["shards"]) == 1
    whole = VLLMGenerator(make_environment(tmp_path / "sound"), max_new_tokens=5)
    play(flat, rows, tmp_path / "run", whole)
    play(flat, rows, tmp_path / "whole", whole)
    for number in (0, 1):
        assert pairs_of(tmp_path / "run", number) == pairs_of(tmp_path / "whole", number)


def test_another_version_or_mode_does_not_go_on_with_pairs_that_are_begun(flat: str, rows: str, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env", dies_after=7)
    with pytest.raises(UserError, match="vLLM ended"):
        play(flat, rows, tmp_path / "run", VLLMGenerator(python, ["--enforce-eager"], max_new_tokens=5, batch_size=1))
    newer = make_environment(tmp_path / "newer", version="0.33.0")
    same = make_environment(tmp_path / "same")
    for other in (VLLMGenerator(newer, ["--enforce-eager"], max_new_tokens=5), VLLMGenerator(same, max_new_tokens=5)):
        with pytest.raises(UserError, match=r"made by something else than this run; what differs: engine\."):
            play(flat, rows, tmp_path / "run", other)
    harmless = VLLMGenerator(same, ["--enforce-eager", "--gpu-memory-utilization", 0.5], max_new_tokens=5)
    play(flat, rows, tmp_path / "run", harmless)


def test_a_server_that_does_not_start_is_named_with_its_reason(opponent: Player, tmp_path: Path) -> None:
    generator = VLLMGenerator(make_environment(tmp_path / "env", says="max_model_len is too great"), max_new_tokens=5)
    words = r"vLLM ended with exit code 1\. It said: ValueError: max_model_len is too great \(all of it is in"
    with pytest.raises(UserError, match=words):
        generator.open(opponent)


def test_a_server_that_is_not_ready_in_time_is_ended(opponent: Player, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env", never_listens=True)
    with pytest.raises(
        UserError, match=r"was not ready after 1 s\. It said: nothing .*Raise data\.generator\.start_sec"
    ):
        VLLMGenerator(python, start_seconds=1, max_new_tokens=5).open(opponent)


def test_a_signal_ends_the_wait_for_the_start_and_the_server(
    opponent: Player, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = VLLMGenerator(make_environment(tmp_path / "env", never_listens=True), max_new_tokens=5)
    asked = signals.end_if_asked
    monkeypatch.setattr(signals, "end_if_asked", lambda: asked() if not started(tmp_path) else end())
    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        generator.open(opponent)


def end() -> None:
    raise Interrupted(signal.SIGINT)


def test_a_server_that_ignores_sigterm_is_killed(opponent: Player, tmp_path: Path) -> None:
    generator = VLLMGenerator(make_environment(tmp_path / "env", is_deaf=True), max_new_tokens=5)
    generator.open(opponent)
    generator.shut_down()
    assert not is_running(started(tmp_path)[0]["pid"])


def test_an_error_in_training_ends_the_server(flat: str, rows: str, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        assert is_running(started(tmp_path)[0]["pid"])
        raise Stopped

    generator = VLLMGenerator(make_environment(tmp_path / "env"), max_new_tokens=5)
    with pytest.raises(Stopped):
        play(flat, rows, tmp_path / "run", generator, callbacks=[Do(on_train_batch_start=fail)])
    assert not is_running(started(tmp_path)[0]["pid"])


def test_a_generator_that_is_forgotten_takes_its_server_along(opponent: Player, tmp_path: Path) -> None:
    generator = VLLMGenerator(make_environment(tmp_path / "env"), max_new_tokens=5)
    generator.open(opponent)
    del generator
    assert not is_running(started(tmp_path)[0]["pid"])


#: Plays a game as a script would.
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from games import *
from spin_lightning import VLLMGenerator
generator = VLLMGenerator({python!r}, max_new_tokens=5, batch_size=1)
Game({model!r}, {rows!r}, {folder!r}, data={{"generator": generator}}).play()
"""


def test_a_trainer_that_is_killed_leaves_no_process_behind_and_goes_on(
    flat: str, rows: str, tmp_path: Path, private: Path
) -> None:
    slow, folder = make_environment(tmp_path / "env", seconds=0.3), tmp_path / "run"
    tests = str(Path(__file__).parents[1])
    code = SCRIPT.format(tests=tests, python=slow, model=flat, rows=rows, folder=str(folder))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(private)}
    manifest = folder / "iteration_0" / "pairs_manifest.json"
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL) as trainer:
        assert wait_until(lambda: manifest.exists() and bool(read(manifest)["shards"]), 60)
        (server,) = started(tmp_path)
        assert is_running(server["pid"]) and is_running(server["child"])
        trainer.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not is_running(server["pid"]) and not is_running(server["child"]))
    assert list(private.iterdir()) == []
    quick = VLLMGenerator(make_environment(tmp_path / "quick"), max_new_tokens=5)
    play(flat, rows, folder, quick)
    play(flat, rows, tmp_path / "whole", quick)
    assert pairs_of(folder, 0) == pairs_of(tmp_path / "whole", 0)


MISSING: dict[str, tuple[Callable[[Path], str], str]] = {
    "no interpreter": (
        lambda folder: str(folder / "none"),
        r"there is no '.*none'\. Make one: python3 -m venv \.vllm && ",
    ),
    "no vLLM": (
        lambda folder: make_environment(folder, version=""),
        r"of '.*' has no vLLM\. Make one: python3 -m venv",
    ),
    "no Python": (
        lambda folder: "/bin/false",
        r"'/bin/false' is no working interpreter of Python: .*Make one: python3",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_missing_environment_is_told_before_the_model_loads(
    flat: str, rows: str, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = MISSING[case]
    monkeypatch.setattr(SpinLightningModule, "configure_model", lambda self: pytest.fail("it loads"))
    with pytest.raises(UserError, match=words):
        play(flat, rows, tmp_path / "run", VLLMGenerator(make(tmp_path / "env")))


def test_a_socket_has_a_name_that_is_short_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    folder = vllm._make_private_folder()
    assert folder.parent == Path("/tmp") and folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()


def test_settings_that_are_no_settings_are_refused() -> None:
    with pytest.raises(UserError, match="in_training must be 'keep' or 'stop', got 'sleep'"):
        VLLMGenerator(in_training="sleep")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="args must be a list of arguments of vllm serve, got '--enforce-eager'"):
        VLLMGenerator(args="--enforce-eager")
    with pytest.raises(UserError, match="start_seconds must be positive, got 0"):
        VLLMGenerator(start_seconds=0)


def test_the_tokenizer_of_these_games_ends_responses_where_the_tests_say() -> None:
    assert byte_tokenizer().eos_token_id == END
