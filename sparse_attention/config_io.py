"""Configurations from files, presets and dicts, with ``--set`` overrides; back to files; the schema for editors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sparse_attention.config import SparseAttentionConfig
from sparse_attention.config_base import config_error, suggest
from sparse_attention.config_files import SUFFIXES, read_mapping, write_mapping
from sparse_attention.config_overrides import override
from sparse_attention.errors import ConfigError, UsageError
from sparse_attention.presets import PRESETS

Source = Path | str | Mapping[str, Any] | SparseAttentionConfig


def load_config(source: Source, overrides: Sequence[str] = ()) -> SparseAttentionConfig:
    """The validated configuration of a file, a preset, a dict or a configuration object.

    Args:
        source: a path (.yaml, .yml, .toml, .json), the name of a preset, a mapping, or a configuration.
        overrides: ``key=value`` texts, applied in order; values are read as YAML. ``threshold=0.1`` sets a field of
            every pattern but ``default`` (``calibration...`` only where there is a calibration);
            ``sparse_cfg.*attention*.threshold.prefill=0.1`` sets one place, with the pattern in quotes where it
            holds a field's name between dots; ``export_format=onnx`` sets a key of the top.

    Raises:
        ConfigError: with the path of the key, what was found and what is allowed.
        UsageError: for an override that is not ``key=value``.
        MissingError: for a file that does not exist.
    """
    config = _load(source)
    if not overrides:
        return config
    tree = deepcopy(config.model_dump())
    for text in overrides:
        override(tree, text)
    return _validate(type(config), tree, " ".join(f"--set {text}" for text in overrides))


def save_config(config: SparseAttentionConfig, path: Path | str, *, overwrite: bool = False) -> Path:
    """Write ``config`` as YAML, TOML or JSON, by the suffix; ``load_config`` gives an equal one back.

    Raises:
        ConfigError: for an unknown suffix, a path that cannot be written, or a callable key without a name.
        UsageError: where the file exists and ``overwrite`` is not set.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UsageError("the configuration file exists already", where=str(path), fix="choose another name")
    write_mapping(path, json.loads(config.model_dump_json()))
    return path


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a configuration file, for completion and checks in editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **SparseAttentionConfig.model_json_schema()}


def _load(source: Source) -> SparseAttentionConfig:
    if isinstance(source, SparseAttentionConfig):
        return source
    if isinstance(source, Mapping):
        return _validate(SparseAttentionConfig, dict(source), "")
    if isinstance(source, str) and source.lower() in PRESETS:
        return PRESETS[source.lower()].model_copy(deep=True)
    path = Path(source)
    if isinstance(source, str) and path.name == source and not path.suffix and not path.exists():
        raise ConfigError(
            "neither a preset nor a configuration file",
            where=source,
            fix=f"presets: {suggest(source.lower(), PRESETS)}; files end in {', '.join(SUFFIXES)}",
        )
    return _validate(SparseAttentionConfig, read_mapping(path), str(path))


def _validate(kind: type[SparseAttentionConfig], tree: Mapping[Any, Any], source: str) -> SparseAttentionConfig:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise config_error(error, source) from None
