"""A language with a known distribution, a transformer small enough to learn it, and the exact distance between the two.

A prompt is a string of digits. Its response is the same digits sorted, reversed or copied, with fixed probabilities;
where two rules give one response, their probabilities add. So p_data(.|x) has at most three responses, and scoring
these is all that an exact KL needs: no response is sampled, and none is left out.

Nothing is trained here. What may surprise: distances are averaged over a fixed list of prompts, not over all of them,
but for each of these prompts they are exact.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from spin_lightning.data.encoding import Encoder
from spin_lightning.models.batches import pack
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.types import Row, UserError

#: The rules, in the order of ``Language.probabilities``.
RULES = ("sorted", "reversed", "copied")

SPECIAL_TOKENS = ("<pad>", "<ask>", "<answer>", "<end>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<ask>' + message['content'] + '<answer>' }}"
    "{% else %}{{ message['content'] + '<end>' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Language:
    """Prompts of digits, and the distribution of their responses.

    Args:
        digits: The alphabet, in its order.
        length: Digits in a prompt, and in its responses.
        probabilities: Of the rules sorted, reversed and copied. They add up to 1.

    Raises:
        UserError: The alphabet repeats a digit, or the probabilities are no distribution.

    Example:
        >>> language = Language(length=3)
        >>> language.answers("201")
        {'012': 0.6, '102': 0.3, '201': 0.1}
        >>> language.answers("121")  # reversed and copied are one answer here
        {'112': 0.6, '121': 0.4}
    """

    digits: str = "0123456789"
    length: int = 4
    probabilities: tuple[float, float, float] = (0.6, 0.3, 0.1)

    def __post_init__(self) -> None:
        if len(set(self.digits)) != len(self.digits) or not self.digits or self.length < 1:
            raise UserError(
                f"digits must be different characters and length at least 1, got {self.digits!r} and {self.length!r}."
            )
        if min(self.probabilities) < 0 or abs(sum(self.probabilities) - 1) > 1e-9:
            raise UserError(f"probabilities must be three shares that add up to 1, got {self.probabilities!r}.")

    @property
    def num_prompts(self) -> int:
        """How many prompts there are: each digit in each place."""
        return int(len(self.digits) ** self.length)

    @property
    def response_tokens(self) -> int:
        """Tokens of every valid response, terminator included."""
        return self.length + 1

    def answers(self, prompt: str) -> dict[str, float]:
        """p_data(.|prompt): each possible response with its probability."""
        distribution: dict[str, float] = {}
        ordered = "".join(sorted(prompt, key=self.digits.index))
        for answer, probability in zip((ordered, prompt[::-1], prompt), self.probabilities, strict=True):
            if probability:
                distribution[answer] = round(distribution.get(answer, 0.0) + probability, 12)
        return distribution

    def prompts(self) -> list[str]:
        """All prompts, in the alphabet's order."""
        return ["".join(digits) for digits in itertools.product(self.digits, repeat=self.length)]

    def draw_prompts(self, count: int, seed: int, without: Collection[str] = ()) -> list[str]:
        """Different prompts, uniformly drawn, none of them in ``without``.

        Raises:
            UserError: The language has fewer prompts than that.
        """
        taken = set(without)
        left = [prompt for prompt in self.prompts() if prompt not in taken]
        if count > len(left):
            raise UserError(
                f"{count} prompts were asked for, but {len(left)} are left. Ask for fewer, or raise length."
            )
        return Random(f"prompts/{seed}").sample(left, count)

    def rows(self, prompts: Sequence[str], seed: int) -> list[dict[str, Any]]:
        """An SFT data set: to each prompt one response drawn from p_data, as a message row."""
        rng = Random(f"answers/{seed}")
        rows = []
        for prompt in prompts:
            distribution = self.answers(prompt)
            (answer,) = rng.choices(list(distribution), list(distribution.values()))
            rows.append({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]})
        return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Rows as JSON Lines, for the package's own loader."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_tokenizer(language: Language) -> PreTrainedTokenizerFast:
    """One token a digit and four control tokens, with a chat template that ends every response with ``<end>``.

    Example:
        >>> question = {"role": "user", "content": "31"}
        >>> make_tokenizer(Language(length=2)).apply_chat_template([question], return_dict=False)
        [1, 7, 5, 2]
    """
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *language.digits])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[assignment]
    backend.decoder = decoders.Fuse()  # type: ignore[assignment]
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<pad>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(language: Language, seed: int, hidden_size: int = 64, num_layers: int = 2) -> LlamaForCausalLM:
    """A Llama with random weights: about 85,000 of them with the standard sizes."""
    tokens = len(SPECIAL_TOKENS) + len(language.digits)
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4 * language.length + 8,
        tie_word_embeddings=False,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index("<end>"),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_start(language: Language, folder: Path, seed: int, **sizes: int) -> str:
    """A Hugging Face folder with a random model and its tokenizer: where the laboratory's own training begins."""
    make_model(language, seed, **sizes).save_pretrained(folder)
    make_tokenizer(language).save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Distance:
    """How far a policy is from p_data, exactly, averaged over prompts.

    Attributes:
        kl: KL(p_data, p_theta), in nats a response.
        total_variation: Half the sum of absolute differences over all token strings, from 0 to 1.
        validity: Probability that the policy's response is one that p_data can give.
    """

    kl: float
    total_variation: float
    validity: float


class ExactDistance:
    """Measures a policy against a language on a fixed list of prompts.

    The at most three responses a prompt has under p_data are scored. KL needs p_theta nowhere else. Total variation
    needs only the sum of the rest: where p_data is 0, every string differs by p_theta itself, and these add up to the
    mass that the scored responses leave.

    Args:
        language: The distribution.
        prompts: The prompts to average over, with equal weight.
        encoder: How they become tokens; the one the game uses.
    """

    def __init__(self, language: Language, prompts: Sequence[str], encoder: Encoder) -> None:
        groups, owners, distribution = [], [], []
        for index, prompt in enumerate(prompts):
            answers = []
            for answer, probability in language.answers(prompt).items():
                row = encoder.encode(
                    index, Row(({"role": "user", "content": prompt},), answer), language.response_tokens
                )
                answers.append(row.real_ids)
                owners.append(index)
                distribution.append(probability)
            groups.append((row.prompt_ids, answers))
        self.num_prompts = len(prompts)
        self.batches = [pack(groups[start : start + 1024]) for start in range(0, len(groups), 1024)]
        self.owners = torch.tensor(owners)
        self.p_data = torch.tensor(distribution, dtype=torch.float64)

    @torch.no_grad()
    def log_probs(self, model: PreTrainedModel) -> torch.Tensor:
        """Log-probs of all scored responses, prompt after prompt, in nats, float64, shape ``(A,)``."""
        was_training = model.training
        model.eval()
        values = [
            response_log_probs(model, move_data_to_device(batch, model.device)).double().cpu() for batch in self.batches
        ]
        model.train(was_training)
        return torch.cat(values)

    def __call__(self, model: PreTrainedModel) -> Distance:
        log_probs = self.log_probs(model)
        p_theta = log_probs.exp()
        mass = torch.zeros(self.num_prompts, dtype=torch.float64).index_add(0, self.owners, p_theta)
        kl = (self.p_data * (self.p_data.log() - log_probs)).sum() / self.num_prompts
        differences = (self.p_data - p_theta).abs().sum() / self.num_prompts
        return Distance(float(kl), float((differences + 1 - mass.mean()) / 2), float(mass.mean()))
