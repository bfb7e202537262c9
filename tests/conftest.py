"""What tests share: exported files of tiny models, made once a run, and the command line as a process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

from export import ExportOptions, export_onnx
from export.adapter import Signature
from export.models import load_model
from export.runners import as_numpy, session
from export.smollm2 import fetch_smollm2
from sparse_attention import sparsify
from tests.command_line import CommandLine
from tests.sparse_attention.attention_models import VOCABULARY, settings, tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub, not even by accident
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: threads of each would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests on a real model take minutes: they start first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("model") is None)


@dataclass(frozen=True)
class Exported:
    """A tiny peaky model and the file it was exported to."""

    path: Path
    family: str
    dtype: torch.dtype
    config: Any
    options: dict[str, Any] = field(default_factory=dict)

    def dense(self) -> nn.Module:
        """The model, as it was exported."""
        return tiny(self.family).to(self.dtype)

    def sparse(self) -> nn.Module:
        """The model, sparsified as it was for the export."""
        return sparsify(self.dense(), self.config, unit=self.options.get("unit", "head"))

    def signature(self, model: nn.Module | None = None) -> Signature:
        """Inputs and outputs of the graph, around the sparse model unless another is given."""
        return ExportOptions(**self.options).signature(self.sparse() if model is None else model)

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The file's outputs by name, in ONNX Runtime; λ is scaled by 1 unless `threshold_scale` is given."""
        runner = session(str(self.path))
        names = [output.name for output in runner.get_outputs()]
        scale = {"threshold_scale": torch.ones(1)} if self.options.get("tunable") else {}
        values = runner.run(names, {name: as_numpy(value) for name, value in (scale | inputs).items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


@pytest.fixture(scope="session")
def of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of a run: what takes long is made once, under a lock."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def objects(of_the_run: Path) -> Path:
    """Folder for what the builds of the C library share; the first of them compiles it."""
    return of_the_run / "objects"


@pytest.fixture(scope="session")
def exported(of_the_run: Path) -> Callable[..., Exported]:
    """Exports a family of tiny models with options; the same request gives the same file, also in another worker."""
    directory = of_the_run / "exported"
    directory.mkdir(exist_ok=True)

    def export(family: str = "llama", dtype: str = "float32", config: Any = None, **options: Any) -> Exported:
        name = "-".join([family, dtype, *(f"{key}_{value}" for key, value in sorted(options.items()))])
        config = settings(0.7) if config is None else config
        result = Exported(directory / name / "model.onnx", family, getattr(torch, dtype), config, options)
        with FileLock(directory / f"{name}.lock"):
            if not result.path.exists():
                export_onnx(result.dense(), config, result.path, options=ExportOptions(**options))
        return result

    return export


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny peaky Llama as `save_pretrained` writes it; never changed by a test."""
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def smollm2(of_the_run: Path) -> Path:
    """SmolLM2-135M as `save_pretrained` writes it: its GGUF file, which takes long to parse, is read once a run."""
    path = of_the_run / "smollm2"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            loaded = load_model(str(fetch_smollm2()))
            parts: list[Any] = [loaded.model, loaded.tokenizer]
            for part in parts:
                part.save_pretrained(f"{path}.new")
            Path(f"{path}.new").rename(path)
    return path


@pytest.fixture(scope="session")
def command_line() -> Iterator[CommandLine]:
    """Runs the program in processes of its own."""
    runner = CommandLine(sys.executable)
    yield runner
    runner.close()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens `[batch, length]` of the tiny models' vocabulary."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
