# SPDX-License-Identifier: MIT
"""What each chapter changes of the one before it, and that nothing else differs.

Every chapter file is complete, so most of it repeats the chapter before. Its module
docstring ends in one block that says what does not:

    Lineage: from ch03_kv_cache/kv_cache.py
        changed: Attention Attention.forward
        new: RMSNorm rope_table
        dropped: LayerNorm

The first chapter writes `Lineage: first chapter`. A list may wrap onto further lines,
indented deeper than its keyword. What is not listed is promised to be the same text,
comments and docstrings included.

The file is compared in units: top-level functions, constants, class shells (the class
minus its methods) and methods, `Name.method`. A unit starts at its decorators or at the
comment glued above it. Blank lines between units do not count; imports, the module
docstring and the `__main__` guard are exempt, and the banner comment that opens
*running the chapter* belongs to no unit. A new or dropped class is listed once, without
its methods; a rename is one dropped and one new.

    python tests/lineage.py                     check every chapter
    python tests/lineage.py --declare ch02      the Lineage block as it should read
    python tests/lineage.py --table             chapter by definition, in Markdown
    python tests/lineage.py --diff ch02 ch04    what the two differ in; --only NAME …
    python tests/lineage.py --carry UNIT        copy a fixed unit into later chapters
"""

import argparse
import ast
import difflib
import os
import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from chapters import BANNER, ROOT, Chapter, banner_line, discover, find

KINDS = ("changed", "new", "dropped")


@dataclass(frozen=True)
class Unit:
    """One named piece of a chapter file; `spans` are its 1-based inclusive lines."""

    name: str
    kind: str  # "function", "constant", "class" or "method"
    text: str
    code: str  # the syntax tree, blind to comments and layout
    spans: tuple[tuple[int, int], ...]

    @property
    def owner(self) -> str:
        """The top-level definition that the unit belongs to."""
        return self.name.split(".")[0]


@dataclass
class Outline:
    """The units of one file in order, and what stands there that is none."""

    units: dict[str, Unit] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------
# from text to units
# ---------------------------------------------------------------------------


def is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


class Reader:
    """Cuts one source text into units."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines()
        self.tree = ast.parse(source)
        self.outline = Outline()
        self.owned: set[int] = set()  # lines that some unit or exempt statement has
        # Within a string, what looks like a comment or a blank line is data.
        self.quoted = {
            number
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Constant | ast.JoinedStr)
            for number in range(node.lineno + 1, node.end_lineno + 1)
        }

    def line(self, number: int) -> str:
        return self.lines[number - 1]

    def comment_at(self, number: int) -> bool:
        return number not in self.quoted and is_comment(self.line(number))

    def span(self, node: ast.stmt) -> tuple[int, int]:
        """The lines of `node` with decorators, glued comment and trailing comments."""
        decorators = getattr(node, "decorator_list", [])
        start = min([node.lineno, *(d.lineno for d in decorators)])
        width = indent(self.line(start))
        while start > 1 and self.glued(start - 1, width):
            start -= 1
        end = node.end_lineno
        if hasattr(node, "body"):  # comments after a body's last statement are its own
            for number in range(end + 1, len(self.lines) + 1):
                if self.comment_at(number) and indent(self.line(number)) > width:
                    end = number
                elif self.line(number).strip():
                    break
        return start, end

    def glued(self, number: int, width: int) -> bool:
        line = self.line(number)
        if not self.comment_at(number) or indent(line) != width:
            return False
        return not self.in_banner(number)

    def in_banner(self, number: int) -> bool:
        """Whether a top-level comment line belongs to the block with the banner."""
        first = last = number
        while first > 1 and self.line(first - 1).startswith("#"):
            first -= 1
        while last < len(self.lines) and self.line(last + 1).startswith("#"):
            last += 1
        return any(BANNER.match(self.line(n)) for n in range(first, last + 1))

    def text(self, spans: Iterable[tuple[int, int]]) -> str:
        return "\n".join("\n".join(self.lines[a - 1 : b]) for a, b in spans)

    def add(self, unit: Unit, merge: bool = False) -> None:
        earlier = self.outline.units.get(unit.name)
        if earlier is not None and not merge:
            self.stray(unit.spans[0][0], f"{unit.name} is defined a second time")
            return
        if earlier is not None:  # a property and its setter are one unit
            unit = Unit(
                unit.name,
                unit.kind,
                earlier.text + "\n" + unit.text,
                earlier.code + "\n" + unit.code,
                earlier.spans + unit.spans,
            )
        self.outline.units[unit.name] = unit

    def stray(self, number: int, what: str) -> None:
        self.outline.strays.append(f"line {number}: {what}")

    def read(self) -> Outline:
        for position, node in enumerate(self.tree.body):
            start, end = self.span(node)
            if start in self.owned or any(n in self.owned for n in range(start, end)):
                self.stray(start, "two statements share a line; give each its own")
            self.owned |= set(range(start, end + 1))
            self.statement(node, (start, end), first=position == 0)
        self.loose_comments()
        return self.outline

    def statement(self, node: ast.stmt, span: tuple[int, int], first: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            self.add(self.unit(node.name, "function", node, span))
        elif isinstance(node, ast.ClassDef):
            self.read_class(node, span)
        elif (name := constant_name(node)) is not None:
            self.add(self.unit(name, "constant", node, span))
        elif not is_exempt(node, first):
            shown = self.line(node.lineno).strip()
            self.stray(
                node.lineno,
                f"{shown!r} is no function, class or single constant; "
                "a chapter file holds nothing else at its top level",
            )

    def unit(self, name: str, kind: str, node: ast.stmt, span: tuple[int, int]) -> Unit:
        return Unit(name, kind, self.text([span]), ast.dump(node), (span,))

    def read_class(self, node: ast.ClassDef, span: tuple[int, int]) -> None:
        methods, taken = [], set()
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = self.span(child)
                methods.append((child, inner))
                taken |= set(range(inner[0], inner[1] + 1))
        shell = [
            n
            for n in range(span[0], span[1] + 1)
            if n not in taken and (n in self.quoted or self.line(n).strip())
        ]
        rest = [child for child in node.body if all(child is not m for m, _ in methods)]
        bare = ast.ClassDef(**{**vars(node), "body": rest})
        spans = tuple(runs(shell))
        text = "\n".join(self.line(n) for n in shell)
        self.add(Unit(node.name, "class", text, ast.dump(bare), spans))
        for child, inner in methods:
            name = f"{node.name}.{child.name}"
            self.add(
                self.unit(name, "method", child, inner),
                merge=bool(child.decorator_list),
            )

    def loose_comments(self) -> None:
        """A top-level comment is glued to a unit, is the banner, or opens the file."""
        if not self.tree.body:
            return
        opening = min(self.owned)
        for number, line in enumerate(self.lines, start=1):
            if number < opening or number in self.owned or not line.startswith("#"):
                continue
            if not self.in_banner(number):
                self.stray(
                    number,
                    f"the comment {line!r} belongs to no unit; set it directly above "
                    "the definition that it explains",
                )


def runs(numbers: list[int]) -> Iterable[tuple[int, int]]:
    """Sorted line numbers as inclusive spans of consecutive lines."""
    start = None
    for i, number in enumerate(numbers):
        start = number if start is None else start
        if i + 1 == len(numbers) or numbers[i + 1] != number + 1:
            yield start, number
            start = None


def constant_name(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
    elif isinstance(node, ast.AnnAssign):
        target = node.target
    else:
        return None
    return target.id if isinstance(target, ast.Name) else None


def is_exempt(node: ast.stmt, first: bool) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return first and isinstance(node.value.value, str)
    if isinstance(node, ast.If) and not node.orelse:
        test = ast.unparse(node.test)
        if test == "__name__ == '__main__'":
            return True
        if test == "TYPE_CHECKING":
            return all(isinstance(n, ast.Import | ast.ImportFrom) for n in node.body)
    return False


def outline(source: str) -> Outline:
    """The units of a chapter's source text, in order, and its stray statements."""
    return Reader(source).read()


# ---------------------------------------------------------------------------
# what is declared, and what is so
# ---------------------------------------------------------------------------


@dataclass
class Lineage:
    """A Lineage block: the file it starts from (None: first chapter) and the lists."""

    base: str | None
    changed: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def block(self) -> str:
        """The block as the docstring writes it, at most 88 columns wide."""
        if self.base is None:
            return "Lineage: first chapter"
        lines = [f"Lineage: from {self.base}"]
        for kind in KINDS:
            names = getattr(self, kind)
            if names:
                lines += textwrap.wrap(
                    f"{kind}: " + " ".join(names),
                    width=88,
                    initial_indent="    ",
                    subsequent_indent="        ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
        return "\n".join(lines)


def declared(source: str) -> Lineage:
    """The Lineage block of a chapter's docstring; ValueError says what is malformed."""
    doc = ast.get_docstring(ast.parse(source), clean=True) or ""
    starts = [m.start() for m in re.finditer(r"^Lineage:", doc, re.MULTILINE)]
    if len(starts) != 1:
        raise ValueError(
            f"the module docstring must end in one Lineage block, and has {len(starts)}"
        )
    head, *body = doc[starts[0] :].rstrip().splitlines()
    head = head.removeprefix("Lineage:").strip()
    if head == "first chapter":
        if body:
            raise ValueError(f"text after 'Lineage: first chapter': {body[0]!r}")
        return Lineage(None)
    if not head.startswith("from ") or not head.split()[1:]:
        raise ValueError(
            f"'Lineage: {head}' should read 'Lineage: first chapter' or "
            "'Lineage: from chNN_name/name.py'"
        )
    lineage, kind, depth = Lineage(head.removeprefix("from ").strip()), None, 0
    for line in body:
        match = re.fullmatch(r"( +)(\w+):(.*)", line)
        if match and (kind is None or len(match[1]) <= depth):
            depth, kind, names = len(match[1]), match[2], match[3].split()
            if kind not in KINDS:
                raise ValueError(f"unknown list {kind!r}; known: {', '.join(KINDS)}")
            if getattr(lineage, kind):
                raise ValueError(f"the list {kind!r} appears twice")
        elif kind is not None and line.strip() and indent(line) > depth:
            names = line.split()
        else:
            raise ValueError(
                f"the Lineage block must end the docstring; found after it: {line!r}"
            )
        getattr(lineage, kind).extend(names)
    listed = [name for kind in KINDS for name in getattr(lineage, kind)]
    for name in listed:
        if listed.count(name) > 1:
            raise ValueError(f"{name} is listed {listed.count(name)} times")
    return lineage


def compare(old: Outline, new: Outline, base: str | None = None) -> Lineage:
    """What the Lineage block from `old` to `new` has to say, names in file order."""
    lineage = Lineage(base)
    for name, unit in new.units.items():
        if name not in old.units:
            # The methods of a class that is new are not listed.
            if unit.owner in old.units or unit.kind != "method":
                lineage.new.append(name)
        elif old.units[name].text != unit.text:
            lineage.changed.append(name)
    for name, unit in old.units.items():
        if name not in new.units and (unit.owner in new.units or unit.kind != "method"):
            lineage.dropped.append(name)
    return lineage


def moved(old: Outline, new: Outline) -> list[str]:
    """Units with the same text in both files that do not stand in the same order."""
    kept = [n for n, u in new.units.items() if n in old.units]
    kept = [n for n in kept if old.units[n].text == new.units[n].text]
    before = [n for n in old.units if n in set(kept)]
    matcher = difflib.SequenceMatcher(a=before, b=kept, autojunk=False)
    stay = {n for m in matcher.get_matching_blocks() for n in kept[m.b : m.b + m.size]}
    return [n for n in kept if n not in stay]


def unit_diff(old: Unit | None, new: Unit | None, before: str, after: str) -> str:
    """The unified diff of one unit between two files."""
    name = (new or old).name
    return "\n".join(
        difflib.unified_diff(
            old.text.splitlines() if old else [],
            new.text.splitlines() if new else [],
            f"{before}: {name}",
            f"{after}: {name}",
            lineterm="",
        )
    )


def problems(chapter: Chapter, previous: Chapter | None) -> list[str]:
    """Everything in which `chapter` does not keep its Lineage block; empty is right."""
    found = []
    new = outline(chapter.source)
    found += [f"{chapter.path}, {stray}" for stray in new.strays]
    try:
        says = declared(chapter.source)
    except ValueError as error:
        return [*found, f"{chapter.path}: {error}"]
    expected = previous.path if previous else None
    if says.base != expected:
        right = f"from {expected}" if expected else "first chapter"
        given = f"from {says.base}" if says.base else "first chapter"
        return [
            *found,
            f"{chapter.path} says 'Lineage: {given}'; "
            f"the chapter before it makes that 'Lineage: {right}'",
        ]
    if previous is None:
        return found
    old = outline(previous.source)
    actual = compare(old, new)
    for kind in KINDS:
        claims, facts = getattr(says, kind), getattr(actual, kind)
        for name in facts:
            if name not in claims:
                found.append(undeclared(kind, name, old, new, previous, chapter))
        for name in claims:
            if name not in facts:
                found.append(overdeclared(kind, name, old, new, previous, chapter))
    for name in moved(old, new):
        found.append(
            f"{chapter.path}: {name} is unchanged but stands elsewhere than in "
            f"{previous.path}; put it back into the same order"
        )
    return found


def undeclared(
    kind: str,
    name: str,
    old: Outline,
    new: Outline,
    previous: Chapter,
    chapter: Chapter,
) -> str:
    """The message for a difference that the Lineage block does not list."""
    before, after = old.units.get(name), new.units.get(name)
    head = f"{chapter.path}: {name} is {kind} and not declared"
    if before and after and before.code == after.code:
        head += " (comment drift: the code is equal, its comments or layout are not)"
    advice = f"either list it under '{kind}:' in the Lineage block"
    if kind == "changed":
        advice += (
            f", or make it the text of {previous.path}; a fix belongs into "
            f"every chapter: python tests/lineage.py --carry {name}"
        )
    elif kind == "dropped":
        advice += f", or copy it back from {previous.path}"
    else:
        advice += f", or add it to {previous.path} too"
    return f"{head}; {advice}\n{unit_diff(before, after, previous.path, chapter.path)}"


def overdeclared(
    kind: str,
    name: str,
    old: Outline,
    new: Outline,
    previous: Chapter,
    chapter: Chapter,
) -> str:
    """The message for a name in the Lineage block that does not hold."""
    owner = name.split(".")[0]
    if name in old.units and name in new.units:
        same = old.units[name].text == new.units[name].text
        why = f"its text equals {previous.path}" if same else "it is changed"
        if old.units[name].kind == "class" and same:
            why += " (methods apart, which are listed by name)"
    elif name in new.units:
        why = "it is new" if owner in old.units else f"it comes with the new {owner}"
    elif name in old.units:
        gone = f"it goes with the dropped {owner}"
        why = "it is dropped" if owner in new.units or owner == name else gone
    else:
        why = "neither file has such a unit"
    return f"{chapter.path}: {name} is listed under '{kind}:', but {why}"


def check(root: Path = ROOT) -> list[str]:
    """The problems of all chapters under `root`."""
    chapters = discover(root)
    pairs = zip(chapters, [None, *chapters], strict=False)
    return [line for chapter, previous in pairs for line in problems(chapter, previous)]


def previous_of(chapter: Chapter, root: Path = ROOT) -> Chapter | None:
    chapters = discover(root)
    i = [c.name for c in chapters].index(chapter.name)
    return chapters[i - 1] if i else None


# ---------------------------------------------------------------------------
# the commands
# ---------------------------------------------------------------------------


def declare(name: str, root: Path = ROOT) -> str:
    """The Lineage block of a chapter as it should read."""
    chapter = find(name, root)
    previous = previous_of(chapter, root)
    if previous is None:
        return Lineage(None).block()
    old, new = outline(previous.source), outline(chapter.source)
    return compare(old, new, previous.path).block()


def drifted(name: str, root: Path = ROOT) -> list[str]:
    """Units that differ from the chapter before in comments or layout alone."""
    chapter = find(name, root)
    previous = previous_of(chapter, root)
    if previous is None:
        return []
    old, new = outline(previous.source).units, outline(chapter.source).units
    both = [n for n in new if n in old and new[n].text != old[n].text]
    return [n for n in both if new[n].code == old[n].code]


def state(name: str, old: Outline | None, new: Outline) -> str:
    """How a definition stands to the chapter before; "" where it is absent."""
    before = (
        {u.name: u.text for u in old.units.values() if u.owner == name} if old else {}
    )
    after = {u.name: u.text for u in new.units.values() if u.owner == name}
    if not after:
        return "dropped" if before else ""
    if not before:
        return "new"
    return "same" if before == after else "changed"


def states(root: Path, part: str) -> tuple[list[str], dict[str, list[str]]]:
    """The chapters, and of each definition its state in every one of them.

    `part` is "model" (above the banner), "running" (below it) or "all".
    """
    chapters = discover(root)
    outlines = [outline(c.source) for c in chapters]
    order: list[str] = []
    for chapter, parsed in zip(chapters, outlines, strict=True):
        cut = banner_line(chapter.source)
        place = 0
        for unit in parsed.units.values():
            above = unit.spans[0][0] < cut
            if unit.kind == "method" or part == ("running" if above else "model"):
                continue
            if unit.name in order:
                place = order.index(unit.name) + 1
            else:  # a new definition stands after its neighbour of the same chapter
                order.insert(place, unit.name)
                place += 1
    pairs = list(zip([None, *outlines], outlines, strict=False))
    cells = {n: [state(n, old, new) for old, new in pairs] for n in order}
    return [c.prefix for c in chapters], cells


def markdown(corner: str, head: list[str], rows: dict[str, list[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join([corner, *head]) + " |", "|---|" + "---|" * len(head)]
    lines += ["| " + " | ".join([name, *row]) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def counted(cells: dict[str, list[str]]) -> dict[str, list[str]]:
    """How many definitions are in each state, chapter by chapter."""
    columns = list(zip(*cells.values(), strict=True))
    return {k: [str(column.count(k)) for column in columns] for k in ("same", *KINDS)}


def table(root: Path = ROOT, part: str = "all") -> str:
    """Chapter by definition in Markdown: same, changed, new, dropped."""
    head, cells = states(root, part)
    rows = {f"`{name}`": row for name, row in cells.items()}
    rows |= {f"*{kind}*": row for kind, row in counted(cells).items()}
    return markdown("definition", head, rows)


def counts(root: Path = ROOT, part: str = "all") -> str:
    """How many definitions each chapter keeps, changes, adds and drops, in Markdown."""
    head, cells = states(root, part)
    return markdown("definitions", head, counted(cells))


def diff(first: str, second: str, root: Path = ROOT, only: Iterable[str] = ()) -> str:
    """What two chapters differ in: the names, then the unified diffs of these units.

    `only` names definitions to print the diffs of, and nothing else; ValueError for one
    that neither chapter has.
    """
    a, b = find(first, root), find(second, root)
    old, new = outline(a.source), outline(b.source)
    names = [n for n in old.units if n not in new.units]
    names += [
        n
        for n in new.units
        if n not in old.units or old.units[n].text != new.units[n].text
    ]
    owners = {unit.owner for part in (old, new) for unit in part.units.values()}
    if missing := [name for name in only if name not in owners]:
        raise ValueError(f"neither chapter defines {', '.join(missing)}")
    if only:
        names = [n for n in names if n.split(".")[0] in set(only)]
    parts = [
        unit_diff(old.units.get(n), new.units.get(n), a.path, b.path) for n in names
    ]
    head = [] if only else [f"To {b.path}\n" + compare(old, new, a.path).block()]
    return "\n\n".join(head + parts)


def carry(name: str, start: str | None = None, root: Path = ROOT) -> list[str]:
    """Copy a unit into every later chapter that promises to have it unchanged.

    The source is the first chapter that has the unit, or `start`. It goes into each
    following chapter up to the one whose Lineage block lists it. The copies to be
    replaced must agree with each other, or else one of them holds an edit of its own
    and nothing is written. All files are written, or none. Returns the paths written.
    """
    chapters = discover(root)
    holders = [c for c in chapters if name in outline(c.source).units]
    if not holders:
        raise ValueError(f"no chapter has a unit {name!r}")
    source = find(start, root) if start else holders[0]
    origin = outline(source.source).units.get(name)
    if origin is None:
        raise ValueError(f"{source.path} has no unit {name!r}")
    targets, olds = [], {}
    for chapter in chapters[[c.name for c in chapters].index(source.name) + 1 :]:
        says = declared(chapter.source)
        owner = name.split(".")[0]
        if name in [*says.changed, *says.new, *says.dropped] or owner in says.dropped:
            break
        unit = outline(chapter.source).units.get(name)
        if unit is None:
            raise ValueError(
                f"{chapter.path} promises {name} but does not have it; nothing written"
            )
        if unit.text != origin.text:
            targets.append(chapter)
            olds.setdefault(unit.text, []).append(chapter.path)
    if len(olds) > 1:
        where = "; ".join(", ".join(paths) for paths in olds.values())
        raise ValueError(
            f"the later copies of {name} differ among themselves ({where}), so one of "
            "them holds an edit of its own; nothing written. Name the chapter to carry "
            "from with --from"
        )
    written = {c: replace_unit(c, name, source.source) for c in targets}
    save_all({c.script: text for c, text in written.items()})
    return [c.path for c in targets]


def replace_unit(chapter: Chapter, name: str, origin: str) -> str:
    """The chapter's source with unit `name` taken from the text `origin`."""
    here, there = outline(chapter.source).units[name], outline(origin).units[name]
    lines, new = chapter.source.splitlines(), origin.splitlines()
    if here.kind == "class":
        here_end, there_end = header_end(here, lines), header_end(there, new)
        spans = [(here.spans[0][0], here_end)], [(there.spans[0][0], there_end)]
    else:
        spans = list(here.spans), list(there.spans)
    if len(spans[0]) != len(spans[1]):
        raise ValueError(
            f"{chapter.path}: {name} stands in {len(spans[0])} places and in "
            f"{len(spans[1])} in the source; carry it by hand, nothing written"
        )
    for (a, b), (c, d) in reversed(list(zip(*spans, strict=True))):
        lines[a - 1 : b] = new[c - 1 : d]
    text = "\n".join(lines) + "\n"
    if outline(text).units[name].text != there.text:
        raise ValueError(
            f"{chapter.path}: {name} has lines between its methods; carry it by hand, "
            "nothing written"
        )
    return text


def header_end(shell: Unit, lines: list[str]) -> int:
    """The last line of a class shell before its first method."""
    end = shell.spans[0][1]
    for a, b in shell.spans[1:]:
        if any(line.strip() for line in lines[end : a - 1]):
            break
        end = b
    return end


def save_all(texts: dict[Path, str]) -> None:
    """Write every file beside its target first; then rename them all into place."""
    staged = []
    try:
        for path, text in texts.items():
            temporary = path.with_name(path.name + ".partial")
            staged.append((temporary, path))
            temporary.write_text(text, encoding="utf-8", newline="\n")
        for temporary, path in staged:
            os.replace(temporary, path)
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description="What each chapter changes of the one before it. "
        "Without arguments: check every chapter.",
    )
    command = parser.add_mutually_exclusive_group()
    command.add_argument(
        "--declare", metavar="chNN", help="print the Lineage block as it should read"
    )
    command.add_argument(
        "--table", action="store_true", help="print chapter by definition in Markdown"
    )
    command.add_argument(
        "--diff", nargs=2, metavar=("A", "B"), help="print the units that differ"
    )
    command.add_argument(
        "--carry", metavar="UNIT", help="copy a unit into the later chapters"
    )
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="NAME", help="with --diff: only these"
    )
    parser.add_argument(
        "--part",
        choices=("all", "model", "running"),
        default="all",
        help="with --table: the rows above or below the banner (default: all)",
    )
    parser.add_argument(
        "--from",
        dest="start",
        metavar="chNN",
        help="with --carry: the chapter to copy from (default: the first that has it)",
    )
    args = parser.parse_args(argv)
    try:
        return run(args, root)
    except (ValueError, SyntaxError, OSError) as error:
        print(f"lineage: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, root: Path) -> int:
    if args.declare:
        print(declare(args.declare, root))
        for name in drifted(args.declare, root):
            print(f"comment drift: {name}: the code is equal", file=sys.stderr)
    elif args.table:
        print(table(root, args.part))
    elif args.diff:
        print(diff(*args.diff, root, args.only))
    elif args.carry:
        written = carry(args.carry, args.start, root)
        done = ", ".join(written) or "no later chapter needs it"
        print(f"{args.carry}: {done}")
    else:
        found = check(root)
        print(
            "\n\n".join(found) or f"{len(discover(root))} chapters keep their lineage"
        )
        return 1 if found else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
