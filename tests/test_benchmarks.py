"""The benchmarks' own parts: what everybody works on, and what the report says. Nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import report, results, rounds
from benchmarks.flops import least_flops, least_generation_flops
from benchmarks.models import Shape
from benchmarks.results import Results, expected_minutes, keep, shown
from benchmarks.workload import Lengths, make_exchanges, read_pairs, write_workload
from spin_lightning import SyntheticDataModule
from spin_lightning.data.encoding import Encoder
from spin_lightning.models import cpu_memory
from tests.helpers import byte_tokenizer


def count_words(text: str) -> int:
    return len(text.split())


def test_prompts_and_answers_have_the_lengths_asked_for() -> None:
    exchanges = make_exchanges([Lengths()] * 400, count_words, template_tokens=8)
    prompts = sorted(8 + count_words(exchange.prompt) for exchange in exchanges)
    answers = sorted(count_words(exchange.real) for exchange in exchanges)
    assert median(prompts) == pytest.approx(128, rel=0.15)
    assert median(answers) == pytest.approx(100, rel=0.15)
    assert answers[-1] <= 512
    assert prompts[-1] > 3 * median(prompts)


def test_our_shuffle_trains_on_the_pairs_in_the_order_of_the_file(tmp_path: Path) -> None:
    encoder = Encoder(byte_tokenizer())
    exchanges = make_exchanges([Lengths(60, 30, spread=0.3)] * 6, len, template_tokens=30)
    folder = write_workload("six", tmp_path, exchanges, encoder, batch_size=2)
    data = SyntheticDataModule(str(folder / "rows.jsonl"), val_fraction=0, max_prompt_tokens=10**6)
    data._load_tokenizer = byte_tokenizer  # type: ignore[method-assign,assignment]
    data.setup()
    loader = data.train_dataloader()
    trained_on = [data.prompts[place].prompt_ids for place in loader.sampler]
    assert trained_on == [pair["prompt_ids"] for pair in read_pairs(str(folder))]


def test_least_work_counts_a_prompt_once_and_the_head_on_answers_only() -> None:
    shape = Shape(hidden=4, layers=1, heads=2, kv_heads=2, intermediate=8, vocabulary=10)
    # matrices of a layer: 4 of 4 x 4 and 3 of 4 x 8 = 160 weights; 5 + 2 + 3 tokens through them, 5 answer tokens
    # through the head
    linear, head = 2 * 160 * 10, 2 * 10 * 4 * 5
    attention = 4 * 4 * ((5 + 2) ** 2 / 2 + 3 * 5 + 3 * 3 / 2)
    pair = {"prompt_ids": [0] * 5, "chosen_ids": [0] * 2, "rejected_ids": [0] * 3}
    assert least_flops([pair], shape) == 3 * (linear + head + attention)


def test_least_work_of_responses_counts_what_prompts_share_once() -> None:
    shape = Shape(hidden=4, layers=1, heads=2, kv_heads=2, intermediate=8, vocabulary=10)
    # 5 tokens of the first prompt, one more of the second, none of its repetition; of 3 + 1 + 2 sampled tokens the last
    # of each response is never read, and both first tokens of the repeated prompt come of the same logits
    prompts, lengths = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 4, 6]], [3, 1, 2]
    linear, head = 2 * 160 * (6 + 3), 2 * 10 * 4 * (2 + 3)
    attention = 4 * 4 * (5**2 / 2 + (5**2 - 4**2) / 2 + 2 * (5 + 3 / 2) + 0 + 1 * (5 + 2 / 2))
    assert least_generation_flops(prompts, lengths, shape) == linear + head + attention


def test_every_contender_gets_the_allocator_s_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[int, int] = {}
    monkeypatch.setattr(cpu_memory.sys, "platform", "linux")
    monkeypatch.setattr(cpu_memory.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=given.__setitem__))
    cpu_memory.keep_freed_memory()
    wanted = {"MALLOC_TRIM_THRESHOLD_": given[-1], "MALLOC_TOP_PAD_": given[-2], "MALLOC_MMAP_THRESHOLD_": given[-3]}
    assert {name: int(value) for name, value in rounds.ALLOCATOR.items()} == wanted
    assert len(given) == 3


def test_a_contender_that_fails_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []

    class Resident:
        def __init__(self, contender: rounds.Contender, threads: int, variables: dict[str, str]) -> None:
            self.name, self.turns = contender.name, 0
            if self.name == "does not start":
                raise rounds.Failed("no such file")

        def round(self, is_last: bool) -> dict[str, float]:
            self.turns += 1
            if self.name == "dies" and self.turns == 3:
                raise rounds.Failed("killed by signal 9")
            return {"seconds": float(self.turns), "peak_mib": 1.0}

        def stop(self) -> None:
            stopped.append(self.name)

    monkeypatch.setattr(rounds, "Resident", Resident)
    contenders = [rounds.Contender(name, "a_module") for name in ("does not start", "dies", "works")]
    records = rounds.play(contenders, rounds=2, warm_up=1)
    assert [record.get("failed") for record in records] == ["no such file", "killed by signal 9", None]
    assert [[sample["seconds"] for sample in record["samples"]] for record in records] == [[], [2.0], [2.0, 3.0]]
    assert stopped == ["dies", "works"]


def record(name: str, *seconds: float, settings: dict[str, Any] | None = None, **more: object) -> dict[str, Any]:
    samples = [{"seconds": second, "peak_mib": 2048.0, "system_seconds": 0.0, **more} for second in seconds]
    return {"name": name, "settings": settings or {}, "environment": "", "samples": samples}


def products(speed: float = 2e12) -> dict[str, Any]:
    return record("matrix products alone", 1.0, 1.0, flops_per_second={"LM head": speed, "attention key": speed / 2})


HERE = {"processor": "a processor", "cores": 2, "bfloat16_units": ["amx_bf16"], "memory_gib": 24, "gpu": None}
FACTS = {
    "measured_at": "2026-01-02T03:04:05+00:00",
    "minutes": 1.0,
    "load_before": 0.0,
    "command": "python -m benchmarks.run",
    "threads": 1,
    "machine": HERE,
    "versions": {"torch": "2"},
}
LENGTHS = {"median": 1, "p90": 2, "most": 3}
WORKLOAD = {"pairs": 8, "prompt": LENGTHS, "real": LENGTHS, "generated": LENGTHS}
STEP = {
    **FACTS,
    "contenders": [
        record("TRL compiled", 40.0, 60.0, settings={"trl": {"torch_compile": True}}),
        record("spin_lightning, bf16-mixed", 10.0, 12.0, settings={"precision": "bf16-mixed"}),
        record("spin_lightning, bf16-true", 8.0, 10.0, settings={"precision": "bf16-true"}),
        record("TRL in bfloat16", 32.0, 30.0, settings={"trl": {"model_init_kwargs": {"dtype": "bfloat16"}}}),
        products(),
        {**record("TRL, broken"), "failed": "out of memory"},
    ],
    "workload": WORKLOAD,
    "least_flops": [1e13, 1.2e13],
}
GROWING = {
    **FACTS,
    "contenders": [record("TRL compiled", 2.0, 4.0), record("spin_lightning, bf16-true", 1.0, 1.5)],
    "points": [64, 128],
}
GENERATION = {
    **FACTS,
    "contenders": [
        record("transformers generate, 64 sorted", 10.0, tokens=500),
        record("ContinuousGenerator, 64 slots", 2.0, 4.0, tokens=400, least_flops=2e12),
        record("vLLM for CPU, 64", 1.0, 1.0, tokens=200, least_flops=1e12),
        products(),
    ],
    "prompts": 16,
    "answers_per_prompt": 4,
}


def a_run(name: str, seconds: float, compiling: float) -> dict[str, Any]:
    phases = {"generate": 10.0, "score": 5.0, "train": seconds - 15}
    return record(name, seconds, phases=phases, compile_seconds=compiling, tokens=100, updates=8)


ITERATION = {
    **FACTS,
    "contenders": [a_run("generate + TRL compiled", 400.0, 150.0), a_run("spin_lightning, bf16-mixed", 50.0, 0.0)],
    "prompts": 16,
}


def elsewhere(section: dict[str, Any], processor: str, **more: object) -> dict[str, Any]:
    return {**section, "machine": {**HERE, "processor": processor, **more}}


def kept(*results: tuple[str, dict[str, Any], bool]) -> Results:
    made: Results = {}
    for section, result, is_brief in results:
        keep(made, section, {**result, "is_brief": is_brief}, is_brief)
    return made


def page_of(results: Results) -> str:
    return report.with_tables((report.DOCS / "performance.md").read_text(), results)


def test_report_states_samples_medians_spreads_ratios_shares_and_failures() -> None:
    results = kept(("step", STEP, False), ("prompt_length", GROWING, False))
    text = page_of(results)
    assert "**a processor, amx_bf16**, 2026-01-02: peak 2,000 GFLOP a CPU second." in text
    assert "| contender | samples | CPU seconds a step | times faster, same dtype | times faster than TRL comp" in text
    assert "| TRL compiled | 2 | 50.0 (40.0 to 60.0) | - | 1.00 (1.00 to 1.00) | 11% | 2.0 |" in text
    # 1e13 operations in 10 s and 1.2e13 in 12 s, of a peak of 2e12 a second
    mixed = "4.50 (4.00 to 5.00)"
    assert f"| spin_lightning, bf16-mixed | 2 | 11.0 (10.0 to 12.0) | {mixed} | {mixed} | 50% | 2.0 |" in text
    # against the peer with weights in bfloat16 first: 32 / 8 and 30 / 10
    true = "3.50 (3.00 to 4.00) | 5.50 (5.00 to 6.00)"
    assert f"| spin_lightning, bf16-true | 2 | 9.0 (8.0 to 10.0) | {true} | 61% | 2.0 |" in text
    assert "Did not run: TRL, broken: `out of memory`." in text
    assert "**a processor, amx_bf16**, 2026-01-02: peak not measured." in text
    assert "| 128 | 1 | 4.00 | 2.0 | 1.50 | 2.0 |" in text
    assert report.with_tables(text, results) == text


def test_report_draws_every_machine_s_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sections = {"step": STEP, "several_answers": GENERATION, "iteration": ITERATION, "prompt_length": GROWING}
    results = kept(*((name, section, False) for name, section in sections.items()))
    keep(results, "step", elsewhere(STEP, "another"), is_brief=True)
    report.render(results, tmp_path / "performance.md")
    pictures = sorted(path.stem for path in tmp_path.glob("*.png") if path.stat().st_size > 10_000)
    assert pictures == [f"performance_{name}" for name in ("generation", "growth", "iteration", "step")]
    assert "**another, amx_bf16**" in (tmp_path / "performance.md").read_text()


def test_report_of_generation_compares_with_the_best_of_each_kind() -> None:
    text = page_of(kept(("several_answers", GENERATION, False)))
    head = "tokens a CPU second | times transformers generate, 64 sorted | times vLLM for CPU, 64 | share of peak"
    assert f"| contender | samples | {head} | peak GiB | tokens sampled |" in text
    ours = "150 (100 to 200) | 3.00 (2.00 to 4.00) | 0.75 (0.50 to 1.00) | 38% | 2.0 | 800"
    assert f"| ContinuousGenerator, 64 slots | 2 | {ours} |" in text
    assert "| vLLM for CPU, 64 | 2 | 200 (200 to 200) | 4.00 (4.00 to 4.00) | 1.00 (1.00 to 1.00) | 50% |" in text
    assert "16 prompts a round, 4 responses to each." in text


def test_report_of_an_iteration_says_what_compiling_took() -> None:
    text = page_of(kept(("iteration", ITERATION, False)))
    assert "| generate + TRL compiled | 10 | 5 | 385 | 150 | 400 | 100 | 8 | 2.0 |" in text
    assert "8.00 times faster than generate + TRL compiled, 5.00 times without what each spent compiling." in text


def test_report_says_where_rounds_that_count_were_spent_compiling() -> None:
    compiled = record("TRL compiled", 40.0, 60.0, compile_seconds=9.0)
    section = {**STEP, "contenders": [compiled]}
    assert "Compiling took 18 s of these rounds of TRL compiled." in report.step_table(section)
    settled = {**STEP, "contenders": [record("TRL compiled", 40.0, 60.0, compile_seconds=0.1)]}
    assert "Compiling" not in report.step_table(settled)


def test_machines_stand_side_by_side_and_each_keeps_its_newest() -> None:
    older = {**STEP, "measured_at": "2025-01-01T00:00:00+00:00"}
    results = kept(
        ("step", older, False),
        ("step", elsewhere(STEP, "another processor"), False),
        ("step", elsewhere(STEP, "a third", gpu="a GPU"), False),
        ("step", STEP, False),
    )
    assert list(results) == ["a processor, amx_bf16", "another processor, amx_bf16", "a GPU"]
    text = page_of(results)
    for machine in results:
        assert text.count(f"**{machine}**, 2026-01-02: peak 2,000 GFLOP a CPU second.") == 1
        assert text.count(f"**{machine}**, 2 cores, 24 GiB:") == 1
    assert "2025-01-01" not in text


def test_brief_results_show_only_where_their_machine_has_no_full_one() -> None:
    brief_day = "2026-02-02"
    brief = {**STEP, "measured_at": f"{brief_day}T00:00:00+00:00"}
    results = kept(("step", STEP, False), ("step", brief, True), ("step", elsewhere(brief, "another processor"), True))
    assert list(results["a processor, amx_bf16"]) == ["step", "brief step"]
    steps = shown(results, "step")
    assert [section["is_brief"] for section in steps.values()] == [False, True]
    text = page_of(results)
    assert f"**another processor, amx_bf16**, {brief_day}, brief measurement: peak 2,000 GFLOP" in text
    assert f"**a processor, amx_bf16**, {brief_day}" not in text


def test_a_result_in_which_nobody_worked_replaces_nothing() -> None:
    results = kept(("step", STEP, False))
    nobody = {**STEP, "contenders": [{**record("TRL compiled"), "failed": "no such file"}]}
    keep(results, "step", nobody)
    assert shown(results, "step")["a processor, amx_bf16"]["contenders"][0]["samples"]


def test_expected_minutes_are_those_of_the_last_time_here_or_else_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "machine", lambda: HERE)
    there = elsewhere({**STEP, "minutes": 7.0}, "another")
    assert expected_minutes(kept(("step", there, False), ("step", STEP, False)), "step", is_brief=False) == 1.0
    assert expected_minutes(kept(("step", there, False), ("step", STEP, True)), "step", is_brief=False) == 7.0
    assert expected_minutes(kept(("step", there, False)), "step", is_brief=True) is None


def test_the_page_shows_the_results_that_are_kept() -> None:
    """Neither can be edited without the other."""
    measured = json.loads((report.DOCS / "performance.json").read_text())
    page = report.DOCS / "performance.md"
    assert report.with_tables(page.read_text(), measured) == page.read_text()


def test_page_without_a_place_for_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for 'step'"):
        report.with_tables("no markers here", kept(("step", STEP, False)))
