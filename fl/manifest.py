"""run.json, a run's manifest: what the run is, how many rounds are done, which files hold their outcome. Read whole or refused."""

import json
from pathlib import Path
from typing import Any

from fl.errors import CheckpointError

FORMAT = 2
_FROM_THE_START = {"description": dict, "clients": dict, "threads": int, "built_with": str}
_FROM_ROUND_0 = {"round": int, "server": str, "record_bytes": int}


def server_file(round_number: int) -> str:
    """The name of the file that holds the server's tensors after that round."""
    return f"server.{round_number}.safetensors"


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a run's directory. Raises CheckpointError where it is missing, damaged, foreign or of another format."""
    try:
        manifest = json.loads((directory / "run.json").read_text())
        problem = _problem(manifest)
    except FileNotFoundError:
        problem = "there is no run.json"
    except (OSError, ValueError) as error:
        problem = f"run.json cannot be read: {error}"
    if problem is not None:
        raise CheckpointError(f"run: {directory} holds no run to resume, {problem}, choose another --out")
    return manifest


def _problem(manifest: Any) -> str | None:
    """Why this is no manifest of ours, in words; None where it is one."""
    description = manifest.get("description") if isinstance(manifest, dict) else None
    if not isinstance(description, dict) or "format" not in description:
        return "run.json cannot be read: it describes no run"
    if description["format"] != FORMAT:
        return f"its format is {description['format']}, this version reads {FORMAT}"
    expected = {**_FROM_THE_START, **(_FROM_ROUND_0 if "round" in manifest else {})}
    for key, kind in expected.items():
        if type(manifest.get(key)) is not kind:
            return f"run.json cannot be read: {key} must be {kind.__name__}, got {manifest.get(key)!r:.40}"
    rounds, known = manifest.get("round", 0), description.get("clients")
    if rounds < 0 or manifest.get("record_bytes", 0) < 0:
        return "run.json cannot be read: it counts rounds and bytes below zero"
    if "round" in manifest and manifest["server"] != server_file(rounds):
        return f"run.json cannot be read: server must be {server_file(rounds)}, got {manifest['server']!r:.40}"
    names = {str(number) for number in range(len(known))} if isinstance(known, list) else set()
    for number, at in manifest["clients"].items():
        if number not in names or type(at) is not int or not 0 < at <= rounds:
            return f"run.json cannot be read: client {number!r:.20} cannot have a state of round {at!r:.20}"
    return None
