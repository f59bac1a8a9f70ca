"""``ModelReward``: a reward model that somebody trained, on pairs of people's or of a judge's preferences.

It reads conversations by its own tokenizer and chat template, whatever policy wrote them: the turns and the response
are rendered again from their texts, and no text can open or close a turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from spin_lightning.data.encoding import Encoder
from spin_lightning.models.classifier_scores import classifier_scores
from spin_lightning.models.loading import (
    check_model,
    context_length,
    load_config,
    load_tokenizer,
    refuse_ids_beyond,
    without_bars,
)
from spin_lightning.progress import progress
from spin_lightning.rewards.base import Answer, Reward
from spin_lightning.runs.files import read_json, sha256_of
from spin_lightning.types import Row, UserError

#: Tensors with so many numbers at most are looked at to tell one reward model from another: its head is among them.
SMALL = 2**16


class ModelReward(Reward):
    """The score of a reward model, a folder of ``AutoModelForSequenceClassification`` with one label.

    What ``spin-lightning reward`` exported, or anybody's. Of the former, ``reward.json`` beside the weights has the
    ``shift`` and ``scale`` of its held-out scores, and the reward is ``(score - shift) / scale``: of mean 0 and
    deviation 1 on the data it was trained for. Of others it is the score as it comes, read where ``transformers`` reads
    it. All responses to a prompt are scored in one pass where that gives the same scores.

    A response that was cut is not scored: a reward model has never seen one that does not end. Nor is a conversation
    that is longer than the model takes.

    Args:
        folder: The reward model: a Hugging Face folder, or a hub name.
        prompt_template: None uses the chat template of its tokenizer. Else what ``data.prompt_template`` takes.
        dtype: Of its weights, ``float32``, ``bfloat16`` or ``float16``; ``auto`` is what they are stored in.
        batch_tokens: Tokens in one pass.
        trust_remote_code: Run Python code that comes with the model. Only for code you have read.

    Raises:
        UserError: A setting is outside its range; or, in ``check_ready``, the folder holds no reward model.

    Example:
        >>> reward = ModelReward("runs/reward/reward_model")
        >>> reward.columns
        ()
    """

    def __init__(
        self,
        folder: str,
        prompt_template: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        batch_tokens: int = 4096,
        trust_remote_code: bool = False,
    ) -> None:
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UserError(f"ModelReward.dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
        if batch_tokens < 1:
            raise UserError(f"ModelReward.batch_tokens must be at least 1, got {batch_tokens!r}.")
        self.folder = str(folder)
        self.prompt_template = prompt_template
        self.dtype = dtype
        self.batch_tokens = batch_tokens
        self.trust_remote_code = trust_remote_code
        self._encoder: Encoder | None = None
        self._model: Any = None
        self._behind: list[int] = []
        self._refusal = self._sha256 = ""

    @property
    def judges_cut(self) -> bool:
        return False  # it was trained on whole responses

    @property
    def settings(self) -> dict[str, Any]:
        """Its class and arguments, and what tells its weights and its ``reward.json`` from others."""
        found = {key: value for key, value in super().settings.items() if key != "batch_tokens"}
        if not self._sha256:
            self._sha256 = sha256_of([*_small_tensors(Path(self.folder)), self._kept])
        return {**found, "sha256": self._sha256}

    @property
    def _kept(self) -> dict[str, Any]:
        """What an export of this package says of itself; nothing in other folders."""
        kept: dict[str, Any] = read_json(Path(self.folder) / "reward.json") or {}
        return kept

    def check_ready(self) -> None:
        """Look at the folder's config and tokenizer. No weights are read.

        Raises:
            UserError: It holds no reward model, or one that gives several numbers or cannot be asked; or conversations
                cannot be written for it.
        """
        config = self._read_config()
        tokenizer = load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)
        if tokenizer.chat_template is None and self.prompt_template is None:
            raise UserError(
                f"the tokenizer of the reward model {self.folder!r} has no chat template, so nothing says how it reads "
                "a conversation. Set prompt_template to the one it was trained with, such as chatml or a Jinja file."
            )
        refuse_ids_beyond(getattr(config.get_text_config(), "vocab_size", None), tokenizer)
        time = self._kept.get("template_time")
        self._encoder = Encoder(tokenizer, self.prompt_template, None if time is None else datetime.fromisoformat(time))
        self._behind = [] if "terminator_id" in self._kept else _ids_behind_terminator(self._encoder)
        self._longest = context_length(config) or 10**9

    def _read_config(self) -> Any:
        folder = Path(self.folder)
        if (folder / "reward_model" / "config.json").is_file():
            raise UserError(
                f"{self.folder!r} is the folder of a run. Give its reward model, {str(folder / 'reward_model')!r}."
            )
        check_model(self.folder, trust_remote_code=self.trust_remote_code, needs_head=False)
        config: Any = load_config(self.folder, trust_remote_code=self.trust_remote_code)
        kinds = [str(name) for name in getattr(config, "architectures", None) or ()]
        if not any(name.endswith("ForSequenceClassification") for name in kinds):
            raise UserError(
                f"{self.folder!r} holds no reward model but {' and '.join(kinds) or 'a model of no known class'}: it "
                "needs a model that gives a text one number (...ForSequenceClassification). Train one, spin-lightning "
                "reward, and give its reward_model/."
            )
        if config.num_labels != 1:
            labels = ", ".join(map(str, list((config.id2label or {}).values())[:5]))
            raise UserError(
                f"the model in {self.folder!r} gives {config.num_labels} numbers ({labels}), and a reward is one. Give "
                "a model with num_labels 1."
            )
        if config.get_text_config().pad_token_id is None:
            raise UserError(
                f"the config of the reward model {self.folder!r} has no pad_token_id, so transformers cannot score "
                "rows of different lengths. Set pad_token_id in its config.json to a token that ends no text."
            )
        return config

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        if self._encoder is None:
            self.check_ready()
        rows = dict(self._encode(answers))
        if not rows:
            return [None] * len(answers)
        shift, scale = self._kept.get("shift", 0.0), self._kept.get("scale", 1.0)
        model = self._load()
        with torch.autocast(model.device.type, enabled=False):
            scores = classifier_scores(model, list(rows.values()), self.batch_tokens)
        known = {place: (score - shift) / scale for place, score in zip(rows, scores, strict=True)}
        return [known.get(place) for place in range(len(answers))]

    def _encode(self, answers: Sequence[Answer]) -> Iterator[tuple[int, tuple[list[int], list[int]]]]:
        """The ids of each conversation that can be scored, with its place: the prompt, and what follows."""
        assert self._encoder is not None
        ended = [place for place, answer in enumerate(answers) if answer.finish_reason == "stop"]
        found = self._encoder.encode_rows(
            (
                Row(tuple(answers[place].prompt), answers[place].text, tools=tuple(answers[place].tools))
                for place in ended
            ),
            self._longest + 1,
        )
        for place, encoded in zip(ended, found, strict=True):
            if isinstance(encoded, UserError):
                self._refusal = str(encoded)
            elif len(encoded.prompt_ids) + len(encoded.real_ids) + len(self._behind) <= self._longest:
                yield place, (encoded.prompt_ids, encoded.real_ids + self._behind)

    def explain_none(self, answers: Sequence[Answer]) -> str:
        """Why none of these answers has a score."""
        if all(answer.finish_reason == "length" for answer in answers):
            return "All were cut, and a reward model has never seen an unfinished one. Raise max_new_tokens."
        if self._refusal:
            return f"Of the reward model's own template: {self._refusal}"
        return f"With their prompts they are longer than the {self._longest} tokens that the reward model takes."

    @without_bars()
    def _load(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        if self._model is None:
            with progress("loading the reward model"):
                loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                    self.folder,
                    dtype="auto" if self.dtype == "auto" else getattr(torch, self.dtype),
                    use_safetensors=True,
                    trust_remote_code=self.trust_remote_code,
                    output_loading_info=True,
                )
            model, report = loaded
            if missing := sorted(report["missing_keys"]):
                raise UserError(
                    f"the reward model {self.folder!r} has no values for {', '.join(missing[:3])}; they would be "
                    "random. Give the whole model, with the config that belongs to it."
                )
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._model = model.to(device).eval().requires_grad_(False)
        return self._model

    def close(self) -> None:
        self._model = None


def _ids_behind_terminator(encoder: Encoder) -> list[int]:
    """What a chat template writes behind the terminator of the last turn, as the model was trained to see it.

    A model of another package was trained on conversations as its template writes them, a last new line included.
    """
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    written: Any = encoder.tokenizer.apply_chat_template(turns, chat_template=encoder.chat_template, return_dict=True)
    whole = list(written["input_ids"])
    (row,) = encoder.encode_rows([Row(({"role": "user", "content": "1 + 1?"},), "2")], 10**6)
    if isinstance(row, UserError):
        raise row
    own = row.prompt_ids + row.real_ids
    return whole[len(own) :] if whole[: len(own)] == own else []


def _small_tensors(folder: Path) -> Iterator[list[Any]]:
    """Names, shapes and hashes of a folder's small tensors, among them those of the head: all move in any training."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in sorted(file.keys()):
                    shape = file.get_slice(name).get_shape()
                    if torch.Size(shape).numel() <= SMALL:
                        yield [name, shape, sha256_of(_bytes_of(file.get_tensor(name)))]
        except (SafetensorError, OSError):  # check_ready says what is wrong
            continue


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
