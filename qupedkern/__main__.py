"""What runs on this machine, and why; with `inspect FILE`, what a packed model's file holds; with `first-calls`, what the first
call of each op costs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys

import torch

from qupedkern import backends
from qupedkern._version import __version__
from qupedkern.files.inspect import inspect
from qupedkern.first_calls import table


def machine() -> str:
    """Library, Python, torch and threads in one line, then the table of backends and ops."""
    line = f"qupedkern {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    return f"{line}, {torch.get_num_threads()} threads, {platform.machine()}\n\n{backends()}"


def brief() -> str:
    """The backends in one line."""
    table = backends()
    parts = [f"{name}: {table.unavailable.get(name, text)}" for name, text in table.descriptions.items()]
    return f"qupedkern {__version__}, " + "; ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qupedkern", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    inspection = commands.add_parser("inspect", help="what a packed model's file holds, to the byte")
    inspection.add_argument("file")
    inspection.add_argument("--json", action="store_true", help="the same as JSON")
    calls = commands.add_parser(
        "first-calls", help="run every op twice: what the first call costs (Triton compiles then)"
    )
    calls.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--brief", action="store_true", help="the backends in one line")
    options = parser.parse_args()
    try:
        if options.command == "inspect":
            found = inspect(options.file)
            print(json.dumps(found.as_dict(), indent=1) if options.json else found)
        elif options.command == "first-calls":
            print(table(options.device))
        else:
            print(brief() if options.brief else machine())
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read this has seen enough; Python must not try to write the rest when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
