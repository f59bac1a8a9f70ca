"""From rows to responses: where one ends, what a generator has to give, and what a template reads from the world."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.utils.chat_template_utils as chat_templates
from games import DoLast, Game, Stopped, answers_of, read
from helpers import CHATML, byte_tokenizer, tiny_model, write_rows
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from spin_lightning import ContinuousGenerator, SyntheticDataModule, TransformersGenerator
from spin_lightning.data.encoding import Encoder
from spin_lightning.generation import ResponseGenerator
from spin_lightning.generation.base import Player
from spin_lightning.generation.pair_maker import PairMaker
from spin_lightning.models.loading import end_ids, end_ids_of
from spin_lightning.models.saving import save_model
from spin_lightning.types import Response, Row, UserError

# --- Where an answer ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TransformersGenerator, ContinuousGenerator])
def test_generation_stops_at_whichever_end_comes_first_and_keeps_it(kind: type[TransformersGenerator]) -> None:
    model = tiny_model(16).eval()
    prompts, seeds = [[n, n + 1] for n in range(14)], list(range(14))

    def answers(ends: Any) -> list[Response]:
        return answers_of(kind(max_new_tokens=12), model, prompts, seeds, ends)

    endless, ends = answers([]), (3, 5, 9)
    expected = []
    for response in endless:
        place = next((n for n, token in enumerate(response.ids) if token in ends), None)
        ids = response.ids if place is None else response.ids[: place + 1]
        expected.append((ids, "length" if place is None else "stop"))
    assert [(response.ids, response.finish_reason) for response in answers(ends)] == expected
    assert {ids[-1] for ids, reason in expected if reason == "stop"} == {*ends}
    assert "length" in {reason for _, reason in expected}
    one, listed = answers(5), answers([5])
    assert [response.ids for response in one] == [response.ids for response in listed]


@pytest.mark.parametrize(
    ("generation_config", "config", "expected"),
    [([7, 5], 3, [7, 5]), (7, 3, [7]), (None, 3, [3]), (None, None, [])],
)
def test_ends_of_a_model_are_those_it_is_saved_with(
    tmp_path: Path, generation_config: Any, config: Any, expected: list[int]
) -> None:
    model = tiny_model()
    model.config.eos_token_id = config
    model.generation_config = GenerationConfig(eos_token_id=generation_config)
    model.save_pretrained(tmp_path)
    assert end_ids_of(model) == expected
    (tmp_path / "model.safetensors").unlink()  # no weights are read
    assert end_ids(str(tmp_path), byte_tokenizer()) == expected
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    assert end_ids(str(tmp_path), byte_tokenizer()) == ([] if config is None else [config])


def test_a_gguf_file_ends_answers_as_its_tokenizer_does(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")  # not read: its metadata take seconds
    assert end_ids(str(tmp_path / "model.gguf"), byte_tokenizer()) == [258]


def test_exported_policy_ends_answers_where_they_were_ended(tmp_path: Path) -> None:
    encoder, model = Encoder(byte_tokenizer()), tiny_model()
    encoder.end_at([256])
    save_model(model, encoder.tokenizer, tmp_path / "policy", "# A card\n", encoder.end_ids)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert again.generation_config.eos_token_id == [encoder.terminator_id, 256] == [258, 256]


def test_a_game_stops_at_every_end_of_its_model(tmp_path: Path) -> None:
    tokenizer, model = byte_tokenizer(), tiny_model(259)
    model.generation_config.eos_token_id = [*range(100), 256]  # ordinary tokens end nothing
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    game = Game(
        str(tmp_path / "model"),
        write_rows(tmp_path / "rows.jsonl", 4),
        tmp_path / "run",
        data={"generator": says(72, 256), "val_fraction": 0.0},
        play={"iterations": 1, "epochs": 1},
    ).play()
    assert game.data.encoder.end_ids == (258, 256)
    exported = read(tmp_path / "run" / "iteration_0" / "policy" / "generation_config.json")
    assert exported["eos_token_id"] == [258, 256]


# --- What a generator has to give -----------------------------------------------------------------------------------


class _Yields(ResponseGenerator):
    """Gives whatever a rule makes of the number of prompts."""

    def __init__(self, rule: Callable[[int], Any]) -> None:
        super().__init__(max_new_tokens=4)
        self.rule = rule

    def generate(self, prompts: Any, *args: Any) -> Any:
        return self.rule(len(prompts))


def stopped(*ids: Any, reason: Any = "stop", log_prob: Any = -1.0) -> Response:
    return Response(list(ids), reason, log_prob)


def says(*ids: int) -> ResponseGenerator:
    """A generator that says the same to every prompt."""
    return _Yields(lambda n: ((index, stopped(*ids)) for index in range(n)))


def pair_maker(
    generator: ResponseGenerator, rows: list[Row] | None = None, model: nn.Module | None = None
) -> PairMaker:
    encoder = Encoder(byte_tokenizer())
    rows = rows or [Row(({"role": "user", "content": text},), "x") for text in "abc"]
    return PairMaker(
        opponent=Player(model or tiny_model(259).eval()),
        encoder=encoder,
        generator=generator,
        prompts=[encoder.encode(number, row, 4) for number, row in enumerate(rows)],
        iteration=0,
        answers_per_prompt=1,
        seed=0,
        micro_batch_tokens=1000,
        opponent_sha256="0",
        numerics=nullcontext,
        poll=lambda: None,
    )


def new_pairs(maker: PairMaker) -> list[dict[str, Any]]:
    from spin_lightning.progress import progress

    with torch.no_grad(), progress("answering", 1, "responses") as phase:
        return maker._make_pairs(maker.prompts, {}, phase)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda n: [(0, stopped(258))], "gave 1 responses to 3 prompts"),
        (lambda n: [], "gave 0 responses to 3 prompts"),
        (lambda n: [(0, stopped(258)), (0, stopped(258))], "answered prompt 0 twice"),
        (lambda n: [(3, stopped(258))], "yielded a response to prompt 3, and there are 3 prompts"),
        (lambda n: [("0", stopped(258))], "yielded a response to prompt '0', and there are 3 prompts"),
        (lambda n: None, "gave NoneType instead of responses one by one"),
        (lambda n: torch.zeros(3, 4), "yielded Tensor instead of a pair of a prompt's number and its Response"),
        (lambda n: [(0, [258])], "yielded a tuple of int, list instead of a pair"),
        (lambda n: [(0, ([258], "stop", -1.0))], "yielded a tuple of int, tuple instead of a pair"),
        (lambda n: [(0, Response(torch.tensor([258]), "stop", -1.0))], "gave Tensor as ids"),  # type: ignore[arg-type]
        (
            lambda n: [(0, stopped(72.0, 258))],
            "gave a list of float, int as ids, which must be a list of at least one int",
        ),
        (lambda n: [(0, stopped())], "gave a list of nothing as ids"),
        (lambda n: [(0, stopped(72, 72, 72, 72, 258))], "gave a response of 5 tokens, and max_new_tokens is 4"),
        (lambda n: [(0, stopped(258, 258))], "gave a response with the token that ends one before its last place"),
        (lambda n: [(0, stopped(72))], "gave the finish_reason 'stop' to a response that ends with token 72"),
        (
            lambda n: [(0, stopped(258, reason="length"))],
            "gave the finish_reason 'length' to a response that ends with token 258",
        ),
        (
            lambda n: [(0, stopped(258, log_prob=float("nan")))],
            "gave nan as log_prob, which must be a finite number of nats",
        ),
        (lambda n: [(0, stopped(258, log_prob=None))], "gave None as log_prob"),
        (lambda n: [(0, Response([258], "stop", -1.0, [-1.0, 0.0]))], "gave 2 log_probs to a response of 1 tokens"),
    ],
)
def test_a_generator_that_gives_something_else_is_named_in_a_sentence(rule: Callable[[int], Any], words: str) -> None:
    with pytest.raises(UserError, match=r"^the generator test_turns\._Yields ") as caught:
        new_pairs(pair_maker(_Yields(rule)))
    assert words in str(caught.value) and "Mend its generate method" in str(caught.value)


def test_stored_texts_are_what_the_template_wrote_of_an_answer_s_extras() -> None:
    row = Row(({"role": "user", "content": "a", "name": "me"},), "so", {"reasoning_content": "as"})
    template = CHATML.replace("m['content'] +", "(m.reasoning_content or '') + m['content'] +")
    maker = pair_maker(says(72, 258), [row])
    maker.encoder = Encoder(byte_tokenizer(chat_template=template))
    maker.prompts = [maker.encoder.encode(0, row, 10)]
    (pair,) = new_pairs(maker)
    assert pair["chosen"] == [{"role": "assistant", "content": "asso"}]
    assert pair["prompt"] == [{"role": "user", "content": "a"}]  # what the store's schema has
    assert pair["real"] == [*pair["prompt"], *pair["chosen"]]


# --- A template that writes the date --------------------------------------------------------------------------------

DATED = "{{ '<|im_start|>' + strftime_now('%d %b %Y') + '<|im_end|>' }}" + CHATML


@pytest.fixture
def dated(tmp_path: Path) -> dict[str, Any]:
    tokenizer = byte_tokenizer(chat_template=DATED)
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return {"model": str(tmp_path / "model"), "rows": write_rows(tmp_path / "rows.jsonl", 6)}


def on_day(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    class Clock(chat_templates.datetime):  # type: ignore[misc, name-defined]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2031, 1, day, 12)

    monkeypatch.setattr(chat_templates, "datetime", Clock)


def short(dated: dict[str, Any], folder: Path, **settings: Any) -> Game:
    return Game(**dated, folder=folder, play={"iterations": 1, "epochs": 2}, **settings)


def test_a_run_goes_on_another_day_with_the_prompts_it_began_with(
    dated: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise Stopped

    on_day(monkeypatch, 1)
    undisturbed = short(dated, tmp_path / "undisturbed").play()
    with pytest.raises(Stopped):
        short(dated, tmp_path / "run", last=[DoLast(on_train_batch_end=stop)]).play()
    assert read(tmp_path / "run" / "data_report.json")["template_time"] == "2031-01-01T12:00:00"
    on_day(monkeypatch, 2)
    continued = short(dated, tmp_path / "run").play()
    assert continued.weights == undisturbed.weights
    text = continued.data.encoder.tokenizer.decode(continued.data.prompts[0].prompt_ids)
    assert text.startswith("<|im_start|>01 Jan 2031<|im_end|>")
    assert read(tmp_path / "run" / "data_report.json")["template_time"] == "2031-01-01T12:00:00"
    exported = tmp_path / "run" / "iteration_0" / "policy"
    assert byte_tokenizer().from_pretrained(exported).chat_template == DATED
    new = short(dated, tmp_path / "new")  # and a new run has a new day
    new.play()
    assert read(tmp_path / "new" / "data_report.json")["template_time"] == "2031-01-02T12:00:00"


def test_a_damaged_time_is_refused(dated: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data_report.json").write_text('{"template_time": "soon"}')
    with pytest.raises(UserError, match=r"template_time in the run's data_report\.json must be a time .* got 'soon'"):
        short(dated, tmp_path / "run").play()


# --- Rows that the template refuses, and a sample -------------------------------------------------------------------

STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
)


def data_of(path: Path, **settings: Any) -> SyntheticDataModule:
    data = SyntheticDataModule(str(path), **{"val_fraction": 0.0, "batch_size": 1, **settings})
    data.tokenizer = byte_tokenizer(chat_template=STRICT)
    return data


def rows_with_systems(path: Path, count: int, every: int) -> Path:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [[{"role": "system", "content": "s"}, *turns] if n % every == 0 else turns for n in range(count)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def test_rows_that_the_template_refuses_are_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rows_with_systems(tmp_path / "rows.jsonl", 20, 3)  # rows 1, 4, 7, 10, 13, 16, 19
    with pytest.raises(UserError, match=r"^7 of 20 rows cannot be encoded") as caught:
        data_of(path).setup("fit")
    lines = str(caught.value).splitlines()
    assert [re.findall(r"line (\d+):", line) for line in lines[1:6]] == [["1"], ["4"], ["7"], ["10"], ["13"]]
    assert "System role not supported" in lines[1] and lines[6] == "  and 2 more"
    assert lines[7].endswith("or set data.on_bad_row: drop to leave them out.")
    data = data_of(path, on_bad_row="drop")
    data.setup("fit")
    assert len(data.prompts) == 13 and [prompt.prompt_id for prompt in data.prompts] == list(range(13))
    assert data.report["train"]["refused_rows"]["count"] == 7
    assert "note: rows that the chat template refuses; left out: 7, the first" in capsys.readouterr().out


def test_a_template_that_refuses_every_row_is_refused_with_drop_too(tmp_path: Path) -> None:
    path = rows_with_systems(tmp_path / "rows.jsonl", 2, 1)
    with pytest.raises(UserError, match=r"2 of 2 rows cannot be encoded(.|\n)*Mend or remove these rows\.$"):
        data_of(path, on_bad_row="drop").setup("fit")


def test_a_sample_is_encoded_alone_and_the_same_one_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(write_rows(tmp_path / "rows.jsonl", 40))
    chosen = []
    for seed in (0, 0, 1):
        data = data_of(path, seed=seed, batch_size=12)
        data.sample = 6
        data.setup("fit")
        chosen.append([prompt.row.prompt[0]["content"] for prompt in data.prompts])
        assert data.report["train_data"]["rows_read"] == 40 and data.report["train"]["rows"] == 6
    assert chosen[0] == chosen[1] != chosen[2]
    assert "note: of 40 rows 6 are encoded and counted (train), a sample" in capsys.readouterr().out


def test_a_context_that_is_the_tokenizer_s_is_called_so(tmp_path: Path) -> None:
    data = data_of(Path(write_rows(tmp_path / "rows.jsonl", 4)))
    data.tokenizer.model_max_length = 50
    with pytest.raises(UserError, match=r"need \d+ tokens, but the tokenizer's model_max_length is 50"):
        data.setup("fit")
