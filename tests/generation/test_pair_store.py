"""Pairs on disk: who can read them, what they refuse, and how they are made shard by shard."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
from helpers import byte_tokenizer, tiny_model
from transformers import PreTrainedModel

from spin_lightning.data.encoding import Encoder
from spin_lightning.generation import TransformersGenerator, seed_of
from spin_lightning.generation import pair_maker as pairs_module
from spin_lightning.generation.base import Player
from spin_lightning.generation.pair_maker import PairMaker, own_pairs
from spin_lightning.generation.pair_store import SCHEMA, TRAINING_COLUMNS, PairStore, describe_pairs, identical
from spin_lightning.models.batches import pack
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.runs.files import sha256_of
from spin_lightning.types import Prompt, ResponseBatch, Row, UserError

BINDING = {"iteration": 0, "opponent_sha256": "ab", "sampling": {"temperature": 1.0, "top_p": 1.0}, "seed": 3}


def pair(**changes: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "x"}
    row = dict.fromkeys(SCHEMA.names) | {
        "iteration": 0, "prompt_id": 0, "answer": 0, "prompt": [{"role": "user", "content": "?"}], "chosen": [message],
        "rejected": [message], "prompt_ids": [1], "real_ids": [5, 2], "generated_ids": [6, 2],
        "real_finish_reason": "stop", "generated_finish_reason": "stop", "opponent_real_log_prob": -1.0,
        "opponent_generated_log_prob": -2.0,
    }  # fmt: skip
    return row | changes


def finished_store(folder: Path, *shards: list[dict[str, Any]]) -> PairStore:
    store = PairStore(folder, BINDING)
    names = [f"part-{number}.parquet" for number in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        store.write_shard(name, rows)
    store.finish(names, statistics={})
    return store


# --- What a store vouches for ---------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_written_in_the_order_of_the_shards(tmp_path: Path) -> None:
    rows = [pair(prompt_id=number, opponent_real_log_prob=-0.1 * number) for number in range(5)]
    store = PairStore(tmp_path, BINDING)
    store.write_shard("b.parquet", rows[:2])
    store.write_shard("a.parquet", rows[2:])
    store.finish(["b.parquet", "a.parquet"])
    again = PairStore(tmp_path, BINDING)
    assert again.is_complete
    assert again.read().to_pylist() == rows
    assert PairStore(tmp_path).read(["prompt_id"]).to_pylist() == [{"prompt_id": number} for number in range(5)]


def test_manifest_counts_and_hashes_its_shards(tmp_path: Path) -> None:
    finished_store(tmp_path, [pair()], [pair(), pair()])
    manifest = json.loads((tmp_path.with_name(tmp_path.name + "_manifest.json")).read_text())
    assert manifest["complete"] is True and manifest["binding"] == BINDING
    assert [shard["rows"] for shard in manifest["shards"]] == [1, 2]
    for shard in manifest["shards"]:
        assert shard["bytes"] == (tmp_path / shard["file"]).stat().st_size
        assert shard["sha256"] == sha256_of(tmp_path / shard["file"])


def test_unfinished_pairs_are_refused(tmp_path: Path) -> None:
    store = PairStore(tmp_path, BINDING)
    store.write_shard("a.parquet", [pair()])
    for unfinished in (store, PairStore(tmp_path), PairStore(tmp_path, BINDING)):
        assert not unfinished.is_complete and unfinished.has_shard("a.parquet")
        with pytest.raises(UserError, match=r"are unfinished\. Continue the run"):
            unfinished.read()


def test_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"_manifest.json is missing, so nothing vouches"):
        PairStore(tmp_path)


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"seed": 4}, "seed"),
        ({"opponent_sha256": "cd"}, "opponent_sha256"),
        ({"sampling": {"temperature": 0.5, "top_p": 1.0}}, "sampling"),
        ({"iteration": 1, "seed": None}, "iteration, seed"),
        ({"dtype": "torch.float32"}, "dtype"),
        ({"dtype": None}, "dtype"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_each_difference_in_what_made_the_pairs_is_named(
    tmp_path: Path, changes: dict[str, Any], differing: str, is_finished: bool
) -> None:
    if is_finished:
        finished_store(tmp_path, [pair()])
    else:
        PairStore(tmp_path, BINDING)
    with pytest.raises(UserError, match=rf"what differs: {differing}\. Use another output_dir"):
        PairStore(tmp_path, {**BINDING, **changes})


def test_binding_that_lacks_a_name_of_the_folders_is_refused(tmp_path: Path) -> None:
    finished_store(tmp_path, [pair()])
    with pytest.raises(UserError, match=r"what differs: seed\."):
        PairStore(tmp_path, {name: value for name, value in BINDING.items() if name != "seed"})


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "swapped"])
def test_damaged_shard_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    store = finished_store(tmp_path, [pair(prompt_id=number) for number in range(50)], [pair(prompt_id=99)])
    path = tmp_path / "part-0.parquet"
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:-40])
    elif damage == "flip":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes((tmp_path / "part-1.parquet").read_bytes())
    state = "is missing" if damage == "missing" else "is not the file that was written"
    with pytest.raises(UserError, match=rf"part-0\.parquet {state}, so the pairs cannot be trusted\. Restore it"):
        PairStore(tmp_path, BINDING).read()
    path.write_bytes(whole)
    assert store.read().num_rows == 51


def test_crash_while_writing_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PairStore(tmp_path, BINDING)
    store.write_shard("a.parquet", [pair(prompt_id=1)])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(_table: pa.Table, path: Path, **_settings: Any) -> None:
        path.write_bytes(b"PAR1 and no more")
        raise OSError("no space left on device")

    monkeypatch.setattr("spin_lightning.runs.shards.pq.write_table", half)
    for name in ("a.parquet", "b.parquet"):
        with pytest.raises(OSError, match="no space"):
            store.write_shard(name, [pair(prompt_id=2)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not store.has_shard("b.parquet")


def test_an_unfinished_shard_that_is_not_what_was_written_counts_as_missing(tmp_path: Path) -> None:
    store = PairStore(tmp_path / "pairs", BINDING)
    store.write_shard("a.parquet", [pair(prompt_id=1)])
    store.write_shard("b.parquet", [pair(prompt_id=2)])
    again = PairStore(tmp_path / "pairs", BINDING)
    assert again.has_shard("a.parquet") and again.has_shard("b.parquet")
    (again.folder / "a.parquet").write_bytes((again.folder / "b.parquet").read_bytes())
    (again.folder / "c.parquet").write_bytes((again.folder / "b.parquet").read_bytes())
    assert not again.has_shard("a.parquet") and not again.has_shard("c.parquet")
    with pytest.raises(UserError, match=r"a.parquet is not the file that was written"):
        again.read_shard("a.parquet")


@pytest.mark.parametrize("name", ["../a.parquet", "/tmp/a.parquet", "x/../../a.parquet", "a.bin", "a.parquet"])
def test_a_manifest_cannot_name_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    store = PairStore(tmp_path / "pairs", BINDING)
    store.write_shard("b.parquet", [pair(prompt_id=2)])
    (store.folder / "a.parquet").symlink_to(store.folder / "b.parquet")
    store.manifest["shards"][0]["file"] = name  # type: ignore[index]
    with pytest.raises(UserError, match=r"which is no shard of pairs in its folder"):
        store.read_shard(name)


# --- What is in a set of pairs --------------------------------------------------------------------------------------


def test_statistics_of_a_hand_made_set() -> None:
    rows = [
        pair(real_ids=[5, 6, 2], generated_ids=[5, 6, 2]),  # identical
        pair(
            real_ids=[5, 6], real_finish_reason="length", generated_ids=[5, 6], generated_finish_reason="length"
        ),  # too
        pair(real_ids=[5, 2], generated_ids=[2]),  # empty
        pair(
            real_ids=[5], real_finish_reason="length", generated_ids=[6], generated_finish_reason="length"
        ),  # not empty
        pair(real_ids=[5, 6, 7, 2], generated_ids=[5, 6, 7, 8], generated_finish_reason="length"),  # differs at the end
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    assert identical(table).tolist() == [True, True, False, False, False]
    assert describe_pairs(table) == {
        "pairs": 5,
        "identical": 2,
        "real_clipped": 2,
        "generated_clipped": 3,
        "empty": 1,
        "identical_share": pytest.approx(2 / 5),
        "real_clipped_share": pytest.approx(2 / 5),
        "generated_clipped_share": pytest.approx(3 / 5),
        "empty_share": pytest.approx(1 / 5),
        "real_mean_length": pytest.approx((3 + 2 + 2 + 1 + 4) / 5),
        "generated_mean_length": pytest.approx((3 + 2 + 1 + 1 + 4) / 5),
        "generated_tokens": 11,
    }
    assert describe_pairs(table.slice(0, 0)) == {"pairs": 0}


def test_identical_holds_for_slices_and_filtered_tables() -> None:
    rows = [pair(prompt_id=i, real_ids=[i, 2], generated_ids=[i if i % 3 == 0 else 9, 2]) for i in range(8)]
    table = pa.concat_tables(
        [pa.Table.from_pylist(rows[:5], schema=SCHEMA), pa.Table.from_pylist(rows[5:], schema=SCHEMA)]
    )
    assert identical(table).tolist() == [i % 3 == 0 for i in range(8)]
    assert identical(table.slice(2, 4)).tolist() == [False, True, False, False]
    assert identical(table.filter(pa.array([i > 4 for i in range(8)]))).tolist() == [False, True, False]


# --- Making pairs ---------------------------------------------------------------------------------------------------

ROWS = [
    Row(({"role": "user", "content": f"{number}+{number}?"},), answer)
    for number, answer in enumerate(["0", "two", "4", "Six!", "8 is the sum of four and four", "ten", "", "14"])
]
CAP = 10


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(byte_tokenizer())


@pytest.fixture(scope="module")
def prompts(encoder: Encoder) -> list[Prompt]:
    return [encoder.encode(number, row, CAP) for number, row in enumerate(ROWS)]


@pytest.fixture(scope="module")
def players(encoder: Encoder) -> list[PreTrainedModel]:
    return [tiny_model(len(encoder.tokenizer), seed=seed) for seed in range(3)]


def maker(
    encoder: Encoder, prompts: list[Prompt], model: PreTrainedModel, iteration: int = 0, **changes: Any
) -> PairMaker:
    settings: dict[str, Any] = {
        "generator": TransformersGenerator(max_new_tokens=CAP, batch_size=3),
        "answers_per_prompt": 2,
        "seed": 11,
        "micro_batch_tokens": 100,
        "shard_size": 3,
        "opponent_sha256": f"opponent {iteration}",
        "numerics": contextlib.nullcontext,
        "poll": lambda: None,
    }
    return PairMaker(
        opponent=Player(model), encoder=encoder, prompts=prompts, iteration=iteration, **{**settings, **changes}
    )


def made(folder: Path, making: PairMaker, earlier: dict[int, PairStore] | None = None, history: int = 0) -> PairStore:
    store = PairStore(folder, {"iteration": making.iteration})
    store.finish(making.make(store, earlier or {}, history))
    return store


@torch.no_grad()
def rescore(model: PreTrainedModel, row: dict[str, Any], side: str) -> float:
    return response_log_probs(model.eval(), pack([(row["prompt_ids"], [row[side]])])).item()


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, encoder: Encoder, prompts: list[Prompt], players: list[PreTrainedModel]
) -> PairStore:
    return made(tmp_path_factory.mktemp("pairs"), maker(encoder, prompts, players[0]))


def test_every_prompt_has_its_answers_and_its_seeds(store: PairStore, prompts: list[Prompt]) -> None:
    rows = store.read().to_pylist()
    assert [(row["prompt_id"], row["answer"]) for row in rows] == [(i, k) for i in range(8) for k in range(2)]
    for row in rows:
        assert row["seed"] == seed_of(11, 0, row["prompt_id"], row["answer"])
        assert row["prompt_ids"] == prompts[row["prompt_id"]].prompt_ids
        assert row["real_ids"] == prompts[row["prompt_id"]].real_ids
        assert row["opponent_sha256"] == "opponent 0" and row["iteration"] == 0
        assert row["initial_ids"] is None and row["initial_real_log_prob"] is None
    assert sum(rows[2 * i]["generated_ids"] != rows[2 * i + 1]["generated_ids"] for i in range(8)) >= 7


def test_log_probs_are_the_opponents_own(store: PairStore, players: list[PreTrainedModel]) -> None:
    for row in store.read().to_pylist():
        assert row["opponent_real_log_prob"] == pytest.approx(rescore(players[0], row, "real_ids"), abs=2e-4)
        assert row["opponent_generated_log_prob"] == pytest.approx(rescore(players[0], row, "generated_ids"), abs=2e-4)
        assert row["generated_log_prob"] == pytest.approx(
            row["opponent_generated_log_prob"], abs=2e-4
        )  # the sampler agrees


def test_trl_and_the_authors_scripts_can_read_the_shards(store: PairStore, encoder: Encoder, tmp_path: Path) -> None:
    files = sorted(str(path) for path in store.folder.glob("*.parquet"))
    data = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    assert len(data) == 16
    for row in data:
        source = ROWS[row["prompt_id"]]
        assert row["prompt"] == list(source.prompt)
        assert row["chosen"] == [{"role": "assistant", "content": source.real}]
        assert row["rejected"] == [{"role": "assistant", "content": encoder.decode(row["generated_ids"])}]
        assert row["real"] == row["prompt"] + row["chosen"]
        assert row["generated"] == row["prompt"] + row["rejected"]
        text = encoder.decode(row["real_ids"])
        assert (
            text == source.real if row["real_finish_reason"] == "stop" else (text == source.real[:CAP] != source.real)
        )
    assert Counter(data["real_finish_reason"]) == {"stop": 14, "length": 2}


def test_answers_and_their_scores_do_not_depend_on_shards_or_batches(
    store: PairStore, tmp_path: Path, encoder: Encoder, prompts: list[Prompt], players: list[PreTrainedModel]
) -> None:
    rows = store.read().to_pylist()
    generator = TransformersGenerator(max_new_tokens=CAP, batch_size=16)
    for number, changes in enumerate(
        [{"shard_size": 8}, {"shard_size": 1, "micro_batch_tokens": 20}, {"generator": generator}]
    ):
        other = made(tmp_path / str(number), maker(encoder, prompts, players[0], **changes)).read().to_pylist()
        for a, b in zip(rows, other, strict=True):
            assert {key: a[key] for key in a if "log_prob" not in key} == {
                key: b[key] for key in b if "log_prob" not in key
            }
            for name in ("generated_log_prob", "opponent_real_log_prob", "opponent_generated_log_prob"):
                assert a[name] == pytest.approx(b[name], abs=2e-4)


def test_first_answers_are_the_same_however_many_are_asked_for(
    store: PairStore, tmp_path: Path, encoder: Encoder, prompts: list[Prompt], players: list[PreTrainedModel]
) -> None:
    ids = {(row["prompt_id"], row["answer"]): row["generated_ids"] for row in store.read().to_pylist()}
    for count in (1, 3):
        other = (
            made(tmp_path / str(count), maker(encoder, prompts, players[0], answers_per_prompt=count))
            .read()
            .to_pylist()
        )
        assert len(other) == 8 * count
        for row in other:
            if row["answer"] < 2:
                assert row["generated_ids"] == ids[row["prompt_id"], row["answer"]]


def test_real_answers_are_scored_once_a_prompt(
    tmp_path: Path,
    encoder: Encoder,
    prompts: list[Prompt],
    players: list[PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored: Counter[tuple[int, ...]] = Counter()

    def counting(model: Any, batch: ResponseBatch) -> Any:
        start = 0
        for lengths in batch.lengths:
            prompt, *responses = batch.input_ids[start : start + sum(lengths)].split(lengths)
            scored.update((*prompt.tolist(), *response.tolist()) for response in responses)
            start += sum(lengths)
        return response_log_probs(model, batch)

    monkeypatch.setattr(pairs_module, "response_log_probs", counting)
    monkeypatch.setattr(pairs_module, "SAMPLER_TOLERANCE", -1.0)
    first = made(tmp_path / "0", maker(encoder, prompts, players[0], answers_per_prompt=3))
    assert [scored[(*prompt.prompt_ids, *prompt.real_ids)] for prompt in prompts] == [1] * 8
    assert sum(scored.values()) == 8 + 24
    for row in (rows := first.read().to_pylist()):
        assert row["opponent_real_log_prob"] == rows[3 * row["prompt_id"]]["opponent_real_log_prob"]

    scored.clear()
    second = maker(encoder, prompts, players[1], 1, answers_per_prompt=3)
    rows = made(tmp_path / "1", second, {0: first}, history=1).read().to_pylist()
    assert sum(scored.values()) == 8 + 24 + 24  # the older rows cost their generated side only
    by_prompt: dict[int, set[float]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], set()).add(row["opponent_real_log_prob"])
    assert all(len(values) == 1 for values in by_prompt.values())


@pytest.mark.parametrize("error", [0.0, 5e-5, 2e-4])
def test_sampled_log_probs_are_taken_where_a_scoring_pass_agrees(
    tmp_path: Path,
    encoder: Encoder,
    prompts: list[Prompt],
    players: list[PreTrainedModel],
    monkeypatch: Any,
    error: float,
) -> None:
    """``error`` in nats a token on the first prompts' answers, as rounding makes it."""

    class Rounding(TransformersGenerator):
        def generate(self, *args: Any) -> Any:
            for index, response in super().generate(*args):
                off = error * len(response.ids)
                yield index, dataclasses.replace(response, log_prob=response.log_prob + off)

    monkeypatch.setattr(pairs_module, "NUM_COMPARED", 2)
    making = maker(encoder, prompts, players[0], generator=Rounding(max_new_tokens=CAP, batch_size=3))
    for row in made(tmp_path, making).read().to_pylist():
        is_compared = row["prompt_id"] % making.shard_size < 2
        is_sampled = row["opponent_generated_log_prob"] == row["generated_log_prob"]
        assert is_sampled == (error < 1e-4 and not is_compared) or (error == 0 and is_compared)
        expected = rescore(players[0], row, "generated_ids") + error * len(row["generated_ids"]) * is_sampled
        assert row["opponent_generated_log_prob"] == pytest.approx(expected, abs=2e-4)


def test_sampled_log_probs_are_never_taken_in_bfloat16(
    tmp_path: Path, encoder: Encoder, prompts: list[Prompt], players: list[PreTrainedModel], monkeypatch: Any
) -> None:
    """The answers compared may be certain, and agree by chance."""
    monkeypatch.setattr(pairs_module, "SAMPLER_TOLERANCE", 1e9)
    making = maker(encoder, prompts, copy.deepcopy(players[0]).bfloat16())
    for row in made(tmp_path, making).read().to_pylist():
        assert row["opponent_generated_log_prob"] != row["generated_log_prob"] or row["generated_log_prob"] == 0


def test_history_rows_keep_their_answers_and_are_scored_by_the_current_opponent(
    tmp_path: Path, encoder: Encoder, prompts: list[Prompt], players: list[PreTrainedModel]
) -> None:
    stores: dict[int, PairStore] = {}
    for iteration in range(3):
        making = maker(encoder, prompts, players[iteration], iteration)
        stores[iteration] = made(tmp_path / str(iteration), making, dict(stores), history=2)
    assert [stores[k].read().num_rows for k in range(3)] == [16, 32, 48]
    rows = stores[2].read().to_pylist()
    assert [row["iteration"] for row in rows] == [2] * 16 + [1] * 16 + [0] * 16  # the newest first
    kept = [name for name in SCHEMA.names if not name.startswith("opponent_") or name == "opponent_sha256"]
    for source in (0, 1, 2):
        written = own_pairs(stores[source].read(), source).to_pylist()
        now = own_pairs(stores[2].read(), source).to_pylist()
        assert [{name: row[name] for name in kept} for row in now] == [
            {name: row[name] for name in kept} for row in written
        ]
        for row, old in zip(now, written, strict=True):
            assert row["opponent_real_log_prob"] == pytest.approx(rescore(players[2], row, "real_ids"), abs=2e-4)
            assert row["opponent_generated_log_prob"] == pytest.approx(
                rescore(players[2], row, "generated_ids"), abs=2e-4
            )
            if source < 2:
                assert abs(row["opponent_real_log_prob"] - old["opponent_real_log_prob"]) > 1e-3
    for history, sources in ((0, {2}), (1, {1, 2})):
        table = made(tmp_path / f"history {history}", maker(encoder, prompts, players[2], 2), stores, history).read()
        assert set(table["iteration"].to_pylist()) == sources


def test_first_opponent_scores_and_answers_travel_along(
    tmp_path: Path, encoder: Encoder, prompts: list[Prompt], players: list[PreTrainedModel]
) -> None:
    first = made(tmp_path / "0", maker(encoder, prompts, players[0], initial=players[0], initial_responses=True))
    for row in first.read().to_pylist():
        assert row["initial_ids"] == row["generated_ids"]
        assert row["initial_real_log_prob"] == row["opponent_real_log_prob"]
        assert row["initial_generated_log_prob"] == row["opponent_generated_log_prob"]
    answers = {(row["prompt_id"], row["answer"]): row["generated_ids"] for row in first.read().to_pylist()}
    making = maker(encoder, prompts, players[1], 1, initial=players[0], initial_responses=True)
    second = made(tmp_path / "1", making, {0: first}, history=1)
    for row in second.read().to_pylist():
        assert row["initial_ids"] == answers[row["prompt_id"], row["answer"]]
        assert row["initial_real_log_prob"] == pytest.approx(rescore(players[0], row, "real_ids"), abs=2e-4)
        assert row["initial_generated_log_prob"] == pytest.approx(rescore(players[0], row, "generated_ids"), abs=2e-4)
        assert row["opponent_generated_log_prob"] == pytest.approx(rescore(players[1], row, "generated_ids"), abs=2e-4)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 9, 17, 24])
def test_interrupted_making_continues_to_the_same_pairs(
    tmp_path: Path, encoder: Encoder, prompts: list[Prompt], players: list[PreTrainedModel], calls: int
) -> None:
    first = made(tmp_path / "0", maker(encoder, prompts, players[0]))
    whole = made(tmp_path / "whole", maker(encoder, prompts, players[1], 1), {0: first}, history=1)

    left = calls

    def poll() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Interrupted

    store = PairStore(tmp_path / "parts", {"iteration": 1})
    with pytest.raises(Interrupted):
        maker(encoder, prompts, players[1], 1, poll=poll).make(store, {0: first}, history=1)
    before = {path.name: path.stat().st_mtime_ns for path in store.folder.glob("*.parquet")}
    assert len(before) < 6 and not any(path.suffix == ".tmp" for path in store.folder.rglob("*"))
    continued = made(tmp_path / "parts", maker(encoder, prompts, players[1], 1), {0: first}, history=1)
    assert continued.read().equals(whole.read())
    after = {path.name: path.stat().st_mtime_ns for path in store.folder.glob("*.parquet")}
    assert {name: after[name] for name in before} == before  # nothing was made twice
    assert continued.manifest["shards"] == whole.manifest["shards"]  # to the byte


def test_model_is_in_evaluation_mode_while_it_plays_and_back_afterwards(
    tmp_path: Path, encoder: Encoder, prompts: list[Prompt]
) -> None:
    model = tiny_model(len(encoder.tokenizer), attention_dropout=0.9)
    expected = made(tmp_path / "eval", maker(encoder, prompts, model.eval())).read()
    assert not model.training
    assert made(tmp_path / "train", maker(encoder, prompts, model.train())).read().equals(expected)
    assert model.training


def test_training_reads_ids_and_log_probs_only() -> None:
    assert sorted(TRAINING_COLUMNS) == sorted([
        "prompt_id", "prompt_ids", "real_ids", "generated_ids", "initial_ids", "generated_log_prob",
        "opponent_real_log_prob", "opponent_generated_log_prob", "initial_real_log_prob", "initial_generated_log_prob",
    ])  # fmt: skip


def test_shards_without_a_manifest_are_not_read(tmp_path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "iteration_0-000000000.parquet").write_bytes(b"from somewhere else")
    assert not PairStore(tmp_path / "pairs", {"seed": 0}).has_shard("iteration_0-000000000.parquet")


def test_the_folder_of_pairs_reads_as_one_parquet_data_set(tmp_path):
    """Nothing but Parquet is in it, so that ``pyarrow``, ``pandas`` and ``datasets`` take the folder's name."""
    import datasets
    import pyarrow.parquet as pq

    store = PairStore(tmp_path / "pairs", {"seed": 0})
    store.write_shard("a.parquet", [{"iteration": 0, "prompt_id": 7}])
    store.finish(["a.parquet"], versions={}, statistics={})
    assert pq.read_table(tmp_path / "pairs")["prompt_id"].to_pylist() == [7]
    loaded = datasets.load_dataset(str(tmp_path / "pairs"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["prompt_id"] == [7] or list(loaded["prompt_id"]) == [7]
