"""Save and load a model together with its sparse-attention configuration: safetensors and JSON, never pickle.

The directory is an ordinary Hugging Face checkpoint that any tool loads densely. Beside it lies the configuration,
calibration included; `config.json` also gets the `sparse_attention_config` record of TensorRT-LLM and vLLM where the
calibration can be written as one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_attention.config import SparseAttentionConfig
from sparse_attention.config_io import Source, load_config, save_config
from sparse_attention.errors import ConfigError, MissingError, ModelError, UsageError
from sparse_attention.interchange import to_checkpoint_record
from sparse_attention.layer import layers_of
from sparse_attention.patterns import resolve
from sparse_attention.sparsify import attention_modules, sparsify

CONFIGURATION = "sparse_attention.json"
_KEY = "block_skip_attention"
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A sparsified model with its configuration, as `load_checkpoint` gives it."""

    model: Any
    config: SparseAttentionConfig
    unit: str


def save_checkpoint(
    model: nn.Module,
    config: SparseAttentionConfig | Source,
    directory: Path | str,
    *,
    tokenizer: Any | None = None,
    unit: str = "head",
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Writes the model, sparsified or not, and its configuration.

    Args:
        config: usually the result of `calibrate`; it must fit the model.
        tokenizer: written beside the model where given.
        unit: "head" or "group", as the configuration is meant to be decided.
        overwrite: allow a directory that is not empty.

    Returns:
        Notes on what the record for other tools cannot say, in plain words; empty where it says everything.

    Raises:
        UsageError: where the directory is not empty.
        ModelError: where the model cannot be saved.
        ConfigError: where the configuration does not fit the model.
    """
    directory, config = Path(directory), load_config(config)
    if not hasattr(model, "save_pretrained"):
        raise ModelError(
            "only a Hugging Face model can be saved like this", where=type(model).__name__,
            fix="save its state with safetensors.torch.save_model and the configuration with save_config",
        )  # fmt: skip
    if directory.exists() and any(directory.iterdir()) and not overwrite:
        raise UsageError("the directory is not empty", where=str(directory), fix="choose another one")
    resolve(config, attention_modules(model))
    classes = sorted({module.class_name for module in attention_modules(model)})
    try:
        exported = to_checkpoint_record(config, classes)
        record, notes = exported.record, exported.notes
    except ConfigError as error:
        record, notes = None, (f"no sparse_attention_config for other tools: {error.what}",)
    extra = {_KEY: {"format": _FORMAT, "configuration": CONFIGURATION, "unit": unit}}
    if record is not None:
        extra["sparse_attention_config"] = record
    directory.mkdir(parents=True, exist_ok=True)
    with _plain(model, extra):
        _save_weights(model, directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    save_config(config, directory / CONFIGURATION, overwrite=True)
    return notes


def load_checkpoint(
    directory: Path | str, *, dtype: torch.dtype | None = None, sparse: bool = True, **keywords: Any
) -> Checkpoint:
    """Loads what `save_checkpoint` wrote; the model computes block-skip attention at once.

    Args:
        dtype: of the weights; by default as saved.
        sparse: False leaves the model dense, as any other tool loads it.
        keywords: for `from_pretrained`, such as `device_map="auto"`.

    Raises:
        MissingError: where the directory, or a part of it, is not there.
        ModelError: where it holds another format.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = Path(directory)
    for name in ("config.json", CONFIGURATION):
        if not (directory / name).is_file():
            raise MissingError(
                "not a saved sparse model", where=str(directory), found=f"no {name}", fix="save it with save_checkpoint"
            )
    about = json.loads((directory / "config.json").read_text(encoding="utf-8")).get(_KEY, {})
    if about.get("format") != _FORMAT:
        raise ModelError(
            "a checkpoint of another version", where=str(directory), found=f"format {about.get('format')!r}",
            fix=f"this version reads format {_FORMAT}; save it again",
        )  # fmt: skip
    config, unit = load_config(directory / CONFIGURATION), str(about.get("unit", "head"))
    kind = _model_class(AutoConfig.from_pretrained(directory)) or AutoModelForCausalLM
    try:
        model = kind.from_pretrained(directory, dtype=dtype or "auto", use_safetensors=True, **keywords).eval()
    except OSError as error:
        raise MissingError("the weights are not there", where=str(directory), found=str(error).splitlines()[0],
                           fix="save the model again") from None  # fmt: skip
    return Checkpoint(sparsify(model, config, unit=unit) if sparse else model, config, unit)


def _model_class(config: Any) -> Any:
    import transformers

    names = getattr(config, "architectures", None) or []
    return getattr(transformers, names[0], None) if names else None


def _save_weights(model: Any, directory: Path) -> None:
    try:
        model.save_pretrained(directory)
    except (ValueError, OSError) as error:
        raise ModelError(
            "the model cannot be saved", where=str(directory), found=str(error).splitlines()[0],
            fix="load it unquantized, and check the space on the disk",
        ) from None  # fmt: skip


@contextmanager
def _plain(model: Any, extra: dict[str, Any]) -> Iterator[None]:
    """The model as its own tools know it, under the name of its own attention, with `extra` in its `config.json`."""
    config = model.config
    kept = {name: getattr(config, name) for name in extra if hasattr(config, name)}
    attention = config._attn_implementation
    if layers_of(model):
        model.set_attn_implementation(getattr(model, "_block_skip_before", "eager"))
    for name, value in extra.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name in extra:
            if name in kept:
                setattr(config, name, kept[name])
            else:
                delattr(config, name)
        if layers_of(model):
            model.set_attn_implementation(attention)
