"""The curves of a report: which metrics belong together, what each means, and what a sick one looks like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from spin_lightning.reports.charts import interval_chart, line_chart
from spin_lightning.reports.record import Points, Record, as_dict, as_number

#: Of a chart, in pixels: small enough that its text can be read where it is as wide as a phone.
_chart = partial(line_chart, width=440, height=270)


@dataclass(frozen=True)
class Curve:
    """A chart: the metrics in it, under the names of its legend, and what they mean.

    Attributes:
        title: What is seen.
        unit: Of its y axis.
        metrics: Names in the logs, by names in the legend.
        meaning: What it is, in a line.
        sick: What it looks like where something is wrong.
        overlays: Whether those of another run may be drawn over it: they mean the same there, whatever was trained.
    """

    title: str
    unit: str
    metrics: Mapping[str, str]
    meaning: str
    sick: str
    overlays: bool = False


_PAIRS = "of the pairs of an update"
_NLL = Curve(
    "Held-out NLL",
    "nats a response",
    {"held-out NLL": "val/nll"},
    "How unlikely the policy finds held-out real responses: their negative log-likelihood, averaged over responses. "
    "Lower is better, and it is the one curve here that cannot be learned by heart.",
    "It falls and then rises: the policy is overfitting, so fewer epochs, iterations or a lower learning rate. It "
    "rises from the start: the learning rate is too high, or the game moves away from the data.",
    overlays=True,
)
_LOSS = Curve(
    "Loss",
    "loss",
    {"loss": "loss"},
    "What an update minimises. An iteration starts at ln 2 = 0.693 with the logistic loss, because policy and opponent "
    "are the same there, and falls as the policy learns to tell real from generated.",
    "It does not start where it should: other weights, prompts or dropout. It is at 0 within a few updates: the pairs "
    "are told apart by something trivial, or the learning rate is too high. It jumps or is NaN: lower the learning "
    "rate, or clip the gradient.",
)
#: In the order of the page. What a run has not logged is left out.
CURVES = (
    _NLL,
    _LOSS,
    Curve(
        "Margin",
        "margin",
        {"margin": "rewards/margins"},
        f"Reward of the real minus that of the generated response, {_PAIRS}: by how much the policy prefers the real "
        "one more than the opponent does. Zero where an iteration starts.",
        "It grows without end while the held-out NLL rises: the policy is pushed away from both. Raise beta or lower "
        "the learning rate. It stays at zero: nothing is learned.",
    ),
    Curve(
        "Rewards",
        "reward",
        {"real": "rewards/real", "generated": "rewards/generated"},
        "Beta times what the policy has gained in log-probability over the opponent, on real and on generated "
        "responses. Above zero a response has become more likely.",
        "Both fall: the loss asks for their difference alone, and pushes generated ones down faster than real ones. "
        "Real rewards far below zero mean that the policy unlearns the data.",
    ),
    Curve(
        "Log-probabilities",
        "nats a response",
        {"real": "logps/real", "generated": "logps/generated"},
        "How likely the policy finds the real and the generated responses of an update, as sums over their tokens.",
        "Real ones fall through the whole run: see the rewards. Generated ones far below real ones at once: length or "
        "format gives them away.",
    ),
    Curve(
        "Accuracy",
        "share of pairs",
        {"accuracy": "rewards/accuracies"},
        "In how many pairs the real response has the higher reward; a tie counts one half.",
        "At 1 early and for long: the pairs are memorised or trivial. At one half throughout: there is nothing left to "
        "tell apart, or the learning rate is too low.",
    ),
    Curve(
        "Reward",
        "reward",
        {"sampled": "reward/mean", "held out": "val/reward"},
        "What the reward says of the responses that an iteration learns from, and of the most likely responses to "
        "held-out prompts.",
        "Sampled rises while held out falls: the reward is hacked, or the prompts are learned by heart.",
        overlays=True,
    ),
    Curve(
        "Distance from the reference",
        "nats a response",
        {"KL": "kl/reference"},
        "How far the policy's responses have moved from the model that the run started from.",
        "Beyond some 20 nats: the policy may be leaving the language it had. Raise beta, or lower the learning rate.",
    ),
    Curve(
        "What an update moves",
        "share or nats a token",
        {"clipped tokens": "ratio/clipped", "KL of a step": "kl/step"},
        "The share of tokens whose ratio is clipped, and how far the policy is from the one that gave the responses.",
        "A large clipped share: too many updates on the same responses, or too high a learning rate.",
    ),
    Curve(
        "Critic",
        "share",
        {"explained variance": "value/explained_variance"},
        "How much of the differences in returns the critic foresaw. 1 is all.",
        "Below 0 after some iterations: the critic says less than a constant would.",
    ),
    Curve(
        "Held-out pairs",
        "share or loss",
        {"accuracy": "val/accuracy", "loss": "val/loss", "longer one wins": "val/longer_wins"},
        "Accuracy and loss on held-out pairs; and how often the longer response is the better one.",
        "Accuracy no higher than that of taking the longer response: length may be all that was learned.",
        overlays=True,
    ),
    Curve(
        "Retention: NLL on other rows",
        "nats a response",
        {"other rows": "val/other_nll"},
        "The NLL of held-out rows of other tasks (data.other_data): what the policy forgets while it learns.",
        "It rises: other abilities are lost. Lower the learning rate, or stop earlier.",
        overlays=True,
    ),
    Curve(
        "Retention: distance from the start",
        "nats a token",
        {"KL to the start": "val/kl_to_start"},
        "How far the policy's next-token laws have moved from those of the model it started from, at the tokens of "
        "held-out real responses: a lower bound of the KL divergence.",
        "It grows faster than the held-out NLL falls: the policy pays much change for little gain.",
        overlays=True,
    ),
    Curve(
        "Gradient norm",
        "norm",
        {"gradient": "grad_norm"},
        "The norm of an update's gradient, before it is clipped.",
        "It grows by orders of magnitude, or has spikes that the loss follows: lower the learning rate, or clip.",
    ),
    Curve(
        "Learning rate",
        "learning rate",
        {"learning rate": "lr"},
        "The optimiser's step size: it warms up, and falls to zero with the schedule of each iteration.",
        "Zero throughout, or not what was meant: see model.learning_rate and model.lr_schedule.",
    ),
)

_OF_TOKENS = "at the real tokens of an update"
_UNLIKE_A_GAME = {
    "tokens": [
        Curve(
            "Loss",
            "loss",
            {"loss": "loss"},
            "What an update minimises, as a mean over real tokens. An iteration starts at ln 2 = 0.693 with the "
            "logistic loss, because policy and opponent are the same there.",
            "It does not start where it should: other weights or dropout. It jumps or is NaN: lower the learning rate, "
            "or clip the gradient.",
        ),
        Curve(
            "Margin",
            "margin a token",
            {"margin": "rewards/margins"},
            "Reward of the real token minus that of the token which the opponent would write there, averaged over "
            f"what it may write, {_OF_TOKENS}. Zero where an iteration starts.",
            "It grows without end while the held-out NLL rises: raise beta or lower the learning rate. It stays at "
            "zero: nothing is learned.",
        ),
        Curve(
            "Rewards",
            "reward a token",
            {"real": "rewards/real", "generated": "rewards/generated"},
            "Beta times what the policy has gained in log-probability over the opponent, on real tokens and on those "
            "that the opponent would write in their place. Above zero they have become more likely.",
            "Real rewards far below zero mean that the policy unlearns the data.",
        ),
        Curve(
            "Log-probabilities",
            "nats a token",
            {"real": "logps/real", "generated": "logps/generated"},
            f"How likely the policy finds real tokens, and those that the opponent would write there, {_OF_TOKENS}.",
            "Real ones fall through the whole run: see the rewards.",
        ),
        Curve(
            "Accuracy",
            "share of tokens",
            {"accuracy": "rewards/accuracies"},
            "How often the real token has the higher reward than what the opponent would write there; a tie counts "
            "one half.",
            "At 1 early and for long: the rows are learned by heart. At one half throughout: nothing is left to tell "
            "apart, or the learning rate is too low.",
        ),
    ],
    "sft": [
        Curve(
            "Loss",
            "nats",
            {"loss": "loss"},
            "The mean negative log-likelihood of the real responses of an update, by default per token.",
            "It jumps or is NaN: lower the learning rate, or clip the gradient. It falls far below the held-out NLL "
            "per token: the rows are learned by heart.",
        ),
    ],
    "ppo": [
        Curve(
            "Loss",
            "loss",
            {"loss": "loss", "policy": "loss/policy", "critic": "loss/value"},
            "The clipped ratio loss of an update, and that of the critic. Its level says little: the reward does.",
            "The critic's grows from iteration to iteration: the returns change faster than it learns. NaN: lower the "
            "learning rate.",
        ),
    ],
    "dpo": [
        Curve(
            "Loss",
            "loss",
            {"loss": "loss"},
            "How well the policy tells chosen from rejected responses, against the reference. It starts at ln 2 = "
            "0.693 with the logistic loss, because policy and reference are the same there.",
            "It falls to 0 while that of held-out pairs rises: the pairs are learned by heart.",
        ),
        Curve(
            "Margin",
            "margin",
            {"margin": "rewards/margins"},
            f"Reward of the chosen minus that of the rejected response, {_PAIRS}. Zero at the start.",
            "It grows without end: the policy leaves the reference. Raise beta, or lower the learning rate.",
        ),
        Curve(
            "Rewards",
            "reward",
            {"chosen": "rewards/real", "rejected": "rewards/generated"},
            "Beta times what the policy has gained in log-probability over the reference. Above zero a response has "
            "become more likely.",
            "Both fall: the loss asks for their difference alone. Expected to some extent; where the chosen ones are "
            "to stay likely, take DpopLoss or nll_weight.",
        ),
        Curve(
            "Log-probabilities",
            "nats a response",
            {"chosen": "logps/real", "rejected": "logps/generated"},
            "How likely the policy finds the responses of an update, as sums over their tokens.",
            "Chosen ones fall through the whole run: see the rewards.",
        ),
        Curve(
            "Accuracy",
            "share of pairs",
            {"accuracy": "rewards/accuracies"},
            "In how many pairs the chosen response has the higher reward; a tie counts one half.",
            "No higher than how often the longer response is the chosen one: length may be all that is learned.",
        ),
    ],
    "reward": [
        Curve(
            "Loss",
            "loss",
            {"loss": "loss"},
            "How well the scores of two responses say which is better. It starts at ln 2 = 0.693, where all scores are "
            "equal.",
            "It falls to 0 while held-out accuracy stands still: the pairs are learned by heart.",
        ),
        Curve(
            "Margin",
            "score",
            {"margin": "rewards/margins"},
            f"Score of the better minus that of the other response, {_PAIRS}.",
            "It grows without end: scores have no scale of their own, so see model.centring.",
        ),
        Curve(
            "Rewards",
            "score",
            {"better": "rewards/real", "other": "rewards/generated"},
            "The mean scores of the better and of the other responses of an update.",
            "Both drift far from 0: only their difference is learned, so see model.centring.",
        ),
        Curve(
            "Accuracy",
            "share of pairs",
            {"accuracy": "rewards/accuracies"},
            "In how many pairs of an update the better response has the higher score; a tie counts one half.",
            "At 1 while held-out accuracy stands still: the pairs are learned by heart.",
        ),
    ],
}
#: What stands in the place of a game's curve, where another kind of run means something else by it; by kind and title.
_INSTEAD = {(kind, curve.title): curve for kind, curves in _UNLIKE_A_GAME.items() for curve in curves}

_SHARES = Curve(
    "Shares of generated responses",
    "share",
    {"cut at the length cap": "generated_clipped_share", "identical": "identical_share", "empty": "empty_share"},
    "How many generated responses were cut at the length cap, equal the real one, or are empty.",
    "Many are cut: the opponent does not know how to stop, or max_new_tokens is small. Many are empty: see the prompt "
    "template. Nearly all are identical: the game is at its end on this data.",
)
_SHARES_OF_ROLLOUTS = Curve(
    "Shares of sampled responses",
    "share",
    {
        "cut at the length cap": "completions/cut",
        "distinct": "completions/distinct",
        "groups with equal rewards": "groups/flat",
        "without a reward": "reward/none",
    },
    "How many sampled responses were cut, differ from each other, come in groups that teach nothing, or have no "
    "reward.",
    "Distinct falls to a third of what it was: the policy explores little. Most groups are flat: the prompts are too "
    "easy or too hard.",
)
_LENGTHS = Curve(
    "Response lengths",
    "tokens",
    {"real": "real_mean_length", "generated": "generated_mean_length", "sampled": "completions/mean_length"},
    "Mean length of real and of generated responses.",
    "They drift apart: length alone tells real from generated, and the policy may learn only that.",
)
#: Over the iterations, from what was counted of their pairs or responses.
_BY_ITERATION = {"fit": (_LENGTHS, _SHARES), "ppo": (_LENGTHS, _SHARES_OF_ROLLOUTS)}


@dataclass(frozen=True)
class Drawn:
    """A chart on the page, with its words."""

    svg: str
    meaning: str
    sick: str


def draw_evaluations(record: Record) -> list[Drawn]:
    """An interval of 95 % for each evaluated task."""
    rows = []
    for where, evaluation in record.evaluations.items():
        for task, found in as_dict(evaluation.get("tasks")).items():
            value, error = as_number(as_dict(found).get("value")), as_number(as_dict(found).get("stderr"))
            if value is not None:
                half = 1.96 * (error or 0.0)
                rows.append((f"{task}, {where}", value, value - half, value + half))
    if not rows:
        return []
    svg = interval_chart(rows[:40], "Evaluation", "value with its 95 % interval", zero_line=None)
    return [
        Drawn(
            svg,
            "What was measured on each task, with an interval of 95 %: values whose intervals overlap may "
            "differ by chance.",
            "",
        )
    ]


def draw_all(record: Record, others: Mapping[str, Record], many: int) -> tuple[list[Drawn], list[Drawn]]:
    """The charts of a run, and those of metrics that this package does not know, which callbacks of a user have logged.

    Args:
        record: Of the run.
        others: Runs whose curves are drawn over it, by their names.
        many: The most charts of unknown metrics.
    """
    marks = _marks_of(record)
    drawn = []
    for named in CURVES:
        curve = _INSTEAD.get(("tokens" if record.by_token else record.kind, named.title), named)
        series = {name: record.metrics[metric] for name, metric in curve.metrics.items() if metric in record.metrics}
        if curve is _NLL and not series:
            series = {name: points for name, points in _nll_of_summaries(record).items() if points}
        over = _overlays(curve, record, others)
        if not series or (not over and all(len(points) < 2 for points in series.values())):
            continue
        if over:
            one = len(curve.metrics) == 1 or len(series) == 1
            series = {record.name if one else f"{record.name}, {name}": points for name, points in series.items()}
        drawn.append(_draw(curve, {**series, **over}, "updates", _guides(curve, record), marks))
    if len(record.iterations) > 1 or others:
        for curve in _BY_ITERATION.get(record.kind, ()):
            series = {name: _by_iteration(record, key) for name, key in curve.metrics.items()}
            series = {name: points for name, points in series.items() if points}
            if series and max(map(len, series.values())) > 1:
                drawn.append(_draw(curve, series, "iteration", None, ()))
    known = {
        metric
        for curve in (*CURVES, *_INSTEAD.values(), _SHARES, _SHARES_OF_ROLLOUTS)
        for metric in curve.metrics.values()
    }
    unknown = [name for name in sorted(record.metrics) if name not in known and not name.startswith(_DOUBLE)]
    unknown = [name for name in unknown if len(record.metrics[name]) > 1][:many]
    return drawn, [Drawn(_chart({n: record.metrics[n]}, n, "updates", n), "", "") for n in unknown]


#: Metrics that say what others here say: an epoch's means, TRL's names, what was counted of pairs.
_DOUBLE = (
    *("epoch/", "logps/", "rewards/", "completions/", "pairs/", "iteration", "val/nll_per_token", "groups/", "reward/"),
    *("val/cut", "val/mean_length", "val/margin", "val/length_correlation", "sampler/", "val/other_nll_per_token"),
)


def _draw(
    curve: Curve,
    series: Mapping[str, Points],
    x_label: str,
    guides: Mapping[str, float] | None,
    marks: Sequence[tuple[float, str]],
) -> Drawn:
    svg = _chart(series, curve.title, x_label, curve.unit, guides=guides, marks=marks)
    return Drawn(svg, curve.meaning, curve.sick)


def _guides(curve: Curve, record: Record) -> dict[str, float] | None:
    """The line of ln 2, where the loss begins there."""
    first = next((as_number(summary.get("first_loss")) for summary in record.summaries), None)
    begins = curve.title == "Loss" and record.kind in ("fit", "dpo", "reward") and first is not None
    return {"ln 2": math.log(2)} if begins and abs((first or 0.0) - math.log(2)) < 0.1 else None


def _overlays(curve: Curve, record: Record, others: Mapping[str, Record]) -> dict[str, Points]:
    found = {}
    for label, other in others.items():
        if not curve.overlays and (other.kind, other.by_token) != (record.kind, record.by_token):
            continue
        metrics = {name: metric for name, metric in curve.metrics.items() if metric in other.metrics}
        for name, metric in metrics.items():
            found[label if len(metrics) == 1 else f"{label}, {name}"] = other.metrics[metric]
        if curve is _NLL and not metrics:
            found[label] = _nll_of_summaries(other)["held-out NLL"]
    return {name: points for name, points in found.items() if points}


def _nll_of_summaries(record: Record) -> dict[str, Points]:
    """The held-out NLL at the start and after each iteration, where it was not logged."""
    values = [(0.0, as_number(record.start.get("val/nll")))]
    updates = 0.0
    for summary in record.summaries:
        updates += as_number(summary.get("updates")) or 0.0
        values.append((updates, as_number(summary.get("val_nll"))))
    return {"held-out NLL": [(x, y) for x, y in values if y is not None]}


def _by_iteration(record: Record, key: str) -> Points:
    values = [(float(i.number), as_number(i.statistics.get(key))) for i in record.iterations]
    return [(number, value) for number, value in values if value is not None]


def _marks_of(record: Record) -> list[tuple[float, str]]:
    """Where iterations begin, in updates; of many, none is marked."""
    if not 1 < len(record.iterations) <= 12:
        return []
    marks: list[tuple[float, str]] = []
    updates = 0.0
    for iteration in record.iterations:
        marks.append((updates, str(iteration.number) if marks else f"iteration {iteration.number}"))
        updates += as_number(as_dict(iteration.summary).get("updates")) or 0.0
    return marks
