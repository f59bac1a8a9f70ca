"""Imports point one way, and the project's promises about its own text hold."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "spin_lightning"

#: A module may import those of lower ranks only.
RANKS = [
    {"version", "types", "cpu_memory", "modes", "terminal"},
    {
        "files",
        "redaction",
        "class_defaults",
        "hub",
        "signals",
        "schedule",
        "optim",
        "batches",
        "head",
        "shared_prompt",
        "rms_norm",
        "rope",
    },
    {"checkpoints"},
    {"log_probs", "losses", "encoding", "formats", "models", "model_card"},
    {"generation", "pair_store", "sources"},
    {"rows"},
    {"opponent", "metrics", "gate", "pairs"},
    {"policy"},
    {"module", "sft", "data"},
    {"callbacks", "settings_errors"},
    {"stages"},
    {"cli", "check"},
    {"demo", "lab"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path):
    """Parts of the package that a file imports when it is imported; the command line loads its stages later, by design."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spin_lightning."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("spin_lightning."))


def test_imports_point_one_way():
    arrows = [
        (part_of(path), part)
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"
        for part in imported_parts(path)
    ]
    upward = [(a, b) for a, b in arrows if a != b and RANK[b] >= RANK[a]]
    assert len(arrows) > 50
    assert upward == []


def test_module_and_data_never_import_each_other():
    assert "data" not in set(imported_parts(PACKAGE / "module.py"))
    assert "module" not in set(imported_parts(PACKAGE / "data.py"))


def test_every_part_has_a_rank():
    parts = {part_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert parts == set(RANK)


def test_public_names_load_lazily_and_exist():
    import subprocess
    import sys

    import spin_lightning

    for name in spin_lightning.__all__:
        assert getattr(spin_lightning, name) is not None
    code = "import sys, spin_lightning; assert 'torch' not in sys.modules; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
