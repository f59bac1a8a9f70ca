"""The rows of any stage: one cap on responses, real responses served without a sampler, and what only a game adds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers import byte_tokenizer
from jsonargparse import ArgumentParser, Namespace

from spin_lightning import ContinuousGenerator, PreferenceDataModule, RowDataModule, SyntheticDataModule
from spin_lightning.types import ResponseBatch, UserError


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Five questions, answered with 1 to 5 letters."""
    rows = [{"prompt": f"q{n}", "completion": "x" * (n + 1)} for n in range(5)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def ready(data: RowDataModule) -> Any:
    data.tokenizer, data.end_ids = byte_tokenizer(), []
    data.setup("fit")
    return data


def test_rows_are_served_without_a_sampler_and_cut_at_the_cap(path: str) -> None:
    data = ready(RowDataModule(path, val_fraction=0.2, batch_size=2, max_response_tokens=3))
    assert not hasattr(data, "generator") and len(data.val_prompts) == 1
    prompts = [*data.prompts, *data.val_prompts]
    assert sorted(len(prompt.real_ids) for prompt in prompts) == [2, 3, 3, 3, 3]
    assert data.report["train"]["cut_answers"]["count"] + data.report["held_out"]["cut_answers"]["count"] == 3
    batches = list(data.train_dataloader())
    assert [type(part) for batch in batches for part in batch] == [ResponseBatch, ResponseBatch]
    found = sorted(token for batch in batches for part in batch for token in part.input_ids[part.scored].tolist())
    assert found == sorted(token for prompt in data.prompts for token in prompt.real_ids)


def test_a_game_s_data_without_a_game_serve_the_same_batches(path: str) -> None:
    plain = ready(RowDataModule(path, batch_size=2, max_response_tokens=3, seed=5))
    game = ready(SyntheticDataModule(path, batch_size=2, generator=ContinuousGenerator(max_new_tokens=3), seed=5))
    ids = [[part.input_ids.tolist() for batch in data.train_dataloader() for part in batch] for data in (plain, game)]
    assert ids[0] == ids[1] and plain.prompts_hash == game.prompts_hash


def test_one_cap_for_real_and_generated_responses(path: str) -> None:
    assert RowDataModule(path).max_response_tokens == SyntheticDataModule(path).max_response_tokens == 256
    generator = ContinuousGenerator(max_new_tokens=7)
    assert SyntheticDataModule(path, generator=generator, max_response_tokens=7).max_response_tokens == 7
    with pytest.raises(
        UserError, match=r"data\.max_response_tokens is 8, and data\.generator\.max_new_tokens 7: real and"
    ):
        SyntheticDataModule(path, generator=generator, max_response_tokens=8)
    data = SyntheticDataModule(path, batch_size=2)
    data.generator = ContinuousGenerator(max_new_tokens=3)
    assert max(len(prompt.real_ids) for prompt in ready(data).prompts) == 3
    with pytest.raises(
        UserError, match=r"data\.generator must be a ResponseGenerator, got 0\.1\. Of the settings, give"
    ):
        SyntheticDataModule(path, None, 0.1)
    with pytest.raises(UserError, match=r"data\.max_response_tokens must be at least 1, got 0"):
        RowDataModule(path, max_response_tokens=0)
    for data, advice in (
        (
            RowDataModule(path, batch_size=1, max_response_tokens=90),
            "Lower data.max_prompt_tokens or data.max_response_tokens.",
        ),
        (SyntheticDataModule(path, batch_size=1), "Lower data.max_prompt_tokens or data.generator.max_new_tokens."),
    ):
        with pytest.raises(UserError) as refusal:
            ready(data).refuse_longer_than(100)
        assert str(refusal.value).endswith(advice)


def test_the_clock_hands_over_rows_and_what_makes_batches_of_them(path: str) -> None:
    @dataclass
    class Set:
        rows: pa.Table

        def collate(self, rows: list[dict[str, Any]], max_tokens: int) -> list[Any]:
            return [max_tokens, *((row["prompt_id"], row["pair_id"], row["word"]) for row in rows)]

    class Clock:
        def ensure_iteration(self) -> Set:
            return Set(pa.table({"prompt_id": [4, 4, 9], "word": ["a", "b", "c"]}))

    data = ready(SyntheticDataModule(path, batch_size=2, micro_batch_tokens=77, keep_prompts_together=True))
    data.game = Clock()
    batches = list(data.train_dataloader())
    assert [batch[0] for batch in batches] == [77, 77]
    rows = [row for batch in batches for row in batch[1:]]
    assert sorted(rows) == [(4, 0, "a"), (4, 1, "b"), (9, 2, "c")]
    assert abs(rows.index((4, 0, "a")) - rows.index((4, 1, "b"))) == 1


@pytest.mark.parametrize("kind", [RowDataModule, SyntheticDataModule, PreferenceDataModule])
def test_a_parser_finds_every_setting_with_its_type_default_and_help(kind: type[RowDataModule]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "data")
    of_game = {"generator": None, "answers_per_prompt": 1, "history": 1, "keep_prompts_together": False}
    expected = {
        "val_data": None, "val_fraction": 0.05, "format": "auto", "columns": None, "split": "train", "max_rows": None,
        "data_revision": None, "on_bad_row": "error", "prompt_template": None, "max_prompt_tokens": 512, "seed": 0,
        "max_response_tokens": 256, "batch_size": 8, "micro_batch_tokens": 1024, "num_workers": 0, "train_data": None,
        "tokenizer_name_or_path": None, "other_data": None, **(of_game if kind is SyntheticDataModule else {}),
        **({"too_long": "cut"} if kind is PreferenceDataModule else {}),
    }  # fmt: skip
    if kind is SyntheticDataModule:
        expected["max_response_tokens"] = None
    assert parser.get_defaults().data == Namespace(**expected)
    helps = {action.dest.partition(".")[2]: str(action.help) for action in parser._actions}
    assert [name for name in expected if len(helps[name]) < 15] == []
    with pytest.raises(Exception, match=r"data\.batch_size"):
        parser.parse_args(["--data.train_data=a", "--data.batch_size=x"])
    made = parser.instantiate_classes(
        parser.parse_args(["--data.train_data=a", "--data.val_data=b", "--data.seed=3"])
    ).data
    assert (made.train_data, made.val_data, made.seed) == ("a", "b", 3)
