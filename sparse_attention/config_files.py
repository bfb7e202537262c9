"""YAML, TOML and JSON text to and from plain dicts: strict, safe, and with the place of every mistake."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sparse_attention.errors import ConfigError, MissingError

SUFFIXES = (".yaml", ".yml", ".toml", ".json")


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a configuration file holds.

    Raises:
        MissingError: where there is no such file.
        ConfigError: on an unknown suffix, unreadable or empty text, a syntax error (with line and column), a key
            that is given twice, a YAML tag that would run code, or anything but a mapping.
    """
    _check_suffix(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MissingError("the configuration file does not exist", where=str(path), fix="check the path") from None
    except UnicodeDecodeError as error:
        _fail(path, "is not UTF-8 text", found=str(error), fix="save the file as UTF-8")
    except OSError as error:
        _fail(path, "cannot be read", found=error.strerror or str(error), fix="name a readable file")
    value = parse(text, path.suffix.lower(), str(path))
    if value is None or not text.strip():
        _fail(path, "is empty", fix="put at least sparse_cfg into it, or name a preset instead of a file")
    if not isinstance(value, dict):
        _fail(path, "does not hold a mapping", found=type(value).__name__, fix="start with the key sparse_cfg")
    return value


def write_mapping(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping in the format of the path's suffix; whole or not at all.

    Raises:
        ConfigError: on an unknown suffix, or where the file cannot be written.
    """
    _check_suffix(path)
    writers: dict[str, Callable[[Mapping[str, Any]], str]] = {
        ".json": lambda v: json.dumps(v, indent=2, ensure_ascii=False) + "\n",
        ".toml": _toml_document,
    }
    text = writers.get(path.suffix.lower(), _yaml_document)(value)
    draft = path.with_name(path.name + ".part")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        _fail(path, "cannot be written", found=error.strerror or str(error), fix="choose a folder you can write to")


def parse(text: str, suffix: str, where: str) -> Any:
    """The value that ``text`` holds in the format of ``suffix``; ``where`` goes into messages.

    Raises:
        ConfigError: as ``read_mapping``.
    """
    try:
        if suffix == ".toml":
            return tomllib.loads(text)
        if suffix == ".json":
            return json.loads(text, object_pairs_hook=_unique_keys) if text.strip() else None
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        tag = "could not determine a constructor" in (error.problem or "")
        fix = "only plain values are read; remove the tag" if tag else "correct the YAML at this place"
        raise ConfigError("this is not valid YAML", where=place, found=error.problem or str(error), fix=fix) from None
    except yaml.YAMLError as error:
        raise ConfigError("this is not valid YAML", where=where, found=str(error), fix="correct the file") from None
    except json.JSONDecodeError as error:
        place = f"{where}, line {error.lineno}, column {error.colno}"
        raise ConfigError("this is not valid JSON", where=place, found=error.msg, fix="correct it there") from None
    except (ValueError, OverflowError) as error:  # tomllib's error and repeated JSON keys; both name the place or key
        raise ConfigError("the text cannot be read", where=where, found=str(error), fix="correct it there") from None
    except RecursionError:
        raise ConfigError("the text is nested too deeply", where=where, fix="six levels are enough") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that refuses repeated keys, and reads ``1e-3`` as a number (YAML 1.2)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f'the key "{key.value}" is given twice', key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f'the key "{key}" is given twice')
    return dict(pairs)


def _yaml_document(value: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)
    return text


def _toml_document(value: Mapping[str, Any], prefix: str = "") -> str:
    """Tables for dicts, one line for anything else; TOML has no null, so a key without a value is left out."""
    plain = [
        f"{_toml_key(k)} = {_toml_value(v)}\n" for k, v in value.items() if not isinstance(v, dict) and v is not None
    ]
    tables = [(prefix + _toml_key(k), v) for k, v in value.items() if isinstance(v, dict)]
    return "".join(plain) + "".join(f"\n[{name}]\n{_toml_document(v, name + '.')}" for name, v in tables)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _toml_value(value: Any) -> str:
    if value is None:
        raise ConfigError("TOML cannot hold a null in a list", fix="save this configuration as .yaml or .json")
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None) + "}"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and booleans are spelled alike


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        _fail(path, "has an unknown suffix", found=repr(path.suffix), fix=f"use one of {', '.join(SUFFIXES)}")


def _fail(path: Path, what: str, *, found: str = "", fix: str) -> NoReturn:
    raise ConfigError(f"the configuration file {what}", where=str(path), found=found, fix=fix)
