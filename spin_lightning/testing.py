"""What a class of your own promises, as one line of a test: ``check_loss(MyLoss(tau=0.3))``.

Each check raises an ``AssertionError`` that says what the promise is, what came, and what to do. They need no network,
no GPU and no pytest, and take about a second each, but for ``check_callback``, which plays two tiny games.

The tiny model and the tokenizer of the checks are here too, for tests of your own.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spin_lightning.advantages import Advantage, Advantages, Trajectories
from spin_lightning.generation.base import Player, ResponseGenerator, opened
from spin_lightning.generation.responding import Responder
from spin_lightning.losses import PairLoss, SelfPlayLoss, TokenLoss
from spin_lightning.models.batches import collate_pairs
from spin_lightning.models.log_probs import pair_log_probs
from spin_lightning.rewards import base as rewards
from spin_lightning.rewards.base import Answer
from spin_lightning.runs.settings import parameters_of
from spin_lightning.stages.opponent import Opponent
from spin_lightning.types import PairBatch, PairLogProbs, Response, TokenLaws, TokenLogProbs, UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# --- a tiny model -----------------------------------------------------------------------------------------------------


def byte_tokenizer(
    special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    chat_template: str | None = CHATML,
    eos: str = "<|im_end|>",
    **kwargs: Any,
) -> PreTrainedTokenizerFast:
    """One token a byte, plus control tokens: small, reversible, and honest about control tokens in text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
        **kwargs,
    )


def tiny_model(vocab_size: int = 264, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A Llama of about 13,000 weights.

    Args:
        vocab_size: Tokens that it knows.
        seed: Of its weights.
        changes: Settings of its ``LlamaConfig``.
    """
    settings = dict(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # spread out, so that answers depend on prompts and log-probs are not flat
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    return model


def save_tiny_model(folder: Path, seed: int = 0, **changes: Any) -> str:
    """A Hugging Face folder with that model and its tokenizer."""
    tokenizer = byte_tokenizer()
    tiny_model(vocab_size=len(tokenizer), seed=seed, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, count: int = 12) -> str:
    """Short sums as message rows, in a file of JSON lines."""
    rows = [
        {"messages": [{"role": "user", "content": f"{a}+{a + 1}?"}, {"role": "assistant", "content": str(2 * a + 1)}]}
        for a in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- promises ---------------------------------------------------------------------------------------------------------


def _hold(is_kept: object, promise: str, came: object, advice: str) -> None:
    if not is_kept:
        raise AssertionError(f"{promise}; got {came}. {advice}")


@contextmanager
def _refusals_are_failures() -> Iterator[None]:
    """What the package says to users about a class of theirs is what a check says, too."""
    try:
        yield
    except UserError as error:
        raise AssertionError(str(error)) from error


def _hold_settings(thing: Any, name: str) -> None:
    """A run's record keeps the constructor's arguments, each as the attribute of its name."""
    for argument in parameters_of(type(thing)):
        _hold(
            hasattr(thing, argument),
            f"{name} keeps each argument of its constructor as an attribute of the same name, by which a run's record "
            "knows that it changed",
            f"no attribute {argument!r}",
            f"Set self.{argument} = {argument} in __init__.",
        )
        value = getattr(thing, argument)
        try:
            json.dumps(value, default=lambda part: type(part).__qualname__ if hasattr(part, "__dict__") else 1 / 0)
        except (TypeError, ValueError, ZeroDivisionError):
            _hold(False, f"an argument of {name} can be written as JSON", f"{argument}={value!r}", "Take plain values.")


def _some_log_probs(dtype: torch.dtype, shift: float = 0.0) -> PairLogProbs:
    real = torch.tensor([-3.0, -11.5, -7.25, -40.0], dtype=dtype)
    generated = torch.tensor([-5.0, -9.0, -30.5, -12.0], dtype=dtype)
    step = torch.tensor([1.0, -0.5, 0.25, -1.0], dtype=dtype) * shift
    return PairLogProbs(
        real + step,
        generated - step,
        torch.tensor([2, 4, 3, 9]),
        torch.tensor([3, 3, 8, 5]),
        torch.tensor([-6.0, -8.0, -9.0, -10.0], dtype=dtype),
    )


def _some_laws(dtype: torch.dtype, shift: float = 0.0) -> TokenLogProbs:
    """The log-prob of a token at four places, and the law of two tokens and the rest, which may have none."""
    step = torch.tensor([1.0, -0.5, 0.25, -1.0], dtype=dtype) * shift
    log_probs = torch.tensor([[0.6, 0.3], [0.2, 1e-6], [0.9, 0.1], [0.5, 1e-9]], dtype=dtype).log()
    rest = torch.tensor([0.1, 0.8, 0.0, 0.5], dtype=dtype).log()
    laws = TokenLaws(torch.tensor([[3, 5], [1, 4], [0, 2], [7, 3]]), log_probs - step[:, None], rest)
    return TokenLogProbs(torch.tensor([0.3, 1e-6, 0.9, 1e-4], dtype=dtype).log() + step, laws)


def check_loss(loss: Any, beta: float = 0.5) -> None:
    """Hold a ``PairLoss`` or a ``TokenLoss`` to what training rests on.

    It is a pure function of log-probs, pair by pair or token by token, in their dtype, finite with its gradients; a
    model against itself has rewards of 0 where they compare with the opponent; ``learns_from_identical`` of a pair loss
    says what is so; its arguments are kept.

    Args:
        loss: The loss.
        beta: A scale that suits it.

    Raises:
        AssertionError: It breaks a promise.

    Example:
        >>> from spin_lightning import SpinLoss
        >>> check_loss(SpinLoss(link="hinge"))
    """
    name = type(loss).__name__
    _hold(
        isinstance(loss, PairLoss | TokenLoss),
        "a loss is a PairLoss or a TokenLoss",
        name,
        "Make it a subclass of spin_lightning.PairLoss, or of TokenLoss.",
    )
    some: Callable[..., PairLogProbs | TokenLogProbs] = _some_laws if isinstance(loss, TokenLoss) else _some_log_probs
    with _refusals_are_failures():
        loss.check(beta, 1)
    _hold_settings(loss, name)
    before = _state_of(loss)
    for dtype in (torch.float64, torch.float32):
        for shift in (0.0, 1.0, 20.0):
            output, grads = _loss_and_gradients(loss, beta, some(dtype, shift), some(dtype))
            for part in fields(output):
                value = getattr(output, part.name)
                _hold(
                    value.dtype == dtype,
                    f"{name} computes in the dtype of the log-probs",
                    f"{part.name} of {value.dtype} from {dtype}",
                    "Make constants by torch.as_tensor(x, dtype=policy.real.dtype), or leave them plain numbers.",
                )
                _hold(
                    value.isfinite().all(),
                    f"{name} is finite for log-ratios of up to {shift:g} nats",
                    f"{part.name} {value.detach().tolist()}",
                    "Use log-space functions such as logsigmoid and logaddexp.",
                )
            _hold(
                all(grad.isfinite().all() for grad in grads),
                f"{name} has finite gradients for log-ratios of up to {shift:g} nats",
                [grad.tolist() for grad in grads],
                "A where() still computes the gradient of what it leaves out: clamp its input first.",
            )
            _hold(
                not (output.real_rewards.requires_grad or output.generated_rewards.requires_grad),
                f"the rewards of {name} carry no gradient",
                "some that do",
                "Return real_rewards.detach() and generated_rewards.detach().",
            )
    policy, opponent = some(torch.float64, 1.0), some(torch.float64)
    whole, again = (_loss_and_gradients(loss, beta, policy, opponent)[0].losses for _ in range(2))
    _hold(
        torch.equal(whole, again) and _state_of(loss) == before,
        f"{name} is a pure function: the same log-probs give the same losses, and calling it changes nothing",
        f"{whole.tolist()}, then {again.tolist()}"
        if not torch.equal(whole, again)
        else f"other attributes after a call ({', '.join(_changes(before, _state_of(loss)))})",
        "Keep no state and draw no random numbers in forward.",
    )
    turned = torch.tensor([2, 0, 3, 1])
    mixed = _loss_and_gradients(loss, beta, _permuted(policy, turned), _permuted(opponent, turned))[0].losses
    _hold(
        torch.allclose(mixed, whole[turned], rtol=1e-9),
        f"each loss of {name} is of its own {loss.compares.removesuffix('s')}, whatever else is in the batch",
        f"{whole[turned].tolist()} in one order, {mixed.tolist()} in another",
        "Leave out means, sums and ranks over the batch.",
    )
    output, _ = _loss_and_gradients(loss, beta, opponent, opponent)
    if loss.reference == "the opponent":
        _hold(
            not output.real_rewards.any() and not output.generated_rewards.any(),
            f"{name} compares with the opponent, so that a model against itself has rewards of exactly 0",
            f"{output.real_rewards.tolist()} and {output.generated_rewards.tolist()}",
            "Use log_ratios(policy, opponent), or set the class's reference to what it compares with (None: nothing).",
        )
    if isinstance(opponent, PairLogProbs):
        _check_identical(loss, beta, opponent)


def _check_identical(loss: SelfPlayLoss, beta: float, start: PairLogProbs) -> None:
    """Whether ``learns_from_identical`` says what is so."""
    name = type(loss).__name__
    same = PairLogProbs(start.real, start.real, start.real_lengths, start.real_lengths, start.real)
    moved = [
        grad
        for shift in (0.0, 0.7, -0.7)
        for grad in _loss_and_gradients(
            loss, beta, replace(same, real=same.real + shift, generated=same.real + shift), same, initial_is=same
        )[1]
    ]
    learns = any(bool(a.add(b).abs().gt(1e-9).any()) for a, b in zip(moved[::2], moved[1::2], strict=True))
    _hold(
        learns == loss.learns_from_identical,
        f"{name}.learns_from_identical says whether a pair of two equal responses can have a gradient: with False such "
        "pairs are left out of training",
        f"{loss.learns_from_identical}, and {'there is' if learns else 'there is never'} a gradient",
        f"Override the property: return {learns}.",
    )


def _loss_and_gradients(
    loss: SelfPlayLoss, beta: float, policy: Any, opponent: Any, initial_is: PairLogProbs | None = None
) -> tuple[Any, list[Tensor]]:
    """What a loss gives, and the gradients of the sum by all log-probs. Fails if it changes what it is given."""
    leaves = [log_probs.clone().requires_grad_() for log_probs in _trained_tensors(policy)]
    if isinstance(policy, PairLogProbs):
        given: Any = replace(policy, real=leaves[0], generated=leaves[1])
        initial = initial_is or replace(opponent, real=opponent.real - 0.5, generated=opponent.generated - 0.5)
    else:
        given, initial = TokenLogProbs(leaves[0], TokenLaws(policy.laws.ids, *leaves[1:])), None
    kept = copy.deepcopy([policy, opponent])
    with _refusals_are_failures():
        output = loss(given, opponent, beta, initial if loss.needs_initial_log_probs else None)
        grads = torch.autograd.grad(output.losses.sum(), leaves, allow_unused=True)
    same_inputs = all(
        torch.equal(old, new)
        for before, now in zip(kept, (given, opponent), strict=True)
        for old, new in zip(_tensors_of(before), _tensors_of(now), strict=True)
    )
    _hold(
        same_inputs,
        f"{type(loss).__name__} leaves the log-probs that it is given as they are",
        "others after a call",
        "Use no operation in place (those whose name ends with _).",
    )
    return output, [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, leaves, strict=True)]


def _trained_tensors(said: PairLogProbs | TokenLogProbs) -> list[Tensor]:
    """Those that have a gradient where a policy is trained."""
    return (
        [said.real, said.generated]
        if isinstance(said, PairLogProbs)
        else [said.real, said.laws.log_probs, said.laws.rest]
    )


def _tensors_of(said: Any) -> list[Tensor]:
    return [part for value in vars(said).values() for part in (_tensors_of(value) if is_dataclass(value) else [value])]


def _permuted(said: Any, order: Tensor) -> Any:
    return type(said)(
        **{name: _permuted(value, order) if is_dataclass(value) else value[order] for name, value in vars(said).items()}
    )


def _state_of(thing: Any) -> dict[str, str]:
    return {name: repr(value) for name, value in vars(thing).items()}


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def check_advantage(advantage: Any) -> None:
    """Hold an ``Advantage`` to what an iteration of reinforcement learning rests on.

    One finite number a token, in the dtype of the rewards, without a gradient or a state, whatever the order of the
    responses; returns where it ``needs_values``, and otherwise none.

    Raises:
        AssertionError: It breaks a promise.

    Example:
        >>> from spin_lightning import LeaveOneOut
        >>> check_advantage(LeaveOneOut())
    """
    name = type(advantage).__name__
    _hold(
        isinstance(advantage, Advantage),
        "an advantage is an Advantage",
        name,
        "Make it a subclass of spin_lightning.Advantage.",
    )
    _hold_settings(advantage, name)
    before = _state_of(advantage)
    for dtype in (torch.float64, torch.float32):
        order = torch.arange(6)
        found = _estimate(advantage, dtype, order)
        turned = torch.tensor([4, 1, 5, 0, 3, 2])
        mixed = _estimate(advantage, dtype, turned)
        lengths = _LENGTHS.tolist()
        parts = found.advantages.split(lengths)
        expected = torch.cat([parts[number] for number in turned])
        _hold(
            torch.allclose(mixed.advantages, expected, atol=1e-5),
            f"{name} gives each response what it is worth, whatever the order of the responses",
            f"{expected.tolist()} in one order, {mixed.advantages.tolist()} in another",
            "Group by trajectories.groups, of which only equality counts, and not by position.",
        )
        again = _estimate(advantage, dtype, order)
        _hold(
            torch.equal(again.advantages, found.advantages) and _state_of(advantage) == before,
            f"{name} keeps no state: the same trajectories give the same advantages",
            "others the second time, or other attributes",
            "Compute everything from the trajectories.",
        )


_LENGTHS = torch.tensor([3, 1, 2, 4, 2, 1])


def _estimate(advantage: Advantage, dtype: torch.dtype, order: Tensor) -> Advantages:
    name, lengths = type(advantage).__name__, _LENGTHS.tolist()
    tokens = torch.linspace(-0.4, 0.3, sum(lengths), dtype=dtype)
    of_tokens = lambda values: torch.cat([values.split(lengths)[number] for number in order])  # noqa: E731
    given = Trajectories(
        torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, -2.0], dtype=dtype)[order],
        torch.tensor([7, 7, 3, 3, 7, 3])[order],
        _LENGTHS[order],
        of_tokens(tokens),
        0.1,
        of_tokens(tokens.flip(0)) if advantage.needs_values else None,
    )
    kept = copy.deepcopy(given)
    with _refusals_are_failures():
        found = advantage.estimate(given)
    _hold(
        isinstance(found, Advantages),
        f"{name}.estimate gives Advantages",
        type(found).__name__,
        "Return Advantages(advantages, returns).",
    )
    for what, value, wanted in (
        ("advantages", found.advantages, True),
        ("returns", found.returns, advantage.needs_values),
    ):
        if not wanted:
            _hold(
                value is None,
                f"{name} has needs_values = False, so there are no returns",
                "some",
                "Return None, or set needs_values = True.",
            )
            continue
        shape = None if value is None else tuple(value.shape)
        _hold(
            shape == (len(tokens),),
            f"{name} gives one number a token in {what}, shape ({len(tokens)},)",
            f"shape {shape}",
            "Spread what a response is worth over its tokens with repeat_interleave(lengths).",
        )
        assert value is not None
        _hold(
            value.dtype == dtype and not value.requires_grad,
            f"{what} of {name} have the dtype of the rewards and no gradient",
            f"{value.dtype} from {dtype}, requires_grad={value.requires_grad}",
            "Keep the dtype, and detach.",
        )
        _hold(
            value.isfinite().all(),
            f"{what} of {name} are finite",
            value.tolist(),
            "Divide by a deviation plus a small number.",
        )
    same = all(
        a is b is None or torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(vars(kept).values(), vars(given).values(), strict=True)
    )
    _hold(same, f"{name} leaves the trajectories as they are", "others after a call", "Use no operation in place.")
    return found


def check_generator(
    generator: Any,
    model: Any = None,
    end_ids: Collection[int] = tuple(range(100, 130)),
    pad_id: int = 0,
    prompts: Sequence[list[int]] = ([5, 6, 7], [40], [9, 8, 7, 6, 5, 4, 3], [200, 201], [1, 2, 3, 4, 5]),
) -> None:
    """Hold a ``ResponseGenerator`` to what pairs rest on.

    Every prompt is answered once, with ids of the vocabulary that end with an end id exactly where ``finish_reason`` is
    ``stop``, and are no more than ``max_new_tokens``; a response depends on model, prompt and seed alone, not on what
    else is asked; ``log_prob`` is the model's of these ids; ``sampling`` can be kept as JSON and does not change.

    Args:
        generator: The generator.
        model: Who responds. None: a tiny model, which lies in a folder too, for a backend that reads one.
        end_ids: What ends a response.
        pad_id: What to pad with.
        prompts: Token ids.

    Raises:
        AssertionError: It breaks a promise.

    Example:
        >>> from spin_lightning import TransformersGenerator
        >>> check_generator(TransformersGenerator(max_new_tokens=6))
    """
    name = type(generator).__name__
    _hold(
        isinstance(generator, ResponseGenerator),
        "a generator is a ResponseGenerator",
        name,
        "Make it a subclass of spin_lightning.ResponseGenerator.",
    )
    with _refusals_are_failures():
        generator.check_contract()
    sampling = copy.deepcopy(generator.sampling)
    encoder: Any = SimpleNamespace(end_ids=tuple(end_ids), pad_id=pad_id)
    seeds = [1000 + number for number in range(len(prompts))]

    def ask(numbers: Sequence[int]) -> dict[int, Response]:
        responder = Responder(generator, encoder, player.model, lambda: None)
        with _refusals_are_failures(), torch.no_grad():
            said = dict(responder.respond([prompts[n] for n in numbers], [seeds[n] for n in numbers]))
        return {number: said[place] for place, number in enumerate(numbers)}

    numbers = list(range(len(prompts)))
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            save_tiny_model(Path(folder))
            model = tiny_model(len(byte_tokenizer())).eval()
        player = Player(model, Path(folder))
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            for asked in (numbers, numbers[::-1], *([number] for number in numbers)):
                with opened(generator, player):
                    said = ask(asked)
                _hold(
                    generator.sampling == sampling,
                    f"{name} never changes its settings: manifests bind pairs to them",
                    f"{sampling}, then {generator.sampling}",
                    "Keep what belongs to one call in local variables.",
                )
                if asked == numbers:
                    first = said
                for number, response in said.items():
                    _hold(
                        response.ids == first[number].ids,
                        f"a response of {name} depends on the model, its prompt and its seed alone",
                        f"{first[number].ids} among {len(prompts)} prompts, {response.ids} when asked for {asked}",
                        "Seed each response by its own seed (generation.sampling.uniforms_of), and mask padding.",
                    )
        finally:
            generator.shut_down()
        _hold(
            all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items()),
            f"{name} leaves the model as it is",
            "other weights",
            "Never write to self.opponent.model.",
        )
    for number, response in first.items():
        expected = _log_probs_of(model, prompts[number], response.ids)
        total = float(expected.sum())
        advice = "Give the sum, in nats, under the model's own distribution, before temperature and top_p."
        _hold(
            abs(response.log_prob - total) < 0.02 + 1e-3 * abs(total),
            f"log_prob of {name} is the model's log-probability of the ids",
            f"{response.log_prob:.4f} where the model says {total:.4f}",
            advice,
        )
        if response.log_probs is not None:
            _hold(
                torch.allclose(torch.tensor(response.log_probs), expected.float(), atol=0.02),
                f"log_probs of {name} are those of each token",
                response.log_probs,
                advice,
            )


@torch.no_grad()
def _log_probs_of(model: Any, prompt: list[int], ids: list[int]) -> Tensor:
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def check_reward(reward: Any, answers: Sequence[Answer] | None = None) -> None:
    """Hold a ``Reward`` to what every stage that asks it rests on.

    One finite number or None for each answer, whatever else is asked; the same answer is worth the same; what it says
    is kept by its ``settings``, as JSON; a copy of it by ``pickle`` says the same; ``needs_real`` and ``prefer`` say
    what is so.

    Args:
        reward: The reward.
        answers: What to ask it about. None: right and wrong sums, each with every column that it names, as a text.

    Raises:
        AssertionError: It breaks a promise.

    Example:
        >>> from spin_lightning import NumberMatch
        >>> check_reward(NumberMatch())
    """
    name = type(reward).__name__
    with _refusals_are_failures():
        rewards.check_reward(reward)
    if isinstance(answers, type(None)):
        columns = dict.fromkeys(reward.columns, "5")
        answers = [
            Answer(
                [{"role": "user", "content": "2+3?"}], text, "5", columns, "length" if text.endswith("or") else "stop"
            )
            for text in ("5", "It is 5.", "6", "", "5 or 6 or")
        ]
    keys = [answer.key for answer in answers]
    with _refusals_are_failures():
        whole = rewards.scored(reward, answers)
        turned = rewards.scored(reward, answers[::-1])[::-1]
        alone = [rewards.scored(reward, [answer])[0] for answer in answers]
        nothing = list(reward.score([]))
    advice = "Score each answer by itself, without random numbers, and without what was asked before."
    for said, how in ((turned, "in another order"), (alone, "one by one")):
        _hold(
            _equal_scores(said, whole),
            f"{name} gives the same answer the same reward",
            f"{whole}, and {said} {how}",
            advice,
        )
    _hold(
        nothing == [],
        f"{name}.score gives one value for each answer",
        f"{nothing} for no answers",
        "Return a list as long as the answers.",
    )
    _hold(
        keys == [answer.key for answer in answers],
        f"{name} leaves the answers as they are",
        "others after a call",
        "Copy what you change.",
    )
    try:
        copied = pickle.loads(pickle.dumps(reward))
    except Exception as error:
        raise AssertionError(
            f"{name} can be copied by pickle, to be asked in another process; got {error!r}. "
            "Define it in a module, and load models and open connections when score is first called."
        ) from error
    with _refusals_are_failures():
        _hold(
            _equal_scores(rewards.scored(copied, answers), whole) and copied.settings == reward.settings,
            f"a copy of {name} by pickle says the same",
            f"{rewards.scored(copied, answers)} instead of {whole}",
            "Keep all that decides in attributes.",
        )
        if reward.needs_real:
            said = reward.score([replace(answer, real=None) for answer in answers])
            _hold(
                all(value is None for value in said),
                f"{name} has needs_real, so it judges nothing without a real response",
                list(said),
                "Give None where answer.real is None, or leave needs_real False.",
            )
        pairs = [(a, b) for a in answers for b in answers if a.key != b.key]
        ahead = rewards.preferred(reward, [a for a, _ in pairs], [b for _, b in pairs])
        behind = rewards.preferred(reward, [b for _, b in pairs], [a for a, _ in pairs])
    wrong = [
        (p, q)
        for p, q in zip(ahead, behind, strict=True)
        if (p is None) != (q is None) or (p is not None and q is not None and abs(p + q - 1) > 1e-6)
    ]
    _hold(
        not wrong,
        f"{name}.prefer gives a probability, and one minus it for the other order",
        wrong[:1],
        "Leave prefer out, or give P(first is better).",
    )
    reward.close()


def _equal_scores(some: Sequence[float | None], others: Sequence[float | None]) -> bool:
    return len(some) == len(others) and all(
        a is b if a is None or b is None else abs(a - b) <= 1e-6 * max(1.0, abs(a))
        for a, b in zip(some, others, strict=True)
    )


def check_opponent(opponent: Any) -> None:
    """Hold an ``Opponent`` to what a training step rests on.

    Where an iteration begins its log-probs are the policy's (unless ``starts_as_policy`` is False), they carry no
    gradient and stay what they are while the policy trains; it stays out of checkpoints and comes back by ``restore``.

    Raises:
        AssertionError: It breaks a promise.

    Example:
        >>> from spin_lightning import ResidentOpponent
        >>> check_opponent(ResidentOpponent())
    """
    name = type(opponent).__name__
    _hold(
        isinstance(opponent, Opponent),
        "an opponent is an Opponent",
        name,
        "Make it a subclass of spin_lightning.Opponent.",
    )
    policy = tiny_model().eval()
    batch = scored_batch(policy)
    before = copy.deepcopy(policy.state_dict())
    opponent.become(policy)
    _hold(
        all(torch.equal(value, policy.state_dict()[key]) for key, value in before.items()),
        f"{name}.become leaves the policy as it is",
        "other weights",
        "Copy the policy; do not keep it.",
    )
    first = opponent.log_probs(batch)
    _hold(
        not first.real.requires_grad and not first.generated.requires_grad,
        f"log_probs of {name} carry no gradient",
        "some that do",
        "Compute them under torch.no_grad().",
    )
    if opponent.starts_as_policy:
        gap = max(
            float((a - b).abs().max())
            for a, b in ((first.real, batch.opponent.real), (first.generated, batch.opponent.generated))
        )
        _hold(
            gap < 1e-3,
            f"{name} is the policy where an iteration begins, so that its log-probs are the policy's",
            f"a difference of {gap:.3g} nats",
            "Take over its weights in become, or set starts_as_policy = False.",
        )
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    later = opponent.log_probs(batch)
    _hold(
        torch.equal(first.real, later.real) and torch.equal(first.generated, later.generated),
        f"{name} stays what it is while the policy trains",
        "other log-probs after an update of the policy",
        "Copy the policy's weights in become.",
    )
    _hold(
        not opponent.state_dict(),
        f"the weights of {name} stay out of checkpoints",
        f"{len(opponent.state_dict())} entries in its state_dict",
        "Call super().__init__(), which sees to it.",
    )
    opponent.restore(lambda: tiny_model().eval())
    again = opponent.log_probs(batch)
    _hold(
        torch.allclose(again.real, first.real, atol=1e-4),
        f"{name}.restore makes it the same again where a run continues",
        "other log-probs",
        "Set holds_weights = True, or override restore.",
    )


def scored_batch(model: nn.Module, initial: nn.Module | None = None) -> PairBatch:
    """Three pairs with the log-probs that this model gave them.

    Args:
        model: The opponent of the pairs.
        initial: That of iteration 0. None: the same.
    """
    generator = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 60, (count,), generator=generator).tolist()

    pairs: list[dict[str, Any]] = [
        {
            "pair_id": i,
            "prompt_id": i,
            "prompt_ids": ids(4 + i),
            "real_ids": ids(3 + i),
            "generated_ids": ids(7 - 2 * i),
            "initial_ids": ids(2),
        }
        for i in range(3)
    ]
    for row in pairs:
        row |= {
            f"{player}_{side}_log_prob": 0.0 for player in ("opponent", "initial") for side in ("real", "generated")
        }
    (batch,) = collate_pairs(pairs, max_tokens=1000)
    was_training = model.training
    with torch.no_grad():
        batch.opponent = pair_log_probs(model.eval(), batch)
        batch.initial = pair_log_probs((initial or model).eval(), batch)
    model.train(was_training)
    return batch


def check_callback(make: Callable[[], Any], changes_training: bool = False) -> None:
    """Hold a callback to what a game rests on: with it and without it, two iterations give the same weights.

    And the same random numbers, of which dropout makes use. What it saves is plain, and a new one that is given it back
    saves the same.

    Args:
        make: Makes a new callback; its class will do where that needs no arguments.
        changes_training: It is meant to change what is trained.

    Raises:
        AssertionError: It breaks a promise.
    """
    callback = make()
    name = type(callback).__name__
    _hold(
        isinstance(callback, L.Callback),
        "a callback is a Callback of Lightning",
        name,
        "Make it a subclass of lightning.Callback.",
    )
    with tempfile.TemporaryDirectory() as folder:
        states: list[Tensor] = []

        def play(name: str, *callbacks: Any) -> dict[str, Tensor]:
            with _refusals_are_failures(), torch.random.fork_rng():
                torch.manual_seed(0)
                weights = play_tiny_game(Path(folder) / name, *callbacks)
                states.append(torch.get_rng_state())
            return weights

        alone, with_it = play("alone"), play("with", callback)
        if not changes_training:
            differ = [key for key, value in alone.items() if not torch.equal(value, with_it[key])]
            _hold(
                not differ,
                f"{name} only watches: a game with it ends with the same weights as without it",
                f"{len(differ)} of {len(alone)} other weights",
                "Change neither data nor weights, or call check_callback(..., changes_training=True).",
            )
            _hold(
                torch.equal(*states),
                f"{name} leaves the random numbers of training as they are",
                "others after a game with it",
                "Draw yours inside torch.random.fork_rng(), or from a torch.Generator of your own.",
            )
        state = callback.state_dict()
        path = Path(folder) / "state.pt"
        torch.save(state, path)
        try:
            kept = torch.load(path, weights_only=True)
        except pickle.UnpicklingError as error:
            raise AssertionError(
                f"the state_dict of {name} holds plain values and tensors, as checkpoints are read without running "
                f"code; got {state!r}. Keep numbers, texts, lists and dicts in it."
            ) from error
    other = make()
    other.load_state_dict(kept)
    _hold(
        repr(other.state_dict()) == repr(state),
        f"a new {name} that was given a saved state has that state, so that a resumed run goes on as before",
        f"{other.state_dict()!r} instead of {state!r}",
        "Let load_state_dict set all that state_dict gives.",
    )


def play_tiny_game(folder: Path, *callbacks: L.Callback, **changes: Any) -> dict[str, Tensor]:
    """Play a game of two iterations with the tiny model, in a second or two.

    Args:
        folder: Of the model, the rows and the run (``run``).
        callbacks: Callbacks beside those of every game.
        changes: Arguments of SpinLightningModule.

    Returns:
        The weights of the policy at its end, by name.
    """
    from spin_lightning import (
        AtomicCheckpointIO,
        RunCheckpoint,
        SelfPlay,
        SpinLightningModule,
        SyntheticDataModule,
        TransformersGenerator,
    )

    folder.mkdir(parents=True, exist_ok=True)
    module = SpinLightningModule(save_tiny_model(folder / "model"), **{"learning_rate": 1e-2, **changes})
    rows = write_rows(folder / "rows.jsonl", 10)
    data = SyntheticDataModule(rows, batch_size=4, val_fraction=0.2, generator=TransformersGenerator(max_new_tokens=5))
    clock = SelfPlay(str(folder / "run"), iterations=2, epochs=1)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=clock.total_epochs,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=-1,
            plugins=[AtomicCheckpointIO()],
            callbacks=[*callbacks, clock, RunCheckpoint()],
        )
        trainer.fit(module, data)
    return {key: value.detach().clone() for key, value in module.policy.state_dict().items()}


def check_stage(record: str, word: str = "mine") -> None:
    """Hold the record of a stage to what the command line rests on.

    Its classes can be imported and are of the right kind, its help can be read from the source and agrees with the
    parser, its run has a folder, and its links and what it reads over are settings that there are, or are not.

    Args:
        record: Import path of the ``Stage``, such as ``my_package.distil.STAGE``.
        word: What its command is called.

    Raises:
        AssertionError: It breaks a promise.

    Example:
        >>> check_stage("spin_lightning.stages.sft.STAGE")
    """
    from spin_lightning.cli import commands
    from spin_lightning.cli.short_help import settings_of
    from spin_lightning.cli.stage_cli import parse_settings
    from spin_lightning.data.module import RowDataModule
    from spin_lightning.stages.policy import PolicyModule
    from spin_lightning.stages.stage import Stage

    stage = resolve_name(record)
    _hold(
        isinstance(stage, Stage),
        f"{record} is a Stage",
        type(stage).__name__,
        "Make it one: spin_lightning.stages.stage.Stage.",
    )
    wanted = {"module": (stage.module, PolicyModule), "data": (stage.data, RowDataModule)}
    wanted |= {f"callbacks[{section!r}]": (path, L.Callback) for section, path in stage.callbacks.items()}
    for what, (path, kind) in wanted.items():
        try:
            found = resolve_name(path)
        except (ImportError, AttributeError, ValueError) as error:
            raise AssertionError(
                f"{what} of {record} is an import path; got {path!r}, and {error}. Correct it."
            ) from error
        _hold(
            isinstance(found, type) and issubclass(found, kind),
            f"{what} of {record} is a {kind.__name__}",
            path,
            f"Make it a subclass of {kind.__name__}.",
        )
    _hold(
        stage.folder in stage.callbacks
        and "output_dir" in parameters_of(resolve_name(stage.callbacks.get(stage.folder, stage.module))),
        f"folder of {record} is the section whose output_dir is the run's folder",
        stage.folder,
        f"Name one of {list(stage.callbacks)}, whose class takes output_dir.",
    )
    try:
        shown = {setting.name for _, settings in settings_of(record).values() for setting in settings}
    except (LookupError, ValueError) as error:
        raise AssertionError(
            f"the help of {record} is read from its source without importing it; got {error}. Write its texts, "
            "dicts and numbers as literals in one call of Stage(...)."
        ) from error
    with (
        patch.dict(commands.COMMANDS, {word: commands.Command("a stage", stage=record)}),
        patch.dict(commands.STAGES, {word: record}),
        _refusals_are_failures(),
    ):
        parsed = parse_settings(word, ["--model.model_name_or_path=a/b", "--data.train_data=c"])
    known = set(parsed.keys(branches=True))
    ours = {name for name in shown if name.count(".") == 1}
    _hold(
        ours <= known,
        f"the help of {record} shows the settings of the parser",
        sorted(ours - known),
        "Hand arguments on by **kwargs to the base class that has them.",
    )
    for target, (sources, _) in stage.links.items():
        _hold(
            set(sources) <= known,
            f"the link to {target} follows from settings that there are",
            sorted(set(sources) - known),
            "Correct their names.",
        )
    _hold(
        not {name for name in stage.reads_over if name in known},
        f"{record} reads over settings of other stages only",
        [name for name in stage.reads_over if name in known],
        "Leave out what the stage has itself.",
    )
    _hold(
        any(name.startswith(stage.mark) for name in known),
        f"mark of {record} begins a setting of the stage, which tells its runs from others",
        repr(stage.mark),
        "Name a setting that no other stage records.",
    )
