"""What a measurement has finished so far, so that a run that was cut off goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparse_attention.errors import UsageError


class QualityState:
    """Finished pieces by key, in memory and in a file where one is named.

    `how` is the fingerprint of the run; a file of another run is refused.
    """

    def __init__(self, path: Path | str | None, how: str) -> None:
        self._path = None if path is None else Path(path)
        self._content: dict[str, Any] = {"how": how, "pieces": {}}
        if self._path is not None and self._path.exists():
            self._content = self._read(self._path, how)

    def __contains__(self, key: str) -> bool:
        return key in self._content["pieces"]

    def __getitem__(self, key: str) -> dict[str, Any]:
        piece: dict[str, Any] = self._content["pieces"][key]
        return piece

    def __setitem__(self, key: str, piece: dict[str, Any]) -> None:
        self._content["pieces"][key] = piece
        if self._path is not None:
            draft = self._path.with_name(self._path.name + ".part")
            try:
                draft.parent.mkdir(parents=True, exist_ok=True)
                draft.write_text(json.dumps(self._content), encoding="utf-8")
                draft.replace(self._path)
            except OSError as error:
                raise UsageError(
                    "the state file cannot be written", where=str(self._path), found=error.strerror or str(error),
                    fix="choose a folder you can write to",
                ) from None  # fmt: skip

    @staticmethod
    def _read(path: Path, how: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            before, _ = content["how"], content["pieces"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UsageError(
                "the state file cannot be read", where=str(path), found=str(error), fix="delete it to start over"
            ) from None
        if before != how:
            raise UsageError(
                "the state file belongs to another run",
                where=str(path),
                found="another model, tiles or unit",
                fix="delete it to start over, or name another file",
            )
        return content
