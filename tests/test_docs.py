"""The README and the docs say what is so: commands run, Python runs, links and line numbers point where they say."""

from __future__ import annotations

import re
import shlex
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from helpers import save_tiny_model, write_rows

import spin_lightning
from spin_lightning.cli import chat, evaluate, pairs, plan, play, push, report, score
from spin_lightning.cli.chain_file import read_chain
from spin_lightning.cli.commands import COMMANDS, STAGES, main, run
from spin_lightning.cli.compare_file import read_comparison
from spin_lightning.cli.schema import make_schema
from spin_lightning.cli.short_help import settings_of
from spin_lightning.cli.slurm import make_script
from spin_lightning.cli.stage_cli import parse_settings

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


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them; of a page made from the code, any."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", title).lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", prose(page)):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor and path.suffix == ".md" and "<!-- from the code: " not in path.read_text():
            assert anchor in anchors_of(path), f"{target}#{anchor}"


def test_every_page_stands_in_the_site_once():
    index = (ROOT / "docs/index.md").read_text()
    listed = [name for tree in re.findall(r"```{toctree}(.*?)```", index, re.S) for name in tree.splitlines() if name]
    names = [name for name in listed if not name.startswith(":")]
    assert sorted(names) == sorted(page.stem for page in PAGES[1:] if page.stem != "index")


def test_settings_commands_and_names_are_written_from_the_code():
    pytest.importorskip("myst_parser")
    specification = spec_from_file_location("docs_conf", ROOT / "docs/conf.py")
    assert specification is not None and specification.loader is not None
    site = module_from_spec(specification)
    specification.loader.exec_module(site)
    pages = {name: "\n".join(write()) for name, write in site.WRITERS.items()}
    for word, record in STAGES.items():
        assert f"\n## {word}\n" in f"\n{pages['settings']}"
        for _, settings in settings_of(record).values():
            for setting in settings:
                assert f"| `{setting.name}`<br>" in pages["settings"] and setting.type
    assert "| `mu`<br><small>`float` or `list[float]`</small> | `1.0` | How many generated" in pages["classes"]
    assert [word for word in COMMANDS if f"spin-lightning {word} " not in pages["commands"]] == []
    assert sorted(re.findall(r":: spin_lightning\.(\w+)$", pages["api"], re.M)) == [
        name for name in spin_lightning.__all__ if name != "__version__"
    ]
    text = ["[a](../configs/dpo.yaml) [b](../examples) [c](dpo.md#what-to-look-at) <!-- from the code: commands -->"]
    site.prepare_page(None, "page", text)
    assert f"[a]({REPOSITORY}/blob/main/configs/dpo.yaml) [b]({REPOSITORY}/tree/main/examples) [c](dpo.md#" in text[0]
    assert "## chain" in text[0]


def commands_of(page: Path) -> list[list[str]]:
    """The words of every command in a page's blocks; what is left out (``...``) or redirected is not among them."""
    found = []
    for block in re.findall(r"^```(?:sh|bash|text)?\n(.*?)^```$", page.read_text(), re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"(?:\$ )?(?:\.venv/bin/)?spin-lightning (\w.*)", line)
            if match:
                words = shlex.split(re.split(" [<>] ", match[1])[0], comments=True)
                found.append([word for word in words if word != "..."])
    return found


#: The plug-in of the docs.
MY_PLUGIN = next(re.finditer(r"^```python\n(.*?)^```$", (ROOT / "docs/extending.md").read_text(), re.S | re.M))[1]
COMMANDS_OF_DOCS = {
    f"{page.name}: {' '.join(words)}": words
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
    for words in commands_of(page)
}


@pytest.mark.parametrize("command", COMMANDS_OF_DOCS)
def test_every_command_of_the_docs_is_one_that_would_run(command, tmp_path, monkeypatch):
    word, *args = COMMANDS_OF_DOCS[command]
    assert word in COMMANDS
    monkeypatch.chdir(ROOT)
    run_yaml = tmp_path / "run.yaml"  # a reader's own config
    run_yaml.write_text("model: {model_name_or_path: a/b}\ndata: {train_data: rows.jsonl}\n")
    (tmp_path / "my_plugin.py").write_text(MY_PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    theirs = {arg for arg in args if arg.endswith(".yaml") and not Path(arg).exists()}
    parse_command(word, [str(run_yaml) if arg in theirs else arg for arg in args])


#: How commands that train no stage read their arguments.
READERS = {
    "chain": read_chain,
    "compare": read_comparison,
    "schema": lambda args: make_schema(*args),
    **{each.__name__.rpartition(".")[2]: each.parse for each in (chat, evaluate, pairs, push, report)},
}


def parse_command(word: str, args: list[str]) -> None:
    """Read the settings of a command as it does itself, with a model and rows where a docs' command leaves them out."""
    if word == "slurm":
        cut = args.index("--")
        make_script(args)
        word, args = args[cut + 1], args[cut + 2 :]
    if word in READERS:
        READERS[word](args)
        return
    if word == "plan":
        args = plan.take_options(args)[1]
    if word == "play":
        args = play.take_options(args)[1]
    if word in ("plan", "play", "check"):
        word = "fit"
    if any(arg.endswith(".help") for arg in args):  # of a class: it is printed, and that is all
        with pytest.raises(SystemExit, match=r"^0$"):
            parse_settings(word, args)
        return
    if not {"-c", "--config"} & set(args):
        given = {arg.partition("=")[0] for arg in args}
        args += [
            text
            for name, value in {"--model.model_name_or_path": "a/b", "--data.train_data": "rows.jsonl"}.items()
            if name not in given
            for text in (name, value)
        ]
    score.parse(args) if word == "score" else parse_settings(word, args)


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


def test_the_readme_names_where_the_method_is():
    links = re.findall(rf"\[`(\w+)`\]\({REPOSITORY}/blob/main/(spin_lightning/[\w/.]+)\)", README)
    assert len(links) == 4
    for name, path in links:
        assert re.search(rf"^ *(class|def) {name}\b", (ROOT / path).read_text(), re.M), name


def test_every_number_that_a_run_logs_is_explained(tmp_path):
    """Of a tiny run of each stage: the columns of its CSV file."""
    page = (ROOT / "docs/metrics.md").read_text()
    model, rows, pairs = save_tiny_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl"), tmp_path / "p.jsonl"
    pairs.write_text("".join(f'{{"prompt": "{a}+1?", "chosen": "{a + 1}", "rejected": "no"}}\n' for a in range(16)))
    reward = "--{}.reward=TextMatch"
    stages = {
        "fit": (rows, "self_play", ["--self_play.epochs=1", "--self_play.iterations=1", reward.format("self_play")]),
        "sft": (rows, "export", []),
        "dpo": (str(pairs), "export", []),
        "reward": (str(pairs), "export", []),
        "ppo": (rows, "rollouts", ["--rollouts.iterations=1", "--rollouts.prompts=4", reward.format("rollouts")]),
    }
    unexplained = {}
    for word, (data, section, flags) in stages.items():
        if word in ("fit", "ppo"):
            flags = [*flags, "--data.generator.max_new_tokens=3", *(["--self_play.pairs=real_wrong"] * (word == "fit"))]
        run(
            [
                *(word, f"--model.model_name_or_path={model}", f"--data.train_data={data}", *flags),
                *("--data.batch_size=4", "--data.val_fraction=0.25", "--trainer.enable_progress_bar=false"),
                f"--{section}.output_dir={tmp_path / word}",
            ]
        )
        (log,) = (tmp_path / word).rglob("metrics.csv")
        names = {name.removeprefix("epoch/") for name in log.read_text().partition("\n")[0].split(",")}
        unexplained[word] = sorted(name for name in names if f"`{name}`" not in page)
        assert {"loss", "lr"} <= names
    assert not any(unexplained.values()), unexplained


def test_the_quick_start_s_commands_run_as_they_stand(tmp_path, monkeypatch, capsys):
    """With a tiny model and few rows in the place of its own: each command, in its order, in one folder."""
    commands = commands_of(ROOT / "docs/quickstart.md")
    assert [words[0] for words in commands] == ["check", "sft", "plan", "fit", "sft", "score"]
    monkeypatch.chdir(tmp_path)
    model = save_tiny_model(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", 16), write_rows(tmp_path / "held_out.jsonl", 4)
    for words in commands:
        args = [model if word == "$MODEL" else "4" if word == "32" else "2" if word == "39" else word for word in words]
        main(args)
    said = capsys.readouterr().out
    assert "the game is over: all 2 iterations were played" in said
    for folder in ("runs/sft/policy", "runs/mine/iteration_1/policy", "runs/control/policy", "runs/scored"):
        assert (tmp_path / folder).is_dir()


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
