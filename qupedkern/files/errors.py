"""FileError: one printable sentence of bounded length, whatever a file holds."""

from __future__ import annotations

import os
from typing import Any

_LONGEST_PROBLEM = 400  # characters: a sentence may quote the file


class FileError(ValueError):
    """A file that is not a packed model, or not one of this model: one sentence says which part and why."""


def refusal(path: Any, problem: str) -> FileError:
    """The error to raise: the file's name and the problem, on one line."""
    problem = "".join(character if character.isprintable() else "?" for character in problem[: _LONGEST_PROBLEM + 1])
    if len(problem) > _LONGEST_PROBLEM:
        problem = problem[:_LONGEST_PROBLEM] + " ..."
    return FileError(f"load: {os.fspath(path)}: {problem}")
