# SPDX-License-Identifier: MIT
"""Each chapter's notebook is run whole, teaches its own file, and is fit to be read.

That it runs and gives the stored outputs is nbval's work: the same `pytest` collects
the notebooks cell by cell (`--nbval` in pyproject.toml, tests/nbval.cfg).
"""

import ast
import copy
import json
import os
import re
import subprocess
import sys

import pytest
from chapters import ROOT, discover, top_level_names

LONGEST_CELL = 15  # lines of code; STYLE asks for about 12
FIGURES, EXERCISES = 4, 3
METADATA = {"kernelspec", "language_info"}
CELL_METADATA = {"tags"}
PATHS = re.compile(
    r"/home/|/Users/|/root/|/tmp/|[A-Z]:\\\\?Users|" + re.escape(ROOT.as_posix() + "/")
)


def text_of(part):
    return "".join(part) if isinstance(part, list) else part


def code_cells(notebook):
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    return [c for c in cells if text_of(c["source"]).strip()]


def plain(source):
    """A cell's source without IPython's magics and shell lines, for `ast`."""
    lines = source.splitlines()
    return "\n".join("pass" if line.startswith(("%", "!")) else line for line in lines)


def bound(tree):
    """The names that a cell defines or assigns at its top level."""
    names, pending = set(), list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {a.asname or a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        else:
            scopes = ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp
            if not isinstance(node, scopes | ast.GeneratorExp):
                pending += ast.iter_child_nodes(node)
    return names


def imported(tree, module):
    """The names that a cell takes from the chapter's module, and the module itself."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == module:
            names |= {a.name for a in node.names if a.asname in (None, a.name)}
        elif isinstance(node, ast.Import):
            names |= {a.asname or a.name for a in node.names if a.name == module}
    return names


def problems(notebook, module, source):
    """What keeps a notebook from being fit; `source` is its chapter's file."""
    return [
        *executed(notebook),
        *readable(notebook),
        *own_names(notebook, module, source),
        *exercises(notebook),
        *clean(notebook),
    ]


def executed(notebook):
    """Run from top to bottom, without an error, with its outputs stored."""
    cells = code_cells(notebook)
    counts = [cell["execution_count"] for cell in cells]
    if counts != list(range(1, len(counts) + 1)):
        yield f"not run once from top to bottom: the cells are numbered {counts}"
    kinds = [o["output_type"] for cell in cells for o in cell["outputs"]]
    if "error" in kinds:
        yield "a cell ends in an error"
    if not kinds:
        yield "it has no outputs"
    streams = [o for c in cells for o in c["outputs"] if o.get("name") == "stderr"]
    for output in streams:
        yield f"a cell writes to stderr: {text_of(output['text'])[:80]!r}"


def readable(notebook):
    """Small cells, and enough figures."""
    for cell in code_cells(notebook):
        lines = text_of(cell["source"]).strip().splitlines()
        if len(lines) > LONGEST_CELL:
            number, size = cell["execution_count"], len(lines)
            yield f"cell {number} has {size} lines, over {LONGEST_CELL}: {lines[0]}"
    outputs = [o for c in code_cells(notebook) for o in c["outputs"]]
    figures = sum("image/png" in o.get("data", {}) for o in outputs)
    if figures < FIGURES:
        yield f"{figures} figures; at least {FIGURES}"


def own_names(notebook, module, source):
    """Imports its chapter's file, and redefines no name of it."""
    taken, ours = set(), top_level_names(source)
    for cell in code_cells(notebook):
        text = plain(text_of(cell["source"]))
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            yield f"cell {cell['execution_count']} cannot be parsed: {error}"
            continue
        here = imported(tree, module)
        for name in sorted((bound(tree) - here) & ours):
            yield f"cell {cell['execution_count']} redefines {name} of {module}.py"
        taken |= here
    if not taken:
        yield f"it never imports {module}"


def exercises(notebook):
    """Exercises with solutions: headings that say so, each solution with code."""
    asked, solved, section = 0, 0, None
    for cell in notebook["cells"]:
        text = text_of(cell["source"])
        if cell["cell_type"] == "markdown":
            for line in text.splitlines():
                if re.match(r"#+\s.*\bexercise\b", line, re.IGNORECASE):
                    asked, section = asked + 1, "exercise"
                elif re.match(r"(#+\s|\*\*|<summary>).*\bsolution\b", line, re.I):
                    section = "solution"
                elif re.match(r"#+\s", line):
                    section = None
        elif section == "solution" and text.strip():
            solved, section = solved + 1, None
    if asked < EXERCISES:
        yield f"{asked} headings with 'Exercise'; at least {EXERCISES}"
    if solved < asked:
        yield f"{asked} exercises and {solved} solutions with a code cell"


def clean(notebook):
    """Nothing of the author's machine."""
    for key in sorted(notebook["metadata"].keys() - METADATA):
        yield f"its metadata holds {key!r}; only {sorted(METADATA)} belong there"
    kernel = notebook["metadata"].get("kernelspec", {}).get("name")
    if kernel != "python3":
        yield f"its kernel is {kernel!r}; 'python3' is there on every machine"
    for cell in notebook["cells"]:
        for key in sorted(cell["metadata"].keys() - CELL_METADATA):
            yield f"a cell's metadata holds {key!r}; only tags belong there"
    found = PATHS.search(json.dumps(without_images(notebook), ensure_ascii=False))
    if found:
        yield f"it holds a path of the author's machine: {found[0]!r}"


def without_images(notebook):
    stripped = copy.deepcopy(notebook)
    for cell in code_cells(stripped):
        for output in cell["outputs"]:
            for kind in [k for k in output.get("data", {}) if k.startswith("image/")]:
                del output["data"][kind]
    return stripped


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("chapter", discover(), ids=str)
def test_the_chapter_has_one_fit_notebook(chapter):
    found = sorted(chapter.folder.glob("*.ipynb"))
    assert found == [chapter.notebook], f"{chapter.name} needs {chapter.notebook.name}"
    wrong = problems(read(chapter.notebook), chapter.script.stem, chapter.source)
    assert not wrong, "\n".join([chapter.notebook.name, *wrong])


def nbval(path, *options):
    """Runs pytest on a notebook with the repository's settings; its standard output."""
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(path.parent), "-p", "no:cacheprovider", "-rA"]
    command += ["--nbval-sanitize-with", str(ROOT / "tests/nbval.cfg"), *options]
    env = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(
        [*command, path.name],
        cwd=path.parent,
        env=env,
        capture_output=True,
        encoding="utf-8",
    )
    return done.stdout


# ---------------------------------------------------------------------------
# the checker's own tests
# ---------------------------------------------------------------------------

SOURCE = "SIZE = 3\n\n\ndef add(x):\n    return x + 1\n"
IMAGE = {"output_type": "display_data", "data": {"image/png": "/tmp/"}, "metadata": {}}


def code(source, outputs=()):
    cell = {"cell_type": "code", "source": source, "outputs": list(outputs)}
    return cell | {"metadata": {}, "execution_count": None}


def words(source):
    return {"cell_type": "markdown", "source": source, "metadata": {}}


def good():
    cells = [words("# One"), code("from one import add\nimport one as chapter")]
    cells += [code(f"add({i})", [copy.deepcopy(IMAGE)]) for i in range(4)]
    for i in range(3):
        cells += [words(f"### Exercise {i}"), words("**Solution**"), code("x = 1")]
    for number, cell in enumerate((c for c in cells if "outputs" in c), 1):
        cell["execution_count"] = number
    return {"cells": cells, "metadata": {"kernelspec": {"name": "python3"}}}


def test_a_fit_notebook_passes():
    assert problems(good(), "one", SOURCE) == []


def spoil(notebook, case):
    cells = notebook["cells"]
    first = cells[1]
    if case == "order":
        first["execution_count"] = 9
    elif case == "not run":
        first["execution_count"] = None
    elif case == "error":
        first["outputs"] = [{"output_type": "error"}]
    elif case == "stderr":
        first["outputs"] = [{"output_type": "stream", "name": "stderr", "text": "Warn"}]
    elif case == "long":
        first["source"] += "\n" + "x = 1\n" * 15
    elif case == "figures":
        cells[2]["outputs"] = []
    elif case == "redefines":
        cells[2]["source"] = "def add(x):\n    return x"
    elif case == "assigns":
        cells[2]["source"] = "for SIZE in range(3):\n    pass"
    elif case == "imports over":
        cells[2]["source"] = "from operator import add"
    elif case == "no import":
        first["source"] = "import two"
    elif case == "syntax":
        cells[2]["source"] = "def add(:"
    elif case == "exercise":
        cells[6]["source"] = "### Something else"
    elif case == "solution":
        cells[8] = words("no code")
        for number, cell in enumerate((c for c in cells if "outputs" in c), 1):
            cell["execution_count"] = number
    elif case == "metadata":
        notebook["metadata"]["widgets"] = {}
    elif case == "kernel":
        notebook["metadata"]["kernelspec"]["name"] = "book-venv"
    elif case == "cell metadata":
        first["metadata"]["ExecuteTime"] = 1
    elif case == "path":
        first["outputs"] = [
            {"output_type": "stream", "name": "stdout", "text": "/tmp/x"}
        ]
    return notebook


FAULTS = {
    "order": "not run once from top to bottom",
    "not run": "not run once from top to bottom",
    "error": "ends in an error",
    "stderr": "writes to stderr: 'Warn'",
    "long": "has 17 lines, over 15",
    "figures": "3 figures; at least 4",
    "redefines": "cell 2 redefines add of one.py",
    "assigns": "cell 2 redefines SIZE of one.py",
    "imports over": "cell 2 redefines add of one.py",
    "no import": "it never imports one",
    "syntax": "cell 2 cannot be parsed",
    "exercise": "2 headings with 'Exercise'",
    "solution": "3 exercises and 2 solutions",
    "metadata": "its metadata holds 'widgets'",
    "kernel": "its kernel is 'book-venv'",
    "cell metadata": "a cell's metadata holds 'ExecuteTime'",
    "path": "holds a path of the author's machine: '/tmp/'",
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named(case):
    found = problems(spoil(good(), case), "one", SOURCE)
    assert len(found) == 1 and FAULTS[case] in found[0], found


COMPARED = [  # source, stored output, tags, passes
    ("print(6 * 7)", "42\n", [], True),
    ("print(6 * 7)", "41\n", [], False),
    ("print(6 * 7)", "41\n", ["nbval-ignore-output"], True),
    ("print('took', 2.5, 's')", "took 3.5 s\n", [], True),
    ("print(f'{1200:,} tokens/s')", "1,300 tokens/s\n", [], True),
    ("print('loss', 2.5)", "loss 3.5\n", [], False),
    ("print('at', hex(2**40))", "at 0x7fffffff\n", [], True),
    ("raise ValueError('no')", "", [], False),
]


def test_the_settings_compare_outputs_and_not_timings(tmp_path):
    cells = []
    for number, (source, stored, tags, _) in enumerate(COMPARED, 1):
        stream = {"output_type": "stream", "name": "stdout", "text": stored}
        cell = code(source, [stream] if stored else [])
        cells.append(cell | {"metadata": {"tags": tags}, "execution_count": number})
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    path = tmp_path / "small.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    out = nbval(path)
    for number, (source, _, _, passes) in enumerate(COMPARED):
        word = "PASSED" if passes else "FAILED"
        assert re.search(rf"^{word} .*Cell {number}\b", out, re.M), (source, out)


def test_figures_are_not_compared_pixel_by_pixel(tmp_path):
    source = "from IPython.display import Image\nImage(data=b'one', format='png')"
    stored = {"output_type": "execute_result", "execution_count": 1, "metadata": {}}
    data = {
        "image/png": "b3RoZXI=",
        "text/plain": "<IPython.core.display.Image object>",
    }
    cell = code(source, [stored | {"data": data}]) | {"execution_count": 1}
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    path = tmp_path / "figure.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert re.search(r"^PASSED .*Cell 0\b", nbval(path), re.M)
