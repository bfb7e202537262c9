"""`sparse-attention schema`."""

from __future__ import annotations

from export.cli_common import print_json
from sparse_attention import json_schema


def schema() -> None:
    """Print the JSON schema of configuration files, for completion and checks in editors."""
    print_json(json_schema())
