"""What happened in a GPU run, one line of JSON each, on disk before the next thing begins: a kill loses one row."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """A file that several processes append to, one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **fields: Any) -> None:
        """event: "begin" and "end" of a part's jobs, "row", "failed", "machine", "ceiling"."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **fields}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def events(self) -> list[dict[str, Any]]:
        """All of them, in order; a line that a kill cut short is left out."""
        if not self.path.is_file():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found
