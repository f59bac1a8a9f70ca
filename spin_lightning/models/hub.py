"""Whether the Hugging Face hub answers, found out in seconds instead of its clients' minutes of repeated tries."""

from __future__ import annotations

import sys
from functools import cache

from spin_lightning.terminal import say

#: How long to wait for an answer.
TIMEOUT_SECONDS = 5.0


def is_reachable() -> bool:
    """Whether the hub answers a short try, made once in a process.

    If not, its clients are told to take what the local cache has and nothing else. Always False with
    ``HF_HUB_OFFLINE=1``.
    """
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _try_hub()


@cache
def _try_hub() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
    except Exception as error:  # of the HTTP client that the hub's package uses, which changed before
        say(f"note: {constants.ENDPOINT} does not answer ({error}); only what is in the local cache is used.")
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # it reads the constant once, when it is imported
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return False
    return True
