"""How a model computes the log-probs of a batch's response tokens: the fastest forward path that proves right on it.

The fastest computes each prompt once for all its responses, and only the places that predict a response token reach the
LM head. Whether a model can take it is tried on the model itself at its first batch, against plain forward passes over
each response alone; one that cannot takes a longer path to the same numbers. A model that is not causal is refused
there.

Where a model's RoPE changes with the length of a pass, sequences on either side of such a boundary never share one:
each has the number that it has alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from spin_lightning.models import head, rope, shared_prompt
from spin_lightning.models.attention import attention_of, set_attention
from spin_lightning.models.batches import pack, sequences, shifted
from spin_lightning.models.compiled_layers import find_compiled_layer
from spin_lightning.models.cpu_memory import round_up
from spin_lightning.models.fused_layers import FindFused, fuse_layers, unfuse_layers
from spin_lightning.models.gated_mlp import find_gated_mlp
from spin_lightning.models.kernels import kernel_of
from spin_lightning.models.modes import compute_dtype, evaluating
from spin_lightning.models.rms_norm import find_rms_norm
from spin_lightning.terminal import name_error, say
from spin_lightning.types import ResponseBatch, UserError

#: How closely two forward paths through one model must agree, in nats a token on average over a response. A prompt that
#: is not seen, or another response that is, costs about 2 on a real model; rounding a tenth of this. A model whose next
#: token depends little on what came before, as an untrained one's, must agree more closely, in proportion.
AGREEMENT = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
#: Tokens of the longest sequence that forward paths are tried on, where a model takes so many.
PROBE_TOKENS = 128
#: The kinds of layers that are computed in another way where prompts are shared.
FUSED = (find_rms_norm, find_gated_mlp)
T = TypeVar("T")


#: Which places of a sequence are asked about: from the length of its prompt and the places of all its tokens.
Pick = Callable[[int, Sequence[int]], Sequence[int]]


def predicting(prompt_length: int, places: Sequence[int]) -> Sequence[int]:
    """The places at which the tokens of a response are predicted."""
    return shifted(prompt_length, places)[0]


def last(prompt_length: int, places: Sequence[int]) -> Sequence[int]:
    """The place of a response's last token; of its prompt's, if it has none."""
    return places[-1:]


class States(NamedTuple):
    """What a forward path computes at the places that are asked about, in the order of the responses.

    Attributes:
        hidden: Last hidden states, shape ``(M, H)``, with rows of no meaning behind them on some paths. None: the model
            does not show them.
        logits: Where a path asks the whole model the logits there, in pieces that make ``(M, V)`` together.
    """

    hidden: Tensor | None
    logits: tuple[Tensor, ...] = ()


Read = Callable[[nn.Module, ResponseBatch, Pick], States]


@dataclass(frozen=True)
class ForwardPath:
    """A way through a model. Called with model and batch, it gives the log-prob of each response token, ``(N,)``.

    Attributes:
        read: Computes the states at some places of a batch.
        is_linear: Whether what comes after them is one matrix and nothing else.
    """

    read: Read
    is_linear: bool = False

    def __call__(self, model: nn.Module, batch: ResponseBatch, targets: Tensor | None = None) -> Tensor:
        """That of each response token; given several tokens at each place ``(N, m)``, that of each of these."""
        states = self.read(model, batch, predicting)
        return self._log_probs(model, states, batch.input_ids[batch.scored] if targets is None else targets)

    def with_hidden(self, model: nn.Module, batch: ResponseBatch) -> tuple[Tensor, Tensor | None]:
        """The log-prob of each response token ``(N,)``, and the hidden states ``(N, H)`` that predict them."""
        states, targets = self.read(model, batch, predicting), batch.input_ids[batch.scored]
        values = self._log_probs(model, states, targets)
        return values, states.hidden if states.logits or states.hidden is None else states.hidden[: len(targets)]

    def top(self, model: nn.Module, batch: ResponseBatch, k: int) -> tuple[Tensor, Tensor]:
        """The k tokens that are most likely where each response token stands ``(N, k)``.

        And the log-probs of the response token and of these ``(N, 1 + k)``.
        """
        states = self.read(model, batch, predicting)
        if states.logits:
            ids = torch.cat([head.pick_top(piece, k) for piece in states.logits])
        else:
            assert states.hidden is not None
            ids = head.top_ids(model, states.hidden[: len(batch.scored)], k, is_linear=self.is_linear)
        return ids, self._log_probs(model, states, torch.cat([batch.input_ids[batch.scored, None], ids], 1))

    def _log_probs(self, model: nn.Module, states: States, targets: Tensor) -> Tensor:
        hidden, logits = states
        if logits:
            of_places = targets if targets.ndim == 2 else targets[:, None]
            pieces = zip(logits, of_places.split([len(piece) for piece in logits]), strict=True)
            return torch.cat([head.gather_log_probs(*piece) for piece in pieces]).view(targets.shape)
        assert hidden is not None
        padded = F.pad(targets, (*[0, 0] * (targets.ndim - 1), 0, len(hidden) - len(targets)))
        return head.token_log_probs(model, hidden, padded, is_linear=self.is_linear)[: len(targets)]


_chosen: WeakKeyDictionary[nn.Module, ForwardPath] = WeakKeyDictionary()


def forward_path_of(model: nn.Module) -> ForwardPath:
    """How a model computes the log-probs of response tokens: by the fastest forward path that proves right on it.

    The first call for a model tries each path on a few responses and compares with plain forward passes over each
    alone. A printed note names a model that cannot take the fastest, and the path that it takes.

    Raises:
        UserError: It is not a causal language model.
    """
    if model not in _chosen:
        _chosen[model] = _choose_forward_path(model, FORWARD_PATHS)
    return _chosen[model]


def forget_forward_path(model: nn.Module) -> None:
    """Try a model again when its forward path is next asked for: its kernels are others now."""
    _chosen.pop(model, None)


def keep_forward_path(model: nn.Module) -> None:
    """Let a model whose weights are sharded, on which no path can be tried, take its kernels of now on its path."""
    if is_shared(forward_path_of(model)):
        shared_prompt.share_prompts(model, kernel_of(model, "prompt_attention"))


def is_shared(path: ForwardPath) -> bool:
    """Whether a forward path computes each prompt once for all its responses."""
    return path.read is _read_shared


def token_log_probs(model: nn.Module, batch: ResponseBatch, targets: Tensor | None = None) -> Tensor:
    """Log-probability of each response token given all tokens before it, in nats, by the model's forward path.

    Args:
        model: A Hugging Face causal language model.
        batch: Prompts with their responses.
        targets: Other tokens in the places of the response tokens, several at each, shape ``(N, m)``.

    Returns:
        Shape ``(N,)``, as ``batch.scored`` has the tokens, or that of ``targets``; float32 (float64 for a float64
        model).

    Raises:
        UserError: The model is not a causal language model.
    """
    forward_path_of(model)
    if not len(batch.scored):  # no token, and yet a gradient
        nothing = next(model.parameters()).flatten()[:0]
        nothing = nothing.to(torch.promote_types(nothing.dtype, torch.float32))
        return nothing if targets is None else nothing.view(targets.shape)
    return _on_its_path(model, lambda path: _token_log_probs(path, model, batch, targets))


@torch.no_grad()
def top_log_probs(model: nn.Module, batch: ResponseBatch, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k tokens that a model finds most likely where each response token stands, by its forward path.

    Returns:
        Log-probs of the response tokens ``(N,)``; ids of the most likely ones, the likeliest first, and their
        log-probs, both ``(N, k)``, with fewer columns where the vocabulary has no k tokens. All with the bits that
        :func:`token_log_probs` gives these ids.

    Raises:
        UserError: The model is not a causal language model.
    """
    forward_path_of(model)
    if not len(batch.scored):
        ids = batch.input_ids.new_zeros(0, k)
        return token_log_probs(model, batch), ids, token_log_probs(model, batch, ids)

    def top(path: ForwardPath) -> tuple[Tensor, Tensor, Tensor]:
        parts = [(places, *path.top(model, part, k)) for places, part in _split_at_boundary(model, batch, predicting)]
        ids = _reorder([(places, ids) for places, ids, _ in parts])
        values = _reorder([(places, values) for places, _, values in parts])
        return values[:, 0], ids, values[:, 1:]

    return _on_its_path(model, top)


def log_probs_and_hidden(model: nn.Module, batch: ResponseBatch) -> tuple[Tensor, Tensor]:
    """What :func:`token_log_probs` gives, and from the same pass the hidden states that predict the tokens.

    A value head on the latter tells the value of the state in which each token is chosen. Gradients flow through both.

    Returns:
        Log-probs, shape ``(N,)``, with the bits of :func:`token_log_probs`; and the last hidden states at
        ``batch.predictors``, shape ``(N, H)``, in the model's dtype.

    Raises:
        UserError: The model is not a causal language model, or does not show its hidden states.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from spin_lightning.models.batches import pack
        >>> config = LlamaConfig(
        ...     vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> log_probs, hidden = log_probs_and_hidden(LlamaForCausalLM(config), pack([([5, 6], [[7, 2], [8]])]))
        >>> log_probs.shape, hidden.shape
        (torch.Size([3]), torch.Size([3, 8]))
    """
    forward_path_of(model)
    if not len(batch.scored):
        nothing = token_log_probs(model, batch)
        return nothing, nothing.new_zeros(0, _width_of(model)).to(next(model.parameters()).dtype)

    def both(path: ForwardPath) -> tuple[Tensor, Tensor]:
        parts = [
            (places, *path.with_hidden(model, part)) for places, part in _split_at_boundary(model, batch, predicting)
        ]
        log_probs = _reorder([(places, values) for places, values, _ in parts])
        return log_probs, _reorder([(places, _shown(model, hidden)) for places, _, hidden in parts])

    return _on_its_path(model, both)


def last_hidden(model: nn.Module, batch: ResponseBatch) -> Tensor:
    """The last hidden state at each response's last token, by the model's forward path, with gradients.

    No logits are computed on the paths that can do without. A response without tokens has that of its prompt's last.

    Returns:
        Shape ``(R, H)``, in the model's dtype.

    Raises:
        UserError: The model is not a causal language model, or does not show its hidden states.
    """
    return _hidden_at(model, batch, last)


def predicting_hidden(model: nn.Module, batch: ResponseBatch) -> Tensor:
    """The last hidden states that predict the response tokens: those of :func:`log_probs_and_hidden`, without logits.

    Returns:
        Shape ``(N, H)``, in the model's dtype, with gradients.

    Raises:
        UserError: The model is not a causal language model, or does not show its hidden states.
    """
    return _hidden_at(model, batch, predicting)


def _hidden_at(model: nn.Module, batch: ResponseBatch, pick: Pick) -> Tensor:
    forward_path_of(model)

    def at_places(path: ForwardPath) -> Tensor:
        pieces = []
        for places, part in _split_at_boundary(model, batch, pick):
            states = _shown(model, path.read(model, part, pick).hidden)
            pieces.append((places, states[: len(_picked(part, pick))]))
        return _reorder(pieces)

    return _on_its_path(model, at_places)


def in_one_pass(model: nn.Module, function: Callable[[nn.Module, ResponseBatch], T], batch: ResponseBatch) -> T:
    """``function(model, batch)``, as a pass in which a model whose weights are sharded has all of them.

    Args:
        model: Sharded, or as it comes.
        function: One of those above, or one that calls them, and uses parameters that are the model's own.
        batch: Its second argument.
    """
    sharded = getattr(model, "sharded_pass", None)
    return function(model, batch) if sharded is None else cast("T", sharded(function, batch))


def _on_its_path(model: nn.Module, compute: Callable[[ForwardPath], T]) -> T:
    """What a model's forward path makes; where it fails on a pass, the model has a longer one from then on."""
    path = forward_path_of(model)
    try:
        return compute(path)
    except NotImplementedError:  # a mask that only passes longer than those it was tried on have
        if not is_shared(path):
            raise
    failed = "share a prompt in passes as long as this one"
    _chosen[model] = path = _choose_forward_path(model, FORWARD_PATHS[1:], failed)
    return compute(path)


def _token_log_probs(
    path: ForwardPath, model: nn.Module, batch: ResponseBatch, targets: Tensor | None = None
) -> Tensor:
    """The log-prob of each scored token ``(N,)``, or of ``targets``, by passes that cross no boundary of the RoPE."""
    parts = []
    for places, part in _split_at_boundary(model, batch, predicting):
        of_part = targets if targets is None or places is None else targets[places]
        parts.append((places, path(model, part, of_part)))
    return _reorder(parts)


def _reorder(parts: list[tuple[list[int] | None, Tensor]]) -> Tensor:
    """Numbers of the parts of a batch in the order of the batch."""
    places = [place for some, _ in parts for place in some or ()]
    values = [value for _, value in parts]
    if parts[0][0] is None:  # the whole
        return values[0]
    return torch.cat(values)[torch.tensor(places, device=values[0].device).argsort()]


def _shown(model: nn.Module, hidden: Tensor | None) -> Tensor:
    if hidden is None:
        raise UserError(
            f"{type(model).__name__} does not show its hidden states, on which a head for values or rewards stands: "
            "none go into an output embedding. Use another model."
        )
    return hidden


def _width_of(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).hidden_size)


def _read_shared(model: nn.Module, batch: ResponseBatch, pick: Pick) -> States:
    """Each prompt once, responses side by side."""
    hidden = shared_prompt.hidden_states(head.decoder_of(model), batch)
    places = batch.predictors if pick is predicting else torch.tensor(_picked(batch, pick), device=hidden.device)
    places = round_up(places)
    # several responses to a prompt share a predictor; on a GPU indexing adds their gradients in a fixed order
    return States(hidden.index_select(0, places) if hidden.device.type == "cpu" else hidden[places])


def _picked(batch: ResponseBatch, pick: Pick) -> list[int]:
    return [place for prompt_length, places in sequences(batch.lengths) for place in pick(prompt_length, places)]


def _read_separate(model: nn.Module, batch: ResponseBatch, pick: Pick) -> States:
    """Each response behind a prompt of its own: in padded rows; for FlashAttention, which wants none, end to end."""
    decoder = head.decoder_of(model)
    if attention_of(decoder.config).startswith("flash_attention"):
        places, picked = _lay_end_to_end(batch, pick)
        ids, positions = batch.input_ids[places], batch.position_ids[places]
        hidden = decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False).last_hidden_state[0]
    else:
        places, mask, picked = _pad_in_rows(batch, pick)
        output = decoder(input_ids=batch.input_ids[places], attention_mask=mask, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)
    return States(hidden.index_select(0, picked))


def _read_plain(model: nn.Module, batch: ResponseBatch, pick: Pick) -> States:
    """Rows, and the whole model as it comes: what the other paths are compared with."""
    places, mask, picked = _pad_in_rows(batch, pick)
    with _watching_hidden(model) as seen:
        output = model(input_ids=batch.input_ids[places], attention_mask=mask, use_cache=False)
    hidden = seen[0].flatten(0, 1)[picked] if seen and seen[0].shape[:2] == places.shape else None
    return States(hidden, (output.logits.flatten(0, 1)[picked],))


@contextmanager
def _watching_hidden(model: nn.Module) -> Iterator[list[Tensor]]:
    """What goes into a model's head while this lasts; nothing where no head is known."""
    seen: list[Tensor] = []
    lm_head = head.head_of(model)
    if lm_head is None:
        yield seen
        return
    hook = lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()


def _lay_end_to_end(batch: ResponseBatch, pick: Pick = predicting) -> tuple[Tensor, Tensor]:
    """Places in the batch of all sequences one after the other, and which of these are asked about."""
    places: list[int] = []
    picked: list[int] = []
    for prompt_length, sequence in sequences(batch.lengths):
        picked += pick(prompt_length, range(len(places), len(places) + len(sequence)))
        places += sequence
    device = batch.input_ids.device
    return torch.tensor(places, device=device), torch.tensor(picked, dtype=torch.long, device=device)


def _pad_in_rows(batch: ResponseBatch, pick: Pick = predicting) -> tuple[Tensor, Tensor, Tensor]:
    """Places of all sequences in right padded rows ``(R, L)``, and their mask; those asked about in the flat rows."""
    # a row in which nothing is asked about could have no token at all, and attention over nothing is NaN
    rows = [(length, places) for length, places in sequences(batch.lengths) if pick(length, places)]
    longest = max(len(sequence) for _, sequence in rows)
    places, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    picked: list[int] = []
    for row, (prompt_length, sequence) in enumerate(rows):
        places[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
        picked += pick(prompt_length, range(row * longest, row * longest + len(sequence)))
    device = batch.input_ids.device
    return places.to(device), mask.to(device), torch.tensor(picked, dtype=torch.long, device=device)


def _read_alone(model: nn.Module, batch: ResponseBatch, pick: Pick) -> States:
    """Each response in a pass of its own, without padding or a mask: right by definition, and slow."""
    boundary, hidden, logits = rope.boundary_of(model), [], []
    for prompt_length, sequence in sequences(batch.lengths):
        picked = list(pick(prompt_length, range(len(sequence))))
        if picked:
            if boundary is not None:
                boundary.settle()
            with _watching_hidden(model) as seen:
                output = model(input_ids=batch.input_ids[sequence][None], use_cache=False)
            logits.append(output.logits[0, picked])
            hidden += [states[0, picked] for states in seen if states.shape[:2] == (1, len(sequence))]
    return States(torch.cat(hidden) if len(hidden) == len(logits) else None, tuple(logits))


def _split_at_boundary(
    model: nn.Module, batch: ResponseBatch, pick: Pick
) -> Iterator[tuple[list[int] | None, ResponseBatch]]:
    """The batch in parts whose sequences may share a pass, and which of the places asked about each part has.

    Where all may, the batch itself, with None. What an earlier pass left behind in the model is taken back.
    """
    boundary = rope.boundary_of(model)
    if boundary is None:
        yield None, batch
        return
    ids, responses, asked = batch.input_ids.tolist(), [], 0
    for prompt_length, sequence_places in sequences(batch.lengths):
        sequence = [ids[place] for place in sequence_places]
        count = len(pick(prompt_length, sequence))
        responses.append((sequence[:prompt_length], sequence[prompt_length:], range(asked, asked + count)))
        asked += count
    sides: dict[int, dict[int, list[int]]] = {}
    groups = (group for group, (_, *lengths) in enumerate(batch.lengths) for _ in lengths)
    for number, group in enumerate(groups):
        prompt, response, places = responses[number]
        if places:
            side = boundary.side(len(prompt) + len(response))
            sides.setdefault(side, {}).setdefault(group, []).append(number)
    for part in sides.values():
        packed = pack([(responses[own[0]][0], [responses[number][1] for number in own]) for own in part.values()])
        own_places = [place for own in part.values() for number in own for place in responses[number][2]]
        boundary.settle()
        yield own_places, move_data_to_device(packed, batch.input_ids.device)


#: Forward paths, fastest first. With each what a model that is not up to it cannot do, and how log-probs are computed.
FORWARD_PATHS: tuple[tuple[Read, str, str], ...] = (
    (_read_shared, "share a prompt between its responses", "each prompt once, with its layers as they come"),
    (_read_separate, "hand over its hidden states", "each response behind a prompt of its own"),
    (
        _read_plain,
        "be computed in padded rows",
        "the logits of all tokens of each response behind a prompt of its own",
    ),
    (_read_alone, "be computed at all", "each response in a forward pass of its own"),
)


@torch.no_grad()
def _choose_forward_path(model: nn.Module, paths: Sequence[tuple[Read, str, str]], failed: str = "") -> ForwardPath:
    """The first of some paths that gives the log-probs of plain passes. A note says why it is not the fastest."""
    if not hasattr(model, "get_output_embeddings"):  # not a model of transformers: nothing is known about its parts
        return ForwardPath(_read_plain)
    config: Any = model.config
    own = shared_prompt.own_attention_of(config)
    failures, taken = [f"cannot {failed}"] if failed else [], ""
    set_attention(config, own)
    unfuse_layers(model)
    with evaluating(model):
        probe, expected, allowed = _make_reference(model)
        is_linear = head.is_linear(model)
        tried: list[tuple[Read, str, str, Sequence[FindFused]]] = [(*path, FUSED) for path in paths]
        if paths[0][0] is _read_shared and kernel_of(model, "layers") == "compiled":
            tried.insert(0, (_read_shared, "have its layers compiled", "", (*FUSED, find_compiled_layer)))
        for path, ability, description, fused in tried:
            chosen = ForwardPath(path, is_linear)
            try:
                if path is _read_shared:
                    shared_prompt.share_prompts(model, kernel_of(model, "prompt_attention"))
                    fuse_layers(model, fused)
                differences = (_token_log_probs(chosen, model, probe) - expected).abs()
                totals = differences.new_zeros(len(probe)).index_add(0, probe.response_index, differences)
                difference = float((totals / probe.response_lengths).max())
                if find_compiled_layer in fused:
                    _try_backward(chosen, model)
            except Exception as error:  # whatever a model's code does when it is used otherwise than it expects
                reason = name_error(error)
            else:
                if path is _read_alone or difference <= allowed:
                    taken = description
                    break
                reason = f"log-probs would differ by {difference:.1g} nats a token"
            failures.append(f"cannot {ability} ({reason})")
            set_attention(config, own)
            unfuse_layers(model)
    if failures:
        say(
            f"note: {type(model).__name__} {', and '.join(failures)}; "
            f"its log-probs take a longer forward path: {taken}."
        )
    return chosen


def _try_backward(path: ForwardPath, model: nn.Module) -> None:
    """Compute a gradient: ``torch.compile`` makes a pass with gradients apart from that without, and may fail there."""
    first = next((weight for weight in model.parameters() if weight.requires_grad), None)
    if first is not None:  # else nobody asks for gradients
        with torch.inference_mode(False), torch.enable_grad():  # in which nothing of inference can be kept
            torch.autograd.grad(_token_log_probs(path, model, _make_probe(model)).sum(), first, allow_unused=True)


@torch.no_grad()
def rounding_of(model: nn.Module, batch: ResponseBatch) -> float:
    """How far rounding moves the log-prob of one token, in nats (root mean square).

    Compared are the same sequences in passes of other shapes: each response alone with its prompt; and, over prompts
    too, the whole sequences by another forward path.

    At most what two forward paths through a model may differ by.
    """
    if not len(batch.scored):
        return 0.0
    path, ids = forward_path_of(model), batch.input_ids.tolist()
    rows = [([ids[place] for place in places], length) for length, places in sequences(batch.lengths)]
    whole, *alone = (
        move_data_to_device(pack(groups), batch.input_ids.device)
        for groups in (
            [([], [sequence]) for sequence, _ in rows],
            *([(sequence[:length], [sequence[length:]])] for sequence, length in rows),
        )
    )
    other = ForwardPath(_read_separate if is_shared(path) else _read_alone, path.is_linear)
    with evaluating(model):
        one_by_one = torch.cat([_token_log_probs(path, model, part) for part in alone if len(part.scored)])
        with shared_prompt.in_kernel():  # what two ways to compute attention differ by is in no log-ratio
            between_paths = _token_log_probs(path, model, whole) - _token_log_probs(other, model, whole)
        differences = (_token_log_probs(path, model, batch) - one_by_one, between_paths)
    largest = max(float(difference.double().square().mean().sqrt()) for difference in differences)
    # a response of few tokens among long ones hardly shows in the mean: a walk of one is taken for one of 2.5 times the
    # usual
    walks = differences[0].new_zeros(len(batch)).index_add(0, batch.response_index, differences[0]).abs()
    largest = max(largest, float((walks / batch.response_lengths.clamp_min(1).sqrt()).max()) / 2.5)
    return min(largest, AGREEMENT[compute_dtype(one_by_one.device, model)])


def _make_reference(model: nn.Module) -> tuple[ResponseBatch, Tensor, float]:
    """What forward paths are tried on, the log-probs of its tokens by plain passes, and how closely a path must agree.

    Raises:
        UserError: The model is not causal, or does not predict tokens at all.
    """
    name = type(model).__name__
    try:
        probe = _make_probe(model)
        expected = ForwardPath(_read_alone)(model, probe)
        *_, (_, longest) = sequences(probe.lengths)
        length = int(min(len(longest), rope.limit_of(model)))
        future, beyond, past, spread = _measure_influences(model, probe.input_ids[longest[:length]])
    except Exception as error:
        raise UserError(
            f"{name} cannot be trained as a causal language model, which takes token ids and returns logits of the "
            f"next: {name_error(error)}. Use a decoder-only model (AutoModelForCausalLM)."
        ) from error
    dtype = compute_dtype(expected.device, model)
    eps = torch.finfo(dtype).eps
    # what rounding may do: little in passes of one shape, but that a mixture of experts may choose others
    allowed = 2 * eps**0.5 * past + eps * spread
    if future > allowed or beyond > allowed + 8 * eps * spread:
        raise UserError(
            f"{name} is not a causal language model: what it predicts after a token changes with the tokens that come "
            f"later ({max(future, beyond):.2g} nats, and {past:.2g} with those before). Such models (BERT, encoders, "
            "prefix masks) cannot generate from left to right. Use a decoder-only model, or set is_decoder or "
            "is_causal in its config."
        )
    rounding = 64 * eps * (1 + spread)
    return probe, expected, AGREEMENT[dtype] if past >= 1 else min(AGREEMENT[dtype], AGREEMENT[dtype] * past + rounding)


def _measure_influences(model: nn.Module, ids: Tensor) -> tuple[float, float, float, float]:
    """How far log-probs in the middle of a sequence move, on average over the vocabulary, in nats.

    When all later tokens change, when they go, and when all earlier ones change. And the spread of the logits there.
    """
    middle, others = len(ids) // 2, ids.roll(3)
    place = torch.arange(len(ids), device=ids.device)
    other_future, other_past = (torch.where(where, others, ids) for where in (place > middle, place < middle))
    rows = [ids, other_future, ids[: middle + 1], other_past]
    logits = torch.stack([model(input_ids=row[None], use_cache=False).logits[0, middle].float() for row in rows])
    log_probs = logits.log_softmax(-1)
    is_possible = log_probs.isfinite().all(0)
    log_probs = log_probs[:, is_possible]
    future, beyond, past = (log_probs[1:] - log_probs[0]).abs().mean(1).tolist()
    return future, beyond, past, float(logits[0, is_possible].std(correction=0))


def _make_probe(model: nn.Module) -> ResponseBatch:
    """Two prompts and three responses of different lengths, over the whole vocabulary; the last is the longest."""
    embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    most = getattr(model.config, "max_position_embeddings", None)
    most = min(PROBE_TOKENS, most) if isinstance(most, int) and most > 0 else PROBE_TOKENS
    a, b, c = most // 4, most // 2, most // 3
    tokens = [(7919 * place + 13) % len(embeddings) for place in range(a + b + c + most)]
    first, second, last = tokens[a : a + b], tokens[a + b : a + b + c], tokens[a + b + c :]
    batch = pack([(tokens[:a], [first, second]), (last[:3], [last[3:]])])
    return move_data_to_device(batch, embeddings.device)
