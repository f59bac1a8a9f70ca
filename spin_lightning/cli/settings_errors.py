"""Refused settings, in one sentence: which setting, what was expected, what came, what to do.

For what a parser or a library refuses: ``jsonargparse`` answers a wrong value with every type it tried, and a class
that cannot be imported without the reason.
"""

from __future__ import annotations

import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException

from spin_lightning.runs.files import STORAGE_ERRORS
from spin_lightning.runs.redaction import redacted
from spin_lightning.types import Interrupted, NonFiniteError, RewardUnavailable, StorageError, UserError

#: Code that is given settings and nothing else, and the settings: what it refuses is the user's to mend.
_LIBRARIES = {
    "lightning.fabric.utilities.seed": "seed_everything",
    "lightning.": "the trainer setting that this is about",
    "torch.optim.": "model.optimizer",
    "torch.utils.data.": "the data setting that this is about",
    "jsonargparse.": "",  # names it
    "fsspec.": "the folder",
}


@contextmanager
def explaining_settings(settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turn what libraries raise about the settings they are given into a ``UserError``; let every other error pass.

    Args:
        settings: Those that it may be about; the message names the ones that the library speaks of, or else all.

    Raises:
        UserError: Raised by the package's own classes through the parser, by the parser, by Lightning, or by an
            optimiser or a loader when it is made.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        for cause in causes:  # the parser wraps what a class says about its settings; the user needs only that
            if isinstance(cause, UserError):
                raise cause from None
        where = _name_refusing_library(error)
        if where is None:
            raise
        said, known = in_a_sentence(str(error)), settings or {}
        meant = {
            name: value
            for name, value in known.items()
            if re.search(rf"\b{name.rpartition('.')[2]}\b", said) or (isinstance(value, str) and value in said)
        }
        shown = redacted(meant or dict(known))  # a value alone does not tell what it is
        mend = ", ".join(f"{name} (now {value!r})" for name, value in shown.items()) or _LIBRARIES[where]
        raise UserError(f"{said}{full_stop_of(said)}{mend and f' Change {mend}.'}") from error


@contextmanager
def explaining_plugins() -> Iterator[None]:
    """Turn what the user's own classes raise, or how they cannot be called, into a ``UserError`` with the place.

    Raises:
        UserError: The error is of code that is neither this package's nor installed.
    """
    try:
        yield
    except (UserError, StorageError, NonFiniteError, RewardUnavailable, Interrupted, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            raise
        if place := _place_in_plugin(error):
            said = in_a_sentence(str(error))
            raise UserError(
                f"{place} ends with {type(error).__name__}{said and f': {said}'}{full_stop_of(said)} It is code of "
                "your own: mend it there."
            ) from error
        raise


_OURS = Path(__file__).parent.parent
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def _is_of_user(file: str | None) -> bool:
    if not file or not Path(file).is_file():
        return False
    return not (Path(file).is_relative_to(_OURS) or file.startswith(_INSTALLED))


def _place_in_plugin(error: Exception) -> str | None:
    """Where in the user's own code an error came up, or which of their functions cannot be called as it is here."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        if _is_of_user(file):
            return f"{frame.f_code.co_qualname} ({file}, line {line})"
        if Path(file).is_relative_to(_OURS):
            break
    called = (
        re.match(r"((?:\w+\.)+\w+)\(\) (?:takes|missing|got) ", str(error)) if isinstance(error, TypeError) else None
    )
    for module in list(sys.modules.values()) if called else []:
        path = getattr(module, "__file__", None)
        if isinstance(path, str) and _is_of_user(path):
            found: Any = module
            for name in called[1].split("."):  # type: ignore[index]
                found = getattr(found, name, None)
            if code := getattr(found, "__code__", None):
                return f"the call of {called[1]} ({code.co_filename}, line {code.co_firstlineno})"  # type: ignore[index]
    return None


def _name_refusing_library(error: Exception) -> str | None:
    """Which of the libraries said no, if it is about a setting."""
    if isinstance(error, MisconfigurationException):
        return "lightning."
    if not isinstance(error, ValueError | TypeError | ImportError | NotImplementedError | AssertionError):
        return None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return next((name for name in _LIBRARIES if str(frame.f_globals.get("__name__")).startswith(name)), None)


def refusal_of_arguments(error: Exception, args: Sequence[str]) -> str | None:
    """What an error while arguments are parsed is about, in a sentence; None where that is no mistake in them."""
    for name in _imports_tried(error):
        if problem := _find_import_problem(name):
            key = next((arg for arg in args if name in arg), name).partition("=")[0]
            key = args[args.index(key) - 1] if key == name and key in args[1:] else key
            return f"{key.strip('-+')}: {name!r} cannot be used: {problem}{full_stop_of(problem)}"
    return in_a_sentence(str(error)) if isinstance(error, ArgumentError) else None


def _imports_tried(error: BaseException | None) -> Iterator[str]:
    """Classes that the parser was importing when it failed. Not all of its messages name them."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_name == "import_object" and "." in str(frame.f_locals.get("name")):
                yield str(frame.f_locals["name"])
        error = error.__cause__ or error.__context__


def in_a_sentence(message: str) -> str:
    r"""A parser's message on one line: the setting, what is wrong with it, and what it may be.

    Example:
        >>> in_a_sentence('Parser key "data.batch_size":\n  Expected a <class \'int\'>. Got value: x')
        "data.batch_size must be int, got 'x'."
    """
    if link := re.match(r"argument \w+\((.*?)\) --> ([\w.]+):", message):
        return (
            f"{link[2]} follows from {link[1].replace(', ', ' and ')}: leave it out, and set {link[1].split(', ')[-1]}."
        )
    if other := re.match(r"Subcommand '\w+' does not accept option '(.+)'", message):
        return f"there is no setting {other[1]}."
    if section := re.match(r'Parser key "(?:\w+\.)?(\w+)":\s+Unable to load config "(.*)"', message):
        return (
            f"{section[1]} is a section: give its settings, as --{section[1]}.KEY VALUE, or a file with them; got "
            f"{section[2]!r}."
        )
    setting = re.match(r'Parser key "(.+?)":', message)
    name = f"{setting[1]}: " if setting else ""
    _, nested, inner = message[1:].partition('Parser key "')
    if setting and nested:  # a setting of the class that a setting names
        return in_a_sentence(f"{nested}{setting[1]}.{inner}")
    got = re.search(r"(?:Given|Got) value: (.*?)(?:\. Got value: .*)?$", message, re.M)
    wanted = re.search("import path string: (.*)", message)
    wanted = wanted or re.search(r"Import path (\S+) does not correspond", message)
    value = (got or wanted)[1].strip() if got or wanted else ""  # type: ignore[index]
    if value.startswith(("{", "[{")) and (of_class := wanted or re.search("'class_path': '(.+?)'", value)):
        value = of_class[1]  # as a file names it
    if made := re.search(r"callable class: (.*?)\. Got value: Namespace\(class_path='(.+?)'", message):
        problem = made[1] + _options_of(made[2], made[1])
        return f"{name}{made[2]!r} cannot be used: {problem}{full_stop_of(problem)}"
    takes_classes = re.search(r"<class '\w+\.\w", message.partition("Errors:")[0])
    if takes_classes and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", value) and (problem := _find_import_problem(value)):
        return f"{name}{value!r} cannot be used: {problem}{full_stop_of(problem)}"
    if made := re.search(r"Errors:\s+- (.*)(?s:.*)Given value: (?:\[.*)?Namespace\(class_path='(.+?)'", message):
        problem = made[1]
        if not re.search("class_path '.+?':", message):  # which says more
            return f"{name}{made[2]!r} cannot be made: {problem}{full_stop_of(problem)}"
    path = re.search(r"class_path '(.+?)':\s*(.*)", message)
    if path and (problem := _find_import_problem(path[1]) or path[2].strip()):
        problem += _options_of(path[1], problem)
        return f"{name}{path[1]!r} cannot be used: {problem}{full_stop_of(problem)}"
    is_number = re.search(r"Subtypes: \[<class '(float|int)'>", message)
    if not is_number and ("import path" in message.lower() or "callable class" in message):
        if "." not in value:
            return (
                f"{name}no class is called {value!r}. Give its import path, such as "
                f"my_module.{value}.{_find_similar(value)}"
            )
        wanted = re.search(r"subclass of (\w+)", message)
        problem = _find_import_problem(value) or f"it is no {wanted[1] if wanted else 'class for this setting'}"
        if wanted and wanted[1] == "Reward" and (function := _find_function(value)):
            return f"{name}{value} is a function: use FunctionReward with function {function}."
        return f"{name}{value!r} cannot be used: {problem}{full_stop_of(problem)}"
    if setting and "." in value and takes_classes and (problem := _find_import_problem(value)):
        return f"{name}{value!r} cannot be used: {problem}{full_stop_of(problem)}"
    if setting and got:
        kinds = re.search(r"Subtypes: \[(.*)\]", message) or re.search(r"Expected an? (.+?)\. Got", message)
        if kinds:
            return f"{setting[1]} must be {_make_readable(kinds[1])}, got {value!r}."
    message = re.sub(r"\b(fit|validate)\.(?=model\.|data\.)", "--", message)  # in a list of what is required
    return re.sub(r"^Parser key \"(.+?)\":", r"\1:", " ".join(message.split()))


def full_stop_of(text: str) -> str:
    """What a sentence needs at its end before another one follows."""
    return "" if text.endswith((".", "?", "!")) else "."


def _make_readable(kinds: str) -> str:
    kinds = re.sub(r"typing\.Literal\[(.*?)\]", r"\1", kinds)
    kinds = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kinds)
    kinds = re.sub(r"(?:\w+\.)+(\w+)", r"\1", kinds).replace("NoneType", "null")
    return " or ".join(dict.fromkeys(re.split(r", (?![^\[]*\])", kinds)))


def _find_import_problem(class_path: str) -> str | None:
    """Why a class cannot be imported, or None."""
    module, _, name = class_path.rpartition(".")
    if not all(part.isidentifier() for part in class_path.split(".")):
        return "that is no import path, such as my_module.MyClass: names of modules and of a class, joined by dots"
    if not module:
        return None
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if module == missing or module.startswith(f"{missing}."):
            here = [path.stem for path in Path.cwd().glob("*.py")]
            return f"there is no module {missing!r}, in the current folder or installed.{_find_similar(missing, here)}"
        return f"the module {module!r} needs {missing!r}, which is not installed. Install it"
    except SyntaxError as error:
        return f"{error.filename or module}, line {error.lineno or 1}: {error.msg}"
    except Exception as error:
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        return (
            f"importing {module!r} ends with {type(error).__name__}: {error} ({frame.f_code.co_filename}, line {line})"
        )
    if not hasattr(found, name):
        return f"the module {module!r} has no {name!r}.{_find_similar(name, dir(found))}"
    if abstract := sorted(getattr(getattr(found, name), "__abstractmethods__", ())):
        return f"it does not say what {', '.join(abstract)} does, which a class of this kind must"
    return None


def _find_function(path: str) -> str | None:
    """A function that stands where a class belongs, as ``FunctionReward`` takes it."""
    module, _, name = path.rpartition(".")
    is_function = _find_import_problem(path) is None and inspect.isfunction(getattr(import_module(module), name))
    return f"{module}:{name}" if is_function else None


def _options_of(class_path: str, problem: str) -> str:
    """What a class takes, where it was given something else."""
    wrong = re.match(r"Option '(\w+)", problem)
    module, _, name = class_path.rpartition(".")
    if not wrong or not module:
        return ""
    options = list(inspect.signature(getattr(import_module(module), name)).parameters)
    return f". It takes {', '.join(options) or 'no settings'}.{_find_similar(wrong[1], options)}"


def _find_similar(name: str, known: Sequence[str] | None = None) -> str:
    """Those of the known names that read like this one. None: the classes that need no path."""
    if known is None:
        import lightning.pytorch.callbacks as callbacks
        import lightning.pytorch.loggers as loggers

        import spin_lightning

        known = [*spin_lightning.__all__, *callbacks.__all__, *loggers.__all__]
    close = get_close_matches(name, [other for other in known if other != name], 3, 0.75)
    return f" Did you mean {' or '.join(close)}?" if close else ""
