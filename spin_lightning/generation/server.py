"""An HTTP server that answers JSON: asked by any number of threads, and left at once when a run ends."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from spin_lightning.types import UserError


class Unanswered(Exception):
    """No answer, or that the server cannot now: the same request may be answered later.

    Attributes:
        after: Seconds after which the server wants to be asked again, if it said so.
    """

    def __init__(self, text: str, after: float | None = None) -> None:
        super().__init__(text)
        self.after = after


class Refused(Exception):
    """An answer that says no, or is not JSON.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"status {status}: {text}")
        self.status = status


class UnixConnection(http.client.HTTPConnection):
    """HTTP through a socket that has the name of a file."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Server:
    """Where a server is, and the requests to it that are under way.

    Args:
        url: ``http://host:port``, ``https://host``, or ``unix:/path``. A path behind the host begins every path, but
            for a ``/v1`` at its end, which OpenAI's clients want.
        key_variable: The environment variable with the key that is sent along, if it is set. None: no key is sent.

    Raises:
        UserError: It is no such URL.

    Example:
        >>> Server("http://localhost:8000/v1").prefix
        ''
    """

    def __init__(self, url: str, key_variable: str | None = "VLLM_API_KEY") -> None:
        self.url, self.key_variable = url, key_variable
        self._under_way: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()
        self._connect: Callable[..., http.client.HTTPConnection]
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if host and parts.username is not None:
            raise UserError(f"the URL of a server must be without a name or password. Put a key into {key_variable}.")
        if host and (parts.query or parts.fragment):  # not shown: it may have a key
            raise UserError(
                "the URL of a server must end with its path: what stands behind a ? or # would not be sent. Leave it "
                f"out; a key belongs into {key_variable or 'an environment variable'}."
            )
        self.prefix = parts.path.rstrip("/").removesuffix("/v1") if host else ""
        if host and parts.scheme in ("http", "https"):
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            self._connect = partial(kind, host, port)
        elif url.startswith("unix:/"):
            self._connect = partial(UnixConnection, url.removeprefix("unix:"))
        else:
            raise UserError(f"the URL of a server must be such as 'http://localhost:8000', got {url!r}.")

    def ask(self, path: str, body: Any = None, seconds: float = 600.0, is_over: threading.Event | None = None) -> Any:
        """What the server answers: to a POST of ``body`` as JSON, or without one to a GET. None if it says nothing.

        A key in the environment variable ``key_variable``, by default one that vLLM's server reads too, is sent along.

        ``is_over``, set before ``hang_up``, ends a request too that begins while that is called.

        Raises:
            Unanswered: It cannot be reached, has not answered after ``seconds``, is overloaded or has failed.
            Refused: It does not serve this request, or does not answer JSON.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable or ""):
            headers["Authorization"] = f"Bearer {key}"
        connection = self._connect(timeout=seconds)
        with self._lock:
            self._under_way.add(connection)
        try:
            connection.connect()
            with self._lock:  # who hung up meanwhile found no socket
                if connection not in self._under_way or (is_over is not None and is_over.is_set()):
                    raise Unanswered(f"no answer to {path} (nobody waits for it)")
            text = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", self.prefix + path, text, headers)
            answer = connection.getresponse()
            status, data = answer.status, answer.read().decode(errors="replace")
        except TimeoutError:
            raise Unanswered(f"no answer to {path} within {seconds:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or "the connection broke"
            raise Unanswered(f"no answer to {path} ({why})") from None
        finally:
            with self._lock:
                self._under_way.discard(connection)
            connection.close()
        if status in (408, 425, 429) or status >= 500:
            wanted = answer.getheader("Retry-After") or ""
            raise Unanswered(
                f"status {status} for {path}: {_shorten(data)}", float(wanted) if wanted.isdigit() else None
            )
        if status != 200:
            raise Refused(status, f"for {path}: {_shorten(data)}")
        try:
            return json.loads(data) if data.strip() else None
        except ValueError:
            raise Refused(status, f"for {path} no JSON but {_shorten(data)!r}") from None

    def hang_up(self) -> None:
        """End every request under way: whoever waits for one is told that it was not answered."""
        with self._lock:
            for connection in self._under_way:
                if (sock := connection.sock) is not None:
                    with suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
            self._under_way.clear()


def _shorten(text: str) -> str:
    return " ".join(text.split())[:300]
