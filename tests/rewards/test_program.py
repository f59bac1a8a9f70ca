from __future__ import annotations

import linecache
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from spin_lightning import FunctionReward, NumberMatch, TextMatch, UserError
from spin_lightning.rewards import Answer, scored
from spin_lightning.runs.files import sha256_of

REAL = "5 + 7 = 12. The answer is 12."


def number(text: str, real: str | None = REAL, **settings: Any) -> float | None:
    return NumberMatch(**settings).score([Answer([], text, real)])[0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The answer is 72.", "72"),
        ("the ANSWER IS: 72", "72"),
        ("The answer is **72**", "72"),
        ("#### 72", "72"),
        ("####72 apples", "72"),
        (r"so \boxed{72}.", "72"),
        (r"so \boxed{\text{72}}", "72"),
        ("The answer is 1,234,567.", "1234567"),
        (r"\boxed{1{,}234}", "1234"),
        ("The answer is 1,00,000 rupees.", "100000"),
        ("The answer is 3, 4 and 5.", "3"),
        ("The answer is $12.50.", "25/2"),
        (r"The answer is \$12.50", "25/2"),
        ("The answer is -$3", "-3"),
        ("The answer is $-3", "-3"),
        ("The answer is \u22123", "-3"),
        ("The answer is €.5", "1/2"),
        ("The answer is 50%.", "50"),
        (r"The answer is 50\%", "50"),
        ("The answer is 3/4.", "3/4"),
        (r"\boxed{\frac{-3}{4}}", "-3/4"),
        (r"\boxed{-\dfrac{3}{4}}", "-3/4"),
        ("The answer is 1.5e3", "1500"),
        ("The answer is x = 5.", "5"),
        ("The answer is\n\n72", "72"),
        ("The answer is 1. No, the answer is 2.", "2"),
        ("The answer is 12\n3 more lines", "12"),
        ("The answer is about 5 apples", "5"),
        ("The answer is x2.", None),
        ("The answer is unknown.\nIt took 3 hours.", None),
        ("The answer isn't 5.", None),
        ("It is 12.", None),
        ("The answer is 1/0", None),
        ("The answer is 1e999999999", None),
        ("The answer is 1e+0009999999.", None),  # a power that begins with zeros is as long
        ("The answer is 2e+0003.", "2000"),
        (f"The answer is {'9' * 5000}", None),
        ("", None),
    ],
)
def test_the_final_number_is_read_exactly(text: str, wanted: str | None):
    assert NumberMatch().find_number(text) == (None if wanted is None else Fraction(wanted))


def test_right_wrong_and_no_number_are_1_partial_and_0():
    assert [number("The answer is 12"), number("The answer is 13"), number("Twelve")] == [1.0, 0.1, 0.0]
    assert number("The answer is 13", partial=0) == 0.0


def test_numbers_are_equal_as_fractions():
    assert number("The answer is 0.1", real="#### 1/10") == 1.0
    assert number("The answer is 0.3333333333333333", real="#### 1/3") == 0.1
    assert number("The answer is 12.0", real="#### 12") == 1.0


def test_tolerance_is_absolute_and_exact():
    assert number("The answer is 12.01", tolerance=0.01) == 1.0
    assert number("The answer is 12.0101", tolerance=0.01) == 0.1
    assert number("The answer is 0.009", real="#### 0.001", tolerance=0.01) == 1.0  # what ReFT's tolerance does, too


def test_a_cut_response_has_no_final_number():
    assert NumberMatch().score([Answer([], "The answer is 12", REAL, finish_reason="length")]) == [0.0]


def test_the_right_number_may_stand_in_a_column():
    reward = NumberMatch(column="result")
    assert reward.columns == ("result",)
    given = {"12": 1.0, 12: 1.0, "$12.0": 1.0, "12 apples": 1.0, "#### 12": 1.0, 13: 0.1, "no": None, "in 12": None}
    answers = [Answer([], "The answer is 12", None, {"result": value}) for value in given]
    assert reward.score(answers) == list(given.values())
    with pytest.raises(UserError, match=r"reads the column 'result', and the row has \['label'\]"):
        reward.score([Answer([], "", None, {"label": 1})])


def test_a_pattern_of_ones_own():
    assert number("13 plus 25 equals 38.", "13 plus 25 equals 38.", pattern="equals") == 1.0
    assert number("<a>7</a> or <a>8</a>", "<a>8</a>", pattern="<a>(.*?)</a>") == 1.0


def test_a_row_without_a_right_number_cannot_be_judged():
    assert number("The answer is 12", real="Nobody knows.") is None
    answers = [Answer([], f"The answer is {i}", "Nobody knows.") for i in range(8)]
    with pytest.raises(UserError, match=r"judged none of 8 responses.*no number behind .*'Nobody knows\.'.* `pattern`"):
        scored(NumberMatch(), answers)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"partial": 1.0}, r"partial must be in \[0, 1\), got 1.0"),
        ({"partial": -0.1}, "partial"),
        ({"tolerance": -1}, "tolerance must be at least 0, got -1"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"pattern": "("}, r"pattern must be a regular expression, got '\('.*backslash"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        NumberMatch(**settings)


def test_hostile_text_is_read_in_no_time():
    started = time.monotonic()
    for text in ("answer is " * 20000, "answer is " + "1," * 50000, "answer is " + "-" * 50000, "\\frac{" * 20000):
        NumberMatch().find_number(text)
    assert time.monotonic() - started < 2


def test_text_match_forgives_case_and_white_space_only():
    def match(text: str, **answer: Any) -> float | None:
        return TextMatch().score([Answer([], text, "The list is Straße.", **answer)])[0]

    assert match("  the LIST\nis strasse. ") == 1.0
    assert match("The list is Straße") == 0.0
    assert match("The list is Straße.", finish_reason="length") == 0.0
    assert TextMatch().score([Answer([], "x")]) == [None]
    assert TextMatch(column="label").score([Answer([], "A", None, {"label": "a"})]) == [1.0]


MODULE = '''
import threading

def exact(completions, solution, **kwargs):
    """As TRL's own: conversational, with a column."""
    return [float(c[0]["content"] == s) for c, s in zip(completions, solution)]

def plain(prompts, completions):
    return [float(len(p) + len(c)) for p, c in zip(prompts, completions)]

def everything(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
    log_extra("x", [1]); log_metric("y", 2.0)
    assert trainer_state is None and [p[-1]["role"] for p in prompts] == ["user"] * len(prompts)
    return [len(ids) + sum(kwargs["weight"]) for ids in completion_ids]

def with_real(completions, real):
    return [None if r is None else float(r == c[0]["content"]) for c, r in zip(completions, real)]

async def later(completions, level=3, **kwargs):
    return [level] * len(completions)

def broken(completions):
    return [c["content"] for c in completions]

def in_main_thread(completions):
    return [float(threading.current_thread() is threading.main_thread()) for _ in completions]

number = 3
'''


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"functions_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


ASKED: Any = [{"role": "user", "content": "2+2?"}]


def test_functions_for_trl_run_unchanged(functions: str):
    exact = FunctionReward(f"{functions}:exact")
    assert exact.columns == ("solution",)
    answers = [Answer(ASKED, text, columns={"solution": "4", "weight": 2}, ids=[1, 2, 3]) for text in ("4", "5")]
    assert scored(exact, answers) == [1.0, 0.0]
    assert scored(FunctionReward(f"{functions}:plain", form="plain"), answers[:1]) == [5.0]
    everything = FunctionReward(f"{functions}:everything", columns=["weight"])
    assert everything.columns == ("weight",) and scored(everything, answers) == [7.0, 7.0]
    assert scored(FunctionReward(f"{functions}:later"), answers) == [3.0, 3.0]
    assert scored(FunctionReward(f"{functions}:in_main_thread"), answers) == [1.0, 1.0]
    assert exact.settings == {
        "reward": "spin_lightning.rewards.program.FunctionReward",
        "function": f"{functions}:exact",
        "columns": ["solution"],
        "form": "conversational",
        "source_sha256": sha256_of(MODULE[MODULE.index("def exact") : MODULE.index("def plain")].rstrip() + "\n"),
    }


def test_what_a_function_is_made_of_is_kept_where_it_can_be_had(functions: str, tmp_path: Path):
    def source_of(name: str) -> str | None:
        return FunctionReward(name).settings.get("source_sha256")

    before = source_of(f"{functions}:plain")
    path = tmp_path / f"{functions}.py"
    path.write_text(MODULE.replace("len(p) + len(c)", "len(p) - len(c)"))
    del sys.modules[functions]
    linecache.checkcache()
    assert before != source_of(f"{functions}:plain") is not None
    assert source_of("string:capwords") is not None and source_of("math:fsum") is None


def test_a_function_may_ask_for_the_real_response(functions: str):
    reward = FunctionReward(f"{functions}:with_real")
    assert reward.columns == ()
    assert scored(reward, [Answer(ASKED, "4", "4"), Answer(ASKED, "4", None)]) == [1.0, None]


def test_a_function_that_raises_is_named_with_its_line(functions: str):
    with pytest.raises(
        UserError, match=rf"{functions}:broken ends with TypeError.*{functions}.py, line 23\)\. Mend it"
    ):
        scored(FunctionReward(f"{functions}:broken"), [Answer(ASKED, "4")])


def test_several_turns_of_a_plain_prompt_stand_below_each_other(functions: str):
    assert scored(FunctionReward(f"{functions}:plain", form="plain"), [Answer([*ASKED, *ASKED], "4")]) == [11.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exact", "such as my_rewards:is_polite, got 'exact'. Give the module and the function"),
        ("no_such_module_is_here:f", "there is no module 'no_such_module_is_here'. Run where its file is"),
        ("{}:nothing", "has no such function; it has broken, everything, exact"),
        ("{}:number", "has no such function"),
        ("a b:c", "Give the module"),
    ],
)
def test_a_function_that_is_not_there_is_refused(functions: str, name: str, words: str):
    with pytest.raises(UserError, match=words):
        FunctionReward(name.format(functions))


def test_a_short_class_name_is_enough_on_the_command_line(functions: str):
    from jsonargparse import ArgumentParser

    from spin_lightning import Reward

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    made = parser.instantiate_classes(
        parser.parse_args(["--reward", "NumberMatch", "--reward.pattern", "equals"])
    ).reward
    assert isinstance(made, NumberMatch) and made.pattern == "equals"
    flag = '{"class_path": "SumOfRewards", "init_args": {"rewards": {"a": {"class_path": "TextMatch"}, "b": '
    flag += f'{{"class_path": "FunctionReward", "init_args": {{"function": "{functions}:later"}}}}}}}}}}'
    made = parser.instantiate_classes(parser.parse_args(["--reward", flag])).reward
    assert [type(part) for part in made.rewards.values()] == [TextMatch, FunctionReward]
