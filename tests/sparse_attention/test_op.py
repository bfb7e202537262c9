"""The op as PyTorch sees it: registration, fake kernel, tracing, and the checks of the function people call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_attention import TileCounts, block_skip_attention, reference
from sparse_attention.attention import OP
from sparse_attention.errors import SparseAttentionError
from tests.attention_calls import Call, int32, peaky_call

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal_window": {"is_causal": True, "window": 19, "softcap": 5.0},
    "mask": {"bias": torch.ones(1, 1, 1, 96, dtype=torch.bool)},
    "lengths": {"kv_lengths": int32(90, 40), "q_start": int32(7, 0), "q_lengths": int32(33, 20)},
    "sinks_and_scale": {"sinks": torch.zeros(4), "threshold_scale": torch.ones(1), "unit": "group", "v_size": 7},
}


def call_of(name: str, rows: int = 33) -> Call:
    return peaky_call(rows, 96, batch=2, br=8, bc=16, **CALLS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    call = call_of(name).to(dtype)
    names = ("q", "k", "v", "bias", "kv_lengths", "q_start", "q_lengths", "sinks", "threshold_scale")
    torch.library.opcheck(OP, tuple(call.tensors.get(n) for n in names), call.attributes())


class Module(torch.nn.Module):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return block_skip_attention(q, k, v, **self.options, **tensors) * 2.0


@pytest.mark.parametrize("name", CALLS)
def test_export_with_dynamic_lengths(name: str) -> None:
    """One traced graph, run with other lengths; it holds the op once and as a whole."""
    call = call_of(name)
    options = {"threshold": 0.2, **call.options}
    module, tensors = Module(options), call.tensors
    rest = {key: value for key, value in tensors.items() if key not in ("q", "k", "v")}
    rows, columns = torch.export.Dim("rows", min=2, max=512), torch.export.Dim("columns", min=2, max=512)
    dynamic = {"q": {2: rows}, "k": {2: columns}, "v": {2: columns}}
    dynamic["tensors"] = {key: {3: columns} if key == "bias" else None for key in rest}
    program = torch.export.export(module, (*call.qkv, rest), dynamic_shapes=dynamic)
    nodes = [node for node in program.graph.nodes if node.target is OP]
    assert len(nodes) == 1
    other = peaky_call(20, 61, batch=2, seed=5, br=8, bc=16, **CALLS[name])
    if "bias" in other.tensors:
        other.tensors["bias"] = torch.ones(1, 1, 1, 61, dtype=torch.bool)
    rest = {key: value for key, value in other.tensors.items() if key not in ("q", "k", "v")}
    assert torch.equal(program.module()(*other.qkv, rest), module(*other.qkv, rest))


@pytest.mark.parametrize("name", ["plain", "lengths"])
def test_compile_without_graph_breaks(name: str) -> None:
    call = call_of(name)
    rest = {key: value for key, value in call.tensors.items() if key not in ("q", "k", "v")}
    module = Module({"threshold": 0.2, **call.options})
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*call.qkv, rest), module(*call.qkv, rest))
    torch._dynamo.reset()


def test_fake_kernel_gives_the_shapes_of_the_real_one() -> None:
    call = call_of("sinks_and_scale").to(torch.bfloat16)
    real = call.run()
    fake = Call({name: value.to("meta") for name, value in call.tensors.items()}, call.options, call.thresholds).run()
    for one, other in zip(real, fake, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype


def test_statistics_are_those_of_the_definition() -> None:
    call = call_of("causal_window")
    out, stats = block_skip_attention(*call.qkv, **call.keywords(), return_stats=True)
    _, tiles = reference.attention(*call.qkv, **call.keywords())
    assert stats == TileCounts.of(tiles.counts) and sum(stats.skipped) > 0
    assert 0 < stats.sparsity < 1
    assert torch.equal(out, block_skip_attention(*call.qkv, **call.keywords()))


def test_defaults() -> None:
    """128 x 128 tiles, 1 / sqrt(D), not causal, both phases with the one threshold."""
    q, k, v = peaky_call(256, 384, bc=128).qkv
    found = block_skip_attention(q, k, v, threshold=0.1, return_stats=True)
    written = block_skip_attention(
        q, k, v, threshold={"prefill": 0.1, "decode": 0.1}, br=128, bc=128, is_causal=False, scale=16**-0.5,
        return_stats=True,
    )  # fmt: skip
    assert torch.equal(found[0], written[0]) and found[1] == written[1] and sum(found[1].skipped) > 0


@pytest.mark.parametrize("dims", [(96,), (33, 96), (4, 1, 96), (2, 1, 33, 96)])
def test_bias_broadcasts_from_the_right(dims: tuple[int, ...]) -> None:
    call = call_of("plain")
    bias = torch.randn(dims, generator=torch.Generator().manual_seed(0))
    found = block_skip_attention(*call.qkv, threshold=0.1, br=8, bc=16, bias=bias)
    full = block_skip_attention(*call.qkv, threshold=0.1, br=8, bc=16, bias=bias.expand(2, 4, 33, 96).contiguous())
    assert torch.equal(found, full)


def test_lengths_of_any_integer_type() -> None:
    call = call_of("lengths")
    expected = block_skip_attention(*call.qkv, **call.keywords())
    wide = {name: value.long() if name.endswith(("lengths", "start")) else value for name, value in
            call.keywords().items()}  # fmt: skip
    assert torch.equal(block_skip_attention(*call.qkv, **wide), expected)


Q, K = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 5, 8)


@pytest.mark.parametrize(
    ("qkv", "options", "message"),
    [
        ((Q[0], K, K), {}, r"four dimensions[\s\S]*\[B, H, S, D\]"),
        ((Q, K[..., :4], K), {}, "do not fit together"),
        ((Q, K, K[:, :1]), {}, "do not fit together"),
        ((Q[:, :3], K, K), {}, "multiple of the key heads"),
        ((Q, K.half(), K), {}, "float16"),
        ((Q.double(), K.double(), K.double()), {}, "float64"),
        ((Q, K, K), {"br": 0}, "br=0"),
        ((Q, K, K), {"bc": -1}, "bc=-1"),
        ((Q, K, K), {"scale": 0.0}, "scale must be positive"),
        ((Q, K, K), {"softcap": -1.0}, "softcap"),
        ((Q, K, K), {"window": -1}, "window"),
        ((Q, K, K), {"unit": "row"}, "'row'"),
        ((Q, K, K), {"sinks": torch.zeros(2)}, r"sinks[\s\S]*\[4\]"),
        ((Q, K, K), {"bias": torch.zeros(1, 1, 1, 1, 1)}, "too many dimensions"),
        ((Q, K, K), {"threshold": "0.1"}, "must be a number"),
        ((Q, K, K), {"threshold": {"train": 0.1}}, r"unknown key[\s\S]*prefill, decode"),
    ],
)
def test_refused_by_name(qkv: tuple[Tensor, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparseAttentionError, match=message) as raised:
        block_skip_attention(*qkv, **({"threshold": 0.1} | options))
    assert "fix:" in str(raised.value)
