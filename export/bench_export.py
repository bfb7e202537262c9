"""How long tracing takes, and what it needs, beside the plain exporter; each run is a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from export.adapter import Signature
from export.finish import finish
from export.models import load_model
from export.signatures import signature_from
from export.trace import trace
from sparse_attention import sparsify


@dataclass(frozen=True)
class TraceCost:
    """Seconds from a model in memory to a complete ONNX graph in memory, and the peak memory of the process in MB."""

    seconds: float
    peak_mb: float


def measure_tracing(model: str, *, rounds: int = 1, kv_cache: bool = False) -> dict[str, TraceCost]:
    """Medians over `rounds` of "op" (ours), "eager" (the plain exporter on eager attention) and, if wanted, "cache".

    The kinds take turns within a round, so that a machine that slows down slows all of them.
    """
    kinds = ["op", "eager", *(["cache"] if kv_cache else [])]
    runs: dict[str, list[TraceCost]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            command = [sys.executable, "-m", "export.bench_export", kind, model]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[kind].append(TraceCost(**json.loads(done.stdout.splitlines()[-1])))
    return {
        kind: TraceCost(median(run.seconds for run in found), median(run.peak_mb for run in found))
        for kind, found in runs.items()
    }


def _trace_once(kind: str, model: str) -> TraceCost:
    loaded = load_model(model, attn_implementation="eager" if kind == "eager" else "sdpa")
    if kind != "eager":
        sparsify(loaded.model, "skip_softmax_demo")
    signature: Signature = signature_from({"kv_cache": kind == "cache"}, loaded.model)
    started = time.perf_counter()
    graph = trace(signature, opset=23)
    if kind != "eager":
        finish(graph)
    seconds = time.perf_counter() - started
    return TraceCost(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def export_for_decode(model: str, directory: Path) -> tuple[Path, Path]:
    """Two files with the same growing cache: block-skip attention, and the model's own dense attention."""
    import onnx_ir as ir

    from export.pipeline import ExportOptions, export_onnx

    loaded = load_model(model)
    sparse, dense = directory / "sparse.onnx", directory / "dense.onnx"
    export_onnx(loaded.model, "skip_softmax_default", sparse, options=ExportOptions(kv_cache=True))
    ir.save(trace(signature_from({"kv_cache": True}, loaded.model)), dense, external_data="dense.onnx.data")
    return sparse, dense


def measure_decode(model: str, *, context: int = 1024, tokens: int = 32, rounds: int = 5) -> dict[str, float]:
    """Median seconds a decoded token at `context` tokens of cache, of the "sparse" and the "dense" export, in turns."""
    with tempfile.TemporaryDirectory() as directory:
        sparse, dense = export_for_decode(model, Path(directory))
        runners = {"sparse": _Decoder(sparse, context), "dense": _Decoder(dense, context)}
        times: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(rounds):
            for name, runner in runners.items():
                times[name] += [runner.step() for _ in range(tokens // rounds + 1)]
    return {name: median(found) for name, found in times.items()}


class _Decoder:
    """Decodes the same token again and again on a cache of a fixed length."""

    def __init__(self, path: Path, context: int) -> None:
        import numpy as np
        from onnxruntime import OrtValue

        from export.runners import session

        self.session = session(str(path))
        self.outputs = [one.name for one in self.session.get_outputs()]
        rng = np.random.default_rng(0)
        feed = {"input_ids": np.full((1, 1), 7), "attention_mask": np.ones((1, context + 1), np.int64)}
        for one in self.session.get_inputs():
            if one.name.startswith("past_key_values."):
                feed[one.name] = rng.standard_normal((1, one.shape[1], context, one.shape[3])).astype(np.float32)
        self.feed = {name: OrtValue.ortvalue_from_numpy(value) for name, value in feed.items()}
        self.step()

    def step(self) -> float:
        """Seconds of one decode step."""
        started = time.perf_counter()
        self.session.run_with_ort_values(self.outputs, self.feed)
        return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps(asdict(_trace_once(sys.argv[1], sys.argv[2]))))
