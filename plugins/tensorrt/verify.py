"""Builds and checks SmolLM2-135M with the TensorRT on this machine, and prints a table to send to the project.

    python plugins/tensorrt/verify.py [--dtype float16] [--tokens 2048] [--folder verify]

Needs an NVIDIA GPU, TensorRT 10 or 11 and the built plugin (cmake -S plugins -B build && cmake --build build). Exports
the model with a cache, tile counts and a tunable threshold; builds an engine with the plugin beside it and one with the
plugin embedded; compares both with the exported file in ONNX Runtime; times them dense and sparse. Exit code 0: all
passed, 1: a check failed, 3: something is missing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from export.engine import EngineOptions, build_engine, check_engine, require_tensorrt
from export.engine.against import against_onnx, examples_of
from export.engine.model import read_model
from export.engine.sidecar import current_gpu, read_sidecar
from export.engine.tensorrt_api import import_tensorrt
from export.models import load_model
from export.pipeline import ExportOptions, export_onnx
from export.samples import token_ids
from export.smollm2 import fetch_smollm2
from sparse_attention.errors import MissingError, SparseAttentionError

Placement = Literal["beside", "embedded"]


def export_model(folder: Path, dtype: str, tokens: int) -> tuple[Path, torch.Tensor]:
    """The exported model (kept between runs) and a text of so many tokens, `[1, tokens] int64`."""
    loaded = load_model(str(fetch_smollm2()), dtype=dtype)
    config: Any = loaded.model.config
    ids = token_ids(loaded.tokenizer, tokens, config.vocab_size)
    path = folder / f"smollm2-{dtype}.onnx"
    if not path.exists():
        options = ExportOptions(kv_cache=True, counts=True, tunable=True)
        export_onnx(loaded.model, "skip_softmax_demo", path, options=options)
    return path, ids


def check_one(
    onnx: Path, engine: Path, placement: Placement, ids: torch.Tensor, console: Console
) -> list[dict[str, Any]]:
    """One row per profile: outputs compared, milliseconds sparse and dense."""
    tokens = ids.shape[1]
    options = EngineOptions(
        shapes=(f"sequence:1,{tokens},{tokens}", f"decode.past:1,{tokens - 1},{tokens}"),
        plugin_placement=placement,
        version_compatible=placement == "embedded",
    )
    build_engine(onnx, engine, options=options, force=True, console=console)
    model = read_model(onnx)
    sparse = {profile: examples_of(model, recorded) for profile, recorded in read_sidecar(engine).profiles.items()}
    sparse["prefill"]["input_ids"] = ids
    dense = {profile: {**given, "threshold_scale": torch.zeros(1)} for profile, given in sparse.items()}
    checks = {
        name: check_engine(engine, against_onnx(onnx, given)) for name, given in (("sparse", sparse), ("dense", dense))
    }
    rows = []
    for profile in sparse:
        outputs = [o.as_dict() for c in checks.values() for o in c.outputs if o.profile == profile]
        rows.append({
            "plugin": placement, "profile": profile, "passed": all(o["passed"] for o in outputs), "outputs": outputs,
            **{f"{name}_ms": check.milliseconds[profile] for name, check in checks.items()},
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--tokens", default=2048, type=int)
    parser.add_argument("--folder", default=Path("verify"), type=Path)
    given = parser.parse_args()
    console = Console()
    try:
        require_tensorrt()
        gpu = current_gpu()
        if gpu is None:
            raise MissingError("There is no GPU.", where="torch.cuda", fix="Run this on a machine with an NVIDIA GPU.")
        given.folder.mkdir(parents=True, exist_ok=True)
        onnx, ids = export_model(given.folder, given.dtype, given.tokens)
        placements: tuple[Placement, ...] = ("beside", "embedded")
        rows = [row for p in placements for row in check_one(onnx, given.folder / f"{p}.engine", p, ids, console)]
    except SparseAttentionError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    version = import_tensorrt().__version__
    title = f"TensorRT {version}, {gpu.name} ({gpu.compute_capability}), torch {torch.__version__}, {given.dtype}"
    table = Table("plugin", "profile", "worst error / allowed", "sparse ms", "dense ms", "", title=title)
    for row in rows:
        worst = max(row["outputs"], key=lambda o: o["error"] / (o["allowed"] or 1e-9))
        table.add_row(
            row["plugin"], row["profile"], f"{worst['output']}: {worst['error']:.1e} / {worst['allowed']:.1e}",
            f"{row['sparse_ms']:.3f}", f"{row['dense_ms']:.3f}", "PASSED" if row["passed"] else "FAILED",
        )  # fmt: skip
    console.print(table)
    passed = all(row["passed"] for row in rows)
    result = {"tensorrt": version, "gpu": asdict(gpu), "platform": platform.platform(), "rows": rows, "passed": passed}
    (given.folder / "verify.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"{given.folder / 'verify.json'} holds the numbers")
    console.print("PASSED" if passed else "FAILED")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
