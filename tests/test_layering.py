"""Imports point one way, and the project's promises about its own text hold."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "spin_lightning"

#: A room imports from those above it only. What stands before the first room knows no room.
ROOMS = ["runs", "models", "data", "generation", "rewards", "stages", "reports", "cli", "demos"]
#: Files that stand alone, and what they may import of each other.
FOUNDATION = ["types", "terminal", "progress", "schedule", "losses", "advantages", "ppo_loss"]
ORDER = [*FOUNDATION, *ROOMS, "testing"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """What a file imports of the package, also inside of functions: module and name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if (node.module or "").partition(".")[0] == "spin_lightning":
                yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.partition(".")[0] == "spin_lightning")


def files() -> list[Path]:
    return [
        path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
    ]


def arrows() -> Iterator[tuple[Path, str]]:
    for path in files():
        for module, name in imports_of(path):
            inside = module.split(".")[1:] or [name]
            if inside[0] in ORDER:
                yield path, inside[0]


def test_a_room_imports_only_rooms_above_it():
    found = list(arrows())
    upward = [
        (str(path.relative_to(PACKAGE)), room)
        for path, room in found
        if room_of(path) != room and ORDER.index(room) > ORDER.index(room_of(path))
    ]
    # the command line loads the shows when they are asked for
    allowed = [("cli/commands.py", "demos")]
    assert len(found) > 150
    assert [arrow for arrow in upward if arrow not in allowed] == []


def test_no_file_imports_a_private_name_of_another():
    private = [
        (str(path.relative_to(PACKAGE)), name)
        for path in files()
        for _, name in imports_of(path)
        if name.startswith("_") and name != "__version__"
    ]
    assert private == []


def test_every_file_stands_in_a_room():
    assert {room_of(path) for path in files()} == set(ORDER)


def test_module_and_data_never_import_each_other():
    data, module = "spin_lightning.generation.synthetic_data", "spin_lightning.stages.spin"
    assert data not in {name for name, _ in imports_of(PACKAGE / "stages" / "spin.py")}
    assert module not in {name for name, _ in imports_of(PACKAGE / "generation" / "synthetic_data.py")}


def test_public_names_load_lazily_and_exist():
    import subprocess
    import sys

    import spin_lightning

    for name in spin_lightning.__all__:
        assert getattr(spin_lightning, name) is not None
    code = "import sys, spin_lightning; assert 'torch' not in sys.modules; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_editors_are_told_the_public_names_and_their_homes():
    import spin_lightning

    told = {(name, module) for module, name in imports_of(PACKAGE / "__init__.py")}
    homes = spin_lightning._HOMES
    assert told == {(name, f"spin_lightning.{home}") for home, names in homes.items() for name in names}
    assert spin_lightning.__all__ == sorted({name for name, _ in told} | {"__version__"})


def test_nothing_is_called_by_a_name_it_had():
    """Texts name modules that exist."""
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("notebooks/*.ipynb"), *files()]:
        for name in re.findall(r"spin_lightning/([\w/]+\.py)", path.read_text()):
            assert (PACKAGE / name).exists(), (path, name)
