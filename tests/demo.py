# SPDX-License-Identifier: MIT
"""Runs every chapter's `demo` and ends with one table; or every chapter's `verify`.

    python tests/demo.py demo
    python tests/demo.py verify

Each demo gets an empty folder to work in and writes its row of the table there, as a
JSON object: `chapter`, `did`, `distance` (the largest difference of its logits from
Hugging Face's) and `said`. A chapter that fails is shown; the exit code is then 1.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import unicodedata
from pathlib import Path

from chapters import ROOT, Chapter, discover

HEADER = ("chapter", "what it did", "distance", "what it wrote or said")


def run_demo(chapter: Chapter) -> dict:
    """Runs one demo; its row, or a row that says how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, str(chapter.script), "demo", "--json", str(path)]
        code = subprocess.run(command, cwd=folder).returncode
        if code:
            return failed(chapter, f"exit code {code}")
        try:
            return checked(chapter, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            return failed(chapter, str(error))


def failed(chapter: Chapter, why: str) -> dict:
    row = {"chapter": chapter.name, "did": f"FAILED: {why}", "distance": None}
    return row | {"said": "see its output above", "failed": True}


def checked(chapter: Chapter, row: object) -> dict:
    """The row as it is; ValueError if a demo wrote another thing than it promises."""
    if not isinstance(row, dict) or row.get("chapter") != chapter.name:
        raise ValueError(f"its row is not one of {chapter.name}: {row!r}")
    for name in ("did", "said"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"its row has no text under {name!r}: {row!r}")
    distance = row.get("distance")
    if not isinstance(distance, float | int) or not math.isfinite(distance):
        raise ValueError(f"its row has no finite distance: {row!r}")
    return row


def width(text: str) -> int:
    """Terminal columns: combining signs, as in Devanagari, take none."""
    return sum(unicodedata.category(c) not in ("Mn", "Me", "Cf") for c in text)


def pad(text: str, columns: int) -> str:
    return text + " " * (columns - width(text))


def table(rows: list[dict], columns: int) -> str:
    """The rows as text, long cells wrapped to fit into `columns`."""
    cells = [HEADER]
    for row in rows:
        distance = row["distance"]
        shown = "" if distance is None else f"{distance:.1e}"
        cells.append((row["chapter"], row["did"], shown, row["said"]))
    fixed = [max(width(line[i]) for line in cells) for i in (0, 2)]
    left = max(columns - sum(fixed) - 6, 40)
    widths = [fixed[0], left * 2 // 5, fixed[1], left - left * 2 // 5]
    lines = []
    for number, line in enumerate(cells):
        wrapped = [
            [
                part
                for row in cell.splitlines()
                for part in textwrap.wrap(row, w) or [""]
            ]
            for cell, w in zip(line, widths, strict=True)
        ]
        for i in range(max(map(len, wrapped))):
            parts = [part[i] if i < len(part) else "" for part in wrapped]
            joined = "  ".join(map(pad, parts, widths))
            lines.append(joined.rstrip())
        if number == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)


def demos(chapters: list[Chapter]) -> int:
    started, rows = time.perf_counter(), []
    for chapter in chapters:
        print(f"\n=== {chapter.name}\n", flush=True)
        rows.append(run_demo(chapter))
    columns = shutil.get_terminal_size((100, 24)).columns
    print(f"\n{table(rows, columns)}\n")
    wrong = [row["chapter"] for row in rows if row.get("failed")]
    took = time.perf_counter() - started
    print(
        f"distance: the largest difference from Hugging Face's logits, same weights "
        f"and input, float32. {len(rows)} chapters in {took:.0f} s."
    )
    if wrong:
        print(f"failed: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def verifications(chapters: list[Chapter]) -> int:
    wrong = []
    for chapter in chapters:
        print(f"\n=== {chapter.name}\n", flush=True)
        command = [sys.executable, str(chapter.script), "verify"]
        if subprocess.run(command, cwd=ROOT).returncode:
            wrong.append(chapter.name)
    if wrong:
        print(f"\nfailed: {', '.join(wrong)}", file=sys.stderr)
        return 1
    print(f"\n{len(chapters)} chapters agree with Hugging Face.")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run every chapter's demo or verify.")
    parser.add_argument("command", choices=("demo", "verify"))
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    chapters = discover()
    if not chapters:
        print("demo: no chapter folder was found", file=sys.stderr)
        return 2
    return demos(chapters) if args.command == "demo" else verifications(chapters)


if __name__ == "__main__":
    sys.exit(main())
