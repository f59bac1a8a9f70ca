"""A class that is chosen on the command line begins with its own defaults, not with those of the class it replaces.

The parser keeps what was set for the class before wherever the new one has a setting of the same name, and counts the
old class's own defaults as set: ``--model.optimizer SGD`` would get the weight decay of AdamW. Here its defaults are
left out. What somebody set to another value is kept, as the parser documents it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jsonargparse._typehints as parser_of_types
from jsonargparse import ArgumentParser

from spin_lightning.terminal import say

#: The parser's own function for the moment at which one class replaces another. It has no public hook for that.
HOOK = "discard_init_args_on_class_path_change"


@contextmanager
def own_defaults() -> Iterator[None]:
    """While this lasts, whatever is parsed gives a chosen class its own defaults."""
    original, said = getattr(parser_of_types, HOOK), set()

    def replace(parser: Any, before: Any, after: Any) -> None:
        changes = bool(before and before.get("init_args") and before["class_path"] != after["class_path"])
        if changes:
            forget_defaults(before["class_path"], before["init_args"])
        original(parser, before, after)
        if changes:
            kept = [name for name in _names_of(before["init_args"]) if name not in (after.get("init_args") or ())]
            note = f"{after['class_path']} keeps what was set for {before['class_path']}: {', '.join(kept)}"
            if kept and note not in said:
                said.add(note)
                say(f"note: {note}")

    setattr(parser_of_types, HOOK, replace)
    try:
        yield
    finally:
        setattr(parser_of_types, HOOK, original)


def forget_defaults(class_path: str, settings: Any) -> None:
    """Remove from ``settings``, in place, what has the value that the class itself would give it."""
    parser, made = ArgumentParser(exit_on_error=False), parser_of_types.import_object(class_path)  # type: ignore[attr-defined]
    add = parser.add_class_arguments if inspect.isclass(made) else parser.add_function_arguments
    add(made, "made", fail_untyped=False)
    defaults = parser.get_defaults().get("made", {})
    for name in _names_of(settings):
        if name in defaults and settings[name] == defaults[name]:
            settings.pop(name)


def _names_of(settings: Any) -> list[str]:
    return list(settings if isinstance(settings, dict) else vars(settings))
