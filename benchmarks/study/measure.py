"""Exact distances of many models at once from a law with at most three responses, and what they forgot.

A target's prompt has at most three valid responses, and the scores of their tokens are all that is needed: KL(p_data ||
p_theta) sums over these alone, total variation and validity need no more than the mass that they leave, and a
decoding temperature divides logits at prefixes of valid responses. Nothing is sampled.

What a model forgot is KL(p_start || p_theta) on prompts of the other task, by the chain rule over a tree of prefixes:
exact for the law in which responses that leave the tree differ only in where they leave it, and so a lower bound of
the whole. The tree grows from the start's most likely responses, and ``Retention.coverage`` says what share it has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.study.languages import END, Digits, Language, prompt_ids, response_ids
from benchmarks.study.stacked import Layout, Shape, logits

#: Decoding temperatures to choose from; the last one is the model's own law.
TEMPERATURES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
METRICS = ("kl", "reverse_kl", "tv", "valid", "greedy")


class TargetDistance:
    """How far models are from p_data on a fixed list of prompts.

    Args:
        language: What p_data is.
        prompts: The prompts to average over.
    """

    def __init__(self, language: Language, prompts: Sequence[Digits]) -> None:
        laws = [language.target.answers(prompt) for prompt in prompts]
        most = max(map(len, laws))
        padded = [[*law, *[next(iter(law))] * (most - len(law))] for law in laws]
        self.answers = torch.stack([response_ids(each) for each in padded])  # (B, M, R)
        self.p_data = torch.tensor([[*law.values(), *[0.0] * (most - len(law))] for law in laws])
        self.layout = Layout(language.prompt_tokens, most, language.response_tokens)
        self.shape = language.shape
        self.ids = torch.cat([prompt_ids(prompts), self.answers[..., :-1].flatten(1)], 1)[None]

    @torch.no_grad()
    def measure(self, weights: Tensor, temperatures: Sequence[float] = TEMPERATURES) -> dict[str, Tensor]:
        """Each metric of each model at each temperature, averaged over the prompts, shape ``(S, len(temperatures))``.

        ``kl`` is KL(p_data || p_theta) in nats a response; ``reverse_kl`` that of the law among valid responses from
        p_data, less the log of the valid mass (the plain one is infinite where any mass is invalid); ``tv`` total
        variation; ``valid`` the probability of a valid response; ``greedy`` the share of prompts whose greedy response
        is valid.
        """
        said = logits(weights, self.shape, self.layout, self.ids)  # (S, B, M, R, V)
        answers = self.answers.expand(len(weights), -1, -1, -1)[..., None]
        greedy = (said.argmax(-1, keepdim=True) == answers).all(-2).any(2).float().mean((1, 2))
        is_answer = self.p_data > 0
        log_p = self.p_data.clamp_min(1e-30).log()
        found: dict[str, list[Tensor]] = {metric: [] for metric in METRICS}
        for temperature in temperatures:
            log_q = (said / temperature).log_softmax(-1).gather(-1, answers)[..., 0].sum(-1)
            log_q = log_q.masked_fill(~is_answer, float("-inf"))
            q = log_q.exp()
            log_mass = log_q.logsumexp(-1)
            within = (log_q - log_mass[..., None]).exp()
            surprise = (within * (log_q.clamp_min(-1e4) - log_mass[..., None] - log_p)).masked_fill(~is_answer, 0)
            valid = q.sum(-1)
            found["kl"].append((self.p_data * (log_p - log_q.clamp_min(-1e4))).sum(-1).mean(1))
            found["reverse_kl"].append((surprise.sum(-1) - log_mass).mean(1))
            found["tv"].append((((self.p_data - q).abs().sum(-1) + 1 - valid) / 2).mean(1))
            found["valid"].append(valid.mean(1))
            found["greedy"].append(greedy)
        return {metric: torch.stack(values, 1) for metric, values in found.items()}


class Retention:
    """How far models went from where they started, on prompts of the other task.

    Args:
        language: Whose other task.
        prompts: The prompts to average over.
        guide: The pre-trained weights, shape ``(P,)``, whose most likely responses make the tree.
        responses: How many of them, for each prompt.
    """

    def __init__(self, language: Language, prompts: Sequence[Digits], guide: Tensor, responses: int = 10) -> None:
        self.shape = language.shape
        asked = prompt_ids(prompts, other=True)
        found = most_likely(guide, self.shape, asked, language.response_tokens, responses)  # (B, M, R)
        self.answers = found
        self.layout = Layout(language.prompt_tokens, responses, language.response_tokens)
        self.ids = torch.cat([asked, found[..., :-1].flatten(1)], 1)[None]
        self.is_counted = torch.zeros(found.shape, dtype=torch.bool)
        for row, answers in enumerate(found.tolist()):
            seen = set()
            for response, answer in enumerate(answers):
                for place in range(len(answer)):
                    prefix = tuple(answer[:place])
                    if prefix not in seen and END not in prefix:
                        seen.add(prefix)
                        self.is_counted[row, response, place] = True

    @torch.no_grad()
    def law(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of every next token ``(S, B, M, R, V)``, and each prefix's probability ``(S, B, M, R)``."""
        log_probs = logits(weights, self.shape, self.layout, self.ids).log_softmax(-1)
        answers = self.answers.expand(len(weights), -1, -1, -1)
        by_token = log_probs.gather(-1, answers[..., None])[..., 0]
        before = torch.cat([torch.zeros_like(by_token[..., :1]), by_token[..., :-1].cumsum(-1)], -1)
        return log_probs, before.exp()

    def forgotten(self, start: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
        """KL(p_start || p_theta) in nats a response, shape ``(S,)``. ``start`` is what ``law`` gave for the starts."""
        log_start, reached = start
        log_probs, _ = self.law(weights)
        by_prefix = (log_start.exp() * (log_start - log_probs)).sum(-1)
        return (reached * by_prefix * self.is_counted).sum((2, 3)).mean(1)

    def coverage(self, start: tuple[Tensor, Tensor]) -> Tensor:
        """The share of a start's next-token decisions that are in the tree, of those before its end, shape ``(S,)``."""
        _, reached = start
        return (reached * self.is_counted).sum((2, 3)).mean(1) / self.layout.length


@torch.no_grad()
def most_likely(weights: Tensor, shape: Shape, prompts: Tensor, length: int, count: int, width: int = 32) -> Tensor:
    """The most likely responses of ``length`` tokens to each prompt, found by a beam of ``width`` or more.

    Returns:
        Ids, shape ``(B, count, length)``.
    """
    rows = len(prompts)
    answers = torch.zeros(rows, 1, 0, dtype=torch.long)
    scores = torch.zeros(rows, 1)
    for place in range(length):
        beams = answers.shape[1]
        layout = Layout(prompts.shape[1], 1, place + 1)
        ids = torch.cat([prompts.repeat_interleave(beams, 0), answers.flatten(0, 1)], 1)[None]
        log_probs = logits(weights[None], shape, layout, ids)[0, :, 0, -1].log_softmax(-1).view(rows, beams, -1)
        if place + 1 < length:
            log_probs[..., END] = float("-inf")  # responses of other lengths leave the tree
        total = (scores[..., None] + log_probs).flatten(1)
        scores, chosen = total.topk(min(max(width, count), total.shape[1]))
        parents, token = chosen // log_probs.shape[-1], chosen % log_probs.shape[-1]
        parent_answers = answers.gather(1, parents[..., None].expand(-1, -1, place))
        answers = torch.cat([parent_answers, token[..., None]], 2)
    return answers[:, :count]
