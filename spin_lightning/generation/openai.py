"""Generation by a server with OpenAI's ``/v1/completions``: one request a response, token ids in and token ids out.

Each response has its own seed, so it depends on the server, the prompt and the seed alone, up to rounding. The opponent
is scored in this process, whoever sampled; the server's log-probs tell whether it serves the opponent at all.
"""

from __future__ import annotations

import math
import threading
import time
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from spin_lightning.generation.base import Player, ResponseGenerator, as_set
from spin_lightning.generation.server import Refused, Server, Unanswered
from spin_lightning.models.batches import pack_rows
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.runs import processes, signals
from spin_lightning.terminal import say
from spin_lightning.types import Response, UserError

#: Seconds before a request that was not answered is sent again. After the last the run ends.
PAUSES = (1.0, 2.0, 4.0, 8.0)
#: Seconds between two looks whether the run was asked to end.
POLL_SECONDS = 0.5
#: Seconds that a server has to say which models it has, before a run begins.
READY_SECONDS = 30.0
#: So many responses are scored as soon as they are there, in each iteration.
NUM_COMPARED = 8
#: How far the server's log-probs of them may be from the opponent's, in nats a token: what bfloat16 does is a
#: hundredth, quantised weights some hundredths; another model is off by whole nats.
NOTED_GAP, REFUSED_GAP = 0.05, 0.25

_AGAIN = "Run the same command again when it does: what is finished is kept."


class CacheInUse(Unanswered):
    """What a server computed by other weights cannot be forgotten: it answers requests that nobody here has sent."""


class ServedGenerator(ResponseGenerator):
    """Asks a server for responses. A subclass says where it is, and has it serve the opponent.

    Takes every setting of ``ResponseGenerator`` too; ``batch_size`` is how many requests are under way at once.

    Args:
        timeout_seconds: How long a response may take, from the request to its last token. It is asked for five times in
            all, with pauses, before the run ends.

    Raises:
        UserError: A setting is outside its range.
    """

    needs_folder: ClassVar[bool] = True
    gives_token_log_probs: ClassVar[bool] = False

    def __init__(self, timeout_seconds: float = 600.0, **sampling: Any) -> None:
        super().__init__(**sampling)
        if not 0 < timeout_seconds < math.inf:
            raise UserError(f"timeout_seconds must be positive, got {timeout_seconds!r}.")
        self.timeout_seconds = timeout_seconds
        self._is_compared = False

    @property
    @abstractmethod
    def server(self) -> Server:
        """Where the requests go."""

    @abstractmethod
    def _serve(self, folder: Path) -> None:
        """Have the server serve the model in a folder."""

    def _check_alive(self) -> None:
        """Called where a request was not answered.

        Raises:
            UserError: None will be.
        """

    #: The name that the server knows the model by. None: the only one that it serves.
    model: str | None = None

    def open(self, opponent: Player) -> None:
        if opponent.folder is None:
            raise RuntimeError(f"{type(self).__name__} needs the opponent's folder: open(Player(model, folder)).")
        super().open(opponent)
        self._is_compared = False
        self._serve(opponent.folder)
        self._name, self._most_tokens = self._find_model()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        terminator_ids: int | Collection[int],
        pad_id: int,
    ) -> Iterator[tuple[int, Response]]:
        if not prompts:
            return
        self._refuse_longer(max(map(len, prompts)))
        ends, is_over = as_set(terminator_ids), threading.Event()
        finished: SimpleQueue[tuple[int, Future[Response]]] = SimpleQueue()
        compared: list[tuple[list[int], Response]] = []
        pool = ThreadPoolExecutor(min(self.batch_size, len(prompts)), thread_name_prefix="responses")
        try:
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                future = pool.submit(self._ask_for, prompt, seed, ends, is_over)
                future.add_done_callback(lambda done, index=index: finished.put((index, done)))  # type: ignore[misc]
            for _ in prompts:
                index, done = _take(finished)
                response = done.result()
                if not self._is_compared:
                    compared.append((prompts[index], response))
                    if len(compared) == min(NUM_COMPARED, len(prompts)):
                        self._compare(compared)
                yield index, response
        finally:
            is_over.set()
            self.server.hang_up()
            pool.shutdown(cancel_futures=True)

    def _ask_for(self, prompt: list[int], seed: int, ends: frozenset[int], is_over: threading.Event) -> Response:
        """One response. Runs in a thread of its own, and ends soon after ``is_over`` is set."""
        request = {
            "model": self._name,
            "prompt": prompt,
            "max_tokens": self.max_new_tokens,
            "seed": seed,
            "temperature": self.temperature,
            "top_p": self.top_p,
            # what a model's folder may set otherwise
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": sorted(ends),
            "ignore_eos": True,  # that of the model's config, which may be another
            "logprobs": 0,
            "return_token_ids": True,
        }
        return self._read(self._ask_patiently("/v1/completions", request, is_over), prompt, ends)

    def _ask_patiently(self, path: str, body: Any = None, is_over: threading.Event | None = None) -> Any:
        is_over = is_over or threading.Event()
        for pause in (*PAUSES, None):
            try:
                return self.server.ask(path, body, self.timeout_seconds, is_over)
            except Refused as refusal:
                raise self._make_error(f"answered with {refusal}", "See that it is a vLLM of this opponent.") from None
            except Unanswered as error:
                if is_over.is_set():
                    raise
                self._check_alive()
                if pause is None:
                    hint = (
                        "If it is slow, lower data.generator.batch_size or raise data.generator.timeout_seconds (now "
                        f"{self.timeout_seconds:g})"
                    )
                    raise self._make_error(
                        f"does not answer, asked {len(PAUSES) + 1} times: {error}", f"{hint}. {_AGAIN}"
                    ) from None
                if is_over.wait(pause):
                    raise
        raise AssertionError

    def _read(self, answer: Any, prompt: list[int], ends: frozenset[int]) -> Response:
        """The response in an answer, if it is one.

        Raises:
            UserError: It is not; the message says what it has instead.
        """
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choice := choices[0], dict):
            raise self._make_error(f"answered {str(answer)[:200]!r} instead of one choice", "It must be a vLLM.")
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        if ids is None:
            raise self._make_error(
                "gave text without token ids, and text cannot be trained on: other tokens may spell it too",
                "Use vLLM 0.10.2 or newer, which knows return_token_ids.",
            )
        if choice.get("prompt_token_ids", prompt) not in (prompt, None):
            raise self._make_error("read other tokens than the prompt it was given", "It must leave prompts alone.")
        is_listed = isinstance(ids, list) and bool(ids) and all(type(token) is int for token in ids)
        if not is_listed or len(ids) > self.max_new_tokens or any(token in ends for token in ids[:-1]):
            raise self._make_error(
                f"gave {str(ids)[:200]} as token_ids, which must be 1 to {self.max_new_tokens} ids, with one of "
                f"{sorted(ends)} in the last place only",
                "It must know stop_token_ids and max_tokens.",
            )
        if reason != ("stop" if ids[-1] in ends else "length"):
            raise self._make_error(
                f"ended a response by {reason!r} (stop_reason {choice.get('stop_reason')!r}) whose last token is "
                f"{ids[-1]}; 'stop' belongs to {sorted(ends)}, 'length' to all others",
                "It must know stop_token_ids and ignore_eos, and have no limit below max_tokens.",
            )
        logs = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(logs, list) or len(logs) != len(ids) or not all(map(_is_finite, logs)):
            raise self._make_error(
                f"gave {str(logs)[:200]} as token_logprobs of {len(ids)} tokens",
                "It must give a finite number for each (a model with NaN or infinite weights does not).",
            )
        return Response(ids, reason, math.fsum(logs))

    def _compare(self, responses: Sequence[tuple[list[int], Response]]) -> None:
        """Refuse a server whose log-probs are not the opponent's.

        Raises:
            UserError: They are of another model.
        """
        self._is_compared = True
        model = self.opponent.model
        device, rows = next(model.parameters()).device, len(model.get_input_embeddings().weight)
        if any(token >= rows for _, response in responses for token in response.ids):
            return  # an error of its own, by the pair maker
        table = [
            {"prompt_id": number, "prompt_ids": prompt, "generated_ids": response.ids}
            for number, (prompt, response) in enumerate(responses)
        ]
        gap = 0.0
        for indices, batch, places in pack_rows(table, ["generated_ids"], max_tokens=1024):
            values = response_log_probs(model, move_data_to_device(batch, device)).tolist()
            for index, (place,) in zip(indices, places.tolist(), strict=True):
                gap += abs(values[place] - responses[index][1].log_prob)
        gap /= sum(len(response.ids) for _, response in responses)
        found = f"gives log-probs that are {gap:.2g} nats a token from the opponent's"
        if gap > REFUSED_GAP:
            raise self._make_error(
                found, f"It has other weights than {self.opponent.folder}, or gives log-probs of changed logits."
            )
        if gap > NOTED_GAP:
            say(f"note: the server at {self.server.url} {found}: it samples another distribution, if a similar one.")

    def _find_model(self) -> tuple[str, float]:
        """The name that the server knows the model by, and how many tokens prompt and response may have."""
        answer = self._ask_patiently("/v1/models")
        try:
            served = {entry["id"]: entry for entry in answer["data"]}
        except (TypeError, KeyError):
            raise self._make_error(f"listed {str(answer)[:200]!r} as its models", "It must be a vLLM.") from None
        if len(served) != 1 if self.model is None else self.model not in served:
            raise self._make_error(
                f"serves {sorted(served)}", f"Set data.generator.model to one of them; it is {self.model!r}."
            )
        name = self.model or next(iter(served))
        return name, served[name].get("max_model_len") or math.inf

    def _refuse_longer(self, longest: int) -> None:
        if longest + self.max_new_tokens > self._most_tokens:
            raise self._make_error(
                f"takes at most {self._most_tokens:g} tokens, and the longest prompt has {longest} and a response up "
                f"to {self.max_new_tokens}",
                "Start it with a greater --max-model-len, or lower data.max_prompt_tokens or "
                "data.generator.max_new_tokens.",
            )

    def _hand_over(self, folder: Path) -> None:
        """Have a running vLLM read weights, and forget what it computed by others.

        Raises:
            Refused: It does not know how.
            CacheInUse: It read them, but cannot forget what it computed by others.
            Unanswered: It failed.
        """
        where = {"weights_path": str(folder.absolute())}
        self.server.ask("/collective_rpc", {"method": "reload_weights", "kwargs": where}, self.timeout_seconds)
        for pause in (*PAUSES, 0.0):
            answer = self.server.ask("/reset_prefix_cache", {}, self.timeout_seconds)
            if not (isinstance(answer, dict) and answer.get("success") is False):  # older ones say nothing
                return
            time.sleep(pause)  # requests of somebody who hung up are still under way
        raise CacheInUse("it still answers requests that are not of this iteration")

    def _make_error(self, what: str, remedy: str) -> UserError:
        return UserError(f"the server at {self.server.url} {what}. {remedy}")


def is_tied(model: Any) -> bool:
    """Whether a model's embeddings are the weights of another layer too, mostly of its head."""
    tied = model.get_input_embeddings().weight
    return sum(getattr(layer, "weight", None) is tied for layer in model.modules()) > 1


def _is_finite(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _take(finished: SimpleQueue[Any]) -> Any:
    """The next item, however long that takes; a signal ends the wait."""
    while True:
        try:
            return finished.get(timeout=POLL_SECONDS)
        except Empty:
            signals.end_if_asked()


class OpenAIGenerator(ServedGenerator):
    """Responses of a server that runs already, by OpenAI's ``/v1/completions``: a vLLM of your own.

    In each iteration the server reads the opponent's weights from its folder, which it must find under the same name;
    its first responses are compared with the opponent's log-probs. ``docs/vllm.md`` says how to start it. Takes every
    setting of ``ResponseGenerator`` too; ``batch_size`` is how many requests are under way at once.

    Args:
        url: Where the server is: ``http://host:port``, ``https://host`` or ``unix:/path``.
        model: The name that the server knows the model by. None: the only one that it serves.
        reloads: Whether the server is told to read the opponent's weights. Without, you see to it that it has them.
        timeout_seconds: How long a response may take, from the request to its last token. It is asked for five times in
            all, with pauses, before the run ends.

    Raises:
        UserError: A setting is outside its range.

    Example:
        >>> OpenAIGenerator("http://localhost:8000", max_new_tokens=128).max_new_tokens
        128
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        reloads: bool = True,
        timeout_seconds: float = 600.0,
        **sampling: Any,
    ) -> None:
        super().__init__(timeout_seconds=timeout_seconds, **sampling)
        self._server = Server(url)
        self.url, self.model, self.reloads = url, model, reloads

    @property
    def server(self) -> Server:
        return self._server

    @property
    def engine(self) -> dict[str, Any]:
        """The server's version, and whether its model is compiled, as far as it tells."""
        config = self._ask_for_config("model_config")
        is_eager = config.get("enforce_eager")
        return {
            "server": "vllm" if config else None,
            "version": self._ask_if_known("/version").get("version"),
            "mode": None if is_eager is None else "eager" if is_eager else "compiled",
            "dtype": config.get("dtype"),
            "quantization": config.get("quantization"),
        }

    def check_ready(self) -> None:
        """Ask the server which models it has.

        Raises:
            UserError: It does not say.
        """
        try:
            self.server.ask("/v1/models", seconds=min(READY_SECONDS, self.timeout_seconds))
        except Unanswered as error:
            remedy = "Start it, or mend data.generator.url; docs/vllm.md says how a vLLM is started for this."
            raise self._make_error(f"is not there: {error}", remedy) from None
        except Refused as refusal:
            raise self._make_error(f"does not list its models: {refusal}", "It must be a vLLM.") from None

    def _ask_if_known(self, path: str) -> dict[str, Any]:
        try:
            answer = self.server.ask(path, seconds=self.timeout_seconds)
        except Refused:
            return {}
        except Unanswered as error:
            raise self._make_error(f"is not there: {error}", f"Start it. {_AGAIN}") from None
        return answer if isinstance(answer, dict) else {}

    def _ask_for_config(self, part: str) -> dict[str, Any]:
        """A part of vLLM's settings; empty where it does not tell them."""
        return (self._ask_if_known("/server_info?config_format=json").get("vllm_config") or {}).get(part) or {}

    def _serve(self, folder: Path) -> None:
        if self.reloads:
            if processes.is_first():  # one server answers all of them
                self._have_read(folder)
            processes.wait()

    def _have_read(self, folder: Path) -> None:
        if is_tied(self.opponent.model) and self._ask_for_config("device_config").get("device_type") == "cpu":
            raise self._make_error(
                "runs on a CPU, where vLLM goes on with the old head of a model whose head and embeddings are one",
                "Serve it on a GPU, or let VLLMGenerator start it, which starts it anew in each iteration.",
            )
        try:
            self._hand_over(folder)
        except Refused as refusal:
            raise self._make_error(
                f"cannot be told to read the opponent's weights ({refusal})",
                "Start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment, or let VLLMGenerator start it.",
            ) from None
        except CacheInUse as error:
            raise self._make_error(
                f"has read the opponent's weights, and cannot forget what it computed by others: {error}",
                "Wait until it has answered them (a run that was just ended may have sent them), and let nobody else "
                f"ask it while this run lasts. {_AGAIN}",
            ) from None
        except Unanswered as error:
            raise self._make_error(
                f"did not read the opponent's weights from {str(folder.absolute())!r} ({error})",
                "It must find that folder under the same name, and serve a model of the same shape.",
            ) from None
