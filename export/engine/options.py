"""What a user can decide about an engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from export.engine.shapes import DEFAULT_LENGTH
from sparse_attention.errors import UsageError

HARDWARE: dict[str, str] = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}
"""Our words for TensorRT's hardware compatibility levels."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        shapes: `name:min,opt,max` per dimension name, see `export.engine.shapes.parse_shapes`.
        max_length: tokens the default shapes reach to.
        plugin: the plugin library; None looks in the environment and in the build folder.
        plugin_placement: "embedded" into the engine (needs `version_compatible`; the loader must allow host code), or
            "beside" it: whoever loads the engine loads the library first.
        workspace_gib: upper bound of the scratch memory in GiB, None for the whole GPU.
        timing_cache: a file that is read where it exists and written after the build.
        version_compatible: the engine also loads in later versions of TensorRT.
        hardware_compatibility: "none", "ampere+" (Ampere and later) or "same" (same compute capability).
        refit: weights may be exchanged later; weight_streaming: weights may stay in host memory.
        optimization_level: TensorRT's builder optimisation level, 0 to 5.
    """

    shapes: tuple[str, ...] = ()
    max_length: int = DEFAULT_LENGTH
    plugin: Path | None = None
    plugin_placement: Literal["embedded", "beside"] = "beside"
    workspace_gib: float | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatibility: Literal["none", "ampere+", "same"] = "none"
    refit: bool = False
    weight_streaming: bool = False
    optimization_level: int | None = None
    verbose: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.plugin_placement == "embedded" and not self.version_compatible:
            raise UsageError(
                "TensorRT embeds plugin libraries in version-compatible engines only.", where="--plugin-placement",
                found="embedded without --version-compatible", fix="Add --version-compatible, or use `beside`.",
            )  # fmt: skip
        if self.workspace_gib is not None and not self.workspace_gib > 0:
            raise UsageError(
                "The workspace has to be a positive number of GiB.", where="--workspace",
                found=str(self.workspace_gib), fix="Give for example --workspace 4.",
            )  # fmt: skip
        if self.hardware_compatibility not in HARDWARE:
            raise UsageError(
                "There is no such hardware compatibility.", where="--hardware-compatibility",
                found=self.hardware_compatibility, fix=f"Use one of {', '.join(HARDWARE)}.",
            )  # fmt: skip
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(
                "The optimisation level is a number from 0 to 5.", where="--optimization-level",
                found=str(self.optimization_level), fix="Use 3, TensorRT's default.",
            )  # fmt: skip
        if self.max_length < 2:
            raise UsageError(
                "The longest sequence has to be at least 2 tokens.", where="--max-length",
                found=str(self.max_length), fix="Give for example --max-length 4096.",
            )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """For the sidecar: plain values only."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
