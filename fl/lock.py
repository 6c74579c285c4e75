"""One process at a time in a directory."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fl.errors import CheckpointError


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold a directory, which must exist; the system lets go of it when this process dies, however it dies.

    Raises CheckpointError where another process holds it. Systems without flock (Windows) hold nothing; a file system
    without it is named in a warning.
    """
    try:
        import fcntl
        import os
    except ImportError:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"run: another process is running in {directory}, wait for its end or choose another --out"
            ) from None
        except OSError as error:
            warnings.warn(f"run: {directory} cannot be locked ({error}), start no second run there", stacklevel=3)
        yield
    finally:
        os.close(handle)
