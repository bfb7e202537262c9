"""The README's commands are run as they stand; the test command's own block is checked by its content."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.M | re.S)
SHELL = [block for language, block in BLOCKS if language == "bash"]
RUN = [block for block in SHELL if "not run in tests" not in block and "pytest" not in block]


def environment() -> dict[str, str]:
    """The commands of this very environment, whether it is activated or not."""
    here = str(Path(sys.executable).parent)
    return os.environ | {"PATH": os.pathsep.join([here, os.environ["PATH"]]), "PYTHONPATH": str(ROOT)}


def test_the_readme_has_the_two_commands_of_a_newcomer() -> None:
    test_command = README.split("<!-- test command -->")[1].split("```bash\n")[1].split("\n```")[0]
    assert re.fullmatch(r"pip install -e '\.\[test\]' && python -m pytest( -n \d --dist worksteal)?", test_command)
    assert any("sparse-attention demo" in block for block in SHELL)
    assert RUN


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.splitlines()[0][:40])
def test_commands(block: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_that_the_readme_names_exists() -> None:
    from export.cli import app

    known = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    named = set(re.findall(r"^sparse-attention ([a-z]+)", "\n".join(SHELL), flags=re.M))
    assert {"export", "check", "generate"} <= named <= known


def test_configuration_example_is_valid(tmp_path: Path) -> None:
    from sparse_attention import load_config

    (example,) = (block for language, block in BLOCKS if language == "yaml")
    (tmp_path / "config.yaml").write_text(example)
    assert load_config(tmp_path / "config.yaml").export_format == "onnx"


def test_python_example_runs(tmp_path: Path) -> None:
    """With a tiny model in the place of the one that it downloads."""
    (example,) = (block for language, block in BLOCKS if language == "python")
    model = "from tests.sparse_attention.attention_models import tiny\nmodel = tiny('llama')\nimport torch\n"
    code = re.sub(r"^from transformers.*\n", model, example, flags=re.M)
    code = re.sub(r"^model = AutoModel.*\n", "input_ids = torch.randint(1, 60, (1, 200))\n", code, flags=re.M)
    code = code.replace("tokens=2048", "tokens=200")
    assert "AutoModel" not in code
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.strip().startswith("["), done.stdout + done.stderr
