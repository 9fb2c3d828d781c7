# SPDX-License-Identifier: MIT
"""Each chapter file works when it is copied alone, with torch as the only package."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chapters import Chapter, discover

ONLY_TORCH = Path(__file__).with_name("only_torch.py")
SENTENCE = "the {} of the {} saw {} and {} at the river. "
WORDS = ["farmer", "cow", "teacher", "letter", "water", "house", "road", "friend"]


def run(folder, *arguments, timeout=300):
    """A Python process in `folder` that finds torch and no other package."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1"}
    return subprocess.run(
        [sys.executable, str(ONLY_TORCH), *map(str, arguments)],
        cwd=folder,
        env=env,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
    )


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def top_level_imports(source):
    """The modules that a file imports when it is imported, without their submodules."""
    found = set()
    pending = list(ast.parse(source).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0] if not node.level else ".")
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return found


@pytest.fixture(params=discover(), ids=str)
def chapter(request):
    return request.param


@pytest.fixture
def alone(chapter, tmp_path):
    """The chapter's file, copied into an empty folder."""
    return Path(shutil.copy(chapter.script, tmp_path))


def test_only_the_standard_library_and_torch_are_imported_at_the_top(chapter):
    foreign = top_level_imports(chapter.source) - sys.stdlib_module_names - {"torch"}
    assert not foreign, f"{chapter.path} imports {foreign} at its top level"


QUIET_IMPORT = """
import os, random, signal, sys, warnings
import torch

def state():
    return [
        torch.get_rng_state().tolist(), random.getstate(), torch.get_default_dtype(),
        torch.get_num_threads(), torch.is_grad_enabled(), dict(os.environ), os.getcwd(),
        signal.getsignal(signal.SIGINT), list(warnings.filters), list(sys.path),
    ]

before, modules = state(), set(sys.modules)
import {name}
assert state() == before, "the import changed the state of the process"
print(sorted({{m.partition('.')[0] for m in set(sys.modules) - modules}}))
"""


def test_the_import_is_quiet_and_has_no_side_effect(alone):
    done = run(alone.parent, "-c", QUIET_IMPORT.format(name=alone.stem))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed = done.stdout.splitlines()
    assert len(printed) == 1, f"the import prints: {printed[:-1]}"
    loaded = set(ast.literal_eval(printed[0]))
    assert not loaded - sys.stdlib_module_names - {"torch", alone.stem}
    assert files(alone.parent) == [alone.name]


TRAIN = """
import torch
import {name} as chapter

torch.manual_seed(1)
config = chapter.TINY
model = chapter.Transformer(config)
low, high = 5, min(config.vocab_size, 200)
tokens = torch.randint(low, high, (2, 9))
source = torch.randint(low, high, (2, 7))
pair = hasattr(chapter, "greedy")

logits = model(source, tokens) if pair else model(tokens)
assert logits.shape == (2, 9, config.vocab_size), logits.shape

batch = (source, tokens) if pair else tokens
def value():
    out = chapter.loss(model, batch)
    return out[0] if isinstance(out, tuple) else out

model.eval()
first = value().item()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for _ in range(2):
    optimizer.zero_grad()
    value().backward()
    optimizer.step()
last = value().item()
assert last < first, (first, last)

if pair:
    out = chapter.greedy(model, source)
    assert len(out) == 2
    assert len(chapter.beam_search(model, source, beams=3)) == 2
else:
    out = chapter.generate(model, tokens, 4)
    assert out.shape == (2, 13), out.shape
    assert torch.equal(out[:, :9], tokens)
"""


def test_it_builds_generates_and_learns_from_tensors(alone):
    done = run(alone.parent, "-c", TRAIN.format(name=alone.stem))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""
    assert files(alone.parent) == [alone.name]


def text_lines(count):
    n = len(WORDS)
    for i in range(count):
        picked = WORDS[i % n], WORDS[i // n % n], WORDS[i * 7 % n], WORDS[i * 3 % n]
        yield SENTENCE.format(*picked)


def write_data(chapter, folder):
    """Any text will do; chapter 1 takes pairs, two columns with a tab between."""
    if "def beam_search" in chapter.source:
        lines = [f"{text}\t{text.upper()}" for text in text_lines(400)]
        path = folder / "any.tsv"
    else:
        lines, path = list(text_lines(500)), folder / "any.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return path


def test_it_trains_on_any_text_and_generates_from_what_it_wrote(chapter, alone):
    folder = alone.parent
    data = write_data(chapter, folder)
    done = run(
        folder, alone.name, "train", "--data", data, "--steps", 2, "--out", "run"
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    written = {p.name for p in (folder / "run").iterdir()}
    assert {"config.json", "log.csv"} <= written
    assert {"model.safetensors", "pytorch_model.bin"} & written
    assert not [name for name in written if name.endswith((".tmp", ".partial"))]
    assert set(files(folder)) - {f"run/{n}" for n in written} == {
        alone.name,
        data.name,
        "run",
    }
    if "def beam_search" in chapter.source:
        command = ["translate", "--model", "run", "the farmer saw the river."]
    else:
        command = ["generate", "--model", "run", "--prompt", "the farmer"]
        command += ["--max-new-tokens", 5]
    done = run(folder, alone.name, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", ["verify", "demo", None])
def test_what_is_missing_is_named_in_one_line(alone, command):
    done = run(alone.parent, alone.name, *filter(None, [command]))
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    (line,) = done.stderr.strip().splitlines()
    assert "transformers" in line or "data" in line, line
    if command == "verify":
        assert "transformers" in line and "pip install" in line
    assert files(alone.parent) == [alone.name]


# ---------------------------------------------------------------------------
# the checkers' own tests
# ---------------------------------------------------------------------------


def test_the_runner_hides_every_package_but_torch(tmp_path):
    for name in ("numpy", "transformers", "tiktoken", "tqdm", "safetensors"):
        done = run(tmp_path, "-c", f"import {name}")
        assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr
    code = (
        "import importlib.util as u; print(u.find_spec('numpy'), __import__('torch'))"
    )
    done = run(tmp_path, "-c", code)
    assert done.stdout.startswith("None <module 'torch'"), done.stderr


def test_imports_are_seen_wherever_they_run_at_import_time():
    source = "\n".join(
        [
            "import os.path",
            "from torch import nn",
            "try:\n    import numpy as np\nexcept ImportError:\n    np = None",
            "if True:\n    from tqdm import tqdm",
            "class A:\n    import regex",
            "def f():\n    import transformers",
            "from . import sibling",
        ]
    )
    assert top_level_imports(source) == {"os", "torch", "numpy", "tqdm", "regex", "."}


LOUD = {
    "prints": "print('hello')",
    "seeds": "import torch\ntorch.manual_seed(3)",
    "environment": "import os\nos.environ['A_SETTING'] = '1'",
    "writes": "open('log.txt', 'w').close()",
    "numpy": "import numpy",
}


@pytest.mark.parametrize("case", LOUD)
def test_a_side_effect_of_the_import_is_caught(case, tmp_path):
    folder = tmp_path / "ch01_loud"
    folder.mkdir()
    script = folder / "loud.py"
    script.write_text(LOUD[case] + "\n", encoding="utf-8")
    copied = Path(shutil.copy(Chapter(script).script, tmp_path))
    shutil.rmtree(folder)
    with pytest.raises(AssertionError):
        test_the_import_is_quiet_and_has_no_side_effect(copied)
