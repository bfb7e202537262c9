"""Moves a calibrated configuration along its curves, to another target sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_attention.config import CalibrationConfig, SparseAttentionConfig
from sparse_attention.errors import ConfigError, UsageError
from sparse_attention.threshold import PHASES, Phase


def at_target(config: SparseAttentionConfig, targets: Mapping[Phase, float]) -> SparseAttentionConfig:
    """A copy whose calibrated curves aim at `targets`, in (0, 1), by phase; other phases stay.

    The slope of a curve was fitted around the target it was calibrated for: far from there, calibrate again.

    Raises:
        ConfigError: where a phase has no curve to move along.
        UsageError: for a target outside (0, 1).
    """
    carrier = config.calibration
    given: dict[str, Any] = carrier[1].model_dump(exclude_unset=True) if carrier else {}
    places = [given, *given.get("layers", {}).values()]
    for phase, target in targets.items():
        if phase not in PHASES or not 0.0 < target < 1.0:
            raise UsageError(
                "not a target", where=f"target {phase}", found=str(target), fix="prefill or decode, between 0 and 1"
            )
        curves = [place[phase] for place in places if isinstance(place.get(phase), dict) and "a" in place[phase]]
        if not curves:
            raise ConfigError(
                "this phase has no calibrated curve to move along", where=f"calibration.{phase}",
                found="a λ that does not follow a target" if phase in given else "nothing",
                fix="calibrate with the strategy length or balanced, for this target",
            )  # fmt: skip
        for curve in curves:
            curve["target"] = float(target)
            curve.pop("observed", None)
    return config.calibrated(CalibrationConfig.model_validate(given))
