# SPDX-License-Identifier: MIT
"""Recorded results: numbers that take too long to recompute in a test.

A file `chNN_x/results/NAME.json` (or `tests/studies/results/NAME.json`) holds

    command     what was run, as it would be typed at the top of the repository
    machine     processor, cores, operating system, Python, torch
    date        when it was run
    sources     what the numbers depend on, each with its hash
    data        the numbers
    files       other files of the same folder that the command wrote, with their hash

and is written by `write`, never by hand. A figure or a csv in `results/` has to be
listed under `files` of such a record.

A source is written `path`, `path::model` or `path::Name`, from the top of the
repository. Of a Python file the hash covers the code: not comments, docstrings or
blank lines. `path::model` is the part above the banner *running the chapter*, which is
the model; `path::Name` is one top-level definition with its methods. Of any other file
the hash covers the bytes. Name what the numbers follow from, for a training run
for instance

    sources=["ch02_gpt2/gpt2.py::model", "ch02_gpt2/gpt2.py::Recipe",
             "ch02_gpt2/gpt2.py::Training", "data/stories.txt"]

`python tests/results.py` lists the records whose sources have changed since, and a test
fails while there are any: run the command again. Where a change provably leaves the
numbers as they are, `python tests/results.py --accept PATH --reason TEXT` takes the
new hashes and keeps the reason in the record.
"""

import argparse
import ast
import datetime
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tokenize
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from chapters import ROOT, banner_line

KEYS = {"command", "machine", "date", "sources", "data"}


def machine() -> str:
    """Processor, cores, system and versions, in words; nothing that names a host."""
    import torch

    parts = [processor(), f"{os.cpu_count()} cores", platform.system()]
    parts += [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    parts.append(f"{torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def digest(source: str, root: Path = ROOT) -> str:
    """The hash of a source; ValueError when the file or the definition is not there."""
    name, _, part = source.partition("::")
    path = root / name
    if not path.is_file():
        raise ValueError(f"no such source: {name}")
    if path.suffix != ".py":
        if part:
            raise ValueError(f"{source}: only Python files have parts")
        return hashlib.sha256(path.read_bytes()).hexdigest()
    text = path.read_text(encoding="utf-8")
    nodes, lines = parsed(text)
    kept = range(1, len(text.splitlines()) + 1)
    if part == "model":
        kept = range(1, banner_line(text))
    elif part:
        nodes = [node for node in nodes if part in defined(node)]
        if len(nodes) != 1:
            raise ValueError(f"{name} has {len(nodes)} top-level definitions of {part}")
        decorators = getattr(nodes[0], "decorator_list", [])
        first = min(n.lineno for n in [nodes[0], *decorators])
        kept = range(first, nodes[0].end_lineno + 1)
    code = "\n".join(lines[n] for n in kept if lines[n])
    return hashlib.sha256(code.encode("utf-8")).hexdigest()


@lru_cache(maxsize=16)
def parsed(text: str) -> tuple[list[ast.stmt], dict[int, str]]:
    """Definitions and bare lines; kept, for a file that has many parts as sources."""
    return ast.parse(text).body, bare(text)


def defined(node: ast.stmt) -> set[str]:
    if hasattr(node, "name"):
        return {node.name}
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {target.id for target in targets if isinstance(target, ast.Name)}


def bare(text: str) -> dict[int, str]:
    """The lines by number, without comments and docstrings.

    Not `ast.unparse`, which writes the same code otherwise in another Python.
    """
    lines = dict(enumerate(text.splitlines(), start=1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            lines[line] = lines[line][:column]
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and is_text(body[0]):
            for number in range(body[0].lineno, body[0].end_lineno + 1):
                lines[number] = ""
    return {number: line.rstrip() for number, line in lines.items()}


def is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def write(
    path: str | Path,
    command: str,
    data: Any,
    sources: Iterable[str],
    files: Iterable[str | Path] = (),
    root: Path = ROOT,
) -> None:
    """Record `data` under `path`; the module docstring says what the fields are."""
    path = Path(path)
    record = {
        "command": command,
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "sources": {source: digest(source, root) for source in sources},
        "data": data,
    }
    if not record["sources"]:
        raise ValueError(f"{path}: a record names at least one source")
    if files:
        record["files"] = {
            Path(file).name: file_digest(path.parent / Path(file).name)
            for file in files
        }
    save(path, record)


def save(path: Path, record: dict) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(path)


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(path: Path) -> dict:
    """A record; ValueError names what it lacks."""
    record = json.loads(path.read_text(encoding="utf-8"))
    missing = KEYS - record.keys() if isinstance(record, dict) else KEYS
    missing |= {key for key in KEYS - missing if not record[key]}
    if missing:
        raise ValueError(f"{path.name} lacks {', '.join(sorted(missing))}")
    return record


def folders(root: Path = ROOT) -> list[Path]:
    found = [*root.glob("ch[0-9][0-9]_*/results"), root / "tests/studies/results"]
    return sorted(folder for folder in found if folder.is_dir())


def records(root: Path = ROOT) -> list[Path]:
    return [path for folder in folders(root) for path in sorted(folder.glob("*.json"))]


def changed(path: Path, root: Path = ROOT) -> list[str]:
    """The sources of a record that are not what they were."""
    found = []
    for source, hashed in read(path)["sources"].items():
        try:
            same = digest(source, root) == hashed
        except ValueError:
            same = False
        if not same:
            found.append(source)
    return found


def problems(root: Path = ROOT) -> list[str]:
    """Records that are malformed or stale, and files that no record accounts for."""
    found = []
    for folder in folders(root):
        accounted = set()
        for path in sorted(folder.glob("*.json")):
            shown = path.relative_to(root).as_posix()
            try:
                record = read(path)
            except ValueError as error:
                found.append(f"{shown}: {error}")
                continue
            stale = changed(path, root)
            if stale:
                found.append(
                    f"{shown} was recorded with another {', '.join(stale)}; "
                    f"run again: {record['command']}"
                )
            accounted.add(path.name)
            for name, hashed in record.get("files", {}).items():
                accounted.add(name)
                beside = folder / name
                if not beside.is_file() or file_digest(beside) != hashed:
                    found.append(f"{shown}: {name} is not the file that was recorded")
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            if path.name not in accounted and path.suffix != ".json":
                shown = path.relative_to(root).as_posix()
                found.append(f"{shown}: no record beside it lists it under 'files'")
    return found


def accept(path: Path, reason: str, root: Path = ROOT) -> list[str]:
    """Take the present hashes into a record, with the reason; returns what changed."""
    record, stale = read(path), changed(path, root)
    if stale:
        entry = {"date": datetime.date.today().isoformat(), "sources": stale}
        record.setdefault("accepted", []).append(entry | {"reason": reason})
        record["sources"] = {s: digest(s, root) for s in record["sources"]}
        save(path, record)
    return stale


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        description="List the recorded results whose sources have changed since."
    )
    command.add_argument("--accept", metavar="PATH", type=Path, help="take new hashes")
    command.add_argument("--reason", help="why the numbers of PATH still hold")
    return command


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.accept:
        if not args.reason:
            print("results: --accept needs a --reason", file=sys.stderr)
            return 2
        try:
            stale = accept(args.accept, args.reason)
        except (OSError, ValueError) as error:
            print(f"results: {error}", file=sys.stderr)
            return 2
        print(f"{args.accept}: {', '.join(stale) or 'nothing had changed'}")
        return 0
    found = problems()
    print("\n".join(found) or f"{len(records())} records are current")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
