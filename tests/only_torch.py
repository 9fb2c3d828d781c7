# SPDX-License-Identifier: MIT
"""Runs a script as on a machine where `pip install torch` is all that was done.

    python only_torch.py script.py arguments…
    python only_torch.py -c "code"

Every other third-party package is not found, numpy included: torch does not need it.
"""

import runpy
import sys
import warnings
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

# torch and what its wheel depends on, by the names that are imported.
TORCH = """
torch torchgen functorch filelock typing_extensions sympy mpmath networkx jinja2
markupsafe fsspec setuptools pkg_resources _distutils_hack nvidia triton cuda
"""


class OnlyTorch:
    """Finds everything but what pip installed, and of that only torch."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or name.partition(".")[0] in TORCH.split():
            return spec
        places = [spec.origin or "", *(spec.submodule_search_locations or [])]
        installed = any("-packages" in place for place in places)
        return None if installed else spec


def main() -> None:
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, OnlyTorch]
    sys.path[0] = ""  # the working directory, not the folder of this file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once where numpy is missing
        import torch  # noqa: F401
    if sys.argv[1] == "-c":
        code, sys.argv = sys.argv[2], ["-c", *sys.argv[3:]]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
