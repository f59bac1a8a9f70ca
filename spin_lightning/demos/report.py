"""The laboratory's table, sentences and picture. Nothing runs here, and no sentence says more than its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spin_lightning.demos.arms import REGIMES, Regime, Result, Settings

#: A rise of KL by no more than this many nats counts as flat.
FLAT = 0.1

#: A difference of KL by less than this many nats is too small for one seed: over seeds 0 to 3 such gaps had both signs.
CLOSE = 0.04


def tuned_sft(results: Sequence[Result], regime: Regime) -> Result | None:
    """The SFT arm with the least KL at any of its points, cut there: an oracle's learning rate and early stop."""
    arms = [result for result in results if result.arm.regime == regime and result.arm.beta is None]
    if not arms:
        return None
    chosen = min(arms, key=lambda result: result.best.distance.kl)
    return replace(chosen, points=chosen.points[: chosen.points.index(chosen.best) + 1])


def table(results: Sequence[Result]) -> str:
    """One line an arm, regime by regime."""
    header = f"{'arm':34} {'KL start':>8} {'best':>7} {'last':>7} {'TV last':>8} {'validity last':>13}"
    header += f" {'updates':>7} {'tokens':>8} {'seconds':>7}"
    lines = [header]
    for regime in REGIMES:
        arms = [(result.arm.name, result) for result in results if result.arm.regime == regime]
        if (tuned := tuned_sft(results, regime)) is not None:
            arms.append((f"SFT tuned, lr {tuned.arm.learning_rate:g}, stopped", tuned))
        lines += [f"{regime} rows"] if arms else []
        for name, result in arms:
            last = result.last
            lines.append(
                f"  {name:32} {result.start.distance.kl:8.3f} {result.best.distance.kl:7.3f} {last.distance.kl:7.3f} "
                f"{last.distance.total_variation:8.3f} {last.distance.validity:13.3f} "
                f"{last.updates:7d} {last.tokens:8d} {last.seconds:7.1f}"
            )
    return "\n".join(lines)


def conclusions(results: Sequence[Result]) -> list[str]:
    """Sentences that follow from the numbers, whichever way they go."""
    games = [result for result in results if result.arm.beta is not None]
    sentences = []

    def course(result: Result) -> str:
        start, best, last = (point.distance.kl for point in (result.start, result.best, result.last))
        return f"KL {start:.2f} -> best {best:.2f} -> last {last:.2f}"

    def rising(result: Result) -> str:
        verb = "overfitted, rising" if result.rise > FLAT else "stayed flat, rising"
        return f"{verb} by {result.rise:.2f} nats after its best ({course(result)})"

    def doubt(difference: float) -> str:
        return " (too close for one seed)" if abs(difference) < CLOSE else ""

    def named(chosen: Sequence[Result]) -> str:
        return (
            "; ".join(f"{result.arm.name}, {result.arm.regime} rows ({course(result)})" for result in chosen) or "none"
        )

    better = [result for result in games if result.last.distance.kl < result.start.distance.kl]
    worse = [result for result in games if result.last.distance.kl >= result.start.distance.kl]
    sentences.append(f"SPIN ended closer to the data than it started: {named(better)}.")
    sentences.append(f"SPIN ended farther from the data: {named(worse)}.")
    for low in games:
        for high in games:
            same = (low.arm.regime, low.arm.learning_rate) == (high.arm.regime, high.arm.learning_rate)
            if (
                same
                and low.arm.beta is not None
                and high.arm.beta is not None
                and low.arm.beta < 0.5
                and high.arm.beta == 5
            ):
                verdict = "overshot" if low.last.distance.kl > low.start.distance.kl + FLAT else "did not overshoot"
                sentences.append(
                    f"beta {low.arm.beta:g} {verdict} at lr {low.arm.learning_rate:g} "
                    f"({low.arm.regime} rows): {course(low)}; "
                    f"beta {high.arm.beta:g} at the same lr: {course(high)}."
                )
    for regime in REGIMES:
        played = [result for result in games if result.arm.regime == regime]
        trained = [result for result in results if result.arm.regime == regime and result.arm.beta is None]
        tuned = tuned_sft(results, regime)
        if tuned is None or not played:
            continue
        for control in trained:
            rivals = [game for game in played if game.arm.learning_rate == control.arm.learning_rate]
            if not rivals:
                continue
            rival = min(rivals, key=lambda result: result.last.distance.kl)
            then = next(point for point in control.points if point.updates == rival.last.updates)
            difference = rival.last.distance.kl - then.distance.kl
            winner = "SPIN" if difference < 0 else "SFT"
            sentences.append(
                f"{regime} rows, lr {control.arm.learning_rate:g}, after {then.updates} updates of each: "
                f"{winner} was better{doubt(difference)}, KL {rival.last.distance.kl:.3f} for SPIN beta "
                f"{rival.arm.beta:g} and {then.distance.kl:.3f} for SFT; SPIN processed "
                f"{rival.last.tokens / then.tokens:.1f} times the tokens. "
                f"Over its whole run SPIN {rising(rival)}, and SFT {rising(control)}."
            )
        calmest = [min(side, key=lambda result: result.last.distance.kl) for side in (played, trained)]
        spin, sft = (result.last.distance.kl for result in calmest)
        sentences.append(
            f"{regime} rows, last values, each method with the settings that end best and no early stop: "
            f"{'SPIN' if spin < sft else 'SFT'} was better{doubt(spin - sft)}, KL {spin:.3f} for {calmest[0].arm.name} "
            f"and {sft:.3f} for {calmest[1].arm.name}."
        )
        best = min(played, key=lambda result: result.best.distance.kl)
        gap = best.best.distance.kl - tuned.best.distance.kl
        verdict = "beat" if gap > 0 else "did not beat"
        search = sum(result.last.tokens for result in trained)
        sentences.append(
            f"{regime} rows, best values: tuned SFT (lr {tuned.arm.learning_rate:g}, stopped after "
            f"{tuned.last.updates} updates) {verdict} the best SPIN ({best.arm.name}){doubt(gap)}: "
            f"KL {tuned.best.distance.kl:.3f} against {best.best.distance.kl:.3f}, "
            f"with {tuned.last.tokens} tokens against {best.best.tokens}; the search over all SFT arms took {search}."
        )
    return sentences


def draw(results: Sequence[Result], settings: Settings, path: Path) -> None:
    """KL over updates, a panel a regime: SPIN coloured by beta, SFT grey and dashed, tuned SFT a star."""
    from matplotlib.figure import Figure

    regimes = [regime for regime in REGIMES if any(result.arm.regime == regime for result in results)]
    figure = Figure(figsize=(6.4 * len(regimes), 6), layout="constrained")
    colours = {0.1: "tab:red", 1.0: "tab:blue", 5.0: "tab:green"}
    rates = sorted({result.arm.learning_rate for result in results})
    for axes, regime in zip(figure.subplots(1, len(regimes), squeeze=False)[0], regimes, strict=True):
        arms = [result for result in results if result.arm.regime == regime]
        for result in sorted(arms, key=lambda result: (result.arm.beta or 0, result.arm.learning_rate)):
            updates = [point.updates for point in result.points]
            kls = [point.distance.kl for point in result.points]
            rank, beta = rates.index(result.arm.learning_rate), result.arm.beta
            mark = "ov^Ds"[rank % 5]  # one marker a learning rate, in both panels
            if beta is None:
                grey = str(0.75 * (1 - (rank + 1) / len(rates)))
                axes.plot(updates, kls, f"{mark}--", color=grey, markersize=4, linewidth=1.2, label=result.arm.name)
            else:
                colour = colours.get(beta, "tab:purple")
                axes.plot(updates, kls, f"{mark}-", color=colour, markersize=6, linewidth=2.2, label=result.arm.name)
        if (tuned := tuned_sft(results, regime)) is not None:
            axes.plot(
                tuned.last.updates,
                tuned.last.distance.kl,
                "*",
                color="gold",
                markeredgecolor="black",
                markersize=16,
                zorder=5,
                label="SFT tuned: best of all lr, early stopped",
            )
        scale = settings.scale(regime)
        axes.set_title(f"{scale.num_rows} rows, K = {scale.answers_per_prompt}, {scale.iterations} iterations")
        axes.set_xlabel("optimiser updates")
        axes.set_ylabel("exact KL(p_data, p_theta) on held-out prompts, nats")
        axes.set_yscale("log")
        ticks = [
            tick
            for tick in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50)
            if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]
        ]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
