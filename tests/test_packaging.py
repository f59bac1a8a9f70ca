"""What pyproject.toml, the wheel and the public workflow say is so."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from spin_lightning import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Packages whose module has another name.
MODULES = {"pyyaml": "yaml"}


def declared() -> dict[str, str]:
    """The lower bound of every package that is needed at run time, by its name."""
    return {re.split(r"\[|>=", text)[0]: text.partition(">=")[2] for text in PROJECT["dependencies"]}


def test_every_package_that_is_imported_is_declared():
    imported = set()
    for path in (ROOT / "spin_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    named = {MODULES.get(name, name).replace("-", "_") for name in declared()}
    others = {
        "spin_lightning",
        "matplotlib",
        "peft",
        "trackio",
        "tokenizers",
        "huggingface_hub",
        "lm_eval",
    }  # transformers has bounds for the last two
    assert imported - set(sys.stdlib_module_names) - named <= others


def test_the_oldest_versions_are_the_lower_bounds():
    script = [sys.executable, str(ROOT / ".ci/oldest.py"), "torch==2.13.0"]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    oldest = dict(line.split("==") for line in printed.splitlines())
    assert oldest["torch"] == "2.13.0" and oldest["gguf"] == "0.17" and oldest["transformers"] == "5.20"
    assert {name: oldest[name] for name in declared()} == {**declared(), "torch": "2.13.0"}


def test_the_wheel_has_every_module_every_config_and_its_types(tmp_path):
    """Built of what git would keep, as hatchling does; and nothing else is in it."""
    builders = pytest.importorskip("hatchling.builders.wheel")
    (built,) = builders.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    found = {name for name in zipfile.ZipFile(built).namelist() if name.startswith("spin_lightning/")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "spin_lightning").rglob("*.[cp]*") if path.is_file()}
    modules = {name for name in modules if name.endswith((".py", ".c"))}
    modules |= {"spin_lightning/reports/report.html.j2"}
    configs = {f"spin_lightning/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert found == modules | configs | {"spin_lightning/py.typed"}


def test_public_checks_run_on_the_versions_of_python_that_are_named_and_call_targets_that_exist():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    versions = [text.rsplit(" ", 1)[1] for text in PROJECT["classifiers"] if "Python :: 3." in text]
    assert jobs["newest"]["strategy"]["matrix"]["python"] == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"
    called = {command for job in jobs.values() for step in job["steps"] if (command := step.get("run"))}
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    assert {command.split()[1] for command in called} <= targets
    assert called == {"make check LOCK=", "make oldest", "make wheel", "make docs"}


def test_hooks_forms_and_citation_are_well_formed_and_agree_with_the_package():
    for path in [ROOT / ".pre-commit-config.yaml", *(ROOT / ".github").rglob("*.yml")]:
        assert yaml.safe_load(path.read_text()), path
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__ and cited["license"] == PROJECT["license"]
    assert cited["repository-code"] == PROJECT["urls"]["Repository"]
    assert cited["references"][0]["identifiers"] == [{"type": "other", "value": "arXiv:2401.01335"}]
