"""The README and the docs say what is so: commands run, Python runs, links and line numbers point where they say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers import save_tiny_model, write_rows

from spin_lightning.cli.commands import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
REPOSITORY = "https://github.com/spin-lightning/spin-lightning"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def names(tmp_path):
    """What a user would put in place of the README's names."""
    return {
        "MY_SFT_MODEL": save_tiny_model(tmp_path / "model"),
        "MY_DATA.jsonl": write_rows(tmp_path / "rows.jsonl"),
        "runs/mine": str(tmp_path / "run"),
        "runs/sft/policy": save_tiny_model(tmp_path / "sft"),
        "my_data.jsonl": write_rows(tmp_path / "my.jsonl"),
    }


def block(language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)[0]


def test_the_readme_s_first_command_plays_a_game(names, tmp_path):
    command = block("")
    for name, value in names.items():
        command = command.replace(name, value)
    program, *args = shlex.split(command)
    assert program == "spin-lightning"
    run([*args, "--self_play.iterations=1", "--data.generator.max_new_tokens=4", "--trainer.enable_progress_bar=false"])
    assert (tmp_path / "run" / "iteration_0" / "policy" / "model.safetensors").exists()


def test_the_readme_s_python_plays_a_game_in_fifteen_lines(names, tmp_path):
    code = block("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    for name, value in names.items():
        code = code.replace(name, value)
    exec(
        compile(code.replace("batch_size=8", "batch_size=8, generator=short"), "README.md", "exec"), {"short": short()}
    )
    assert (tmp_path / "run" / "game.json").exists()


def short():
    from spin_lightning import TransformersGenerator

    return TransformersGenerator(max_new_tokens=4)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_s_links_are_absolute_and_lead_to_files_of_the_repository():
    """It is read outside of the repository, too."""
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert all(target.startswith("https://") for target in targets)
    ours = [path for target in targets for path in re.findall(rf"{REPOSITORY}/(?:blob|raw|tree)/main/([^#]+)", target)]
    assert len(ours) > 20
    assert [path for path in ours if not (ROOT / path).exists()] == []


def test_the_readme_is_short_and_begins_with_what_people_look_for():
    assert len(README.split()) <= 1200
    first = README.splitlines()[:40]
    for words in (
        "spin-lightning fit",
        "laboratory.png",
        "SPIN iteration 1",
        "control 1 (more SFT)",
        "01_self_play_flat",
    ):
        assert any(words in line for line in first), words


def test_the_readme_s_line_numbers_point_at_the_method():
    wanted = {
        "spin_lightning/losses.py": "class SpinLoss",
        "spin_lightning/models/log_probs.py": "def response_log_probs",
        "spin_lightning/stages/pairs.py": "def training_step",
        "spin_lightning/stages/clock.py": "def ensure_iteration",
    }
    links = dict(re.findall(rf"\]\({REPOSITORY}/blob/main/(spin_lightning/[\w/.]+)#L(\d+)\)", README))
    lines = {path: (ROOT / path).read_text().splitlines() for path in wanted}
    numbers = {
        path: 1 + next(i for i, line in enumerate(lines[path]) if words in line) for path, words in wanted.items()
    }
    assert {path: int(number) for path, number in links.items()} == numbers


def test_the_design_lists_every_file_once():
    listed = (ROOT / "docs/design.md").read_text().partition("\n## Files\n")[2].partition("\n## ")[0]
    package = ROOT / "spin_lightning"
    there = [path.relative_to(package).as_posix() for path in package.rglob("*.py")]
    trivial = ("__init__.py", "__main__.py")
    assert sorted(re.findall(r"`([\w/]+\.py)`", listed)) == sorted(name for name in there if not name.endswith(trivial))


def test_the_page_on_speed_says_one_thing_at_a_time():
    """No bullet and no paragraph of more than 40 words, tables and pictures apart."""
    page = (ROOT / "docs/performance.md").read_text()
    blocks = [block for block in re.split(r"\n\n|\n(?=- |<!-- )", page) if not block.startswith(("|", "<!-- ", "!["))]
    assert len(blocks) > 80
    assert [block for block in blocks if len(block.split()) > 40] == []
