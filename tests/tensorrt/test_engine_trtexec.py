"""The printed `trtexec` command says what the builder does."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from export.engine.options import EngineOptions
from export.engine.shapes import Profile
from export.engine.trtexec import trtexec_command
from sparse_attention.errors import UsageError

PREFILL = Profile("prefill", {"ids": ((1, 1), (1, 512), (4, 2048)), "threshold_scale": ((1,), (1,), (1,))})
DECODE = Profile("decode", {"ids": ((1, 1), (1, 1), (4, 1)), "threshold_scale": ((1,), (1,), (1,))})


def words(*profiles: Profile, major: int = 10, **options: object) -> list[str]:
    given = EngineOptions(**options)  # type: ignore[arg-type]
    return shlex.split(
        trtexec_command(Path("my model.onnx"), Path("out.engine"), profiles, given, Path("/lib/p.so"), major)
    )


def test_one_profile() -> None:
    found = words(PREFILL)
    assert found[:4] == ["trtexec", "--onnx=my model.onnx", "--saveEngine=out.engine", "--dynamicPlugins=/lib/p.so"]
    assert "--minShapes=ids:1x1,threshold_scale:1" in found
    assert "--optShapes=ids:1x512,threshold_scale:1" in found
    assert "--maxShapes=ids:4x2048,threshold_scale:1" in found
    assert "--stronglyTyped" in found
    assert "--stronglyTyped" not in words(PREFILL, major=11)
    assert not any(word.startswith("--profile") for word in found)


def test_two_profiles_and_every_option() -> None:
    found = words(
        PREFILL, DECODE, plugin_placement="embedded", version_compatible=True, hardware_compatibility="ampere+",
        workspace_gib=0.5, timing_cache=Path("t.cache"), refit=True, weight_streaming=True, optimization_level=5,
    )  # fmt: skip
    assert (
        found.index("--profile=0") < found.index("--profile=1") < found.index("--maxShapes=ids:4x1,threshold_scale:1")
    )
    for word in (
        "--setPluginsToSerialize=/lib/p.so", "--versionCompatible", "--hardwareCompatibilityLevel=ampere+",
        "--memPoolSize=workspace:512M", "--timingCacheFile=t.cache", "--refit", "--allowWeightStreaming",
        "--builderOptimizationLevel=5",
    ):  # fmt: skip
        assert word in found


@pytest.mark.parametrize(
    "options",
    [
        {"plugin_placement": "embedded"},
        {"workspace_gib": 0.0},
        {"hardware_compatibility": "turing"},
        {"optimization_level": 9},
        {"max_length": 1},
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, object]) -> None:
    with pytest.raises(UsageError) as error:
        EngineOptions(**options)  # type: ignore[arg-type]
    assert error.value.fix
