"""Tasks of lm-evaluation-harness: what they say of a model follows from its log-probs, and is not asked twice."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from games import Do, Game, Recorder, Stopped, read
from helpers import QUIET, byte_tokenizer, load, log_prob_by_hand, tiny_model
from huggingface_hub import ModelCard
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from spin_lightning import EvaluateTasks, ExportPolicy, Interrupted, RowDataModule, SftLightningModule, UserError
from spin_lightning.models import hub
from spin_lightning.models.saving import weights_hash
from spin_lightning.stages import harness, own_tasks
from spin_lightning.stages.evaluation import Evaluation, compare, difference
from spin_lightning.stages.harness import PAPER, Asker, aggregate, load_tasks, weights_of
from spin_lightning.stages.own_tasks import make_task

pytest.importorskip("lm_eval")

CHOICES = [
    {"question": "1+1?", "choices": ["2", "33", "4"], "answer": "A"},
    {"question": "2+2?", "choices": ["5", "4"], "answer": 1},
    {"question": "sky?", "choices": ["green", "blue", "red"], "answer": "blue"},
    {"question": "3+3?", "choices": ["6", "7"], "answer": "6"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def quiz(tmp_path: Path) -> str:
    return write(tmp_path / "quiz.jsonl", CHOICES)


def right_by_hand(model: Any, rows: list[dict[str, Any]], prefix: str = "") -> dict[str, list[float]]:
    """Whether the right choice is the likeliest, as it is and by its length in characters."""
    tokenizer, right = byte_tokenizer(), {"acc,none": [], "acc_norm,none": []}
    for row, answer in zip(rows, (0, 1, 1, 0), strict=False):
        ids = tokenizer(f"{prefix}Question: {row['question']}\nAnswer:").input_ids
        sums = [log_prob_by_hand(model, ids, tokenizer(f" {choice}").input_ids) for choice in row["choices"]]
        means = [one / len(choice) for one, choice in zip(sums, row["choices"], strict=True)]
        for key, values in (("acc,none", sums), ("acc_norm,none", means)):
            right[key].append(float(values.index(max(values)) == answer))
    return right


@pytest.mark.parametrize("seed", [0, 3])
def test_the_likeliest_choice_decides_as_by_hand(quiz: str, seed: int):
    model = tiny_model(len(byte_tokenizer()), seed)
    (task,) = load_tasks([quiz])
    found = Asker(model, byte_tokenizer(), batch_size=3).ask(task.tasks[0])
    expected = right_by_hand(model, CHOICES)
    assert found.scores == expected and found.shots == 0 and len(set(found.hashes)) == 4
    for key, values in expected.items():
        mean = sum(values) / 4
        error = math.sqrt(sum((value - mean) ** 2 for value in values) / 3 / 4)
        assert found.metrics[key] == pytest.approx((mean, error))


def test_shots_stand_before_the_question_and_are_others_than_it(tmp_path: Path):
    rows = CHOICES[:2]
    (task,) = load_tasks([write(tmp_path / "two.jsonl", rows)], shots=1)
    model = tiny_model(len(byte_tokenizer()))
    found = Asker(model, byte_tokenizer()).ask(task.tasks[0])
    by_hand = right_by_hand(model, rows[:1], "Question: 2+2?\nAnswer: 4\n\n")
    assert found.shots == 1 and found.scores["acc,none"][:1] == by_hand["acc,none"]
    assert Asker(model, byte_tokenizer()).ask(task.tasks[0]) == found  # the same examples again


def test_a_generated_response_is_right_if_it_is_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(own_tasks, "MOST_TOKENS", 9)
    model, tokenizer = tiny_model(len(byte_tokenizer()), seed=1), byte_tokenizer()
    rows = [{"prompt": text, "target": "x"} for text in ("ab", "cd", "3+4=")]
    ids = [tokenizer(row["prompt"]).input_ids for row in rows]
    for row, prompt in zip(rows[:2], ids, strict=False):  # the most likely tokens, one at a time
        said: list[int] = []
        while not said or (len(said) < 9 and said[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                said.append(int(model(torch.tensor([prompt + said])).logits[0, -1].argmax()))
            if "\n" in tokenizer.decode(said):
                break
        row["target"] = tokenizer.decode(said).split("\n")[0].removesuffix("<|im_end|>").strip() or "nothing"
    (task,) = load_tasks([write(tmp_path / "texts.jsonl", rows)])
    found = Asker(model, tokenizer, batch_size=2).ask(task.tasks[0])
    assert found.scores == {"exact_match,none": [1.0, 1.0, 0.0]}
    assert found.metrics["exact_match,none"] == pytest.approx((2 / 3, 1 / 3))


def test_the_chat_template_is_applied_or_refused(quiz: str):
    model = tiny_model(len(byte_tokenizer()))
    (task,) = load_tasks([quiz])
    tokenizer = byte_tokenizer()
    found = Asker(model, tokenizer, chat_template=True).ask(task.tasks[0])
    prompt = "<|im_start|>user\nQuestion: 1+1?\nAnswer:<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt).input_ids
    sums = [log_prob_by_hand(model, ids, tokenizer(choice).input_ids) for choice in CHOICES[0]["choices"]]
    assert found.scores["acc,none"][0] == float(sums.index(max(sums)) == 0)
    with pytest.raises(UserError, match="chat_template is on, and the model's tokenizer has none"):
        Asker(model, byte_tokenizer(chat_template=None), chat_template=True)


def test_asking_changes_neither_mode_nor_weights_nor_random_numbers(quiz: str):
    model, tokenizer = tiny_model(len(byte_tokenizer())), byte_tokenizer()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weight, before = model.get_output_embeddings().weight, weights_hash(model)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    Asker(model, tokenizer).ask(load_tasks([quiz])[0].tasks[0])
    assert [module.training for module in model.modules()] == modes and "tie_weights" not in vars(model)
    assert model.get_output_embeddings().weight is weight and weights_hash(model) == before
    assert tokenizer.pad_token is None and torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "q", "choices": ["a"], "answer": 0}, "line 1: choices must be a list of at least two texts"),
        ({"question": "q", "choices": ["a", "a"], "answer": 0}, "choices must be different texts"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "2 is none of the choices"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "True is none of the choices"),
        ({"question": "q", "choices": [1, 0], "answer": 1}, "1 can be read as a number from 0 and as a text"),
        ({"question": " ", "choices": ["a", "b"], "answer": "a"}, "question must be a text that is not empty, got ' '"),
        ({"prompt": "q", "target": ""}, "target must be a text that is not empty, got ''"),
        ({"prompt": "q", "completion": "a"}, "must have question, choices and answer, or prompt and target"),
        ([1], "must be an object with names and values, got list"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, row: Any, words: str):
    with pytest.raises(UserError) as raised:
        make_task(Path(write(tmp_path / "rows.jsonl", [row])))
    assert words in str(raised.value) and "rows.jsonl, line 1" in str(raised.value)


def test_rows_are_read_as_people_write_them(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '\ufeff{"question": "q", "choices": [1, 2.5], "answer": "B"}\n\n'
        '{"question": "r", "choices": ["A", "B"], "answer": "B"}\n'
    )
    documents = make_task(path)["custom_dataset"]()["test"].to_list()
    assert [document["answer"] for document in documents] == [1, 1] and documents[0]["choices"] == ["1", "2.5"]
    for text, words in (("", "has no rows"), ("{", "line 1 is no JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            make_task(path)
    path.write_text('{"prompt": "q", "target": "a\\nb"}\n')
    assert make_task(path)["generation_kwargs"]["until"] == ["\n\n"]


def write_yaml(folder: Path, quiz: str, extra: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {quiz}}}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "Question: {{question}}\\nAnswer:"\ndoc_to_choice: choices\n'
        f"doc_to_target: right\nmetric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]\n{extra}"
    )
    return folder / "own.yaml"


def test_the_harness_own_files_are_read_from_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "is_reachable", lambda: pytest.fail("the hub was asked"))
    rows = [{**row, "right": right} for row, right in zip(CHOICES[:2], (0, 1), strict=True)]
    for row in rows:
        del row["answer"]  # of two types
    path = write_yaml(tmp_path / "tasks", write(tmp_path / "rows.jsonl", rows))
    model = tiny_model(len(byte_tokenizer()))
    for name in (str(path), str(path.parent)):
        (task,) = load_tasks([name])
        found = Asker(model, byte_tokenizer()).ask(task.tasks[0])
        assert (task.name, found.scores["acc,none"]) == ("own", right_by_hand(model, CHOICES[:2])["acc,none"])


def test_the_papers_tasks_and_metrics_are_those_of_the_harness():
    """Their documents are on the hub; their settings are installed."""
    import lm_eval.tasks

    root = Path(str(lm_eval.tasks.__file__)).parent
    for name, (shots, metric, folder) in PAPER.items():
        manager = harness._manage([root / folder])
        entry = manager.task_index[name].cfg
        is_group = "group" in entry
        metrics = entry["aggregate_metric_list" if is_group else "metric_list"]
        assert metric.partition(",")[0] in [own["metric"] for own in metrics]
        filters = [own["name"] for own in entry.get("filter_list", [{"name": "none"}])]
        assert metric.partition(",")[2] in filters
        assert entry.get("num_fewshot") in (None, shots)
    assert len([name for name in manager.all_subtasks if name.startswith("mmlu_")]) > 57


def test_what_is_not_there_is_said_in_a_sentence(quiz: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    named = {"arc_easy", "arc_challenge", "mmlu"}

    class Manager:
        all_tasks = sorted(named)

        def load(self, names: list[str]) -> Any:
            raise ConnectionError(f"Couldn't reach {names[0]}\non the hub")

    monkeypatch.setattr(harness, "_manage", lambda folders: Manager())
    monkeypatch.setattr(hub, "is_reachable", lambda: False)
    with pytest.raises(UserError) as raised:
        load_tasks(["arc_challenge", "mmlu"])
    said = str(raised.value)
    assert said.startswith(
        "the data of 'arc_challenge', 'mmlu' are not in the local cache, and the hub cannot be asked"
    )
    assert "mmlu: ConnectionError: Couldn't reach mmlu" in said and "on the hub" not in said
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)
    with pytest.raises(UserError, match=r"has no task 'arc_chalenge', and no file .* Did you mean arc_challenge\?"):
        load_tasks(["arc_chalenge"])
    for names, shots, words in (
        ([], None, "no task is named"),
        (["a.jsonl"], None, "the task 'a.jsonl' does not exist"),
        (["mmlu"], [1, 2], "shots must be one number or one for each of the 1 tasks, got 2"),
        (["mmlu"], -1, "shots must be at least 0, got -1"),
        ([str(tmp_path / "empty")], None, "has no YAML file of a task"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        monkeypatch.setattr(Manager, "all_groups", [], raising=False)
        monkeypatch.setattr(Manager, "all_subtasks", [], raising=False)
        with pytest.raises(UserError, match=words):
            load_tasks(names, shots)


def test_tasks_that_cannot_be_asked_are_refused(quiz: str, tmp_path: Path):
    rows = write(tmp_path / "rows.jsonl", [{"question": "q", "choices": ["a", "b"], "right": 0}])
    path = write_yaml(tmp_path / "tasks", rows, "num_fewshot: 0\n")
    with pytest.raises(UserError, match="'own' is asked with 0 shots, got 2"):
        load_tasks([str(path)], 2)
    path = write_yaml(tmp_path / "tasks", rows, "unsafe_code: true\n")
    with pytest.raises(UserError, match="'own' runs code that a model writes"):
        load_tasks([str(path)])
    with pytest.raises(UserError, match="two tasks are called 'quiz'"):
        load_tasks([quiz, quiz])
    for settings, words in (({"limit": 0}, "limit must be at least 1"), ({"batch_size": 0}, "batch_size must be")):
        with pytest.raises(UserError, match=words):
            Evaluation([quiz], **settings)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []
    ask = Asker.ask

    def counted(self: Asker, task: Any, limit: int | None = None) -> Any:
        asked.append(task.task_name)
        return ask(self, task, limit)

    monkeypatch.setattr(Asker, "ask", counted)
    return asked


def run(evaluation: Evaluation, model: Any, place: Path) -> Any:
    return evaluation.run(model, byte_tokenizer(), place, weights_hash(model), "mine")


def test_results_are_kept_one_by_one_and_nothing_is_asked_twice(
    quiz: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, place, asked = tiny_model(len(byte_tokenizer())), tmp_path / "kept", counting(monkeypatch)
    other = write(tmp_path / "other.jsonl", CHOICES[:3])
    run(Evaluation([quiz]), model, place)
    results = read(place / "evaluation.json")
    mean = sum(right_by_hand(model, CHOICES)["acc,none"]) / 4
    entry = results["tasks"]["quiz"]
    assert (entry["metric"], entry["value"], entry["shots"], entry["documents"]) == ("acc", mean, 0, 4)
    assert results["model_sha256"] == weights_hash(model) and results["versions"]["lm_eval"]
    both = Evaluation([other, quiz], batch_size=2)
    run(both, model, place)
    assert asked == ["quiz", "other"] and both.is_complete(place, weights_hash(model))
    assert read(place / "evaluation.json")["tasks"].keys() == {"quiz", "other"}
    run(Evaluation([quiz], limit=2), model, place)
    run(Evaluation([quiz], shots=1), model, place)
    run(Evaluation([quiz], chat_template=True), model, place)
    assert asked[2:] == ["quiz"] * 3 and not both.is_complete(place, weights_hash(model))
    run(Evaluation([quiz]), model, place)  # what it rested on is still there
    assert len(asked) == 5 and read(place / "evaluation.json")["tasks"]["quiz"] == entry
    write(tmp_path / "quiz.jsonl", [*CHOICES[:3], {**CHOICES[3], "answer": "7"}])
    run(Evaluation([quiz]), model, place)
    run(Evaluation([quiz]), tiny_model(len(byte_tokenizer()), seed=1), place)
    assert len(asked) == 7 and read(place / "evaluation.json")["tasks"].keys() == {"quiz"}


def test_another_tokenizer_or_template_is_asked_anew_and_each_result_says_how_it_was_made(
    quiz: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, place, asked = tiny_model(len(byte_tokenizer())), tmp_path / "kept", counting(monkeypatch)
    tokenizer, others = byte_tokenizer(), byte_tokenizer()
    others.chat_template = others.chat_template.replace("assistant", "model")
    sha256 = weights_hash(model)
    for own in (tokenizer, others, tokenizer):
        Evaluation([quiz], chat_template=True).run(model, own, place, sha256, "mine")
        Evaluation([quiz]).run(model, own, place, sha256, "mine")  # which no template changes
    assert asked == ["quiz"] * 3
    tokenizer.add_tokens(["Question"])
    model.resize_token_embeddings(len(tokenizer))
    Evaluation([quiz]).run(model, tokenizer, place, sha256, "mine")
    assert len(asked) == 4
    other = write(tmp_path / "other.jsonl", CHOICES[:3])
    Evaluation([other]).run(model.to(torch.bfloat16), tokenizer, place, sha256, "mine")
    tasks = read(place / "evaluation.json")["tasks"]
    assert (tasks["quiz"]["dtype"], tasks["other"]["dtype"]) == ("float32", "bfloat16")
    assert tasks["quiz"]["lm_eval"] == tasks["other"]["lm_eval"] == harness.harness_version()


def test_two_models_are_compared_document_by_document(quiz: str, tmp_path: Path):
    ours, others = (tiny_model(len(byte_tokenizer()), seed) for seed in (0, 3))
    evaluation = Evaluation([quiz])
    found, against = run(evaluation, ours, tmp_path / "a"), run(evaluation, others, tmp_path / "b")
    gaps = [
        one - two
        for one, two in zip(*(right_by_hand(model, CHOICES)["acc,none"] for model in (ours, others)), strict=True)
    ]
    mean = sum(gaps) / 4
    error = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 3 / 4)
    gap = compare(found, against, tmp_path / "a", "theirs", "0" * 64)["quiz"]
    assert gap is not None and (gap.value, gap.stderr) == pytest.approx((mean, error)) and any(gaps)
    kept = read(tmp_path / "a" / "evaluation.json")["against"]
    assert kept["tasks"]["quiz"]["difference"] == gap.value and kept["model"] == "theirs"
    limited = run(Evaluation([quiz], limit=2), others, tmp_path / "b")
    assert difference(found["quiz"], limited["quiz"]) is None


def test_a_group_is_what_the_harness_makes_of_its_tasks(tmp_path: Path):
    """Two tasks of other sizes, weighted by size: the mean over all documents."""
    folder = tmp_path / "tasks"
    for name, rows in (("first", CHOICES[:1] + CHOICES[2:]), ("second", CHOICES[1:2])):
        documents = [{"question": r["question"], "choices": r["choices"], "right": 0} for r in rows]
        write_yaml(folder, write(tmp_path / f"{name}.jsonl", documents)).rename(folder / f"{name}.yaml")
        text = (folder / f"{name}.yaml").read_text()
        (folder / f"{name}.yaml").write_text(text.replace("task: own", f"task: {name}"))
    (folder / "both.yaml").write_text(
        "group: both\ntask: [first, second]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    models = [tiny_model(len(byte_tokenizer()), seed) for seed in (0, 3)]
    evaluation = Evaluation([str(folder)])
    (wanted,) = evaluation.load()
    found = {task.task_name: Asker(models[0], byte_tokenizer()).ask(task) for task in wanted.tasks}
    scores = [score for part in found.values() for score in part.scores["acc,none"]]
    assert aggregate(wanted, found)["acc,none"][0] == pytest.approx(sum(scores) / 4)
    assert weights_of(wanted, found) == {"first": 0.75, "second": 0.25}
    ours, others = (run(evaluation, model, tmp_path / str(number)) for number, model in enumerate(models))
    entry = ours["both"].entry
    assert entry["documents"] == 4 and entry["tasks"].keys() == {"first", "second"} and entry["metric"] == "acc"
    gap = difference(ours["both"], others["both"])
    assert gap is not None and gap.value == pytest.approx(entry["value"] - others["both"].entry["value"])


def test_a_game_with_tasks_is_the_same_game_bit_for_bit(
    plain: Game, model: str, rows: str, quiz: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = counting(monkeypatch)
    logger = CSVLogger(tmp_path, name="logs", version="0")
    game = Game(model, rows, tmp_path / "run", callbacks=[EvaluateTasks([quiz])], trainer={"logger": logger}).play()
    assert game.losses == plain.losses and game.weights == plain.weights and asked == ["quiz"] * 2
    assert [w.training for w in game.module.policy.modules()] == [w.training for w in plain.module.policy.modules()]
    results = [read(game.clock.folder(number) / "evaluation.json") for number in range(2)]
    assert results[1]["model_sha256"] == weights_hash(game.module.policy) != results[0]["model_sha256"]
    expected = right_by_hand(game.module.policy.eval(), CHOICES)["acc,none"]
    assert results[1]["tasks"]["quiz"]["value"] == sum(expected) / 4
    card = ModelCard((game.clock.folder(1) / "policy" / "README.md").read_text())
    assert card.data.eval_results[-1].dataset_name == "quiz" and "| quiz | acc | 0 | 4 |" in card.text
    header = (tmp_path / "logs" / "0" / "metrics.csv").read_text().partition("\n")[0].split(",")
    assert "eval/quiz" in header


def test_a_run_that_is_continued_asks_what_is_missing_and_nothing_twice(
    model: str, rows: str, quiz: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked, killed = counting(monkeypatch), []
    ask: Callable[..., Any] = Asker.ask

    def die(self: Asker, task: Any, limit: int | None = None) -> Any:
        if task.task_name == "other" and not killed:
            killed.append(True)
            raise Stopped("in the middle of an evaluation")
        return ask(self, task, limit)

    monkeypatch.setattr(Asker, "ask", die)
    tasks = [quiz, write(tmp_path / "other.jsonl", CHOICES[:2])]
    with pytest.raises(Stopped):
        Game(model, rows, tmp_path / "run", callbacks=[EvaluateTasks(tasks)]).play()
    assert asked == ["quiz"] and read(tmp_path / "run/iteration_0/evaluation.json")["tasks"].keys() == {"quiz"}
    Game(model, rows, tmp_path / "run", callbacks=[EvaluateTasks(tasks)]).play()
    assert asked == ["quiz", "other", "quiz", "other"]
    for number in range(2):
        assert read(tmp_path / f"run/iteration_{number}/evaluation.json")["tasks"].keys() == {"quiz", "other"}
    Game(model, rows, tmp_path / "run", callbacks=[EvaluateTasks(tasks)]).play()
    assert len(asked) == 4


def test_a_signal_ends_the_asking_and_no_update_is_lost(
    model: str,
    rows: str,
    quiz: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Tasks may take hours, and what a batch system grants are minutes."""
    ask = Asker.ask

    def signal_first(self: Asker, task: Any, limit: int | None = None) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return ask(self, task, limit)

    monkeypatch.setattr(Asker, "ask", signal_first)
    with pytest.raises(Interrupted):
        Game(model, rows, tmp_path / "run", callbacks=[EvaluateTasks([quiz])]).play()
    assert "note: not all tasks were asked. A continued run asks the rest" in capsys.readouterr().out
    assert not (tmp_path / "run/iteration_0/evaluation.json").exists()
    monkeypatch.setattr(Asker, "ask", ask)
    again = Game(model, rows, tmp_path / "run", callbacks=[EvaluateTasks([quiz])]).play()
    whole = Game(model, rows, tmp_path / "whole").play()
    assert again.weights == whole.weights and again.losses == whole.losses[4:]
    for number in range(2):
        assert read(tmp_path / f"run/iteration_{number}/evaluation.json")["tasks"].keys() == {"quiz"}


def test_supervised_fine_tuning_has_results_on_its_card(model: str, rows: str, quiz: str, tmp_path: Path):
    callbacks = [EvaluateTasks([quiz], limit=3), Recorder(), ExportPolicy(str(tmp_path / "run"), keep="best")]
    module = SftLightningModule(model, learning_rate=3.0)  # so that the weights of the start are the best
    settings: dict[str, Any] = {"max_epochs": 1, "num_sanity_val_steps": -1, "enable_checkpointing": False}
    Trainer(callbacks=callbacks, **settings, **QUIET).fit(module, RowDataModule(rows, batch_size=8, val_fraction=0.2))
    results = read(tmp_path / "run" / "evaluation.json")
    assert read(tmp_path / "run" / "summary.json")["best_step"] == 0
    assert results["model_sha256"] == weights_hash(load(model)) == weights_hash(load(tmp_path / "run" / "policy"))
    assert results["tasks"]["quiz"]["documents"] == 3
    assert "| quiz | acc | 0 | 3 |" in (tmp_path / "run" / "policy" / "README.md").read_text()


def test_a_missing_task_is_said_before_training(model: str, rows: str, tmp_path: Path):
    trained = Do(on_train_start=lambda *_: pytest.fail("training began"))
    with pytest.raises(UserError, match=r"the task 'no\.jsonl' does not exist"):
        Game(model, rows, tmp_path / "run", callbacks=[EvaluateTasks(["no.jsonl"]), trained]).play()
