"""Pairs as the rows that other preference trainers read. Rows in, rows out: no files, no tokenizer.

The layouts are those of TRL 1.16, axolotl 0.19 (``chat_template.default``) and LLaMA-Factory 0.9.5 (sharegpt,
``ranking``). Each row also says where it comes from, in columns that these trainers do not read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spin_lightning.types import FinishReason, Message


@dataclass(frozen=True)
class Pair:
    """A better and a worse response to a prompt, as text.

    Attributes:
        prompt: The turns before the responses.
        chosen: Text of the better one.
        rejected: Text of the worse one.
        chosen_finish_reason: ``length`` where the text was cut, so that it has no end of its own.
        rejected_finish_reason: The same of the worse one.
        is_identical: Whether both are the same tokens.
        is_ranked: Whether the first is known to be the better one.
        tools: Definitions of the tools that may be called.
        facts: Where the pair comes from, and what is known of it: columns of their own.
    """

    prompt: Sequence[Message]
    chosen: str
    rejected: str
    chosen_finish_reason: FinishReason = "stop"
    rejected_finish_reason: FinishReason = "stop"
    is_identical: bool = False
    is_ranked: bool = True
    tools: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_clipped(self) -> bool:
        """Whether one of the texts was cut."""
        return "length" in (self.chosen_finish_reason, self.rejected_finish_reason)


def read_pairs(
    rows: Sequence[Mapping[str, Any]], max_tokens: int, has_data: bool, decode: Callable[[list[int]], str] | None = None
) -> Iterator[Pair]:
    """The pairs of a game's table.

    Args:
        rows: Of a pair store.
        max_tokens: The cap on both responses.
        has_data: Whether the first responses are those of the data, whose texts are kept whole.
        decode: Where prompts are wanted as the text that the template writes: makes text of ids. The prompt is then one
            turn, and each response has its end token, if it has one.
    """
    for row in rows:
        # of a response of the data the ids are cut at the cap, and the text is not
        is_whole = has_data and decode is None and len(row["real_ids"]) == max_tokens
        facts = {
            "iteration": row["iteration"],
            "prompt_id": row["prompt_id"],
            "response_number": row["answer"],
            "opponent_sha256": row["opponent_sha256"],
            "seed": row["seed"],
        }
        is_judged = "real_reward" not in row or None not in (row["real_reward"], row["generated_reward"])
        if is_judged and "real_reward" in row:
            facts["margin"] = row["real_reward"] - row["generated_reward"]
        prompt, chosen, rejected = row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"]
        if decode is not None:
            prompt = [{"role": "user", "content": decode(row["prompt_ids"])}]
            chosen, rejected = decode(row["real_ids"]), decode(row["generated_ids"])
        yield Pair(
            prompt,
            chosen,
            rejected,
            "stop" if is_whole else row["real_finish_reason"],
            row["generated_finish_reason"],
            row["real_ids"] == row["generated_ids"],
            is_judged and facts.get("margin", 1.0) > 0,
            facts=facts,
        )


def pair_of_record(record: Mapping[str, Any]) -> Pair:
    """The pair of a row that ``score`` has written."""
    return Pair(
        record["prompt"],
        record["chosen"][0]["content"],
        record["rejected"][0]["content"],
        record["chosen_finish_reason"],
        record["rejected_finish_reason"],
        record["chosen"] == record["rejected"],
        tools=record.get("tools", ()),
        facts={"preference": float(record["preference"]), "margin": float(record["margin"])},
    )


def trl_row(pair: Pair) -> dict[str, Any]:
    """A row of conversations for TRL's preference trainers; OpenRLHF and ``spin-lightning dpo`` read it too.

    Example:
        >>> trl_row(Pair([{"role": "user", "content": "1+1?"}], "2", "3"))["chosen"]
        [{'role': 'assistant', 'content': '2'}]
    """
    turns = {side: [_turn(text)] for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected))}
    return {"prompt": list(pair.prompt), **turns, **_others(pair)}


def trl_text_row(pair: Pair) -> dict[str, Any]:
    """A row of plain texts for TRL's preference trainers, which apply no template to it."""
    return {"prompt": pair.prompt[0]["content"], "chosen": pair.chosen, "rejected": pair.rejected, **_others(pair)}


def axolotl_row(pair: Pair) -> dict[str, Any]:
    """A row for axolotl's ``chat_template.default``, which knows no developer."""
    turns = [
        {**turn, "role": "system"} if turn["role"] == "developer" else turn  # as templates without one do
        for turn in pair.prompt
    ]
    return {"messages": turns, "chosen": _turn(pair.chosen), "rejected": _turn(pair.rejected), **_others(pair)}


_SPEAKERS = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def llama_factory_row(pair: Pair) -> dict[str, Any] | None:
    """A row for LLaMA-Factory in the layout of ShareGPT; None where the speakers do not take turns as it wants them.

    Example:
        >>> llama_factory_row(Pair([{"role": "user", "content": "1+1?"}], "2", "3"))["conversations"]
        [{'from': 'human', 'value': '1+1?'}]
    """
    turns = [{"from": _SPEAKERS[turn["role"]], "value": turn["content"]} for turn in pair.prompt]
    for turn, message in zip(turns, pair.prompt, strict=True):
        if calls := message.get("tool_calls"):
            turn |= {"from": "function_call", "value": json.dumps([call["function"] for call in calls])}
    rest = turns[1:] if turns[0]["from"] == "system" else turns
    if len(rest) % 2 == 0 or any((turn["from"] in ("human", "observation")) == n % 2 for n, turn in enumerate(rest)):
        return None
    sides = {
        side: {"from": "gpt", "value": text} for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }
    return {"conversations": turns, **sides, **_others(pair)}


def dataset_info(name: str, has_tools: bool) -> dict[str, Any]:
    """The entry of LLaMA-Factory's ``dataset_info.json`` for a file of such rows."""
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    columns |= {"tools": "tools"} if has_tools else {}
    return {"file_name": name, "formatting": "sharegpt", "ranking": True, "columns": columns}


#: How a pair is written, by the name of the layout. None: it cannot be.
LAYOUTS: Mapping[str, Callable[[Pair], dict[str, Any] | None]] = {
    "trl": trl_row,
    "trl_text": trl_text_row,
    "axolotl": axolotl_row,
    "llama_factory": llama_factory_row,
}


def _turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _others(pair: Pair) -> dict[str, Any]:
    """The columns that every layout has beside its own. Tools are JSON text, which all of the trainers take."""
    return {
        **({"tools": json.dumps(list(pair.tools))} if pair.tools else {}),
        "chosen_finish_reason": pair.chosen_finish_reason,
        "rejected_finish_reason": pair.rejected_finish_reason,
        **pair.facts,
    }
