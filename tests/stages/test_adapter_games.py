"""Games of adapters: they start at ln 2, leave the base alone, keep little, and continue as if nothing had happened."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from games import CountingGenerator, Do, DoLast, Game, Stopped, pairs_of, read, weight_bits, without_seconds
from helpers import args_of, load, save_tiny_model

from spin_lightning import (
    AlphaSpinLoss,
    ContinuousGenerator,
    LoraAdapter,
    SftLightningModule,
    SpinLightningModule,
    UserError,
    last_checkpoint,
)
from spin_lightning.cli.commands import main
from spin_lightning.models.adapters import adapter_tensors
from spin_lightning.models.saving import weights_hash

peft = pytest.importorskip("peft")

HEAD = ["lm_head"]
#: The settings in which a game is resumed. The first three in every test run, the others with ``-m slow``.
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "float32": ({}, "32-true"),
    "bf16-true, DoRA": ({"use_dora": True}, "bf16-true"),
    "bf16-mixed, saved head and embeddings": (
        {"modules_to_save": [*HEAD, "embed_tokens"], "ensure_weight_tying": True},
        "bf16-mixed",
    ),
    "bf16-true": ({}, "bf16-true"),
    "bf16-mixed": ({}, "bf16-mixed"),
    "DoRA": ({"use_dora": True}, "32-true"),
    "rsLoRA": ({"use_rslora": True}, "32-true"),
    "saved head": ({"modules_to_save": HEAD, "ensure_weight_tying": True}, "32-true"),
    "LoRA on the head": ({"target_modules": ["q_proj", *HEAD]}, "32-true"),
    "saved head and embeddings, bf16-true": (
        {"modules_to_save": [*HEAD, "embed_tokens"], "ensure_weight_tying": True},
        "bf16-true",
    ),
}


def game_of(model: str, rows: str, folder: Path, precision: str = "32-true", **settings: Any) -> Game:
    adapter = settings.pop("adapter", None) or LoraAdapter(r=4)
    module = {"adapter": adapter, **settings.pop("module", {})}
    trainer = {"precision": precision, **settings.pop("trainer", {})}
    data = {"generator": ContinuousGenerator(max_new_tokens=5), **settings.pop("data", {})}
    return Game(model, rows, folder, module=module, trainer=trainer, data=data, **settings)


def first_losses(game: Game) -> list[float]:
    losses = game.losses
    return [losses[0], losses[4]]  # two epochs of two batches


@pytest.fixture(scope="module")
def played(model: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Game, Path]:
    """One whole game in float32, for the tests that only look at what it left behind."""
    folder = tmp_path_factory.mktemp("played") / "run"
    return game_of(model, rows, folder).play(), folder


def test_each_iteration_starts_at_ln_2_and_learns(played: tuple[Game, Path]) -> None:
    game, _ = played
    assert first_losses(game) == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert game.losses[3] < 0.3 and game.losses[-1] < 0.3


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_in_bfloat16_too(precision: str, model: str, rows: str, tmp_path: Path) -> None:
    game = game_of(model, rows, tmp_path / "run", precision).play()
    assert first_losses(game) == pytest.approx([math.log(2)] * 2, abs=0.05)
    base = load(model, next(game.module.policy.parameters()).dtype)
    assert weights_hash(game.module.policy.unload()) == weights_hash(base)


def test_the_base_is_the_same_to_the_bit_after_a_game(played: tuple[Game, Path], model: str) -> None:
    policy, base = played[0].module.policy, load(model).state_dict()
    found = {name.replace(".base_layer", ""): tensor for name, tensor in policy.get_base_model().state_dict().items()}
    assert base.keys() <= found.keys()
    assert all(torch.equal(base[name], found[name]) for name in base)


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(played: tuple[Game, Path], model: str) -> None:
    game, folder = played
    path = last_checkpoint(folder)
    assert path is not None
    checkpoint = torch.load(path, weights_only=True)
    trained = {name for name, weight in game.module.policy.named_parameters() if weight.requires_grad}
    held = {name: tensor for name, tensor in checkpoint["state_dict"].items() if not name.startswith("metrics.")}
    assert held.keys() == {f"policy.{name}" for name in trained}
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(trained) == 28
    count = sum(tensor.numel() for tensor in held.values())
    assert count * 3 * 4 < Path(path).stat().st_size < count * 3 * 4 + 60_000  # whatever else a checkpoint has
    assert checkpoint["adapter"]["base_sha256"] == weights_hash(load(model))


def test_room_is_asked_for_what_is_kept(model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spin_lightning.runs import run_checkpoint
    from spin_lightning.stages import iteration

    asked: dict[str, int] = {}
    for module in (run_checkpoint, iteration):
        monkeypatch.setattr(module, "need_space", lambda folder, size, what: asked.setdefault(what, size))
    for merged in (True, False):
        asked.clear()
        stop = Do(on_generation_end=lambda *args: (_ for _ in ()).throw(Stopped()))
        adapter = LoraAdapter(r=4, merged=merged)
        game = game_of(model, rows, tmp_path / str(merged), adapter=adapter, callbacks=[stop])
        with pytest.raises(Stopped):
            game.play()
        weights = list(game.module.policy.parameters())
        trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        assert 0 < asked["keeping 2 checkpoints"] - 3 * trained * (4 + 8) < 1000  # metrics
        whole = sum(weight.nbytes for weight in weights)
        pairs = asked["iteration 0"] - (whole if merged else 4 * trained)
        assert 0 < pairs < 200_000


def test_an_iteration_exports_its_adapter_and_a_merged_model(played: tuple[Game, Path], model: str) -> None:
    game, folder = played
    adapter, policy = folder / "iteration_1/adapter", folder / "iteration_1/policy"
    ids = torch.tensor([[50, 61, 52, 70]])
    own = game.module.policy.eval()
    reloaded = peft.PeftModel.from_pretrained(load(model), adapter).eval()
    with torch.no_grad():
        expected = own(input_ids=ids).logits
        assert torch.allclose(reloaded(input_ids=ids).logits, expected, atol=1e-5)
        merged = load(policy).eval()(input_ids=ids).logits
        assert torch.allclose(merged, expected, atol=1e-5 * float(expected.abs().max()))
        assert not torch.allclose(load(model)(input_ids=ids).logits, expected, atol=0.1)
    own.train()
    card, merged_card = ((place / "README.md").read_text() for place in (adapter, policy))
    assert "library_name: peft" in card and 'PeftModel.from_pretrained(base, "adapter")' in card
    assert "base_model" not in card and str(Path(model).parent) not in card  # its base is a folder here
    assert "library_name: transformers" in merged_card and "Trained as a LoRA adapter on" in merged_card
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4


def test_without_merged_models_the_game_is_the_same(
    played: tuple[Game, Path], model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    game = game_of(model, rows, tmp_path / "run", adapter=LoraAdapter(r=4, merged=False)).play()
    assert game.losses == played[0].losses and game.weights == played[0].weights
    assert not list((tmp_path / "run").glob("iteration_*/policy"))
    for k in range(2):
        name = f"iteration_{k}/adapter/adapter_model.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (played[1] / name).read_bytes()
    assert "iteration_*/adapter" in capsys.readouterr().out


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if i > 2 else []) for i, name in enumerate(SETTINGS)]
)
def test_a_resumed_game_repeats_losses_and_weights_to_the_bit(name: str, model: str, rows: str, tmp_path: Path) -> None:
    settings, precision = SETTINGS[name]
    kept: list[int] = []
    if name == "LoRA on the head":
        model = save_tiny_model(tmp_path / "untied", tie_word_embeddings=False)

    def keep(trainer: Any, *args: Any) -> None:
        if trainer.global_step in (3, 8, 11) and trainer.global_step not in kept:
            kept.append(trainer.global_step)
            shutil.copytree(tmp_path / "run", tmp_path / f"at_{trainer.global_step}")

    def play(folder: Path, **more: Any) -> Game:
        return game_of(model, rows, folder, precision, adapter=LoraAdapter(r=4, **settings), **more).play()

    whole = play(tmp_path / "run", last=[DoLast(on_train_batch_end=keep)])
    assert kept == [3, 8, 11]
    assert first_losses(whole) == pytest.approx([math.log(2)] * 2, abs=1e-5 if precision == "32-true" else 0.1)
    for step in kept:
        folder = tmp_path / f"at_{step}"
        game = play(folder)
        assert 0 < len(game.losses) < len(whole.losses)
        assert game.losses == whole.losses[-len(game.losses) :]
        assert game.weights == whole.weights
        for file in ("iteration_1/adapter/adapter_model.safetensors", "iteration_1/policy/model.safetensors"):
            assert (folder / file).read_bytes() == (tmp_path / "run" / file).read_bytes()
        assert without_seconds(read(folder / "game.json")) == without_seconds(read(tmp_path / "run" / "game.json"))


def test_a_game_killed_in_its_first_generation_draws_the_same_adapter(model: str, rows: str, tmp_path: Path) -> None:
    def play(folder: Path, breaks_after: int | None = None) -> Game:
        generator = CountingGenerator(max_new_tokens=5)
        generator.breaks_after = breaks_after
        torch.manual_seed(len(str(folder)) + (breaks_after or 0))  # which must not count
        return game_of(model, rows, folder, "bf16-true", data={"generator": generator}).play()

    whole = play(tmp_path / "whole")
    with pytest.raises(Stopped):
        play(tmp_path / "run", breaks_after=6)
    assert len(list((tmp_path / "run/iteration_0/pairs").glob("*.parquet"))) == 1
    again = play(tmp_path / "run")
    assert again.data.generator.answered < whole.data.generator.answered
    assert again.losses == whole.losses and again.weights == whole.weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": LoraAdapter(r=8)}, r"another adapter than this command gives:\n  model\.adapter\.r: 4 -> 8"),
        (
            {"adapter": LoraAdapter(r=4, merged=False)},
            r"model\.adapter: \{.*'\.merged': True.*-> \{.*'\.merged': False",
        ),
        ({"module": {"adapter": None}}, r"began with an adapter \(model\.adapter\), and this command gives none"),
    ],
)
def test_another_adapter_is_refused_at_a_resume(
    change: dict[str, Any], message: str, model: str, rows: str, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        game_of(model, rows, tmp_path / "run", last=[stop_at(3)]).play()
    with pytest.raises(UserError, match=message):
        game_of(model, rows, tmp_path / "run", **change).play()


def test_an_adapter_where_there_was_none_or_another_base_is_refused(model: str, rows: str, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        Game(model, rows, tmp_path / "full", last=[stop_at(3)]).play()
    with pytest.raises(UserError, match=r"began with no adapter \(model\.adapter\), and this command gives one"):
        game_of(model, rows, tmp_path / "full").play()
    own = shutil.copytree(model, tmp_path / "model")
    with pytest.raises(Stopped):
        game_of(str(own), rows, tmp_path / "run", last=[stop_at(3)]).play()
    save_tiny_model(own, seed=4)
    with pytest.raises(UserError, match=r"holds an adapter only, and .*model does not hold the weights that it was"):
        game_of(str(own), rows, tmp_path / "run").play()


def stop_at(step: int) -> DoLast:
    def stop(trainer: Any, *args: Any) -> None:
        if trainer.global_step == step:
            raise Stopped

    return DoLast(on_train_batch_end=stop)


# --- chains, and other ways in ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(model: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of supervised fine-tuning with an adapter, from the command line."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    flags = ["--model.adapter=LoraAdapter", "--model.adapter.r=4", "--model.adapter.target_modules=[q_proj,v_proj]"]
    flags += ["--model.learning_rate=0.02", "--data.max_response_tokens=5", "--data.batch_size=4"]
    main(args_of("sft", model, rows, folder, *flags, *COMMON))
    return folder


COMMON = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.max_epochs=2"]


def test_sft_trains_and_exports_an_adapter(tuned: Path, model: str) -> None:
    assert sorted(path.name for path in tuned.iterdir() if path.is_dir()) == [
        "adapter", "checkpoints", "logs", "policy", "tensorboard",
    ]  # fmt: skip
    config = json.loads((tuned / "adapter/adapter_config.json").read_text())
    assert (config["r"], sorted(config["target_modules"])) == (4, ["q_proj", "v_proj"])
    assert read(tuned / "run.json")["settings"]["model.adapter"][".target_modules"] == ["q_proj", "v_proj"]
    summary = read(tuned / "summary.json")
    assert summary["last_loss"] < summary["first_loss"]


def test_self_play_goes_on_with_the_adapter_of_sft_against_base_and_adapter(
    tuned: Path, model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The opponent is what SFT made, not the bare base; and what is trained is its adapter, not a second one."""
    start: dict[str, Any] = {}

    def look(trainer: Any, module: Any, number: int, store: Any, report: Any) -> None:
        if number == 0:
            start.update({name: tensor.clone() for name, tensor in adapter_tensors(module.policy).items()})

    adapter = LoraAdapter(path=str(tuned / "adapter"))
    game = game_of(model, rows, tmp_path / "run", adapter=adapter, callbacks=[Do(on_generation_end=look)]).play()
    tuned_policy = peft.PeftModel.from_pretrained(load(model), tuned / "adapter")
    kept = adapter_tensors(tuned_policy)
    assert start.keys() == kept.keys() and all(torch.equal(start[name], kept[name]) for name in kept)
    assert any(float(tensor.abs().max()) > 0 for name, tensor in kept.items() if "lora_B" in name)
    assert first_losses(game) == pytest.approx([math.log(2)] * 2, abs=1e-5)
    base, sft = Path(model).name, f"{tuned.name}/adapter"  # of a path a card has the end only
    for kind in ("policy", "adapter"):
        card = (tmp_path / "run" / "iteration_0" / kind / "README.md").read_text()
        assert f"| opponent | `{base}` with the adapter `{sft}` (weights sha256" in card
        card = (tmp_path / "run" / "iteration_1" / kind / "README.md").read_text()
        assert "| opponent | `iteration_0/policy` (weights sha256" in card
    folder = tmp_path / "run"
    said = capsys.readouterr().out.splitlines()
    assert said[-1].endswith(f"Models: {folder}/iteration_*/policy and {folder}/iteration_*/adapter")
    # stored log-probs of the opponent are those of the merged model that SFT exported
    by_base, by_tuned = load(model).eval(), load(tuned / "policy").eval()
    for pair in pairs_of(tmp_path / "run", 0)[:3]:
        ids = torch.tensor([pair["prompt_ids"] + pair["real_ids"]])

        def log_prob(policy: Any, ids: torch.Tensor = ids, pair: dict[str, Any] = pair) -> float:
            with torch.no_grad():
                logits = policy(input_ids=ids).logits[0, len(pair["prompt_ids"]) - 1 : -1].log_softmax(-1)
            return float(logits.gather(1, torch.tensor(pair["real_ids"])[:, None]).sum())

        assert pair["opponent_real_log_prob"] == pytest.approx(log_prob(by_tuned), abs=1e-3)
        assert abs(pair["opponent_real_log_prob"] - log_prob(by_base)) > 0.1
    final = read(tmp_path / "run/game.json")
    assert final["iterations"][0]["val_nll"] is not None
    base = weight_bits(load(model))
    assert weight_bits(game.module.policy.unload()) == base


def test_validate_takes_an_adapter(tuned: Path, model: str, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(*flags: str) -> float:
        args = [
            "validate",
            f"--model.model_name_or_path={model}",
            f"--data.train_data={rows}",
            f"--data.val_data={rows}",
        ]
        main([*args, "--trainer.logger=false", *COMMON[:2], *flags])
        printed = capsys.readouterr().out
        return float(next(line for line in printed.splitlines() if "val/nll " in line).split()[-2])

    assert measure("--model.adapter=LoraAdapter") == measure()  # B is 0
    path = f"--model.adapter.path={tuned / 'adapter'}"
    assert measure("--model.adapter=LoraAdapter", path) < measure() - 1


def test_a_loss_that_needs_the_first_opponent_gets_base_and_first_adapter(
    tuned: Path, model: str, rows: str, tmp_path: Path
) -> None:
    for number, adapter in enumerate((LoraAdapter(r=4), LoraAdapter(path=str(tuned / "adapter")))):
        module = {"loss": AlphaSpinLoss(0.5)}
        game = game_of(model, rows, tmp_path / str(number), "bf16-true", adapter=adapter, module=module).play()
        first, second = (pairs_of(tmp_path / str(number), k) for k in range(2))
        assert [pair["initial_real_log_prob"] for pair in first] == [pair["opponent_real_log_prob"] for pair in first]
        assert any(pair["initial_real_log_prob"] != pair["opponent_real_log_prob"] for pair in second)
        assert len(game.losses) == 12


def test_a_model_object_gets_an_adapter_too(played: tuple[Game, Path], model: str, rows: str, tmp_path: Path) -> None:
    given = load(model)
    game = game_of(given, rows, tmp_path / "run", data={"tokenizer_name_or_path": model}).play()  # type: ignore[arg-type]
    assert game.losses == played[0].losses
    with pytest.raises(UserError, match=r"got PeftModel\w*\. Of a model with an adapter give the base, and adapter="):
        SpinLightningModule(game.module.policy)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_resident_opponent_is_refused_with_the_way_out(model: str) -> None:
    with pytest.raises(
        UserError, match=r"model\.opponent ResidentOpponent holds a copy .*Leave model\.opponent at stored"
    ):
        SpinLightningModule(model, opponent="resident", adapter=LoraAdapter())


def test_dropout_of_an_adapter_needs_that_of_the_model(model: str) -> None:
    with pytest.raises(UserError, match=r"model\.adapter\.dropout 0\.1 needs model\.dropout: true"):
        SftLightningModule(model, adapter=LoraAdapter(dropout=0.1))
    module = SftLightningModule(model, adapter=LoraAdapter(dropout=0.1), dropout=True)
    module.configure_model()
    assert {part.p for part in module.policy.modules() if isinstance(part, torch.nn.Dropout)} == {0.1}


def test_masters_are_kept_where_any_trained_weight_is_in_16_bits(model: str) -> None:
    from spin_lightning.stages.optim import Float32Master

    module = SftLightningModule(model, adapter=LoraAdapter(r=4, modules_to_save=["model.norm"]))
    module.configure_model()
    module._lr_factor = lambda step: 1.0  # type: ignore[method-assign]  # which asks the trainer
    made = module.configure_optimizers()["optimizer"]
    assert not isinstance(made, Float32Master)
    last = [weight for weight in module.policy.parameters() if weight.requires_grad][-1]
    last.data = last.data.bfloat16()
    made = module.configure_optimizers()["optimizer"]
    assert isinstance(made, Float32Master)
    assert [weight.dtype for weight in made.master_weights] == [torch.float32] * 29


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.adapter=LoraAdapter", "--model.adapter.r=0"], "model.adapter.r must be at least 1, got 0"),
        (["--model.adapter=LoraAdapter", "--model.adapter.rank=4"], "rank"),
        (["--model.adapter=LoraAdapter", "--model.adapter.path=/no/where"], "is no folder of an adapter"),
        (["--model.adapter=LoraAdapter", "--model.opponent=resident"], "Leave model.opponent at stored"),
    ],
)
def test_the_command_line_refuses_in_a_sentence(
    flags: Sequence[str], words: str, model: str, rows: str, tmp_path: Path, refusal: Callable[[Sequence[str]], str]
) -> None:
    assert words in refusal(args_of("fit", model, rows, tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()
