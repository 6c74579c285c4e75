"""A GPU run as one JSON record and a short Markdown table, with what it was to reach beside what it did."""

from __future__ import annotations

import re
from typing import Any

# Of the share or the ratio that a row's name says: pattern, key of the row, least value. Set before anything was measured.
TARGETS: tuple[tuple[str, str, float], ...] = (
    (r"^soft_quantize (float32|bfloat16) m=2$", "of_copy", 0.90),
    (r"^soft_quantize_backward (float32|bfloat16) m=2$", "of_copy", 0.88),
    (r"^soft_quantize float32 m=4$", "of_copy", 0.90),
    (r"^soft_quantize_backward float32 m=4$", "of_copy", 0.88),
    (r"^soft_quantize bfloat16 m=4$", "of_copy", 0.80),
    (r"^soft_quantize_backward bfloat16 m=4$", "of_copy", 0.75),
    (r"^soft_quantize float32 m=16$", "of_copy", 0.70),
    (r"^soft_quantize_backward float32 m=16$", "of_copy", 0.45),
    (r"^soft_quantize bfloat16 m=16$", "of_copy", 0.40),
    (r"^soft_quantize_backward bfloat16 m=16$", "of_copy", 0.25),
    (r"^quped_step (sgd|adam) m=[24]$", "of_copy", 0.88),
    (r"^quped_step (sgd|adam) m=16$", "of_copy", 0.70),
    (r"^(pack_codes|unpack_codes|dequantize) ", "of_copy", 0.88),
    (r"^assign float32 m=16$", "of_copy", 0.75),
    (r"^assign bfloat16 m=16$", "of_copy", 0.60),
    (r"^soft_quantize float32", "eager", 15.0),
    (r"^quped_step (sgd|adam) m=\d+$", "eager", 30.0),
    (r"^lut_linear 4 bits 8192x28672 batch 1$", "of_read", 0.82),
    (r"^lut_linear 3 bits 8192x28672 batch 1$", "of_read", 0.78),
    (r"^lut_linear 2 bits 8192x28672 batch 1$", "of_read", 0.70),
    (r"^lut_linear 1 bits 8192x28672 batch 1$", "of_read", 0.55),
    (r"^lut_linear 4 bits 8192x28672 batch 1$", "bfloat16 matmul", 3.2),
    (r"^lut_linear 3 bits 8192x28672 batch 1$", "bfloat16 matmul", 4.2),
    (r"^lut_linear 2 bits 8192x28672 batch 1$", "bfloat16 matmul", 6.0),
    (r"^lut_linear 1 bits 8192x28672 batch 1$", "bfloat16 matmul", 10.0),
    (r"^lut_linear 4 bits 8192x28672 batch 1, float32", "of_read", 0.65),
    (r"^lut_linear 2 bits 8192x28672 batch 1, float32", "of_read", 0.55),
    (r"^lut_linear 4 bits 8192x28672 batch 1, bfloat16, table a channel", "of_read", 0.65),
    (r"^lut_linear 4 bits 8192x28672 batch 16$", "bfloat16 matmul", 2.5),
    (r"^lut_linear 4 bits 8192x28672 batch 64$", "bfloat16 matmul", 1.5),
    (r"^lut_linear 4 bits 8192x28672 batch 256$", "bfloat16 matmul", 0.55),
    (r"^lut_linear 4 bits 8192x28672 batch 4096$", "bfloat16 matmul", 0.90),
    (r"^lut_linear .* batch \d+$", "bitsandbytes NF4", 1.0),
    (r"^lut_linear .* batch \d+$", "gemlite", 1.0),
    (r"^round of \d+ clients", "serial", 10.0),
)


def judged(row: dict[str, Any]) -> list[str]:
    """Each target of a row that it has a number for: met or missed."""
    found = []
    for pattern, key, least in TARGETS:
        value = row.get(key, row.get("ratios", {}).get(key))
        if value is not None and re.search(pattern, row["name"]):
            shown = (f"{100 * v:.0f} % {key}" if key.startswith("of_") else f"{v:.2f} x {key}" for v in (value, least))
            found.append(f"{'met' if value >= least else 'MISSED'} {' of '.join(shown)}")
    return found


def record(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The journal by kind."""
    found: dict[str, Any] = {"machine": {}, "ceilings": {}, "rows": [], "failures": [], "notes": []}
    for event in events:
        kind = event["event"]
        fields = {key: value for key, value in event.items() if key != "event"}
        if kind == "machine":
            found["machine"] = fields
        elif kind == "ceiling":
            found["ceilings"][fields.pop("name")] = fields
        elif kind == "row":
            targets = judged(fields) if "capability" in found["machine"] else []  # they are a GPU's
            found["rows"].append({**fields, "targets": targets} if targets else fields)
        elif kind == "failed":
            found["failures"].append(f"{fields['what']}: {fields['sentence']}")
        elif kind == "skipped":
            found["notes"].append(f"{fields['part']}: no time was left for {fields['name']} and what follows")
        elif kind == "note":
            found["notes"].append(f"{fields['what']}: {fields['sentence']}")
    return found


def _ceilings(ceilings: dict[str, Any]) -> list[str]:
    lines = ["| ceiling | a second | a clock and multiprocessor |", "| --- | --- | --- |"]
    for name, found in ceilings.items():
        clock = f"{found['per_clock']:.1f}" if "per_clock" in found else ""
        lines.append(f"| {name} | {found['per_second'] / 1e12:.3g} T | {clock} |")
    return lines


def markdown(found: dict[str, Any]) -> str:
    """A short table: medians in microseconds, shares of the ceilings of the same run, and what failed."""
    about = found["machine"]
    backends = "; ".join(f"{name}: {what}" for name, what in about.get("backends", {}).items())
    lines = [f"# {about.get('device', 'no device answered')}", ""]
    lines += [
        f"torch {about.get('torch')}, driver {about.get('driver')}, commit {about.get('commit')}, {about.get('date')}",
        "",
    ]
    lines += [f"Backends: {backends}.", "", *_ceilings(found["ceilings"]), ""]
    for part in ("tests", "sanitizer"):
        rows = [row for row in found["rows"] if row["part"] == part]
        held = sum(row["verdict"] == "passed" for row in rows)
        late = [f"{row['name']} on {row['backend']}" for row in rows if row["verdict"] == "out of time"]
        lines.append(f"{part}: {held} of {len(rows)} passed" + (f"; out of time: {', '.join(late)}." if late else "."))
    lines += ["", "| case | backend | us (p20, median, p80) | of copy | of read | others / kernel | target |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for row in found["rows"]:
        if "times" in row:
            us = ", ".join(f"{value:.1f}" for value in row["times"]["kernel"]["time_us"])
            shares = " | ".join(f"{100 * row[key]:.0f} %" if key in row else "-" for key in ("of_copy", "of_read"))
            others = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
            verdicts = "; ".join(row.get("targets", []))
            lines.append(f"| {row['name']} | {row['backend']} | {us} | {shares} | {others} | {verdicts} |")
    lines += ["", *(f"- {note}" for note in found["notes"])]
    lines += [
        "",
        "Failed:" if found["failures"] else "Nothing failed.",
        *(f"- {what}" for what in found["failures"]),
        "",
    ]
    return "\n".join(lines)
