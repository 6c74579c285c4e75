"""Instructions per element of three kernels, counted by valgrind, against the numbers in instructions.json.

    python tests/native/count_instructions.py DRIVER            exit code 1 where a kernel takes more than recorded
    python tests/native/count_instructions.py DRIVER --update   record what is counted now

DRIVER is driver_avx2 of tests/native (valgrind knows no AVX-512). Counts do not depend on what else the machine does, so a few
per cent more is a slower kernel; they do depend on the compiler: with another than the recorded one nothing is compared, which
is said and is exit code 0, or 3 with --strict. A case is run with two numbers of repetitions, and start-up cancels in the
difference.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

RECORD = Path(__file__).resolve().parent / "instructions.json"
TOLERANCE = 0.05  # the allowed rise: moved spills and loop heads stay below it, one instruction more in a loop does not
FEW, MANY = 2, 12


def answer(driver: str, question: str) -> list[str]:
    done = subprocess.run([driver, question], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()


def instructions(driver: str, case: str, repeats: int) -> int:
    """All instructions of a process that runs the case so often."""
    command = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    done = subprocess.run([*command, driver, "count", case, str(repeats)], capture_output=True, text=True, check=False)
    found = re.search(r"I\s+refs:\s+([\d,]+)", done.stderr)
    if done.returncode or found is None:
        raise RuntimeError(f"{case}: valgrind gave no count: {done.stderr.strip().splitlines()[-1:]}")
    return int(found.group(1).replace(",", ""))


def count(driver: str) -> dict[str, float]:
    """Instructions per element of each case the driver lists."""
    counts = {}
    for line in answer(driver, "cases"):
        case, elements = line.split()
        more = instructions(driver, case, MANY) - instructions(driver, case, FEW)
        counts[case] = round(more / ((MANY - FEW) * int(elements)), 3)
    return counts


def compare(counted: dict[str, float], recorded: dict[str, float]) -> list[str]:
    """A sentence for each case that is missing, or takes more than recorded."""
    wrong = [f"{case}: recorded, but the driver has no such case" for case in recorded if case not in counted]
    for case, now in counted.items():
        before = recorded.get(case)
        if before is None:
            wrong.append(f"{case}: not recorded; run with --update")
            continue
        print(f"{case:<28} {now:8.3f} instructions an element, recorded {before:8.3f} ({now / before - 1:+.1%})")
        if now > before * (1 + TOLERANCE):
            wrong.append(f"{case}: {now} instructions an element, {now / before - 1:.1%} more than recorded")
        elif now < before * (1 - TOLERANCE):
            print(f"{case}: fewer than recorded; run with --update to hold on to it")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("driver", type=Path)
    parser.add_argument("--update", action="store_true", help="record what is counted now")
    parser.add_argument("--strict", action="store_true", help="exit code 3 where the compiler is not the recorded one")
    options = parser.parse_args()
    if shutil.which("valgrind") is None:
        print("count_instructions: valgrind was not found; install it", file=sys.stderr)
        return 2
    driver = str(options.driver.resolve())
    (compiler,) = answer(driver, "compiler")
    if options.update:
        record = {"compiler": compiler, "isa": "avx2", "instructions_per_element": count(driver)}
        RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(RECORD.read_text(encoding="utf-8"), end="")
        return 0
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if compiler != record["compiler"]:
        print(f"NOT CHECKED: built with {compiler}, the counts of {record['compiler']} say nothing about it")
        return 3 if options.strict else 0
    wrong = compare(count(driver), record["instructions_per_element"])
    for sentence in wrong:
        print(f"count_instructions: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
