"""Exported files of tiny models: valid, portable, without mask or expanded heads, with every layer's own settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

import export
from export import ExportOptions, export_onnx, op
from export.finish import METADATA, node_inputs, op_nodes
from sparse_attention import layers_of, observed, summary
from sparse_attention.errors import ConfigError, UsageError
from tests.conftest import Exported, tokens
from tests.sparse_attention.attention_models import settings, tiny

Export = Callable[..., Exported]

PER_LAYER = {
    "sparse_cfg": {
        "*att*": {"threshold": {"prefill": 0.5, "decode": 0.2}, "br": 4, "bc": 8},
        "*layers.1*": {"br": 2, "bc": 4, "threshold": 0.7},
    }
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_opset_18": {"config": PER_LAYER, "opset": 18, "tunable": True, "counts": True},
    "gemma2": {"family": "gemma2"},  # soft-cap, a window in one layer
    "bert": {"family": "bert"},
    "llama_any_padding": {"padding": "any", "unit": "group"},
    "llama_half": {"dtype": "float16"},
    "llama_bfloat16": {"dtype": "bfloat16"},
}
MASK_NODES = {"Softmax", "Trilu", "Where", "And", "Or", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Attention"}


@pytest.mark.parametrize("case", CASES)
def test_file_is_valid_and_portable(case: str, exported: Export) -> None:
    file = exported(**CASES[case])
    onnx.checker.check_model(file.path, full_check=True)
    model = onnx.load(file.path, load_external_data=False)
    opset = file.options.get("opset", 23)
    assert {one.domain: one.version for one in model.opset_import} == {"": opset, op.DOMAIN: op.VERSION}
    assert {node.domain for node in model.graph.node} == {"", op.DOMAIN}
    assert [(one.domain, one.name) for one in model.functions] == [(op.DOMAIN, op.OP_TYPE)]
    assert {one.domain: one.version for one in model.functions[0].opset_import} == {"": opset}
    nodes = [node for node in model.graph.node if node.op_type == op.OP_TYPE]
    assert [node.name for node in nodes] == [f"{layer.name}.{op.OP_TYPE}" for layer in layers_of(file.sparse())]
    element = {"float32": 1, "float16": 10, "bfloat16": 16}[str(file.dtype).removeprefix("torch.")]
    floats = {one.data_type for one in model.graph.initializer} - {onnx.TensorProto.INT64, onnx.TensorProto.BOOL}
    assert element in floats


@pytest.mark.parametrize("case", CASES)
def test_file_tells_nothing_of_the_machine(case: str, exported: Export) -> None:
    """No path, no stack trace: neither ours, nor the interpreter's, nor the temporary directory's."""
    file = exported(**CASES[case])
    root = Path(export.__file__).parents[1]
    for part in (file.path, file.path.with_name("model.onnx.data")):
        contents = part.read_bytes()
        for told in (str(root), sys.prefix, str(file.path.parent), str(Path.home()) + "/", "site-packages", '.py"'):
            assert told.encode() not in contents, told
    keys = {prop.key for node in onnx.load(file.path, load_external_data=False).graph.node
            for prop in node.metadata_props}  # fmt: skip
    assert keys <= {"pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy"}


@pytest.mark.parametrize("case", CASES)
def test_metadata(case: str, exported: Export) -> None:
    file = exported(**CASES[case])
    properties = ir.load(file.path).metadata_props
    told = {key.removeprefix(f"{METADATA}."): json.loads(value) for key, value in properties.items()}
    assert told.keys() == {"config", "layers", "unit", "signature", "versions"}
    assert told["unit"] == file.options.get("unit", "head")
    assert told["config"]["sparse_cfg"].keys() >= file.config["sparse_cfg"].keys()
    assert list(told["layers"]) == [layer.name for layer in layers_of(file.sparse())]
    assert {"torch", "onnx", "transformers"} <= told["versions"].keys()
    assert told["signature"] == ExportOptions(**file.options).described


@pytest.mark.parametrize("case", ["llama", "llama_opset_18", "llama_half", "gemma2"])
def test_decoders_have_no_mask_and_do_not_expand_keys(case: str, exported: Export) -> None:
    file = exported(**CASES[case])
    graph = onnx.shape_inference.infer_shapes(onnx.load(file.path, load_external_data=False)).graph
    types = {node.op_type for node in graph.node}
    assert not types & MASK_NODES
    assert [one.name for one in graph.input if one.name != "threshold_scale"] == ["input_ids"]
    for node in op_nodes(ir.load(file.path)):
        given = node_inputs(node)
        assert list(given) == ["q", "k", "v"] + ["threshold_scale"] * bool(file.options.get("tunable"))
        heads = {name: given[name].shape[1] for name in ("q", "k", "v")}
        assert heads == {"q": 4, "k": 2, "v": 2}
        assert node.attributes["is_causal"].as_int() == 1
        assert all(given[name].producer().op_type != "Expand" for name in ("k", "v"))


def test_layers_keep_their_own_settings(exported: Export) -> None:
    file = exported(**CASES["llama_opset_18"])
    first, second = op_nodes(ir.load(file.path))
    names = ("br", "bc", "prefill_threshold", "decode_threshold")
    assert [first.attributes[name].value for name in names] == pytest.approx([4, 8, 0.5, 0.2])
    assert [second.attributes[name].value for name in names] == pytest.approx([2, 4, 0.7, 0.7])


def test_layers_with_and_without_a_window(exported: Export) -> None:
    nodes = op_nodes(ir.load(exported(**CASES["gemma2"]).path))
    assert [node.attributes["window"].as_int() for node in nodes] == [24, 0]
    assert [node.attributes["softcap"].as_float() for node in nodes] == [20.0, 20.0]


@pytest.mark.parametrize("case", [name for name in CASES if "float16" not in name and "half" not in name])
@pytest.mark.parametrize("shape", [(1, 1), (3, 61), (2, 24), (1, 130)], ids=str)
def test_any_batch_and_length(case: str, shape: tuple[int, int], exported: Export) -> None:
    """Against the sparse model in PyTorch, with tiles skipped; a sequence of 1 is the decode phase."""
    file = exported(**CASES[case])
    model = file.sparse()
    signature = file.signature(model)
    inputs = signature.sample(tokens(*shape))
    with torch.no_grad():
        expected = signature.run(inputs)
    found = file.run(inputs)
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert (found[name] - value).abs().max() < 2e-5, name
    if shape[1] > 1:
        assert sum(layer.sparsity for layer in summary(model)) > 0.1
    if "tile_counts" in found:
        counts = [phase.skipped for layer in summary(model) for phase in layer.counts.values()]
        assert found["tile_counts"][..., 0].tolist() == [list(skipped) for skipped in counts]


@pytest.mark.parametrize("case", ["llama_opset_18"])
def test_tuned_to_zero_is_the_dense_model(case: str, exported: Export) -> None:
    file = exported(**CASES[case])
    ids = tokens(2, 70)
    with torch.no_grad():
        expected = tiny("llama", implementation="sdpa")(ids).logits
    sparse, dense = file.run({"input_ids": ids}), file.run({"input_ids": ids, "threshold_scale": torch.zeros(1)})
    assert (dense["logits"] - expected).abs().max() < 2e-5
    assert (sparse["logits"] - expected).abs().max() > 1e-3
    assert not dense["tile_counts"][..., 0].any() and bool(sparse["tile_counts"][..., 0].any())


@pytest.mark.parametrize("case", ["llama_any_padding", "bert"])
def test_padded_batches(case: str, exported: Export) -> None:
    """Right, left and in the middle: as the sparse model in PyTorch with the same attention mask, where it is valid."""
    file = exported(**CASES[case])
    model = file.sparse()
    ids, mask = tokens(4, 48), torch.ones(4, 48, dtype=torch.int64)
    mask[1, 31:], mask[2, :13], mask[3, 20:25] = 0, 0, 0
    inputs = file.signature(model).sample(ids) | {"attention_mask": mask}
    with torch.no_grad():
        named = dict(inputs)
        if case != "bert":
            named["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = model(**named)[0]
    found = next(iter(file.run(inputs).values()))
    valid = mask.bool()
    assert (found - expected)[valid].abs().max() < 2e-5
    assert sum(sum(layer.counts["prefill"].skipped) for layer in summary(model)) > 100


def test_right_padding_is_exact(exported: Export) -> None:
    """`--padding right`: every row of the batch gives what it gives alone, in every tile."""
    file = exported(padding="right")
    given = node_inputs(op_nodes(ir.load(file.path))[0])
    assert list(given) == ["q", "k", "v", "kv_lengths", "q_lengths"]
    ids, lengths = tokens(3, 57), (57, 30, 9)
    mask = (torch.arange(57) < torch.tensor(lengths).unsqueeze(1)).long()
    together = file.run({"input_ids": ids, "attention_mask": mask})["logits"]
    for row, length in enumerate(lengths):
        one = {"input_ids": ids[row : row + 1, :length], "attention_mask": torch.ones(1, length, dtype=torch.int64)}
        assert (together[row, :length] - file.run(one)["logits"][0]).abs().max() < 2e-6
        with torch.no_grad():
            alone = file.sparse()(one["input_ids"]).logits
        assert (together[row, :length] - alone[0]).abs().max() < 2e-5


def test_weights_lie_beside_the_file(exported: Export) -> None:
    path = exported().path
    assert path.stat().st_size < 100_000 < path.with_name("model.onnx.data").stat().st_size + 100_000
    external = [one for one in onnx.load(path, load_external_data=False).graph.initializer if one.external_data]
    assert external
    assert {entry.value for one in external for entry in one.external_data if entry.key == "location"} == {
        "model.onnx.data"
    }
    moved = path.parent / "moved"
    moved.mkdir(exist_ok=True)
    for name in ("model.onnx", "model.onnx.data"):
        (moved / name).write_bytes(path.with_name(name).read_bytes())
    file = Exported(moved / "model.onnx", "llama", torch.float32, settings())
    assert torch.isfinite(file.run({"input_ids": tokens(1, 5)})["logits"]).all()


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    """Also where the export fails half-way; and nothing is written then."""
    from transformers import AttentionInterface

    from sparse_attention.huggingface import REGISTERED_NAME

    model = tiny("llama")
    with torch.no_grad():
        before = model(tokens(1, 20)).logits
    with pytest.raises(UsageError, match="padding 'right'"):
        export_onnx(tiny("bert"), settings(), tmp_path / "x.onnx", options=ExportOptions(padding="right"))
    with pytest.raises(ConfigError, match="no_such_layer"):
        export_onnx(model, {"sparse_cfg": {"*no_such_layer*": {"threshold": 0.1}}}, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
    assert layers_of(model) == [] and model.config._attn_implementation == "eager"
    assert REGISTERED_NAME not in AttentionInterface._global_mapping
    with torch.no_grad():
        assert torch.equal(model(tokens(1, 20)).logits, before)


def test_exporting_a_sparse_model_leaves_it_sparse(exported: Export, tmp_path: Path) -> None:
    """A model that is sparsified already is exported with the settings it has; what it counted stays."""
    file = exported()
    model = file.sparse()
    seen: list[str] = []
    with observed(model, lambda layer, call, out, counts: seen.append(layer.name)), torch.no_grad():
        model(tokens(1, 40))
    counted = [layer.counts for layer in summary(model)]
    result = export_onnx(model, file.config, tmp_path / "again.onnx")
    assert result.nodes == 2 and set(result.seconds) == {"trace", "finish", "save"}
    assert len(layers_of(model)) == 2 and [layer.counts for layer in summary(model)] == counted
    ids = tokens(2, 33)
    again = Exported(tmp_path / "again.onnx", "llama", torch.float32, file.config)
    assert torch.equal(again.run({"input_ids": ids})["logits"], file.run({"input_ids": ids})["logits"])
