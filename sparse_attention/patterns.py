"""Which settings each attention module gets: the patterns of a configuration applied to the modules of a model.

A pattern (``fnmatch``, case-insensitive) is tried on the dotted module name and on the class name, so that
``*attention*`` finds a ``LlamaAttention`` called ``model.layers.0.self_attn``. The caller passes only modules that
compute attention, so that it never finds ``post_attention_layernorm``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from sparse_attention import callables
from sparse_attention.config import PatternKey, SparseAttentionAttributeConfig, SparseAttentionConfig
from sparse_attention.config_calibration import CalibrationConfig
from sparse_attention.errors import ConfigError, ModelError
from sparse_attention.threshold import PHASES, Phase, PhaseThreshold, Thresholds

DEFAULT = "default"
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class AttentionModule:
    """A module that computes attention: a candidate for the patterns."""

    name: str
    class_name: str


@dataclass(frozen=True, slots=True)
class ResolvedAttention:
    """Everything the configuration says about one module, defaults filled in.

    ``is_causal_explicit`` tells a value that a pattern set, and which must therefore agree with the model, from the
    default, which gives way to it.
    """

    enable: bool
    thresholds: Thresholds
    method: str = "flash_skip_softmax"
    br: int = 128
    bc: int = 128
    backend: Literal["pytorch", "cuda"] = "pytorch"
    is_causal: bool = True
    is_causal_explicit: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for reports and file metadata."""
        return asdict(self)


def match(config: SparseAttentionConfig, candidates: Sequence[AttentionModule]) -> dict[PatternKey, tuple[str, ...]]:
    """Names of the modules that each pattern finds, in the configuration's order, ``default`` left out.

    Raises:
        ConfigError: where a pattern finds nothing, or a callable fails.
        ModelError: where there is no candidate at all.
    """
    if not candidates:
        raise ModelError(
            "no module of this model computes attention",
            fix="pass the whole model; attention written by hand is found around scaled_dot_product_attention",
        )
    found = {
        key: tuple(module.name for module in candidates if _matches(key, module))
        for key in config.sparse_cfg
        if key != DEFAULT
    }
    empty = [callables.label(key) for key, names in found.items() if not names]
    if empty:
        raise ConfigError(
            "a pattern matches no attention module" if len(empty) == 1 else "patterns match no attention module",
            where="sparse_cfg",
            found=", ".join(empty),
            fix=f"remove it, or match the name or class of one of {_listing(candidates)}",
        )
    return found


def resolve(config: SparseAttentionConfig, candidates: Sequence[AttentionModule]) -> dict[str, ResolvedAttention]:
    """Settings of every candidate, by module name.

    ``default`` first, then the matching patterns in order, later ones overriding field by field and threshold phase
    by phase. A module that some pattern matches is enabled unless a pattern says otherwise; one that none matches
    does what ``default`` says, and without ``default`` stays dense.

    Args:
        config: a validated configuration.
        candidates: the modules of the model that compute attention.

    Raises:
        ConfigError: as ``match``; where there is no pattern; where calibrated layers are not in the model.
        ModelError: where there is no candidate at all.
    """
    if not config.sparse_cfg:
        raise ConfigError(
            "the configuration has no pattern, so nothing would be sparse",
            where="sparse_cfg",
            fix='add one, such as "*attention*": {"threshold": 0.001}',
        )
    matched = match(config, candidates)
    _check_calibrated_layers(config, matched, candidates)
    default = config.sparse_cfg.get(DEFAULT, {})
    return {
        module.name: _merge(
            module.name,
            default,
            [config.sparse_cfg[key] for key, names in matched.items() if module.name in names],
        )
        for module in candidates
    }


def _matches(key: PatternKey, module: AttentionModule) -> bool:
    if isinstance(key, str):
        return any(fnmatchcase(text.lower(), key.lower()) for text in (module.name, module.class_name))
    try:
        return bool(key(module.name))
    except Exception as error:
        raise ConfigError(
            "a callable pattern failed",
            where=f"sparse_cfg[{callables.label(key)}]",
            found=f"{type(error).__name__}: {error}, for the module {module.name!r}",
            fix="it takes the dotted name of a module and returns True or False",
        ) from error


def _merge(name: str, default: Mapping[str, Any], patterns: Sequence[Mapping[str, Any]]) -> ResolvedAttention:
    fields: dict[str, Any] = {}
    phases: dict[Phase, PhaseThreshold] = {}
    for given in (default, *patterns):
        fields.update(given)
        phases.update(_phases(name, given))
    # `enable: false` of `default` speaks of modules that nothing matches; a matched one needs no `enable: true`.
    fields["enable"] = next(
        (given["enable"] for given in reversed(patterns) if "enable" in given),
        True if patterns else default.get("enable", False),
    )
    filled = SparseAttentionAttributeConfig.model_construct(**fields)
    return ResolvedAttention(
        enable=filled.enable,
        thresholds=Thresholds(**phases) if phases else Thresholds.of(filled.threshold),
        method=filled.method,
        br=filled.br,
        bc=filled.bc,
        backend=filled.backend,
        is_causal=filled.is_causal,
        is_causal_explicit="is_causal" in fields,
    )


def _phases(name: str, given: Mapping[str, Any]) -> dict[Phase, PhaseThreshold]:
    """The phases that one pattern gives this module a λ for; a calibration not yet run gives none."""
    found: dict[Phase, PhaseThreshold] = {}
    if "threshold" in given:
        threshold = Thresholds.of(given["threshold"])
        named = given["threshold"] if isinstance(given["threshold"], Mapping) else PHASES
        found.update({phase: getattr(threshold, phase) for phase in PHASES if phase in named})
    if given.get("calibration") is not None:
        calibration = CalibrationConfig.model_validate(given["calibration"])
        found.update(calibration.fitted)
        if name in calibration.layers:
            found.update(calibration.layers[name].fitted)
    return found


def _check_calibrated_layers(
    config: SparseAttentionConfig,
    matched: Mapping[PatternKey, tuple[str, ...]],
    candidates: Sequence[AttentionModule],
) -> None:
    """A per-layer result that would not be used means that the calibration belongs to another model or pattern."""
    if config.calibration is None:
        return
    key, calibration = config.calibration
    reached = matched.get(key, tuple(module.name for module in candidates))
    lost = [name for name in calibration.layers if name not in reached]
    if lost:
        raise ConfigError(
            "calibrated layers that this pattern does not reach in this model",
            where=f"sparse_cfg[{callables.label(key)}].calibration.layers",
            found=_shorten(lost),
            fix=f"calibrate this model again, or name its own layers: {_shorten(list(reached))}",
        )


def _listing(candidates: Sequence[AttentionModule]) -> str:
    return f"{len(candidates)} attention modules: " + _shorten(
        [f"{module.name} ({module.class_name})" for module in candidates]
    )


def _shorten(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f", and {more} more" if more > 0 else "")
