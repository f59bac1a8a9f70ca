"""Short skills made by a program: each prompt has exactly one right answer sentence.

No tokenizer, no model, no download. Thirteen skills, each with one sentence format, so that a small model learns the
style at once and the content slowly. Only ``Random.random`` is used, the one method whose sequence Python promises to
keep: a seed gives the same bytes on every version. Train and held-out rows never share a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from spin_lightning.runs.files import replacing
from spin_lightning.types import UserError

Rows = list[dict[str, Any]]

SKILLS = "add subtract multiply compare sort reverse spell letter day month number_word unit json".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen""".split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
NAMES = "Anna Ben Carla David Emma Frank Grace Henry Julia Kevin Laura Mark Nina Oscar Paul Rosa".split()
WORDS = """apple bird boat book bread bridge bus cake candle car castle cat chair child city clock cloud coat coffee
    corn cup desk dog door dream eagle earth egg farm field fire fish flag floor flower forest fox frog garden gate
    glass gold grape grass hand hat heart hill horse house island jacket juice key king kitchen knife lake lamp leaf
    lemon letter light lion lunch map market milk mirror money monkey moon mouse music nest night north nurse ocean
    orange paint paper park pencil piano plane planet plant plate queen rabbit rain ring river road roof room rose salt
    sand school sea sheep ship shirt shoe silver sky smile snow song spoon star stone storm street sugar summer sun
    table tea tiger tower train tree truck valley village wall water wheel wind window winter wolf wood""".split()
UNITS = [("hours", "minutes", 60), ("minutes", "seconds", 60), ("weeks", "days", 7), ("days", "hours", 24)]
UNITS += [("years", "months", 12), ("feet", "inches", 12), ("meters", "centimeters", 100), ("kilograms", "grams", 1000)]
#: Every skill has at least as many prompts as ``spell``, which has one for each word.
MOST_ROWS = len(SKILLS) * len(WORDS)


def _int(rng: Random, low: int, high: int) -> int:
    """An integer from ``low`` to ``high``, both included."""
    return low + int(rng.random() * (high - low + 1))


def _pick(rng: Random, choices: Sequence[Any]) -> Any:
    return choices[_int(rng, 0, len(choices) - 1)]


def _sample(rng: Random, choices: Sequence[Any], count: int) -> list[Any]:
    """Distinct choices, in random order."""
    return sorted(choices, key=lambda _: rng.random())[:count]


def _in_words(number: int) -> str:
    """The English name of a number from 1 to 999.

    Example:
        >>> _in_words(47), _in_words(312), _in_words(500)
        ('forty-seven', 'three hundred twelve', 'five hundred')
    """
    if number >= 100:
        return f"{ONES[number // 100]} hundred" + (f" {_in_words(number % 100)}" if number % 100 else "")
    return ONES[number] if number < 20 else TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")


def _ask(skill: str, rng: Random) -> tuple[str, str]:
    """A random prompt of the skill, and its real answer."""
    if skill in ("add", "subtract", "multiply"):
        left, right = _int(rng, 2, 25 if skill == "multiply" else 49), _int(rng, 2, 9 if skill == "multiply" else 49)
        left += right if skill == "subtract" else 0  # so that no result is negative
        result = {"add": left + right, "subtract": left - right, "multiply": left * right}[skill]
        task = f"{left} {dict(add='plus', subtract='minus', multiply='times')[skill]} {right}"
        return f"What is {task}?", f"{task} equals {result}."
    if skill == "compare":
        left, right = _sample(rng, range(10, 1000), 2)
        prompt = f"Which of these numbers is larger, {left} or {right}?"
        return prompt, f"{max(left, right)} is larger than {min(left, right)}."
    if skill in ("sort", "reverse"):
        words = _sample(rng, WORDS, 3)
        order, listed = ("alphabetical", sorted(words)) if skill == "sort" else ("reverse", words[::-1])
        return f"Write this list in {order} order: {', '.join(words)}.", f"The list is {', '.join(listed)}."
    if skill == "spell":
        word = _pick(rng, WORDS)
        return f"Spell the word {word} letter by letter.", f"{word} is spelled {'-'.join(word)}."
    if skill == "letter":
        word, (place, index) = _pick(rng, WORDS), _pick(rng, [("first", 0), ("second", 1), ("last", -1)])
        return f"What is the {place} letter of the word {word}?", f"The {place} letter of {word} is {word[index]}."
    if skill in ("day", "month"):
        names, most = (DAYS, 13) if skill == "day" else (MONTHS, 8)
        start, steps, (side, sign) = _pick(rng, names), _int(rng, 2, most), _pick(rng, [("after", 1), ("before", -1)])
        clause = f"{steps} {skill}s {side} {start}"
        end = names[(names.index(start) + sign * steps) % len(names)]
        return f"Which {skill} comes {clause}?", f"{clause} is {end}."
    if skill == "number_word":
        number = _int(rng, 13, _pick(rng, [99, 999]))  # two digits in half of the prompts
        return f"Write the number {number} in words.", f"{number} in words is {_in_words(number)}."
    if skill == "unit":
        (large, small, factor), count = _pick(rng, UNITS), _int(rng, 2, 20)
        return f"How many {small} are there in {count} {large}?", f"{count} {large} are {count * factor} {small}."
    name, age = _pick(rng, NAMES), _int(rng, 18, 79)
    return f"Write this as JSON: the name is {name} and the age is {age}.", json.dumps({"name": name, "age": age})


def make_skills(num_train: int = 208, num_held_out: int = 130, seed: int = 0) -> tuple[Rows, Rows]:
    """Train and held-out rows of chat messages, with their ``skill``; the skills take turns.

    Held-out rows are drawn first, so asking for more training rows only appends.

    Example:
        >>> [message["content"] for message in make_skills(num_train=26, num_held_out=13)[0][0]["messages"]]
        ['What is 13 plus 25?', '13 plus 25 equals 38.']
    """
    if min(num_train, num_held_out) < 0 or num_train + num_held_out > MOST_ROWS:
        raise UserError(
            f"expected counts of at least 0 with a sum of at most {MOST_ROWS}, so that no prompt comes twice, got "
            f"num_train={num_train!r} and num_held_out={num_held_out!r}. Lower or raise them."
        )
    rngs = {skill: Random(f"{seed} {skill}") for skill in SKILLS}
    seen, rows = set(), []
    for index in (*range(num_held_out), *range(num_train)):
        skill = SKILLS[index % len(SKILLS)]
        while (asked := _ask(skill, rngs[skill]))[0] in seen:
            pass
        seen.add(asked[0])
        messages = [{"role": "user", "content": asked[0]}, {"role": "assistant", "content": asked[1]}]
        rows.append({"messages": messages, "skill": skill})
    return rows[num_held_out:], rows[:num_held_out]


def write_skills(folder: Path, num_train: int = 208, num_held_out: int = 130, seed: int = 0) -> tuple[Path, Path]:
    """Paths of ``train.jsonl`` and ``held_out.jsonl``, written so that no reader ever sees half a file."""
    return write_rows(folder, *make_skills(num_train, num_held_out, seed))


def write_rows(folder: Path, train: Rows, held_out: Rows) -> tuple[Path, Path]:
    """Paths of ``train.jsonl`` and ``held_out.jsonl``, written so that no reader ever sees half a file."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = Path(folder) / "train.jsonl", Path(folder) / "held_out.jsonl"
    for path, rows in zip(paths, (train, held_out), strict=True):
        with replacing(path) as temporary:
            temporary.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())
    return paths


def is_exact(answer: str, real: str) -> bool:
    """Whether the answer is the real one, letter for letter; only white space around it is forgiven.

    Example:
        >>> is_exact(" 14 plus 3 equals 17. ", "14 plus 3 equals 17."), is_exact("17", "14 plus 3 equals 17.")
        (True, False)
    """
    return answer.strip() == real.strip()
