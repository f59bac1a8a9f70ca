"""``spin-lightning chain``: a line of stages, each from what the last one exported, and a table of what each gained.

A stage is its own command in a process of its own, with a run folder of its own. Whether it is over, and whether it may
go on with these settings, its folder knows and its command says. So a chain keeps little: what each stage began from,
and with which settings it came to its end.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

import yaml

from spin_lightning.cli import score
from spin_lightning.cli.chain_file import START, WORDS, Chain, Link, Step, links_in, read_chain, with_paths
from spin_lightning.cli.children import Children, command_of, refuse_several
from spin_lightning.cli.short_help import settings_of
from spin_lightning.cli.stage_cli import parse_settings
from spin_lightning.data.sources import looks_local, names_in, open_source
from spin_lightning.progress import format_time
from spin_lightning.runs.files import hold, read_json, sha256_of, write_json
from spin_lightning.stages.stage import Stage
from spin_lightning.terminal import say
from spin_lightning.types import UserError

#: Settings with which a stage would not come to its end, or not begin where it was.
_REFUSED = ("ckpt_path", "trainer.fast_dev_run")


def main(args: list[str]) -> None:
    """Run the stages of a file to their end, or go on with them.

    Args:
        args: The file, and settings that go over it.

    Raises:
        UserError: The file or a setting cannot be used. What the file says is found before anything starts.
        StageFailed: A stage did.
        Interrupted: A signal was received. The stage in progress has ended too.
    """
    line = Line(read_chain(args))
    with tempfile.TemporaryDirectory() as scratch, Children() as children:
        line.check(Path(scratch))
        lock = hold(line.chain.output_dir)
        try:
            _run(line, Path(scratch), children)
        finally:
            lock.release()


def _run(line: Line, scratch: Path, children: Children) -> None:
    steps = line.chain.steps
    for number, step in enumerate(steps):
        heading = f"stage {number + 1} of {len(steps)}: {step.name}{f' ({step.word})' * (step.word != step.name)}"
        if not line.play(step, heading, scratch, children):
            say(f"the stage {step.name} ended before it is over (a time limit, perhaps). The same command continues.")
            break
    say(f"\n{table(line.results())}")
    if remark := remark_on_caps(line.results()):
        say(remark)
    say(f"Folders are in {line.chain.output_dir}. NLL in nats a held-out response; before -> after each stage.")


class Line:
    """A chain and what its folder knows of it.

    Args:
        chain: As it was read.
    """

    #: The command, and what it calls one of its runs.
    word: ClassVar[str] = "chain"
    runs_are: ClassVar[str] = "stage"
    whole_is: ClassVar[str] = "a chain"

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.records: dict[str, Stage] = {step.name: resolve_name(WORDS[step.word]) for step in chain.steps}
        self.settings: dict[str, Any] = {}  # parsed
        self._kept: dict[str, dict[str, Any]] = {}

    # --- before anything starts -----------------------------------------------------------------------------------

    def check(self, scratch: Path, only: Sequence[Step] | None = None) -> None:
        """Parse the settings of runs, and look whether the files they name are there.

        Args:
            scratch: As of ``args_of``.
            only: Those whose settings are parsed. None: all.

        Raises:
            UserError: A setting cannot be used, or a run has been taken out of the file.
        """
        refuse_several(self.word, f"`launcher` of the {self.runs_are}")
        self._kept = (read_json(self._path) or {"stages": {}})["stages"]
        for name in self._kept.keys() - {step.name for step in self.chain.steps}:
            raise UserError(
                f"{self._path} has the {self.runs_are} {name!r}, which {self.chain.file} has not. Put it back, or set "
                "output_dir to another folder."
            )
        self.refuse_unknown_common()
        for step in self.chain.steps if only is None else only:
            try:
                self._check_step(step, scratch)
            except UserError as error:
                raise UserError(f"in the {self.runs_are} {step.name!r} of {self.chain.file}: {error}") from error

    def _check_step(self, step: Step, scratch: Path) -> None:
        record = self.records[step.name]
        word, *args = self.args_of(step, scratch, must_exist=False)
        with redirect_stdout(io.StringIO()):  # what it reads over, the stage itself will say
            settings = score.parse(args) if word == "score" else parse_settings(word, args)
        self.settings[step.name] = settings
        record.refuse(settings)
        for name in _REFUSED:
            if value := settings.get(name):
                raise UserError(f"{name} cannot be {value!r} in {self.whole_is}. Leave it out.")
        links = {str(place) for place in self._places(step, must_exist=False).values()}
        for sources in (settings.data.get("train_data"), settings.data.get("val_data")):
            for name in names_in(sources):
                if name not in links and looks_local(name):
                    open_source(name, settings.data.get("split") or "train", None)

    def refuse_unknown_common(self) -> None:
        """Refuse a common setting that no run has."""
        for key in [*leaves_of(self.chain.common), *(key for key, _ in self.chain.common_flags)]:
            if not any(self._has(step, key) for step in self.chain.steps):
                where = f"`common` of {self.chain.file}" if self.word == "chain" else str(self.chain.file)
                raise UserError(f"in {where}: no {self.runs_are} has a setting {key}.")

    def _has(self, step: Step, key: str) -> bool:
        """Whether a stage has a common setting: looked at are its section and its name, and not what is in a class."""
        record = self.records[step.name]
        section, _, rest = key.partition(".")
        setting = ".".join([section, *rest.partition(".")[:1]]) if rest else section
        if setting.rstrip("+") in record.links:
            return False
        known = {
            ".".join(found.name.split(".")[:2]) for _, of in settings_of(WORDS[step.word]).values() for found in of
        }
        if step.word == "score":  # which has no trainer
            of_trainer = {f"trainer.{name}" for name in score.OF_TRAINER}
            return setting in known | of_trainer and (section in score.CLASSES or setting in of_trainer)
        return setting.rstrip("+") in {*known, *record.reads_over, "seed_everything"} or section == "trainer"

    def play(self, step: Step, heading: str, scratch: Path, children: Children) -> bool:
        """Play a run to its end, or go on with it. Returns at once where it is done; else says ``heading`` first.

        Returns:
            Whether it is over.

        Raises:
            UserError: It would begin from something else than it did.
            StageFailed: It failed.
            Interrupted: A signal was received.
        """
        self.refuse_other_beginning(step)
        if self.is_done(step):
            return True
        say(f"\n{heading}")
        args = self.args_of(step, scratch)
        self.note_beginning(step)
        children.run(command_of(args, step.launcher), f"the {self.runs_are} {step.name}", self.advice_if_over(step))
        if self.is_over(step):
            self.note_end(step)
        return self.is_over(step)

    # --- a stage's command ----------------------------------------------------------------------------------------

    def args_of(self, step: Step, scratch: Path, must_exist: bool = True) -> list[str]:
        """The command of a stage, its settings in files that are made in ``scratch``: they may hold secrets.

        Raises:
            UserError: What another stage was to leave is not there.
        """
        own = with_paths(step.settings, self._places(step, must_exist))
        if f"{self._section(step)}.output_dir" in [*leaves_of(step.settings), *(key for key, _ in step.flags)]:
            raise UserError(
                f"{self._section(step)}.output_dir follows from output_dir and the stage's name. Leave it out."
            )
        common, common_flags = self._common_of(step)
        args = [step.word, *(f"--config={path}" for path in step.configs)]
        # what is said last wins, so what is common comes before what is a stage's own
        for name, settings, flags in (("common", common, common_flags), ("own", own, [])):
            if settings:
                path = scratch / f"{step.name}_{name}.yaml"
                path.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
                args.append(f"--config={path}")
            args += [f"--{key}={value}" for key, value in flags]
        if (start := self._start_of(step)) is not None:
            args.append(f"--{START}={self._place(start, must_exist)}")
            if step.word != "score":  # of a copied folder; that the model is the same is seen to here
                args.append(f"--checkpoint.allow_changes+={START}")
        args += [f"--{key}={value}" for key, value in step.flags]
        return [*args, f"--{self._section(step)}.output_dir={self.folder_of(step)}"]

    def _common_of(self, step: Step) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """The common settings that a stage has, from the file and from the command line."""
        flags = [(key, value) for key, value in self.chain.common_flags if self._has(step, key)]
        return _pick(self.chain.common, lambda key: self._has(step, key)), flags

    def _start_of(self, step: Step) -> Link | None:
        """The policy that a stage starts from where the file does not say: that of the last stage with one."""
        if START in [*leaves_of(step.settings), *(key for key, _ in step.flags)]:
            return None
        earlier = self.chain.steps[: self.chain.steps.index(step)]
        makers = [other for other in earlier if self.records[other.name].makes_policy]
        return Link(makers[-1].name) if makers else None

    def _links_of(self, step: Step) -> list[Link]:
        start = self._start_of(step)
        return [*links_in(step.settings), *([start] if start is not None else [])]

    def _places(self, step: Step, must_exist: bool) -> dict[Link, Path]:
        return {link: self._place(link, must_exist) for link in self._links_of(step)}

    def _place(self, link: Link, must_exist: bool) -> Path:
        other = self._step(link.stage)
        folder = self.folder_of(other)
        place = self.records[other.name].exported(folder) if link.path is None else folder / link.path
        if must_exist and not place.exists():
            if link.path is None and (why := self.records[other.name].why_untrained(folder)):
                raise UserError(
                    f"the stage {other.name!r} ended before it trained anything, because {why}. It has left no model "
                    f"to go on from. Change its settings, and remove {folder} to have it begin again."
                )
            there = sorted(entry.name for entry in folder.iterdir())
            advice = f"{folder} has {', '.join(there)}. Correct the path."
            if link.path is None:
                advice = (
                    "Of an adapter leave model.adapter.merged at true there, so that a whole model is exported too."
                )
            raise UserError(f"the stage {other.name!r} is over, and there is no {place}. {advice}")
        return place

    def _step(self, name: str) -> Step:
        return next(step for step in self.chain.steps if step.name == name)

    def folder_of(self, step: Step) -> Path:
        """The folder of a run."""
        return self.chain.output_dir / step.name

    def _section(self, step: Step) -> str:
        return self.records[step.name].folder

    # --- what is kept ---------------------------------------------------------------------------------------------

    @property
    def _path(self) -> Path:
        return self.chain.output_dir / f"{self.word}.json"

    def is_over(self, step: Step) -> bool:
        """Whether a stage has come to its end."""
        record = self.records[step.name]
        result = read_json(self.folder_of(step) / record.over_file)
        return result is not None and record.is_over(result, self.settings[step.name])

    def change(self, step: Step) -> None:
        """Put a run in the place of the one with its name: the same, with settings that follow from other runs."""
        steps = tuple(step if other.name == step.name else other for other in self.chain.steps)
        self.chain = replace(self.chain, steps=steps)

    def is_done(self, step: Step) -> bool:
        """Whether a stage is over, and was with the settings that it has now. Of others its command says whether."""
        kept = self._kept.get(step.name, {})
        return self.is_over(step) and kept.get("settings_sha256") == self.settings_hash(step)

    def advice_if_over(self, step: Step) -> str:
        """What else may be done where a stage that is over is refused: it had other settings."""
        return f"Removing {self.folder_of(step)} has that stage begin again." if self.is_over(step) else ""

    def refuse_other_beginning(self, step: Step) -> None:
        """Make sure that what a stage began from is what it would begin from now.

        Raises:
            UserError: It takes something from another stage now, or from one that has been trained again since.
        """
        before, now = self._kept.get(step.name, {}).get("began_from"), self._beginning_of(step)
        if before not in (None, now) and self.folder_of(step).is_dir():
            names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            raise UserError(
                f"the stage {step.name!r} did not begin from what it would begin from now: {', '.join(names)} is "
                f"another or was trained anew. Remove {self.folder_of(step)} to have it begin again, or set output_dir "
                "to another folder."
            )

    def _beginning_of(self, step: Step) -> dict[str, str | None]:
        return {link.stage: self._sha(link.stage) for link in self._links_of(step)}

    def note_beginning(self, step: Step) -> None:
        """Keep what a stage begins from."""
        self.keep(step, {"stage": step.word, "began_from": self._beginning_of(step)})

    def note_end(self, step: Step) -> None:
        """Keep with which settings a stage came to its end, and what it gained."""
        self.keep(step, {"settings_sha256": self.settings_hash(step), **self._measure(step)})

    def results(self) -> dict[str, dict[str, Any]]:
        """What is known of the stages that are over, by name."""
        kept = {step.name: self._kept.get(step.name, {}) for step in self.chain.steps}
        return {name: values for name, values in kept.items() if "updates" in values}

    def kept(self, step: Step) -> dict[str, Any]:
        """What is kept of a run."""
        return self._kept.get(step.name, {})

    def keep(self, step: Step, values: Mapping[str, Any]) -> None:
        """Keep something of a run, beside what is kept of it."""
        self._kept[step.name] = {**self._kept.get(step.name, {}), **values}
        write_json(
            self._path, {"stages": {s.name: self._kept[s.name] for s in self.chain.steps if s.name in self._kept}}
        )

    def _sha(self, name: str) -> str | None:
        """Hash of what a stage wrote last."""
        path = self.folder_of(self._step(name)) / self.records[name].over_file
        return sha256_of(path) if path.exists() else None

    def settings_hash(self, step: Step) -> str:
        """Hash of all settings of a run."""
        texts = [path.read_text(encoding="utf-8") for path in step.configs]
        return sha256_of(repr((step.word, texts, self._common_of(step), step.settings, step.flags)))

    def _measure(self, step: Step) -> dict[str, Any]:
        """What a stage gained: from how its run began, and the summaries that it wrote."""
        folder, record = self.folder_of(step), self.records[step.name]
        result, start = read_json(folder / record.over_file), read_json(folder / "start.json") or {}
        parts = result["iterations"] if isinstance(result.get("iterations"), list) else [result]
        first, last, end = (parts or [{}])[0], (parts or [{}])[-1], result.get("held_out") or {}
        exported, data = record.exported(folder), self.settings[step.name].data
        sampler = data.get("generator") or {}
        return {
            "response_cap": data.get("max_response_tokens") or (sampler.get("init_args") or {}).get("max_new_tokens"),
            "updates": sum(part.get("updates") or 0 for part in parts),
            "seconds": sum(_add_up(part.get("seconds") or 0.0) for part in parts),
            "nll": [start.get("val/nll"), last.get("val_nll")],
            "reward": [(first.get("pairs") or {}).get("val/reward"), end.get("val/reward", result.get("mean"))],
            "accuracy": result.get("val_accuracy"),
            "exported": exported.relative_to(self.chain.output_dir).as_posix() if exported.exists() else None,
        }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What each stage gained, a line each.

    Example:
        >>> print(table({"sft": {"updates": 12, "seconds": 38.2, "nll": [9.5, 8.25], "exported": "sft/policy"}}))
        stage  updates  time  held-out NLL  exported
        sft         12  38 s  9.50 -> 8.25  sft/policy
    """
    columns: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
        "updates": (">", lambda result: str(result["updates"])),
        "time": (">", lambda result: format_time(result["seconds"])),
        "held-out NLL": ("<", lambda result: _before_after(result.get("nll"), ".2f")),
        "held-out reward": ("<", _show_reward),
        "exported": ("<", lambda result: result["exported"] or ""),
    }
    rows = [["stage", *columns], *([name, *(show(of) for _, show in columns.values())] for name, of in results.items())]
    return aligned(rows, ["<", *(side for side, _ in columns.values())])


def aligned(rows: Sequence[Sequence[str]], sides: Sequence[str]) -> str:
    """A table of a heading and rows, without the columns in which no row has anything.

    Args:
        rows: The cells, those of the heading first.
        sides: For each column ``<`` or ``>``, the side where its cells begin.

    Example:
        >>> print(aligned([["arm", "time", "none"], ["sft", "3 s", ""], ["longer", "12 s", ""]], "<><"))
        arm     time
        sft      3 s
        longer  12 s
    """
    shown = [
        [f"{row[place]:{side}{max(len(other[place]) for other in rows)}}" for row in rows]
        for place, side in enumerate(sides)
        if len(rows) == 1 or any(row[place] for row in rows[1:])
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*shown, strict=True))


def remark_on_caps(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A warning where NLLs are of responses that were cut at different lengths; empty where they are not.

    Example:
        >>> print(remark_on_caps({"sft": {"nll": [9.5], "response_cap": 64}, "fit": {"nll": [8.0], "response_cap": 5}}))
        note: held-out responses were cut at 64 tokens in sft, at 5 in fit: their NLLs do not compare.
    """
    of_stage = {
        name: result["response_cap"]
        for name, result in results.items()
        if result.get("response_cap") and any(value is not None for value in result.get("nll") or ())
    }
    first, *others = [f"{cap} in {name}" for name, cap in of_stage.items()] or [""]
    if len({*of_stage.values()}) < 2:
        return ""
    cut = ", at ".join([first.replace(" in", " tokens in", 1), *others])
    return f"note: held-out responses were cut at {cut}: their NLLs do not compare."


def _before_after(values: Sequence[float | None] | None, style: str) -> str:
    return " -> ".join(format(value, style) for value in values or () if value is not None)


def _show_reward(result: Mapping[str, Any]) -> str:
    """Of a policy before and after, of responses that were scored their mean, of a reward model its accuracy."""
    if result.get("accuracy") is not None:
        return f"accuracy {result['accuracy']:.2f}"
    return _before_after(result.get("reward"), ".3f")


def leaves_of(settings: Mapping[str, Any]) -> list[str]:
    """The names of all settings, of a class that of the setting which names it."""
    found = []
    for key, value in settings.items():
        is_section = isinstance(value, Mapping) and "class_path" not in value
        found += [f"{key}.{leaf}" for leaf in leaves_of(value)] if is_section and value else [str(key)]
    return found


def _pick(settings: Mapping[str, Any], is_wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The settings of which ``is_wanted`` says so by section and name."""
    picked: dict[str, Any] = {}
    for section, value in settings.items():
        if isinstance(value, Mapping):
            of = {key: item for key, item in value.items() if is_wanted(f"{section}.{key}")}
            picked |= {section: of} if of else {}
        elif is_wanted(section):
            picked[section] = value
    return picked


def _add_up(seconds: Any) -> float:
    return sum(seconds.values()) if isinstance(seconds, Mapping) else float(seconds)
