"""The contract of the op `BlockSkipSoftmaxAttention`, version 1, as data.

Everything that carries the op (the PyTorch op, the ONNX function body, the TensorRT plugin) is tested against what
stands here. The mathematics are those of the reference (`sparse_attention.reference`); this file only fixes names,
order, types and shapes. Version 1 is frozen: an implementation may support less and say so, never something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

DOMAIN = "blockskip"
OP_TYPE = "BlockSkipSoftmaxAttention"
VERSION = 1

FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")
"""What the type variable T (dtype of q, k, v, o) may be."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, the types it may have ("T" is bound by `q`), its shape by named dimensions."""

    name: str
    types: tuple[str, ...]
    shape: tuple[str | int, ...]
    required: bool
    doc: str


@dataclass(frozen=True)
class AttributeSpec:
    """One attribute. Every node writes all of them: a body that refers to one left out is not portable."""

    name: str
    kind: Literal["int", "float", "string"]
    default: int | float | str
    doc: str


INPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("q", ("T",), ("B", "Hq", "Sq", "D"), True, "queries"),
    TensorSpec("k", ("T",), ("B", "Hk", "Sk", "D"), True, "keys; Hq % Hk == 0, never expanded"),
    TensorSpec("v", ("T",), ("B", "Hk", "Sk", "Dv"), True, "values"),
    TensorSpec("bias", ("T", "tensor(bool)"), ("B|1", "Hq|1", "Sq|1", "Sk|1"), False,
               "added to the scores, or a mask (True = attend); rank 4, each dimension full or 1"),
    TensorSpec("kv_lengths", ("tensor(int32)",), ("B",), False, "keys that are valid, default Sk"),
    TensorSpec("q_start", ("tensor(int32)",), ("B",), False, "position of query row 0 among the keys, default Sk - Sq"),
    TensorSpec("q_lengths", ("tensor(int32)",), ("B",), False, "query rows that are valid, default Sq"),
    TensorSpec("sinks", ("T",), ("Hq",), False, "one extra logit per head that joins the denominator only"),
    TensorSpec("threshold_scale", ("tensor(float)",), (1,), False, "multiplies λ; 0 makes the call dense"),
)  # fmt: skip

OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("o", ("T",), ("B", "Hq", "Sq", "Dv"), True, "attention output; rows that see nothing are 0"),
    TensorSpec("counts", ("tensor(int32)",), ("Hq", 2), False,
               "tiles skipped and tiles that exist per query head, summed over the batch"),
)  # fmt: skip

PHASES = ("prefill", "decode")
"""Decode is Sq == 1 (then br = 1); prefill anything else."""


def _phase_attributes(phase: str) -> tuple[AttributeSpec, ...]:
    return (
        AttributeSpec(f"{phase}_threshold", "float", 0.0, f"λ of {phase}, natural scale; used where {phase}_a == 0"),
        AttributeSpec(f"{phase}_a", "float", 0.0, "calibrated: λ = a * exp(b * target) / L, L = kv_lengths[b] or Sk"),
        AttributeSpec(f"{phase}_b", "float", 0.0, "calibrated: slope of ln(λ L) over the target sparsity"),
        AttributeSpec(f"{phase}_target", "float", 0.0, "calibrated: wanted sparsity in (0, 1)"),
    )


ATTRIBUTES: tuple[AttributeSpec, ...] = (
    AttributeSpec("inputs", "string", "q,k,v", "names of the inputs that are present, in order, comma-joined"),
    AttributeSpec("br", "int", 128, "query rows of a tile"),
    AttributeSpec("bc", "int", 128, "key columns of a tile"),
    AttributeSpec("is_causal", "int", 0, "row i sees key j only where j <= i + q_start"),
    AttributeSpec("scale", "float", 1.0, "multiplies q·k; always written out, there is no implied 1/sqrt(D)"),
    AttributeSpec("softcap", "float", 0.0, "scores become softcap * tanh(scores / softcap); 0 = none"),
    AttributeSpec("window", "int", 0, "row i sees key j only where j > i + q_start - window; 0 = none"),
    AttributeSpec("unit", "string", "head", '"head" decides per query head, "group" jointly per K/V head'),
    *_phase_attributes("prefill"),
    *_phase_attributes("decode"),
)

OUTPUTS_ATTRIBUTE = "outputs"
"""Extra node attribute, the node's outputs, for the plugin: TensorRT's parser does not tell it which are used."""

PLUGIN_ATTRIBUTES: Mapping[str, str] = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
"""Extra node attributes by which TensorRT's parser finds our plugin before it looks at the function body."""


def input_names(present: Sequence[str]) -> tuple[str, ...]:
    """The given input names in the contract's order; raises ValueError for an unknown or missing required one."""
    known = [spec.name for spec in INPUTS]
    unknown = set(present) - set(known)
    missing = {spec.name for spec in INPUTS if spec.required} - set(present)
    if unknown or missing:
        raise ValueError(f"inputs of {OP_TYPE}: unknown {sorted(unknown)}, missing {sorted(missing)}")
    return tuple(name for name in known if name in set(present))


def attributes(**given: Any) -> dict[str, int | float | str]:
    """A node's full set of attributes: the given ones over the defaults; raises ValueError for an unknown name."""
    values = {spec.name: spec.default for spec in ATTRIBUTES}
    unknown = set(given) - set(values)
    if unknown:
        raise ValueError(f"attributes of {OP_TYPE}: unknown {sorted(unknown)}")
    return values | given
