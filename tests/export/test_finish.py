"""Finishing a graph: one body for layers that differ, inputs without effect, extras, names, nothing of the machine."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from export import op
from export.finish import METADATA, finish, module_scope, node_inputs, op_nodes
from sparse_attention import reference
from sparse_attention.errors import ModelError
from tests.attention_calls import Call, int32, peaky_call
from tests.onnx_graphs import RUNTIMES, feeds, finished, graph_of, run

ROWS, COLUMNS = 29, 45
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # onnx's evaluator: log 0


def layer(seed: int, **more: Any) -> Call:
    options = {"batch": 2, "br": 8, "bc": 8, "threshold": 0.3, "sharpness": 0.6, "is_causal": True} | more
    return peaky_call(ROWS, COLUMNS, seed=seed, **options)


def additive() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.rand(2, 1, 1, COLUMNS, generator=generator) < 0.2
    return torch.randn(2, 1, ROWS, COLUMNS, generator=generator).masked_fill(hidden, -math.inf)


def mask() -> torch.Tensor:
    return torch.rand(1, 4, ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)) < 0.8


MIXED: dict[str, list[dict[str, Any]]] = {
    "window_and_none": [{"window": 11}, {}],
    "causal_and_not": [{}, {"is_causal": False}, {"is_causal": False, "window": 9}],
    "softcap_and_none": [{"softcap": 3.0}, {}, {"softcap": 9.0}],
    "sinks_and_none": [{}, {"sinks": torch.tensor([-1.0, 0.0, 2.0, 4.0])}],
    "mask_and_none": [{"bias": mask()}, {}],
    "additive_and_none": [{"bias": additive()}, {}],
    "mask_and_additive": [{"bias": mask()}, {"bias": additive()}, {}],
    "lengths_and_none": [{"kv_lengths": int32(40, 17), "q_lengths": int32(29, 10), "q_start": int32(11, 7)}, {}],
    "scale_and_none": [{"threshold_scale": torch.tensor([0.2])}, {}],
    "tiles_and_thresholds": [{"br": 4, "bc": 16, "threshold": 0.05}, {"br": 16, "bc": 4, "threshold": 0.6},
                             {"threshold": 0.0}],
    "scales": [{"scale": 0.5}, {"scale": 0.1}],
    "sizes": [{"size": 8}, {"size": 16, "v_size": 3}],
}  # fmt: skip


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", MIXED)
def test_layers_that_differ_share_one_body(case: str, dtype: torch.dtype, runtime: str) -> None:
    calls = [layer(seed, **more).to(dtype) for seed, more in enumerate(MIXED[case])]
    model = finished(calls, counts=True)
    onnx.checker.check_model(model, full_check=True)
    assert len(model.functions) == 1
    found = run(model, feeds(calls), runtime)
    relative = 1e-5 if dtype == torch.float32 else 2e-3
    for number, call in enumerate(calls):
        expected, tiles = reference.attention(*call.qkv, **call.keywords())
        assert torch.equal(found["tile_counts"][number], tiles.counts)
        tolerance = relative * float(call.tensors["v"].float().abs().max())
        assert (found[f"{number}.o"].float() - expected).abs().max() <= tolerance
    assert found["tile_counts"][..., 0].sum() > 0


def test_every_node_names_all_its_inputs() -> None:
    """In the contract's order, none left out, the same for all; optional outputs are there or not for all."""
    calls = [layer(0, sinks=torch.zeros(4)), layer(1, kv_lengths=int32(5, 6))]
    for counts in (False, True):
        nodes = op_nodes(finish(graph_of(calls), counts=counts))
        for node in nodes:
            assert list(node_inputs(node)) == ["q", "k", "v", "kv_lengths", "sinks"]
            assert node.attributes["inputs"].as_string() == "q,k,v,kv_lengths,sinks"
            assert all(value is not None for value in node.inputs)
            assert len(node.outputs) == 1 + counts
            assert node.attributes[op.OUTPUTS_ATTRIBUTE].as_string() == ("o,counts" if counts else "o")
            written = set(node.attributes) - set(op.PLUGIN_ATTRIBUTES) - {op.OUTPUTS_ATTRIBUTE}
            assert written == {spec.name for spec in op.ATTRIBUTES}
            for name, value in op.PLUGIN_ATTRIBUTES.items():
                assert node.attributes[name].as_string() == value


def test_nodes_keep_their_own_numbers() -> None:
    calls = [layer(0, br=4, threshold=0.25), layer(1, bc=16, threshold=0.5, window=7, scale=0.3)]
    nodes = op_nodes(finish(graph_of(calls)))
    for node, call in zip(nodes, calls, strict=True):
        for name, value in call.attributes().items():
            written = node.attributes[name].value
            assert written == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_tunable(runtime: str) -> None:
    """One required graph input scales every λ: 0 is dense, 1 the configuration, more skips more."""
    calls = [layer(0), layer(1, threshold=0.1)]
    model = finished(calls, tunable=True, counts=True)
    given = next(one for one in model.graph.input if one.name == "threshold_scale")
    assert given.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert [one.dim_value for one in given.type.tensor_type.shape.dim] == [1]
    assert "threshold_scale" not in {one.name for one in model.graph.initializer}
    before = -1
    for scale in (0.0, 0.1, 1.0, 2.0):
        found = run(model, feeds(calls) | {"threshold_scale": np.array([scale], np.float32)}, runtime)
        for number, call in enumerate(calls):
            expected, tiles = reference.attention(
                *call.qkv, **call.keywords() | {"threshold_scale": torch.tensor([scale])}
            )
            assert torch.equal(found["tile_counts"][number], tiles.counts)
            assert (found[f"{number}.o"] - expected).abs().max() < 1e-4
        skipped = int(found["tile_counts"][..., 0].sum())
        assert skipped > before and (skipped == 0) == (scale == 0)
        before = skipped


def test_counts_of_layers_with_different_heads() -> None:
    calls = [layer(0), layer(1, heads=6, kv_heads=3)]
    model = finished(calls, counts=True)
    names = [one.name for one in model.graph.output]
    assert names[:2] == ["0.o", "1.o"] and len(names) == 4 and "tile_counts" not in names
    found = run(model, feeds(calls), "onnxruntime")
    for name, call in zip(names[2:], calls, strict=True):
        assert torch.equal(found[name], reference.attention(*call.qkv, **call.keywords())[1].counts)


def test_without_extras_there_are_none() -> None:
    model = finished([layer(0), layer(1)])
    assert [one.name for one in model.graph.output] == ["0.o", "1.o"]
    assert "threshold_scale" not in {one.name for one in model.graph.input}


def test_attention_feeding_attention() -> None:
    """The output of one node is an input of the next, and both are outputs of the graph."""
    first, second = layer(0), layer(1)
    model = graph_of([first, second])
    nodes = op_nodes(model)
    nodes[1].replace_input_with(0, nodes[0].outputs[0])
    model.graph.inputs.remove(next(value for value in model.graph.inputs if value.name == "1.q"))
    feed = feeds([first, second])
    del feed["1.q"]
    found = run(ir.to_proto(finish(model, counts=True)), feed, "onnxruntime")
    middle, _ = reference.attention(*first.qkv, **first.keywords())
    expected, _ = reference.attention(middle, *second.qkv[1:], **second.keywords())
    assert (found["0.o"] - middle).abs().max() < 1e-5 and (found["1.o"] - expected).abs().max() < 1e-4


def test_names_are_those_of_the_modules() -> None:
    model = finish(graph_of([layer(0), layer(1)], scopes=["model.layers.0.self_attn", "model.layers.1.self_attn"]))
    assert [node.name for node in op_nodes(model)] == [
        f"model.layers.{i}.self_attn.{op.OP_TYPE}" for i in range(2)
    ]  # fmt: skip
    assert [module_scope(node) for node in op_nodes(model)] == [f"model.layers.{i}.self_attn" for i in range(2)]
    plain = finish(graph_of([layer(0)]))
    assert op_nodes(plain)[0].name == f"attention_0.{op.OP_TYPE}"


def test_metadata_is_ours_and_nothing_else() -> None:
    graph = graph_of([layer(0)], scopes=["attn"])
    graph.metadata_props["author"] = "/home/someone"
    graph.doc_string = "made in /home/someone"
    model = finish(graph, metadata={"config": {"a": [1, "λ"]}, "unit": "head"})
    written = ir.to_proto(model)
    assert {one.key for one in written.metadata_props} == {f"{METADATA}.config", f"{METADATA}.unit"}
    assert json.loads(model.metadata_props[f"{METADATA}.config"]) == {"a": [1, "λ"]}
    assert b"/home/someone" not in written.SerializeToString()


def test_finishing_twice_is_finishing_once() -> None:
    """A finished graph is a graph with op nodes: its body may be made again, as the widened twin does."""
    calls = [layer(0, window=11), layer(1, sinks=torch.zeros(4))]
    once = finish(graph_of(calls), counts=False)
    expected = run(ir.to_proto(once), feeds(calls), "onnxruntime")
    found = run(ir.to_proto(finish(once)), feeds(calls), "onnxruntime")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_refused() -> None:
    empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}), ir_version=10)
    with pytest.raises(ModelError, match="no block-skip attention"):
        finish(empty)
    with pytest.raises(ModelError, match=r"unit"):
        finish(graph_of([layer(0), layer(1, unit="group")]))
    with pytest.raises(ModelError, match=r"dtype"):
        finish(graph_of([layer(0), layer(1).to(torch.float16)]))
