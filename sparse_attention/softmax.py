"""ModelOpt's backend `pytorch`: attention computed as the model computes it, with `F.softmax` patched to skip tiles.

For models loaded with `attn_implementation="eager"`, and modules that call a softmax by hand: it sees the whole score
matrix, mask included. The patch is a `TorchFunctionMode` around the forward of one attention module: it is local to the
thread and to that call. The op is many times faster; this path is the one in which the model's own code computes
everything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparse_attention.errors import ModelError
from sparse_attention.interception import forward_before, names_called, replace_forward
from sparse_attention.layer import AttentionLayer, layer_of
from sparse_attention.reference import decide_tiles, effective_threshold
from sparse_attention.statistics import phase_of
from sparse_attention.threshold import PhaseThreshold

NEEDS_EAGER = "Requires model to be loaded with attn_implementation='eager'"
_ALTERNATIVE = "load it with attn_implementation='eager', or use path=\"op\", which takes any implementation"

_SOFTMAX = frozenset({torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax})
_PRODUCTS = frozenset(
    {torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, torch.Tensor.matmul, torch.Tensor.__matmul__,
     torch.Tensor.bmm, torch.Tensor.baddbmm}
)  # fmt: skip


def computes_attention(module: nn.Module) -> bool:
    """Whether the module looks like attention by its class name and its own code calls a softmax."""
    return "att" in type(module).__name__.lower() and "softmax" in names_called(module)


def require_eager(module: nn.Module, name: str) -> None:
    """Raises ModelError unless the module computes its attention with a softmax that can be patched."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation == "eager" or (implementation is None and computes_attention(module)):
        return
    raise ModelError(
        NEEDS_EAGER,
        where=f"{name} ({type(module).__name__})",
        found=f"attn_implementation={implementation!r}" if implementation else "attention without a softmax to patch",
        fix=_ALTERNATIVE,
    )


def install(module: nn.Module) -> None:
    """Patches the softmax inside the forward of `module`, to which a layer is attached."""
    replace_forward(module, _forward)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    layer = layer_of(module)
    assert layer is not None
    if torch.compiler.is_compiling():
        raise ModelError(
            "softmax patching decides by values and cannot be traced",
            where=f"{layer.name} ({layer.class_name})",
            fix='call restore(model) and sparsify(model, config, path="op") before exporting',
        )
    if layer.observers:
        raise ModelError(
            "softmax patching has no q, k and v to observe",
            where=f"{layer.name} ({layer.class_name})",
            fix='observe a model that was sparsified with path="op"',
        )
    with SoftmaxPatch(layer, has_sink=getattr(module, "sinks", None) is not None) as patch:
        out = forward_before(module)(*args, **kwargs)
    if not patch.applied:
        raise ModelError(NEEDS_EAGER, where=layer.name, found="no softmax was called", fix=_ALTERNATIVE)
    return out


class SoftmaxPatch(TorchFunctionMode):
    """Inside the block, a softmax over `[B, H, Sq, Sk]` scores leaves out the tiles that the layer's λ skips.

    `has_sink` says that the last column of the scores is a sink: it is no key, and always kept.
    """

    def __init__(self, layer: AttentionLayer, *, has_sink: bool = False) -> None:
        super().__init__()
        self.layer, self.has_sink = layer, has_sink
        self.applied = False
        self._products: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            out = func(*args, **kwargs)
            self._products.add(out.shape[-1])
            return out
        if func not in _SOFTMAX:
            return func(*args, **kwargs)
        kwargs = dict(kwargs)
        scores, *others = args or (kwargs.pop("input"),)
        dim = others[0] if others else kwargs.get("dim")
        if scores.dim() != 4 or dim not in (-1, 3):
            return func(scores, *others, **kwargs)
        keys = self._keys(scores)
        skipped, br, bc = self._decide(scores[..., :keys])
        with skipped_hidden(scores, skipped, br, bc, keys) as hidden:
            return func(hidden, *others, **kwargs)

    def _decide(self, scores: Tensor) -> tuple[Tensor, int, int]:
        layer = self.layer
        rows = scores.shape[2]
        br, bc = 1 if rows == 1 else layer.settings.br, layer.settings.bc
        threshold = layer.thresholds.phase(rows)
        lam = effective_threshold(threshold, _lengths(scores, threshold), layer.threshold_scale)
        tiles = decide_tiles(tile_maxima(scores, bc), lam, br, 1)
        layer.statistics.add(phase_of(rows), tiles.counts)
        self.applied = True
        return tiles.exists & ~tiles.kept, br, bc

    def _keys(self, scores: Tensor) -> int:
        """How many columns are keys; a column that nothing explains is an error."""
        keys = scores.shape[-1] - self.has_sink
        if keys in self._products:
            return keys
        raise ModelError(
            "the scores that reach softmax are not the product of queries and keys",
            where=f"{self.layer.name} ({self.layer.class_name})",
            found=f"{scores.shape[-1]} columns, {'one a sink, ' if self.has_sink else ''}products of {self._products}",
            fix='use path="op", or exclude the module with a pattern',
        )


def tile_maxima(scores: Tensor, bc: int) -> Tensor:
    """The maximum visible score of every row in every block of `bc` columns: `[B, H, Sq, ceil(Sk/bc)] float32`.

    `scores [B, H, Sq, Sk]`; scores below half their dtype's minimum are invisible and give -inf.
    """
    columns = scores.shape[-1]
    whole = columns // bc * bc
    parts = [scores[..., :whole].unflatten(-1, (-1, bc)).amax(-1)] if whole else []
    if whole < columns:
        parts.append(scores[..., whole:].amax(-1, keepdim=True))
    maxima = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return maxima.float().masked_fill(maxima < torch.finfo(scores.dtype).min / 2, -math.inf)


def _lengths(scores: Tensor, threshold: PhaseThreshold) -> Tensor:
    """L of each batch element, `[B]`: the last key that any row sees; read only where λ follows the length."""
    batch, columns = scores.shape[0], scores.shape[-1]
    if threshold.a == 0:
        return torch.full((batch,), columns, device=scores.device)
    seen = scores.amax(dim=(1, 2)) > torch.finfo(scores.dtype).min / 2
    return (seen * torch.arange(1, columns + 1, device=scores.device)).amax(-1)


@contextmanager
def skipped_hidden(scores: Tensor, skipped: Tensor, br: int, bc: int, keys: int) -> Iterator[Tensor]:
    """The scores `[B, H, Sq, Sk]` with -inf in the skipped tiles; the very same tensor where nothing is skipped.

    `skipped [B, H, R, C] bool` covers the first `keys` columns. A second matrix would cost as much as the softmax. So
    the skipped tiles, and only they, are overwritten in place and written back on leaving the block; autograd, and
    tiles of one row, get a copy.
    """
    if not bool(skipped.any()):
        yield scores
        return
    if br == 1 or not scores.is_contiguous() or (torch.is_grad_enabled() and scores.requires_grad):
        rows, columns = scores.shape[-2:]
        pairs = skipped.repeat_interleave(br, 2)[:, :, :rows].repeat_interleave(bc, 3)[..., :keys]
        yield scores.masked_fill(torch.nn.functional.pad(pairs, (0, columns - keys)), -math.inf)
        return
    regions = [
        scores[b, h, row * br : (row + 1) * br, first * bc : min(last * bc, keys)]
        for b, h, row, first, last in _runs(skipped)
    ]
    before = [region.clone() for region in regions]
    try:
        for region in regions:
            region.fill_(-math.inf)
        yield scores
    finally:
        for region, values in zip(regions, before, strict=True):
            region.copy_(values)


def _runs(skipped: Tensor) -> Iterable[tuple[int, int, int, int, int]]:
    """Neighbouring skipped tiles of a tile row as (batch, head, tile row, first, last + 1)."""
    b0 = h0 = r0 = first = last = -1
    for b, h, r, c in skipped.nonzero().tolist():
        if (b, h, r, c) == (b0, h0, r0, last):
            last = c + 1
            continue
        if last >= 0:
            yield b0, h0, r0, first, last
        b0, h0, r0, first, last = b, h, r, c, c + 1
    if last >= 0:
        yield b0, h0, r0, first, last
