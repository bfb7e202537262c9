"""What an engine is compared with: inputs of each profile, and the outputs that PyTorch or ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from export import op
from export.adapter import Signature
from export.engine.inputs import example_inputs, vocabulary_of
from export.engine.model import ExportedModel, read_model
from export.engine.sidecar import Sidecar
from export.models import LoadedModel
from export.runners import as_numpy, session
from export.samples import token_ids
from export.signatures import signature_from
from sparse_attention import layers_of, observed, restore, sparsify
from sparse_attention.errors import UsageError
from sparse_attention.layer import AttentionCall, AttentionLayer

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One run: the profile it belongs to, the engine's inputs, and the outputs to expect; CPU tensors by name."""

    profile: str
    inputs: Tensors
    expected: Tensors


Against = Callable[[Sidecar], Iterable[Case]]
"""Makes the cases for an engine with this record; called when the engine is loaded, so that a bad one is told first."""


def against_onnx(path: Path, inputs: Mapping[str, Tensors] | None = None) -> Against:
    """The exported file in ONNX Runtime, by its function body, on `inputs` by profile and name.

    Without `inputs` it runs on examples at the best shapes of every profile. A bfloat16 file runs as its widened twin.
    """

    def cases(sidecar: Sidecar) -> Iterator[Case]:
        model = read_model(path)
        given = inputs or {profile: examples_of(model, recorded) for profile, recorded in sidecar.profiles.items()}
        runner = session(str(path))
        if model.dtype == "bfloat16":
            from export.widen import widened_twin

            runner = session(widened_twin(path))
        names = [output.name for output in runner.get_outputs()]
        for profile, tensors in given.items():
            values = runner.run(names, {name: as_numpy(value) for name, value in tensors.items()})
            yield Case(profile, tensors, as_tensors(dict(zip(names, values, strict=True))))

    return cases


def against_model(load: Callable[[str], LoadedModel], tokens: int) -> Against:
    """The PyTorch model on the CPU, sparsified by the configuration that the engine's record carries.

    It shares no kernel with the engine. The prefill is a text of `tokens`, or as near to it as the profiles allow; the
    decode step follows on the cache that it left.

    Args:
        load: loads the model in the dtype it is given, "float16" for example.
        tokens: length of the text.
    """

    def cases(sidecar: Sidecar) -> Iterator[Case]:
        exported = sidecar.exported
        if sidecar.configuration is None or exported.get("signature") is None:
            raise UsageError(
                "The engine's record does not say how its model was sparsified.", where="--against",
                fix="Compare the engine with the .onnx it was built from.",
            )  # fmt: skip
        loaded = load(exported["dtype"])
        model = loaded.model
        signature = signature_from(exported["signature"], model, loaded.examples, loaded.dynamic)
        _require_same_inputs(sidecar, signature)
        inputs: dict[str, Tensor] | None = _first_inputs(sidecar, signature, loaded, tokens)
        was_sparse = bool(layers_of(model))
        if not was_sparse:
            sparsify(model, sidecar.configuration, unit=exported["unit"])
        try:
            for profile in sidecar.profiles:  # prefill, then decode
                if inputs is None:
                    break
                outputs = _run(model, signature, inputs)
                tunable = {"threshold_scale": torch.ones(1)} if "threshold_scale" in sidecar.profiles[profile] else {}
                yield Case(profile, inputs | tunable, outputs)
                inputs = signature.following(inputs, outputs)
        finally:
            if not was_sparse:
                restore(model)

    return cases


def examples_of(model: ExportedModel, profile: Mapping[str, Any]) -> dict[str, Tensor]:
    """Example inputs at the best shapes of a recorded profile."""
    best = {name: shapes[1] for name, shapes in profile.items()}
    return as_tensors(example_inputs(model.inputs, best, vocabulary=vocabulary_of(model)))


def as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """NumPy's arrays as tensors; PyTorch does not know NumPy's bfloat16."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return {
        name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(array)
        for name, array in contiguous.items()
    }


def _run(model: nn.Module, signature: Signature, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The graph's outputs, tile counts with them under the names that an export with --counts gives them."""
    counted: list[tuple[str, Tensor]] = []

    def count(layer: AttentionLayer, call: AttentionCall, out: Tensor, counts: Tensor) -> None:
        counted.append((f"{layer.name}.{op.OP_TYPE}.counts", counts.to(torch.int32)))

    with torch.no_grad(), observed(model, count):
        outputs = signature.run(inputs)
    if len({counts.shape for _, counts in counted}) == 1:
        return outputs | {"tile_counts": torch.stack([counts for _, counts in counted])}
    return outputs | dict(counted)


def _require_same_inputs(sidecar: Sidecar, signature: Signature) -> None:
    wanted = set(signature.examples)
    for profile, recorded in sidecar.profiles.items():
        found = set(recorded) - {"threshold_scale"}
        if found != wanted:
            raise UsageError(
                "The engine and the model have different inputs.", where=f"profile {profile}",
                found=f"in one only: {', '.join(sorted(found ^ wanted)[:5])}",
                fix="Compare the engine with the model it was made from, or with the .onnx it was built from.",
            )  # fmt: skip


def _first_inputs(sidecar: Sidecar, signature: Signature, loaded: LoadedModel, tokens: int) -> dict[str, Tensor]:
    if "input_ids" not in signature.examples:
        return dict(signature.examples)
    batches, lengths = _range(sidecar, signature, "batch"), _range(sidecar, signature, "length")
    shortest, longest = lengths.start, lengths.stop - 1
    steps = len(sidecar.profiles) - 1
    longest = min(longest, loaded.clip(longest + steps) - steps)
    if static := getattr(signature, "static", 0):
        longest = min(longest, static - steps)
    if longest < shortest or not batches:
        raise UsageError(
            "No text fits the engine's profiles.", where="--against",
            found=f"at least {shortest} tokens are needed, at most {longest} are possible",
            fix="Build the engine with wider --shapes, or compare it with the .onnx it was built from.",
        )  # fmt: skip
    length = min(max(tokens, shortest), longest)
    config: Any = loaded.model.config
    ids = token_ids(loaded.tokenizer, batches.start * length, config.vocab_size)
    return signature.sample(ids.view(batches.start, length))


def _range(sidecar: Sidecar, signature: Signature, wanted: str) -> range:
    """What the profiles allow: the "batch", or the "length" of a text that is prefilled and then decoded on."""
    # how many tokens more than the text a dimension has, in the call of each profile
    meanings: Mapping[str, Mapping[str, int]] = {
        "prefill": {"sequence": 0, "past + sequence": 0},
        "decode": {"past": 0, "past + sequence": 1},
    }
    low, high = 1, 1 << 30
    for profile, recorded in sidecar.profiles.items():
        more = {"batch": 0} if wanted == "batch" else meanings.get(profile, {})
        for name, axes in signature.dynamic.items():
            for axis, dimension in axes.items():
                if dimension in more:
                    smallest, _, largest = (shape[axis] - more[dimension] for shape in recorded[name])
                    low, high = max(low, smallest), min(high, largest)
    return range(low, high + 1)
