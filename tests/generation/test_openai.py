"""Responses of a server: over real sockets, by a server that answers as vLLM's does and samples from a tiny model."""

from __future__ import annotations

import http.client
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import Drop, FakeVllm, uniform
from games import Do, FromModel, Game, Stopped, answers_of, pairs_of, read, serving
from helpers import load, save_tiny_model, tiny_model

from spin_lightning import OpenAIGenerator, SpinLightningModule, TransformersGenerator, UserError
from spin_lightning.generation import openai
from spin_lightning.generation.base import Player, opened
from spin_lightning.generation.server import Server, Unanswered
from spin_lightning.runs import processes, signals
from spin_lightning.types import Interrupted

PROMPTS = [[5, 6, 7, number] for number in range(10)]
SEEDS = [1000 + number for number in range(10)]
END = 258


#: The scripted server's sockets, which it drops as real ones do, may be collected in a later test.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def opponent(tmp_path: Path) -> Player:
    return Player(load(save_tiny_model(tmp_path / "opponent")).eval(), tmp_path / "opponent")


@pytest.fixture
def server(opponent: Player) -> Iterator[FakeVllm]:
    with serving(FromModel(opponent.model)) as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "PAUSES", (0.01, 0.02))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def respond(server: FakeVllm, opponent: Player, **settings: Any) -> dict[int, Any]:
    generator = OpenAIGenerator(server.url, **{"max_new_tokens": 5, **settings})
    with opened(generator, opponent):
        return dict(generator.generate(PROMPTS, SEEDS, END, 0))


def test_a_server_s_responses_are_its_ids_with_their_log_probs(server: FakeVllm, opponent: Player) -> None:
    found = respond(server, opponent, batch_size=3)
    expected = answers_of(TransformersGenerator(5), opponent.model, PROMPTS, SEEDS, END)
    assert [found[number].ids for number in range(10)] == [response.ids for response in expected]
    for number, response in enumerate(expected):
        assert found[number].finish_reason == response.finish_reason
        assert found[number].log_prob == pytest.approx(response.log_prob, abs=1e-4)
    assert 2 <= server.most_at_once <= 3
    asked = [path for path in server.paths() if path != "/v1/completions"]
    assert asked == ["/server_info?config_format=json", "/collective_rpc", "/reset_prefix_cache", "/v1/models"]
    assert server.asked[1][1] == {"method": "reload_weights", "kwargs": {"weights_path": str(opponent.folder)}}
    requests = [body for path, body in server.asked if path == "/v1/completions"]
    assert sorted((body["seed"], body["prompt"]) for body in requests) == list(zip(SEEDS, PROMPTS, strict=True))
    for body in requests:  # what a model's folder could set otherwise, or an end of its own
        assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (1.0, 1.0, 0, 0.0)
        assert (body["stop_token_ids"], body["ignore_eos"], body["repetition_penalty"]) == ([END], True, 1.0)


def test_of_several_processes_the_first_has_the_server_read_the_weights(
    server: FakeVllm, opponent: Player, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = []
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes, "wait", lambda: met.append(list(server.paths())))
    assert len(respond(server, opponent)) == 10
    assert met == [[]]  # nothing was asked before all had met
    assert {"/collective_rpc", "/reset_prefix_cache"}.isdisjoint(server.paths())


def play(server: FakeVllm, model: str, rows: str, folder: Path, **settings: Any) -> Game:
    generator = OpenAIGenerator(server.url, max_new_tokens=5, batch_size=4)
    return Game(model, rows, folder, **{"data": {"generator": generator}, **settings}).play()


def ids_of(folder: Path, iteration: int) -> list[Any]:
    return [(row["prompt_id"], row["seed"], row["generated_ids"]) for row in pairs_of(folder, iteration)]


def test_a_game_with_a_server_is_the_game_with_our_own_generator(
    model: str, rows: str, plain: Game, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(FromModel(model)) as server:
        folders: list[str] = []
        server.reload = lambda folder: (folders.append(folder), server.sample.become(folder))[0]  # type: ignore
        game = play(server, model, rows, tmp_path)
    assert game.losses == pytest.approx(plain.losses, abs=1e-4)
    for number in (0, 1):
        assert ids_of(tmp_path, number) == ids_of(plain.folder / "run", number)  # type: ignore[attr-defined]
        manifest = read(tmp_path / f"iteration_{number}" / "pairs_manifest.json")
        assert manifest["binding"]["engine"] == {
            "server": "vllm", "version": "0.32.0", "mode": "eager", "dtype": "torch.float32", "quantization": None,
        }  # fmt: skip
        gap = manifest["statistics"]["sampler_gap"]
        assert gap["mean"] <= gap["most"] < 1e-5 and abs(gap["signed"]) < 1e-5
    assert folders == [str(tmp_path / "iteration_0" / name) for name in ("opponent", "policy")]
    assert not (tmp_path / "iteration_0" / "opponent").exists()  # needed no more
    assert "log-probs and the opponent's differ by 0.000 nats a token" in capsys.readouterr().out


def test_a_game_stopped_in_the_middle_of_generation_goes_on_with_the_missing_shard(
    model: str, rows: str, tmp_path: Path
) -> None:
    with serving(FromModel(model)) as server:
        play(server, model, rows, tmp_path / "whole")
        server.sample.become(model)  # type: ignore[attr-defined]
        server.asked.clear()
        server.fault = lambda path, body, answer: (
            (400, "enough") if server.paths().count("/v1/completions") > 7 else None
        )
        with pytest.raises(UserError, match=r"answered with status 400: for /v1/completions: enough"):
            play(server, model, rows, tmp_path / "run")
        assert len(read(tmp_path / "run/iteration_0/pairs_manifest.json")["shards"]) == 1
        server.fault = lambda *_: None
        server.version = "0.33.0"
        with pytest.raises(
            UserError, match=r"made by something else than this run; what differs: engine\. Use another"
        ):
            play(server, model, rows, tmp_path / "run")
        server.version = "0.32.0"
        server.asked.clear()
        play(server, model, rows, tmp_path / "run")
        assert server.paths().count("/v1/completions") == 3 + 8  # of the second shard, and of iteration 1
    for number in (0, 1):
        assert pairs_of(tmp_path / "run", number) == pairs_of(tmp_path / "whole", number)


def test_training_goes_on_without_the_server_that_sampled(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            raise Stopped

    short = {"play": {"iterations": 1}}
    with serving(FromModel(model)) as server:
        whole = play(server, model, rows, tmp_path / "whole", **short)
        server.sample.become(model)  # type: ignore[attr-defined]
        with pytest.raises(Stopped):
            play(server, model, rows, tmp_path / "run", last=[], callbacks=[Do(on_train_batch_start=stop)], **short)
    assert play(server, model, rows, tmp_path / "run", **short).weights == whole.weights
    said = capsys.readouterr().out
    assert f"note: the server at {server.url} is not there" in said
    assert "Training goes on without; the next iteration needs it." in said


def without(key: str) -> Callable[[Any], Any]:
    def change(answer: Any) -> Any:
        del answer["choices"][0][key]
        return answer

    return change


def with_choice(**changes: Any) -> Callable[[Any], Any]:
    return lambda answer: {"choices": [answer["choices"][0] | changes]}


#: What a server answers to a request for a response, and what the user is told.
NONSENSE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no token ids": (without("token_ids"), r"gave text without token ids.*Use vLLM 0\.10\.2 or newer"),
    "no choice": (lambda _: {"choices": []}, r"answered \"\{'choices': \[\]\}\" instead of one choice"),
    "a list": (lambda _: [1], r"answered '\[1\]' instead of one choice"),
    "no JSON": (lambda _: "<html>hello", r"status 200: for /v1/completions no JSON but '<html>hello'"),
    "words": (with_choice(token_ids=["a"]), r"gave \['a'\] as token_ids, which must be 1 to 5 ids"),
    "no response": (with_choice(token_ids=[]), r"gave \[\] as token_ids"),
    "too long": (with_choice(token_ids=[1] * 6), r"gave \[1, 1, 1, 1, 1, 1\] as token_ids, which must be 1 to 5"),
    "end within": (with_choice(token_ids=[END, 1]), r"with one of \[258\] in the last place only"),
    "cut by others": (with_choice(token_ids=[1], finish_reason="abort"), "ended a response by 'abort'"),
    "no end": (with_choice(token_ids=[1], finish_reason="stop"), r"whose last token is 1; 'stop' belongs to \[258\]"),
    "NaN": (with_choice(token_ids=[1], finish_reason="length", logprobs={"token_logprobs": [math.nan]}),
            r"gave \[nan\] as token_logprobs of 1 tokens"),
    "no log-probs": (with_choice(logprobs=None), r"gave None as token_logprobs"),
    "another prompt": (with_choice(prompt_token_ids=[1]), "read other tokens than the prompt it was given"),
    "an unknown model": (lambda _: (404, "The model `x` does not exist"), "status 404: for /v1/completions: The model"),
}  # fmt: skip


@pytest.mark.parametrize("case", NONSENSE)
def test_a_server_that_answers_nonsense_is_named(server: FakeVllm, opponent: Player, case: str) -> None:
    change, words = NONSENSE[case]
    server.fault = lambda path, body, answer: change(answer) if path == "/v1/completions" else None
    with pytest.raises(UserError, match=f"the server at {server.url} .*{words}"):
        respond(server, opponent)


def after(count: int, fault: Any) -> Any:
    """The fault, from a number of requests for responses on."""
    seen = iter(range(10**6))
    return lambda path, body, answer: fault() if path == "/v1/completions" and next(seen) >= count else None


def drop() -> None:
    raise Drop


def test_a_server_that_dies_in_the_middle_is_asked_again_and_then_given_up(server: FakeVllm, opponent: Player) -> None:
    server.fault = after(4, drop)
    words = r"does not answer, asked 3 times: no answer to /v1/completions \(Remote end closed .*is finished is kept"
    with pytest.raises(UserError, match=words):
        respond(server, opponent)
    server.fault = after(4, lambda: (500, "EngineCore encountered an issue"))
    with pytest.raises(UserError, match=r"asked 3 times: status 500 for /v1/completions: EngineCore encountered"):
        respond(server, opponent)


def test_a_server_that_fails_now_and_then_gives_the_same_responses(server: FakeVllm, opponent: Player) -> None:
    whole = respond(server, opponent)
    failed = set()

    def fault(path: str, body: Any, answer: Any) -> Any:
        if path != "/v1/completions" or (seed := body["seed"]) in failed:
            return None
        failed.add(seed)
        if seed % 2:
            raise Drop
        return 503, "overloaded"

    server.fault = fault
    assert respond(server, opponent) == whole
    assert failed == set(SEEDS)


def test_a_slow_server_is_given_up_with_the_settings_that_help(server: FakeVllm, opponent: Player) -> None:
    server.fault = after(0, lambda: time.sleep(1.0))
    words = r"no answer to /v1/completions within 0.3 s\. If it is slow, lower data\.generator\.batch_size or raise "
    with pytest.raises(UserError, match=words + r"data\.generator\.timeout_seconds \(now 0\.3\)"):
        respond(server, opponent, timeout_seconds=0.3, batch_size=2)


def test_nobody_waits_for_a_server_that_hangs_when_the_run_ends(server: FakeVllm, opponent: Player) -> None:
    hangs = threading.Event()
    server.fault = after(4, lambda: hangs.wait(30) and None)
    generator = OpenAIGenerator(server.url, max_new_tokens=5, batch_size=2)
    with opened(generator, opponent):
        responses = generator.generate(PROMPTS, SEEDS, END, 0)
        next(responses)
        began = time.monotonic()
        responses.close()
        assert time.monotonic() - began < 5
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("responses")]
    hangs.set()


def test_a_signal_ends_the_wait_for_a_server_that_hangs(
    server: FakeVllm, opponent: Player, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    server.fault = after(0, lambda: hangs.wait(30) and None)
    monkeypatch.setattr(signals, "_received", [15])
    monkeypatch.setattr(openai, "POLL_SECONDS", 0.05)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        respond(server, opponent)
    hangs.set()


def test_a_server_of_another_model_is_refused_with_its_distance(
    server: FakeVllm, opponent: Player, capsys: pytest.CaptureFixture[str]
) -> None:
    server.sample.become(tiny_model(259, seed=7))  # type: ignore[attr-defined]
    words = r"log-probs that are \d\S* nats a token from the opponent's\. It has other weights than .*opponent"
    with pytest.raises(UserError, match=words):
        respond(server, opponent, reloads=False)
    assert "/collective_rpc" not in server.paths()
    respond(server, opponent)  # it is told to read the opponent's
    assert "note" not in capsys.readouterr().out

    def shifted(path: str, body: Any, answer: Any) -> Any:
        if path == "/v1/completions":
            logs = answer["choices"][0]["logprobs"]
            logs["token_logprobs"] = [value - 0.1 for value in logs["token_logprobs"]]

    server.fault = shifted
    respond(server, opponent)
    expected = "gives log-probs that are 0.1 nats a token from the opponent's: it samples another distribution"
    assert f"note: the server at {server.url} {expected}" in capsys.readouterr().out


#: What a server answers beside responses, and what the user is told.
UNSUITABLE: dict[str, tuple[str, Any, str]] = {
    "no development mode": ("/collective_rpc", (404, "Not Found"), r"\(status 404.*VLLM_SERVER_DEV_MODE=1 in its env"),
    "no such folder": ("/collective_rpc", (500, "No such file"), r"did not read the opponent's weights from '/.*No"),
    "cache in use": ("/reset_prefix_cache", {"success": False},
                     r"has read the opponent's weights, and cannot forget .*: it still answers requests that are not "
                     r"of this iteration\. Wait until it has answered them .* let nobody else ask it"),
    "a wrong key": ("/v1/models", (401, "Unauthorized"), r"answered with status 401: for /v1/models: Unauthorized"),
    "no list": ("/v1/models", {"data": 5}, r"listed .* as its models"),
    "two models": ("/v1/models", {"data": [{"id": "b"}, {"id": "a"}]}, r"serves \['a', 'b'\]. Set data.generator"),
    "a short context": ("/v1/models", {"data": [{"id": "a", "max_model_len": 8}]},
                        r"takes at most 8 tokens, and the longest prompt has 4 and a response up to 5\. Start it with"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUITABLE)
def test_a_server_that_does_not_suit_is_named_before_it_is_asked(server: FakeVllm, opponent: Player, case: str) -> None:
    where, what, words = UNSUITABLE[case]
    server.fault = lambda path, body, answer: what if path == where else None
    with pytest.raises(UserError, match=f"the server at {server.url} .*{words}"):
        respond(server, opponent)
    assert "/v1/completions" not in server.paths()


def test_a_server_that_would_keep_the_old_head_of_a_tied_model_is_refused(
    server: FakeVllm, opponent: Player, tmp_path: Path
) -> None:
    server.device = "cpu"
    with pytest.raises(
        UserError, match=r"runs on a CPU, where vLLM goes on with the old head .*let VLLMGenerator start"
    ):
        respond(server, opponent)
    folder = save_tiny_model(tmp_path / "untied", tie_word_embeddings=False)
    respond(server, Player(load(folder).eval(), Path(folder)))  # every layer's weights have a name of their own


def test_a_model_s_name_is_taken_or_refused(server: FakeVllm, opponent: Player) -> None:
    server.models = [{"id": "a"}, {"id": "b"}]
    respond(server, opponent, model="b")
    assert {body["model"] for path, body in server.asked if path == "/v1/completions"} == {"b"}
    with pytest.raises(UserError, match=r"serves \['a', 'b'\]\. Set data\.generator\.model to one of them; it is 'c'"):
        respond(server, opponent, model="c")


def test_a_server_that_an_iteration_needs_is_missed_before_the_model_loads(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(uniform(4)) as server:
        pass
    monkeypatch.setattr(SpinLightningModule, "configure_model", lambda self: pytest.fail("it loads"))
    words = (
        rf"the server at {server.url} is not there: no answer to /v1/models \(Connection refused\)\. Start it, or mend"
    )
    with pytest.raises(UserError, match=rf"^{words} data\.generator\.url; docs/vllm\.md"):
        play(server, model, rows, tmp_path)
    with serving(uniform(4)) as server:
        server.fault = lambda *_: (404, "Not Found")
        with pytest.raises(
            UserError, match=r"does not list its models: status 404: for /v1/models: Not Found\. It must"
        ):
            play(server, model, rows, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "", "unix:socket"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=f"must be such as 'http://localhost:8000', got '{url}'"):
        OpenAIGenerator(url)


def test_a_url_with_a_password_is_refused_without_saying_it() -> None:
    with pytest.raises(UserError, match="Put a key into VLLM_API_KEY") as raised:
        OpenAIGenerator("http://me:canary@host:8000")
    assert "canary" not in str(raised.value)


def test_a_query_that_would_not_be_sent_is_refused_without_saying_it() -> None:
    with pytest.raises(UserError, match="a key belongs into VLLM_API_KEY") as raised:
        OpenAIGenerator("https://host/v1?key=canary")
    assert "canary" not in str(raised.value)


def test_urls_as_others_write_them_and_a_key(server: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Server(f"{server.url}/v1/").ask("/version") == {"version": "0.32.0"}
    assert Server("https://host/behind/a/proxy/v1").prefix == "/behind/a/proxy"
    seen = []
    monkeypatch.setattr("http.client.HTTPConnection.request", lambda self, *args: seen.append(args[3]) or drop())
    monkeypatch.setenv("VLLM_API_KEY", "canary")
    with pytest.raises(Drop):
        Server(server.url).ask("/version")
    assert seen[0]["Authorization"] == "Bearer canary"


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_request_that_begins_as_the_run_ends_is_not_waited_for(
    server: FakeVllm, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, is_over = Server(server.url), threading.Event()
    connect = http.client.HTTPConnection.connect

    def end(connection: Any) -> None:
        is_over.set()
        asked.hang_up()
        connect(connection)

    with monkeypatch.context() as patch:
        patch.setattr(http.client.HTTPConnection, "connect", end if when == "while" else connect)
        is_over.set() if when == "before" else None
        with pytest.raises(Unanswered, match="nobody waits for it"):
            asked.ask("/version", None, 60.0, is_over)
    assert "/version" not in server.paths()
    assert asked.ask("/version") == {"version": "0.32.0"}


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan])
def test_a_timeout_is_a_time(seconds: float) -> None:
    with pytest.raises(UserError, match="timeout_seconds must be positive, got"):
        OpenAIGenerator("http://localhost", timeout_seconds=seconds)
