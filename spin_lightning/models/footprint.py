"""How much memory training and generation take, from plain numbers: the equations of ``spin-lightning plan``.

No model is made here and no device asked. With ``n`` weights, ``m`` of them trained, ``w`` bytes each as stored and
``c`` bytes in the matrix products, a pass of ``T`` tokens of which ``N`` are scored takes at its highest

    base + w n + (4 + s) m + w m + activations + logits + head        while a pass runs
    base + w n + (4 + s) m + w m + 4 min(m, 2^25)                     while the optimiser steps

where ``s`` are the bytes of the optimiser's state, and the 4 are float32 master weights, which 16-bit weights alone
have. The other parts are at the functions that compute them. What was fitted is in ``FITTED``, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from spin_lightning.models.head import LOGITS_BUDGET

MIB = 2**20

#: Weights whose float32 gradients exist together in a step of the optimiser (``stages.optim``).
WEIGHTS_AT_A_TIME = 2**25
#: Columns that a cache of keys and values has to spare, and tokens that are read in one pass to fill it.
SPARE_COLUMNS, PREFILL_TOKENS = 128, 2048


@dataclass(frozen=True)
class Fitted:
    """What was measured rather than derived: see ``docs/scale.md``.

    Attributes:
        base: Bytes that are not of the model: on a CPU the interpreter and its libraries, which are resident memory.
        temporaries: Factor on the activations, for what comes and goes beside them.
        with_adapter: The same where each linear layer has an adapter. On a CPU what its steps free lies in pieces
            between what is kept, and the C library does not fill all of them.
    """

    base: int
    temporaries: float
    with_adapter: float


#: On a CPU fitted; on a GPU not: what torch allocates there has no base, and what CUDA itself takes is ``CONTEXT``.
FITTED = {"cpu": Fitted(500 * MIB, 1.35, 1.95), "cuda": Fitted(0, 1.1, 1.1)}
#: Bytes on a GPU that no tensor has: the driver's context, libraries' workspaces and gaps between tensors. Reasoned.
CONTEXT = 1024 * MIB


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides its memory.

    Attributes:
        weights: All of them, tied ones once.
        packable: Weights of linear layers other than the head, which 4-bit models pack.
        layers: Of the decoder.
        hidden: Width of the hidden states.
        query: Width of all queries of a token: heads times their size.
        key: Width of all keys of a token.
        intermediate: Width of the feed-forward layers that one token goes through.
        vocabulary: Rows of the embedding.
        is_tied: Whether the head is the embedding.
    """

    weights: int
    packable: int
    layers: int
    hidden: int
    query: int
    key: int
    intermediate: int
    vocabulary: int
    is_tied: bool = True

    @property
    def table(self) -> int:
        """Weights of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        """Weights of one layer, on average."""
        return (self.weights - self.table * (1 if self.is_tied else 2)) // self.layers


@dataclass(frozen=True)
class Numerics:
    """Bytes of a weight as it is stored and as it is multiplied.

    Attributes:
        stored: Of a weight and its gradient.
        computed: In matrix products.
    """

    stored: int
    computed: int

    @property
    def master(self) -> int:
        """Of the float32 copy that the optimiser keeps of a trained 16-bit weight."""
        return 4 if self.stored == 2 else 0

    @property
    def is_mixed(self) -> bool:
        """Whether a pass makes 16-bit copies of all weights."""
        return self.computed < self.stored


#: By ``trainer.precision``.
NUMERICS: Mapping[str, Numerics] = {
    "32-true": Numerics(4, 4),
    "bf16-true": Numerics(2, 2),
    "16-true": Numerics(2, 2),
    "bf16-mixed": Numerics(4, 2),
    "16-mixed": Numerics(4, 2),
    "64-true": Numerics(8, 8),
}


@dataclass(frozen=True)
class Load:
    """What a device is given to do.

    Attributes:
        tokens: Of the largest pass.
        scored: Of these, the response tokens.
        passes: In an update.
        accumulates: Whether an update has several batches.
    """

    tokens: int
    scored: int
    passes: int = 2
    accumulates: bool = False


@dataclass(frozen=True)
class Setup:
    """How a model is trained, and on how many devices.

    Attributes:
        numerics: Bytes of weights.
        state: Bytes that the optimiser keeps for each trained weight, master weights apart: 8 for AdamW.
        device: ``cpu`` or ``cuda``.
        adapter: Weights of an adapter, which alone are trained. None: the whole model is.
        is_packed: Whether the model below the adapter is packed to 4 bits.
        recomputes: Whether activations are computed again in the backward pass (``model.gradient_checkpointing``).
        devices: Processes.
        is_sharded: Whether each holds a share of the weights (FSDP2) instead of all of them (DDP).
        resident_opponent: Whether a frozen copy of the model is kept beside it.
    """

    numerics: Numerics
    state: float = 8.0
    device: str = "cpu"
    adapter: int | None = None
    is_packed: bool = False
    recomputes: bool = False
    devices: int = 1
    is_sharded: bool = False
    resident_opponent: bool = False


def weight_bytes(size: ModelSize, setup: Setup) -> float:
    """Bytes of a model's weights, its adapter apart.

    Packed weights take 4 bits and, doubly quantised, 0.127 bits of scales: one byte for 64 weights and four for 16,384.
    """
    packed = size.packable if setup.is_packed else 0
    return packed * (0.5 + 1 / 64 + 4 / 16384) + (size.weights - packed) * setup.numerics.stored


def activation_bytes(size: ModelSize, setup: Setup) -> float:
    """Bytes that one token leaves in one layer for the backward pass.

    With ``h`` hidden, ``q`` queries, ``k`` keys and ``i`` intermediate numbers of ``c`` bytes, and ``r`` bytes a number
    of the residual stream:

    - two norms: their inputs, 2 r h, and outputs, 2 c h; in mixed precision each of the five layers behind them has a
      copy of its own, 5 c h; spelt out, as on a GPU, also a float32 copy each, 8 h
    - attention: queries, keys, values, output, and the output in the order of the next layer, c (3 q + 2 k)
    - the gated feed-forward layer: c 2 i; spelt out, as on a GPU, c 4 i

    A model that computes its activations again keeps the residual stream, r h.
    """
    c = setup.numerics.computed
    r = setup.numerics.stored if setup.numerics.is_mixed else c
    if setup.recomputes:
        return r * size.hidden
    is_spelt_out = setup.device != "cpu"
    outputs = 5 if setup.numerics.is_mixed else 2
    norms = (2 * r + outputs * c + (8 if is_spelt_out else 0)) * size.hidden
    attention = c * (3 * size.query + 2 * size.key)
    return norms + attention + c * (4 if is_spelt_out else 2) * size.intermediate


def training_memory(size: ModelSize, load: Load, setup: Setup) -> dict[str, float]:
    """Bytes on each device at the highest point of an update, by what they are for.

    Returns:
        ``base``, ``weights``, ``adapter``, ``opponent``, ``gradients``, ``optimiser``, ``activations``, ``logits`` and
        ``other``. Their sum is the peak.

    Example:
        >>> size = ModelSize(1000, 600, 2, 10, 10, 5, 20, 40)
        >>> made = training_memory(size, Load(tokens=8, scored=4), Setup(Numerics(2, 2), device="cuda"))
        >>> made["weights"], made["gradients"], made["optimiser"]
        (2000.0, 2000.0, 12000.0)
    """
    numerics, fitted = setup.numerics, FITTED[setup.device]
    is_adapted = setup.adapter is not None
    trained = setup.adapter if setup.adapter is not None else size.weights
    share = 1 / setup.devices if setup.is_sharded else 1.0
    weights = weight_bytes(size, setup)
    parts = {
        "base": float(fitted.base),
        "weights": weights * share,
        "adapter": trained * numerics.stored * share if is_adapted else 0.0,
        "opponent": weights if setup.resident_opponent else 0.0,
        "gradients": trained * numerics.stored * share,
        "optimiser": trained * (numerics.master + setup.state) * share,
    }
    per_token = activation_bytes(size, setup) * size.layers
    if setup.recomputes:  # and one layer as a whole
        per_token += activation_bytes(size, replace(setup, recomputes=False))
    activations = (fitted.with_adapter if is_adapted else fitted.temporaries) * per_token * load.tokens
    logits = logit_bytes(size, load.scored, setup)
    # a whole gradient of the embedding beside the one that is being summed; a tied head's waits for the embedding's
    table = 0.0 if is_adapted else float(size.table * numerics.stored)
    # while these passes run, the gradients of the update before, or of its batches so far, are still there
    second = parts["gradients"] if load.passes > 1 and (load.accumulates or not numerics.master) else 0.0
    copies = size.weights * numerics.computed * (0 if is_adapted and setup.is_packed else 1) if numerics.is_mixed else 0
    unpacked = (
        float(numerics.computed * size.hidden * size.intermediate) if setup.is_packed else 0.0
    )  # a layer at a time
    other = table + second + copies + unpacked
    if setup.devices > 1 and setup.is_sharded:  # two layers as a whole, and what is below and above them
        whole = 2 * size.layer + size.table * (1 if size.is_tied else 2)
        other += whole * numerics.computed * (1 if is_adapted else 2)
    elif setup.devices > 1:  # the buckets in which gradients travel
        other += parts["gradients"]
    in_step = 4.0 * min(trained * share, WEIGHTS_AT_A_TIME) if numerics.master else 0.0
    if activations + logits + other > in_step:
        return {**parts, "activations": activations, "logits": logits, "other": other}
    return {**parts, "activations": 0.0, "logits": 0.0, "other": in_step}


def logit_bytes(size: ModelSize, scored: int, setup: Setup) -> float:
    """Bytes of the logits that exist at a time: of ``N`` tokens, under the budget of ``models.head``.

    On a GPU also their float32 copy, of which a CPU makes a few rows at a time.
    """
    logits = min(float(LOGITS_BUDGET), float(scored * size.vocabulary * setup.numerics.computed))
    return logits * (1 + 4 / setup.numerics.computed) if setup.device != "cpu" else logits


def generation_memory(
    size: ModelSize, slots: int, prompt: int, response: int, setup: Setup, *, keeps_optimiser: bool = False
) -> dict[str, float]:
    """Bytes on each device while the opponent responds, by what they are for.

    The cache has keys and values of ``slots`` rows as wide as the longest prompt, its response and some columns to
    spare: 2 k L c bytes a token. On a CPU decoding has a second copy of the weights, in the order of its matrix units.

    Args:
        size: Of the model.
        slots: Responses under way at a time.
        prompt: Tokens of the longest prompt.
        response: Most tokens of a response.
        setup: How the model is trained.
        keeps_optimiser: Whether an iteration goes on with the optimiser of the one before
            (``self_play.reset_optimizer: false``), which then stays in memory.
    """
    numerics, fitted = setup.numerics, FITTED[setup.device]
    trained = setup.adapter if setup.adapter is not None else size.weights
    weights = weight_bytes(size, setup)
    state = numerics.master + setup.state if keeps_optimiser else 0.0
    columns = prompt + response + SPARE_COLUMNS
    is_repacked = setup.device == "cpu" and numerics.computed == 2
    copies = numerics.computed * size.weights if is_repacked or numerics.is_mixed else 0
    width = 2 * size.hidden + 2 * size.query + 2 * size.key + 3 * size.intermediate
    return {
        "base": float(fitted.base),
        "weights": weights,
        "adapter": float(trained * numerics.stored) if setup.adapter is not None else 0.0,
        "optimiser": trained * state * (1 / setup.devices if setup.is_sharded else 1),
        "cache": 2.0 * size.key * size.layers * numerics.computed * slots * columns,
        "logits": 3.0 * 4 * slots * size.vocabulary,
        "activations": float(width * numerics.computed * max(PREFILL_TOKENS, prompt)),
        "other": float(copies),
    }


def peak(parts: Mapping[str, float]) -> float:
    """The sum of what a function here returns."""
    return sum(parts.values())
