"""Rows of a user's own as a task of lm-evaluation-harness: questions with choices, or prompts with one right text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spin_lightning.types import UserError

#: The most tokens of a response to a prompt, and what ends it where no target goes on behind that.
MOST_TOKENS, STOPS = 256, ("\n", "\n\n")


def make_task(path: Path) -> dict[str, Any]:
    r"""What the harness makes a task of, from a JSONL file; the task is called like the file.

    A file has rows of one kind. Of ``question``, ``choices`` (a list of texts) and ``answer`` (its number from 0, its
    letter, or its text) the likelihood of each choice after ``Question: ...\nAnswer:`` decides: metrics ``acc`` and
    ``acc_norm``, by its length. Of ``prompt`` and ``target`` the most likely response is generated, up to a new line or
    256 tokens, and is right if it is the target, but for blanks around them: metric ``exact_match``.

    Raises:
        UserError: A row cannot be used; the message names it.
    """
    rows = _read_rows(path)
    is_choice = "choices" in rows[0][1]
    documents = [_as_choice(row, where) if is_choice else _as_prompt(row, where) for where, row in rows]
    task: dict[str, Any] = {
        "task": path.stem,
        "custom_dataset": lambda **_: _as_dataset(documents),
        "test_split": "test",
        "fewshot_split": "test",  # the harness leaves out the row that is asked
        "metadata": {"version": 1.0},
    }
    if is_choice:
        return task | {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [_metric("acc"), _metric("acc_norm")],
        }
    goes_on = any("\n" in document["target"] for document in documents)
    return task | {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": [STOPS[goes_on]], "max_gen_toks": MOST_TOKENS, "do_sample": False},
        "process_results": match_target,
        "metric_list": [_metric("exact_match")],
    }


def match_target(document: Mapping[str, Any], responses: list[str]) -> dict[str, float]:
    """Whether a response is the target of its document, but for blanks around them.

    Example:
        >>> match_target({"target": "7"}, [" 7 "]), match_target({"target": "7"}, ["7."])
        ({'exact_match': 1.0}, {'exact_match': 0.0})
    """
    return {"exact_match": float(responses[0].strip() == document["target"].strip())}


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def _as_dataset(documents: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(documents)}


def _read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with where it is.

    Raises:
        UserError: There are none, or a line is no JSON object.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the rows of the task {str(path)!r} cannot be read: {error}.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is no JSON ({error}). Each line is one row, an object.") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} must be an object with names and values, got {type(row).__name__}.")
        rows.append((where, row))
    if not rows:
        raise UserError(f"the task {str(path)!r} has no rows.")
    return rows


def _as_choice(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{where}: choices must be a list of at least two texts, got {choices!r}.")
    texts = [str(choice) if isinstance(choice, int | float) else choice for choice in choices]
    if not all(isinstance(text, str) and text.strip() for text in texts) or len(set(texts)) < len(texts):
        raise UserError(f"{where}: choices must be different texts, none of them empty, got {choices!r}.")
    return {"question": _text_of(row, "question", where), "choices": texts, "answer": _find_answer(row, texts, where)}


def _find_answer(row: Mapping[str, Any], texts: list[str], where: str) -> int:
    """Which choice is right: by its text, its number from 0, or its letter.

    Raises:
        UserError: None is, or the answer can be read in two ways.
    """
    answer = row.get("answer")
    letters = [chr(ord("A") + number) for number in range(len(texts))]
    found = set()
    if isinstance(answer, str) and answer in texts:
        found = {texts.index(answer)}
    elif isinstance(answer, str) and re.fullmatch("[A-Z]", answer) and answer in letters:
        found = {letters.index(answer)}
    elif isinstance(answer, int) and not isinstance(answer, bool):
        found = {answer} if 0 <= answer < len(texts) else set()
        found |= {texts.index(str(answer))} if str(answer) in texts else set()
    if len(found) != 1:
        reads = "can be read as a number from 0 and as a text" if found else "is none of the choices"
        raise UserError(
            f"{where}: answer must be the text of a choice, its number from 0 or its letter, and {answer!r} {reads}. "
            f"The choices are {texts!r}."
        )
    return found.pop()


def _as_prompt(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "prompt" not in row or "target" not in row:
        raise UserError(
            f"{where} must have question, choices and answer, or prompt and target, as the first row; it has "
            f"{', '.join(map(str, row)) or 'nothing'}. Other tasks are written as the harness's own YAML."
        )
    target = str(row["target"]) if isinstance(row["target"], int | float) else row["target"]
    return {"prompt": _text_of(row, "prompt", where), "target": _text_of({"target": target}, "target", where)}


def _text_of(row: Mapping[str, Any], name: str, where: str) -> str:
    text = row.get(name)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {name} must be a text that is not empty, got {text!r}.")
    return text
