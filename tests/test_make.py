# SPDX-License-Identifier: MIT
"""`make` sets up `.venv` when it has to, says so, and recovers from what went wrong."""

import os
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
    return folder


def make(folder, *arguments):
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        # `make test` runs these tests: its own level and flags are not for this make.
        env={
            name: value
            for name, value in os.environ.items()
            if name != "PYTHON" and not name.startswith(("MAKE", "MFLAGS"))
        },
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
    for target in set(phony.split()[1:]) - {"help", "setup"}:
        assert f"make {target} " in done.stdout


def test_the_tests_go_on_without_a_network_and_not_past_a_bug(folder):
    (folder / "data").mkdir()
    download = folder / "data/download.py"
    binary = folder / ".venv/bin"
    binary.mkdir(parents=True)
    (folder / ".venv/.installed").touch()
    # Stands for Python: runs the download for real, and only names what else it gets.
    python = binary / "python"
    run = f'case "$1" in data/*) exec {sys.executable} "$@";; esac'
    python.write_text(f'#!/bin/sh\n{run}\necho "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    for code, runs in ((0, True), (2, True), (1, False)):
        download.write_text(f"raise SystemExit({code})\n", encoding="utf-8")
        done = make(folder, "test")
        assert ("-m pytest" in done.stdout) == runs
        assert ("goes on without what could not be fetched" in done.stdout) == (
            code == 2
        )
        assert (done.returncode == 0) == runs
