"""A PyPI package named `export` exists; installed beside this project it overwrites our files silently."""

from __future__ import annotations

import importlib.metadata

from sparse_attention.errors import MissingError

DISTRIBUTION = "block-skip-attention"


def intruders() -> tuple[str, ...]:
    """Other distributions that claim the import name `export`."""
    owners = importlib.metadata.packages_distributions().get("export", [])
    return tuple(sorted(set(owners) - {DISTRIBUTION}))


def require_own_package() -> None:
    """Raises MissingError where another distribution named `export` is installed (a look-up by name: cheap)."""
    try:
        found = importlib.metadata.version("export")
    except importlib.metadata.PackageNotFoundError:
        return
    raise MissingError(
        "another package named `export` is installed and has overwritten files of this one",
        where="import export",
        found=f"export {found}",
        fix=f"pip uninstall -y export && pip install --force-reinstall --no-deps {DISTRIBUTION}",
    )
