"""An engine is only loaded where its record says that it fits; every mismatch names what to do."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest

from export.engine.plugin import PluginLibrary, check_tensorrt
from export.engine.sidecar import (
    Gpu,
    Sidecar,
    check_file,
    check_place,
    read_sidecar,
    require_engine_suffix,
    sidecar_path,
    write_sidecar,
)  # fmt: skip
from sparse_attention.errors import MissingError, UsageError

H100, A100 = Gpu("NVIDIA H100 80GB HBM3", "9.0"), Gpu("NVIDIA A100-SXM4-80GB", "8.0")
PLUGIN = PluginLibrary(Path("libblockskip_tensorrt.so"), "a" * 64, "10.14.1", "1", {})


def record(**changes: Any) -> Sidecar:
    options = {"version_compatible": False, "hardware_compatibility": "none", "plugin_placement": "beside"}
    content = b"engine"
    values: dict[str, Any] = {
        "runtime": "tensorrt", "version": "10.14.1", "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content), "gpu": H100, "plugin": {"sha256": PLUGIN.sha256}, "profiles": {},
        "options": options | changes.pop("options", {}), "configuration": {"a": 1}, "exported": {},
        "onnx_sha256": "", "nodes": 2,
    }  # fmt: skip
    return Sidecar(**(values | changes))


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "out.engine"
    path.write_bytes(b"engine")
    write_sidecar(sidecar_path(path), record())
    return path


def test_round_trip(engine: Path) -> None:
    assert read_sidecar(engine) == record()
    check_file(engine, record())
    check_place(engine, record(), "10.14.1", H100, PLUGIN)


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no record"):
        read_sidecar(tmp_path / "other.engine")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99}', '{"format": 1, "gpu": null}'])
def test_unreadable_record(engine: Path, text: str) -> None:
    sidecar_path(engine).write_text(text)
    with pytest.raises(MissingError, match="cannot be read"):
        read_sidecar(engine)


def test_a_record_that_was_tampered_with(engine: Path) -> None:
    write_sidecar(sidecar_path(engine), dataclasses.replace(record(), options={"plugin_placement": "beside"}))
    with pytest.raises(MissingError, match="cannot be read") as error:
        read_sidecar(engine)
    assert "hardware_compatibility, version_compatible" in str(error.value)


def test_truncated_engine(engine: Path) -> None:
    engine.write_bytes(b"engin")
    with pytest.raises(MissingError, match="cut off") as error:
        check_file(engine, record())
    assert error.value.exit_code == 3
    assert "5 bytes, built with 6" in str(error.value)


def test_tampered_engine(engine: Path) -> None:
    engine.write_bytes(b"Engine")
    with pytest.raises(MissingError, match="not the one that was built"):
        check_file(engine, record())


@pytest.mark.parametrize(
    ("changes", "version", "gpu", "plugin", "words"),
    [
        ({}, "10.15.0", H100, PLUGIN, "another version of TensorRT"),
        ({"options": {"version_compatible": True}}, "9.3.0", H100, PLUGIN, "another version of TensorRT"),
        ({}, "10.14.1", None, PLUGIN, "there is none"),
        ({}, "10.14.1", A100, PLUGIN, "another GPU"),
        ({"options": {"hardware_compatibility": "same"}}, "10.14.1", A100, PLUGIN, "another GPU"),
        (
            {"options": {"hardware_compatibility": "ampere+"}}, "10.14.1", Gpu("Tesla T4", "7.5"), PLUGIN,
            "another GPU",
        ),
        ({}, "10.14.1", H100, None, "plugin library is not the one"),
        ({}, "10.14.1", H100, dataclasses.replace(PLUGIN, sha256="b" * 64), "plugin library is not the one"),
    ],
)  # fmt: skip
def test_wrong_place(
    engine: Path, changes: dict[str, Any], version: str, gpu: Gpu | None, plugin: PluginLibrary | None, words: str
) -> None:
    with pytest.raises(MissingError, match=words) as error:
        check_place(engine, record(**changes), version, gpu, plugin)
    assert error.value.exit_code == 3
    assert error.value.fix


@pytest.mark.parametrize(
    ("changes", "version", "gpu", "plugin"),
    [
        ({"options": {"version_compatible": True}}, "11.4.0", H100, PLUGIN),
        ({"options": {"hardware_compatibility": "ampere+"}}, "10.14.1", A100, PLUGIN),
        ({"options": {"hardware_compatibility": "same"}}, "10.14.1", Gpu("NVIDIA H200", "9.0"), PLUGIN),
        ({"options": {"plugin_placement": "embedded"}}, "10.14.1", H100, None),
        ({"gpu": None, "plugin": None}, "10.14.1", A100, None),
    ],
)
def test_right_place(
    engine: Path, changes: dict[str, Any], version: str, gpu: Gpu, plugin: PluginLibrary | None
) -> None:
    check_place(engine, record(**changes), version, gpu, plugin)


@pytest.mark.parametrize(("headers", "version"), [("8.6.0", "10.14.1"), ("10.14.1", "8.6.0"), ("12.0.0", "11.4.0")])
def test_a_library_for_another_major_version(headers: str, version: str) -> None:
    with pytest.raises(MissingError, match="not supported") as error:
        check_tensorrt(dataclasses.replace(PLUGIN, tensorrt_headers=headers), version)
    assert "TENSORRT_ROOT" in str(error.value)


def test_one_library_serves_tensorrt_10_and_11() -> None:
    check_tensorrt(PLUGIN, "10.14.1")
    check_tensorrt(PLUGIN, "11.4.0")


def test_engine_suffix() -> None:
    require_engine_suffix(Path("a.engine"))
    with pytest.raises(UsageError, match=r"\.engine or \.plan"):
        require_engine_suffix(Path("a.trt"))
