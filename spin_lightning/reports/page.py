"""A report: one HTML file that needs nothing else, of a run, or of a folder of runs such as a chain's or a demo's.

Nothing in it can run: there is no script, the page forbids them, and text of others is escaped by the template and
shown with its control characters spelled out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from spin_lightning import __version__
from spin_lightning.reports.curves import Drawn, draw_all, draw_evaluations
from spin_lightning.reports.record import KINDS, Record, read_run
from spin_lightning.reports.responses import Card, collect
from spin_lightning.reports.several import Several, is_several
from spin_lightning.reports.tables import TABLES, Table
from spin_lightning.reports.texts import POLICY, clean
from spin_lightning.reports.words import facts_of, say_what_happened
from spin_lightning.runs.files import replacing
from spin_lightning.types import UserError

#: What a page may weigh, in bytes.
MOST_BYTES = 2_000_000
#: What it is called in a run's folder.
REPORT = "report.html"
#: The most charts of metrics that this package does not know, for each run.
MOST_UNKNOWN = 12


@dataclass
class Section:
    """What a page says of a run, ready to be shown."""

    name: str
    kind: str
    state: str
    headline: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    remarks: list[tuple[str, str]] = field(default_factory=list)
    charts: tuple[list[Drawn], list[Drawn]] = field(default_factory=lambda: ([], []))
    intervals: list[Drawn] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    cards_note: str = ""
    tables: dict[str, Table] = field(default_factory=dict)


def write_report(
    folder: Path, output: Path | None = None, against: Sequence[Path] = (), samples: int = 8, running: bool = False
) -> Path:
    """Write the report of a run's folder.

    Args:
        folder: Of a run, or one that holds runs, as a chain and a demo do.
        output: The file. None: ``report.html`` in the folder.
        against: Other runs, whose curves are drawn over those of this one.
        samples: Prompts whose responses are shown.
        running: Whether the run is known to be in progress.

    Returns:
        The file.

    Raises:
        UserError: There is no such folder, or nothing of a run in it.
        StorageError: The file cannot be written.
    """
    path = output or folder / REPORT
    if path.is_dir() or path.suffix not in (".html", ".htm"):  # what is there is replaced, be it a device
        raise UserError(f"--output must be a file whose name ends with .html, got {str(path)!r}.")
    text, many = render(folder, against, samples, running), MOST_UNKNOWN
    while len(text.encode()) > MOST_BYTES and samples + many > 0:  # a folder of many runs
        samples, many = samples // 2, many // 2
        text = render(folder, against, samples, running, many)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def render(
    folder: Path, against: Sequence[Path] = (), samples: int = 8, running: bool = False, many: int = MOST_UNKNOWN
) -> str:
    """The report as text of HTML. Arguments as in ``write_report``; ``many`` is the most charts of unknown metrics.

    Raises:
        UserError: There is no such folder, or nothing of a run in it.
    """
    others: dict[str, Record] = {}
    for record in map(read_run, against):
        is_taken = record.name in (folder.resolve().name, *others)
        others[str(record.folder) if is_taken else record.name] = record
    headline: list[str] = []
    tables: dict[str, Table] = {}
    if is_several(folder):
        several = Several(folder)
        headline, tables = several.headline, several.tables
        each = samples if len(several.records) < 3 else min(samples, max(2, samples // len(several.records)))
        sections = [
            make_section(record, {**others, **several.against(record)}, each, many=many) for record in several.records
        ]
    else:
        record = read_run(folder)
        record.result = None if running else record.result  # that of a run which was given more iterations since
        sections = [make_section(record, others, samples, running, many)]
    text: str = _template().render(
        policy=POLICY,
        title=clean(folder.resolve().name or str(folder)),
        headline=headline,
        tables=tables,
        sections=sections,
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d at %H:%M UTC"),
    )
    return text


def make_section(
    record: Record, others: Mapping[str, Record], samples: int, running: bool = False, many: int = MOST_UNKNOWN
) -> Section:
    """What a page says of a run."""
    section = Section(clean(record.name), KINDS[record.kind][2], _state_of(record, running))
    section.remarks = [("" if n is None else f"iteration {n}", clean(text)) for n, text in record.remarks[-100:]]
    attempt = record.try_to
    section.headline = attempt("what happened", partial(say_what_happened, record, others), section.headline)
    section.facts = attempt("key numbers", partial(facts_of, record), section.facts)
    section.charts = attempt("curves", partial(draw_all, record, others, many), section.charts)
    section.intervals = attempt("evaluation", partial(draw_evaluations, record), section.intervals)
    section.cards, section.cards_note = attempt("responses", partial(collect, record, samples), (section.cards, ""))
    for title, make in TABLES.items():
        table = attempt(title, partial(make, record), None)
        if table is not None and table.rows:
            section.tables[title] = table
    section.missing = [clean(sentence) for sentence in dict.fromkeys(record.missing)]
    return section


def _state_of(record: Record, running: bool) -> str:
    if record.result is not None:
        return "over"
    return "running when this was made" if running else "not over"


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")
