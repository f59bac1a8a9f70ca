"""Rows with two responses: every layout, what is said of a pair, what is left out, and how pairs are served."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
import torch
from helpers import byte_tokenizer
from pyarrow import parquet

from spin_lightning import PreferenceDataModule, RowDataModule, SyntheticDataModule
from spin_lightning.data.rows import load_rows
from spin_lightning.generation.pair_store import SCHEMA
from spin_lightning.types import PairBatch, Row, UserError

ASKED, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "1+1?"), ("assistant", "2"), ("assistant", "3")))
PAIR = {"prompt": "1+1?", "chosen": "2", "rejected": "3"}


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read(tmp_path: Path, *records: object, **settings: Any) -> list[Row]:
    return load_rows(write(tmp_path / "rows.jsonl", *records), **{"needs_rejected": True, **settings}).rows


def ready(data: RowDataModule) -> Any:
    data.tokenizer, data.end_ids = byte_tokenizer(), []
    data.setup("fit")
    return data


def pairs(tmp_path: Path, *records: object, **settings: Any) -> Any:
    return ready(PreferenceDataModule(write(tmp_path / "rows.jsonl", *records), **{"val_fraction": 0, **settings}))


# --- Layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        PAIR,
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "1+1?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "score_chosen": 8},  # UltraFeedback
        {"prompt": "1+1?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED, GOOD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": "\n\nHuman: 1+1?\n\nAssistant: 2", "rejected": "\n\nHuman: 1+1?\n\nAssistant: 3"},  # HH-RLHF
        {"input": {"messages": [ASKED]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},  # OpenAI
        {"question": "1+1?", "chosen": "2", "rejected": "3"},
        {"real": [ASKED, GOOD], "generated": [ASKED, BAD]},  # the SPIN authors'
    ],
)
def test_every_layout_gives_both_responses_and_sft_reads_the_same_row_without_the_worse_one(
    tmp_path: Path, record: dict[str, Any]
) -> None:
    [row] = read(tmp_path, record)
    assert (row.prompt, row.real, row.rejected) == ((ASKED,), "2", "3")
    assert (row.preference, row.margin, row.columns) == (1.0, 0.0, {})
    record.pop("messages", None)  # fits another layout too, where only the better response is read
    [row] = read(tmp_path, record, needs_rejected=False)
    assert (row.prompt, row.real, row.rejected) == ((ASKED,), "2", None)


def test_a_system_text_and_extras_of_the_worse_response_are_read(tmp_path: Path) -> None:
    thinking = {**BAD, "reasoning_content": "hm"}
    [row] = read(tmp_path, {"system": "Be brief.", "prompt": [ASKED], "chosen": [GOOD], "rejected": [thinking]})
    assert row.prompt[0] == {"role": "system", "content": "Be brief."} and row.prompt[1] == ASKED
    assert row.rejected_extras == {"reasoning_content": "hm"} and row.real_extras == {}


def test_a_game_s_own_pairs_are_read_and_what_was_cut_has_no_terminator(tmp_path: Path) -> None:
    empty = dict.fromkeys(SCHEMA.names)
    record = {
        **empty, "prompt_id": 0, "prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD], "real": [ASKED, GOOD],
        "generated": [ASKED, BAD], "prompt_ids": [1], "real_ids": [5, 2], "generated_ids": [6],
        "real_finish_reason": "stop", "generated_finish_reason": "length",
    }  # fmt: skip
    folder = tmp_path / "pairs"
    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([record], schema=SCHEMA), folder / "iteration_0-000000000.parquet")
    data = ready(PreferenceDataModule(str(folder), val_fraction=0, batch_size=1))
    [prompt] = data.prompts
    ends = data.encoder.end_ids
    assert data.encoder.decode(prompt.real_ids) == "2" and prompt.real_ids[-1] in ends
    assert data.encoder.decode(prompt.rejected_ids) == "3" and prompt.rejected_ids[-1] not in ends
    assert (prompt.real_finish_reason, prompt.rejected_finish_reason) == ("stop", "length")
    assert data.report["train"]["cut_rejected"]["count"] == 1
    assert load_rows(str(folder)).format == "chosen_rejected"


def test_a_preference_below_one_half_swaps_the_sides_once_and_says_so(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {**PAIR, "preference": 0.3, "margin": -1.5},
        {**PAIR, "preference": 0.5},
        {**PAIR, "preference": None},
        {**PAIR, "preference": "0", "margin": "2"},
    )
    loaded = load_rows(path, needs_rejected=True)
    found = [(row.real, row.rejected, row.preference, row.margin) for row in loaded.rows]
    assert found == [("3", "2", 0.7, 1.5), ("2", "3", 0.5, 0.0), ("2", "3", 1.0, 0.0), ("3", "2", 1.0, -2.0)]
    assert "2 prefer the second answer, which was made the first" in loaded.description
    assert loaded.rows[0].swapped.swapped == loaded.rows[0]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "1+1?", "chosen": "2"}, "A row of preferences needs two answers to one prompt.*--data.columns"),
        ({**PAIR, "preference": 1.2}, "column 'preference' is the probability .* from 0 to 1, got 1.2"),
        ({**PAIR, "preference": "often"}, "column 'preference' must be a number, got str 'often'"),
        ({**PAIR, "margin": [1]}, "column 'margin' must be a number, got list"),
        ({**PAIR, "chosen": [ASKED, GOOD], "rejected": [GOOD, ASKED, BAD]}, "the two answers follow different conver"),
        ({**PAIR, "rejected": None}, "column 'rejected' must be text, got nothing"),
        ({**PAIR, "chosen": " "}, "the real answer is blank"),
        ({**PAIR, "rejected_finish_reason": "eos"}, "must be 'stop' or 'length', got str 'eos'"),
    ],
)
def test_a_row_that_is_no_preference_is_refused_in_words(tmp_path: Path, record: object, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        read(tmp_path, record)


def test_a_column_of_preferences_may_have_another_name(tmp_path: Path) -> None:
    record = {"q": "1+1?", "good": "2", "bad": "3", "p": 0.9}
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "preference": "p"}
    [row] = read(tmp_path, record, columns=columns)
    assert (row.real, row.rejected, row.preference) == ("2", "3", 0.9)


# --- Ids, counts and hashes -------------------------------------------------------------------------------------------


def test_both_responses_are_encoded_behind_one_prompt_and_cut_alike(tmp_path: Path) -> None:
    record = {"prompt": "q", "chosen": "abc", "rejected": "abcdefgh", "preference": 0.9}
    data = pairs(tmp_path, record, batch_size=1, max_response_tokens=5)
    [prompt] = data.prompts
    alone = [data.encoder.encode(0, Row(prompt.row.prompt, text), 5) for text in ("abc", "abcdefgh")]
    assert [prompt.prompt_ids] * 2 == [of_one.prompt_ids for of_one in alone]
    assert [prompt.real_ids, prompt.rejected_ids] == [of_one.real_ids for of_one in alone]
    assert (prompt.real_finish_reason, prompt.rejected_finish_reason) == ("stop", "length")
    assert data.report["train"]["rejected_tokens"]["most"] == 5


def test_what_teaches_nothing_or_is_too_long_is_left_out_and_counted(tmp_path: Path) -> None:
    records = [PAIR, {**PAIR, "rejected": "2"}, {**PAIR, "chosen": "123456"}, {**PAIR, "rejected": "123456789"}]
    settings: dict[str, Any] = {"batch_size": 1, "max_response_tokens": 5}
    cut, drop = pairs(tmp_path, *records, **settings), pairs(tmp_path, *records, too_long="drop", **settings)
    counts = [[data.report["train"][name]["count"] for name in data.also_counted] for data in (cut, drop)]
    assert counts == [[1, 1, 0], [0, 1, 2]]
    assert (len(cut.prompts), len(drop.prompts)) == (3, 1)
    with pytest.raises(UserError, match=r"all 1 rows .* are left out \(cut_rejected 0, same_answers 1, long_answers 0"):
        pairs(tmp_path, {**PAIR, "rejected": "2"})
    with pytest.raises(
        UserError, match=r"same_answers 1.* of 1 rows differ, likely .* data\.max_response_tokens 5: raise it"
    ):
        pairs(tmp_path, {**PAIR, "chosen": "1234567", "rejected": "1234589"}, **settings)
    with pytest.raises(UserError, match=r"data\.too_long must be 'cut' or 'drop', got 'wrap'"):
        PreferenceDataModule("rows.jsonl", too_long="wrap")  # type: ignore[arg-type]


def test_the_hash_of_rows_binds_what_is_used_of_them_and_is_that_of_before_for_other_rows(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"rejected": "4"}, {"preference": 0.8}, {"margin": 1}]
    hashes = {pairs(tmp_path, {**PAIR, **change}, batch_size=1).prompts_hash for change in changes}
    assert len(hashes) == 4
    plain = ready(RowDataModule(write(tmp_path / "rows.jsonl", PAIR), val_fraction=0, batch_size=1))
    other = write(tmp_path / "other.jsonl", {"prompt": "1+1?", "completion": "2"})
    game = ready(SyntheticDataModule(other, val_fraction=0, batch_size=1))
    assert plain.prompts_hash == game.prompts_hash not in hashes


def test_pairs_are_served_with_what_is_said_of_them_and_ask_a_prompt_once(tmp_path: Path) -> None:
    records = [{**PAIR, "preference": 0.8, "margin": 0.5}, {**PAIR, "rejected": "4"}]
    data = pairs(tmp_path, *records, {"prompt": "q", "chosen": "r", "rejected": "s"}, batch_size=3)
    [batch] = data.train_dataloader()
    [part] = batch
    assert isinstance(part, PairBatch) and len(part) == 3 and len(part.responses.lengths) == 2
    order = part.pair_ids.argsort()
    assert torch.equal(part.preference[order], torch.tensor([0.8, 1.0, 1.0]))
    assert torch.equal(part.margin[order], torch.tensor([0.5, 0.0, 0.0]))
    assert part.opponent.real.isnan().all() and part.initial is None
    scored = part.responses.input_ids[part.responses.scored].split(part.responses.response_lengths.tolist())
    for pair, prompt in zip(order.tolist(), data.prompts, strict=True):
        assert scored[part.real[pair]].tolist() == prompt.real_ids
        assert scored[part.generated[pair]].tolist() == prompt.rejected_ids


def test_held_out_pairs_are_served_in_order(tmp_path: Path) -> None:
    records = [{"prompt": f"q{n}", "chosen": "r", "rejected": "s"} for n in range(6)]
    data = pairs(tmp_path, *records, val_fraction=0.5, batch_size=2)
    batches = list(data.val_dataloader())
    assert [part.pair_ids.tolist() for batch in batches for part in batch] == [[0, 1], [2]]


# --- Prompts alone, and columns of a reward ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record", [{"prompt": "q"}, {"question": "q"}, {"prompt": [{"role": "user", "content": "q"}]},
               {"messages": [{"role": "user", "content": "q"}]}],
)  # fmt: skip
def test_a_stage_that_can_do_without_real_responses_reads_prompts_alone(tmp_path: Path, record: object) -> None:
    path = write(tmp_path / "rows.jsonl", record)
    [row] = load_rows(path, needs_real=False).rows
    assert (row.prompt, row.real, row.has_real) == (({"role": "user", "content": "q"},), "", False)
    with pytest.raises(UserError):
        load_rows(path)


def test_prompts_alone_have_no_ids_of_a_response_and_no_held_out_nll(tmp_path: Path) -> None:
    other = {"messages": [ASKED, GOOD]}
    path = write(tmp_path / "rows.jsonl", {"messages": [ASKED]}, other)
    data = SyntheticDataModule(path, val_data=path, batch_size=1)
    data.needs_real = False
    data = ready(data)
    assert [prompt.real_ids == [] for prompt in data.prompts] == [True, False]
    assert data.prompts[0].prompt_ids == data.prompts[1].prompt_ids
    assert [len(part.lengths) for batch in data.val_dataloader() for part in batch] == [1]


def test_the_module_says_that_it_can_do_without_and_a_reward_which_columns_it_needs(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "q", "gold": 2, "level": "easy"})
    data = SyntheticDataModule(path, val_fraction=0, batch_size=1)
    callback = SimpleNamespace(reward=SimpleNamespace(columns=("gold",)))
    module = SimpleNamespace(needs_real=False, policy=None, given_model=None)
    data.trainer = SimpleNamespace(lightning_module=module, callbacks=[callback, object()])  # type: ignore[assignment]
    [prompt] = ready(data).prompts
    assert prompt.row.columns == {"gold": 2}
    bound = data.prompts_hash
    data.prompts[0].row.columns["gold"] = 3
    assert data.prompts_hash != bound
    callback.reward.columns = ("answer_key",)
    data.prompts = []
    with pytest.raises(UserError, match=r"the reward needs the columns 'answer_key', but .* has 'gold', 'level'"):
        data.setup("fit")
