"""A server that answers as vLLM's does, over real sockets: how it samples, and how it fails, is for a test to say.

It needs neither vLLM nor torch, so that a process of it starts at once. ``make_environment`` makes an environment whose
``vllm`` it is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

#: Ids and log-probs of the tokens of a response to a prompt, by a seed: ``(prompt, seed, max_tokens, ends)``.
Sampler = Callable[[list[int], int, int, list[int]], tuple[list[int], list[float]]]
#: What to answer instead: None for the usual, a status with text, or the answer made into another.
Fault = Callable[[str, Any, Any], Any]


def uniform(vocabulary: int) -> Sampler:
    """Every token is as likely as any other, as for a model whose weights are 0."""

    def sample(prompt: list[int], seed: int, max_tokens: int, ends: list[int]) -> tuple[list[int], list[float]]:
        chance, ids = random.Random(f"{seed}/{prompt}"), []
        while len(ids) < max_tokens and not (ids and ids[-1] in ends):
            ids.append(chance.randrange(vocabulary))
        return ids, [-math.log(vocabulary)] * len(ids)

    return sample


class Drop(Exception):
    """Raised by a fault: the connection is closed without an answer."""


class FakeVllm(ThreadingHTTPServer):
    """The server, in threads of this process, from ``with`` on.

    Attributes:
        sample: How it samples.
        fault: Asked for every request, with its path, its body and the answer.
        asked: Paths and bodies of all requests.
        reload: Called with the folder that it is told to read.
        models: What it serves.
        most_at_once: Requests for responses that were under way together.
        headers: What it sends along with every answer.
        keys: The ``Authorization`` of every request.
    """

    daemon_threads = True

    def __init__(self, sample: Sampler, address: Any = ("127.0.0.1", 0)) -> None:
        self.sample = sample
        self.fault: Fault = lambda path, body, answer: None
        self.asked: list[tuple[str, Any]] = []
        self.reload: Callable[[str], None] = lambda folder: None
        self.models: list[dict[str, Any]] = [{"id": "opponent", "max_model_len": 512}]
        self.version, self.is_eager, self.device = "0.32.0", True, "cuda"
        self.under_way = self.most_at_once = 0
        self.headers: dict[str, str] = {}
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        if isinstance(address, str):
            self.address_family = socket.AF_UNIX
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # that of HTTP asks for the name of a host

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has hung up."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> FakeVllm:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        self.server_close()

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def answer(self, path: str, body: Any) -> Any:
        if path == "/health":
            return None
        if path == "/version":
            return {"version": self.version}
        if path.startswith("/server_info"):
            config = {"enforce_eager": self.is_eager, "dtype": "torch.float32", "quantization": None}
            return {"vllm_config": {"model_config": config, "device_config": {"device_type": self.device}}}
        if path == "/v1/models":
            return {"object": "list", "data": self.models}
        if path == "/collective_rpc":
            self.reload(body["kwargs"]["weights_path"])
            return {"results": [None]}
        if path == "/reset_prefix_cache":
            return {"success": True}
        ids, log_probs = self.sample(body["prompt"], body["seed"], body["max_tokens"], body["stop_token_ids"])
        is_stopped = ids[-1] in body["stop_token_ids"]
        choice = {
            "index": 0,
            "text": "".join(map(chr, ids)),
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
            "finish_reason": "stop" if is_stopped else "length",
            "stop_reason": ids[-1] if is_stopped else None,
            "logprobs": {"token_logprobs": log_probs},
        }
        return {"object": "text_completion", "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    server: FakeVllm

    def do_GET(self) -> None:
        self.reply(None)

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body: Any) -> None:
        server, is_response = self.server, self.path.endswith("/completions")
        with server.lock:
            server.asked.append((self.path, body))
            server.keys.append(self.headers["Authorization"])
            server.under_way += is_response
            server.most_at_once = max(server.most_at_once, server.under_way)
        try:
            answer = server.answer(self.path, body)
            other = server.fault(self.path, body, answer)
        except Drop:
            return
        finally:
            with server.lock:
                server.under_way -= is_response
        status, answer = other if isinstance(other, tuple) else (200, answer if other is None else other)
        data = answer.encode() if isinstance(answer, str) else b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {**server.headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None: ...


def make_environment(folder: Path, version: str = "0.32.0", **behaviour: Any) -> str:
    """An environment with this server as its ``vllm``: the path of its interpreter.

    Args:
        folder: Where it is made. Each server that is started adds a line of JSON to ``started`` there.
        version: Of vLLM. Empty: none is installed.
        behaviour: What ``main`` makes of it.
    """
    packages = folder / "site" / "vllm" / "entrypoints" / "openai"
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder / "site"}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    if version:
        packages.mkdir(parents=True)
        for package in (packages, packages.parent, packages.parent.parent):
            (package / "__init__.py").touch()
        given = json.dumps({"folder": str(folder), "version": version, **behaviour})
        lines = f"sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport fake_vllm\nfake_vllm.main({given!r})\n"
        (packages / "api_server.py").write_text(f"import sys\n{lines}")
        (information := folder / "site" / f"vllm-{version}.dist-info").mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return str(python)


def main(given: str) -> None:
    """The process: serves the model whose folder it is given, if every token of it is equally likely."""
    behaviour = json.loads(given)
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--uds")
    known, others = parser.parse_known_args()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])  # as vLLM's engine is
    facts = {
        "pid": os.getpid(),
        "child": child.pid,
        "model": known.model,
        "args": others,
        "environment": {**os.environ},
    }
    with (Path(behaviour["folder"]) / "started").open("a") as started:
        started.write(json.dumps(facts) + "\n")
    if "says" in behaviour:  # and ends
        raise ValueError(behaviour["says"])
    if behaviour.get("is_deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour.get("never_listens"):
        time.sleep(300)
    config = json.loads((Path(known.model) / "config.json").read_text())
    server = FakeVllm(uniform(config["vocab_size"]), known.uds)
    server.version = behaviour["version"]

    def fault(path: str, body: Any, answer: Any) -> Any:
        time.sleep(behaviour.get("seconds", 0) if path == "/v1/completions" else 0)
        if path == "/collective_rpc":
            with (Path(behaviour["folder"]) / "reloaded").open("a") as reloaded:
                reloaded.write(body["kwargs"]["weights_path"] + "\n")
            return (500, "no such method") if behaviour.get("cannot_reload") else None
        if sum(path == "/v1/completions" for path in server.paths()) > behaviour.get("dies_after", math.inf):
            print("RuntimeError: the engine is out of memory", flush=True)
            os._exit(3)
        return None

    server.fault = fault
    server.serve_forever(poll_interval=0.01)
