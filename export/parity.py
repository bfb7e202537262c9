"""The proof: an exported file computes what PyTorch computes, layer by layer and end to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.adapter import Signature
from export.compare import LayerResult, compare_layer
from export.finish import op_nodes
from export.runners import NodeRunner, as_numpy, metadata, read_graph, session
from export.samples import sample_inputs
from export.signatures import signature_from
from export.tolerances import LOGITS
from sparse_attention import layers_of, observed, restore, sparsify
from sparse_attention.errors import CheckError
from sparse_attention.layer import AttentionCall, AttentionLayer
from sparse_attention.statistics import phase_of

Progress = Callable[[str], None]


@dataclass(frozen=True)
class EndToEnd:
    """A whole model's output, exported against PyTorch: largest difference, and how often the largest logit agrees.

    `tolerance` is None where the difference is only reported (half precision).
    """

    output: str
    error: float
    tolerance: float | None
    top1_agreement: float

    @property
    def passed(self) -> bool:
        """Within the tolerance, or not judged; never with a NaN."""
        return not np.isnan(self.error) and (self.tolerance is None or self.error <= self.tolerance)


@dataclass(frozen=True)
class ParityReport:
    """What a check found; `notes` are for people."""

    file: str
    against: str
    tokens: int
    dtype: str
    layers: tuple[LayerResult, ...]
    outputs: tuple[EndToEnd, ...]
    notes: tuple[str, ...] = ()

    @property
    def tiles(self) -> int:
        """Tiles that exist, over all layers."""
        return sum(layer.tiles for layer in self.layers)

    @property
    def skipped(self) -> int:
        """Tiles that were skipped, over all layers."""
        return sum(layer.skipped for layer in self.layers)

    @property
    def passed(self) -> bool:
        """Whether every layer and every judged output passed."""
        return all(layer.passed for layer in self.layers) and all(output.passed for output in self.outputs)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON report."""
        return {
            "passed": self.passed,
            "file": self.file,
            "against": self.against,
            "tokens": self.tokens,
            "dtype": self.dtype,
            "tiles": self.tiles,
            "skipped": self.skipped,
            "layers": [layer.as_dict() for layer in self.layers],
            "outputs": [vars(output) | {"passed": output.passed} for output in self.outputs],
            "notes": list(self.notes),
        }


def check(
    path: Path | str,
    model: nn.Module,
    *,
    tokenizer: Any | None = None,
    name: str = "",
    tokens: int = 2048,
    signature: Signature | None = None,
    progress: Progress = lambda text: None,
) -> ParityReport:
    """Compares an exported file with the PyTorch model it came from.

    The model runs in PyTorch, sparsified by the configuration that the file carries; every attention call is handed,
    with its own q, k, v, to the file's node and to the reference. Then the whole file runs on the same inputs. A file
    with a KV cache is checked in both phases: a prefill, then a decode step on its cache.

    Args:
        path: a file that the export wrote.
        model: the model in eval mode, dense or sparsified; it is left as it was.
        tokenizer: makes the inputs from English text; without it they are random tokens.
        name: how the report calls the model.
        tokens: length of the input.
        signature: the graph's inputs and outputs, where the file alone does not tell (models with example inputs).
        progress: told what is being done.

    Raises:
        CheckError: where the file and the model do not belong together.
    """
    path = Path(path)
    graph = read_graph(path)
    nodes = {(node.name or "").rsplit(".", 1)[0]: node for node in op_nodes(graph)}
    signature = signature or signature_from(metadata(graph, "signature") or {}, model)
    inputs: dict[str, Tensor] | None = sample_inputs(signature, tokenizer, tokens)
    results: dict[tuple[str, str], LayerResult] = {}
    runners: dict[str, NodeRunner] = {}

    def compare(layer: AttentionLayer, call: AttentionCall, out: Tensor, counts: Tensor) -> None:
        key = layer.name, phase_of(call.q.shape[2])
        if layer.name in nodes and key not in results:
            progress(f"{key[1]}, layer {len(results) % len(nodes) + 1} of {len(nodes)}")
            if layer.name not in runners:
                runners[layer.name] = NodeRunner(graph, nodes[layer.name])
                _same_settings(layer, call, runners[layer.name])
            results[key] = compare_layer(layer, call, out, runners[layer.name])

    calls: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    was_sparse = bool(layers_of(model))
    if not was_sparse:
        sparsify(model, metadata(graph, "config") or {}, unit=metadata(graph, "unit") or "head")
    try:
        with torch.no_grad(), observed(model, compare):
            while inputs is not None:
                progress("PyTorch")
                calls.append((inputs, signature.run(inputs)))
                inputs = signature.following(*calls[-1]) if len(calls) == 1 else None
    finally:
        if not was_sparse:
            restore(model)
    found = {layer for layer, _ in results}
    if found != set(nodes):
        raise CheckError(
            "the file and the model have different attention layers", where=str(path),
            found=f"in one only: {', '.join(sorted(found ^ set(nodes))[:5])}",
            fix="check against the model that the file was exported from",
        )  # fmt: skip
    progress("ONNX Runtime")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    runner, notes = _whole_file(path, dtype)
    outputs = tuple(one for given, expected in calls for one in _end_to_end(runner, given, expected, dtype))
    if not any(result.skipped for result in results.values()):
        notes.append("no tile was skipped, so nothing is shown about skipping: take a longer input or a larger λ")
    layers = tuple(
        results[key] for key in sorted(results, key=lambda key: (key[1] == "decode", list(nodes).index(key[0])))
    )
    return ParityReport(str(path), name or type(model).__name__, tokens, dtype, layers, outputs, tuple(notes))


def _same_settings(layer: AttentionLayer, call: AttentionCall, runner: NodeRunner) -> None:
    """The node must carry the layer's settings: equal numbers from unequal settings would prove nothing."""
    settings: dict[str, Any] = layer.thresholds.attributes() | {
        "br": layer.settings.br, "bc": layer.settings.bc, "unit": layer.unit, "is_causal": int(call.is_causal),
        "scale": call.scale, "softcap": call.softcap, "window": call.window,
    }  # fmt: skip
    wrong = [
        f"{key} is {runner.attributes[key]} in the file, {value} in the model"
        for key, value in settings.items()
        if runner.attributes[key] != (value if isinstance(value, str | int) else float(np.float32(value)))
    ]
    if wrong:
        raise CheckError(
            "the file and the model have different settings", where=layer.name, found="; ".join(wrong),
            fix="check against the model and configuration that the file was exported from",
        )  # fmt: skip


def _whole_file(path: Path, dtype: str) -> tuple[Any, list[str]]:
    if dtype != "bfloat16":
        return session(str(path)), []
    from export.widen import widened_twin

    note = "ONNX Runtime computes no bfloat16 on a CPU: the file ran as its widened twin in float32"
    return session(widened_twin(path)), [note]


def _end_to_end(runner: Any, given: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: str) -> list[EndToEnd]:
    feed = {name: as_numpy(value) for name, value in given.items()}
    if "threshold_scale" in {one.name for one in runner.get_inputs()}:
        feed["threshold_scale"] = np.ones(1, np.float32)
    got = runner.run(list(expected), feed)
    results = []
    for (name, wanted), array in zip(expected.items(), got, strict=True):
        value, wanted = torch.from_numpy(array).float(), wanted.float().cpu()
        top1 = float((value.argmax(-1) == wanted.argmax(-1)).float().mean())
        results.append(EndToEnd(name, float((value - wanted).abs().max()), LOGITS[dtype], top1))
    return results
