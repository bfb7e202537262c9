"""Models an engine cannot be made of are refused at once; the others are prepared without a change of meaning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tensorrt_models import attention_model

from export import op
from export.engine.model import is_attention, read_model
from export.engine.prepare import LOWEST, prepare
from sparse_attention.errors import MissingError, ModelError, UsageError


def test_reads_nodes_inputs_and_outputs(tmp_path: Path) -> None:
    model = read_model(attention_model(tmp_path / "m.onnx", inputs=("q", "k", "v", "bias"), counts=True, layers=3))
    assert [node.name for node in model.nodes] == ["layer0", "layer1", "layer2"]
    assert list(model.nodes[0].inputs) == ["q", "k", "v", "bias"]
    assert model.nodes[0].inputs["k"].dims == ("batch", 2, "past + sequence", 64)
    assert model.nodes[0].has_counts
    assert [tensor.name for tensor in model.inputs] == ["q", "k", "v", "bias"]


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as error:
        read_model(tmp_path / "none.onnx")
    assert error.value.exit_code == 3


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a\x12\x80\x80\x80\x80\x01"])
def test_no_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError):
        read_model(path)


def test_a_cut_off_model(tmp_path: Path) -> None:
    path = attention_model(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelError, match="not a readable ONNX model"):
        read_model(path)


def test_without_our_op(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g", [value("x", 1, (2,))], [value("y", 1, (2,))]
    )
    onnx.save(helper.make_model(graph), tmp_path / "plain.onnx")
    with pytest.raises(UsageError, match="would skip nothing") as error:
        read_model(tmp_path / "plain.onnx")
    assert error.value.exit_code == 2
    assert "sparse-attention export" in str(error.value)


def test_unknown_version_of_the_op(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="another version of the op"):
        read_model(attention_model(tmp_path / "m.onnx", domain_version=2))


def test_unknown_version_of_the_plugin(tmp_path: Path) -> None:
    path = attention_model(tmp_path / "m.onnx")
    proto = onnx.load(path)
    for attribute in proto.graph.node[0].attribute:
        if attribute.name == "plugin_version":
            attribute.s = b"7"
    onnx.save(proto, path)
    with pytest.raises(UsageError, match="another version of the plugin"):
        read_model(path)


def test_float32_is_refused(tmp_path: Path) -> None:
    model = read_model(attention_model(tmp_path / "m.onnx", dtype=TensorProto.FLOAT))
    with pytest.raises(UsageError) as error:
        prepare(model)
    assert "found: FLOAT" in str(error.value)
    assert "--dtype float16" in str(error.value)


@pytest.mark.parametrize(("counts", "outputs"), [(False, "o"), (True, "o,counts")])
def test_nodes_are_bound_to_the_plugin_and_the_body_is_gone(tmp_path: Path, counts: bool, outputs: str) -> None:
    model = read_model(attention_model(tmp_path / "m.onnx", counts=counts))
    prepared = prepare(model)
    (node,) = [node for node in prepared.proto.graph.node if is_attention(node)]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert attributes["plugin_namespace"] == op.DOMAIN.encode()
    assert attributes["outputs"] == outputs.encode()
    assert {spec.name for spec in op.ATTRIBUTES} <= set(attributes)
    assert not prepared.proto.functions
    assert prepared.changes == ()
    assert model.proto.functions, "the model itself is left as it was"


def test_a_boolean_mask_hides_the_same_keys(tmp_path: Path) -> None:
    """The prepared graph with its body back computes bit for bit what the original does."""
    inputs = ("q", "k", "v", "bias")
    model = read_model(attention_model(tmp_path / "m.onnx", inputs=inputs, bool_bias=True, layers=2))
    prepared = prepare(model)
    assert len(prepared.changes) == 1, "both nodes share one twin of the mask"
    additive = onnx.load(attention_model(tmp_path / "additive.onnx", inputs=inputs))
    prepared.proto.functions.extend(additive.functions)
    rng = np.random.default_rng(0)
    feed = {
        "q": rng.standard_normal((1, 4, 200, 64)).astype(np.float16),
        "k": rng.standard_normal((1, 2, 300, 64)).astype(np.float16),
        "v": rng.standard_normal((1, 2, 300, 64)).astype(np.float16),
        "bias": rng.random((1, 1, 200, 300)) < 0.7,
    }
    feed["k"][:, :, 128:] *= np.float16(0.05)  # peaky: the tiles after the first can be skipped
    feed["q"] *= np.float16(4)
    import onnxruntime

    def run(proto: onnx.ModelProto) -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        found: list[np.ndarray] = session.run(None, feed)
        return found

    for original, changed in zip(run(model.proto), run(prepared.proto), strict=True):
        np.testing.assert_array_equal(original, changed)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_lowest_numbers_are_those_of_the_types() -> None:
    for elem_type, lowest in LOWEST.items():
        dtype = helper.tensor_dtype_to_np_dtype(elem_type)
        assert np.isfinite(np.float32(lowest).astype(dtype).astype(np.float32))
        assert not np.isfinite(np.float32(lowest * 1.01).astype(dtype).astype(np.float32))
