"""``spin-lightning score``: what a reward says of a model's responses, or of those of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]

from spin_lightning.cli.check import make_object
from spin_lightning.cli.class_defaults import own_defaults
from spin_lightning.cli.quiet import silence_libraries
from spin_lightning.cli.settings_errors import (
    explaining_plugins,
    explaining_settings,
    full_stop_of,
    refusal_of_arguments,
)
from spin_lightning.generation.synthetic_data import SyntheticDataModule
from spin_lightning.models.loading import (
    context_length,
    default_dtype,
    disable_dropout,
    end_ids,
    load_config,
    load_policy,
    load_tokenizer,
    refuse_ids_beyond,
)
from spin_lightning.runs.files import replacing
from spin_lightning.runs.redaction import redacted
from spin_lightning.stages.policy import PolicyModule
from spin_lightning.stages.scoring import ComparedPairs, Players, Scoring
from spin_lightning.terminal import say
from spin_lightning.types import UserError

#: What the sections are made of.
CLASSES = {
    "model": PolicyModule,
    "data": SyntheticDataModule,
    "score": Scoring,
}
#: Of the trainer's settings, those that decide what is computed here.
OF_TRAINER = {"accelerator": "auto", "precision": "32-true"}
_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


def main(args: list[str]) -> None:
    """Score responses and print what came out.

    Args:
        args: Settings, as flags and config files.

    Raises:
        UserError: They cannot be used.
        RewardUnavailable: A judge does not reply.
    """
    silence_libraries()
    with explaining_settings(), explaining_plugins():
        settings = parse(args)
        answers = settings.data.answers_per_prompt
        settings.data.answers_per_prompt = answers or 1
        scoring: Scoring = make_object("spin_lightning.stages.scoring.Scoring", settings.score)
        fabric = make_fabric(settings.trainer)
        data = read_rows(settings, scoring, recorded=not answers)
        others = read_rows(settings, scoring, of=scoring.against) if scoring.against is not None else None
        kept = scoring.output_dir / "config.yaml"
        if not kept.exists():  # that of a run is not changed by a command that may be refused
            _keep(settings, answers, kept)
        load = Loader(settings, fabric, data, others)
        players = Players(load, fabric.autocast, settings.model.model_name_or_path, settings.model.trust_remote_code)
        summary = scoring.run(players, data, answers, others)
        _keep(settings, answers, kept)
    say(
        "\n".join(
            ["", *render(summary), "", f"More is in {scoring.output_dir}: summary.json, best.jsonl, pairs.jsonl."]
        )
    )


def parse(args: Sequence[str]) -> Namespace:
    """The settings. What a config has for other commands is read over, and said.

    Raises:
        UserError: They are not as the classes want them.
    """
    parser = make_parser()
    if any(arg.partition("=")[0] == "--print_config" for arg in args):
        from spin_lightning.cli.comments import print_commented

        args = print_commented(parser, "score", list(args))
    known = {".".join(key.split(".")[:2]) for key, _ in parser.get_defaults().items()}
    try:
        with own_defaults():
            return parser.parse_args(_read_over_others(args, known))
    except Exception as error:
        if (sentence := refusal_of_arguments(error, args)) is None:
            raise
        raise UserError(
            f"{sentence}{full_stop_of(sentence)} spin-lightning score --help shows the settings."
        ) from error


def make_parser() -> ArgumentParser:
    """The parser of the command's settings."""
    parser = ArgumentParser(exit_on_error=False, prog="spin-lightning score")
    parser.add_argument("-c", "--config", action=ActionConfigFile)
    for section, kind in CLASSES.items():
        parser.add_class_arguments(kind, section)
    for name, default in OF_TRAINER.items():
        parser.add_argument(f"--trainer.{name}", type=str | None, default=default)
    parser.set_defaults(
        {"data.generator": {"class_path": "spin_lightning.ContinuousGenerator"}, "data.val_fraction": 0.0}
    )
    return parser


def _read_over_others(args: Sequence[str], known: set[str]) -> list[str]:
    """The arguments, with each config file as its text without what only other commands have."""
    taken: list[str] = []
    left_out: list[str] = []
    for number, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag in ("-c", "--config") and equals:
            taken += [flag, _without_others(value, known, left_out)]
        elif number and args[number - 1] in ("-c", "--config"):
            taken.append(_without_others(arg, known, left_out))
        else:
            taken.append(arg)
    if left_out:
        say(f"note: score has no {', '.join(left_out)}: read over.")
    return taken


def _without_others(config: str, known: set[str], left_out: list[str]) -> str:
    path = Path(config).expanduser()
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8") if path.is_file() else config) or {}
    kept: dict[str, Any] = {}
    for section, settings in found.items():
        if section not in (*CLASSES, "trainer"):
            left_out.append(section)
        elif not isinstance(settings, Mapping) or section in ("data", "score"):
            kept[section] = settings
        else:
            kept[section] = {
                key: value for key, value in settings.items() if f"{section}.{key.partition('.')[0]}" in known
            }
            left_out += [f"{section}.{key}" for key in settings if key not in kept[section]]
    return yaml.safe_dump(kept)


def read_rows(
    settings: Namespace, scoring: Scoring, recorded: bool = False, of: str | None = None
) -> SyntheticDataModule:
    """The rows, encoded for the model of the settings or for another one."""
    kind = ComparedPairs if recorded and scoring.reward.compares else SyntheticDataModule
    data: SyntheticDataModule = make_object(f"{kind.__module__}.{kind.__qualname__}", settings.data)
    model = settings.model
    name = model.model_name_or_path if of is None else of
    where = {
        "revision": model.revision if of is None else None,
        "trust_remote_code": model.trust_remote_code,
    }
    named = data.tokenizer_name_or_path if of is None else None
    data.tokenizer = load_tokenizer(name, **where) if named is None else load_tokenizer(named)
    data.end_ids = end_ids(name, data.tokenizer, **where)
    data.keep_columns, data.needs_real = scoring.reward.columns, recorded
    if not recorded:
        data.generator.check_ready()
    data.setup("score")
    if (limit := context_length(load_config(name, **where))) is not None:
        data.refuse_longer_than(limit)
    return data


def make_fabric(trainer: Namespace) -> L.Fabric:
    """Where to compute, and in which precision.

    Raises:
        UserError: There is no such device.
    """
    try:
        return L.Fabric(devices=1, accelerator=trainer.accelerator, precision=trainer.precision)
    except RuntimeError as error:  # no such device here
        raise UserError(f"trainer.accelerator {trainer.accelerator!r} cannot be used: {error} Leave it out.") from None


class Loader:
    """Loads the model of the settings, or another one, as it is computed with here."""

    def __init__(self, settings: Namespace, fabric: L.Fabric, data: Any, others: Any) -> None:
        self.settings, self.fabric, self.data, self.others = settings, fabric, data, others

    def __call__(self, name: str | None) -> tuple[Any, Path | None]:
        given = self.settings.model
        dtype = _DTYPES.get(self.settings.trainer.precision or "", torch.float32)
        data, adapter = (self.data, given.adapter) if name is None else (self.others, None)
        if name is None:
            module = make_object("spin_lightning.stages.policy.PolicyModule", given)
            with default_dtype(dtype):
                module.configure_model()
            model: Any = module.policy
        else:
            model = load_policy(
                name,
                trust_remote_code=given.trust_remote_code,
                attn_implementation=given.attn_implementation,
                dtype=dtype,
            )
            disable_dropout(model)
        encoder, rows = data.encoder, len(model.get_input_embeddings().weight)
        refuse_ids_beyond(rows, encoder.tokenizer, encoder.pad_id, encoder.terminator_id)
        folder = Path(name or given.model_name_or_path).expanduser()
        return model.to(self.fabric.device), folder if folder.is_dir() and adapter is None else None


def _keep(settings: Namespace, answers: int, path: Path) -> None:
    kept = redacted(yaml.safe_load(yaml.safe_dump(_plain(settings))))
    kept["data"]["answers_per_prompt"] = answers
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace | Mapping):
        items = value.as_dict() if isinstance(value, Namespace) else value
        return {str(key): _plain(item) for key, item in items.items() if key != "config"}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def render(summary: Mapping[str, Any]) -> list[str]:
    """What a person wants to know first, as lines."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    error = summary["standard_error"]
    who = summary["model"] or "the data"
    lines = [
        f"{summary['responses']} responses of {who} to {summary['prompts']} prompts",
        f"  mean reward   {number(summary['mean'])}" + ("" if error is None else f" +- {error:.2g} (standard error)"),
    ]
    lines += [f"    {name:<11} {number(value)}" for name, value in summary.get("mean_by_reward", {}).items()]
    if any(summary["pass_at"].values()):
        lines += [f"  {f'pass@{k}':<13} {number(value)}" for k, value in summary["pass_at"].items()]
    elif summary["pass_at"]:
        lines.append(f"  right         none: no reward is at least {summary['right_from']:g} (score.right_from)")
    lines += [f"  {f'best of {k}':<13} {number(value)}" for k, value in summary["best_of"].items() if k != "1"]
    reasons = summary.get("reasons", {})
    if summary["unjudged"]:
        why = reasons.get("unjudged")
        lines.append(f"  not judged    {summary['unjudged']}" + (f": {why}" if why else ""))
    lines += [f"  cut           {summary['cut_share']:.0%}"] if summary["cut_share"] else []
    if (against := summary["against"]) is not None and against["win_rate"] is not None:
        low, high = against["interval"]
        lines.append(
            f"  win rate      {against['win_rate']:.3f} against {against['model']} (95 %: {low:.3f} to {high:.3f}): "
            f"{against['wins']} won, {against['ties']} tied, {against['losses']} lost"
        )
        if against["order_sensitivity"] is not None:
            lines.append(f"  order         moves the judge by {against['order_sensitivity']:.3f} on average")
    lines.append(f"  {summary['best_rows']} rows for sft in best.jsonl, {summary['pair_rows']} pairs in pairs.jsonl")
    for key, what in (("best_rows", "no rows"), ("pair_rows", "no pairs")):
        lines += [f"  {what:<13} {reasons[key]}"] if key in reasons else []
    return lines
