"""A judge that is loaded here: the probability of each label, exactly, all labels of a question in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from spin_lightning.data.encoding import Encoder
from spin_lightning.generation import ContinuousGenerator, Player, opened, seed_of
from spin_lightning.generation.responding import Responder
from spin_lightning.models.batches import pack_rows
from spin_lightning.models.loading import (
    check_model,
    context_length,
    end_ids,
    load_config,
    load_policy,
    load_tokenizer,
    refuse_ids_beyond,
    refuse_without_causal_head,
    stored_dtype,
)
from spin_lightning.models.log_probs import response_log_probs
from spin_lightning.runs import signals
from spin_lightning.runs.files import sha256_of
from spin_lightning.types import Message, Row, UserError

#: What is said after the judge has reasoned.
NOW = "Now the number alone:"


class LocalJudge:
    """A causal language model that is asked for labels.

    Args:
        model: A Hugging Face folder or hub name.
        dtype: Of its weights; ``auto`` is what they are stored in.
        batch_tokens: Tokens in one pass.
        rationale: Tokens of reasoning before the label.
        trust_remote_code: Run Python code that comes with it.
    """

    def __init__(self, model: str, dtype: str, batch_tokens: int, rationale: int, trust_remote_code: bool) -> None:
        self.name, self.dtype, self.batch_tokens, self.rationale = model, dtype, batch_tokens, rationale
        self.trust_remote_code = trust_remote_code
        self._encoder: Encoder | None = None
        self._model: Any = None
        self._sha256: str | None = None
        self._longest = math.inf

    @property
    def sha256(self) -> str | None:
        """Hash of the files with its weights; None of a model on the hub."""
        if self._sha256 is None and (folder := Path(self.name).expanduser()).is_dir():
            self._sha256 = sha256_of([[path.name, sha256_of(path)] for path in sorted(folder.glob("*.safetensors"))])
        return self._sha256

    def check_ready(self) -> None:
        """Look at its config and tokenizer. No weights are read.

        Raises:
            UserError: It is no causal language model, or its tokenizer has no chat template.
        """
        where: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        check_model(self.name, **where, needs_head=False)  # what it says of one is below
        config = load_config(self.name, **where)
        if any("SequenceClassification" in str(name) for name in getattr(config, "architectures", None) or ()):
            raise UserError(f"the judge {self.name!r} is a reward model: give its folder to ModelReward.")
        refuse_without_causal_head(config, self.trust_remote_code)
        tokenizer = load_tokenizer(self.name, **where)
        if not tokenizer.chat_template:
            raise UserError(
                f"the judge {self.name!r} has no chat template: it is a base model, which was not taught to follow "
                "instructions. Give an instruct model."
            )
        self._encoder = Encoder(tokenizer)
        self._encoder.end_at(end_ids(self.name, tokenizer, **where))
        self._longest = context_length(config) or math.inf

    def ask(self, questions: Sequence[list[Message]], labels: Sequence[str]) -> list[list[float] | None]:
        """For each question the probabilities of the labels; None where it is longer than the model takes."""
        if self._encoder is None:
            self.check_ready()
        assert self._encoder is not None
        model, asked = self._load(), [list(question) for question in questions]
        prompts = {place: self._encoder.prompt_ids(question) for place, question in enumerate(asked)}
        room = self.rationale + max(map(len, self._label_ids(labels)))
        prompts = {place: ids for place, ids in prompts.items() if len(ids) + room <= self._longest}
        found: dict[int, list[float]] = {}
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            if self.rationale:
                for place, text in self._reason(prompts).items():
                    asked[place] += [{"role": "assistant", "content": text}, {"role": "user", "content": NOW}]
                    prompts[place] = self._encoder.prompt_ids(asked[place])
                prompts = {place: ids for place, ids in prompts.items() if len(ids) + room <= self._longest}
            ids_of = self._label_ids(labels)
            names = [f"label_{number}" for number in range(len(labels))]
            rows: list[dict[str, Any]] = [
                {"place": place, "prompt_id": place, "prompt_ids": ids, **dict(zip(names, ids_of, strict=True))}
                for place, ids in prompts.items()
            ]
            for indices, batch, places in pack_rows(rows, names, self.batch_tokens):
                signals.end_if_asked()
                values = response_log_probs(model, move_data_to_device(batch, model.device)).double().cpu()
                for index, law in zip(indices, values[places].tolist(), strict=True):
                    found[rows[index]["place"]] = label_law(law, ids_of)
        return [found.get(place) for place in range(len(questions))]

    def _label_ids(self, labels: Sequence[str]) -> list[list[int]]:
        """The labels as the whole of a response, by the template, without what ends it."""
        assert self._encoder is not None
        asked: Message = {"role": "user", "content": NOW}
        encoded = [self._encoder.encode(0, Row((asked,), label), 64) for label in labels]
        return [row.real_ids[:-1] for row in encoded]

    def _reason(self, prompts: dict[int, list[int]]) -> dict[int, str]:
        """What the judge says before the label: its most likely words, so that it says the same again."""
        assert self._encoder is not None
        generator = ContinuousGenerator(max_new_tokens=self.rationale, temperature=0.0)
        responder = Responder(generator, self._encoder, self._model, signals.end_if_asked)
        places, texts = list(prompts), {}
        with opened(generator, Player(self._model)):
            seeds = [seed_of(0, 0, place, 0) for place in places]
            for number, response in responder.respond([prompts[place] for place in places], seeds):
                texts[places[number]] = self._encoder.decode(response.ids)
        return texts

    def _load(self) -> Any:
        if self._model is None:
            assert self._encoder is not None
            stored = stored_dtype(self.name, trust_remote_code=self.trust_remote_code)
            wanted = (stored or "float32") if self.dtype == "auto" else self.dtype
            model: Any = load_policy(self.name, trust_remote_code=self.trust_remote_code, dtype=getattr(torch, wanted))
            refuse_ids_beyond(len(model.get_input_embeddings().weight), self._encoder.tokenizer)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._model = model.to(device).eval().requires_grad_(False)
        return self._model

    def close(self) -> None:
        """Let go of the model."""
        self._model = None


def label_law(log_probs: Sequence[float], ids: Sequence[Sequence[int]]) -> list[float]:
    """The probabilities of labels, given that one of them is said, from the log-probs of their ids.

    Where the ids of one begin another's, as ``1`` does ``10``, its own probability is what is left of it.

    Example:
        >>> [round(p, 6) for p in label_law([math.log(0.5), math.log(0.2), math.log(0.3)], [[1], [1, 0], [2]])]
        [0.375, 0.25, 0.375]
    """
    most = max(log_probs)
    weights = [math.exp(value - most) for value in log_probs]
    for number in sorted(range(len(ids)), key=lambda number: -len(ids[number])):
        own = list(ids[number])
        longer = (
            other for other in range(len(ids)) if len(ids[other]) > len(own) and list(ids[other][: len(own)]) == own
        )
        weights[number] = max(0.0, weights[number] - sum(weights[other] for other in longer))
    total = math.fsum(weights)
    return [weight / total for weight in weights]
