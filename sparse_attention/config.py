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

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetPydanticSchema,
    JsonValue,
    PlainValidator,
    Tag,
    ValidationError,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from sparse_attention import callables
from sparse_attention.errors import ConfigError
from sparse_attention.threshold import PHASES, Phase, PhaseThreshold

PatternKey = str | Callable[[str], bool]

Lambda = Annotated[float, Field(ge=0, lt=1, description="λ in [0, 1), natural scale; 0 is dense.")]
Fraction = Annotated[float, Field(gt=0, lt=1)]
BlockSize = Annotated[int, Field(ge=1)]
ThresholdField = Annotated[
    Annotated[Lambda, Tag("<number>")] | Annotated[dict[Phase, Lambda], Field(min_length=1), Tag("<phases>")],
    # Picking the branch up front keeps pydantic from reporting the errors of both.
    Discriminator(lambda value: "<phases>" if isinstance(value, dict) else "<number>"),
]


class _Base(BaseModel):
    """Frozen, strict (no ``"128"`` for 128, no ``True`` for 1), and explicit about what a key may be called."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _accept(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = cls._normalise(dict(data))
        unknown = [key for key in data if key not in cls.model_fields]
        if unknown:
            raise _errors(cls, [(str(key), f"unknown key; {suggest(key, cls.model_fields)}") for key in unknown])
        return data

    @classmethod
    def _normalise(cls, data: dict[Any, Any]) -> dict[Any, Any]:
        """Translate other accepted spellings into this project's own."""
        return data


class PhaseCalibration(_Base):
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


class LayerCalibration(_Base):
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

    strategy: Literal["static", "length", "balanced"] = Field(
        default="length",
        description="static: one λ; length: λ follows the length; balanced: per-layer λ at the least dropped mass.",
    )
    samples: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Texts to calibrate on.")
    max_seqlen: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Tokens a text at most.")
    layers: dict[str, LayerCalibration] = Field(default={}, description="Results by module name, before the phases'.")
    observed: dict[str, JsonValue] | None = Field(default=None, description="What was measured; never read back.")

    @classmethod
    def _normalise(cls, data: dict[Any, Any]) -> dict[Any, Any]:
        named = any(phase in data for phase in PHASES) or bool(data.get("layers"))
        if named and "target_sparse_ratio" in data:
            raise _errors(cls, [("target_sparse_ratio", "another spelling of the phases' target; give one of them")])
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
    def pending(self) -> tuple[Phase, ...]:
        """Phases that were asked for and have no result yet, neither here nor under ``layers``."""
        done = set(self.fitted).union(*(layer.fitted for layer in self.layers.values()))
        return tuple(phase for phase in PHASES if getattr(self, phase) is not None and phase not in done)


def _kept_as_dict(model: type[BaseModel]) -> GetPydanticSchema:
    """Schema of a dict that is checked as ``model`` (errors carry the key's path) and stays the dict it was.

    Only what was given stays, in the order it was given, in this project's spelling.
    """

    def check(value: Any, handler: Callable[[Any], BaseModel]) -> dict[str, Any]:
        given: dict[str, Any] = handler(value).model_dump(exclude_unset=True)
        order = [_OLD_NAME.get(key, key) for key in value] if isinstance(value, dict) else list(given)
        return {key: given[key] for key in sorted(given, key=lambda key: order.index(key) if key in order else 99)}

    return GetPydanticSchema(
        lambda _source, handler: core_schema.no_info_wrap_validator_function(
            check,
            handler(model),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value),
        )
    )


_OLD_NAME = {"thresholds": "threshold"}


class SparseAttentionAttributeConfig(_Base):
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
    calibration: Annotated[dict[str, Any], _kept_as_dict(CalibrationConfig)] | None = Field(
        default=None, description="A request to calibrate the thresholds, or its result; in one pattern at most."
    )

    @classmethod
    def _normalise(cls, data: dict[Any, Any]) -> dict[Any, Any]:
        if "thresholds" not in data:
            return data
        if "threshold" in data:
            raise _errors(cls, [("thresholds", "the newer spelling of threshold; give one of them")])
        return {_OLD_NAME.get(key, key): _first_values(cls, v) if key in _OLD_NAME else v for key, v in data.items()}

    @model_validator(mode="after")
    def _one_source_of_thresholds(self) -> SparseAttentionAttributeConfig:
        if self.calibration is None or "threshold" not in self.model_fields_set:
            return self
        calibration = CalibrationConfig.model_validate(self.calibration)
        fitted = set(calibration.fitted).union(*(layer.fitted for layer in calibration.layers.values()))
        static = self.threshold if isinstance(self.threshold, dict) else PHASES
        both = [phase for phase in PHASES if phase in fitted and phase in static]
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
        return value
    raise PydanticCustomError("pattern", "a pattern is a string or a callable that takes the module's name")


Key = Annotated[PatternKey, PlainValidator(_key), WithJsonSchema({"type": "string"})]
Settings = Annotated[dict[str, Any], _kept_as_dict(SparseAttentionAttributeConfig)]


class SparseAttentionConfig(_Base):
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


def config_error(error: ValidationError, source: str = "") -> ConfigError:
    """The one message a user gets for a configuration that pydantic refused.

    Args:
        error: what pydantic raised for one of the classes above.
        source: where the configuration came from, such as a file name.
    """
    lines = []
    for item in error.errors(include_url=False):
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "literal_error":
            message = suggest(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))
        if item["type"] in _RANGE_ERRORS and "threshold" in item["loc"]:
            message = "a threshold lies in [0, 1); 0 is dense"
        shown = repr(item["input"])
        lines.append((key_path(item["loc"]), shown if len(shown) <= 80 else shown[:77] + "...", message))
    if len(lines) == 1:
        path, found, message = lines[0]
        where = f"{source}: {path}" if source and path else source or path
        return ConfigError("the configuration is not valid", where=where, found=found, fix=message)
    listed = "".join(f"\n    {path} = {found}: {message}" for path, found, message in lines)
    return ConfigError(f"the configuration has {len(lines)} mistakes", where=source, found=listed)


_RANGE_ERRORS = ("less_than", "greater_than_equal", "finite_number")


def key_path(location: Sequence[str | int]) -> str:
    """A key as a user would write it: ``sparse_cfg["*attention*"].threshold.prefill``."""
    parts = [str(part) for part in location if part not in ("<number>", "<phases>", "[key]")]
    parts = [re.sub(r"^<function (.*) at 0x\w+>$", r"\1", part) for part in parts]
    quoted = {1 if parts[:1] == ["sparse_cfg"] else -1}
    return "".join(
        f'["{part}"]' if index in quoted or not part.isidentifier() else f".{part}" for index, part in enumerate(parts)
    ).removeprefix(".")


def suggest(found: object, allowed: Iterable[str]) -> str:
    """``did you mean "prefill"? allowed: prefill, decode``."""
    names = list(allowed)
    near = difflib.get_close_matches(str(found), names, n=1)
    return (f'did you mean "{near[0]}"? ' if near else "") + f"allowed: {', '.join(names)}"


def _errors(cls: type[BaseModel], found: Sequence[tuple[str | tuple[str, ...], str]]) -> ValidationError:
    """Errors at given keys; raised inside a validator, pydantic puts the outer path before them."""
    return ValidationError.from_exception_data(
        cls.__name__,
        [
            InitErrorDetails(
                type=PydanticCustomError("key", "{message}", {"message": message}),
                loc=(key,) if isinstance(key, str) else key,
                input=key if isinstance(key, str) else key[-1],
            )
            for key, message in found
        ],
    )


def _first_values(cls: type[BaseModel], value: Any) -> Any:
    """``{"prefill": [0.001]}`` as ``{"prefill": 0.001}``; several values a phase have no meaning in one op."""
    if not isinstance(value, Mapping):
        return value
    for phase, given in value.items():
        if isinstance(given, list) and len(given) != 1:
            raise _errors(cls, [(("thresholds", str(phase)), f"one value a phase, not {len(given)}")])
    return {phase: given[0] if isinstance(given, list) else given for phase, given in value.items()}
