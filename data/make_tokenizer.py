# SPDX-License-Identifier: MIT
"""Makes stories.tiktoken: 1,024 byte-pair ranks, learned from the stories.

    python data/make_tokenizer.py            write data/stories.tiktoken
    python data/make_tokenizer.py --check    compare only; exit 1 if it would differ

Chapter 2's own trainer, `train_bpe`, learns them, from the training stories alone: the
last 5 % of `stories.txt` are held out, for the vocabulary as for the models. The file
has tiktoken's format, one "base64-of-the-token rank" a line; chapters 2 to 7 read it.
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
N_RANKS = 1024


def chapter_2() -> ModuleType:
    """The module `gpt2`, from its file."""
    path = HERE.parent / "ch02_gpt2" / "gpt2.py"
    spec = importlib.util.spec_from_file_location("gpt2", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up here
    spec.loader.exec_module(module)
    return module


def learn(gpt2: ModuleType, stories: Path, n_ranks: int = N_RANKS) -> dict[bytes, int]:
    """The ranks of the training stories, as chapter 2 splits them off."""
    documents, _ = gpt2.split_documents(gpt2.read_text(stories))
    # No merge crosses a line, so the line break between two stories teaches nothing.
    ranks = gpt2.train_bpe("\n".join(documents), n_ranks)
    if len(ranks) < n_ranks:
        raise ValueError(f"{stories} has pairs for {len(ranks)} ranks, not {n_ranks}")
    return ranks


def content(gpt2: ModuleType, ranks: dict[bytes, int]) -> bytes:
    """The bytes that `write_ranks` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranks.tiktoken"
        gpt2.write_ranks(ranks, path)
        return path.read_bytes()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make_tokenizer.py", description="Write the stories' vocabulary."
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, metavar="DIR", help="folder of the result"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare only; exit 1 if it would differ"
    )
    args = parser.parse_args(argv)
    path = args.out / "stories.tiktoken"
    try:
        gpt2 = chapter_2()
        ranks = learn(gpt2, HERE / "stories.txt")
        if args.check:
            same = path.read_bytes() == content(gpt2, ranks)
            print(f"{path}: {'as made' if same else 'differs; run make_tokenizer.py'}")
            return 0 if same else 1
        gpt2.write_ranks(ranks, path)
    except (OSError, ValueError, ImportError) as error:
        print(f"make_tokenizer.py: {error}", file=sys.stderr)
        return 2
    longest = max(ranks, key=len).decode("utf-8", errors="replace")
    print(f"{path}: {len(ranks):,} ranks; the longest token is {longest!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
