"""Trackers of experiments beside a run's own logs: what they are told, and how a run outlives them.

A tracker is a logger of Lightning that somebody named in ``trainer.logger``. It is given the metrics, and the settings
without secrets.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from spin_lightning.runs.files import read_json, write_json
from spin_lightning.runs.redaction import redacted
from spin_lightning.terminal import say
from spin_lightning.types import UserError

#: In the run's folder: the run that each tracker made of it, by the tracker's class path.
TRACKERS = "trackers.json"
#: The setting of a tracker that names a run to continue.
_NAMES_RUN = {"WandbLogger": "id", "MLFlowLogger": "run_id", "CometLogger": "experiment_key", "TrackioLogger": "name"}
_CALLED_WHILE_TRAINING = ("log_metrics", "log_graph", "save", "finalize", "after_save_checkpoint")


class TrackioLogger(Logger):
    """Metrics and settings in trackio (``spin-lightning[trackio]``): on this machine, or in a Space of Hugging Face.

    ``trackio show`` opens them in a browser.

    Args:
        project: What runs are grouped under.
        name: What the run is called. A run of that name in the project is continued. None: trackio finds a name.
        space_id: A Space, such as ``me/experiments``, to which everything is sent. None: this machine alone.
        folder: Where it is kept on this machine. None: trackio's own, ``~/.cache/huggingface/trackio``.

    Raises:
        UserError: trackio is not installed.
    """

    def __init__(
        self,
        project: str = "spin-lightning",
        name: str | None = None,
        space_id: str | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        if folder is not None:
            os.environ["TRACKIO_DIR"] = str(Path(folder).expanduser().absolute())  # which it reads when it is imported
        try:
            import trackio  # noqa: F401
        except ImportError as error:
            raise UserError("TrackioLogger needs the package 'trackio'. Install spin-lightning[trackio].") from error
        self.project, self.run_name, self.space_id = project, name, space_id
        self._run: Any = None
        self._is_finished = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of trackio, begun when it is first asked for."""
        if self._run is None:
            import trackio

            self._run = trackio.init(
                self.project, name=self.run_name, space_id=self.space_id, resume="allow", embed=False
            )
        return self._run

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str | None:
        return self.run_name if self._run is None else str(self._run.name)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Tell the settings, which trackio keeps with the first metrics."""
        self.experiment.config.update(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None and not self._is_finished:
            self._is_finished = True
            self._run.finish()


def continue_in(specs: Sequence[Any], folder: Path) -> None:
    """Name the runs that trackers made of the run in ``folder`` in their settings, in place, unless one is named.

    Args:
        specs: Class paths with their settings, as the parser has them.
        folder: Of the run.
    """
    made = read_json(folder / TRACKERS) or {}
    for key, spec in _numbered(specs).items():
        settings, name = getattr(spec, "init_args", None), _NAMES_RUN.get(spec.class_path.rpartition(".")[2])
        if key in made and name is not None and settings is not None and settings.get(name) is None:
            settings[name] = made[key]


def begin(trackers: Sequence[Logger], specs: Sequence[Any], folder: Path) -> None:
    """Let trackers begin before anything is loaded, and keep what they call this run.

    Args:
        trackers: The loggers.
        specs: What they were made of, in the same order.
        folder: Of the run.

    Raises:
        UserError: One of them cannot begin.
    """
    made = read_json(folder / TRACKERS) or {}
    for tracker, key in zip(trackers, _numbered(specs), strict=True):
        try:
            with patch.object(sys, "argv", redacted(sys.argv)):  # wandb keeps the command line
                tracker.experiment  # type: ignore[attr-defined]  # noqa: B018
            made[key] = str(tracker.version)
        except Exception as error:
            raise UserError(
                f"the tracker {type(tracker).__name__} cannot begin: {_words_of(error)} Log in to it, or let it keep "
                "everything on this machine (docs/trackers.md), or leave it out of trainer.logger: the run's own logs "
                "are there without it."
            ) from error
    if trackers:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TRACKERS, made)


def _numbered(specs: Sequence[Any]) -> dict[str, Any]:
    """Each by its class path, the second of a class with its number behind it."""
    found: dict[str, Any] = {}
    for spec in specs:
        before = sum(other.class_path == spec.class_path for other in found.values())
        found[f"{spec.class_path} {before + 1}" if before else spec.class_path] = spec
    return found


def tell(trackers: Iterable[Logger], settings: Mapping[str, Any]) -> None:
    """Tell trackers the settings of a run, without secrets. One that does not take them is a note."""
    for tracker in trackers:
        with _noting(tracker, "did not take the settings", lambda: None):
            tracker.log_hyperparams(redacted(dict(settings)))


def outlive(tracker: Logger) -> None:
    """From now on a tracker that fails is left alone, with a note, and the run goes on."""

    def leave() -> None:
        for name in _CALLED_WHILE_TRAINING:
            setattr(tracker, name, lambda *args, **kwargs: None)

    for name in _CALLED_WHILE_TRAINING:
        setattr(tracker, name, _outliving(tracker, getattr(tracker, name), leave))


def _outliving(tracker: Logger, call: Callable[..., Any], leave: Callable[[], None]) -> Callable[..., Any]:
    def safe(*args: Any, **kwargs: Any) -> Any:
        with _noting(
            tracker, "takes nothing more; the run goes on without it, and its own logs have everything", leave
        ):
            return call(*args, **kwargs)

    return safe


@contextmanager
def _noting(tracker: Logger, what: str, leave: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        leave()
        say(f"note: the tracker {type(tracker).__name__} {what}. It said: {_words_of(error)}")


def _words_of(error: Exception) -> str:
    said = str(redacted(" ".join(str(error).split()))) or type(error).__name__
    return said if said.endswith((".", "!", "?")) else f"{said}."
