"""The README of an exported policy, rendered from what the game recorded. Text in, text out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from spin_lightning.terminal import printable


def render_model_card(summary: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Markdown with a hub header: what the model is, what made it, and what was measured.

    Args:
        summary: The iteration's summary.
        manifest: The manifest of the iteration's pairs.
    """
    binding, pairs = manifest["binding"], summary["pairs"]
    sampling = ", ".join(f"{name} {_text(value)}" for name, value in binding["sampling"].items())
    metrics = "\n".join(
        f"| {name} | {value:.4f} |"
        for name, value in summary["epoch_metrics"].items()
        if "chosen" not in name and "rejected" not in name
    )
    opponent = f"`{_code(_public(manifest['opponent']))}`"
    if adapter := manifest.get("opponent_adapter"):
        opponent += f" with the adapter `{_code(_public(adapter, parts=2))}`"
    held_out = "not measured" if summary["val_nll"] is None else f"{summary['val_nll']:.4f} nats a response"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [spin, self-play, spin-lightning]
---

# Self-play fine-tuned policy, iteration {summary["iteration"]}

Trained with `spin_lightning` {manifest["versions"]["spin_lightning"]} by self-play fine-tuning (SPIN, [arXiv:2401.01335](https://arxiv.org/abs/2401.01335)).

| | |
|---|---|
| opponent | {opponent} (weights sha256 `{binding["opponent_sha256"][:16]}`) |
| pairs | {pairs["training_pairs"]} trained on, {pairs["training_pairs_dropped"]} identical ones dropped |
| sampling | {sampling} |
| seed | {binding["seed"]} |
| beta | {summary["beta"]:g} |
| updates | {summary["updates"]} |
{_weights(summary)}| loss, first and last step | {_number(summary["first_loss"])}, {_number(summary["last_loss"])} |
| held-out NLL | {held_out} |

Means over the last epoch's pairs, in nats:

| metric | value |
|---|---|
{metrics}

{how_to_cast(summary)}Versions: `{_code(json.dumps(manifest["versions"]))}`
"""


def add_adapter(card: str, base: str, *, is_merged: bool) -> str:
    """The README of an exported policy that was trained as an adapter: what the folder holds, and how to load it.

    Args:
        card: The README of the policy.
        base: The name of the model below the adapter.
        is_merged: Whether the folder holds base and adapter as one, or the adapter alone.
    """
    name = _code(_public(base))
    if is_merged:
        return f"""{card.rstrip()}

Trained as a LoRA adapter on `{name}`. These are the weights of base and adapter together, rounded to their dtype; what
was trained, to the bit, is the adapter, in the folder `adapter/` beside this one.
"""
    card = card.replace("library_name: transformers", f"library_name: peft\nbase_model: {json.dumps(name)}", 1)
    return f"""{card.rstrip()}

This folder holds a LoRA adapter, to be loaded on `{name}`:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({json.dumps(name)})
model = PeftModel.from_pretrained(base, "adapter")
tokenizer = AutoTokenizer.from_pretrained("adapter")
```
"""


def how_to_cast(summary: Mapping[str, Any]) -> str:
    """A paragraph on weights that are larger than those that came in, and how to make them as small; else nothing."""
    dtype, stored = summary.get("dtype"), summary.get("stored_dtype")
    if dtype != "float32" or stored not in ("bfloat16", "float16"):
        return ""
    return f"""The weights are in {dtype}, twice the size of those that training began with, because most of what it
changed is too small for {stored}. To round them, load them with `dtype=torch.{stored}`, or make a folder of half the
size:

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

AutoModelForCausalLM.from_pretrained("policy", dtype=torch.{stored}).save_pretrained("policy_{stored}")
AutoTokenizer.from_pretrained("policy").save_pretrained("policy_{stored}")
```

"""


def _weights(summary: Mapping[str, Any]) -> str:
    dtype, stored = summary.get("dtype"), summary.get("stored_dtype")
    return f"| weights | {dtype}; those it began with: {stored or 'unknown'} |\n" if dtype else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _public(name_or_path: str, parts: int = 1) -> str:
    """A hub name or a name inside the run as it is; of any other path only its end, for a card may be published."""
    names = name_or_path.rstrip("/").split("/")
    is_name = len(names) <= 2 and not name_or_path.startswith(("/", ".", "~"))
    return name_or_path if is_name else "/".join(names[-parts:])


def _code(value: Any) -> str:
    """One line in which nothing ends a table's cell or a code span."""
    return " ".join(printable(str(value)).split()).replace("`", "'").replace("|", "/")


def _text(value: Any) -> str:
    """One line in which nothing is HTML, a link or emphasis, for a place outside of a code span."""
    return re.sub(r"[<>\[\]*&!#]", lambda found: f"&#{ord(found[0])};", _code(value))
