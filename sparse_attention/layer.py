"""One attention module of a sparsified model: its settings, its switch, what it has counted, who watches it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparse_attention.attention import OP
from sparse_attention.cuda import block_skip_attention_by_definition
from sparse_attention.patterns import ResolvedAttention
from sparse_attention.statistics import LayerStatistics, phase_of
from sparse_attention.threshold import Thresholds

_ATTRIBUTE = "_block_skip_layer"


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention, without its thresholds: the op's tensors and what says which pairs see each other.

    Tensors and numbers as in `sparse_attention.block_skip_attention`; lengths are int32 `[B]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    is_causal: bool = False
    softcap: float = 0.0
    window: int = 0
    bias: Tensor | None = None
    kv_lengths: Tensor | None = None
    q_start: Tensor | None = None
    q_lengths: Tensor | None = None
    sinks: Tensor | None = None


Observer = Callable[["AttentionLayer", AttentionCall, Tensor, Tensor], None]
"""Called with the layer, the call, its output `[B, Hq, Sq, Dv]` and its counts `[Hq, 2]`."""


Substitute = Callable[["AttentionLayer", AttentionCall], Tensor]
"""Computes a call in the op's place, output `[B, Hq, Sq, Dv]`; nothing is counted then."""


@dataclass(eq=False)
class AttentionLayer:
    """What sparsification attaches to an attention module; runs the op with the module's settings.

    `enabled` is the switch: off means λ = 0. `threshold_scale` (`[1] float32`) multiplies λ where it is set.
    """

    name: str
    class_name: str
    settings: ResolvedAttention
    enabled: bool = True
    unit: str = "head"
    threshold_scale: Tensor | None = None
    statistics: LayerStatistics = field(default_factory=LayerStatistics)
    observers: list[Observer] = field(default_factory=list)
    substitute: Substitute | None = None

    @property
    def thresholds(self) -> Thresholds:
        """The thresholds that the next call uses: dense where the layer is switched off."""
        return self.settings.thresholds if self.enabled else Thresholds()

    def run(self, call: AttentionCall) -> Tensor:
        """Attention of one call, `[B, Hq, Sq, Dv]`."""
        if self.substitute is not None:
            return self.substitute(self, call)
        # On a GPU the backend is a choice: "pytorch" is the definition, "cuda" the compiled kernels. A CPU has one.
        by_definition = call.q.is_cuda and self.settings.backend == "pytorch" and not torch.compiler.is_compiling()
        out, counts = (block_skip_attention_by_definition if by_definition else OP)(
            call.q, call.k, call.v, call.bias, call.kv_lengths, call.q_start, call.q_lengths, call.sinks,
            self.threshold_scale, br=self.settings.br, bc=self.settings.bc, is_causal=call.is_causal, scale=call.scale,
            softcap=call.softcap, window=call.window, unit=self.unit, **self.thresholds.attributes(),
        )  # fmt: skip
        for observer in self.observers:
            observer(self, call, out, counts)
        if not torch.compiler.is_compiling():
            self.statistics.add(phase_of(call.q.shape[2]), counts)
        return out


def attach(module: nn.Module, layer: AttentionLayer) -> None:
    """Makes `layer` the one of `module`."""
    setattr(module, _ATTRIBUTE, layer)


def detach(module: nn.Module) -> None:
    """Forgets the layer of `module`."""
    if _ATTRIBUTE in module.__dict__:
        delattr(module, _ATTRIBUTE)


def layer_of(module: nn.Module) -> AttentionLayer | None:
    """The layer attached to `module`, if any."""
    return module.__dict__.get(_ATTRIBUTE)


def layers_of(model: nn.Module) -> list[AttentionLayer]:
    """All layers of a sparsified model, in the order of its modules; empty where it is not sparsified."""
    return [layer for module in model.modules() if (layer := layer_of(module)) is not None]


@contextmanager
def observed(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Calls `observer` after every attention of `model` inside the block."""
    layers = layers_of(model)
    for layer in layers:
        layer.observers.append(observer)
    try:
        yield
    finally:
        for layer in layers:
            layer.observers.remove(observer)


@contextmanager
def substituted(layers: Iterable[AttentionLayer], substitute: Substitute) -> Iterator[None]:
    """Inside the block, `substitute` computes the attention of these layers instead of the op."""
    layers = list(layers)
    for layer in layers:
        layer.substitute = substitute
    try:
        yield
    finally:
        for layer in layers:
            layer.substitute = None
