"""What pyproject.toml, the wheel and the public workflow say is so."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

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
    named = {MODULES.get(name, name) for name in declared()}
    others = {
        "spin_lightning",
        "matplotlib",
        "tokenizers",
        "huggingface_hub",
    }  # transformers has bounds for the last two
    assert imported - set(sys.stdlib_module_names) - named <= others


def test_the_oldest_versions_are_the_lower_bounds():
    script = [sys.executable, str(ROOT / ".ci/oldest.py"), "torch==2.13.0"]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    oldest = dict(line.split("==") for line in printed.splitlines())
    assert oldest["torch"] == "2.13.0" and oldest["gguf"] == "0.17" and oldest["transformers"] == "5.20"
    assert {name: oldest[name] for name in declared()} == {**declared(), "torch": "2.13.0"}
