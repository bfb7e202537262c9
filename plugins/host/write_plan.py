"""Writes what the host walks: every block-skip node of an exported model, its attributes, its tensors per profile.

    python plugins/host/write_plan.py out.onnx FOLDER --profile prefill:batch=1,sequence=1/128/512 --data

A dimension is given as MIN/OPT/MAX or as one number. The shapes of the inner tensors are those that ONNX Runtime
computes when it runs the model's function bodies at each of the three, so no rule about them is written down twice.
With --data the inputs of every node at the best shapes lie beside the plan as raw bytes, for a run on a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from export import op
from export.engine.inputs import example_inputs
from export.engine.model import ExportedModel, is_attention, read_model
from export.engine.prepare import LOWEST, OUTPUTS_ATTRIBUTE, prepare
from export.engine.shapes import Range, evaluate

TYPES: Mapping[str, str] = {
    "float32": "float", "float16": "half", "bfloat16": "bf16", "int32": "int32", "int64": "int64", "bool": "bool",
}  # fmt: skip
"""The plan's name of a NumPy type."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Walked:
    """A profile's tensors: name of the value to its array at the smallest, best and largest shapes."""

    name: str
    values: tuple[Arrays, Arrays, Arrays]


def parse_profile(text: str) -> tuple[str, dict[str, Range]]:
    """`prefill:batch=1,sequence=1/128/512` as name and ranges."""
    name, _, dimensions = text.partition(":")
    ranges = {}
    for part in dimensions.split(","):
        dimension, _, sizes = part.partition("=")
        numbers = [int(size) for size in sizes.split("/")]
        ranges[dimension] = Range(*(numbers if len(numbers) == 3 else numbers * 3))
    return name, ranges


def walked_model(model: ExportedModel) -> onnx.ModelProto:
    """The model as ONNX Runtime runs it, with everything the nodes read and write as graph outputs."""
    proto = onnx.load_model(model.path)
    wanted = [name for node in proto.graph.node if is_attention(node) for name in [*node.input, *node.output]]
    have = {value.name for value in proto.graph.output}
    constants = {tensor.name for tensor in proto.graph.initializer}
    known = {value.name: value for value in [*proto.graph.value_info, *proto.graph.input]}
    for name in dict.fromkeys(wanted):
        if name not in have | constants:
            elem_type = known[name].type.tensor_type.elem_type if name in known else 0
            proto.graph.output.append(
                helper.make_tensor_value_info(name, elem_type, None) if elem_type else onnx.ValueInfoProto(name=name)
            )
    return proto


def run_model(
    model: ExportedModel, proto: onnx.ModelProto, profiles: Sequence[tuple[str, dict[str, Range]]],
    given: Mapping[str, np.ndarray],
) -> list[Walked]:  # fmt: skip
    """Runs the model at the three shapes of every profile; `given` replaces generated inputs of the best shapes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if _read_by_op(proto, t.name)}
    walked = []
    for profile, ranges in profiles:
        at: list[Arrays] = []
        for which in ("min", "opt", "max"):
            sizes = {name: getattr(r, which) for name, r in ranges.items()}
            shapes = {t.name: [evaluate(d, sizes) for d in t.dims or ()] for t in model.inputs}
            feed = example_inputs(model.inputs, shapes)
            if which == "opt":
                feed |= {n: v for n, v in given.items() if n in feed and v.shape == feed[n].shape}
            at.append(constants | feed | dict(zip(names, session.run(names, feed), strict=True)))
        walked.append(Walked(profile, (at[0], at[1], at[2])))
    return walked


def _read_by_op(proto: onnx.ModelProto, name: str) -> bool:
    return any(name in node.input for node in proto.graph.node if is_attention(node))


def _as_prepared(value: np.ndarray, q: np.ndarray) -> np.ndarray:
    """A boolean mask reaches the plugin as an additive one, see `export.engine.prepare`."""
    if value.dtype != np.bool_:
        return value
    lowest = LOWEST[helper.np_dtype_to_tensor_dtype(q.dtype)]
    return np.where(value, np.float32(0), np.float32(lowest)).astype(q.dtype)


def write_plan(model: ExportedModel, walked: Sequence[Walked], folder: Path, *, data: bool) -> Path:
    """Writes `plan.txt`, and with `data` one `.bin` a node, profile and input; returns the plan's path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    prepared = filter(is_attention, prepare(model).proto.graph.node)
    for original, node in zip(filter(is_attention, model.proto.graph.node), prepared, strict=True):
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        names = attributes["inputs"].decode().split(",")
        outputs = [spec.name for spec in op.OUTPUTS[: len(node.output)]]
        lines.append(f"node {node.name}")
        lines += [_attribute(spec, attributes[spec.name]) for spec in op.ATTRIBUTES]
        lines.append(f"attribute {OUTPUTS_ATTRIBUTE} string {','.join(outputs)}")
        for profile in walked:
            lines.append(f"profile {profile.name}")
            files: list[str] = []
            for name, value in zip(names, original.input, strict=True):
                arrays = [_as_prepared(at[value], at[original.input[0]]) for at in profile.values]
                lines.append(_tensor("input", name, arrays))
                if data:
                    file = folder / f"{node.name}.{profile.name}.{name}.bin"
                    file.write_bytes(np.ascontiguousarray(arrays[1]).tobytes())
                    files.append(f"data {name} {file.name}")
            lines += [_tensor("output", n, [at[v] for at in profile.values])
                      for n, v in zip(outputs, original.output, strict=True)]  # fmt: skip
            lines += files
    plan = folder / "plan.txt"
    plan.write_text("\n".join(lines) + "\n")
    return plan


def _attribute(spec: op.AttributeSpec, value: object) -> str:
    text = value.decode() if isinstance(value, bytes) else repr(value) if spec.kind == "float" else str(value)
    return f"attribute {spec.name} {spec.kind} {text}"


def _tensor(kind: str, name: str, arrays: Sequence[np.ndarray]) -> str:
    shapes = " ".join(
        f"{which} {','.join(map(str, array.shape))}" for which, array in zip(("min", "opt", "max"), arrays, strict=True)
    )
    return f"{kind} {name} {TYPES[arrays[0].dtype.name]} {shapes}"


def plan_for(
    onnx_path: Path, folder: Path, profiles: Sequence[str], *, inputs: Mapping[str, np.ndarray], data: bool
) -> tuple[ExportedModel, Path, list[str]]:
    """Reads, runs and writes: the model, the plan's path, the names of its profiles."""
    model = read_model(onnx_path)
    walked = run_model(model, walked_model(model), [parse_profile(text) for text in profiles], inputs)
    return model, write_plan(model, walked, folder, data=data), [profile.name for profile in walked]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("onnx", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--profile", action="append", required=True, help="NAME:dimension=MIN/OPT/MAX,...")
    parser.add_argument("--inputs", type=Path, help="an .npz with the model's inputs at the best shapes")
    parser.add_argument("--data", action="store_true", help="write the nodes' inputs for a run on a GPU")
    given = parser.parse_args()
    inputs = dict(np.load(given.inputs)) if given.inputs else {}
    model, plan, profiles = plan_for(given.onnx, given.folder, given.profile, inputs=inputs, data=given.data)
    print(json.dumps({"plan": str(plan), "nodes": len(model.nodes), "profiles": profiles}))


if __name__ == "__main__":
    main()
