"""The made skills: right answers, fixed bytes, no prompt on both sides."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from datetime import date, timedelta
from pathlib import Path

import pytest

from spin_lightning.demos import skills
from spin_lightning.demos.skills import MOST_ROWS, SKILLS, is_exact, make_skills, write_skills
from spin_lightning.types import UserError


def prompt_of(row: dict) -> str:
    return row["messages"][0]["content"]


def real_of(row: dict) -> str:
    return row["messages"][1]["content"]


@pytest.fixture(scope="module")
def by_skill() -> dict[str, list[tuple[str, str]]]:
    train, held_out = make_skills(num_train=1000, num_held_out=300, seed=3)
    rows = train + held_out
    return {skill: [(prompt_of(row), real_of(row)) for row in rows if row["skill"] == skill] for skill in SKILLS}


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def test_bytes_of_seed_0_never_change(tmp_path):
    train, held_out = write_skills(tmp_path)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in (train, held_out)]
    assert digests == ["dbf0c94f7075560f", "9de54d7b7c4d6b61"]


def test_another_process_with_another_hash_seed_writes_the_same_bytes(tmp_path):
    here = write_skills(tmp_path / "here", seed=5)
    code = f"from spin_lightning.demos.skills import write_skills; write_skills({str(tmp_path / 'there')!r}, seed=5)"
    root = Path(skills.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONHASHSEED": "123"})
    for path in here:
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()


def test_seeds_differ():
    assert make_skills(seed=0) != make_skills(seed=1)


def test_files_hold_the_rows_and_nothing_else_is_left(tmp_path):
    write_skills(tmp_path, num_train=30, num_held_out=20)
    written = write_skills(tmp_path, num_train=26, num_held_out=13, seed=2)
    assert [[json.loads(line) for line in path.read_text().splitlines()] for path in written] == list(
        make_skills(26, 13, seed=2)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held_out.jsonl", "train.jsonl"]


@pytest.mark.parametrize("seed", range(3))
def test_no_prompt_comes_twice_in_or_across_splits(seed):
    train, held_out = make_skills(seed=seed)
    prompts = [prompt_of(row) for row in train + held_out]
    assert (len(train), len(held_out)) == (208, 130)
    assert len(set(prompts)) == len(prompts)


def test_splits_are_balanced():
    train, held_out = make_skills()
    assert Counter(row["skill"] for row in train) == dict.fromkeys(SKILLS, 16)
    assert Counter(row["skill"] for row in held_out) == dict.fromkeys(SKILLS, 10)
    uneven = Counter(row["skill"] for row in make_skills(num_train=30)[0])
    assert set(uneven.values()) == {2, 3}


def test_more_training_rows_keep_the_old_rows_and_the_held_out_rows():
    small_train, small_held_out = make_skills(num_train=52)
    large_train, large_held_out = make_skills(num_train=208)
    assert large_train[:52] == small_train
    assert large_held_out == small_held_out


def test_the_most_rows_can_be_made():
    train, held_out = make_skills(num_train=MOST_ROWS - 7, num_held_out=7)
    assert len({prompt_of(row) for row in train + held_out}) == MOST_ROWS


@pytest.mark.parametrize("counts", [(MOST_ROWS, 1), (-1, 10)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(UserError, match=rf"sum of at most {MOST_ROWS}.*got num_train={counts[0]} and num_held_out="):
        make_skills(*counts)


def test_sums_differences_and_products_are_right(by_skill):
    for skill, sign in {"add": "plus", "subtract": "minus", "multiply": "times"}.items():
        for prompt, real in by_skill[skill]:
            left, right = numbers(prompt)
            result = {"plus": left + right, "minus": left - right, "times": left * right}[sign]
            assert prompt == f"What is {left} {sign} {right}?"
            assert real == f"{left} {sign} {right} equals {result}."


def test_larger_number_comes_first(by_skill):
    for prompt, real in by_skill["compare"]:
        assert numbers(real) == sorted(numbers(prompt), reverse=True)
        assert len(set(numbers(prompt))) == 2


def test_lists_are_sorted_and_reversed(by_skill):
    for skill in ("sort", "reverse"):
        for prompt, real in by_skill[skill]:
            words = prompt.removesuffix(".").split(": ")[1].split(", ")
            first, second, third = sorted(words) if skill == "sort" else (words[2], words[1], words[0])
            assert real == f"The list is {first}, {second}, {third}."


def test_words_are_spelled_and_letters_found(by_skill):
    for prompt, real in by_skill["spell"]:
        word, _, _, letters = real.removesuffix(".").split()
        assert word in prompt.split() and letters.replace("-", "") == word and len(letters) == 2 * len(word) - 1
    for prompt, real in by_skill["letter"]:
        place, word = re.fullmatch(r"What is the (\w+) letter of the word (\w+)\?", prompt).groups()
        letter = {"first": word[0], "second": word[1], "last": word[len(word) - 1]}[place]
        assert real == f"The {place} letter of {word} is {letter}."


def test_days_agree_with_the_calendar(by_skill):
    for prompt, real in by_skill["day"]:
        steps, side, start = re.fullmatch(r"Which day comes (\d+) days (\w+) (\w+)\?", prompt).groups()
        today = next(day for day in (date(2024, 1, 20 + n) for n in range(7)) if f"{day:%A}" == start)
        there = today + timedelta(days=int(steps) if side == "after" else -int(steps))
        assert real == f"{steps} days {side} {start} is {there:%A}."


def test_months_agree_with_a_walk_through_the_year(by_skill):
    year = [f"{date(2024, month, 1):%B}" for month in range(1, 13)]
    for prompt, real in by_skill["month"]:
        steps, side, start = re.fullmatch(r"Which month comes (\d+) months (\w+) (\w+)\?", prompt).groups()
        walk = year if side == "after" else year[::-1]
        assert real == f"{steps} months {side} {start} is {(walk + walk)[walk.index(start) + int(steps)]}."


def test_number_words_add_up_to_the_number(by_skill):
    value = {word: number for number, word in enumerate(skills.ONES)} | {
        "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
    }  # fmt: skip
    for prompt, real in by_skill["number_word"]:
        before, hundred, after = real.removesuffix(".").split(" is ")[1].rpartition(" hundred")
        total = 100 * value[before] if hundred else 0
        assert [total + sum(value[word] for word in re.findall(r"[a-z]+", after))] == numbers(prompt) == numbers(real)


def test_units_are_converted(by_skill):
    factors = {"hours": 60, "minutes": 60, "weeks": 7, "days": 24, "years": 12}
    factors |= {"feet": 12, "meters": 100, "kilograms": 1000}
    for prompt, real in by_skill["unit"]:
        count, large, result, small = re.fullmatch(r"(\d+) (\w+) are (\d+) (\w+)\.", real).groups()
        assert int(result) == int(count) * factors[large]
        assert prompt == f"How many {small} are there in {count} {large}?"


def test_json_holds_the_name_and_the_age(by_skill):
    for prompt, real in by_skill["json"]:
        record = json.loads(real)
        assert prompt == f"Write this as JSON: the name is {record['name']} and the age is {record['age']}."
        assert list(record) == ["name", "age"] and isinstance(record["age"], int)


def test_rows_are_short():
    # counted as words, digits and marks, much as a byte-pair tokenizer counts them
    train, held_out = make_skills()
    for text_of, most_pieces in ((prompt_of, 18), (real_of, 18)):
        texts = [text_of(row) for row in train + held_out]
        assert max(len(text.split()) for text in texts) <= 14
        pieces = sorted(len(re.findall(r"[A-Za-z]+|\d|[^\w\s]", text)) for text in texts)
        assert 6 <= pieces[len(pieces) // 2] <= 12 and pieces[len(pieces) * 9 // 10] <= most_pieces


def test_is_exact_forgives_white_space_only():
    real = "14 plus 3 equals 17."
    assert is_exact(" 14 plus 3 equals 17.\n", real)
    for wrong in ("17", "14 plus 3 equals 17", "14  plus 3 equals 17.", "14 Plus 3 equals 17.", "", real + " Yes."):
        assert not is_exact(wrong, real)
