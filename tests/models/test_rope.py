"""Models whose positions change with the length of a pass: a sequence has the numbers and the response it has alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from games import Game, answers_of
from helpers import byte_tokenizer, write_rows
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from spin_lightning.generation import ContinuousGenerator, TransformersGenerator
from spin_lightning.models import rope
from spin_lightning.models.batches import pack
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.types import UserError

SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def longrope(length: int = 40) -> PreTrainedModel:
    scaling = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1, 4, 16, 64]}
    return made(
        Phi3ForCausalLM,
        Phi3Config(
            **SHAPE,
            max_position_embeddings=512,
            original_max_position_embeddings=length,
            rope_parameters={**scaling, "original_max_position_embeddings": length, "factor": 512 / length},
        ),
    )


def dynamic(length: int = 40) -> PreTrainedModel:
    rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
    return made(LlamaForCausalLM, LlamaConfig(**SHAPE, max_position_embeddings=length, rope_parameters=rope_parameters))


def made(kind: Callable[..., PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model


IDS = [(7919 * place + 13) % 260 for place in range(400)]
#: Sequences of 12 + 18 tokens, 100 + 20, 12 + 60, 36 + 4 (the last length before the boundary), 36 + 5 and 100 + 3.
GROUPS = [
    (IDS[:12], [IDS[12:30], IDS[130:190]]),
    (IDS[30:130], [IDS[130:150], IDS[200:203]]),
    (IDS[150:186], [IDS[186:190], IDS[186:191]]),
]


def alone(model: PreTrainedModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    """By a model that nothing else has passed through."""
    logits = copy.deepcopy(model)(torch.tensor([prompt + response]), use_cache=False).logits[0].log_softmax(-1)
    return logits[range(len(prompt) - 1, len(prompt) + len(response) - 1), response].sum()


@pytest.mark.parametrize("make", [longrope, dynamic])
def test_log_probs_and_gradients_are_those_of_each_sequence_alone(make: Callable[[], PreTrainedModel]) -> None:
    model, fresh = make(), make()
    found = response_log_probs(model, pack(GROUPS))
    expected = torch.stack([alone(fresh, prompt, response) for prompt, responses in GROUPS for response in responses])
    assert (found - expected).abs().max() < 2e-4
    assert (response_log_probs(model, pack(GROUPS[:1])) - expected[:2]).abs().max() < 2e-4  # and afterwards
    assert (response_log_probs(model, pack(GROUPS[2:])) - expected[4:]).abs().max() < 2e-4
    (gradient,) = torch.autograd.grad(found @ torch.arange(1.0, 7.0), model.lm_head.weight)
    (beside,) = torch.autograd.grad(
        response_log_probs(fresh, pack(GROUPS)) @ torch.arange(1.0, 7.0), fresh.lm_head.weight
    )
    assert torch.equal(gradient, beside) and gradient.norm() > 1
    # a test of something: in one pass the short sequences would have other numbers
    rope._boundaries[model] = None
    assert (response_log_probs(model, pack(GROUPS)) - expected).abs().max() > 0.1


def test_boundary_is_found_by_asking_the_model() -> None:
    found = rope.boundary_of(longrope(48))
    assert found is not None and (found.lengths, found.every_length_from, found.kind) == ((48,), None, "longrope")
    found = rope.boundary_of(dynamic(37))
    assert found is not None and (found.lengths, found.every_length_from, found.kind) == ((37,), 37, "dynamic")
    plain = LlamaConfig(**SHAPE, max_position_embeddings=64)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    for config in (plain, LlamaConfig(**SHAPE, max_position_embeddings=64, rope_parameters=yarn)):
        assert rope.boundary_of(LlamaForCausalLM(config)) is None


def test_boundary_of_one_kind_of_layers_is_one_of_the_model() -> None:
    by_layer = {
        "full_attention": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **SHAPE, head_dim=8, max_position_embeddings=50, layer_types=layers, rope_parameters=by_layer, sliding_window=4
    )
    found = rope.boundary_of(Gemma3ForCausalLM(config))
    assert found is not None and (found.lengths, found.kind) == ((50,), "dynamic")


class AsksOtherwise(nn.Module):
    """A rotary module with a signature of its own, as code that comes with a model may have."""

    def forward(self, x: torch.Tensor, seq_len: int) -> None:
        raise AssertionError


def test_boundary_is_read_from_the_config_where_the_model_cannot_be_asked() -> None:
    for make, exact in ((longrope, None), (dynamic, 40)):
        model = make()
        AsksOtherwise.__name__ = "SomeRotaryEmbedding"
        model.model.rotary_emb = AsksOtherwise()
        found = rope.boundary_of(model)
        assert found is not None and (found.lengths, found.every_length_from) == ((40,), exact)


def test_which_lengths_may_share_a_pass_and_which_answers_may_cross() -> None:
    two_sides = rope.Boundary((40,), None, "longrope", ())
    assert len({two_sides.side(length) for length in (1, 39, 40)}) == 1 == len({two_sides.side(n) for n in (41, 900)})
    assert two_sides.side(40) != two_sides.side(41)
    # a prompt of 28 tokens and 12 new ones are 40; one of 42 is read, but for its last token, in a pass of 41
    crossing = [length for length in range(1, 100) if two_sides.crossing(length, 12)]
    assert crossing == list(range(29, 42))
    each_its_own = rope.Boundary((40,), 40, "dynamic", ())
    assert len({each_its_own.side(length) for length in (1, 40, 41, 42, 900)}) == 4
    assert [length for length in range(1, 100) if each_its_own.crossing(length, 12)] == list(range(29, 100))
    assert (two_sides.limit(7), two_sides.limit(40)) == (40, 40) and two_sides.limit(41) > 10**9


@pytest.mark.parametrize("kind", [ContinuousGenerator, TransformersGenerator])
def test_answers_are_those_given_alone(kind: type[TransformersGenerator]) -> None:
    """On either side, and at the last length of the shorter one."""
    prompts = [IDS[:12], IDS[30:130], IDS[150:178], IDS[200:242], IDS[300:305]]

    def answers(model: nn.Module, batch_size: int) -> list[tuple[list[int], float]]:
        generator = kind(max_new_tokens=12, batch_size=batch_size)
        return [(found.ids, found.log_prob) for found in answers_of(generator, model, prompts, range(5), 256)]

    model = longrope()
    found = answers(model, 5)
    assert [ids for ids, _ in found] == [ids for ids, _ in answers(longrope(), 1)]
    for prompt, (ids, log_prob) in zip(prompts, found, strict=True):
        assert log_prob == pytest.approx(alone(model, prompt, ids).item(), abs=1e-3)
        assert log_prob == pytest.approx(response_log_probs(model, pack([(prompt, [ids])])).item(), abs=1e-3)


@pytest.mark.parametrize("kind", [ContinuousGenerator, TransformersGenerator])
def test_an_answer_that_could_cross_is_refused_before_the_first_token(kind: type[TransformersGenerator]) -> None:
    model = dynamic()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(
        UserError,
        match=r"LlamaForCausalLM has a RoPE of type 'dynamic': beyond 40 tokens .* 1 of 2 prompts could cross it with "
        r"their responses: the longest needs 41 tokens \(29 and 12 new ones\)\. Lower data\.max_prompt_tokens or "
        r"data\.generator\.max_new_tokens so that both fit into 40 tokens\.",
    ):
        answers_of(kind(max_new_tokens=12), model, [IDS[:28], IDS[:29]], [0, 1], 256)


def test_a_game_whose_answers_could_cross_ends_before_it_asks_its_generator(tmp_path: Path) -> None:
    longrope(27).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    game = Game(
        str(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl"), tmp_path / "run", data={"val_fraction": 0}
    )
    game.data.generator.generate = lambda *_: pytest.fail("the generator was asked")
    with pytest.raises(UserError, match=r"RoPE of type 'longrope'.*fit into 27 tokens"):
        game.play()
