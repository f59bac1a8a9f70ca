"""The README of an exported model: a header that the hub reads, and what a person wants to know. Text in, text out.

Only ``read_origin`` looks at files. A header names nothing but what has a name on the hub, and no licence and no
language is made up: they are those of the base model's own card.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spin_lightning.models import hub
from spin_lightning.terminal import printable

#: What a card takes over from the base model's own.
_INHERITED = ("license", "license_name", "license_link", "language")
_HARNESS, _HARNESS_URL = "lm-evaluation-harness", "https://github.com/EleutherAI/lm-evaluation-harness"
_BEGIN, _END = "<!-- evaluation -->", "<!-- end of evaluation -->"


@dataclass(frozen=True)
class Origin:
    """What a model comes from, as its card may say it.

    Attributes:
        base: Name of the base model on the hub. None: it has none there.
        datasets: Names of data sets on the hub.
        inherited: What of the base model's card goes for this one too: licence and language.
    """

    base: str | None = None
    datasets: tuple[str, ...] = ()
    inherited: Mapping[str, Any] = field(default_factory=dict)


def read_origin(model: str, datasets: Sequence[str] = ()) -> Origin:
    """What a model that was trained from another one comes from.

    A folder is asked for its own card, and what that was trained on counts too. A name on the hub is a base model,
    whose card is taken from the cache or, if the hub answers, downloaded.

    Args:
        model: The name of the model that training began with.
        datasets: Names of the data; those that cannot be names on the hub are left out.
    """
    own = tuple(name for name in datasets if is_hub_name(name))
    folder = Path(model).expanduser()
    if folder.is_dir():
        header = _read_header(folder / "README.md")
        bases, before = _as_names(header.get("base_model")), _as_names(header.get("datasets"))
        return Origin(next(iter(bases), None), tuple(dict.fromkeys([*before, *own])), _inherited(header))
    if not is_hub_name(model):
        return Origin(None, own)
    return Origin(model, own, _inherited(_download_header(model)))


def is_hub_name(name: str) -> bool:
    """Whether a name can be one on the hub, and nothing here is called so.

    Example:
        >>> is_hub_name("HuggingFaceTB/SmolLM2-135M"), is_hub_name("/home/me/model"), is_hub_name("rows.jsonl")
        (True, False, False)
    """
    shape = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
    return re.fullmatch(shape, name, re.ASCII) is not None and not Path(name).exists()


def render_header(
    tags: Sequence[str],
    title: str,
    origin: Origin,
    pipeline_tag: str = "text-generation",
    val_nll: float | None = None,
) -> str:
    """The header of a card, with its two rules.

    Args:
        tags: By which the hub finds it.
        title: The model's name in the index of results.
        origin: Where it comes from.
        pipeline_tag: What it does, in the hub's words.
        val_nll: Held-out NLL, in nats a response. None: it was not measured.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    if val_nll is not None and math.isfinite(val_nll):
        results = [
            EvalResult(
                task_type=pipeline_tag,
                dataset_type="held-out",
                dataset_name="held-out rows of its own data",
                metric_type="nll",
                metric_name="NLL of a response in nats",
                metric_value=round(val_nll, 6),
            )
        ]
    data = ModelCardData(
        base_model=origin.base,
        base_model_relation="finetune" if origin.base else None,
        datasets=list(origin.datasets) or None,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=list(tags),
        model_name=title if results else None,
        eval_results=results or None,
        **origin.inherited,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def render_model_card(summary: Mapping[str, Any], manifest: Mapping[str, Any], origin: Origin | None = None) -> str:
    """The card of a policy of self-play: what the model is, what made it, and what was measured.

    Args:
        summary: The iteration's summary.
        manifest: The manifest of the iteration's pairs.
        origin: Where it comes from. None: nothing is known.
    """
    binding, pairs = manifest["binding"], summary["pairs"]
    sampling = ", ".join(f"{name} {_text(value)}" for name, value in binding["sampling"].items())
    metrics = "\n".join(
        f"| {name} | {value:.4f} |"
        for name, value in summary["epoch_metrics"].items()
        if "chosen" not in name and "rejected" not in name
    )
    opponent = f"`{_code(public_name(manifest['opponent']))}`"
    if adapter := manifest.get("opponent_adapter"):
        opponent += f" with the adapter `{_code(public_name(adapter, parts=2))}`"
    held_out = "not measured" if summary["val_nll"] is None else f"{summary['val_nll']:.4f} nats a response"
    title = f"Self-play fine-tuned policy, iteration {summary['iteration']}"
    header = render_header(
        ("spin", "self-play", "spin-lightning"), title, origin or Origin(), val_nll=summary["val_nll"]
    )
    return f"""{header}
# {title}

Trained with `spin_lightning` {manifest["versions"]["spin_lightning"]} by self-play fine-tuning (SPIN, [arXiv:2401.01335](https://arxiv.org/abs/2401.01335)).

{how_to_use()}| | |
|---|---|
| opponent | {opponent} (weights sha256 `{binding["opponent_sha256"][:16]}`) |
| pairs | {pairs["training_pairs"]} trained on, {pairs["training_pairs_dropped"]} identical ones dropped |
| sampling | {sampling} |
| seed | {binding["seed"]} |
| beta | {summary["beta"]:g} |
| updates | {summary["updates"]} |
{_weights(summary)}| loss, first and last step | {_number(summary["first_loss"])}, {_number(summary["last_loss"])} |
| held-out NLL | {held_out} |
{_retention(summary)}
Means over the last epoch's pairs, in nats:

| metric | value |
|---|---|
{metrics}

{how_to_cast(summary)}Versions: `{_code(json.dumps(manifest["versions"]))}`
"""


def _retention(summary: Mapping[str, Any]) -> str:
    """Rows on what was forgotten, where it was measured."""
    found, rows = summary.get("retention") or {}, []
    if (nll := found.get("other_nll")) is not None:
        start = found.get("start", {}).get("other_nll")
        before = "" if start is None else f", {start:.4f} at the start"
        rows.append(f"| NLL of other rows | {nll:.4f} nats a response{before} |\n")
    if (divergence := found.get("kl_to_start")) is not None:
        rows.append(f"| KL to the start | {divergence:.4f} nats a token of the held-out responses |\n")
    return "".join(rows)


def render_plain_card(
    tag: str,
    title: str,
    summary: Mapping[str, Any],
    origin: Origin | None = None,
    versions: Mapping[str, Any] | None = None,
) -> str:
    """The card of a policy of any other stage: what its summary says.

    Args:
        tag: The stage, by which the hub finds it.
        title: What the model is.
        summary: What was measured.
        origin: Where it comes from. None: nothing is known.
        versions: Of what made it.
    """
    header = render_header((tag, "spin-lightning"), title, origin or Origin(), val_nll=summary.get("val_nll"))
    return f"{header}\n# {title}\n\n{how_to_use()}{describe_summary(summary)}{_name_versions(versions)}"


def render_reward_card(
    summary: Mapping[str, Any], origin: Origin | None = None, versions: Mapping[str, Any] | None = None
) -> str:
    """The card of a reward model. Arguments as above."""
    title = "Reward model"
    header = render_header(("reward-model", "spin-lightning"), title, origin or Origin(), "text-classification")
    return (
        f"{header}\n# {title}\n\nOne score for a response, read at the terminator that ends it (`terminator_id` in "
        "`reward.json`): what a chat template writes behind it is to be left out. `(score - shift) / scale` has mean 0 "
        "and deviation 1 on the held-out pairs.\n\n```python\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
        'model = AutoModelForSequenceClassification.from_pretrained("reward_model")\n'
        'tokenizer = AutoTokenizer.from_pretrained("reward_model")\n'
        'messages = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]\n'
        "ids = tokenizer.apply_chat_template(messages, return_dict=False)\n```\n\n"
        f"{describe_summary(summary)}{_name_versions(versions)}"
    )


def describe_summary(summary: Mapping[str, Any]) -> str:
    """A summary as a list, with how to make its weights as small as those that came in."""
    listed = "\n".join(f"- {_text(name)}: {_text(value)}" for name, value in summary.items())
    return f"{listed}\n\n{how_to_cast(summary)}"


def _name_versions(versions: Mapping[str, Any] | None) -> str:
    return f"Versions: `{_code(json.dumps(versions))}`\n" if versions else ""


def how_to_use() -> str:
    """How a policy is loaded, and asked by its chat template. ``push`` puts the repository's name in."""
    return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("policy")
tokenizer = AutoTokenizer.from_pretrained("policy")
messages = [{"role": "user", "content": "..."}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
response = model.generate(**prompt, max_new_tokens=256)
print(tokenizer.decode(response[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```

"""


def add_adapter(card: str, base: str, *, is_merged: bool) -> str:
    """The README of an exported policy that was trained as an adapter: what the folder holds, and how to load it.

    Args:
        card: The README of the policy.
        base: The name of the model below the adapter.
        is_merged: Whether the folder holds base and adapter as one, or the adapter alone.
    """
    name = _code(public_name(base))
    if is_merged:
        return f"""{card.rstrip()}

Trained as a LoRA adapter on `{name}`. These are the weights of base and adapter together, rounded to their dtype; what
was trained, to the bit, is the adapter, in the folder `adapter/` beside this one.
"""
    header, body = _split(card)
    header["library_name"] = "peft"
    if header.pop("base_model_relation", None) and header["base_model"] == base:
        header["base_model_relation"] = "adapter"
    begin = f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({json.dumps(name)})
model = PeftModel.from_pretrained(base, "adapter")
tokenizer = AutoTokenizer.from_pretrained("adapter")
"""
    own = how_to_use()
    ask = own[own.index("messages = ") :]
    if own not in body:
        body, ask = f"{body.rstrip()}\n\n{own}", "```\n\n"
    body = body.replace(own, f"This folder holds a LoRA adapter, to be loaded on `{name}`:\n\n{begin}{ask}").rstrip()
    return f"{_join(header, body)}\n"


def with_evaluation(card: str, evaluation: Mapping[str, Any]) -> str:
    """A card with the results of ``spin-lightning evaluate`` in its header's index and in a table.

    Those of an earlier evaluation are replaced, and all else stays as it is, also what somebody wrote there.

    Args:
        card: A README, with or without a header.
        evaluation: What ``evaluation.json`` holds.

    Raises:
        ValueError: The header is no YAML.
    """
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    header, body = _split(card)
    name, others = _title_of(body), []
    try:
        if index := header.get("model-index"):
            name, results = model_index_to_eval_results(index)
            others = [result for result in results if result.source_name != _HARNESS]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"its model-index is not as the hub wants it ({error})") from None
    ours = [
        EvalResult(
            task_type=str(header.get("pipeline_tag") or "text-generation"),
            dataset_type=_code(task),
            dataset_name=_code(task),
            dataset_args={"num_few_shot": result["shots"]},
            metric_type=_code(result["metric"]),
            metric_name=_code(result["metric"]),
            metric_value=round(result["value"], 6),
            source_name=_HARNESS,
            source_url=_HARNESS_URL,
        )
        for task, result in evaluation["tasks"].items()
        if math.isfinite(result["value"])
    ]
    if ours or others:
        header["model-index"] = eval_results_to_model_index(name, [*others, *ours])
    table = "\n".join(
        f"| {_text(task)} | {_text(result['metric'])} | {result['shots']} | {result['documents']} | "
        f"{result['value']:.4f} | {'-' if result['stderr'] is None else format(result['stderr'], '.4f')} |"
        for task, result in evaluation["tasks"].items()
    )
    newest = evaluation["versions"].get("lm_eval", "")
    versions = dict.fromkeys(str(result.get("lm_eval", newest)) for result in evaluation["tasks"].values())
    section = f"""{_BEGIN}
## Evaluation

By [{_HARNESS}]({_HARNESS_URL}) {_text(" and ".join(versions))}, {_in_words(evaluation["tasks"])}:

| task | metric | shots | documents | value | standard error |
|---|---|---|---|---|---|
{table}
{_END}"""
    begin, end = body.find(_BEGIN), body.find(_END)
    if 0 <= begin < end:
        body = body[:begin] + section + body[end + len(_END) :]
    else:
        body = f"{body.rstrip()}\n\n{section}\n"
    return _join(header, body)


def _in_words(tasks: Mapping[str, Any]) -> str:
    by_template = {bool(result.get("chat_template")) for result in tasks.values()}
    words = {frozenset({True}): "with the chat template", frozenset({False}): "without the chat template"}
    return words.get(frozenset(by_template), "with the chat template in some")


def _title_of(body: str) -> str:
    found = re.search(r"^# (.+)$", body, re.MULTILINE)
    return _code(found[1]) if found else "model"


def _split(card: str) -> tuple[dict[str, Any], str]:
    """A card's header and what follows it.

    Raises:
        ValueError: The header is no YAML mapping.
    """
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", card, re.DOTALL)
    if found is None:
        return {}, card
    try:
        header = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"its header is no YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no map of names and values")
    return header, card[found.end() :]


def _join(header: Mapping[str, Any], body: str) -> str:
    text = yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n{body}" if header else body


def _read_header(path: Path) -> dict[str, Any]:
    try:
        return _split(path.read_text(encoding="utf-8"))[0]
    except (OSError, ValueError):  # a card is a courtesy: without it nothing is inherited
        return {}


def _download_header(name: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        return _read_header(Path(hf_hub_download(name, "README.md", local_files_only=not hub.is_reachable())))
    except Exception:  # as above, and what a download raises has no end
        return {}


def _inherited(header: Mapping[str, Any]) -> dict[str, Any]:
    """Licence and language of a card, as far as they are words, or lists of them."""

    def is_plain(value: Any) -> bool:
        words = value if isinstance(value, list) else [value]
        return bool(words) and all(isinstance(word, str) and word and printable(word) == word for word in words)

    return {name: header[name] for name in _INHERITED if is_plain(header.get(name))}


def _as_names(value: Any) -> list[str]:
    names = value if isinstance(value, list) else [value]
    return [name for name in names if isinstance(name, str) and is_hub_name(name)]


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


def render_pairs_card(provenance: Mapping[str, Any]) -> str:
    """The card of pairs as a data set on the hub, from what ``spin-lightning pairs`` wrote beside them."""
    from huggingface_hub import DatasetCardData

    header = DatasetCardData(tags=["preference", "dpo", "spin-lightning"], pretty_name="Pairs of self-play")
    made = "\n".join(
        f"| {pairs['iteration']} | `{_code(public_name(str(pairs['opponent'])))}` | "
        f"`{pairs['opponent_sha256'][:16]}` | {pairs['seed']} |"
        for pairs in provenance["pairs"]
    )
    return f"""---
{header.to_yaml()}
---

# Pairs of self-play

{provenance["rows"]} pairs: `chosen` is the real response, `rejected` what the opponent answered to the same `prompt`.
Made by `spin_lightning` {_text(provenance["made_by"])}; `{_code(provenance["file"])}.provenance.json` has sampling,
versions and hashes.

| iteration | opponent | its weights' sha256 | seed |
|---|---|---|---|
{made}
"""


def public_name(name_or_path: str, parts: int = 1) -> str:
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
