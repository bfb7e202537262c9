"""Writing results whole or not at all: under a temporary name first, then renamed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from sparse_attention.errors import ModelError, UsageError


def check_output(path: Path, *, force: bool = False) -> None:
    """Refuses an output that exists or cannot be written, before any work is done; makes no folder yet.

    Raises:
        UsageError: with what to do instead.
    """
    try:
        if path.is_dir():
            raise UsageError(
                "the output is a directory", where=str(path), fix=f"name a file, such as {path / 'model.onnx'}"
            )
        if path.exists() and not force:
            raise UsageError("the output exists already", where=str(path), fix="choose another name, or pass --force")
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if not folder.is_dir():
            raise UsageError("the output cannot be written", where=str(path), found=f"{folder} is no directory",
                             fix="choose another directory")  # fmt: skip
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-test-"):
            pass
    except OSError as error:  # also of a name that is too long, and of a folder that may not be entered
        raise UsageError("the output cannot be written", where=str(path), found=error.strerror or str(error),
                         fix="choose a directory you may write to") from error  # fmt: skip


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Gives a directory beside `path`; what the block leaves there moves to `path`'s directory, `path` itself last.

    The folders of `path` are made. Where the block fails or is interrupted, nothing of it stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=path.parent, prefix=f".{path.name}.partial-", ignore_cleanup_errors=True
        ) as name:
            stage = Path(name)
            yield stage
            for file in sorted(stage.iterdir(), key=lambda file: file.name == path.name):
                file.replace(path.parent / file.name)
    except OSError as error:
        raise UsageError("the output cannot be written", where=str(path), found=error.strerror or str(error),
                         fix="check the space and the permissions there") from error  # fmt: skip


def save_onnx(model: ir.Model, path: Path, side_files: Sequence[Any] = (), *, force: bool = False) -> None:
    """Writes `path`, its weights beside it as `<name>.data`, and what describes the model (tokenizer, configuration).

    Args:
        model: a finished graph; the written file passes `onnx.checker` with full shape inference.
        path: ends in `.onnx`; must not exist unless `force`.
        side_files: objects with `save_pretrained(directory)`: a tokenizer, a configuration.
        force: overwrite files that exist.

    Raises:
        UsageError: where a file exists or cannot be written.
        ModelError: where the checker refuses the graph.
    """
    check_output(path, force=force)
    with staged(path) as stage:
        ir.save(model, stage / path.name, external_data=f"{path.name}.data")
        try:
            onnx.checker.check_model(stage / path.name, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ModelError("the exported graph is not valid ONNX", where=path.name,
                             found=str(error).strip().splitlines()[0]) from error  # fmt: skip
        for item in side_files:
            item.save_pretrained(stage)
        for file in stage.iterdir():
            target = path.parent / file.name
            if target.exists() and not force and file.read_bytes() != target.read_bytes():
                raise UsageError("a file of another model lies there already", where=str(target),
                                 fix="export into a directory of its own, or pass --force")  # fmt: skip
