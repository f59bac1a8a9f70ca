"""What a GPU computes is what a CPU computes. Skipped where there is none; `make gpu` runs them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from games import CountingGenerator, Do, Game, Stopped, answers_of, pairs_of
from helpers import save_tiny_model, tiny_model
from lightning.fabric.utilities.apply_func import move_data_to_device
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from spin_lightning import ContinuousGenerator, TransformersGenerator
from spin_lightning.models import compiled_layers
from spin_lightning.models.batches import pack
from spin_lightning.models.forward_paths import forward_path_of, is_shared
from spin_lightning.models.fused_layers import Fused
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.types import ResponseBatch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

#: FlexAttention wants heads of 16 numbers at least.
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ALL: dict[str, Any] = {"vocab_size": 264, "num_hidden_layers": 2, "pad_token_id": None, **SHAPE}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_model(**SHAPE),
    "llama, head 64": lambda: tiny_model(**{**SHAPE, "head_dim": 64}),
    "llama, three heads on one": lambda: tiny_model(
        hidden_size=48, intermediate_size=96, num_attention_heads=3, num_key_value_heads=1
    ),
    "mistral, window": lambda: MistralForCausalLM(MistralConfig(**ALL, sliding_window=16)),
    "gemma2, window and soft-cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**ALL, sliding_window=16, attn_implementation="eager")
    ),
}


@pytest.fixture(autouse=True)
def _compile_anew() -> None:
    """A run has one model; many in one process make torch compile for any number of heads."""
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"), **SHAPE)


def _make_batch(seed: int = 0) -> ResponseBatch:
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 250, (count,), generator=generator).tolist()

    shapes = [(40, (30, 25, 1)), (0, (12,)), (150, (60, 170)), (1, (33, 0, 5)), (17, (9,))]
    return pack([(ids(prompt), [ids(length) for length in lengths]) for prompt, lengths in shapes])


def _score(model: PreTrainedModel, batch: ResponseBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs, and gradients of the sum of their squares in thousands."""
    log_probs = response_log_probs(model, batch)
    (log_probs / 1000).square().sum().backward()
    gradients = {
        name: weight.grad.double().cpu() for name, weight in model.named_parameters() if weight.grad is not None
    }
    return log_probs.detach().double().cpu(), gradients


def _relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - grad).norm() / grad.norm()) for name, grad in expected.items())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("dtype", "per_token", "of_gradient"), [(torch.float32, 1e-4, 1e-3), (torch.bfloat16, 0.05, 0.1)]
)
def test_log_probs_and_gradients_are_those_of_a_cpu(
    name: str, dtype: torch.dtype, per_token: float, of_gradient: float, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    batch = _make_batch()
    expected, expected_gradients = _score(copy.deepcopy(model).double(), batch)
    model = model.to("cuda", dtype)
    found, gradients = _score(model, move_data_to_device(batch, torch.device("cuda")))
    assert is_shared(forward_path_of(model)), capsys.readouterr().out
    assert ((found - expected).abs() / batch.response_lengths.clamp_min(1)).max() < per_token
    assert _relative(gradients, expected_gradients) < of_gradient


def test_layers_are_compiled_and_generation_leaves_them_alone() -> None:
    model = tiny_model(**SHAPE).eval().cuda()
    prompts = [[5, 6, 7], [8, 9]]

    def respond() -> list[list[int]]:
        return [r.ids for r in answers_of(TransformersGenerator(max_new_tokens=8), model, prompts, range(2), 2)]

    plain = respond()
    assert is_shared(forward_path_of(model))
    assert sum(isinstance(module, Fused) for module in model.modules()) == 2
    assert respond() == plain


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_cannot_be_compiled_stay_as_they_come(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(own: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiled_layers, "_compile", fail)
    torch.manual_seed(0)
    model, batch = MODELS[name]().eval(), _make_batch()
    expected, expected_gradients = _score(copy.deepcopy(model).double(), batch)
    found, gradients = _score(model.cuda(), move_data_to_device(batch, torch.device("cuda")))
    assert is_shared(forward_path_of(model))
    assert "cannot have its layers compiled (RuntimeError: no compiler)" in capsys.readouterr().out
    assert ((found - expected).abs() / batch.response_lengths.clamp_min(1)).max() < 1e-4
    assert _relative(gradients, expected_gradients) < 1e-3


def test_passes_of_other_lengths_need_no_new_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    from torch._dynamo.utils import counters

    model = tiny_model(**SHAPE).cuda()
    compiled = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 90, (6, 3), generator=generator).tolist()
        batch = pack([([7] * prompt, [[8] * first, [9] * second]) for prompt, first, second in lengths])
        response_log_probs(model, move_data_to_device(batch, torch.device("cuda"))).sum().backward()
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[-1] == compiled[3], compiled


def test_the_same_pass_twice_gives_the_same_bits() -> None:
    model = tiny_model(**{**SHAPE, "head_dim": 64}).cuda()
    batch = move_data_to_device(_make_batch(), torch.device("cuda"))
    runs = []
    for _ in range(4):
        model.zero_grad()
        runs.append(_score(model, batch))
    assert all(torch.equal(log_probs, runs[0][0]) for log_probs, _ in runs)
    different = {name for _, grads in runs for name, grad in grads.items() if not torch.equal(grad, runs[0][1][name])}
    assert not different


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("generator", [ContinuousGenerator, TransformersGenerator])
def test_a_game_begins_at_ln_2_and_continues_bit_for_bit(
    precision: str, generator: type, model: str, rows: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "trainer": {"accelerator": "gpu", "devices": 1, "precision": precision},
        "module": {"learning_rate": 1e-3},
    }

    def make(folder: str, **more: Any) -> Game:
        return Game(model, rows, tmp_path / folder, data={"generator": generator(max_new_tokens=5)}, **settings, **more)

    undisturbed = make("undisturbed").play()
    epochs = [epoch for epoch, _ in undisturbed.recorder.pairs]
    second = epochs.index(2)
    firsts = [undisturbed.losses[0], undisturbed.losses[second]]
    tolerance = 1e-4 if precision == "32-true" else 0.02
    assert firsts == pytest.approx([math.log(2)] * 2, abs=tolerance)

    def stop(trainer: Any, *args: Any) -> None:
        if trainer.global_step == second + 1:
            raise Stopped

    with pytest.raises(Stopped):
        make("killed", callbacks=[Do(on_train_batch_start=stop)]).play()
    continued = make("killed").play()
    for iteration in range(2):
        assert pairs_of(tmp_path / "killed", iteration) == pairs_of(tmp_path / "undisturbed", iteration)
    own = undisturbed.module.policy.cpu().state_dict()
    other = continued.module.policy.cpu().state_dict()
    differences = {name: float((own[name] - other[name]).abs().max()) for name in own}
    assert not any(differences.values()), differences


def test_answers_are_those_of_a_cpu(model: str) -> None:
    prompts = [[5 + i, 9, 20 + i, 7] + [30 + i] * (3 * i) for i in range(9)]
    loaded = tiny_model(vocab_size=264, **SHAPE).eval()
    expected = [r.ids for r in answers_of(TransformersGenerator(max_new_tokens=12), loaded, prompts, range(9), 2)]
    loaded.cuda()
    for generator in (TransformersGenerator(max_new_tokens=12), ContinuousGenerator(max_new_tokens=12, batch_size=4)):
        assert [r.ids for r in answers_of(generator, loaded, prompts, range(9), 2)] == expected


def test_fewer_prompts_are_asked_where_memory_runs_out(model: str, rows: str, tmp_path: Path) -> None:
    class Hungry(CountingGenerator):
        def generate(self, prompts: Any, *args: Any) -> Any:
            if len(prompts) > 2:
                torch.empty(10**13, dtype=torch.uint8, device="cuda")
            return super().generate(prompts, *args)

    game = Game(
        model,
        rows,
        tmp_path / "run",
        data={"generator": Hungry(max_new_tokens=5)},
        trainer={"accelerator": "gpu", "devices": 1},
    ).play()
    assert game.losses[0] == pytest.approx(math.log(2), abs=1e-4)
