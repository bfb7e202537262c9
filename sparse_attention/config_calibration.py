"""The content of ``calibration``: a request for a sparsity, or the thresholds that were found for it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from sparse_attention.config_base import StrictModel, key_errors
from sparse_attention.threshold import PHASES, Phase, PhaseThreshold

Lambda = Annotated[float, Field(ge=0, lt=1, description="λ in [0, 1), natural scale; 0 is dense.")]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class PhaseCalibration(StrictModel):
    """What calibration is asked for, and found, in one phase: λ = ``a * exp(b * target) / length``."""

    target: Fraction = Field(description="Wanted share of skipped tiles.")
    a: Annotated[float, Field(gt=0)] | None = Field(default=None, description="Fitted scale, in tokens.")
    b: float | None = Field(default=None, description="Fitted exponent.")
    threshold: Lambda | None = Field(default=None, description="A fitted λ that does not follow the length.")
    observed: dict[str, JsonValue] | None = Field(default=None, description="What was measured; never read back.")

    @model_validator(mode="after")
    def _one_result(self) -> PhaseCalibration:
        if (self.a is None) != (self.b is None):
            raise ValueError("a and b come together")
        if self.a is not None and self.threshold is not None:
            raise ValueError("give either a and b, or threshold")
        return self

    @property
    def fitted(self) -> PhaseThreshold | None:
        """The λ found, or None while this is only a request."""
        if self.a is not None and self.b is not None:
            return PhaseThreshold(a=self.a, b=self.b, target=self.target)
        return None if self.threshold is None else PhaseThreshold(threshold=self.threshold)


class LayerCalibration(StrictModel):
    """The calibrated phases of one module."""

    prefill: PhaseCalibration | None = None
    decode: PhaseCalibration | None = None

    @property
    def fitted(self) -> dict[Phase, PhaseThreshold]:
        """λ of each phase that has one."""
        found = {phase: getattr(self, phase) for phase in PHASES}
        return {phase: item.fitted for phase, item in found.items() if item is not None and item.fitted is not None}


class CalibrationConfig(LayerCalibration):
    """A request to calibrate, or its result; the content of a pattern's ``calibration``.

    ``target_sparse_ratio`` (a number, or one per phase, 0 leaving a phase out) is read as the phases' ``target``;
    a calibration that names no phase asks for 0.5 in both, the default of ModelOpt.
    """

    strategy: Literal["static", "length", "balanced"] | None = Field(
        default=None,
        description="static: one λ; length: λ follows the length; balanced: the same for every layer by itself, at the "
        "least dropped mass. Left out: balanced.",
    )
    samples: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Texts to calibrate on.")
    max_seqlen: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Tokens a text at most.")
    layers: dict[str, LayerCalibration] = Field(default={}, description="Results by module name, before the phases'.")
    observed: dict[str, JsonValue] | None = Field(default=None, description="What was measured; never read back.")

    @classmethod
    def normalise(cls, data: dict[Any, Any]) -> dict[Any, Any]:
        named = any(phase in data for phase in PHASES) or bool(data.get("layers"))
        if named and "target_sparse_ratio" in data:
            raise key_errors(cls, [("target_sparse_ratio", "another spelling of the phases' target; give one of them")])
        if not named:
            ratio = data.pop("target_sparse_ratio", 0.5)
            ratios = ratio if isinstance(ratio, dict) else dict.fromkeys(PHASES, ratio)
            data.update({phase: {"target": value} for phase, value in ratios.items() if value != 0})
        return data

    @model_validator(mode="after")
    def _asks_for_something(self) -> CalibrationConfig:
        if self.prefill is None and self.decode is None and not self.layers:
            raise ValueError("names no phase; give prefill: {target: 0.5}, decode: {target: 0.5} or both")
        return self

    @property
    def found(self) -> frozenset[Phase]:
        """Phases that have a result, here or under ``layers``."""
        return frozenset(self.fitted).union(*(layer.fitted for layer in self.layers.values()))

    @property
    def pending(self) -> tuple[Phase, ...]:
        """Phases that were asked for and have no result yet."""
        return tuple(phase for phase in PHASES if getattr(self, phase) is not None and phase not in self.found)
