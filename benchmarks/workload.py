"""What everybody works on: seeded prompts, real and generated answers whose lengths look like those of real data.

Prompts and answers are short English, made by a small grammar, because a chat model answers such prompts at natural
length; how good the answers are is nobody's question here. Lengths are lognormal: half of the prompts below the median,
a long tail, cut. Token ids are made once, and all contenders get the same.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM = "You answer questions about short texts."
PEOPLE = "Anna Boris Clara David Elena Farid Grace Hugo Irene Jonas Karim Laura Marco Nadia Oscar Petra".split()
ROLES = "teacher doctor farmer pilot baker lawyer nurse sailor writer painter driver judge".split()
ACTIONS = "repaired|sold|painted|borrowed|lost|found|described|measured|cleaned|moved|bought|opened".split("|")
THINGS = (
    "the old bridge|a red bicycle|three letters|the garden wall|a wooden boat|the town clock|two paintings|a box of "
    "tools|the school roof|a long report|the kitchen door|an old map"
).split("|")
PLACES = (
    "in the harbour|near the station|behind the market|at the edge of the forest|in a small village|beside the "
    "river|on the north side of the hill|next to the library"
).split("|")
TIMES = (
    "on Monday morning|last winter|before the storm|after lunch|in early spring|during the festival|one quiet "
    "evening|in the year of the flood"
).split("|")
REASONS = (
    "because nobody else had the time|although it was far too late|and wrote down every detail|while the others waited "
    "outside|so that the work could go on|but forgot to tell the mayor"
).split("|")
TOPICS = "rain|bridges|bread|the moon|sleep|money|trees|music|rivers|glass".split("|")

#: Tasks around a text, and tasks that need none: {text} is as many sentences as the wanted length takes.
TASKS = (
    "Summarise the following report in two sentences.\n\n{text}",
    "Read this text and answer the question behind it.\n\n{text}\n\nQuestion: who did something {place}, and what was "
    "it?",
    "Rewrite this message so that it is short and polite.\n\n{text}",
    "List the people in this text and what each of them did.\n\n{text}",
    "Continue this story with one more paragraph.\n\n{text}",
    "Write a headline for this article, and explain your choice.\n\n{text}",
    "A friend sent me this. What should I answer?\n\n{text}",
)
SHORT_TASKS = (
    "Explain {topic} to a child.",
    "Write a short poem about {topic}.",
    "Give me three facts about {topic}.",
    "Why do people care about {topic}?",
)


@dataclass(frozen=True)
class Lengths:
    """How many tokens prompts (template included) and answers have: medians, and the spread of their logarithms.

    A spread of 0 gives every row the median.
    """

    prompt: float = 128
    answer: float = 100
    spread: float = 0.7
    longest: int = 512

    def draw(self, rng: random.Random, median: float) -> int:
        return min(self.longest, round(median * math.exp(self.spread * rng.gauss(0, 1))))


@dataclass(frozen=True)
class Exchange:
    """A prompt, its real answer, and what the opponent is made to say: one answer for each of its turns."""

    prompt: str
    real: str
    generated: tuple[str, ...]

    @property
    def row(self) -> dict[str, Any]:
        """As a user's file has it."""
        turns = [("system", SYSTEM), ("user", self.prompt), ("assistant", self.real)]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


def make_exchanges(
    laws: Sequence[Lengths],
    count_tokens: Callable[[str], int],
    template_tokens: int,
    answers_per_prompt: int = 1,
    seed: int = 0,
) -> list[Exchange]:
    """Seeded exchanges of the wanted lengths, to within a sentence.

    Args:
        laws: The lengths of each exchange.
        count_tokens: Tokens of a text.
        template_tokens: What the chat template and the system prompt add to a prompt.

    Example:
        >>> made = make_exchanges([Lengths()] * 3, lambda text: len(text.split()), template_tokens=20)
        >>> made == make_exchanges([Lengths()] * 3, lambda text: len(text.split()), template_tokens=20)
        True
    """
    rng = random.Random(f"workload/{seed}")
    exchanges = []
    for law in laws:
        wanted = law.draw(rng, law.prompt) - template_tokens
        task = rng.choice(TASKS)
        prompt = task.format(text="", place=rng.choice(PLACES))
        if wanted < count_tokens(prompt) + 14:
            prompt = rng.choice(SHORT_TASKS).format(topic=rng.choice(TOPICS))
        else:
            text = _text(rng, wanted - count_tokens(prompt), count_tokens)
            prompt = task.format(text=text, place=rng.choice(PLACES))
        real, *generated = (
            _text(rng, law.draw(rng, law.answer) - 1, count_tokens) for _ in range(1 + answers_per_prompt)
        )
        exchanges.append(Exchange(prompt, real, tuple(generated)))
    return exchanges


def _text(rng: random.Random, num_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """Sentences of about this many tokens in all; the last is cut where the length is reached."""
    text, missing = "", num_tokens
    while missing > 0:
        sentence = _sentence(rng)
        cost = count_tokens(f" {sentence}")
        if cost > missing:
            words = sentence.split()
            sentence = " ".join(words[: max(1, round(len(words) * missing / cost))])
        text, missing = f"{text} {sentence}".strip(), missing - cost
    return text


def _sentence(rng: random.Random) -> str:
    who = f"{rng.choice(PEOPLE)} the {rng.choice(ROLES)}"
    parts = [who, rng.choice(ACTIONS), rng.choice(THINGS), rng.choice(PLACES)]
    if rng.random() < 0.6:
        parts.append(rng.choice(TIMES))
    if rng.random() < 0.4:
        parts.append(rng.choice(REASONS))
    return " ".join(parts) + "."


def write_workload(name: str, folder: Path, exchanges: Sequence[Exchange], encoder: Any, batch_size: int) -> Path:
    """Write a workload as both kinds of trainers read it.

    ``rows.jsonl`` is what a user of this package has. ``pairs.json`` has the token ids, in the order of the training
    steps, for everybody else. The package shuffles its rows; they are written so that the shuffle gives that order too.
    """
    from spin_lightning.data.loader import ResumableSampler
    from spin_lightning.data.rows import load_rows

    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    order = list(ResumableSampler(list(range(len(exchanges))), seed=0, keeps_prompts_together=False))
    written: dict[int, Exchange] = dict(zip(order, exchanges, strict=True))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(written[place].row) + "\n" for place in range(len(exchanges))))
    rows = list(load_rows(str(path)).rows)
    pairs = []
    for place, exchange in zip(order, exchanges, strict=True):
        prompt = encoder.encode(place, rows[place], max_response_tokens=10**6)
        for answer in exchange.generated:
            ids = encoder.tokenizer.encode(answer, add_special_tokens=False)
            pairs.append(
                {
                    "prompt_ids": prompt.prompt_ids,
                    "chosen_ids": prompt.real_ids,
                    "rejected_ids": [*ids, encoder.terminator_id],
                }
            )
    (folder / "pairs.json").write_text(json.dumps({"batch_size": batch_size, "pairs": pairs}))
    return folder


def read_pairs(folder: str) -> list[dict[str, list[int]]]:
    """The pairs of a workload, in the order of the training steps."""
    pairs: list[dict[str, list[int]]] = json.loads((Path(folder) / "pairs.json").read_text())["pairs"]
    return pairs


def describe(folder: Path) -> dict[str, Any]:
    """Counts and percentiles of a workload, for the report."""
    pairs = read_pairs(str(folder))
    facts: dict[str, Any] = {"pairs": len(pairs)}
    for name, side in (("prompt", "prompt_ids"), ("real", "chosen_ids"), ("generated", "rejected_ids")):
        lengths = sorted(len(pair[side]) for pair in pairs)
        facts[name] = {
            "median": lengths[len(lengths) // 2],
            "p90": lengths[len(lengths) * 9 // 10],
            "most": lengths[-1],
        }
    return facts
