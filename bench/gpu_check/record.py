"""What a stage leaves: a JSON file, written anew whenever something is added, so that a stage cut short leaves what it
had."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Record:
    """A dict that is a file.

    `problems` are what makes a stage fail; `lacking` is what this machine has not, and the stage went on without.
    """

    def __init__(self, path: Path):
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.data.setdefault("problems", [])
        self.data.setdefault("lacking", [])

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.data[key] = value
        self.save()

    def get(self, key: str, default: Any = None) -> Any:
        return self.data.get(key, default)

    def problem(self, text: str) -> None:
        print(f"PROBLEM: {text}", flush=True)
        self.data["problems"].append(text)
        self.save()

    def lacks(self, text: str) -> None:
        print(f"lacking: {text}", flush=True)
        if text not in self.data["lacking"]:
            self.data["lacking"].append(text)
        self.save()

    def save(self) -> None:
        """Replaces the file as a whole: a reader, or a kill, never meets half of it."""
        temporary = self.path.with_name(f".{self.path.name}.new")
        temporary.write_text(json.dumps(self.data, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)
