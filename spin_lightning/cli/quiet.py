"""What libraries say that the user of a command can do nothing about: named here, and in no other file.

News of Lightning that were asked for pass, as a profiler's report does; so do those of a user's own code, and all
warnings that are not named here.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import lightning

#: What says it where it is not a user's own code that does.
LIGHTNING = Path(str(lightning.__file__)).parent
#: Loggers through which Lightning says which devices it found, what it seeded, what it restored, and what else one
#: might install.
NEWS = ("lightning.pytorch", "lightning.fabric")
#: Parts of Lightning that are there because a setting asks for them, so that their news pass.
ASKED_FOR = ("callbacks", "profilers")
#: Lightning's ``rank_zero_info`` logs everything under this name, whatever part says it.
SHARED = "lightning.pytorch.utilities.rank_zero"
#: Warnings about code that is not the user's, by how they begin; the reason why nothing is wrong.
WARNINGS = {
    "The '.*' does not have many workers": "collating ids takes no time",
    r"Found \d+ module\(s\) in eval mode": "an opponent in memory is, and the policy without dropout",
    "Total length of `(ResumableLoader|CombinedLoader)` across ranks is zero": "a game or a stage of it is over",
    "Total length of `list` across ranks is zero": "no row is held out where data.val_fraction is 0",
    "`isinstance.treespec, LeafSpec.` is deprecated": "Lightning's own use of torch",
    "`gradient_checkpointing_enable` is deprecated": (
        "its new name is younger than the oldest transformers that is supported"
    ),
}


def silence_libraries() -> None:
    """Keep from the screen what is named above, in this process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else each process that collates is warned of
    for name in NEWS:
        logging.getLogger(name).setLevel(logging.WARNING)
        for part in ASKED_FOR:
            logging.getLogger(f"{name}.{part}").setLevel(logging.INFO)
    logging.getLogger(SHARED).setLevel(logging.INFO)
    logging.getLogger(SHARED).addFilter(_was_asked_for)
    for beginning in WARNINGS:
        warnings.filterwarnings("ignore", message=beginning)


def _was_asked_for(record: logging.LogRecord) -> bool:
    path = Path(record.pathname)
    return record.levelno >= logging.WARNING or LIGHTNING not in path.parents or any(p in path.parts for p in ASKED_FOR)
