# SPDX-License-Identifier: MIT
"""The chapters, found by looking: every test over all chapters starts from here.

A chapter is a folder `chNN_name` that holds exactly one Python file. Nothing lists
chapters by hand, so a new folder is picked up by every test, and the order of the
names is the order of the book.
"""

import ast
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent

# The comment that parts the model, which people copy, from what runs the chapter.
BANNER = re.compile(r"^#.*\brunning the chapter\b", re.IGNORECASE)


@dataclass(frozen=True)
class Chapter:
    """One chapter folder and the files that it promises to hold."""

    script: Path

    @property
    def folder(self) -> Path:
        return self.script.parent

    @property
    def name(self) -> str:
        """The folder's name, such as `ch02_gpt2`."""
        return self.folder.name

    @property
    def prefix(self) -> str:
        """The short name, such as `ch02`."""
        return self.name[:4]

    @property
    def path(self) -> str:
        """The script as the Lineage block writes it: `ch02_gpt2/gpt2.py`."""
        return f"{self.name}/{self.script.name}"

    @property
    def notebook(self) -> Path:
        return self.script.with_suffix(".ipynb")

    @property
    def readme(self) -> Path:
        return self.folder / "README.md"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def source(self) -> str:
        return self.script.read_text(encoding="utf-8")

    def __str__(self) -> str:
        return self.name


def discover(root: Path = ROOT) -> list[Chapter]:
    """Every chapter under `root`, in the order of the book.

    A folder without a Python file is no chapter yet (`unfinished` names it); ValueError
    for one with several.
    """
    found = []
    for folder in folders(root):
        scripts = sorted(folder.glob("*.py"))
        if len(scripts) > 1:
            names = ", ".join(path.name for path in scripts)
            raise ValueError(
                f"{folder.name} must hold exactly one Python file, and holds: {names}"
            )
        found += [Chapter(script) for script in scripts]
    return found


def folders(root: Path = ROOT) -> list[Path]:
    """The folders named like chapters."""
    return sorted(p for p in root.glob("ch[0-9][0-9]_*") if p.is_dir())


def unfinished(root: Path = ROOT) -> list[str]:
    """Chapter folders that hold no Python file."""
    return [p.name for p in folders(root) if not list(p.glob("*.py"))]


def find(name: str, root: Path = ROOT) -> Chapter:
    """The one chapter whose folder starts with `name`; ValueError names the choice."""
    name = name.rstrip("/\\")
    chapters = discover(root)
    matches = [c for c in chapters if c.name.startswith(name)]
    exact = [c for c in matches if c.name == name]
    if len(exact or matches) != 1:
        choice = ", ".join(c.name for c in chapters) or "none yet"
        raise ValueError(f"no single chapter starts with {name!r}; chapters: {choice}")
    return (exact or matches)[0]


def load(chapter: Chapter | Path) -> ModuleType:
    """The chapter's file as a module, imported once per process and path."""
    path = chapter.script if isinstance(chapter, Chapter) else Path(chapter)
    path = path.resolve()
    name = path.stem
    module = sys.modules.get(name)
    if module is not None and Path(getattr(module, "__file__", "")) == path:
        return module
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def banner_line(source: str) -> int:
    """The 1-based line of the banner comment; past the last line if there is none."""
    lines = source.splitlines()
    for number, line in enumerate(lines, start=1):
        if BANNER.match(line):
            return number
    return len(lines) + 1


def top_level_names(source: str) -> set[str]:
    """The names that a file defines at its top level: functions, classes, constants."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                names |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names
