"""The study's arms: what each trains on, with which loss of the package, and the grid it may choose from.

All runs of an arm train at once, as one stack: a row a run, with its own settings, demonstrations and order. All arms
see the same demonstrations in the same order for the same seed, with batches of 16, constant learning rates and AdamW
as the package sets it up. Opponents are replaced every 16 updates, where the optimiser goes on (the package's
``reset_optimizer: false``), and sampled responses are fresh at every visit of a prompt, which favours the arms that
sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from benchmarks.study.languages import END, FIRST_DIGIT, Language
from benchmarks.study.stacked import Layout, Sample, StackedAdamW, logits, sample
from spin_lightning.advantages import LeaveOneOut, Trajectories
from spin_lightning.losses import SpinLoss, TokenSpinLoss
from spin_lightning.models.token_laws import coarse_kl
from spin_lightning.ppo_loss import clipped_ratio_losses
from spin_lightning.types import PairLogProbs, TokenLaws, TokenLogProbs

BATCH = 16
#: Updates of an iteration: how long an opponent stays.
ITERATION = 16
#: Of the moving average of the weights that every arm may choose instead of the last ones.
EMA = 0.95


@dataclass(frozen=True)
class Config:
    """Settings of one run. What an arm does not use stays at its default."""

    learning_rate: float
    beta: float = 1.0
    temperature: float = 1.0
    dropout: float = 0.0
    kl_to_start: float = 0.0


@dataclass(frozen=True)
class Arm:
    """A method and its grid.

    Attributes:
        method: Which loss: ``sft``, ``spin``, ``token`` or ``reward``.
        grid: What the tuning seeds choose from.
        responses: K, sampled to each prompt at each visit.
    """

    method: str
    grid: tuple[Config, ...]
    responses: int = 0

    def tokens_per_update(self, config: Config, language: Language) -> int:
        """Forward passes over a token; training counts three, generation, scoring and an opponent's pass one."""
        one, several = (language.prompt_tokens + count * language.length for count in (1, self.responses))
        passes = {
            "sft": (4 if config.kl_to_start else 3) * one,
            "spin": 3 * (several + language.length) + several + one,
            "token": 4 * one,
            "reward": 5 * several,
        }
        return BATCH * passes[self.method]


def _grid(**choices: Sequence[float]) -> tuple[Config, ...]:
    return tuple(Config(**dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values()))


RATES = (1e-4, 3e-4, 1e-3)

ARMS: dict[str, Arm] = {
    "SFT": Arm(
        "sft",
        _grid(learning_rate=(*RATES, 3e-3), kl_to_start=(0.0, 0.3))
        + _grid(learning_rate=RATES[1:], kl_to_start=(1.0,))
        + _grid(learning_rate=RATES, dropout=(0.1,))
        + _grid(learning_rate=RATES[1:], dropout=(0.1,), kl_to_start=(0.3,)),
    ),
    "token-level": Arm("token", _grid(beta=(5.0, 20.0), learning_rate=RATES)),
    "token-level, hot": Arm("token", _grid(beta=(5.0, 20.0), temperature=(2.0, 3.0), learning_rate=RATES)),
    "SPIN K=4": Arm("spin", _grid(learning_rate=RATES, beta=(1.0, 5.0)), responses=4),
    "SPIN K=4, hot": Arm("spin", _grid(learning_rate=RATES[1:], beta=(5.0,), temperature=(2.0, 3.0)), responses=4),
    "SPIN K=1": Arm("spin", _grid(learning_rate=RATES, beta=(1.0, 5.0)), responses=1),
    "reward": Arm("reward", _grid(learning_rate=RATES[1:], beta=(0.0, 0.1)), responses=4),
}


@dataclass
class Stack:
    """Runs that train at once.

    Attributes:
        language: Of all of them.
        configs: One a run.
        prompts: Ids, shape ``(S, N, prompt)``.
        answers: Ids, shape ``(S, N, length)``.
        seeds: One a run: of the order of the demonstrations.
        start: Weights, shape ``(S, P)``.
    """

    language: Language
    configs: Sequence[Config]
    prompts: Tensor
    answers: Tensor
    seeds: Sequence[int]
    start: Tensor

    def setting(self, name: str) -> Tensor:
        """One of the settings of all runs, shape ``(S,)``."""
        return torch.tensor([getattr(config, name) for config in self.configs])

    def layout(self, responses: int) -> Layout:
        return Layout(self.language.prompt_tokens, responses, self.language.response_tokens)

    def batches(self) -> Callable[[], tuple[Tensor, Tensor]]:
        """A function that gives the next batch, prompts and answers, epoch after epoch in a new order."""
        count = self.prompts.shape[1]
        orders = [Random(f"order/{seed}") for seed in self.seeds]
        left = torch.empty(len(orders), 0, dtype=torch.long)

        def take() -> tuple[Tensor, Tensor]:
            nonlocal left
            if left.shape[1] < BATCH:
                left = torch.tensor([rng.sample(range(count), count) for rng in orders])
            chosen, left = left[:, :BATCH], left[:, BATCH:]
            rows = torch.arange(len(orders))[:, None]
            return self.prompts[rows, chosen], self.answers[rows, chosen]

        return take


def log_probs_of(said: Tensor, answers: Tensor) -> Tensor:
    """Of each token: logits ``(..., V)`` and ids ``(...)``, in nats."""
    return said.log_softmax(-1).gather(-1, answers[..., None])[..., 0]


def sequence_ids(prompts: Tensor, *answers: Tensor) -> Tensor:
    """Prompts with their responses, each without its last token: what a ``Layout`` describes."""
    return torch.cat([prompts, *(each[..., :-1].flatten(2) for each in answers)], 2)


def whole_laws(said: Tensor, answers: Tensor) -> TokenLogProbs:
    """What logits ``(..., V)`` say of these tokens and of all others: laws that leave no rest."""
    log_probs = said.log_softmax(-1).flatten(0, -2)
    ids = torch.arange(said.shape[-1]).expand(len(log_probs), -1)
    rest = log_probs.new_full((len(log_probs),), float("-inf"))
    return TokenLogProbs(log_probs.gather(1, answers.reshape(-1, 1))[:, 0], TokenLaws(ids, log_probs, rest))


def train(arm: Arm, stack: Stack, updates: int, watch: Callable[[int, Tensor, Tensor], None], seed: int = 0) -> None:
    """Train a stack, and show its weights after every update.

    Args:
        arm: What the loss is.
        stack: The runs.
        updates: How many.
        watch: Called with the number of updates, the weights and their moving average, both ``(S, P)``, at 0 too.
        seed: Of sampled responses and dropout.
    """
    weights = stack.start.clone().requires_grad_()
    average = stack.start.clone()
    optimizer = StackedAdamW(weights, stack.setting("learning_rate"))
    method = METHODS[arm.method](arm, stack, torch.Generator().manual_seed(seed))
    take = stack.batches()
    watch(0, weights.detach(), average)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for update in range(updates):
            if update % ITERATION == 0:
                batches = [take() for _ in range(min(ITERATION, updates - update))]
                method.begin(weights.detach().clone(), batches)
            losses = method(weights, update % ITERATION)
            losses.sum().backward()
            optimizer.step()
            average.lerp_(weights.detach(), 1 - EMA)
            watch(update + 1, weights.detach(), average)


class Method:
    """A method: what it prepares when an iteration begins, and the loss of each run on one of its batches, ``(S,)``."""

    def __init__(self, arm: Arm, stack: Stack, noise: torch.Generator) -> None:
        self.arm, self.stack, self.noise = arm, stack, noise
        self.shape = stack.language.shape
        self.beta, self.temperature = stack.setting("beta"), stack.setting("temperature")
        self.single = stack.layout(1)

    def begin(self, opponent: Tensor, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.opponent, self.batches = opponent, batches

    def __call__(self, weights: Tensor, place: int) -> Tensor:
        raise NotImplementedError

    def real(self, weights: Tensor, place: int, dropout: Tensor | None = None) -> Tensor:
        """Logits at the demonstrations' tokens, ``(S, B, R, V)``."""
        prompts, answers = self.batches[place]
        return logits(weights, self.shape, self.single, sequence_ids(prompts, answers), dropout)[:, :, 0]

    def draw(self, weights: Tensor, prompts: Tensor) -> Sample:
        layout = self.stack.layout(self.arm.responses)
        return sample(weights, self.shape, layout, prompts, self.temperature, END, self.noise)


class Supervised(Method):
    """The mean over responses of their NLL, as SFT's ``average: response``, and KL(start || policy) at their tokens."""

    def __call__(self, weights: Tensor, place: int) -> Tensor:
        _, answers = self.batches[place]
        rates, weight = self.stack.setting("dropout"), self.stack.setting("kl_to_start")
        said = self.real(weights, place, rates if rates.any() else None)
        losses = -log_probs_of(said, answers).sum(2).mean(1)
        if weight.any():
            with torch.no_grad():
                start = whole_laws(self.real(self.stack.start, place), answers).laws
            moved = coarse_kl(start, whole_laws(said, answers).laws).view(answers.shape).sum(2).mean(1)
            losses = losses + weight * moved
        return losses


class SelfPlay(Method):
    """The package's ``SpinLoss``, against responses that the opponent sampled."""

    def begin(self, opponent: Tensor, batches: list[tuple[Tensor, Tensor]]) -> None:
        super().begin(opponent, batches)
        prompts, answers = (torch.cat(each, 1) for each in zip(*batches, strict=True))
        with torch.no_grad():
            ids = sequence_ids(prompts, answers)
            real = log_probs_of(logits(opponent, self.shape, self.single, ids)[:, :, 0], answers).sum(-1)
        sizes = [each.shape[1] for each, _ in batches]
        drawn = self.draw(opponent, prompts)
        self.drawn = [
            Sample(*parts) for parts in zip(*(each.split(sizes, 1) for each in vars(drawn).values()), strict=True)
        ]
        self.opponent_real = real.split(sizes, 1)

    def __call__(self, weights: Tensor, place: int) -> Tensor:
        prompts, answers = self.batches[place]
        drawn = self.drawn[place]
        count = self.arm.responses
        ids = sequence_ids(prompts, answers[:, :, None], drawn.ids)
        said = logits(weights, self.shape, self.stack.layout(1 + count), ids)
        log_probs = log_probs_of(said, torch.cat([answers[:, :, None], drawn.ids], 2))
        real = log_probs[:, :, :1].sum(-1).expand(-1, -1, count)
        generated = (log_probs[:, :, 1:] * drawn.is_token).sum(-1)
        lengths = drawn.is_token.sum(-1)
        policy = PairLogProbs(real, generated, torch.full_like(lengths, answers.shape[-1]), lengths)
        before = PairLogProbs(
            self.opponent_real[place][..., None].expand(-1, -1, count),
            drawn.log_probs.sum(-1),
            policy.real_lengths,
            lengths,
        )
        return SpinLoss()(policy, before, self.beta[:, None, None]).losses.mean((1, 2))  # type: ignore[arg-type]


class TokenSelfPlay(Method):
    """The package's ``TokenSpinLoss`` on whole laws: the opponent's next token is summed over instead of sampled."""

    def __init__(self, arm: Arm, stack: Stack, noise: torch.Generator) -> None:
        super().__init__(arm, stack, noise)
        keys = [(config.beta, config.temperature) for config in stack.configs]
        starts = [place for place, key in enumerate(keys) if not place or key != keys[place - 1]]
        self.alike = list(zip(starts, [*starts[1:], len(keys)], strict=True))  # runs in a row with the same settings

    def __call__(self, weights: Tensor, place: int) -> Tensor:
        _, answers = self.batches[place]
        with torch.no_grad():
            opponent = self.real(self.opponent, place)
        said = self.real(weights, place)
        configs = self.stack.configs
        losses: list[Tensor] = []
        for first, last in self.alike:
            config, part = configs[first], slice(first, last)
            policy, before = (whole_laws(each[part], answers[part]) for each in (said, opponent))
            loss = TokenSpinLoss(config.temperature, top_k=said.shape[-1])
            by_token = loss(policy, before, config.beta).losses.view(answers[part].shape)
            losses.append(by_token.sum(2).mean(1))
        return torch.cat(losses)


class Rewarded(Method):
    """REINFORCE with the package's leave-one-out advantages; the reward is 1 for a valid response, and 0 else.

    ``beta`` is the price of a nat from the start. The reward knows the law, which demonstrations only sample.
    """

    def __call__(self, weights: Tensor, place: int) -> Tensor:
        prompts, _ = self.batches[place]
        drawn = self.draw(weights.detach(), prompts)
        count = self.arm.responses
        ids = sequence_ids(prompts, drawn.ids)
        layout = self.stack.layout(count)
        with torch.no_grad():
            start = log_probs_of(logits(self.stack.start, self.shape, layout, ids), drawn.ids)
        log_probs = log_probs_of(logits(weights, self.shape, layout, ids), drawn.ids)
        lengths = drawn.is_token.sum(-1)
        owners = torch.arange(lengths[..., 0].numel()).repeat_interleave(count)
        price = self.beta[:, None, None, None].expand_as(drawn.log_probs)[drawn.is_token]
        advantages = LeaveOneOut().estimate(
            Trajectories(
                is_valid(self.stack.language, prompts, drawn).flatten().float(),
                owners,
                lengths.flatten(),
                (drawn.log_probs - start)[drawn.is_token],
                price,  # type: ignore[arg-type]
            )
        )
        losses = torch.zeros_like(log_probs)
        losses = losses.masked_scatter(
            drawn.is_token,
            clipped_ratio_losses(
                log_probs[drawn.is_token], drawn.log_probs[drawn.is_token], advantages.advantages, clip=0.2
            ),
        )
        return losses.sum(-1).mean((1, 2))


def is_valid(language: Language, prompts: Tensor, drawn: Sample) -> Tensor:
    """Which sampled responses a rule of the target gives, shape ``(S, B, K)``."""
    found = []
    for asked, given in zip(prompts.flatten(0, 1).tolist(), drawn.ids.flatten(0, 1).tolist(), strict=True):
        law = language.target.answers(tuple(token - FIRST_DIGIT for token in asked[1:-1]))
        right = {(*(digit + FIRST_DIGIT for digit in answer), END) for answer in law}
        found.append([tuple(each) in right for each in given])
    return torch.tensor(found).view(drawn.ids.shape[:3])


METHODS: dict[str, type[Method]] = {
    "sft": Supervised,
    "spin": SelfPlay,
    "token": TokenSelfPlay,
    "reward": Rewarded,
}
