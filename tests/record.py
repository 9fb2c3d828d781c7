# SPDX-License-Identifier: MIT
"""Run what takes minutes and keep its numbers in the chapters' `results/`.

    python tests/record.py verify             distances to Hugging Face, every chapter
    python tests/record.py smollm2            the same on SmolLM2, which is a Llama
    python tests/record.py train [ch02 …]     default training, then what it can do
    python tests/record.py recipes            chapter 1: the paper's recipe on a laptop
    python tests/record.py bench              speed beside Hugging Face's

Let the machine do nothing else meanwhile. READMEs take their figures from these
records (tests/readme.py), and a test fails when their sources have changed since
(tests/results.py).
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results
from chapters import ROOT, Chapter, discover, load

sys.path.insert(0, str(Path(__file__).parent / "studies"))

# What a trained model's figures follow from, beside the model part and the data.
TRAINING = ("Batches", "Recipe", "Training", "train", "learning_rate", "loss")


def sources(chapter: Chapter) -> list[str]:
    """The parts of a chapter that its training follows from, and its data."""
    module = load(chapter)
    data = module.DEFAULT_DATA.relative_to(ROOT).as_posix()
    names = ["model", *TRAINING, "make_optimizer"]
    tokenizer = [
        path.relative_to(ROOT).as_posix()
        for path in sorted(module.DATA.glob("*.tiktoken"))
        if module.DEFAULT_DATA.name == "stories.txt"
    ]
    return [*(f"{chapter.path}::{name}" for name in names), data, *tokenizer]


# What is kept of the log, of some two hundred of its rows and of all evaluations.
SHOWN = ("step", "loss", "held_out", "lr", "grad_norm")


def row_of(rows: list[dict], stage: str) -> dict:
    """The row of `verify`'s table for one stage."""
    return next(row for row in rows if row["stage"] == stage)


def record_verify(chapter: Chapter) -> None:
    """The table of `verify`: how far each stage is from Hugging Face's.

    Chapter 7 has a second one: how far computing in FP8 is from float32.
    """
    module = load(chapter)
    rows = module.verify()
    found = {"stages": rows, "logits": row_of(rows, "logits")}
    parts = ["model", "small_config"]
    if hasattr(module, "verify_fp8"):
        found["fp8"] = row_of(module.verify_fp8(), "logits")
        parts += ["verify_fp8", "small_fp8_config"]
    results.write(
        chapter.results / "verify.json",
        f"python {chapter.path} verify",
        found,
        [f"{chapter.path}::{part}" for part in parts],
    )


def record_smollm2(chapter: Chapter) -> None:
    """The same table on real weights and 2,000 tokens of real text."""
    folder, module = ROOT / "data" / "smollm2", load(chapter)
    if not folder.is_dir():
        raise SystemExit("record.py: first run: python data/download.py smollm2")
    rows = module.verify(folder)
    tokens = module.verify_inputs(
        module.read_config(folder), module.load_tokenizer(folder)
    )
    results.write(
        chapter.results / "verify_smollm2.json",
        f"python {chapter.path} verify --model data/smollm2",
        {
            "tokens": tokens[0].numel(),
            "stages": rows,
            "logits": row_of(rows, "logits"),
            "largest_relative": max(row["relative"] for row in rows),
        },
        [f"{chapter.path}::{name}" for name in ("model", "verify_inputs", "real_text")],
    )


def run_training(
    chapter: Chapter, out: Path, flags: list[str], evaluate: bool = True
) -> dict:
    """`train` with `flags`: time, log, and evaluation unless that is left out."""
    command = [str(chapter.script), "train", "--out", str(out), *flags]
    started = time.perf_counter()
    if evaluate:
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    else:
        module = load(chapter)
        module.report = lambda *_: None
        module.main(command[1:])
    seconds = time.perf_counter() - started
    with open(out / "log.csv", encoding="utf-8", newline="") as file:
        log = list(csv.DictReader(file))
    in_steps = sum(float(row["seconds"]) for row in log)
    tested = [row for row in log if row["held_out"]]
    found = {
        "steps": len(log),
        "seconds": seconds,
        "tokens": sum(int(row["tokens"]) for row in log),
        "tokens_per_second": sum(int(row["tokens"]) for row in log) / in_steps,
        "held_out": float(tested[-1]["held_out"]),
        "log": [
            {key: float(row[key]) if row[key] else None for key in SHOWN}
            for i, row in enumerate(log)
            if row["held_out"] or i % max(1, len(log) // 200) == 0
        ],
    }
    evaluation = out / "evaluation.json"
    if evaluation.exists():
        found["evaluation"] = json.loads(evaluation.read_text(encoding="utf-8"))
    return found


def record_train(chapter: Chapter) -> None:
    """Default training; for a model of stories, how consistent its stories are."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "run"
        found = run_training(chapter, out, [])
        chapter.results.mkdir(exist_ok=True)
        shutil.copyfile(out / "loss.png", chapter.results / "loss.png")
        used = sources(chapter)
        results.write(
            chapter.results / "train.json",
            f"python {chapter.path} train",
            found,
            used,
            files=["loss.png"],
        )
        if load(chapter).DEFAULT_DATA.name == "stories.txt":
            import story_consistency

            results.write(
                chapter.results / "consistency.json",
                f"python {chapter.path} train && "
                "python tests/studies/story_consistency.py --model "
                f"out/{chapter.name}",
                story_consistency.measure(load(chapter), out, 200),
                [*used, "data/make_stories.py::consistency"],
            )


# Chapter 1's other recipe, and its other model for a few minutes; that one cannot end a
# sentence yet, so nothing is translated with it.
RECIPES = {
    "tiny_paper": [
        "--recipe=paper",
        "--steps=6000",
        "--batch-tokens=800",
        f"--lr={(128 * 4000) ** -0.5}",
        "--eval-every=2000",
    ],
    "base_paper": [
        "--preset=TRANSFORMER_BASE",
        "--steps=150",
        "--batch-tokens=800",
        "--eval-every=150",
    ],
}


def record_recipes(chapter: Chapter) -> None:
    """The paper's recipe for TINY, and TRANSFORMER_BASE with it as far as it gets."""
    with tempfile.TemporaryDirectory() as temporary:
        found = {
            name: run_training(
                chapter, Path(temporary) / name, flags, evaluate=name != "base_paper"
            )
            for name, flags in RECIPES.items()
        }
    results.write(
        chapter.results / "recipes.json",
        "python tests/record.py recipes",
        found,
        [*sources(chapter), "tests/record.py::RECIPES"],
    )


def record_bench(chapter: Chapter) -> None:
    """Forward and training step beside Hugging Face's, in one process."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "bench.json"
        command = [
            sys.executable,
            str(ROOT / "tests" / "bench.py"),
            "--json",
            str(path),
        ]
        subprocess.run([*command, chapter.prefix], check=True, cwd=ROOT)
        found = json.loads(path.read_text(encoding="utf-8"))
    results.write(
        chapter.results / "bench.json",
        f"python tests/bench.py {chapter.prefix}",
        found,
        [f"{chapter.path}::model", f"{chapter.path}::loss"],
    )


WORK = {
    "verify": record_verify,
    "smollm2": record_smollm2,
    "train": record_train,
    "recipes": record_recipes,
    "bench": record_bench,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=list(WORK))
    parser.add_argument("chapters", nargs="*", help="such as ch02; default: all")
    args = parser.parse_args()
    chapters = discover()
    if args.what == "recipes":
        chapters = [c for c in chapters if hasattr(load(c), "RECIPES")]
    if args.what == "smollm2":
        chapters = [c for c in chapters if hasattr(load(c), "LLAMA_3_2_1B")]
    for chapter in chapters:
        if not args.chapters or chapter.prefix in args.chapters:
            WORK[args.what](chapter)
    return 0


if __name__ == "__main__":
    sys.exit(main())
