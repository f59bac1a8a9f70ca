"""The card of a saved policy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from test_terminal import EVIL, is_harmless

from spin_lightning.models import model_card
from spin_lightning.models.model_card import (
    Origin,
    add_adapter,
    read_origin,
    render_model_card,
    render_plain_card,
    render_reward_card,
    with_evaluation,
)


def card(origin: Origin | None = None, **changes: Any) -> str:
    summary = {
        "iteration": 1, "beta": 0.1, "first_loss": math.log(2), "last_loss": 0.5, "updates": 1556, "val_nll": 12.34567,
        "epoch_metrics": {"rewards/real": 0.25, "rewards/chosen": 0.25, "logps/rejected": 1, "rewards/accuracies": .75},
        "pairs": {"training_pairs": 99584, "training_pairs_dropped": 12},
    }  # fmt: skip
    manifest = {
        "binding": {"sampling": {"temperature": 1.0, "top_p": 1.0}, "opponent_sha256": "0123abcd" * 8, "seed": 7},
        "opponent": "runs/a|b`c", "versions": {"spin_lightning": "9.8.7", "torch": "2"},
    }  # fmt: skip
    return render_model_card({**summary, **changes}, manifest, origin)


def test_model_card_says_what_made_the_model() -> None:
    text = card()
    _, header, body = text.split("---\n", 2)
    assert "base_model" not in header and "license" not in header and "language" not in header  # none is made up
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["spin", "self-play", "spin-lightning"]
    (nll,) = data.eval_results
    assert (nll.metric_type, nll.metric_value) == ("nll", 12.34567)
    assert 'AutoModelForCausalLM.from_pretrained("policy")' in body and "apply_chat_template" in body
    for line in (
        "# Self-play fine-tuned policy, iteration 1",
        "| opponent | `runs/a/b'c` (weights sha256 `0123abcd0123abcd`) |",
        "| pairs | 99584 trained on, 12 identical ones dropped |",
        "| sampling | temperature 1.0, top_p 1.0 |",
        "| seed | 7 |",
        "| beta | 0.1 |",
        "| updates | 1556 |",
        "| loss, first and last step | 0.693147, 0.500000 |",
        "| held-out NLL | 12.3457 nats a response |",
        "| rewards/real | 0.2500 |",
        "| rewards/accuracies | 0.7500 |",
    ):
        assert line in body.splitlines()
    assert "NLL of other rows" not in body and "KL to the start" not in body
    assert "`spin_lightning` 9.8.7" in body
    assert "chosen" not in body and "rejected" not in body  # the same numbers under other names


def test_model_card_of_a_game_that_did_not_measure() -> None:
    lines = card(val_nll=None, first_loss=None, last_loss=None).splitlines()
    assert "| held-out NLL | not measured |" in lines
    assert "| loss, first and last step | -, - |" in lines and "model-index:" not in lines


def test_model_card_says_what_was_forgotten() -> None:
    retention = {"other_nll": 20.5, "kl_to_start": 0.125, "start": {"other_nll": 18.25}}
    lines = card(retention=retention).splitlines()
    held_out = lines.index("| held-out NLL | 12.3457 nats a response |")
    assert lines[held_out + 1 : held_out + 4] == [
        "| NLL of other rows | 20.5000 nats a response, 18.2500 at the start |",
        "| KL to the start | 0.1250 nats a token of the held-out responses |",
        "",
    ]


ORIGIN = Origin("org/base", ("org/rows",), {"license": "apache-2.0", "language": ["en", "no"]})


def test_the_header_names_what_the_hub_knows_and_is_read_back() -> None:
    summary = {"val_nll": 2.5, "dtype": "float32", "stored_dtype": "bfloat16"}
    for text, kind in (
        (card(ORIGIN), "text-generation"),
        (render_plain_card("sft", "Supervised", summary, ORIGIN, {"torch": "2"}), "text-generation"),
        (render_reward_card(summary, ORIGIN), "text-classification"),
    ):
        data = ModelCard(text).data
        assert (data.base_model, data.base_model_relation, data.pipeline_tag) == ("org/base", "finetune", kind)
        assert (data.datasets, data.license, data.language) == (["org/rows"], "apache-2.0", ["en", "no"])
        assert "spin-lightning" in data.tags
    plain = render_plain_card("sft", "Supervised", summary, ORIGIN, {"torch": "2"})
    assert "- val_nll: 2.5\n" in plain and 'Versions: `{"torch": "2"}`' in plain and "policy_bfloat16" in plain
    assert ModelCard(plain).data.eval_results[0].metric_value == 2.5


def test_a_folder_is_asked_for_its_own_card_and_paths_stay_at_home(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nbase_model: org/base\nlicense: other\nlicense_name: mine\nlanguage: en\n"
        "datasets: [org/a, /home/me/b]\n---\n"
    )
    origin = read_origin(str(tmp_path), ["org/c", "/home/me/rows.jsonl", "rows", "org/a"])
    inherited = {"license": "other", "license_name": "mine", "language": "en"}
    assert origin == Origin("org/base", ("org/a", "org/c"), inherited)
    assert read_origin(str(tmp_path / "nowhere/at/all")) == Origin()
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert read_origin(str(tmp_path)) == Origin()  # a card is a courtesy
    (tmp_path / "README.md").unlink()
    assert read_origin(str(tmp_path)) == Origin()


def test_a_licence_on_the_hub_is_inherited_and_none_is_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(name: str, file: str, local_files_only: bool) -> str:
        assert local_files_only and file == "README.md"
        if name != "org/base":
            raise OSError("not in the cache")
        (tmp_path / file).write_text("---\nlicense: mit\n---\n# A base\n")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(model_card.hub, "is_reachable", lambda: False)
    assert read_origin("org/base") == Origin("org/base", (), {"license": "mit"})
    assert read_origin("org/other") == Origin("org/other")


def test_an_adapter_belongs_to_its_base_where_that_is_on_the_hub() -> None:
    data = ModelCard(add_adapter(card(ORIGIN), "org/base", is_merged=False)).data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("peft", "org/base", "adapter")
    text = add_adapter(card(ORIGIN), "/home/me/runs/sft/policy", is_merged=False)
    assert ModelCard(text).data.base_model == "org/base" and "base_model_relation" not in text
    assert "/home/me" not in text and 'from_pretrained("policy")' in text
    assert text.count("apply_chat_template") == 1 and text.count("```python") == 1
    merged = ModelCard(add_adapter(card(ORIGIN), "org/base", is_merged=True))
    assert merged.data.library_name == "transformers" and "Trained as a LoRA adapter on `org/base`" in merged.text


def evaluation(**tasks: Any) -> dict[str, Any]:
    result = {"metric": "acc", "value": 0.25, "stderr": 0.125, "shots": 5, "documents": 12, "chat_template": False}
    return {"tasks": {name: {**result, **task} for name, task in tasks.items()}, "versions": {"lm_eval": "0.4.13"}}


def test_results_stand_in_the_index_and_in_a_table_and_are_replaced() -> None:
    text = with_evaluation(card() + "\nMy own words.\n", evaluation(arc={}, mine={"stderr": None, "value": 1.0}))
    assert "| arc | acc | 5 | 12 | 0.2500 | 0.1250 |\n| mine | acc | 5 | 12 | 1.0000 | - |\n" in text
    data = ModelCard(text).data
    assert [(r.dataset_name, r.metric_value) for r in data.eval_results] == [
        ("held-out rows of its own data", 12.34567),
        ("arc", 0.25),
        ("mine", 1.0),
    ]
    assert data.eval_results[1].dataset_args == {"num_few_shot": 5}
    text = with_evaluation(text, evaluation(arc={"value": 0.5}))
    assert [r.metric_value for r in ModelCard(text).data.eval_results] == [12.34567, 0.5]
    assert text.count("## Evaluation") == 1 and "mine" not in text and "My own words." in text
    assert ModelCard(text).data.tags == ["spin", "self-play", "spin-lightning"]
    text = with_evaluation(text, evaluation(arc={"lm_eval": "0.4.9"}, mine={"lm_eval": "0.4.13"}))
    assert "lm-evaluation-harness) 0.4.9 and 0.4.13, " in text  # each has the one that it was asked by
    bare = with_evaluation("# Somebody's model\n", evaluation(arc={}))
    assert ModelCard(bare).data.model_name == "Somebody's model"
    with pytest.raises(ValueError, match="its header is no YAML"):
        with_evaluation("---\na: [\n---\n", evaluation(arc={}))


def test_the_name_of_a_task_breaks_nothing() -> None:
    name = f"evil`|\n---\ntags: [x]\n<script>{EVIL}"
    text = with_evaluation(card(), evaluation(**{name: {"metric": name}}))
    assert is_harmless(text) and "tags: [x]" not in text.splitlines() and "<script>" not in text.split("---\n")[2]
    assert ModelCard(text).data.tags == ["spin", "self-play", "spin-lightning"]
