# SPDX-License-Identifier: MIT
"""What did not run is counted and named at the end of a test run."""

import shutil
import subprocess
import sys
from pathlib import Path

SKIPPING = """
import os
import pytest

@pytest.mark.parametrize("x", range(2))
def test_one(x):
    pytest.skip("no CUDA device")

@pytest.mark.skipif(True, reason="data/smollm2 is not there")
def test_two(): ...

def test_three():
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
"""


def run(folder, text):
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    (folder / "test_it.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(folder), "-c", str(folder / "none.ini"), "test_it.py"]
    (folder / "none.ini").write_text("[pytest]\n", encoding="utf-8")
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    return done.stdout


def test_skips_are_counted_by_reason(tmp_path):
    out = run(tmp_path, SKIPPING)
    assert "not run here: 3" in out and "1 passed, 3 skipped" in out, out
    assert "    2  no CUDA device" in out
    assert "    1  data/smollm2 is not there" in out


def test_nothing_is_said_where_everything_ran(tmp_path):
    assert "not run here" not in run(tmp_path, "def test_one(): ...\n")
