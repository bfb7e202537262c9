"""MODEL on the command line: a Hugging Face directory or id, a `.gguf` file, or `module:callable`.

Weights are read from safetensors or GGUF only; nothing is ever unpickled.
"""

from __future__ import annotations

import importlib
import struct
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sparse_attention.errors import MissingError, ModelError, UsageError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode; `tokenizer` is None where none lies beside it, `name` is for people.

    `examples` and `dynamic` are what a callable gave for a model that is not of Hugging Face: example inputs by name,
    and their dynamic dimensions (input name -> axis -> dimension name).
    """

    model: nn.Module
    tokenizer: Any | None
    name: str
    examples: dict[str, Tensor] | None = None
    dynamic: dict[str, dict[int, str]] | None = None

    @property
    def side_files(self) -> tuple[Any, ...]:
        """What is written beside an exported file: the tokenizer, the configuration."""
        parts = (self.tokenizer, getattr(self.model, "config", None), getattr(self.model, "generation_config", None))
        return tuple(part for part in parts if hasattr(part, "save_pretrained"))

    def clip(self, tokens: int) -> int:
        """`tokens`, or as many as the model has positions for."""
        return min(tokens, getattr(getattr(self.model, "config", None), "max_position_embeddings", None) or tokens)


def load_model(source: str, *, dtype: str = "float32", attn_implementation: str = "sdpa") -> LoadedModel:
    """Loads a model for export, calibration or a check.

    Args:
        source: a Hugging Face directory or id, a `.gguf` file, or `module:callable` that returns a Hugging Face model,
            or any `nn.Module` with example inputs and dynamic dimensions: `(module, {name: tensor}, {name: {axis:
            "dimension"}})`.
        dtype: "float32", "float16" or "bfloat16".
        attn_implementation: of Hugging Face models: "sdpa" or "eager".

    Raises:
        UsageError: where `source` cannot be a model.
        MissingError: where a file, or the weights, are not there.
        ModelError: where they are there and cannot be loaded.
    """
    if dtype not in DTYPES:
        raise UsageError("unknown dtype", found=dtype, fix=f"use one of {', '.join(DTYPES)}")
    path = Path(source)
    if path.suffix == ".onnx":
        raise UsageError(
            "an .onnx file is not a PyTorch model", where=source, fix="pass the model it was exported from"
        )
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype, attn_implementation)
    if ":" in source and not path.exists():
        return _load_callable(source, DTYPES[dtype])
    return _load_pretrained(source, dtype, attn_implementation)


def _load_pretrained(source: str, dtype: str, attn_implementation: str) -> LoadedModel:
    path = Path(source)
    if path.is_file():
        raise UsageError(
            "not a model", where=source, found=f"a {path.suffix or 'plain'} file", fix="pass the directory it lies in"
        )
    if path.is_dir():
        _check_directory(path)
    elif path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise MissingError(
            "there is no such model",
            where=source,
            fix="pass a directory, a .gguf file, or a Hugging Face id (owner/name)",
        )
    with _load_errors(source):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(source)
        model = _auto_class(config).from_pretrained(
            source, dtype=DTYPES[dtype], attn_implementation=attn_implementation, use_safetensors=True
        )
    return LoadedModel(model.eval(), _tokenizer(source), path.name or source)


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise MissingError("a directory without a model", where=str(path), found="no config.json",
                           fix="pass the directory that save_pretrained wrote")  # fmt: skip
    if any(path.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickled:
        raise ModelError(
            "these weights would have to be unpickled, which can run code", where=str(path), found=", ".join(pickled),
            fix="convert them once, where you trust them: model.save_pretrained(directory)",
        )  # fmt: skip
    gguf = sorted(file.name for file in path.glob("*.gguf"))
    raise MissingError(
        "a directory without weights", where=str(path), found=", ".join(gguf) or "no .safetensors file",
        fix=f"pass {path / gguf[0]}" if gguf else "pass the directory that save_pretrained wrote",
    )  # fmt: skip


def _auto_class(config: Any) -> Any:
    """The class for the architecture that the checkpoint names; a decoder's is the one with its head."""
    import transformers

    names = getattr(config, "architectures", None) or []
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel


def _load_gguf(path: Path, dtype: str, attn_implementation: str) -> LoadedModel:
    if not path.is_file():
        raise MissingError("there is no such file", where=str(path), fix="pass a .gguf file that exists")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError("not a GGUF file", where=str(path), found="other contents", fix="download it again")
    import transformers

    options: dict[str, Any] = {"dtype": DTYPES[dtype], "attn_implementation": attn_implementation}
    with suppress(ImportError, AttributeError):  # newer transformers keep the blocks quantized unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _load_errors(str(path)):
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return LoadedModel(_forget_quantization(model).eval(), tokenizer, path.stem)


def _forget_quantization(model: Any) -> Any:
    """The weights are dense by now; without this, `save_pretrained` would refuse them as quantized."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name, value in (("hf_quantizer", None), ("is_quantized", False), ("quantization_method", None)):
        if hasattr(model, name):
            setattr(model, name, value)
    return model


def _load_callable(source: str, dtype: torch.dtype) -> LoadedModel:
    module_name, _, attribute = source.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory: Callable[[], Any] = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise MissingError("cannot import the model", where=source, found=str(error),
                           fix="pass module:callable, importable from here") from error  # fmt: skip
    made = factory()
    model, examples, dynamic = (*made, None, None)[:3] if isinstance(made, tuple) else (made, None, None)
    if not isinstance(model, nn.Module):
        raise ModelError("the callable did not return a model", where=source, found=type(model).__name__,
                         fix="return an nn.Module, or (nn.Module, example inputs, dynamic dimensions)")  # fmt: skip
    if examples is not None:
        examples = {name: value.to(dtype) if value.is_floating_point() else value for name, value in examples.items()}
    return LoadedModel(model.to(dtype).eval(), None, attribute, examples, dynamic)


def _tokenizer(source: str) -> Any | None:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):  # many encoders and vision models come without one
        return None


@contextmanager
def _load_errors(source: str) -> Any:
    try:
        yield
    except ImportError as error:
        raise MissingError("loading this model needs a package", where=source, found=str(error),
                           fix="install it with pip") from error  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, struct.error, SafetensorError) as error:  # damaged files too
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError("the model cannot be loaded", where=source, found=first,
                         fix="check the directory's files, or the id and the network") from error  # fmt: skip
