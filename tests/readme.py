# SPDX-License-Identifier: MIT
"""The READMEs: their numbers come from somewhere, and their commands work.

Regions. A measured or computed number stands in a generated region

    <!-- begin: template
    | sentences | exact match |
    |---|---|
    | up to 12 words | {{results/train.json exact_match.short :: .1%}} |
    -->
    …written here by `python tests/readme.py --write`…
    <!-- end -->

whose template fills its fields from

    {{results/train.json a.b.0 :: .1%}}  a record of tests/results.py, path relative to
                                         the README, then the key within its `data`
                                         (@command, @machine, @date: beside `data`),
                                         then a format, which may be left out
    {{= params(chapter.GPT2_124M) :: ,}} a Python expression, with `chapter` the module
                                         of the README's own folder, `ch01`, `ch02`, …
                                         every chapter, `params(config)` the number of
                                         parameters of its Transformer, and
                                         `counts(config)` chapter 6's of each kind

Further regions: `begin: chapters` (the table of chapters), `begin: lineage` (what the
chapter of this folder changes), `begin: lineage-table [model|running|all]`, and
`begin: lineage-counts` with the same, how many definitions are in each state.

Elsewhere, whatever looks like a measurement (a decimal, a percentage, a number with a
unit) makes the test fail, unless it stands in code, or its paragraph says in
`<!-- stated: why -->` where the number comes from.

Commands. Every line of a fenced `bash` or `powershell` block must be a known command
whose target, file and flags exist. A block after the line `<!-- run -->` is quick and
run by the test; `python tests/readme.py --run-all` runs the others as well.
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lineage
import results
from chapters import ROOT, discover, load

REGION = re.compile(
    r"(?P<head><!-- begin: (?P<kind>[\w-]+)(?P<body>.*?)-->\n)"
    r"(?P<text>.*?)(?P<foot><!-- end -->)",
    re.DOTALL,
)
FIELD = re.compile(r"\{\{\s*(?P<what>.+?)\s*(?:::\s*(?P<format>\S+)\s*)?\}\}")
FENCE = re.compile(
    r"^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=fence)\s*$",
    re.M | re.S,
)
UNITS = (
    r"tokens/s|tokens a second|GB/s|MB/s|GFLOP/s|ms|s|seconds?|minutes?|hours?|[KMGT]B|"
    r"[KMGT]iB|bytes|nats|parameters|million|billion|times|BLEU|chrF|%|percent"
)
MEASURED = re.compile(
    rf"(?<![\w.§:/-])(?:\d+(?:[.,]\d+)*e[+-]?\d+|\.?\d+(?:[.,]\d+)*\s?(?:{UNITS})(?![\w/])"
    r"|\d*\.\d+(?![\w.]))|\b(?:BLEU|chrF)\s+\d+",
)
# What is no measurement: versions, sections and equations of papers, ids of papers.
NAMED = re.compile(
    r"\b(?:Python|torch|PyTorch|transformers|CUDA|Make|version|Llama|V)\s+\d+(?:\.\d+)*"
    r"(?:(?:,| and| or| to)\s+\d+\.\d+)*|§\s?\d+(?:\.\d+)*|arXiv:\d+\.\d+"
    r"|\b(?:eq\.|section|table|figure|chapter)\s\d+(?:\.\d+)*"
)
SETUP = {
    "git",
    "cd",
    "py",
    "source",
    "sudo",
    "xcode-select",
    ".\\.venv\\Scripts\\activate",
}


@dataclass(frozen=True)
class Command:
    """One command of a fenced block, and whether its block is marked to be run."""

    line: int
    text: str
    run: bool


def readmes(root: Path = ROOT) -> list[Path]:
    """The READMEs of the repository: the top one, the chapters', and that of `data`."""
    found = [root / "README.md", *(c.readme for c in discover(root))]
    return [path for path in [*found, root / "data/README.md"] if path.is_file()]


# ---------------------------------------------------------------------------
# regions
# ---------------------------------------------------------------------------


def rendered(path: Path, root: Path = ROOT) -> str:
    """The README's text with every region written anew."""
    text = path.read_text(encoding="utf-8")
    begins, ends = text.count("<!-- begin:"), text.count("<!-- end -->")
    if begins != ends:
        raise ValueError(f"{path.name}: {begins} regions begin and {ends} end")

    def fill(match: re.Match) -> str:
        body = region(match["kind"], match["body"], path, root)
        return f"{match['head']}{body.strip()}\n{match['foot']}"

    return REGION.sub(fill, text)


def region(kind: str, body: str, path: Path, root: Path) -> str:
    """The Markdown of one region."""
    if kind == "template":
        return FIELD.sub(lambda m: field(m, path, root), body)
    if kind == "chapters":
        return chapters_table(path, root)
    if kind == "lineage":
        return lineage_summary(path, root)
    if kind == "lineage-table":
        return lineage.table(root, body.strip() or "all")
    if kind == "lineage-counts":
        return lineage.counts(root, body.strip() or "all")
    raise ValueError(f"{path.name}: unknown region {kind!r}")


def field(match: re.Match, path: Path, root: Path) -> str:
    what = match["what"]
    value = computed(what[1:], path, root) if what[0] == "=" else recorded(what, path)
    try:
        return format(value, match["format"] or "")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: {match[0]}: {error}") from None


def recorded(what: str, path: Path) -> Any:
    """The value of a field such as `results/train.json exact_match.short`."""
    name, _, key = what.partition(" ")
    if not (path.parent / name).is_file():
        raise ValueError(f"{path.name}: no such record: {name}")
    record = results.read(path.parent / name)
    value = record if key.startswith("@") else record["data"]
    for part in key.strip().removeprefix("@").split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"{path.name}: {name} has no {key}") from None
    return value


def computed(expression: str, path: Path, root: Path) -> Any:
    names: dict[str, Any] = {"params": params, "counts": counts}
    for chapter in discover(root):
        if chapter.prefix in expression or chapter.folder == path.parent:
            names[chapter.prefix] = load(chapter)
        if chapter.folder == path.parent:
            names["chapter"] = names[chapter.prefix]
    return eval(expression, names)


def params(config: Any) -> int:
    """The trained parameters of the Transformer of `config`; a tied one counts once."""
    import torch

    module = sys.modules[type(config).__module__]
    with torch.device("meta"):
        model = module.Transformer(config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def counts(config: Any) -> dict[str, int]:
    """The parameters of a model with experts: in total, active, in MTP modules."""
    import torch

    module = sys.modules[type(config).__module__]
    with torch.device("meta"):
        return module.parameter_counts(module.Transformer(config))


def chapters_table(path: Path, root: Path) -> str:
    lines = ["| chapter | what it builds | files |", "|---|---|---|"]
    for chapter in discover(root):
        doc = lineage.ast.get_docstring(lineage.ast.parse(chapter.source)) or ""
        files = [chapter.script, chapter.notebook]
        links = [
            f"[{f.name}]({f.relative_to(path.parent).as_posix()})"
            for f in files
            if f.is_file()
        ]
        name = chapter.name
        if chapter.readme.is_file():
            name = f"[{name}]({chapter.readme.relative_to(path.parent).as_posix()})"
        first = doc.strip().splitlines()[0] if doc.strip() else ""
        lines.append(f"| {name} | {first} | {' · '.join(links)} |")
    return "\n".join(lines)


def lineage_summary(path: Path, root: Path) -> str:
    """What a chapter changes of the one before it, counted and named."""
    chapter = next(c for c in discover(root) if c.folder == path.parent)
    previous = lineage.previous_of(chapter, root)
    new = lineage.outline(chapter.source)
    owners = list(dict.fromkeys(u.owner for u in new.units.values()))
    if previous is None:
        return f"The first chapter: {len(owners)} definitions, all new."
    old = lineage.outline(previous.source)
    owners += [u.owner for u in old.units.values() if u.owner not in owners]
    states: dict[str, list[str]] = {"same": [], "changed": [], "new": [], "dropped": []}
    for name in dict.fromkeys(owners):
        states[lineage.state(name, old, new)].append(f"`{name}`")
    lines = [
        f"Against `{previous.path}`, by definition:",
        "",
        "| | | |",
        "|---|---|---|",
    ]
    for kind, names in states.items():
        lines.append(f"| {kind} | {len(names)} | {' '.join(names)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------
# numbers
# ---------------------------------------------------------------------------


def loose_numbers(text: str) -> list[str]:
    """What looks like a measurement in prose: outside regions, code and comments."""
    blank = lambda m: "\n" * m[0].count("\n")  # noqa: E731
    text = REGION.sub(blank, text)
    text = FENCE.sub(blank, text)
    found = []
    line = 1
    for paragraph in re.split(r"(\n\s*\n)", text):
        prose = paragraph
        if "<!-- stated:" not in prose:
            prose = re.sub(r"<!--.*?-->", blank, prose, flags=re.DOTALL)
            prose = re.sub(r"`[^`\n]*`", "", prose)
            prose = re.sub(r"\]\([^)]*\)|https?://\S+", "]", prose)
            prose = NAMED.sub("", prose)
            for match in MEASURED.finditer(prose):
                at = line + prose[: match.start()].count("\n")
                found.append(f"line {at}: {match[0].strip()}")
        line += paragraph.count("\n")
    return found


# ---------------------------------------------------------------------------
# commands
# ---------------------------------------------------------------------------


def commands(text: str) -> list[Command]:
    """The commands of the fenced `bash`, `sh` and `powershell` blocks."""
    found = []
    for block in FENCE.finditer(text):
        if block["language"] not in ("bash", "sh", "powershell"):
            continue
        before = text[: block.start()].rstrip().rsplit("\n", 1)[-1]
        line = text[: block.start("text")].count("\n") + 1
        pending = ""
        for offset, raw in enumerate(block["text"].splitlines()):
            part = raw.strip().removeprefix("$ ")
            if not part or part.startswith("#"):
                continue
            if part.endswith("\\") and block["language"] != "powershell":
                pending += part[:-1]
                continue
            run = before == "<!-- run -->"
            found.append(Command(line + offset, without_comment(pending + part), run))
            pending = ""
    return found


def without_comment(text: str) -> str:
    return re.sub(r"\s+#.*$", "", text)


def split(text: str) -> list[str]:
    return shlex.split(text.replace("\\", "/"))


def problem(command: Command, root: Path = ROOT) -> str | None:
    """What is wrong with a command: an unknown program, target, file or flag."""
    for part in re.split(r"\s*(?:\||&&|>)\s*", command.text):
        words = split(part)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        wrong = problem_of(words, root) if words else None
        if wrong:
            return f"line {command.line}: {command.text}: {wrong}"
    return None


def problem_of(words: list[str], root: Path) -> str | None:
    program = Path(words[0]).name
    if words[0] in SETUP or program in ("activate", "echo", "cat", "head"):
        return None
    if program == "make":
        makefile = (root / "Makefile").read_text(encoding="utf-8")
        targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
        unknown = [w for w in words[1:] if "=" not in w and w not in targets]
        return f"no such target: {unknown[0]}" if unknown else None
    if is_python(words[0]):
        arguments = words[1:]
        if arguments[:1] == ["-m"]:
            known = {"venv", "pip", "pytest", "jupyter", "ruff", "pydoc"}
            return None if arguments[1] in known else f"unknown module {arguments[1]}"
        if not arguments or not (root / arguments[0]).is_file():
            return f"no such script: {' '.join(arguments[:1]) or 'none given'}"
        return problem_of_script(root / arguments[0], arguments[1:])
    if program in ("pip", "pytest", "jupyter", "ruff"):
        return None
    return f"unknown command {words[0]}"


def is_python(word: str) -> bool:
    """Whether a word calls Python: `python`, `.venv/bin/python`, `python.exe`."""
    return re.fullmatch(r"python3?(\.exe)?", Path(word).name) is not None


class Parsed(BaseException):
    """Raised in place of running a command whose arguments are right."""


def problem_of_script(script: Path, arguments: list[str]) -> str | None:
    """Lets the script's own `main` parse the arguments, and stops it right after."""
    main = getattr(load(script), "main", None)
    if main is None:
        return f"{script.name} has no main(argv) to ask"
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    argparse.ArgumentParser.parse_args = parse_and_stop
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            main(arguments)
    except Parsed:
        return None
    except SystemExit as stop:
        if not stop.code:  # --help
            return None
        return said.getvalue().strip().splitlines()[-1]
    finally:
        argparse.ArgumentParser.parse_args = parse
    return f"{script.name} does not parse its arguments with argparse"


def run(command: Command, tree: Path, timeout: float | None = None) -> str | None:
    """Runs a command in `tree`; what went wrong, or None."""
    env = os.environ | {"PYTHONUTF8": "1", "PYTHON": sys.executable}
    env["PATH"] = str(Path(sys.executable).parent) + os.pathsep + env["PATH"]
    if re.search(r"[|&;<>]", command.text):
        words = ["bash", "-c", command.text]
    else:
        words = split(recipe(command, tree) or command.text)
        if is_python(words[0]):
            words[0] = sys.executable
    done = subprocess.run(
        words,
        cwd=tree,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
    )
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-15:])
        return f"{command.text}: exit code {done.returncode}\n{last}"
    return None


def recipe(command: Command, tree: Path) -> str | None:
    """What `make TARGET` runs once .venv is there, where that is one Python script."""
    words = split(command.text)
    if words[0] != "make":
        return None
    target = next((w for w in words[1:] if "=" not in w), "help")
    makefile = (tree / "Makefile").read_text(encoding="utf-8")
    script = re.compile(rf"^{target}:.*\n\t@\$\(BIN\)/(python (?!-m)[^|&;\n]*)$", re.M)
    match = script.search(makefile)
    return match[1] if match and "readme.py" not in match[1] else None


def is_setup(command: Command, root: Path = ROOT) -> bool:
    """Whether a command prepares the machine, opens a window, or runs all tests."""
    words = split(command.text)
    first = Path(words[0]).name
    if words[0] in SETUP or first in ("activate", "pip", "jupyter", "pytest"):
        return True
    if first == "make":
        return recipe(command, root) is None
    modules = (["-m", "venv"], ["-m", "pip"], ["-m", "jupyter"], ["-m", "pytest"])
    return words[1:3] in modules or "readme.py" in command.text


def copy_tree(target: Path, root: Path = ROOT) -> Path:
    """A copy of the repository to run commands in, without what is rebuilt or large."""
    skip = shutil.ignore_patterns(".*", "__pycache__", "out", "*.partial")
    shutil.copytree(root, target, ignore=skip, symlinks=True)
    return target


def needs_hub(command: Command, tree: Path) -> bool:
    """Whether a command fetches, or reads from data/hub, what is not there."""
    found = re.search(r"data/hub/([\w.-]+)|download\.py ([\w.-]+)", command.text)
    return bool(found) and not (tree / "data/hub" / (found[1] or found[2])).exists()


def run_all(root: Path = ROOT) -> int:
    """Runs every command of every README, each once, in a copy of the repository."""
    wrong, seen = [], set()
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder) / "tree", root)
        for path in readmes(root):
            for command in commands(path.read_text(encoding="utf-8")):
                words = split(recipe(command, root) or command.text)
                same = ("python" if is_python(words[0]) else words[0], *words[1:])
                if same in seen or is_setup(command, root):
                    continue
                seen.add(same)
                print(f"$ {command.text}", flush=True)
                failure = run(command, tree)
                if failure and needs_hub(command, tree):
                    print("not run: it could not be fetched here", flush=True)
                elif failure:
                    wrong.append(f"{path.relative_to(root).as_posix()}: {failure}")
                    print(failure, flush=True)
    print("\n\n".join(wrong) or f"{len(seen)} commands ran")
    return 1 if wrong else 0


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        description="Check the generated regions of the READMEs."
    )
    command.add_argument("--write", action="store_true", help="write them anew")
    command.add_argument(
        "--run-all", action="store_true", help="run every command that a README shows"
    )
    return command


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.run_all:
        return run_all()
    stale = 0
    for path in readmes():
        try:
            text = rendered(path)
        except ValueError as error:
            print(f"readme: {error}", file=sys.stderr)
            return 2
        shown = path.relative_to(ROOT).as_posix()
        if text == path.read_text(encoding="utf-8"):
            continue
        if args.write:
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"{shown}: written")
        else:
            stale += 1
            print(f"{shown}: its regions are not current; --write writes them anew")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
