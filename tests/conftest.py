# SPDX-License-Identifier: MIT
"""What every test run shares: quiet threads, no network, and skips that are named."""

import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

# Before torch is imported anywhere, and inherited by notebooks and subprocesses.
# Spinning OpenMP workers make two busy processes many times slower than one, and
# one thread sums in the same order on every run.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test reaches the network; the tests of data/download.py talk to a loopback server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["PYTHONUTF8"] = "1"  # subprocesses print Hindi on Windows too

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def skip_reason(report: pytest.TestReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    return reason.removeprefix("Skipped: ") or "no reason given"


def pytest_terminal_summary(terminalreporter) -> None:
    """Count and name what did not run."""
    reports = terminalreporter.stats.get("skipped", [])
    if not reports:
        return
    terminalreporter.section(f"not run here: {len(reports)}")
    for reason, count in Counter(map(skip_reason, reports)).most_common():
        terminalreporter.write_line(f"{count:5}  {reason}")
