# SPDX-License-Identifier: MIT
"""Layout, lint and the few rules of form that a machine can hold."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from importlib import metadata
from pathlib import Path

import pytest
from chapters import ROOT, banner_line, discover

# Of code above the banner; from chapter 6 on the file is a whole DeepSeek, with routers
# of two generations, prediction depths, speculation and per-expert checkpoint names.
MOST_LINES = {"ch06": 1150, "ch07": 1400}
USUAL_MOST_LINES = 700
TEXT = {".py", ".md", ".txt", ".tsv", ".csv", ".json", ".ipynb", ".toml", ".yml"}
TEXT |= {".tiktoken", ""}


def tracked():
    """The files of the repository: git's, or without git all visible ones."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    if done.returncode == 0:
        names = done.stdout.decode("utf-8").split("\0")
    else:
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        hidden = ("__pycache__", "out")
        names = [
            path.as_posix()
            for path in paths
            if not any(p.startswith(".") or p in hidden for p in path.parts)
        ]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


FILES = tracked()
PYTHON = [path for path in FILES if path.suffix == ".py"]


@pytest.mark.parametrize("command", [["format", "--diff"], ["check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(command):
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr


def requirements():
    """The pinned version of each package; every line says what needs it."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = [re.fullmatch(r"([\w.-]+)==([\w.]+) +# (\S.*)", line) for line in lines]
    assert all(found), f"not 'name==version  # what needs it': {lines}"
    return {canonical(match[1]): match[2] for match in found}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_pinned_versions_are_installed():
    installed = {name: metadata.version(name) for name in requirements()}
    bare = {name: version.partition("+")[0] for name, version in installed.items()}
    assert bare == requirements(), "run: pip install -r requirements.txt"


def test_every_imported_package_is_pinned():
    own = {path.stem for path in PYTHON}
    owners = metadata.packages_distributions()
    brought = {"ipython", "nbformat", "nbclient", "ipykernel"}  # by jupyter and nbval
    wrong = set()
    for path in PYTHON:
        for name in imports(path.read_text(encoding="utf-8")):
            if name in sys.stdlib_module_names or name in own:
                continue
            dists = {canonical(dist) for dist in owners.get(name, [name])}
            if not dists & (requirements().keys() | brought):
                wrong.add(f"{path.name} imports {name}")
    assert not wrong, f"not in requirements.txt: {sorted(wrong)}"


def imports(source):
    """The top-level names of all modules that a file imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_every_python_file_names_its_licence_first():
    first = "# SPDX-License-Identifier: MIT"
    lines = {path: path.read_text(encoding="utf-8").split("\n")[0] for path in PYTHON}
    wrong = [path.name for path, line in lines.items() if line != first]
    assert PYTHON and not wrong, f"without {first!r} as the first line: {wrong}"


def test_text_files_are_utf8_with_unix_line_ends():
    wrong = [path.name for path in FILES if path.suffix in TEXT and not is_plain(path)]
    assert FILES and not wrong, f"not UTF-8, or with carriage returns: {wrong}"


def is_plain(path):
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\r\n" not in content


def code_lines(source):
    """Lines with code: no blank ones, comments or docstrings."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                lines -= set(range(value.lineno, value.end_lineno + 1))
    return lines


@pytest.mark.parametrize("chapter", discover(), ids=str)
def test_the_model_stays_short(chapter):
    cut = banner_line(chapter.source)
    assert cut <= len(chapter.source.splitlines()), (
        f"{chapter.path} has no comment '# running the chapter' below its model"
    )
    count = sum(line < cut for line in code_lines(chapter.source))
    assert count <= MOST_LINES.get(chapter.prefix, USUAL_MOST_LINES), (
        f"{chapter.path}: {count} lines above the banner"
    )


def test_lines_of_code_are_counted(tmp_path):
    source = (
        '"""Doc.\n\nMore."""\n\nx = (\n    1,  # one\n)\n# no\ndef f():\n    "Doc."\n'
    )
    assert code_lines(source) == {5, 6, 7, 9}


def test_carriage_returns_and_other_encodings_are_seen(tmp_path):
    for content, plain in ((b"a\n", True), (b"a\r\n", False), (b"\xff", False)):
        path = Path(tmp_path / "a.txt")
        path.write_bytes(content)
        assert is_plain(path) == plain
