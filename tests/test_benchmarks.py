"""The benchmarks' own parts: what everybody works on, and what the report says. Nothing is timed here."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from benchmarks import report
from benchmarks.flops import least_flops
from benchmarks.models import Shape
from benchmarks.workload import Lengths, make_exchanges, read_pairs, write_workload
from spin_lightning import SyntheticDataModule
from spin_lightning.data.encoding import Encoder
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


def record(name: str, *seconds: float, **more: object) -> dict[str, object]:
    samples = [{"seconds": second, "peak_mib": 2048.0, "system_seconds": 0.0, **more} for second in seconds]
    return {"name": name, "settings": {}, "environment": "", "samples": samples}


FACTS = {
    "measured_at": "2026-01-02T03:04:05+00:00",
    "minutes": 1.0,
    "load_before": 0.0,
    "command": "python -m benchmarks.run",
    "threads": 1,
    "machine": {"processor": "a processor", "cores": 2, "bfloat16_units": [], "memory_gib": 24, "gpu": None},
    "versions": {"torch": "2"},
}
LENGTHS = {"median": 1, "p90": 2, "most": 3}
RESULTS = {
    "step": {
        **FACTS,
        "contenders": [
            record("TRL, its defaults", 40.0, 60.0),
            record("spin_lightning, bf16-true", 10.0, 12.0),
            record("matrix products alone", 1.0, 1.0, flops_per_second={"LM head": 2e12}),
            {**record("TRL, broken"), "failed": "out of memory"},
        ],
        "workload": {"pairs": 8, "prompt": LENGTHS, "real": LENGTHS, "generated": LENGTHS},
        "least_flops": [1e13, 1.2e13],
    },
    "prompt_length": {
        **FACTS,
        "contenders": [record("TRL, its best settings", 2.0, 4.0), record("spin_lightning", 1.0, 1.5)],
        "points": [64, 128],
    },
}


def test_report_states_medians_spreads_ratios_and_failures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "performance.md"
    report.render(RESULTS, path)
    text = path.read_text()
    assert "| TRL, its defaults | 50.0 (40.0 to 60.0) | 1.00 (1.00 to 1.00) | 2.0 |" in text
    assert "| spin_lightning, bf16-true | 11.0 (10.0 to 12.0) | 4.50 (4.00 to 5.00) | 2.0 |" in text
    assert "spin_lightning, bf16-true 50%" in text  # 1e13 operations in 10 s, of a peak of 2e12 a second
    assert "Did not run: TRL, broken: `out of memory`." in text
    assert "| 128 | 4.00 | 2.0 | 1.50 | 2.0 |" in text
    assert (tmp_path / "performance_step.png").stat().st_size > 10_000
    report.render(RESULTS, path)
    assert path.read_text() == text


def test_page_without_a_place_for_a_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "performance.md"
    path.write_text("no markers here")
    with pytest.raises(ValueError, match="no place for 'step'"):
        report.render(RESULTS, path)
