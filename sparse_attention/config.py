"""The configuration classes: fields, defaults and meaning of ModelOpt's ``attention_sparsity`` configuration page.

``sparse_cfg`` maps a pattern (or a callable) to *some* fields of ``SparseAttentionAttributeConfig``. Every inner
dict is validated field by field when the configuration is built, and kept as it was given, so that only given
fields override. ``patterns.resolve`` turns it into the settings of each module.

Rules that the page leaves open, settled here:

- A newer spelling, ``thresholds: {"prefill": [0.001]}`` (one value a list), is read and kept as ``threshold``.
- A phase that ``threshold`` does not name is dense, unless another matching pattern names it.
- ``calibration`` is a *request* while a phase has a ``target`` only, and a *result* once it has ``a`` and ``b``
  (or a static ``threshold``). Per-layer results live inside it under ``layers``, by module name, so that one
  pattern, and never more than one, carries ``calibration``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sparse_attention import callables
from sparse_attention.config_base import StrictModel, kept_as_dict, key_errors
from sparse_attention.config_calibration import CalibrationConfig, Lambda
from sparse_attention.errors import ConfigError
from sparse_attention.threshold import PHASES, Phase

__all__ = [
    "CalibrationConfig",
    "FlashSkipSoftmaxConfig",
    "PatternKey",
    "SparseAttentionAttributeConfig",
    "SparseAttentionConfig",
]

PatternKey = str | Callable[[str], bool]

BlockSize = Annotated[int, Field(ge=1)]
ThresholdField = Annotated[
    Annotated[Lambda, Tag("<number>")] | Annotated[dict[Phase, Lambda], Field(min_length=1), Tag("<phases>")],
    # Picking the branch up front keeps pydantic from reporting the errors of both.
    Discriminator(lambda value: "<phases>" if isinstance(value, dict) else "<number>"),
]


_OLD_NAME = {"thresholds": "threshold"}


class SparseAttentionAttributeConfig(StrictModel):
    """Settings of the attention modules that one pattern selects."""

    method: Literal["flash_skip_softmax"] = Field(
        default="flash_skip_softmax", description="The sparse attention method."
    )
    enable: bool = Field(default=True, description="If False, the matched modules stay dense.")
    threshold: ThresholdField = Field(default=0.001, description="λ, one number or one per phase (prefill, decode).")
    br: BlockSize = Field(default=128, description="Rows (queries) of a tile.")
    bc: BlockSize = Field(default=128, description="Columns (keys) of a tile.")
    backend: Literal["pytorch", "cuda"] = Field(
        default="pytorch",
        description="pytorch patches F.softmax and needs attn_implementation='eager'; cuda runs the kernels.",
    )
    is_causal: bool = Field(
        default=True,
        description="Whether attention is causal. Where given, it must agree with the model.",
    )
    calibration: Annotated[dict[str, Any], kept_as_dict(CalibrationConfig)] | None = Field(
        default=None, description="A request to calibrate the thresholds, or its result; in one pattern at most."
    )

    @classmethod
    def normalise(cls, data: dict[Any, Any]) -> dict[Any, Any]:
        if "thresholds" not in data:
            return data
        if "threshold" in data:
            raise key_errors(cls, [("thresholds", "the newer spelling of threshold; give one of them")])
        return {_OLD_NAME.get(key, key): _first_values(cls, v) if key in _OLD_NAME else v for key, v in data.items()}

    @model_validator(mode="after")
    def _one_source_of_thresholds(self) -> SparseAttentionAttributeConfig:
        if self.calibration is None or "threshold" not in self.model_fields_set:
            return self
        calibration = CalibrationConfig.model_validate(self.calibration)
        static = self.threshold if isinstance(self.threshold, dict) else PHASES
        both = [phase for phase in PHASES if phase in calibration.found and phase in static]
        if both:
            raise ValueError(
                f"threshold and calibration both give {' and '.join(both)} a λ; remove one of them, "
                "or change calibration's target to move along the calibrated curve"
            )
        return self


def _key(value: Any) -> PatternKey:
    """A pattern, or a callable, given as such or by its ``module:qualname``."""
    if isinstance(value, str):
        return callables.load(value) if callables.is_spelling(value) else value
    if callable(value):
        return cast(PatternKey, value)
    raise PydanticCustomError("pattern", "a pattern is a string or a callable that takes the module's name")


Key = Annotated[PatternKey, PlainValidator(_key), WithJsonSchema({"type": "string"})]
Settings = Annotated[dict[str, Any], kept_as_dict(SparseAttentionAttributeConfig, _OLD_NAME)]


class SparseAttentionConfig(StrictModel):
    """Which attention modules become sparse, how, and where the export stops.

    Raises:
        pydantic.ValidationError: on anything that cannot be meant; ``config_io.load_config`` turns it into a
            ``ConfigError`` that names the key.
    """

    sparse_cfg: dict[Key, Settings] = Field(
        default={"*attention*": {"enable": True, "method": "flash_skip_softmax"}, "default": {"enable": False}},
        description=(
            "Settings by pattern: case-insensitive, on the module's dotted name or its class name. "
            "'default' applies first, then the others in order."
        ),
    )
    export_format: Literal["onnx", "tensorrt"] | None = Field(
        default=None, description="Where the export stops; null follows the output's suffix."
    )

    @field_validator("sparse_cfg")
    @classmethod
    def _one_calibration(cls, value: dict[PatternKey, dict[str, Any]]) -> dict[PatternKey, dict[str, Any]]:
        carriers = [callables.label(key) for key, given in value.items() if given.get("calibration") is not None]
        if len(carriers) > 1:
            raise ValueError(f"only one pattern may carry calibration, but {len(carriers)} do: {', '.join(carriers)}")
        return value

    def model_dump_json(self, *args: Any, **kwargs: Any) -> str:
        """JSON text; a callable key is written as ``module:qualname``.

        Raises:
            ConfigError: where a callable key cannot be imported by another process.
        """
        for key in self.sparse_cfg:  # here, because inside the serializer pydantic would wrap the error
            callables.spell(key)
        return super().model_dump_json(*args, **kwargs)

    @field_serializer("sparse_cfg", when_used="json")
    def _spelled(self, value: dict[PatternKey, dict[str, Any]]) -> dict[str, Any]:
        return {callables.spell(key): given for key, given in value.items()}

    @property
    def calibration(self) -> tuple[PatternKey, CalibrationConfig] | None:
        """The pattern that carries a calibration, and that calibration."""
        for key, given in self.sparse_cfg.items():
            if given.get("calibration") is not None:
                return key, CalibrationConfig.model_validate(given["calibration"])
        return None

    def calibrated(self, calibration: CalibrationConfig) -> Self:
        """A copy whose calibrating pattern carries ``calibration``, instead of a static λ for the phases it found.

        Raises:
            ConfigError: where no pattern carries a calibration and several could.
        """
        carrier = self.calibration
        candidates = [carrier[0]] if carrier else [key for key in self.sparse_cfg if key != "default"]
        if len(candidates) != 1:
            raise ConfigError(
                "which pattern to calibrate is not clear",
                where="sparse_cfg",
                found=", ".join(map(callables.label, candidates)) or "no pattern",
                fix="give one of them calibration: {prefill: {target: 0.5}}",
            )
        given = dict(self.sparse_cfg[candidates[0]])
        threshold = given.pop("threshold", None)
        if threshold is not None:
            per_phase = threshold if isinstance(threshold, dict) else dict.fromkeys(PHASES, threshold)
            if kept := {phase: value for phase, value in per_phase.items() if phase not in calibration.found}:
                given["threshold"] = kept
        given["calibration"] = calibration.model_dump(exclude_unset=True)
        return type(self).model_validate(
            {"sparse_cfg": {**self.sparse_cfg, candidates[0]: given}, "export_format": self.export_format}
        )


class FlashSkipSoftmaxConfig(SparseAttentionConfig):
    """Skip-softmax with 128 x 128 tiles, and thresholds that are ten times more careful in decode."""

    sparse_cfg: dict[Key, Settings] = Field(
        default={
            "*attention*": {
                "backend": "pytorch",
                "bc": 128,
                "br": 128,
                "enable": True,
                "method": "flash_skip_softmax",
                "threshold": {"decode": 0.0001, "prefill": 0.001},
            },
            "default": {"enable": False},
        },
        description="Settings by pattern, with the defaults of flash_skip_softmax.",
    )


def _first_values(cls: type[BaseModel], value: Any) -> Any:
    """``{"prefill": [0.001]}`` as ``{"prefill": 0.001}``; several values a phase have no meaning in one op."""
    if not isinstance(value, Mapping):
        return value
    for phase, given in value.items():
        if isinstance(given, list) and len(given) != 1:
            raise key_errors(cls, [(("thresholds", str(phase)), f"one value a phase, not {len(given)}")])
    return {phase: given[0] if isinstance(given, list) else given for phase, given in value.items()}
