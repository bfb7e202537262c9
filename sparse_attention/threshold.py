"""λ of one attention module: a constant, or a calibrated curve that follows the length at run time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, cast, get_args

from sparse_attention.errors import ConfigError

Phase: TypeAlias = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True, slots=True)
class PhaseThreshold:
    """λ of one phase, natural scale.

    ``a == 0``: λ is ``threshold``. Otherwise λ = ``a * exp(b * target) / length`` (BLASST, arXiv 2512.12087,
    and ModelOpt's calibration), so that one fit serves every length.

    Args:
        threshold: static λ in [0, 1); 0 is dense.
        a: scale of the calibrated curve, in tokens; 0 selects the static λ.
        b: exponent of the calibrated curve, per unit of sparsity.
        target: wanted share of skipped tiles, in (0, 1), of the calibrated curve.
    """

    threshold: float = 0.0
    a: float = 0.0
    b: float = 0.0
    target: float = 0.0

    def value(self, length: int, scale: float = 1.0) -> float:
        """λ of a call over ``length`` keys, times ``scale``; 0.0 (dense) where that is >= 1, negative or NaN."""
        try:
            base = self.threshold if self.a == 0 else self.a * math.exp(self.b * self.target) / length
        except (OverflowError, ZeroDivisionError):  # an unbounded λ, or no key at all: dense by the same rule
            return 0.0
        value = base * scale
        return value if 0.0 <= value < 1.0 else 0.0

    @property
    def is_dense(self) -> bool:
        """Whether no length can make this phase skip a tile."""
        return self.a == 0 and self.value(1) == 0.0


_FIELDS = tuple(field.name for field in fields(PhaseThreshold))
_ATTRIBUTES = tuple((phase, name, f"{phase}_{name}") for phase in PHASES for name in _FIELDS)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """λ of both phases of one attention module; a phase that is not given is dense."""

    prefill: PhaseThreshold = PhaseThreshold()
    decode: PhaseThreshold = PhaseThreshold()

    @classmethod
    def of(cls, value: float | Mapping[Any, object] | PhaseThreshold | Thresholds) -> Thresholds:
        """Build from whatever a caller has.

        Args:
            value: one λ or ``PhaseThreshold`` for both phases, or a mapping from ``prefill`` / ``decode`` to a λ,
                a ``PhaseThreshold`` or its fields (``{"a": ..., "b": ..., "target": ...}``).

        Raises:
            ConfigError: on an unknown phase or field, or on a value that is not a number.
        """
        if isinstance(value, Thresholds):
            return value
        if isinstance(value, Mapping):
            _refuse_unknown(value, PHASES, "threshold")
            return cls(**{phase: _phase(given, f"threshold.{phase}") for phase, given in value.items()})
        both = _phase(value, "threshold")
        return cls(prefill=both, decode=both)

    def phase(self, query_length: int) -> PhaseThreshold:
        """λ that a call with ``query_length`` query rows uses: decode is exactly one row."""
        return self.decode if query_length == 1 else self.prefill

    def attributes(self) -> dict[str, float]:
        """Flat, under the op's attribute names: ``prefill_threshold``, ``prefill_a`` ... ``decode_target``."""
        return {key: getattr(getattr(self, phase), name) for phase, name, key in _ATTRIBUTES}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, float]) -> Thresholds:
        """The inverse of ``attributes``; other keys are ignored."""
        return cls(*(PhaseThreshold(*(attributes[f"{phase}_{name}"] for name in _FIELDS)) for phase in PHASES))

    @property
    def is_dense(self) -> bool:
        """Whether neither phase can skip a tile."""
        return self.prefill.is_dense and self.decode.is_dense


def threshold_attributes(value: float | Mapping[Any, object] | PhaseThreshold | Thresholds) -> dict[str, float]:
    """`Thresholds.of(value).attributes()`; for a number without the classes, which torch 2.11 cannot compile.

    Raises:
        ConfigError: as `Thresholds.of`.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {key: float(value) if name == "threshold" else 0.0 for _, name, key in _ATTRIBUTES}
    return Thresholds.of(value).attributes()


def _phase(value: object, where: str) -> PhaseThreshold:
    if isinstance(value, PhaseThreshold):
        return value
    if isinstance(value, Mapping):
        _refuse_unknown(value, _FIELDS, where)
        return PhaseThreshold(**{name: _number(given, f"{where}.{name}") for name, given in value.items()})
    return PhaseThreshold(threshold=_number(value, where))


def _number(value: object, where: str) -> float:
    if isinstance(value, (str, bytes, bool)) or not hasattr(value, "__float__"):
        raise ConfigError(
            "a threshold must be a number", where=where, found=repr(value), fix="give a λ in [0, 1); 0 is dense"
        )
    return float(cast(float, value))


def _refuse_unknown(value: Mapping[Any, object], allowed: tuple[str, ...], where: str) -> None:
    for key in value:
        if key not in allowed:
            raise ConfigError(
                "unknown key of a threshold", where=where, found=repr(key), fix=f"allowed: {', '.join(allowed)}"
            )
