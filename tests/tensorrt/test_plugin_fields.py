"""The plugin's fields are the op contract's attributes, field by field."""

from __future__ import annotations

import json
from pathlib import Path

from tensorrt_support import run_process

from export import op
from export.engine.prepare import OUTPUTS_ATTRIBUTE


def test_fields_are_the_contract(host: Path, plugin_library: Path) -> None:
    result = run_process([host, plugin_library, "--fields"])
    assert result.returncode == 0, result.stdout + result.stderr
    fields = [json.loads(line) for line in result.stdout.splitlines()]
    contract = [{"name": spec.name, "kind": spec.kind} for spec in op.ATTRIBUTES]
    # The one field more: TensorRT's parser does not tell a plugin which of its outputs a node uses.
    assert fields == [*contract, {"name": OUTPUTS_ATTRIBUTE, "kind": "string"}]
