"""What the tests of plugin and engine builder share: the built library, TensorRT's stand-ins, exported models.

Nothing here needs a GPU. TensorRT-RTX aborts the process on some paths, so everything that loads it runs in a process
of its own; a test without its part is skipped with the command that provides it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from tensorrt_support import HOST, LIBRARY, ROOT, Run, run_process

from sparse_attention import native

sys.path.append(str(ROOT / "tests" / "plugins"))  # the emulation of the kernels, which their own tests are made of

import emulation as emulation_module
from emulation import Emulation


@pytest.fixture(scope="session")
def shared_folder(of_the_run: Path) -> Path:
    """What these tests share."""
    folder = of_the_run / "tensorrt"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def plugin_build(shared_folder: Path, objects: Path) -> Path:
    """Folder with plugin and host, built by their CMake files with the emulation's kernels."""
    for module, wheel in (("kernel_lens", "kernel-lens==2.0.1"), ("triton", "triton==3.9.0")):
        if importlib.util.find_spec(module) is None and "TENSORRT_ROOT" not in os.environ:
            pytest.skip(f"no headers: pip install {wheel}, or set TENSORRT_ROOT and CUDA_HOME")
    for program in ("g++", "gcc", "cmake"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: install a C++ compiler and cmake")
    build = shared_folder / "build"
    with FileLock(shared_folder / "build.lock"):
        if not (shared_folder / "built").exists():
            driver = emulation_module.compile_driver(shared_folder)
            emulation_module.compile_library(shared_folder, objects, str(driver))
            configure = [
                "cmake", "-S", ROOT / "tests/tensorrt/emulated_build", "-B", build, "-DCMAKE_BUILD_TYPE=Debug",
                f"-DGENERATED={shared_folder}", f"-DLIBCUDA={driver}", f"-DPython3_EXECUTABLE={sys.executable}",
            ]  # fmt: skip
            targets = ["blockskip_tensorrt", "blockskip_plugin_host", "blockskip_plugin_walk_c"]
            for command in (configure, ["cmake", "--build", build, "--parallel", "2", "--target", *targets]):
                result = run_process(command)
                assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
            (shared_folder / "built").touch()
    return build


@pytest.fixture(scope="session")
def emulation(plugin_build: Path, shared_folder: Path) -> Emulation:
    """The kernels over the emulated driver that the plugin was built for: launches of this process run their source."""
    return Emulation(shared_folder / emulation_module.DRIVER, shared_folder / native.LIBRARY_NAME)


@pytest.fixture(scope="session")
def plugin_library(plugin_build: Path) -> Path:
    """The plugin library: the one that `BLOCKSKIP_TENSORRT_PLUGIN` names, or one of our own."""
    given = os.environ.get("BLOCKSKIP_TENSORRT_PLUGIN")
    return Path(given).resolve() if given else plugin_build / LIBRARY


@pytest.fixture(scope="session")
def host(plugin_build: Path) -> Path:
    """The program that walks the plugin without TensorRT."""
    return plugin_build / HOST


@pytest.fixture(scope="session")
def run_rtx() -> Run:
    """Runs Python code in a process where `tensorrt_rtx` can be imported."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed: pip install tensorrt-rtx")

    def run(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return run_process([sys.executable, "-c", code, *arguments])

    return run


@pytest.fixture(scope="session")
def run_bindings(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python code in a process where `tensorrt` is the real TensorRT 11 binding on TensorRT-RTX's libraries.

    The binding finds them under the names of TensorRT's own libraries; `libnvinfer_plugin` is an empty stand-in, as
    TensorRT-RTX has none.
    """
    for module, wheel in (("tensorrt_rtx_libs", "tensorrt-rtx"), ("tensorrt_bindings", "tensorrt-cu13-bindings")):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install {wheel}")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler for the stand-in of libnvinfer_plugin: install g++")
    folder = tmp_path_factory.mktemp("tensorrt")
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    assert spec is not None and spec.submodule_search_locations
    libraries = Path(next(iter(spec.submodule_search_locations)))
    (folder / "libnvinfer.so.11").symlink_to(libraries / "libtensorrt_rtx.so.1")
    (folder / "libnvonnxparser.so.11").symlink_to(libraries / "libtensorrt_onnxparser_rtx.so.1")
    stand_in = folder / "plugin.cpp"
    stand_in.write_text('extern "C" bool initLibNvInferPlugins(void*, char const*) { return true; }\n')
    subprocess.run([compiler, "-shared", "-fPIC", stand_in, "-o", folder / "libnvinfer_plugin.so.11"], check=True)
    package = folder / "tensorrt"
    package.mkdir()
    (package / "__init__.py").write_text("from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n")

    def run(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return run_process(
            [sys.executable, "-c", code, *arguments], PYTHONPATH=str(folder), LD_LIBRARY_PATH=str(folder)
        )

    return run
