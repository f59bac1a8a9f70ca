"""The exact study's own parts: its models against transformers, its distances against brute force, its arms against
the package's Trainer, and its page against its numbers.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import QUIET
from lightning import Trainer

from benchmarks import study_real_model
from benchmarks.study import __main__ as study
from benchmarks.study import report
from benchmarks.study.arms import ARMS, METHODS, Arm, Config, SelfPlay, Stack, is_valid, log_probs_of, train
from benchmarks.study.cells import Cell, Laboratory, Scale, forgotten_at
from benchmarks.study.languages import (
    ANSWER,
    ASK,
    END,
    FIRST_DIGIT,
    LANGUAGES,
    VOCABULARY,
    Language,
    Task,
    demonstrations,
    prompt_ids,
    response_ids,
)
from benchmarks.study.measure import Retention, TargetDistance
from benchmarks.study.stacked import Layout, Sample, Shape, StackedAdamW, logits, pack_weights, sample
from spin_lightning import (
    SelfPlay as Clock,
)
from spin_lightning import (
    SftLightningModule,
    SpinLightningModule,
    SyntheticDataModule,
    TokenSpinLoss,
    TransformersGenerator,
)
from spin_lightning.data.encoding import Encoder
from spin_lightning.demos import language as laboratory
from spin_lightning.generation.pair_store import PairStore

RULES = Task({"sorted": 0.6, "reversed": 0.3, "copied": 0.1})


def tiny(length: int = 2, hidden: int = 8, vocabulary: int = VOCABULARY) -> Language:
    shape = Shape(vocabulary, hidden=hidden, layers=1, heads=2)
    return Language(length, RULES, RULES, 0.1, Task({"copied": 1.0}), shape, pretraining_updates=3)


def random_weights(language: Language, count: int = 1) -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    return torch.randn(count, language.shape.num_weights, generator=noise) * 0.4


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_stack_gives_the_logits_of_each_of_its_models():
    models = [laboratory.make_model(laboratory.Language(), seed, hidden_size=32) for seed in (0, 1)]
    shape = Shape(14)
    weights = torch.stack([pack_weights(model.state_dict(), shape) for model in models])
    layout = Layout(6, responses=2, length=4)
    ids = torch.randint(0, 14, (2, 3, 6 + 2 * 3), generator=torch.Generator().manual_seed(0))
    found = logits(weights, shape, layout, ids)
    for place, model in enumerate(models):
        for response in range(2):
            alone = torch.cat([ids[place, :, :6], ids[place, :, 6 + 3 * response : 9 + 3 * response]], 1)
            with torch.no_grad():
                expected = model(alone).logits[:, 5:]
            torch.testing.assert_close(found[place, :, response], expected, atol=1e-5, rtol=1e-5)


def test_the_stacked_optimiser_is_adamw_with_a_learning_rate_a_model():
    start = random_weights(tiny(), 2)
    stacked = start.clone().requires_grad_()
    optimizer = StackedAdamW(stacked, torch.tensor([1e-2, 1e-3]))
    alone = [row.clone().requires_grad_() for row in start]
    others = [torch.optim.AdamW([row], lr=rate) for row, rate in zip(alone, (1e-2, 1e-3), strict=True)]
    for _ in range(3):
        stacked.cos().sum().backward()
        optimizer.step()
        for row, other in zip(alone, others, strict=True):
            other.zero_grad()
            row.cos().sum().backward()
            other.step()
    torch.testing.assert_close(stacked.detach(), torch.stack(alone).detach(), atol=1e-7, rtol=1e-6)


def test_samples_have_the_log_probs_of_the_forward_pass_and_follow_the_law():
    language = tiny(length=1)
    weights, layout = random_weights(language), Layout(3, responses=4000, length=2)
    prompts = prompt_ids([(3,)])[None]
    drawn = sample(weights, language.shape, layout, prompts, torch.ones(1), END, torch.Generator().manual_seed(0))
    one = Layout(3, 1, 2)
    first = logits(weights, language.shape, one, torch.cat([prompts, torch.full((1, 1, 1), 4)], 2))[0, 0, 0, 0]
    counts = drawn.ids[0, 0, :, 0].bincount(minlength=VOCABULARY) / 4000
    assert (counts - first.softmax(0)).abs().max() < 0.03
    for k in range(5):
        said = logits(weights, language.shape, one, torch.cat([prompts, drawn.ids[:, :, k, :1]], 2))[:, :, 0]
        expected = log_probs_of(said, drawn.ids[:, :, k]) * drawn.is_token[:, :, k]
        torch.testing.assert_close(drawn.log_probs[:, :, k], expected, atol=1e-5, rtol=1e-5)
    assert (drawn.is_token[0, 0, :, 1] == (drawn.ids[0, 0, :, 0] != END)).all()


# --- distances --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_distances_are_those_of_a_sum_over_every_string(temperature):
    language = tiny(length=2)
    weights = random_weights(language)
    prompts = [(1, 0), (2, 3), (4, 4)]
    found = TargetDistance(language, prompts).measure(weights, [temperature])
    strings = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=3)))
    expected = {"kl": 0.0, "reverse_kl": 0.0, "tv": 0.0, "valid": 0.0}
    for prompt in prompts:
        asked = prompt_ids([prompt]).expand(len(strings), -1)
        said = logits(weights, language.shape, Layout(4, 1, 3), torch.cat([asked, strings[:, :-1]], 1)[None])[0, :, 0]
        q = log_probs_of(said / temperature, strings).double().sum(1).exp()
        assert float(q.sum()) == pytest.approx(1, abs=1e-5)
        law = {tuple(response_ids([answer])[0].tolist()): p for answer, p in language.target.answers(prompt).items()}
        p = torch.tensor([law.get(tuple(string), 0.0) for string in strings.tolist()], dtype=torch.float64)
        assert float(p.sum()) == pytest.approx(1)
        right = p > 0
        valid = float(q[right].sum())
        expected["kl"] += float((p[right] * (p[right] / q[right]).log()).sum()) / 3
        expected["tv"] += float((p - q).abs().sum()) / 2 / 3
        expected["valid"] += valid / 3
        within = q[right] / valid
        expected["reverse_kl"] += (float((within * (within / p[right]).log()).sum()) - math.log(valid)) / 3
    for name, value in expected.items():
        assert float(found[name][0, 0]) == pytest.approx(value, abs=1e-4), name


def test_greedy_counts_the_prompts_whose_likeliest_tokens_make_a_valid_response():
    language = tiny(length=1)
    weights = random_weights(language)
    prompts = [(digit,) for digit in range(10)]
    found = float(TargetDistance(language, prompts).measure(weights, [1.0])["greedy"][0, 0])
    right = 0
    for prompt in prompts:
        ids = prompt_ids([prompt])[None]
        first = logits(weights, language.shape, Layout(3, 1, 1), ids)[0, 0, 0, 0].argmax()
        ids = torch.cat([ids, first.view(1, 1, 1)], 2)
        second = logits(weights, language.shape, Layout(3, 1, 2), ids)[0, 0, 0, 1].argmax()
        right += (int(first) - FIRST_DIGIT, int(second)) == (prompt[0], END)
    assert found == pytest.approx(right / 10)


def test_what_was_forgotten_is_the_whole_divergence_where_the_tree_is_whole_and_less_where_it_is_not():
    language = tiny(length=1)
    start, later = random_weights(language), random_weights(language, 2)[1:]
    prompts = [(3,), (7,)]
    whole = Retention(language, prompts, start[0], responses=14 * 15)
    found = float(whole.forgotten(whole.law(start), later))
    strings = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=2)))
    expected = 0.0
    for prompt in prompts:
        asked = prompt_ids([prompt], other=True).expand(len(strings), -1)
        ids = torch.cat([asked, strings[:, :1]], 1)[None]
        p, q = (
            log_probs_of(logits(weights, language.shape, Layout(3, 1, 2), ids)[0, :, 0], strings).double()
            for weights in (start, later)
        )
        is_over = strings[:, 0] == END  # what follows an end is not said, so that its strings share the first token's
        for log_probs, weights in ((p, start), (q, later)):
            said = logits(weights, language.shape, Layout(3, 1, 2), ids)[0, :, 0]
            ended = log_probs_of(said, strings)[is_over, 0].double() - math.log(VOCABULARY)
            log_probs[is_over, 0], log_probs[is_over, 1] = ended, 0.0
        p, q = p.sum(1), q.sum(1)
        expected += float((p.exp() * (p - q)).sum()) / 2
    assert found == pytest.approx(expected, abs=1e-4)
    part = Retention(language, prompts, start[0], responses=3)
    assert 0 < float(part.forgotten(part.law(start), later)) < found
    assert float(whole.forgotten(whole.law(start), start)) == pytest.approx(0, abs=1e-6)
    assert float(part.coverage(part.law(start))) < float(whole.coverage(whole.law(start))) <= 1


def test_what_was_forgotten_at_equal_gain_is_read_off_a_line_between_checkpoints():
    points = [(0, False), (8, False), (8, True), (16, False), (16, True)]
    run = points, [1.0, 0.8, 0.9, 0.4, 0.6], [0.0, 0.2, 0.1, 1.0, 0.4]
    # last weights: 0.2 + 0.25 * 0.8 = 0.4; averaged ones: 0.1 + (2 / 3) * 0.3 = 0.3
    assert forgotten_at(*run, gain=0.3) == pytest.approx(0.3)
    assert forgotten_at(*run, gain=0.5) == pytest.approx(0.8)  # averaged weights never get there
    assert forgotten_at(*run, gain=0.7) == math.inf


# --- data and arms ----------------------------------------------------------------------------------------------------


def test_a_fifth_of_the_demonstrations_is_wrong_and_none_is_held_out():
    language = LANGUAGES["shift"]
    held_out = set(demonstrations(language, 50, 0.0, 1, set())[0])
    prompts, answers = demonstrations(language, 50, 0.2, 1, held_out)
    assert sum(a not in language.target.answers(p) for p, a in zip(prompts, answers, strict=True)) == 10
    assert not held_out & set(prompts) and len(set(prompts)) == 50


def stack_of(language: Language, configs: list[Config], rows: int = 16) -> Stack:
    prompts, answers = demonstrations(language, rows, 0.0, 3, set())
    count = len(configs)
    asked, given = prompt_ids(prompts).expand(count, -1, -1), response_ids(answers).expand(count, -1, -1)
    return Stack(language, configs, asked, given, [0] * count, random_weights(language).repeat(count, 1))


def gradients(method: str, stack: Stack, responses: int = 0) -> torch.Tensor:
    weights = stack.start.clone().requires_grad_()
    loss = METHODS[method](Arm(method, (), responses), stack, torch.Generator().manual_seed(0))
    loss.begin(stack.start, [stack.batches()()])
    loss(weights, 0).sum().backward()
    assert weights.grad is not None
    return weights.grad


def test_token_level_self_play_begins_with_half_beta_times_the_gradient_of_sft():
    language = tiny(hidden=16)
    played = gradients("token", stack_of(language, [Config(1e-3, beta=beta) for beta in (1.0, 5.0, 20.0)]))
    (taught,) = gradients("sft", stack_of(language, [Config(1e-3)]))
    for row, beta in zip(played, (1.0, 5.0, 20.0), strict=True):
        torch.testing.assert_close(row, beta / 2 * taught, atol=1e-6 * beta, rtol=1e-3)


def test_sampled_self_play_begins_with_the_same_gradient_on_average():
    """With 512 responses to each prompt most of the noise is gone; K = 1 has a hundred times its square."""
    language = tiny(hidden=16)
    (played,) = gradients("spin", stack_of(language, [Config(1e-3, beta=4.0)]), responses=512)
    (taught,) = gradients("sft", stack_of(language, [Config(1e-3)]))
    assert torch.nn.functional.cosine_similarity(played, taught, 0) > 0.98
    assert float(played.norm() / taught.norm()) == pytest.approx(2, rel=0.05)


def test_a_valid_response_is_one_that_some_rule_gives():
    asked = prompt_ids([(2, 1)])[None]
    four = response_ids([(1, 2), (2, 1), (2, 2), (1, 1)])[None, None]
    drawn = Sample(four, torch.ones_like(four, dtype=torch.bool), torch.zeros(four.shape))
    assert is_valid(tiny(), asked, drawn).tolist() == [[[True, True, False, False]]]


def test_the_reward_arm_makes_valid_responses_likelier():
    language = tiny(length=1, hidden=16)
    stack = replace(stack_of(language, [Config(1e-2, beta=0.0)], rows=10))
    stack.prompts, stack.answers = stack.prompts.repeat(1, 2, 1), stack.answers.repeat(1, 2, 1)
    exact = TargetDistance(language, [(digit,) for digit in range(10)])
    valid = []
    train(
        Arm("reward", (), 16),
        stack,
        30,
        lambda _, weights, __: valid.append(float(exact.measure(weights)["valid"][0, -1])),
    )
    assert valid[-1] > 5 * valid[0]


def test_dropout_and_kl_to_start_are_those_of_each_run():
    language = tiny(hidden=16)
    configs = [Config(1e-2), Config(1e-2, kl_to_start=1.0), Config(1e-2, dropout=0.5)]
    last: list[torch.Tensor] = []
    stack = stack_of(language, configs)
    train(ARMS["SFT"], stack, 12, lambda _, weights, __: last.append(weights.clone()))
    alone: list[torch.Tensor] = []
    train(ARMS["SFT"], stack_of(language, configs[:1]), 12, lambda _, weights, __: alone.append(weights.clone()))
    torch.testing.assert_close(last[-1][:1], alone[-1], atol=1e-5, rtol=1e-4)
    moved = [(row - stack.start[0]).norm() for row in last[-1]]
    assert len({round(float(each), 4) for each in moved}) == 3

    def divergence(row: int) -> float:
        said, start = (
            logits(
                weights, language.shape, stack.layout(1), torch.cat([stack.prompts[:1], stack.answers[:1, :, :-1]], 2)
            ).log_softmax(-1)
            for weights in (last[-1][row][None], stack.start[:1])
        )
        return float((start.exp() * (start - said)).sum(-1).mean())

    assert divergence(1) < 0.8 * divergence(0)


# --- the harness against the package's Trainer ------------------------------------------------------------------------


@pytest.mark.no_cover
def test_sft_and_both_self_plays_end_where_the_packages_trainer_ends(tmp_path, monkeypatch):
    """Sixteen rows in one batch, so that no order decides. Sampled play gets what the package drew."""
    spoken = laboratory.Language(length=3)
    start = laboratory.save_start(spoken, tmp_path / "start", seed=0, hidden_size=32)
    rows = spoken.rows(spoken.draw_prompts(16, seed=0), seed=0)
    path = laboratory.write_rows(tmp_path / "rows.jsonl", rows)
    held_out = spoken.draw_prompts(12, seed=1)
    exact = laboratory.ExactDistance(spoken, held_out, Encoder(laboratory.make_tokenizer(spoken)))
    fixed = {"lr_schedule": "constant", "warmup_ratio": 0.0}

    def data() -> SyntheticDataModule:
        generator = TransformersGenerator(spoken.response_tokens, batch_size=64)
        return SyntheticDataModule(path, val_fraction=0.0, generator=generator, history=0, batch_size=16)

    sft = SftLightningModule(start, 3e-3, average="response", **fixed)
    Trainer(max_epochs=-1, max_steps=20, enable_checkpointing=False, **QUIET).fit(sft, data())
    clock = Clock(str(tmp_path / "game"), iterations=2, epochs=16, reset_optimizer=False)
    spin = SpinLightningModule(start, beta=5.0, learning_rate=3e-3, **fixed)
    Trainer(
        callbacks=[clock], max_epochs=32, reload_dataloaders_every_n_epochs=1, enable_checkpointing=False, **QUIET
    ).fit(spin, data())

    token = SpinLightningModule(
        start, beta=5.0, loss=TokenSpinLoss(temperature=2.0, top_k=14), learning_rate=3e-3, **fixed
    )
    second = Clock(str(tmp_path / "token"), iterations=2, epochs=16, reset_optimizer=False)
    Trainer(
        callbacks=[second], max_epochs=32, reload_dataloaders_every_n_epochs=1, enable_checkpointing=False, **QUIET
    ).fit(token, data())

    language = replace(tiny(length=3), shape=Shape(14))
    messages = [row["messages"] for row in rows]
    prompts, answers = ([tuple(map(int, each[side]["content"])) for each in messages] for side in (0, 1))
    weights = pack_weights(laboratory.make_model(spoken, 0, hidden_size=32).state_dict(), language.shape)[None]
    measure = TargetDistance(language, [tuple(map(int, prompt)) for prompt in held_out])

    def kl_after(method: str, updates: int) -> list[float]:
        config = Config(3e-3, beta=5.0, temperature=2.0 if method == "token" else 1.0)
        stack = Stack(language, [config], prompt_ids(prompts)[None], response_ids(answers)[None], [0], weights)
        kls: list[float] = []
        watch = lambda _, weights, __: kls.append(float(measure.measure(weights, [1.0])["kl"]))  # noqa: E731
        train(Arm(method, (config,), 1), stack, updates, watch)
        return kls

    kls = kl_after("sft", 20)
    assert kls[0] > kls[-1] + 1
    assert kls[-1] == pytest.approx(exact(sft.policy).kl, abs=2e-3)

    played = iter(
        [PairStore(clock.folder(number) / "pairs").read(["prompt_ids", "generated_ids"]) for number in (0, 1)]
    )

    def draw(self: SelfPlay, opponent: torch.Tensor, asked: torch.Tensor) -> Sample:
        pairs = {tuple(row["prompt_ids"]): row["generated_ids"] for row in next(played).to_pylist()}
        given = [pairs[tuple(prompt)] for prompt in asked[0].tolist()]
        longest = language.response_tokens
        ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in given])[None, :, None]
        is_token = torch.tensor([[place < len(ids) for place in range(longest)] for ids in given])[None, :, None]
        said = logits(opponent, language.shape, self.single, torch.cat([asked, ids[:, :, 0, :-1]], 2))
        return Sample(ids, is_token, log_probs_of(said, ids).detach() * is_token)

    monkeypatch.setattr(SelfPlay, "draw", draw)
    kls = kl_after("spin", 32)
    assert abs(kls[0] - kls[-1]) > 0.5
    assert kls[-1] == pytest.approx(exact(spin.policy).kl, rel=1e-2)


def test_token_ids_are_the_laboratorys():
    spoken = laboratory.Language(length=3)
    encoder = Encoder(laboratory.make_tokenizer(spoken))
    assert encoder.prompt_ids([{"role": "user", "content": "201"}]) == prompt_ids([(2, 0, 1)])[0].tolist()
    assert (1, 2, encoder.terminator_id) == (ASK, ANSWER, END)


# --- cells, and the page ----------------------------------------------------------------------------------------------


class Brief(Scale):
    """A scale of few updates."""

    def checkpoints(self, rows: int) -> tuple[int, ...]:
        return 8, 12


def test_a_cell_continues_where_it_stopped(tmp_path, monkeypatch):
    scale = Brief(seeds=(10, 11, 12), validation_prompts=4, test_prompts=4, other_prompts=2)
    monkeypatch.setattr("benchmarks.study.__main__.ARMS", {"SFT": ARMS["SFT"], "SPIN K=1": ARMS["SPIN K=1"]})
    place, cell, file = Laboratory(tiny(3), scale), Cell("tiny", 16, 0.2), tmp_path / "results.jsonl"
    study.run_cell(cell, place, file, arms=("SFT",))
    half = file.read_text()
    file.write_text(half + '{"cell": "tiny, N=16, 20% wrong", "arm": "SPI')  # a kill
    study.run_cell(cell, place, file, arms=("SFT", "SPIN K=1"))
    again = file.read_text()
    assert again.startswith(half)
    assert [key[1:] for key in study.read(file)] == [
        ("start", "confirm"),
        ("SFT", "tune"),
        ("SFT", "confirm"),
        ("SPIN K=1", "tune"),
        ("SPIN K=1", "confirm"),
    ]
    study.run_cell(cell, place, tmp_path / "whole.jsonl", arms=("SFT", "SPIN K=1"))

    def numbers(path: Path) -> list[dict]:
        return [{k: v for k, v in record.items() if k != "cpu_seconds"} for record in study.read(path).values()]

    assert numbers(file) == numbers(tmp_path / "whole.jsonl")
    report.keep(list(study.read(file).values()), tmp_path / "numbers.json")
    kept = report.read(tmp_path / "numbers.json")
    assert len(kept["cells"][cell.name]["SFT"]["confirm"]["results"]["kl"]["kl"]) == 3
    assert "| SPIN K=1 |" in report.cell_table(kept["cells"][cell.name])


def test_a_difference_counts_where_its_interval_leaves_zero_out():
    def cell(*kls: float) -> dict:
        arms = {"SFT": [1.0, 1.1, 1.2, 1.3, 1.4], "SPIN K=4": list(kls)}
        return {name: {"confirm": {"results": {"kl": {"kl": values}}}} for name, values in arms.items()}

    better = report.difference(cell(0.9, 0.99, 1.11, 1.2, 1.3), "SPIN K=4", report.COMPARED["kl"])
    assert better is not None and better[0] == pytest.approx(-0.1) and better[2:] == (5, 5)
    assert report.verdict(better) == "better"
    close = report.difference(cell(0.9, 1.3, 1.1, 1.4, 1.35), "SPIN K=4", report.COMPARED["kl"])
    assert close is not None and report.verdict(close) == "too close to call"
    assert report.difference(cell(1.0, 1.1), "SPIN K=4", report.COMPARED["kl"]) is None


def test_the_page_shows_the_tables_of_the_numbers():
    page = report.PAGE.read_text(encoding="utf-8")
    of_real_model = study_real_model.sections(json.loads(study_real_model.NUMBERS.read_text(encoding="utf-8")))
    assert of_real_model.keys() == {"real model 64", "real model 208"}
    assert report.filled(page, {**report.sections(report.read()), **of_real_model}) == page
    with pytest.raises(ValueError, match="no place for 'counts'"):
        report.filled("", {"counts": ""})


def test_the_numbers_are_json_that_everything_reads():
    json.loads(report.NUMBERS.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
