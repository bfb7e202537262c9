"""What all configuration classes share: strictness, and errors that name the key and what it may be."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, GetPydanticSchema, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from sparse_attention.errors import ConfigError


class StrictModel(BaseModel):
    """Frozen, strict (no ``"128"`` for 128, no ``True`` for 1), and explicit about what a key may be called."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _accept(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = cls.normalise(dict(data))
        unknown = [key for key in data if key not in cls.model_fields]
        if unknown:
            raise key_errors(cls, [(str(key), f"unknown key; {suggest(key, cls.model_fields)}") for key in unknown])
        return data

    @classmethod
    def normalise(cls, data: dict[Any, Any]) -> dict[Any, Any]:
        """Translate other accepted spellings into this project's own."""
        return data


def kept_as_dict(model: type[BaseModel], renamed: Mapping[str, str] | None = None) -> GetPydanticSchema:
    """Schema of a dict that is checked as ``model`` (errors carry the key's path) and stays the dict it was.

    Only what was given stays, in the order it was given, in this project's spelling (``renamed``: old to new).
    """
    names = dict(renamed or {})

    def check(value: Any, handler: Callable[[Any], BaseModel]) -> dict[str, Any]:
        given: dict[str, Any] = handler(value).model_dump(exclude_unset=True)
        order = [names.get(key, key) for key in value] if isinstance(value, dict) else list(given)
        return {key: given[key] for key in sorted(given, key=lambda key: order.index(key) if key in order else 99)}

    return GetPydanticSchema(
        lambda _source, handler: core_schema.no_info_wrap_validator_function(
            check,
            handler(model),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value),
        )
    )


def key_errors(cls: type[BaseModel], found: Sequence[tuple[str | tuple[str, ...], str]]) -> ValidationError:
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
        lines.append((key_path(item["loc"]), _SHORT.repr(item["input"]), message))
    if len(lines) == 1:
        path, found, message = lines[0]
        where = f"{source}: {path}" if source and path else source or path
        return ConfigError("the configuration is not valid", where=where, found=found, fix=message)
    listed = "".join(f"\n    {path} = {found}: {message}" for path, found, message in lines)
    return ConfigError(f"the configuration has {len(lines)} mistakes", where=source, found=listed)


# Bounded in depth as well as width: YAML aliases make small files with huge contents.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80
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
