"""``--set key=value``: one change to a configuration, by the path of its key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sparse_attention import callables
from sparse_attention.config import SparseAttentionAttributeConfig, SparseAttentionConfig
from sparse_attention.config_base import suggest
from sparse_attention.config_files import parse
from sparse_attention.errors import UsageError
from sparse_attention.patterns import DEFAULT
from sparse_attention.threshold import PHASES

Tree = dict[Any, Any]

_FIELDS = (*SparseAttentionAttributeConfig.model_fields, "thresholds")
_STEP = r"""(?:"[^"]*"|'[^']*'|\w+)"""
# sparse_cfg, then a pattern (quoted, in brackets or bare: bare ends before the first field), then the field's path.
_OVERRIDE = re.compile(
    rf"""(?:sparse_cfg(?:\.?\[?(?P<quote>["'])(?P<quoted>.+?)(?P=quote)\]?|\.(?P<bare>.+?))\.)?"""
    rf"""(?P<path>(?:{"|".join(_FIELDS)})(?:\.{_STEP})*)\s*=(?P<value>.*)""",
    re.DOTALL,
)
_TOP = re.compile(r"(?P<key>export_format)\s*=(?P<value>.*)", re.DOTALL)


def override(tree: Tree, text: str) -> None:
    """Apply ``key=value`` to ``tree``, the dump of a valid configuration, in place; the caller validates again.

    Values are read as YAML. A key without ``sparse_cfg`` goes to every pattern but ``default``; one below
    ``calibration`` only to the pattern that carries it, where there is one.

    Raises:
        UsageError: for a text that is not ``key=value`` or a key that cannot be found.
        ConfigError: for a value that is not YAML.
    """
    text = text.strip()
    if top := _TOP.fullmatch(text):
        tree[top["key"]] = _value(top["value"], text)
        return
    found = _OVERRIDE.fullmatch(text)
    if found is None:
        raise _not_understood(text)
    path = [step.strip("\"'") for step in re.findall(_STEP, found["path"])]
    value = _value(found["value"], text)
    if path[0] == "thresholds":
        path[0] = "threshold"
    if path[0] == "threshold" and isinstance(value, list) and len(value) == 1:
        value = value[0]
    pattern = found["quoted"] or found["bare"]
    for settings in _broadcast(tree, path[0]) if pattern is None else [_of_pattern(tree, pattern)]:
        _assign(tree, settings, path, value)


def _of_pattern(tree: Tree, pattern: str) -> Tree:
    """Settings of one pattern, added at the end where it is new."""
    written = {key if isinstance(key, str) else callables.label(key): key for key in tree["sparse_cfg"]}
    settings: Tree = tree["sparse_cfg"].setdefault(written.get(pattern, pattern), {})
    return settings


def _broadcast(tree: Tree, field: str) -> list[Tree]:
    patterns = [settings for key, settings in tree["sparse_cfg"].items() if key != DEFAULT]
    if not patterns:
        raise UsageError(
            "there is no pattern to set this on",
            where=f"--set {field}",
            fix=f"name one: --set 'sparse_cfg.*attention*.{field}=...'",
        )
    carriers = [settings for settings in patterns if settings.get("calibration") is not None]
    return carriers if field == "calibration" and carriers else patterns


def _assign(tree: Tree, settings: Tree, path: Sequence[str], value: Any) -> None:
    node = settings
    for step in path[:-1]:
        below = node.get(step)
        if step == "threshold" and node is settings and not isinstance(below, dict):
            below = _per_phase(tree, below)
        node[step] = below if isinstance(below, dict) else {}
        node = node[step]
    node[path[-1]] = value


def _per_phase(tree: Tree, threshold: float | None) -> Tree:
    """The same λ written per phase, so that setting one phase leaves the other as it was."""
    if threshold is None and any("threshold" in settings for settings in tree["sparse_cfg"].values()):
        return {}  # the other phase comes from the pattern that names it
    default = SparseAttentionAttributeConfig.model_fields["threshold"].default
    return dict.fromkeys(PHASES, default if threshold is None else threshold)


def _value(text: str, whole: str) -> Any:
    if not text.strip():
        raise UsageError("an override without a value", where=f"--set {whole}", fix="write key=value, or key=null")
    return parse(text, ".yaml", f"--set {whole}")


def _not_understood(text: str) -> UsageError:
    key, equals, _ = text.partition("=")
    if not equals:
        return UsageError("an override is key=value", where=f"--set {text}", fix="for example: --set threshold=0.1")
    tail = re.split(r"[.\]]", key.strip())[-1]
    names = [*_FIELDS[:-1], *SparseAttentionConfig.model_fields]
    return UsageError(
        "an override names no key of the configuration",
        where=f"--set {text}",
        found=tail,
        fix=f"{suggest(tail, names)}; for example: --set 'sparse_cfg.*attention*.threshold.prefill=0.1'",
    )
