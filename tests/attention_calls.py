"""Attention calls for tests: peaky, so that tiles are skipped; drawn by hypothesis or written out as a list."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparse_attention import Thresholds
from sparse_attention.attention import OP

SHAPES = [(1, 1), (1, 129), (113, 203), (511, 511), (128, 512)]
"""Query rows and key columns: single, decode, ragged, one short of a tile, long."""


@dataclass(frozen=True)
class Call:
    """One call of the op: its tensors by the contract's names, its numbers, its thresholds by phase."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    thresholds: dict[str, dict[str, float]] = field(default_factory=dict)

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of `block_skip_attention` and of `reference.attention`."""
        optional = {name: value for name, value in self.tensors.items() if name not in ("q", "k", "v")}
        return {"threshold": Thresholds.of(self.thresholds), **self.options, **optional}

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        return self.tensors["q"], self.tensors["k"], self.tensors["v"]

    def attributes(self) -> dict[str, Any]:
        """All attributes of the PyTorch op, with its defaults written out."""
        defaults = {"br": 128, "bc": 128, "is_causal": False, "scale": self.tensors["q"].shape[-1] ** -0.5,
                    "softcap": 0.0, "window": 0, "unit": "head"}  # fmt: skip
        return defaults | self.options | Thresholds.of(self.thresholds).attributes()

    def run(self) -> tuple[Tensor, Tensor]:
        """Output and counts of the PyTorch op."""
        names = ("q", "k", "v", "bias", "kv_lengths", "q_start", "q_lengths", "sinks", "threshold_scale")
        return OP(*(self.tensors.get(name) for name in names), **self.attributes())

    def to(self, dtype: torch.dtype) -> Call:
        """The same call with q, k, v, an additive bias and sinks in another dtype."""
        cast = {name: value.to(dtype) if name in ("q", "k", "v", "sinks", "bias") and value.is_floating_point() else
                value for name, value in self.tensors.items()}  # fmt: skip
        return replace(self, tensors=cast)

    def with_threshold(self, prefill: float, decode: float | None = None) -> Call:
        """The same call with static thresholds; one λ for both phases unless two are given."""
        both = {"prefill": {"threshold": prefill}, "decode": {"threshold": prefill if decode is None else decode}}
        return replace(self, thresholds=both)

    def plain(self) -> dict[str, Any]:
        """For `tests.numpy_definition.of_call`."""
        tensors = {name: value.float() if value.dtype == torch.bfloat16 else value
                   for name, value in self.tensors.items()}  # fmt: skip
        options = {"br": 128, "bc": 128} | self.options
        thresholds = {"prefill": {}, "decode": {}} | self.thresholds
        return {"tensors": tensors, "options": options, "thresholds": thresholds}


def peaky_qkv(
    batch: int, heads: int, kv_heads: int, rows: int, columns: int, size: int, v_size: int, *, bc: int, seed: int,
    sharpness: float = 3.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v in which whole key tiles fall far below the others: about half of the tiles can be skipped.

    Every key tile has a strength of its own; queries point into the direction that strong keys share.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    direction = torch.nn.functional.normalize(normal(size), dim=0) * size**0.5
    tiles = -(-columns // bc)
    strength = torch.randint(0, 3, (batch, kv_heads, tiles, 1), generator=generator).float()
    strength[..., 0, :] = 2.0  # the sink: the first tile is strong
    strength = strength.repeat_interleave(bc, 2)[:, :, :columns]
    q = sharpness * (direction + 0.2 * normal(batch, heads, rows, size))
    k = strength * direction + 0.2 * normal(batch, kv_heads, columns, size)
    return q, k, normal(batch, kv_heads, columns, v_size)


def peaky_call(
    rows: int, columns: int, *, batch: int = 1, heads: int = 4, kv_heads: int = 2, size: int = 16, v_size: int = 16,
    br: int = 32, bc: int = 32, threshold: float = 0.1, seed: int = 0, sharpness: float = 1.0, **more: Any,
) -> Call:  # fmt: skip
    """A peaky call; `more` are tensors and options by name."""
    q, k, v = peaky_qkv(batch, heads, kv_heads, rows, columns, size, v_size, bc=bc, seed=seed, sharpness=sharpness)
    tensors = {name: value for name, value in more.items() if isinstance(value, Tensor)}
    options = {name: value for name, value in more.items() if not isinstance(value, Tensor)}
    call = Call({"q": q, "k": k, "v": v} | tensors, {"br": br, "bc": bc} | options)
    return call.with_threshold(threshold)


def int32(*values: int) -> Tensor:
    """Lengths or starts, one a batch element."""
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def calls(draw: st.DrawFn, *, max_rows: int = 14, max_columns: int = 24) -> Call:
    """Any small call that the rule allows: every feature by itself and with the others."""
    integer = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    batch, kv_heads, group = integer(1, 2), integer(1, 2), integer(1, 2)
    rows = draw(st.one_of(st.just(1), st.integers(1, max_rows)))
    columns, size, v_size = integer(1, max_columns), integer(1, 6), integer(1, 6)
    br, bc, heads = integer(1, 6), integer(1, 6), kv_heads * group
    seed = integer(0, 10_000)
    q, k, v = peaky_qkv(batch, heads, kv_heads, rows, columns, size, v_size, bc=bc, seed=seed)
    tensors: dict[str, Tensor] = {"q": q, "k": k, "v": v}
    generator = torch.Generator().manual_seed(seed + 1)

    def lengths(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (batch,), generator=generator).to(torch.int32)

    if draw(st.booleans()):
        tensors["kv_lengths"] = lengths(0, columns)
    if draw(st.booleans()):
        tensors["q_start"] = lengths(-3, columns)
    if draw(st.booleans()):
        tensors["q_lengths"] = lengths(0, rows)
    if draw(st.booleans()):
        tensors["sinks"] = torch.randn(heads, generator=generator)
    kind = draw(st.sampled_from(["none", "mask", "additive"]))
    if kind != "none":
        shape = [n if draw(st.booleans()) else 1 for n in (batch, heads, rows, columns)]
        open_ = torch.rand(shape, generator=generator) < 0.7
        added = torch.randn(shape, generator=generator)
        hidden = draw(st.sampled_from([float("-inf"), torch.finfo(torch.float32).min]))
        tensors["bias"] = open_ if kind == "mask" else torch.where(open_, added, hidden)
    if draw(st.booleans()):
        value = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0, float("nan"), float("inf")]))
        tensors["threshold_scale"] = torch.tensor([value])
    options = {
        "br": br, "bc": bc, "is_causal": draw(st.booleans()), "window": draw(st.sampled_from([0, 0, 1, 3, 7])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.0, 20.0])), "unit": draw(st.sampled_from(["head", "group"])),
        "scale": draw(st.sampled_from([None, 0.1, 1.0])),
    }  # fmt: skip
    phase = st.one_of(
        st.sampled_from([0.0, 1e-6, 0.01, 0.3, 0.9, 0.999]).map(lambda x: {"threshold": x}),
        st.sampled_from([0.1, 3.0, 40.0]).map(lambda a: {"a": a, "b": 2.0, "target": 0.5}),
    )
    thresholds = {"prefill": draw(phase), "decode": draw(phase)}
    return Call(tensors, {name: value for name, value in options.items() if value is not None}, thresholds)
