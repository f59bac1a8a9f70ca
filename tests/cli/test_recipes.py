"""Every recipe is a game that parses, and a plan says that it fits the machine in its name."""

from __future__ import annotations

import pytest
import yaml
from lightning import Trainer
from transformers import MistralConfig, Qwen2Config

from spin_lightning.cli import plan
from spin_lightning.cli.commands import config_folder
from spin_lightning.runs.processes import refuse_strategy

RECIPES = config_folder() / "recipes"
ZEPHYR = MistralConfig(vocab_size=32000, sliding_window=None)  # the class's own defaults are Mistral-7B's
QWEN = Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
)
#: What each goes over, its model, and the memory of each device.
USES = {
    "lora_24gb": (["one_gpu_1.5b"], QWEN, "24GiB"),
    "qlora_24gb": (["paper"], ZEPHYR, "24GiB"),
    "full_80gb": (["one_gpu_1.5b"], QWEN, "80GiB"),
    "paper_8x80gb": (["paper"], ZEPHYR, "80GiB"),
    "two_nodes": (["paper", "recipes/paper_8x80gb"], ZEPHYR, "80GiB"),
}
LENGTHS = ["--rows=50000", "--prompt-tokens=180", "--response-tokens=240"]


@pytest.fixture
def planned(tmp_path):
    """The plan of some configs, one over the other, on a model of which there is a config and nothing else."""

    def plan_of(configs, model, *flags):
        model.save_pretrained(tmp_path / "model")
        args = []
        for name in configs:
            settings = yaml.safe_load((config_folder() / f"{name}.yaml").read_text())
            path = tmp_path / f"{len(args)}.yaml"
            path.write_text(yaml.safe_dump(settings))
            args.append(f"--config={path}")
        name = f"--model.model_name_or_path={tmp_path / 'model'}"
        options, rest = plan.take_options([*args, name, "--data.train_data=rows.jsonl", *LENGTHS, *flags])
        return plan.make_plan(options, rest)

    return plan_of


@pytest.mark.parametrize("recipe", USES)
def test_a_recipe_has_a_strategy_that_is_played(recipe):
    settings = [yaml.safe_load((config_folder() / f"{name}.yaml").read_text()) for name in USES[recipe][0]]
    settings.append(yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text()))
    strategies = [part["trainer"]["strategy"] for part in settings if "strategy" in part.get("trainer", {})]
    refuse_strategy(Trainer(strategy=(strategies or ["auto"])[-1], accelerator="cpu", devices=1, logger=False))


def test_every_recipe_is_planned_here():
    assert {path.stem for path in RECIPES.iterdir()} == USES.keys()


@pytest.mark.parametrize("recipe", USES)
def test_a_recipe_fits_the_machine_in_its_name(recipe, planned):
    base, model, memory = USES[recipe]
    made = planned([*base, f"recipes/{recipe}"], model, f"--memory={memory}")
    for parts in made["memory"].values():
        assert 0.1 * made["devices"]["memory"] < sum(parts.values()) <= made["devices"]["usable"]
    assert made["updates"]["pairs"] == 64  # the paper's
    assert [entry for entry in made["advice"] if entry["what"] != "disk"] == []


def test_all_weights_of_7b_fit_no_card_alone_and_eight_that_share_them(planned):
    alone = planned(["paper"], ZEPHYR, "--memory=80GiB")
    shared = planned(["paper", "recipes/paper_8x80gb"], ZEPHYR, "--memory=80GiB")
    assert alone["model"]["weights"] == 7_241_732_096
    assert sum(alone["memory"]["training"].values()) > alone["devices"]["usable"]
    # bfloat16 weights and gradients, float32 masters, and RMSProp's one moment
    states = [
        sum(made["memory"]["training"][part] for part in ("weights", "gradients", "optimiser"))
        for made in (alone, shared)
    ]
    assert states[0] == 12 * 7_241_732_096
    assert states[1] == pytest.approx(states[0] / 8)
    fitting = {entry["setting"] for entry in alone["advice"] if entry["what"] == "training" and entry["fits"]}
    assert {"model.adapter: LoraAdapter, r 16", "trainer.strategy: fsdp2 on 8 devices"} <= fitting


def test_two_nodes_play_the_game_of_one(planned):
    base, model, memory = USES["two_nodes"]
    one = planned([*base], model, f"--memory={memory}")
    two = planned([*base, "recipes/two_nodes"], model, f"--memory={memory}")
    assert (one["devices"]["count"], two["devices"]["count"]) == (8, 16)
    assert one["updates"]["per_iteration"] == two["updates"]["per_iteration"]
