# SPDX-License-Identifier: MIT
"""What studies have in common: the command line, how a run ends, digests."""

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results


def add_places(command: argparse.ArgumentParser, runs: Path) -> None:
    """The flags `--out`, by default `runs`, and `--record`."""
    command.add_argument(
        "--out", default=runs, type=Path, metavar="DIR", help=f"default: {runs}"
    )
    command.add_argument(
        "--record", type=Path, metavar="PATH", help="write here, not to the record"
    )


def run(
    study: Callable[[argparse.Namespace], None],
    args: argparse.Namespace,
    name: str,
    kept: str = "trained",
) -> int:
    """The exit code of `study(args)`; mistakes and Ctrl-C end in a line on stderr."""
    try:
        study(args)
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"{name}: stopped; what is {kept} is kept, the same command goes on",
            file=sys.stderr,
        )
        return 130
    return 0


def unchanged(before: dict[str, str]) -> None:
    """ValueError when a source is not what it was; `before` are digests by source."""
    changed = [s for s, hashed in before.items() if results.digest(s) != hashed]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} changed meanwhile, so nothing is recorded; "
            "run it again"
        )


def tokens_digest(data: Any, steps: int) -> str:
    """A hash of the batches that so many steps train on, in their order."""
    hashed = hashlib.sha256()
    for i in range(steps):
        hashed.update(data.batch(i).numpy().tobytes())
    return hashed.hexdigest()
