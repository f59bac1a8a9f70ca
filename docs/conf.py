"""The docs as a site: ``make docs`` builds it, offline, and a warning is an error.

The pages are Markdown that reads on GitHub as it is. Two things are done to their text before Sphinx sees it: a comment
``<!-- from the code: NAME -->`` is replaced by what a function here writes from the sources, and links that leave this
folder (``../configs/dpo.yaml``) lead to the repository. Equations become MathML, which needs no script.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import spin_lightning
from spin_lightning.cli.commands import COMMANDS, STAGES
from spin_lightning.cli.short_help import Setting, settings_of, settings_of_class
from spin_lightning.losses import LINKS

REPOSITORY = "https://github.com/spin-lightning/spin-lightning"

project = "spin_lightning"
release = version = spin_lightning.__version__
copyright = "the authors of spin_lightning, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"spin_lightning {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
pygments_style, pygments_dark_style = "friendly", "monokai"
highlight_language = "text"  # of a block that names none: commands and what they print

napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as a list: some are properties with an entry of their own
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # hooks of Lightning are documented by Lightning
autodoc_typehints_format = "short"
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88
nitpick_ignore_regex = [
    # other packages: their inventories would have to be fetched
    ("py:.*", r"(torch|torchmetrics|lightning|transformers|jinja2)\..*|PreTrainedModel"),
    ("py:.*", r"(abc|collections|contextlib|datetime|fractions|pathlib)\..*|AbstractContextManager|Path"),
    # what only this package hands around, in signatures
    (
        "py:.*",
        r"spin_lightning\.(data|runs|models)\..*|spin_lightning\.generation\.(openai|pair_store)\..*|spin_lightning\.stages\.ranking\..*",
    ),
    ("py:.*", r"spin_lightning\.losses\.T"),
]


# From the code -------------------------------------------------------------------------------------------------------


#: Headings of the public names, in the order of the rooms.
TITLES = {
    "stages": "Stages, clocks and callbacks",
    "losses": "Losses",
    "advantages": "Advantages",
    "data": "Data",
    "generation": "Generators",
    "rewards": "Rewards",
    "models": "Adapters",
    "runs": "Checkpoints and strategies",
    "reports": "Reports",
    "types": "Errors",
}


#: What an extension is handed, or inherits from, by its import path.
RECORDS = """
types.Row types.Message types.Prompt types.Response types.PairLogProbs types.PairLossOutput types.ResponseBatch
types.PairBatch types.RolloutBatch types.TokenBatch types.TokenLogProbs types.TokenLossOutput types.TokenLaws
advantages.Trajectories advantages.Advantages generation.base.Player stages.policy.PolicyModule
stages.pairs.PairModule stages.iterative.IterativeModule stages.clock.IterationClock stages.iteration.Iteration
stages.iteration.Run stages.iteration.PolicyView stages.stage.Stage
""".split()


def public_names() -> dict[str, list[str]]:
    """What ``spin_lightning`` exports, by room."""
    rooms: dict[str, list[str]] = {room: [] for room in TITLES}
    for home, names in spin_lightning._HOMES.items():
        rooms.setdefault(home.partition(".")[0], []).extend(names)
    return rooms


def write_commands() -> Iterator[str]:
    """Each command: what it does, what follows it, and what its help says."""
    for word, command in COMMANDS.items():
        yield f"## {word}\n\n{command.summary[0].upper()}{command.summary[1:]}.\n"
        yield f"```text\nspin-lightning {word} {command.usage}\n```\n"
        if command.stage is not None:
            trains = next(trains for trains, stage in STAGES.items() if stage == command.stage)
            yield f"Its settings: [{trains}](settings.md#{trains}).\n"
        if command.help:
            yield f"```text\n{command.help}\n```\n"


def write_settings() -> Iterator[str]:
    """Each stage's settings by section, then those of the classes that a setting can name."""
    for word, record in STAGES.items():
        yield f"## {word}\n\n{COMMANDS[word].summary[0].upper()}{COMMANDS[word].summary[1:]}.\n"
        for section, (title, settings) in settings_of(record).items():
            yield f"### {word}: {section}\n\n{escaped(title)}\n"
            yield from tabulate(settings)


def write_classes() -> Iterator[str]:
    """The settings of every public class that has some, by room, those of stages apart."""
    for room, names in public_names().items():
        if room not in ("losses", "advantages", "generation", "rewards", "models"):
            continue  # those of callbacks are sections of their stages
        for name in names:
            settings = settings_of_class(f"spin_lightning.{spin_lightning._HOME_OF[name]}.{name}")
            if settings and name != "Answer" and not name.endswith("Module"):
                cls = getattr(spin_lightning, name)
                yield f"### {name}\n\n{escaped((inspect.getdoc(cls) or '').splitlines()[0])}\n"
                yield from tabulate(settings)


def tabulate(settings: list[Setting]) -> Iterator[str]:
    """A table of settings."""
    yield "| setting and type | default | |\n|---|---|---|"
    for setting in settings:
        cells = [
            f"`{setting.name}`<br><small>{name_type(setting.type)}</small>",
            f"`{setting.default.partition(';')[0]}`",
            escaped(setting.whole),
        ]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


#: Names that annotations use, in the words of a config.
NAMED_TYPES = {"ModelOrName": "str", "Link": " | ".join(LINKS), "OptimizerCallable": "torch.optim.Optimizer"}


def name_type(annotation: str) -> str:
    """An annotation in words: ``float or list[float]``, and the choices of a ``Literal``."""
    annotation = re.sub(r"\w+", lambda found: NAMED_TYPES.get(found[0], found[0]), annotation)
    words = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace(", ", " | "), annotation)
    return " or ".join(f"`{word}`" for word in re.split(r" \| (?![^\[]*\])", words)) if words else ""


def escaped(text: str) -> str:
    """Of a docstring to Markdown, in one line."""
    codes = re.split(r"``(.+?)``", " ".join(text.split()))
    plain = [re.sub(r"([\\*_<>\[\]$])", r"\\\1", part) for part in codes[::2]]
    return "".join(
        part for pair in zip(plain, [*(f"`{code}`" for code in codes[1::2]), ""], strict=True) for part in pair
    )


def write_api() -> Iterator[str]:
    """Every public name with its docstring."""
    for room, names in public_names().items():
        yield f"## {TITLES.get(room, room.capitalize())}\n\n```{{eval-rst}}"
        for name in names:
            if inspect.isclass(getattr(spin_lightning, name)):
                yield f".. autoclass:: spin_lightning.{name}\n   :members:\n   :show-inheritance:\n"
            else:
                yield f".. autofunction:: spin_lightning.{name}\n"
        yield "```\n"
    yield "## Records and base classes\n\nWhat an extension is handed or inherits from, by import path.\n"
    yield "```{eval-rst}"
    for name in RECORDS:
        yield f".. autoclass:: spin_lightning.{name}\n   :members:\n   :show-inheritance:\n"
    yield "```\n"


WRITERS = {"commands": write_commands, "settings": write_settings, "classes": write_classes, "api": write_api}


def prepare_page(app: Any, name: str, content: list[str]) -> None:
    """Put in what is written from the code, and have links out of this folder lead to the repository."""
    text = re.sub(r"<!-- from the code: (\w+) -->", lambda found: "\n".join(WRITERS[found[1]]()), content[0])
    content[0] = re.sub(r"\]\(\.\./([^)#]+)", point_to_repository, text)


def point_to_repository(link: re.Match[str]) -> str:
    """The address of a file or folder of the repository."""
    kind = "tree" if (ROOT / link[1]).is_dir() else "blob"
    return f"]({REPOSITORY}/{kind}/main/{link[1]}"


# References and equations --------------------------------------------------------------------------------------------


def find_public_name(app: Any, env: Any, node: Any, reference: Any) -> Any:
    """Where a class is mentioned by its module or its bare name, the place where it stands under its public name."""
    name = node["reftarget"].rpartition(".")[2]
    if node.get("refdomain") != "py" or name not in spin_lightning._HOME_OF:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", f"spin_lightning.{name}", node, reference)


def keep_colon(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Leave the first line of a property whole: napoleon takes what stands before a colon in it for a type."""
    if what in ("property", "attribute") and lines:
        lines[0] = f": {lines[0]}"


def visit_math(translator: Any, node: Any) -> None:
    """An equation within a line."""
    translator.body.append(as_mathml(node.astext()))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: Any) -> None:
    """An equation of its own."""
    translator.body.append(f'<div class="math">{as_mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def as_mathml(equation: str, as_block: bool = False) -> str:
    """An equation with a thin space between a function and what it is of, unless that is in brackets."""
    text = tex2mathml(equation, as_block=as_block)
    return re.sub(r"<mo>&ApplyFunction;</mo>(?!\s*<mo[^>]*>[(\[])", '<mspace width="0.17em"/>', text)


def setup(app: Any) -> None:
    """Register all of the above."""
    app.connect("source-read", prepare_page)
    app.connect("missing-reference", find_public_name)
    app.connect("autodoc-process-docstring", keep_colon, priority=100)  # before napoleon
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
