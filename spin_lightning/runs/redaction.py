"""Leaves secrets out of what is written down.

By name, by shape, and by looking random: what has no name and no shape that says so is still left out where it is long
and mixes cases and digits as keys do. Hashes and revisions, which a run needs, are lower-case hexadecimal and stay.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

#: Words of a name whose value is left out, whatever it is.
_SECRET = re.compile(
    r"(^|_)(passwd|passphrases?|pwd|authori[sz]ation|auth|oauth2?|bearer|jwt|cookies?|dsn|connection_string|conn_str)(_|$)"
    r"|secret|password|credential|api_?key|webhook|(^|_)(pass|sas|sig|signature|session_?id|pem|otp|pin|pat|salt)$"
    r"|(^|_)(access|private|account|ssh|gpg|encryption|master|storage|signing)_?keys?(_|$)|(^|_)token$"
)
#: Tokens of a vocabulary.
_VOCABULARY = re.compile(
    r"(pad|eos|bos|unk|sep|cls|mask|image|audio|video|vision|speech|special|tool|think|first|last|start|end|stop|prefix|suffix"
    r"|newline|per)_token$"
)
#: Words of a name whose value is left out if it looks like a key: ``wandb_key`` is a secret, ``sort_key`` is a column.
_PERHAPS = re.compile(r"(^|_)(\w*keys?|tokens?\d*|token\w*value|oauth\w*)(_|$)")
#: Words of a name whose value is a hash, however much it looks like a key.
_HASH = re.compile(r"(^|_)(revision|commit|sha\d*|hash|digest|fingerprint|checksum|md5|ref|version)(_|$)")

#: Words of a name whose value says where something is or what it is called. A run's folder may be named as keys look.
_PLACE = re.compile(r"(^|_)(dir|dirpath|folder|path|file|data|name|run|uuid|experiment|project|split)$")

_SHAPES = re.compile(
    # user:password@host, token@host
    r"(?<=://)[^/@\s:]*:[^/?#\s]+(?=@)|(?<=://)[^/@\s:]{12,}(?=@)|(?<=[a-z0-9]:/)[^/@\s:]+:[^/?#\s]+(?=@)"
    r"|\bAIza[\w-]{30,}|\bya29\.[\w-]{16,}|\bAGE-SECRET-KEY-\w+|\bSG\.[\w-]{16,}\.[\w-]{16,}"
    r"|\bdapi[0-9a-f]{32}\b|\b(?:SK|AC)[0-9a-f]{32}\b|\bA[KS]IA[0-9A-Z]{16}\b|\bey[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
    r"|(?<=hooks\.slack\.com/)\S+|(?<=/api/webhooks/)\S+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY[A-Z ]*-----[\s\S]*?(?:-----END [A-Z ]*-----|\Z)"
    r"|\b(?i:bearer)\s+(?=\S*[\d=]|\S{20})[\w+/=.~-]{8,}|\b(?i:basic)\s+(?=\S*[A-Z])(?=\S*[a-z])(?=\S*[\d=])[\w+/=-]{8,}"
)
#: How tokens begin that are known by it. ``hf_train_and_held_out_rows`` begins so too.
_PREFIXED = re.compile(
    r"\b(?:hf|api_org|sk|rk|pk|gh[a-z]|github_pat|glpat|wandb|xox[a-z]|xapp|npm|pypi|nvapi|r8|gsk|secret|lin_api|tgp_v1|do[opr]_v1"
    r"|hvs|shpat|dckr_pat)[_-]([\w-]{16,})"
)
_ASSIGNED = re.compile(  # of a URL's query, a header, a flag, of JSON in a text, or a line of YAML
    r"(^|[?&;,\s'(])(-{0,2}[A-Za-z][\w.-]*='?|--[A-Za-z][\w.-]*\s+)([^&;,\s#']+)"
    r"""|(")([\w.-]+"\s*:\s*")([^"]+)"""
    r"|^(\s*)([A-Za-z][\w-]*:\s+)(\S+)$",
    re.MULTILINE,
)
_RUN = re.compile(r"[A-Za-z0-9]{20,}")
_HEXADECIMAL = re.compile(r"[0-9a-f]{32}|[0-9a-f]{40}")  # a key of wandb, or a git revision: the name tells


def redacted(value: Any, name: str = "") -> Any:
    """Settings as they may be kept: without values that are secrets, by their name or by how they look.

    Args:
        value: Dicts, lists and plain values, as JSON or YAML knows them.
        name: The name that the value has.

    Example:
        >>> redacted({"api_key": "abc", "max_new_tokens": 5, "push": ["to hf_abcdefghijklmnopqrst"]})
        {'api_key': '***', 'max_new_tokens': 5, 'push': ['to ***']}
        >>> redacted({"hook": "https://me:pw@host/x?page=2&token=abc", "sort_key": "length"})
        {'hook': 'https://***@host/x?page=2&token=***', 'sort_key': 'length'}
    """
    if isinstance(value, dict):
        named = str(value.get("name", "value"))  # {"name": "API_KEY", "value": ...}
        return {
            _hide_shapes(key) if isinstance(key, str) else key: redacted(item, named if key == "value" else str(key))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted(item, _flag_before(value, place) or name) for place, item in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    words = _split_name(name)
    if _SECRET.search(words) and not _VOCABULARY.search(words):
        return "***"
    if not isinstance(value, str):
        return value
    is_place = bool(_PLACE.search(words))
    is_key = (_HEXADECIMAL.fullmatch(value) and not is_place) or (_PERHAPS.search(words) and _has_key(value))
    if is_key and not _HASH.search(words):
        return "***"
    return _hide_shapes(value, is_place and "://" not in value)


def find_secret(text: str) -> str | None:
    """What in a text has the shape of a key or a password, or begins as tokens do that are known by it; else None.

    What only looks random is not found: files that are published are full of hashes and of a tokenizer's words.

    Example:
        >>> find_secret("push to hf_abcdefghijklmnopqrst"), find_secret("sha256 0123456789abcdef0123456789abcdef")
        ('hf_abcdefghijklmnopqrst', None)
    """
    tokens = (found[0] for found in _PREFIXED.finditer(text) if _is_token(found[1]))
    return next((found[0] for found in _SHAPES.finditer(text)), None) or next(tokens, None)


def _flag_before(items: Sequence[Any], place: int) -> str | None:
    """The flag whose value an item of a list is, as in ``[--api-key, abc]``."""
    before = items[place - 1] if place else None
    is_flag = isinstance(before, str) and re.fullmatch(r"--?[A-Za-z][\w.-]*", before)
    return before if is_flag and not str(items[place]).startswith("--") else None


def _split_name(name: str) -> str:
    """The last part of a dotted name in lower case, its words joined by one underscore."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", name.rpartition(".")[2].lstrip("-")).lower()


def _hide_shapes(text: str, is_place: bool = False) -> str:
    text = _ASSIGNED.sub(_hide_value, _SHAPES.sub("***", text))
    text = _PREFIXED.sub(lambda found: "***" if _is_token(found[1]) else found[0], text)
    return text if is_place else _RUN.sub(lambda found: "***" if _looks_random(found[0]) else found[0], text)


def _hide_value(found: re.Match[str]) -> str:
    before, name, value = (part for part in found.groups() if part is not None)
    words = _split_name(re.sub(r"[\s:=\"']+$", "", name))
    is_secret = bool(_SECRET.search(words)) and not _VOCABULARY.search(words)
    return before + name + ("***" if is_secret or (_PERHAPS.search(words) and _has_key(value)) else value)


def _is_token(text: str) -> bool:
    """Whether a part of it is more than a word: long, or with capitals or digits among its small letters."""
    runs = re.findall("[A-Za-z0-9]{8,}", text)
    return any(
        len(run) >= 20 or (re.search("[a-z]", run) and re.search("[A-Z0-9]", run)) or run.isdigit() for run in runs
    )


def _has_key(text: str) -> bool:
    """Whether letters and digits alternate in it as in a key: ``a1b2c3d4e5f6`` does, ``column_12`` does not."""
    return any(len(re.findall("[A-Za-z]+|[0-9]+", run)) >= 4 for run in re.findall("[A-Za-z0-9]{12,}", text))


def _looks_random(run: str) -> bool:
    """Whether letters and digits follow each other as in a key; words in a row, each with a capital, do not."""
    kinds = [re.search(kind, run) for kind in ("[a-z]", "[A-Z]", "[0-9]")]
    return all(kinds) and len(run) <= 2.5 * len(re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+", run))
