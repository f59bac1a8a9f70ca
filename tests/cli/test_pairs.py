"""``spin-lightning pairs``: the pairs of a run as rows for other trainers, and for this package again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from games import pairs_of, read
from helpers import byte_tokenizer

from spin_lightning import PreferenceDataModule
from spin_lightning.cli.commands import main
from spin_lightning.generation.pair_rows import Pair, llama_factory_row
from spin_lightning.generation.pair_store import PairStore, RankedPairStore
from spin_lightning.runs.files import write_json

Refusal = Callable[[Sequence[str]], str]

CAP = 8


def ids_of(text: str, ends: bool = True) -> list[int]:
    tokenizer = byte_tokenizer()
    return [*tokenizer(text, add_special_tokens=False).input_ids, *([tokenizer.eos_token_id] if ends else [])]


def row_of(prompt_id: int, iteration: int, real: str, generated: str, **changes: Any) -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"{prompt_id}+1?"}]
    rendered = byte_tokenizer().apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    real_ids, generated_ids = ids_of(real)[:CAP], ids_of(generated)[:CAP]
    said = [{"role": "assistant", "content": real}], [{"role": "assistant", "content": generated[:CAP]}]
    return {
        "iteration": iteration,
        "prompt_id": prompt_id,
        "answer": 0,
        "prompt": prompt,
        "chosen": said[0],
        "rejected": said[1],
        "real": [*prompt, *said[0]],
        "generated": [*prompt, *said[1]],
        "prompt_ids": ids_of(rendered, ends=False),
        "real_ids": real_ids,
        "generated_ids": generated_ids,
        "real_finish_reason": "stop" if len(ids_of(real)) <= CAP else "length",
        "generated_finish_reason": "stop" if len(ids_of(generated)) <= CAP else "length",
        "opponent_sha256": f"opponent {iteration}",
        "seed": 7 * prompt_id,
        **changes,
    }


def write_game(folder: Path, kind: type[PairStore] = PairStore, **binding: Any) -> Path:
    """Two iterations in shards of two prompts: the second has the pairs of the first, too."""
    for iteration in (0, 1):
        of = {"iteration": iteration, "sampling": {"max_new_tokens": CAP}, "seed": 3, "opponent_sha256": "o", **binding}
        store = kind(folder / f"iteration_{iteration}" / "pairs", of)
        names = []
        for source in range(iteration, -1, -1):
            ranked = kind is RankedPairStore
            rows = [
                row_of(0, source, "1", "2", **({"real_reward": 1.0, "generated_reward": 0.25} if ranked else {})),
                row_of(1, source, "1", "1", **({"real_reward": 0.5, "generated_reward": 0.5} if ranked else {})),
                row_of(2, source, "a long one", "3", **({"generated_reward": 0.5} if ranked else {})),
                row_of(
                    3, source, "4", "no end to it", **({"real_reward": 2.0, "generated_reward": 0.0} if ranked else {})
                ),
            ]
            for start in (0, 2):
                names.append(f"iteration_{source}-{start:09d}.parquet")
                store.write_shard(names[-1], rows[start : start + 2])
        store.finish(names, opponent="a-model", versions={"torch": "2"})
    byte_tokenizer().save_pretrained(folder / "iteration_1" / "policy")
    return folder


@pytest.fixture
def game(tmp_path: Path) -> Path:
    return write_game(tmp_path / "run")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_trl_reads_conversations_with_where_each_pair_comes_from(game, tmp_path, capsys):
    main(["pairs", str(game), "--output", str(tmp_path / "p.jsonl")])
    first, _, third, fourth = lines(tmp_path / "p.jsonl")
    assert first == {
        "prompt": [{"role": "user", "content": "0+1?"}],
        "chosen": [{"role": "assistant", "content": "1"}],
        "rejected": [{"role": "assistant", "content": "2"}],
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "stop",
        "iteration": 1,
        "prompt_id": 0,
        "response_number": 0,
        "opponent_sha256": "opponent 1",
        "seed": 0,
    }
    # a real response is whole as text, however short the game cut its ids; a generated one is not
    assert third["chosen"][0]["content"] == "a long one" and third["chosen_finish_reason"] == "stop"
    assert fourth["rejected"][0]["content"] == "no end t" and fourth["rejected_finish_reason"] == "length"
    said = capsys.readouterr().out
    assert "4 rows in" in said and "a response that was cut: 1." in said and "two responses are the same: 1." in said


def test_the_file_says_what_made_its_rows(game, tmp_path):
    main(["pairs", str(game), "--iteration", "all", "--drop", "identical", "--output", str(tmp_path / "p.jsonl")])
    told = read(tmp_path / "p.jsonl.provenance.json")
    assert (told["rows"], told["left_out"], told["format"]) == (6, {"identical": 2}, "trl")
    assert [made["iteration"] for made in told["pairs"]] == [0, 1]
    assert told["pairs"][0]["sampling"] == {"max_new_tokens": CAP} and told["pairs"][0]["opponent"] == "a-model"
    assert [row["iteration"] for row in lines(tmp_path / "p.jsonl")] == [0, 0, 0, 1, 1, 1]


def test_our_own_preference_data_are_the_same_pairs_again(game, tmp_path):
    for name in ("p.jsonl", "p.parquet"):
        main(["pairs", str(game), "--drop", "identical", "--output", str(tmp_path / name)])
        data = PreferenceDataModule(str(tmp_path / name), val_fraction=0.0, batch_size=1, max_response_tokens=CAP)
        data.tokenizer = byte_tokenizer()
        data.setup("fit")
        stored = [row for row in pairs_of(game, 1) if row["iteration"] == 1 and row["prompt_id"] != 1]
        assert [(p.prompt_ids, p.real_ids, p.rejected_ids) for p in data.prompts] == [
            (row["prompt_ids"], row["real_ids"], row["generated_ids"]) for row in stored
        ]
        assert [p.rejected_finish_reason for p in data.prompts] == ["stop", "stop", "length"]


def test_texts_are_what_the_template_wrote_and_end_as_the_responses_did(game, tmp_path):
    main(["pairs", str(game), "--format", "trl_text", "--output", str(tmp_path / "p.jsonl")])
    rows = lines(tmp_path / "p.jsonl")
    assert rows[0]["prompt"] == "<|im_start|>user\n0+1?<|im_end|>\n<|im_start|>assistant\n"
    assert (rows[0]["chosen"], rows[0]["rejected"]) == ("1<|im_end|>", "2<|im_end|>")
    assert (rows[2]["chosen"], rows[2]["chosen_finish_reason"]) == ("a long o", "length")


def test_axolotl_reads_messages_and_one_turn_for_each_response(game, tmp_path):
    main(["pairs", str(game), "--format", "axolotl", "--output", str(tmp_path / "p.parquet")])
    (first, *_) = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert first["messages"] == [{"role": "user", "content": "0+1?"}]
    assert first["chosen"] == {"role": "assistant", "content": "1"}
    assert first["rejected"] == {"role": "assistant", "content": "2"}


def test_llama_factory_reads_sharegpt_and_is_told_of_the_file(game, tmp_path, capsys):
    for name in ("mine.jsonl", "mine.jsonl", "more.jsonl"):
        main(["pairs", str(game), "--format", "llama_factory", "--output", str(tmp_path / name)])
    (first, *_) = lines(tmp_path / "mine.jsonl")
    assert first["conversations"] == [{"from": "human", "value": "0+1?"}]
    assert first["chosen"] == {"from": "gpt", "value": "1"} and first["rejected"] == {"from": "gpt", "value": "2"}
    entry = {
        "file_name": "mine.jsonl",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    }
    assert read(tmp_path / "dataset_info.json") == {"mine": entry}
    said = capsys.readouterr().out
    assert said.count("Add this to") == 1 and '"more": {' in said  # a file of the user's own is not changed


def test_llama_factory_wants_speakers_that_take_turns():
    def says(*roles: str) -> Any:
        return llama_factory_row(Pair([{"role": role, "content": role} for role in roles], "1", "2"))  # type: ignore

    assert [turn["from"] for turn in says("system", "user", "assistant", "user")["conversations"]] == [
        *("system", "human", "gpt", "human")
    ]
    assert says("user", "user") is None and says("user", "assistant") is None and says("assistant") is None
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    asked: Any = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    row = llama_factory_row(Pair(asked, "2", "3", tools=[{"type": "function"}]))
    assert row is not None and row["conversations"][1:] == [
        {"from": "function_call", "value": '[{"name": "add", "arguments": {"a": 1}}]'},
        {"from": "observation", "value": "2"},
    ]
    assert row["tools"] == '[{"type": "function"}]'


def test_pairs_that_a_reward_does_not_tell_apart_are_left_out(tmp_path):
    game = write_game(tmp_path / "ranked", RankedPairStore, pairs="best_worst")
    main(["pairs", str(game), "--output", str(tmp_path / "p.jsonl")])
    assert [(row["prompt_id"], row["margin"]) for row in lines(tmp_path / "p.jsonl")] == [(0, 0.75), (3, 2.0)]
    assert read(tmp_path / "p.jsonl.provenance.json")["left_out"] == {"not told apart by the reward": 2}


def test_pairs_of_score_are_rows_as_well(tmp_path, capsys):
    folder = tmp_path / "scored"
    folder.mkdir()
    row = {
        "prompt": [{"role": "user", "content": "\u2028 1+1?"}],
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "chosen": [{"role": "assistant", "content": "2"}],
        "rejected": [{"role": "assistant", "content": "3"}],
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "length",
        "preference": 1,
        "margin": 0.5,
    }
    plain = {key: value for key, value in row.items() if key != "tools"}
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in (plain, row)))
    write_json(folder / "summary.json", {"model": "m", "reward": {"name": "r"}, "against": None})
    main(["pairs", str(folder), "--output", str(tmp_path / "p.parquet")])
    first, second = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert first["tools"] is None and json.loads(second["tools"]) == row["tools"]
    assert (second["preference"], second["margin"], second["rejected_finish_reason"]) == (1.0, 0.5, "length")
    capsys.readouterr()
    main(["pairs", str(folder), "--drop", "clipped", "identical", "--format", "axolotl", *_nothing_left(folder, row)])
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[0])["messages"] == plain["prompt"] and "1 row;" in err
    assert "\u2028" not in out  # what a terminal would obey is escaped


def _nothing_left(folder: Path, row: dict[str, Any]) -> list[str]:
    """Have one of the pairs of ``score`` end."""
    ended = {**{key: value for key, value in row.items() if key != "tools"}, "rejected_finish_reason": "stop"}
    with (folder / "pairs.jsonl").open("a") as stream:
        stream.write(json.dumps(ended) + "\n")
    return []


def test_one_shard_is_in_memory_at_a_time(game, tmp_path, monkeypatch):
    read_shard, now = PairStore.read_shard, []

    def look(self, name, columns=None):
        now.append(name)
        return read_shard(self, name, columns)

    monkeypatch.setattr(PairStore, "read_shard", look)
    from spin_lightning.cli.pairs import open_source

    pairs = iter(open_source(game, "0").pairs)
    next(pairs), next(pairs)
    assert now == ["iteration_0-000000000.parquet"]
    next(pairs)
    assert now == ["iteration_0-000000000.parquet", "iteration_0-000000002.parquet"]


def test_what_has_no_pairs_says_what_it_is(refusal: Refusal, game, tmp_path):
    empty, of_dpo = tmp_path / "empty", tmp_path / "dpo"
    empty.mkdir(), of_dpo.mkdir()
    (of_dpo / "pairs_manifest.json").write_text("{}")
    output = ["--output", str(tmp_path / "none.jsonl")]
    for args, words in (
        ([str(empty)], "it has no iteration_*/pairs and no pairs.jsonl"),
        ([str(tmp_path / "nowhere")], "there is no such folder"),
        ([str(of_dpo)], "a run of dpo or reward, which keeps token ids alone"),
        ([str(game), "--iteration", "5"], "no finished pairs of iteration 5; it has those of 0, 1"),
        ([str(game), "--iteration", "x"], "a number from 0, or 'all', got 'x'"),
        ([str(game), "--output", "p.csv"], "must end with .jsonl or .parquet, got 'p.csv'"),
        ([str(game), "--format", "csv"], "invalid choice: 'csv'"),
        ([str(game), "--itration", "1"], "pairs has no '--itration'. Did you mean --iteration?"),
    ):
        assert words in refusal(["pairs", *args]), args
    for iteration in (0, 1):
        manifest = game / f"iteration_{iteration}" / "pairs_manifest.json"
        write_json(manifest, {**read(manifest), "complete": False})
    assert "are unfinished" in refusal(["pairs", str(game), *output])
    assert not (tmp_path / "none.jsonl").exists()


def test_a_damaged_shard_and_no_row_at_all_leave_no_file(refusal: Refusal, game, tmp_path):
    output = tmp_path / "p.jsonl"
    output.write_text("before")
    shard = game / "iteration_1" / "pairs" / "iteration_1-000000002.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert "is not the file that was written" in refusal(["pairs", str(game), "--output", str(output)])
    assert output.read_text() == "before" and not [*tmp_path.glob(".*.tmp")]


def test_an_iteration_s_own_folder_will_do(game, tmp_path):
    main(["pairs", str(game / "iteration_0"), "--output", str(tmp_path / "p.jsonl")])
    assert {row["iteration"] for row in lines(tmp_path / "p.jsonl")} == {0}


def test_a_copy_beside_the_iterations_is_none_of_them(game, tmp_path):
    (game / "iteration_1").rename(game / "iteration_1.bak")
    main(["pairs", str(game), "--output", str(tmp_path / "p.jsonl")])
    assert {json.loads(line)["iteration"] for line in (tmp_path / "p.jsonl").read_text().splitlines()} == {0}
