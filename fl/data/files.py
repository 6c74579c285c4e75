"""Finding and opening data files: plain, gzip or xz, in a data directory or a folder of it that has the data set's name."""

import gzip
import lzma
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fl.errors import DataError

DATA_VARIABLE = "QUPEDKERN_DATA"
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}


def data_directory(option: str | Path | None) -> Path | None:
    """The directory of data files: the option, else the environment's QUPEDKERN_DATA, else None."""
    given = option if option is not None else os.environ.get(DATA_VARIABLE)
    if not given:
        return None
    directory = Path(given).expanduser()
    if not directory.is_dir():
        raise DataError(f"data: the data directory must exist, got {directory}, correct --data or {DATA_VARIABLE}")
    return directory


def find(directory: Path, folders: Sequence[str], names: Iterable[str]) -> Path | None:
    """The first of these files, with or without .gz or .xz, in the directory's folders of that name or in itself."""
    for folder in [directory / name for name in folders] + [directory]:
        for name in names:
            for suffix in ("", *_OPENERS):
                if (folder / (name + suffix)).is_file():
                    return folder / (name + suffix)
    return None


def need(directory: Path | None, folders: Sequence[str], names: Sequence[str], what: str, source: str) -> Path:
    """find, or one sentence that says which file to put where. source: what to install or download."""
    found = None if directory is None else find(directory, folders, names)
    if found is not None:
        return found
    where = "a data directory, given by --data or " + DATA_VARIABLE
    if directory is not None:
        where = f"{directory} or its folder {folders[0]}"
    raise DataError(f"data: {what} needs the file {names[0]} (or .gz, .xz) in {where}: {source}")


def read(path: Path) -> bytes:
    """A file's content, decompressed."""
    try:
        if path.suffix in _OPENERS:
            with _OPENERS[path.suffix](path, "rb") as file:
                return file.read()
        return path.read_bytes()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"data: {path} cannot be read: {error}") from error
