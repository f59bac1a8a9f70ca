"""The record by which the command line knows a stage: what it trains, with which parts, and how its run ends.

A further stage is a file beside this one, with its module and its ``STAGE``, and one line in the table of commands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin_lightning.runs.files import read_json
from spin_lightning.types import UserError


@dataclass(frozen=True)
class Stage:
    """What ``cli`` builds a command from.

    Classes are named by import path, so that a record imports none of them. ``--help`` reads the texts, dicts and
    numbers of a record from its source without importing anything: write them as literals.

    Attributes:
        module: The LightningModule that is trained: section ``model``.
        data: The LightningDataModule: section ``data``.
        callbacks: The stage's callbacks, by section.
        folder: The section whose ``output_dir`` is the run's folder.
        over_file: What is written last in the run's folder.
        mark: A setting, or how its name begins, that every run of this stage records in ``run.json`` and no run of
            another stage.
        reads_over: Settings of other stages, as one config for several holds them. A function for each: from its value,
            what follows for settings of this stage that are left at their defaults. None: nothing.
        defaults: Defaults that are not those of the classes, by setting.
        links: Settings that follow from others: for each, from which, and the function of these that gives it.
        is_over: Whether a run that wrote ``over_file`` is over, from its content and the settings of this command.
        refuse: Raises a UserError where a run cannot be trained with these settings.
        check: Raises a UserError where the module and the callbacks, by section, do not fit each other.
        exported: Where a run that is over has left its model, from the run's folder.
        makes_policy: Whether that is a policy, from which the next stage of a line starts.
    """

    module: str
    data: str
    callbacks: Mapping[str, str]
    folder: str
    over_file: str
    mark: str
    reads_over: Mapping[str, Callable[[Any], Mapping[str, Any]] | None] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    links: Mapping[str, tuple[tuple[str, ...], Callable[..., Any]]] = field(default_factory=dict)
    is_over: Callable[[Any, Any], bool] = lambda result, settings: True
    refuse: Callable[[Any], None] = lambda settings: None
    check: Callable[[Any, Mapping[str, Any]], None] = lambda module, callbacks: None
    exported: Callable[[Path], Path] = lambda folder: folder / "policy"
    makes_policy: bool = True

    def why_untrained(self, folder: Path) -> str | None:
        """Why a run that is over trained nothing and left no model. None: it did, or is not over."""
        result = read_json(folder / self.over_file) or {}
        if result.get("iterations") or self.exported(folder).exists():
            return None
        return result.get("ended_because")


def cap_of(generator: Any) -> dict[str, Any]:
    """The cap that a generator's settings put on real responses too."""
    settings = generator if isinstance(generator, Mapping) else {}
    of_class = (settings.get("init_args") or {}).get("max_new_tokens")
    flags = (settings.get(key) for key in ("max_new_tokens", "init_args.max_new_tokens"))  # beside a config's class
    given = next((cap for cap in flags if cap is not None), of_class)
    if given is None:
        return {}
    if not str(given).isdigit() or not int(given):
        raise UserError(f"data.generator.max_new_tokens must be a number of tokens, at least 1, got {given!r}.")
    return {"data.max_response_tokens": int(given)}


def played_enough(result: Mapping[str, Any], iterations: int) -> bool:
    """Whether a run is over: one that had all its iterations may be given more; one that ended earlier had its reason.

    Args:
        result: What its clock wrote last.
        iterations: How many this command asks for.
    """
    return not result["ended_because"].startswith("all ") or len(result["iterations"]) >= iterations
