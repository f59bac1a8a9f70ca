"""The known-language laboratory: exact distances against brute force, the game against the theory, and its report."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import QUIET
from lightning import Trainer
from torch.nn import functional as F

from spin_lightning import (
    SelfPlay,
    SftLightningModule,
    SpinLightningModule,
    SyntheticDataModule,
    TransformersGenerator,
    UserError,
)
from spin_lightning.data.encoding import Encoder
from spin_lightning.demos.arms import Arm, Point, Result, Scale, Settings
from spin_lightning.demos.known_language import Laboratory, play
from spin_lightning.demos.language import (
    Distance,
    ExactDistance,
    Language,
    make_model,
    make_tokenizer,
    save_start,
    write_rows,
)
from spin_lightning.demos.report import conclusions, table, tuned_sft
from spin_lightning.generation.pair_store import PairStore
from spin_lightning.models.batches import pack
from spin_lightning.models.loading import load_policy
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.stages.export import ExportPolicy


def all_answers(language: Language, encoder: Encoder, longest: int) -> list[list[int]]:
    """Every terminated answer of up to ``longest`` tokens over the whole vocabulary, control tokens included."""
    tokens = [token for token in range(len(encoder.tokenizer)) if token != encoder.terminator_id]
    return [
        [*answer, encoder.terminator_id]
        for length in range(longest)
        for answer in itertools.product(tokens, repeat=length)
    ]


# --- the language -----------------------------------------------------------------------------------------------------


def test_answers_merge_the_probabilities_of_rules_that_agree():
    language = Language()
    assert language.answers("3120") == {"0123": 0.6, "0213": 0.3, "3120": 0.1}
    assert language.answers("0123") == {"0123": 0.7, "3210": 0.3}  # copied is sorted
    assert language.answers("3210") == {"0123": 0.9, "3210": 0.1}  # reversed is sorted
    assert language.answers("2112") == {"1122": 0.6, "2112": 0.4}  # reversed is copied
    assert language.answers("5555") == {"5555": 1.0}


def test_p_data_adds_up_to_one_on_every_prompt():
    language = Language(digits="0123", length=3)
    prompts = language.prompts()
    assert len(prompts) == len(set(prompts)) == language.num_prompts == 64
    for prompt in prompts:
        assert sum(language.answers(prompt).values()) == pytest.approx(1, abs=1e-9)


def test_rows_follow_p_data():
    language = Language(length=3)
    answers = [row["messages"][1]["content"] for row in language.rows(["201"] * 4000, seed=0)]
    for answer, probability in language.answers("201").items():
        four_sigma = 4 * math.sqrt(probability * (1 - probability) / 4000)
        assert answers.count(answer) / 4000 == pytest.approx(probability, abs=four_sigma)


def test_drawn_prompts_are_different_repeatable_and_not_held_out():
    language = Language(digits="0123", length=3)
    held_out = language.draw_prompts(20, seed=0)
    drawn = language.draw_prompts(44, seed=1, without=held_out)
    assert len(set(drawn)) == 44 and not set(drawn) & set(held_out)
    assert held_out == language.draw_prompts(20, seed=0)
    with pytest.raises(UserError, match="45 prompts were asked for, but 44 are left"):
        language.draw_prompts(45, seed=1, without=held_out)


@pytest.mark.parametrize("settings", [{"digits": "0110"}, {"length": 0}, {"probabilities": (0.5, 0.5, 0.5)}])
def test_a_language_that_is_none_is_refused(settings):
    with pytest.raises(UserError, match=r"digits must be different|probabilities must be three shares"):
        Language(**settings)


def test_an_answer_is_its_digits_and_one_terminator():
    language = Language(length=4)
    encoder = Encoder(make_tokenizer(language))
    row = language.rows(["3120"], seed=0)[0]["messages"]
    assert encoder.decode(encoder.prompt_ids(row[:1])) == "<ask>3120<answer>"
    distance = ExactDistance(language, ["3120"], encoder)
    (batch,) = distance.batches
    assert batch.response_lengths.tolist() == [language.response_tokens] * 3
    assert batch.input_ids[batch.scored].view(3, -1)[:, -1].tolist() == [encoder.terminator_id] * 3


# --- exact distances --------------------------------------------------------------------------------------------------


def test_distances_agree_with_brute_force_over_all_answers():
    """Sums over every string of up to five tokens; what is longer has mass too, and it is the mass those leave."""
    language = Language(digits="01", length=2, probabilities=(0.5, 0.3, 0.2))
    encoder = Encoder(make_tokenizer(language))
    model = make_model(language, seed=3, hidden_size=16).eval()
    prompts = ["10", "01", "11"]
    found = ExactDistance(language, prompts, encoder)(model)

    strings = all_answers(language, encoder, longest=5)
    kl, total_variation, validity = 0.0, 0.0, 0.0
    for prompt in prompts:
        ids = encoder.prompt_ids([{"role": "user", "content": prompt}])
        with torch.no_grad():
            q = response_log_probs(model, pack([(ids, strings)])).double().exp().tolist()
        distribution = {encoder.decode(string): 0.0 for string in strings} | language.answers(prompt)
        p = [distribution[encoder.decode(string)] for string in strings]
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a) / 3
        total_variation += (sum(abs(a - b) for a, b in zip(p, q, strict=True)) + 1 - sum(q)) / 2 / 3
        validity += sum(b for a, b in zip(p, q, strict=True) if a) / 3
    assert found.kl == pytest.approx(kl, abs=1e-5)
    assert found.total_variation == pytest.approx(total_variation, abs=1e-5)
    assert found.validity == pytest.approx(validity, abs=1e-5)


def test_measuring_leaves_the_mode_of_the_model_alone():
    language = Language(digits="01", length=2)
    model = make_model(language, seed=0, hidden_size=16).train()
    ExactDistance(language, ["10"], Encoder(make_tokenizer(language)))(model)
    assert model.training


# --- the game, against the theory -------------------------------------------------------------------------------------


@pytest.mark.no_cover
def test_one_iteration_lands_where_theorem_5_4_says(tmp_path):
    """T4 through the package: p_{t+1} is proportional to p_t (p_data / p_t)^(1/beta), here with beta = 2.

    One prompt, three answers, an opponent that gives each of them with probability about 1/3. Without noise the optimum
    is proportional to sqrt(p_t p_data). The second reference is the minimum over three free logits on the very pairs
    that were sampled, which leaves only the optimiser's error.
    """
    beta, prompt = 2.0, "201"
    language = Language(digits="012", length=3)
    distribution = language.answers(prompt)
    answers = list(distribution)

    def rows(counts):
        return [
            {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
            for answer, count in zip(answers, counts, strict=True)
            for _ in range(count)
        ]

    def data(name, counts, **settings):
        path = write_rows(tmp_path / f"{name}.jsonl", rows(counts))
        generator = TransformersGenerator(language.response_tokens, batch_size=512)
        return SyntheticDataModule(path, val_fraction=0.0, generator=generator, history=0, **settings)

    start = save_start(language, tmp_path / "random", seed=0, hidden_size=16)
    module = SftLightningModule(start, learning_rate=1e-2, lr_schedule="cosine")
    trainer = Trainer(
        max_epochs=150, callbacks=[ExportPolicy(str(tmp_path / "base"))], enable_checkpointing=False, **QUIET
    )
    trainer.fit(module, data("uniform", (1, 1, 1), batch_size=3))

    counts = [round(50 * probability) for probability in distribution.values()]
    game = SelfPlay(str(tmp_path / "game"), iterations=1, epochs=60)
    adam = lambda parameters: torch.optim.AdamW(parameters, weight_decay=0.0)  # noqa: E731
    module = SpinLightningModule(
        str(tmp_path / "base" / "policy"), beta=beta, learning_rate=6e-3, lr_schedule="cosine", optimizer=adam
    )
    trainer = Trainer(
        max_epochs=60, callbacks=[game], reload_dataloaders_every_n_epochs=1, enable_checkpointing=False, **QUIET
    )
    trainer.fit(module, data("distribution", counts, answers_per_prompt=8, batch_size=400))

    exact = ExactDistance(language, [prompt], Encoder(make_tokenizer(language)))
    opponent = exact.log_probs(load_policy(str(tmp_path / "base" / "policy")))
    policy = exact.log_probs(module.policy).softmax(0)
    assert opponent.exp().sum() > 0.95

    theory = (opponent + (exact.p_data.log() - opponent) / beta).softmax(0)
    spread = (theory - exact.p_data).abs().sum() / 2
    assert spread > 0.1  # so that agreement says something
    assert (policy - theory).abs().sum() / 2 < 0.04

    encoder = Encoder(make_tokenizer(language))
    pairs = [
        (encoder.decode(row["real_ids"]), encoder.decode(row["generated_ids"]))
        for row in PairStore(game.folder(0) / "pairs").read(["real_ids", "generated_ids"]).to_pylist()
    ]
    known = [(answers.index(real), answers.index(generated)) for real, generated in pairs if generated in distribution]
    real, generated = (torch.tensor(side) for side in zip(*known, strict=True))
    ratios = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    tabular = torch.optim.LBFGS([ratios], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        tabular.zero_grad()
        value = -F.logsigmoid(beta * (ratios[real] - ratios[generated])).mean()
        value.backward()
        return value

    tabular.step(loss)
    optimum = (opponent + ratios.detach()).softmax(0)
    assert (policy - optimum).abs().sum() / 2 < 0.015


TINY = Settings(
    language=Language(digits="0123", length=3),
    hidden_size=32,
    held_out_prompts=16,
    pretraining_updates=150,
    pretraining_batch_size=48,
    sft_updates=2,
    many=Scale(num_rows=48, answers_per_prompt=8, iterations=3, epochs=2, batch_size=64),
    few=Scale(num_rows=8, answers_per_prompt=2, iterations=2, epochs=2, batch_size=8),
    arms=(
        Arm("many", 3e-4, beta=1.0),
        Arm("many", 3e-4),
        Arm("few", 3e-4, beta=5.0),
        Arm("few", 3e-4),
        Arm("few", 1e-3),
    ),
)


@pytest.mark.no_cover
def test_kl_falls_in_every_iteration_at_beta_1(tmp_path):
    """T14: sampled answers, exact KL on prompts that no row has."""
    many = Scale(num_rows=100, answers_per_prompt=16, iterations=3, epochs=1, batch_size=64)
    settings = replace(TINY, language=Language(digits="01234", length=3), pretraining_updates=300, many=many)
    laboratory = Laboratory(tmp_path / "work", settings)
    result = laboratory.spin(Arm("many", 3e-4, beta=1.0))
    kls = [point.distance.kl for point in result.points]
    assert len(kls) == 4 and kls == sorted(kls, reverse=True), kls
    assert kls[-1] < kls[0] / 2


# --- the report -------------------------------------------------------------------------------------------------------


def test_play_writes_table_picture_and_numbers(tmp_path, capsys):
    report = play(tmp_path, settings=TINY)
    said = capsys.readouterr().out
    assert (tmp_path / "laboratory.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "laboratory.json").read_text())
    assert saved["conclusions"] == report["conclusions"]
    assert {"torch", "transformers", "lightning", "python", "spin_lightning"} <= set(saved["versions"])
    assert saved["settings"]["seed"] == 0 and saved["command"]
    assert "SPIN beta 1, lr 0.0003" in said and "SFT tuned, lr" in said and "KL start" in said
    assert "the opponent answers" not in said  # that is in the log
    assert "the opponent answers" in (tmp_path / "laboratory.log").read_text()

    many_spin, few_spin, many_sft, *_ = saved["results"]
    assert [many_spin["arm"]["beta"], few_spin["arm"]["beta"], many_sft["arm"]["beta"]] == [1.0, 5.0, None]
    starts = [result["points"][0]["distance"]["kl"] for result in saved["results"]]
    assert max(starts) - min(starts) < 1e-6  # one start for all
    assert many_sft["points"][-1]["updates"] == many_spin["points"][-1]["updates"]

    # tokens by hand: a prompt has 5 tokens and a real answer 4; SFT trains on 48 rows an epoch
    epochs = many_sft["points"][-1]["updates"]
    assert many_sft["tokens"] == {"generated": 0, "scored": 0, "trained": 48 * 9 * epochs}
    generated = many_spin["tokens"]["generated"]
    assert (
        many_spin["tokens"]["scored"] == generated + 3 * 48 * 9
    )  # each generated answer once, each real one once an iteration


def run_of(regime, learning_rate, beta, *kls):
    points = [
        Point(10 * k, Distance(kl, 0.3, 0.8), (100 if beta is None else 300) * k, float(k)) for k, kl in enumerate(kls)
    ]
    return Result(Arm(regime, learning_rate, beta), points, {}, [], None)


def test_conclusions_follow_the_numbers_either_way():
    sft = run_of("few", 1e-4, None, 1.2, 0.9, 1.5)
    spin = run_of("few", 1e-4, 5.0, 1.2, 1.0, 1.05)
    wild = run_of("few", 1e-4, 0.1, 1.2, 4.0, 9.0)
    said = "\n".join(conclusions([spin, wild, sft]))
    assert "SPIN ended farther from the data: SPIN beta 0.1, lr 0.0001" in said
    assert "beta 0.1 overshot at lr 0.0001" in said
    assert (
        "after 20 updates of each: SPIN was better, KL 1.050 for SPIN beta 5 and 1.500 for SFT; "
        "SPIN processed 3.0 times" in said
    )
    assert "no early stop: SPIN was better, KL 1.050 for SPIN beta 5, lr 0.0001 and 1.500 for SFT, lr 0.0001." in said
    assert "SPIN stayed flat, rising by 0.05" in said and "SFT overfitted, rising by 0.60" in said
    assert "tuned SFT (lr 0.0001, stopped after 10 updates) beat the best SPIN" in said

    said = "\n".join(
        conclusions(
            [
                run_of("few", 1e-4, 5.0, 1.2, 0.8, 1.3),
                run_of("few", 1e-4, 0.1, 1.2, 1.1, 1.0),
                run_of("few", 1e-4, None, 1.2, 0.9, 0.9),
            ]
        )
    )
    assert "beta 0.1 did not overshoot" in said
    assert "SFT was better, KL 0.900 for SFT" not in said  # the rival is the better game, beta 0.1 with 1.000
    assert "SFT was better, KL 1.000 for SPIN beta 0.1 and 0.900 for SFT" in said
    assert "did not beat the best SPIN (SPIN beta 5, lr 0.0001): KL 0.900 against 0.800" in said

    said = "\n".join(conclusions([run_of("few", 1e-4, 5.0, 1.2, 0.80), run_of("few", 1e-4, None, 1.2, 0.82)]))
    assert said.count("(too close for one seed)") == 3


def test_tuned_sft_stops_at_the_best_point_of_all_learning_rates():
    slow, fast = run_of("few", 1e-5, None, 1.2, 1.1, 1.0), run_of("few", 1e-4, None, 1.2, 0.9, 1.5)
    tuned = tuned_sft([slow, fast], "few")
    assert tuned is not None and tuned.arm is fast.arm and [point.updates for point in tuned.points] == [0, 10]
    assert tuned_sft([slow, fast], "many") is None
    assert "SFT tuned, lr 0.0001, stopped       1.200   0.900   0.900" in table([slow, fast])


def test_sft_without_a_game_to_match_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no SPIN arm to take its updates from"):
        play(tmp_path, settings=replace(TINY, pretraining_updates=1, sft_updates=1, arms=(Arm("few", 1e-4),)))


def test_missing_matplotlib_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Install spin-lightning\[lab\]"):
        play(tmp_path / "never")
    assert not (tmp_path / "never").exists()
