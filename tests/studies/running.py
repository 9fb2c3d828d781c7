# SPDX-License-Identifier: MIT
"""The command line that studies have in common: where things go, how a run ends."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


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
