"""The `trtexec` command that builds the same engine."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from export.engine.options import HARDWARE, EngineOptions
from export.engine.shapes import Profile

_LEVELS = {"NONE": "none", "AMPERE_PLUS": "ampere+", "SAME_COMPUTE_CAPABILITY": "sameComputeCapability"}


def trtexec_command(
    onnx: Path, engine: Path, profiles: Sequence[Profile], options: EngineOptions, plugin: Path, major: int
) -> str:
    """One line for a shell; `major` is TensorRT's major version (11 has strong typing without a flag)."""
    words = ["trtexec", f"--onnx={onnx}", f"--saveEngine={engine}", f"--dynamicPlugins={plugin}"]
    if options.plugin_placement == "embedded":
        words.append(f"--setPluginsToSerialize={plugin}")
    if major < 11:
        words.append("--stronglyTyped")
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            words.append(f"--profile={index}")
        for which, flag in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
            words.append(f"{flag}={','.join(f'{name}:{_x(shapes[which])}' for name, shapes in profile.inputs.items())}")
    if options.workspace_gib is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace_gib * 1024:g}M")
    if options.timing_cache is not None:
        words.append(f"--timingCacheFile={options.timing_cache}")
    if options.version_compatible:
        words.append("--versionCompatible")
    level = _LEVELS[HARDWARE[options.hardware_compatibility]]
    if level != "none":
        words.append(f"--hardwareCompatibilityLevel={level}")
    if options.refit:
        words.append("--refit")
    if options.weight_streaming:
        words.append("--allowWeightStreaming")
    if options.optimization_level is not None:
        words.append(f"--builderOptimizationLevel={options.optimization_level}")
    return shlex.join(words)


def _x(shape: Sequence[int]) -> str:
    # trtexec writes a scalar's shape as nothing at all
    return "x".join(str(size) for size in shape)
