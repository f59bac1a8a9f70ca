"""Reward models: one number for a response, read off a causal language model's hidden state at its last token.

``s(x, y) = w . h``, where ``h`` is the last hidden state at the response's terminator. In training ``w`` stands beside
the language model's own head. Outside of it such a model is what ``AutoModelForSequenceClassification`` makes of the
same weights with ``num_labels`` 1, and is saved and read back as that.

What may surprise: that class reads the last token that is not the pad token. Where the two are one it reads the token
before, so an exported model has a pad token that ends nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from spin_lightning.models.attention import set_attention
from spin_lightning.models.batches import pack
from spin_lightning.models.forward_paths import in_one_pass, last_hidden
from spin_lightning.models.merging import merged_copy
from spin_lightning.models.modes import compute_dtype, evaluating
from spin_lightning.models.saving import save_folder, write_verified
from spin_lightning.models.shared_prompt import own_attention_of
from spin_lightning.runs.checkpoints import refuse_non_finite
from spin_lightning.runs.files import write_json
from spin_lightning.types import ResponseBatch, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: How closely two ways to a score must agree, as a share of what scores of other tokens differ by.
AGREEMENT = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


def add_score_head(model: Any, trust_remote_code: bool = False) -> None:
    """Put ``w`` beside a causal language model's own head, as its ``score``: zeros, so that every score is 0.

    A head of its own for tokens, which no score depends on, is not trained any more.

    Raises:
        UserError: ``transformers`` has no class that could hold the reward model.
    """
    classifier: Any = make_classifier(model, 0, trust_remote_code)
    device = next(model.parameters()).device
    model.score = nn.Linear(classifier.score.in_features, 1, bias=False, device=device, dtype=model.dtype)
    nn.init.zeros_(model.score.weight)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and getattr(head, "weight", None) is not embeddings.weight:
        head.requires_grad_(False)


def scores_of(model: nn.Module, batch: ResponseBatch) -> Tensor:
    """The score of each response of a batch under a model with :func:`add_score_head`, by its forward path.

    Returns:
        Shape ``(R,)``, float32 (float64 for a float64 model), with gradients.
    """
    return in_one_pass(model, _score, batch)


def _score(model: Any, batch: ResponseBatch) -> Tensor:
    hidden = last_hidden(model, batch)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(wide) * model.score.weight.to(wide)).sum(-1)


def refuse_without_classifier(config: Any, trust_remote_code: bool = False) -> None:
    """Make sure that ``transformers`` has a class that can hold a reward model of this architecture.

    Raises:
        UserError: It has none.
    """
    from transformers import AutoModelForSequenceClassification as Classifier

    has_own = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if type(config) not in Classifier._model_mapping and not (has_own and trust_remote_code):
        kind = config.model_type if getattr(config, "model_type", "") else type(config).__name__
        raise UserError(
            f"transformers has no class that would hold a reward model of the architecture {kind!r}: "
            "AutoModelForSequenceClassification does not know it. Use a model of another one, such as Llama, Qwen, "
            "Mistral, Gemma, Phi or OLMo."
        )


def make_classifier(model: Any, pad_id: int, trust_remote_code: bool = False) -> PreTrainedModel:
    """What ``AutoModelForSequenceClassification`` makes of a causal language model, on the same weights.

    Args:
        model: With :func:`add_score_head` or without, in which case the head has no values. It is not changed.
        pad_id: The id that rows of different lengths are padded with.
        trust_remote_code: Whether the class may be code that comes with the model.

    Raises:
        UserError: There is no such class, or it is built otherwise.
    """
    from transformers import AutoModelForSequenceClassification

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    refuse_without_classifier(causal.config, trust_remote_code)
    config = copy.deepcopy(causal.config)
    config.__dict__.pop("quantization_config", None)  # the weights are those that are there
    config.num_labels = 1
    for part in {id(part): part for part in (config, config.get_text_config(decoder=True))}.values():
        part.pad_token_id = pad_id
    set_attention(config, own_attention_of(config))
    with torch.device("meta"):
        classifier: Any = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    prefix, own = classifier.base_model_prefix, causal.base_model
    further = [name for name, _ in classifier.named_parameters() if not name.startswith(f"{prefix}.")]
    if further != ["score.weight"] or type(getattr(classifier, prefix)) is not type(own):
        raise UserError(
            f"{type(classifier).__name__} is not built like {type(causal).__name__} with a score: it has {further} "
            f"beside a {type(getattr(classifier, prefix)).__name__}. Use a model of another architecture."
        )
    setattr(classifier, prefix, own)
    if hasattr(model, "score"):
        classifier.score.weight = model.score.weight
    return classifier


@torch.no_grad()
def check_classifier(model: Any, pad_id: int, ids: Sequence[int], trust_remote_code: bool = False) -> None:
    """Make sure, before anything is trained, that ``transformers`` will read a reward model's scores where they are.

    Args:
        model: With :func:`add_score_head`. It is tried with other weights of its head, and not changed.
        pad_id: The id that rows are padded with.
        ids: A prompt with its response, terminator included.
        trust_remote_code: Whether its class may be code that comes with the model.

    Raises:
        UserError: It would give other scores.
    """
    if len(ids) < 2:
        return
    middle, weight = len(ids) // 2, model.score.weight
    random = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    rows = [list(ids), list(ids[:middle])]
    batch = move_data_to_device(pack([([], rows)]), weight.device)
    classifier: Any = make_classifier(model, pad_id, trust_remote_code)
    classifier.score.weight = nn.Parameter(random)
    with evaluating(model), evaluating(classifier):
        hidden = last_hidden(model, batch).float()
        own, scale = hidden @ random.float()[0], float(random.float().norm() * hidden.square().mean().sqrt())
        theirs = score_padded(classifier, rows, pad_id)
    if not (own - theirs).abs().max() <= AGREEMENT[compute_dtype(own.device, model)] * scale:
        raise UserError(
            f"transformers would read the scores of a {type(classifier).__name__} elsewhere: on rows padded with token "
            f"{pad_id} it gives {theirs.tolist()} instead of {own.tolist()}. Use a model of another architecture."
        )


def score_padded(classifier: Any, rows: Sequence[Sequence[int]], pad_id: int, side: str = "right") -> Tensor:
    """The scores that ``transformers`` gives to rows of ids, padded into one batch, shape ``(R,)``, float32."""
    longest, device = max(map(len, rows)), next(classifier.parameters()).device
    ids, mask = torch.full((len(rows), longest), pad_id), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        places = slice(len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[number, places], mask[number, places] = torch.tensor(row), 1
    found: Tensor = classifier(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float()
    return found


def choose_pad(tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], pad_of_encoder: int) -> int:
    """The id of a token that ends no response, for a reward model to be padded with.

    The tokenizer's own pad token where it is one; else a control token that reads like one, or any other control token.

    Args:
        tokenizer: Of the model. Its pad token may have been set by the encoder, which has no use for it.
        end_ids: All tokens that may end a response.
        pad_of_encoder: The pad token as it is now.

    Raises:
        UserError: Every control token may end a response.
    """
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = [tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id]
    like = [number for number, text in added.items() if "pad" in text.lower()]
    for number in (pad_of_encoder, *like, *named, *added):
        if number is not None and number not in end_ids:
            return int(number)
    raise UserError(
        "the tokenizer has no control token that ends no response, and a reward model needs one to pad rows with: "
        "transformers takes the last token that is not the pad token for the end of a row. Add one: "
        "tokenizer.add_special_tokens({'pad_token': '<|pad|>'}), model.resize_token_embeddings(len(tokenizer)), save "
        "both, and give that folder."
    )


def save_reward_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    pad_id: int,
    settings: dict[str, Any],
    trust_remote_code: bool = False,
) -> None:
    """Write a folder for ``AutoModelForSequenceClassification``, reload it, and only then give it its name.

    Args:
        model: With :func:`add_score_head`. Of one with an adapter a merged copy is written.
        tokenizer: Saved with the pad token of ``pad_id``; not changed.
        folder: Where to. An older one is replaced.
        card: Its README.
        pad_id: As :func:`choose_pad` gives it.
        settings: What ``reward.json`` beside the weights says.
        trust_remote_code: Whether its class may be code that comes with the model.

    Raises:
        NonFiniteError: A weight is NaN or infinite.
        UserError: A merged copy predicts something else than base and adapter.
        RuntimeError: The reloaded weights differ from those in memory.
        StorageError: There is no room, or the folder cannot be written to.
    """
    from transformers import AutoModelForSequenceClassification

    refuse_non_finite(model)
    if hasattr(model, "merge_and_unload"):
        score = model.score
        model = merged_copy(model)
        model.score = score
    classifier = make_classifier(model, pad_id, trust_remote_code)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    with save_folder(folder) as partial:
        write_json(partial / "reward.json", settings)
        write_verified(classifier, tokenizer, partial, card, AutoModelForSequenceClassification, trust_remote_code)
