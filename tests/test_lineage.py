# SPDX-License-Identifier: MIT
"""The chapters keep their Lineage blocks, and the checker catches who does not."""

import textwrap

import lineage
import pytest
from chapters import discover, find, unfinished


@pytest.mark.parametrize("chapter", discover(), ids=str)
def test_the_chapter_keeps_its_lineage_block(chapter):
    found = lineage.problems(chapter, lineage.previous_of(chapter))
    assert not found, "\n\n".join(found)


def test_every_chapter_folder_holds_its_file():
    assert unfinished() == []


# ---------------------------------------------------------------------------
# the checker's own tests, on a book of tiny chapters
# ---------------------------------------------------------------------------

FIRST = '''\
# SPDX-License-Identifier: MIT
# From a book of tests.
"""The first chapter.

Lineage: first chapter
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

Pair = tuple[int, int]
SIZE: int = 3


# Why the norm is here.
@staticmethod
def norm(x):
    """Half of x."""
    return x / 2  # a comment


class Attention:
    """Attends."""

    width = 4

    def __init__(self):
        self.a = 1

    # Why forward is so.
    def forward(self, x):

        return x
        # a trailing comment

    @property
    def size(self):
        return 1

    @size.setter
    def size(self, value):
        self.a = value


# ---------------------------------------------------------------------------
# running the chapter
# ---------------------------------------------------------------------------


def train():
    return math.pi


def main():
    return train()


if __name__ == "__main__":
    main()
'''

BLOCK = "Lineage: from ch01_one/one.py"


def second(block=BLOCK, **edits):
    """The first chapter's text with another docstring and with text replaced."""
    text = FIRST.replace("Lineage: first chapter", block).replace("first", "second")
    for old, new in edits.get("swap", []):
        assert text.count(old) == 1, f"the fixture has {old!r} {text.count(old)} times"
        text = text.replace(old, new)
    return text


@pytest.fixture
def book(tmp_path):
    """A function that writes the given sources as chapters; returns their root."""

    def write(*sources):
        names = ["one", "two", "three", "four"]
        for i, (name, source) in enumerate(zip(names, sources, strict=False), 1):
            folder = tmp_path / f"ch{i:02}_{name}"
            folder.mkdir(exist_ok=True)
            path = folder / f"{name}.py"
            path.write_text(source, encoding="utf-8", newline="\n")
        return tmp_path

    return write


def test_units_are_cut_where_the_rules_say():
    units = lineage.outline(FIRST).units
    assert list(units) == [
        "Pair",
        "SIZE",
        "norm",
        "Attention",
        "Attention.__init__",
        "Attention.forward",
        "Attention.size",
        "train",
        "main",
    ]
    assert units["norm"].text.startswith("# Why the norm is here.\n@staticmethod\n")
    assert units["norm"].text.endswith("# a comment")
    assert units["Attention"].text == (
        'class Attention:\n    """Attends."""\n    width = 4'
    )
    assert units["Attention.forward"].text == (
        "    # Why forward is so.\n    def forward(self, x):\n\n"
        "        return x\n        # a trailing comment"
    )
    assert units["Attention.size"].text.count("def size") == 2
    assert "running" not in units["train"].text
    assert lineage.outline(FIRST).strays == []


def test_equal_chapters_with_nothing_declared_pass(book):
    assert lineage.check(book(FIRST, second())) == []


def test_blank_lines_between_units_and_imports_do_not_count(book):
    edits = [
        ("SIZE: int = 3\n\n", "SIZE: int = 3\n\n\n\n"),
        ("import math", "import os"),
    ]
    assert lineage.check(book(FIRST, second(swap=edits))) == []


def test_a_blank_line_inside_a_unit_counts(book):
    text = second(swap=[("x):\n\n        return x", "x):\n        return x")])
    (found,) = lineage.check(book(FIRST, text))
    assert "Attention.forward is changed and not declared (comment drift" in found


def test_an_undeclared_change_is_caught_with_its_diff(book):
    text = second(swap=[("self.a = 1", "self.a = 2")])
    (found,) = lineage.check(book(FIRST, text))
    assert "ch02_two/two.py: Attention.__init__ is changed and not declared" in found
    assert "-        self.a = 1" in found and "+        self.a = 2" in found
    assert "--carry Attention.__init__" in found
    assert "comment drift" not in found


@pytest.mark.parametrize(
    ("old", "new", "unit"),
    [
        ("# Why the norm is here.", "# Why it is here.", "norm"),
        ("# a comment", "# another", "norm"),
        ("# a trailing comment", "# another", "Attention.forward"),
        ("# Why forward is so.", "# So.", "Attention.forward"),
        ("SIZE: int = 3", "SIZE: int = (3)", "SIZE"),
        ("    width = 4", "    width = 4  # wide", "Attention"),
    ],
)
def test_a_drifted_comment_is_caught_and_named_so(book, old, new, unit):
    root = book(FIRST, second(swap=[(old, new)]))
    (found,) = lineage.check(root)
    assert f"{unit} is changed and not declared (comment drift" in found
    assert lineage.drifted("ch02", root) == [unit]


@pytest.mark.parametrize(
    ("old", "new", "unit"),
    [
        ('"""Half of x."""', '"""A half of x."""', "norm"),
        ("@staticmethod\n", "", "norm"),
        ("SIZE: int = 3", "SIZE: int = 4", "SIZE"),
        ("Pair = tuple", "Pair = list", "Pair"),
        ("class Attention:", "class Attention(dict):", "Attention"),
        ('"""Attends."""', '"""Looks."""', "Attention"),
        ("width = 4", "width = 5", "Attention"),
        ("self.a = value", "self.a = 0", "Attention.size"),
        ("return math.pi", "return math.e", "train"),
    ],
)
def test_each_kind_of_unit_is_compared(book, old, new, unit):
    text = second(swap=[(old, new)])
    (found,) = lineage.check(book(FIRST, text))
    assert f"{unit} is changed and not declared; either" in found
    right = second(f"{BLOCK}\n    changed: {unit}", swap=[(old, new)])
    assert lineage.check(book(FIRST, right)) == []


def test_new_and_dropped_units(book):
    swap = [
        ("def train():\n    return math.pi\n", "class Mix:\n    def f(self): ...\n")
    ]
    swap += [("    def __init__(self):", "    def setup(self):")]
    found = lineage.check(book(FIRST, second(swap=swap)))
    heads = [line.splitlines()[0].split(";")[0] for line in found]
    assert heads == [
        "ch02_two/two.py: Attention.setup is new and not declared",
        "ch02_two/two.py: Mix is new and not declared",
        "ch02_two/two.py: Attention.__init__ is dropped and not declared",
        "ch02_two/two.py: train is dropped and not declared",
    ]
    block = "\n    ".join(
        [BLOCK, "new: Mix", "    Attention.setup", "dropped: Attention.__init__ train"]
    )
    assert lineage.check(book(FIRST, second(block, swap=swap))) == []


def test_a_dropped_class_is_listed_once(book):
    start, end = FIRST.index("class Attention"), FIRST.index("# -----")
    swap = [(FIRST[start:end], "")]
    block = f"{BLOCK}\n    dropped: Attention"
    assert lineage.check(book(FIRST, second(block, swap=swap))) == []
    wordy = f"{block} Attention.forward"
    (found,) = lineage.check(book(FIRST, second(wordy, swap=swap)))
    assert "but it goes with the dropped Attention" in found


@pytest.mark.parametrize(
    ("kind", "name", "why"),
    [
        ("changed", "norm", "its text equals ch01_one/one.py"),
        ("changed", "Attention", "methods apart"),
        ("new", "norm", "its text equals ch01_one/one.py"),
        ("dropped", "norm", "its text equals ch01_one/one.py"),
        ("changed", "Atention", "neither file has such a unit"),
    ],
)
def test_what_is_declared_must_be_so(book, kind, name, why):
    (found,) = lineage.check(book(FIRST, second(f"{BLOCK}\n    {kind}: {name}")))
    assert f"{name} is listed under '{kind}:', but {why}" in found or why in found


def test_a_unit_in_the_wrong_list_is_caught_twice(book):
    text = second(f"{BLOCK}\n    new: SIZE", swap=[("int = 3", "int = 4")])
    found = lineage.check(book(FIRST, text))
    assert len(found) == 2
    assert "SIZE is changed and not declared" in found[0]
    assert "SIZE is listed under 'new:', but it is changed" in found[1]


def test_kept_units_keep_their_order(book):
    train, run = (
        "def train():\n    return math.pi\n",
        "def main():\n    return train()\n",
    )
    swap = [(f"{train}\n\n{run}", f"{run}\n\n{train}")]
    (found,) = lineage.check(book(FIRST, second(swap=swap)))
    assert "is unchanged but stands elsewhere than in ch01_one/one.py" in found


@pytest.mark.parametrize(
    "stray",
    [
        "print('hello')",
        "SIZE += 1",
        "A, B = 1, 2",
        "A = B = 1",
        "for _ in range(3):\n    pass",
        "try:\n    import numpy\nexcept ImportError:\n    pass",
        "if SIZE:\n    import numpy",
        "'a second string'",
    ],
)
def test_stray_statements_fail(book, stray):
    text = FIRST.replace("SIZE: int = 3\n", f"SIZE: int = 3\n{stray}\n")
    (found,) = lineage.check(book(text))
    assert "is no function, class or single constant" in found
    assert repr(stray.splitlines()[0]) in found


def test_two_statements_on_a_line_and_second_definitions_fail(book):
    text = FIRST.replace("SIZE: int = 3", "SIZE: int = 3; WIDTH = 2")
    (found,) = lineage.check(book(text))
    assert "two statements share a line" in found
    text = FIRST.replace("def main():", "def train():")
    (found,) = lineage.check(book(text))
    assert "train is defined a second time" in found


def test_a_comment_that_belongs_to_nothing_fails(book):
    text = FIRST.replace("SIZE: int = 3\n", "SIZE: int = 3\n\n# Loose.\n\n")
    (found,) = lineage.check(book(text))
    assert "the comment '# Loose.' belongs to no unit" in found
    (found,) = lineage.check(book(FIRST + "# The end.\n"))
    assert "the comment '# The end.' belongs to no unit" in found


def test_what_looks_like_a_comment_in_a_string_is_text(book):
    text = 'TEXT = """\n# not a comment\n\n"""\n\n\n# Why the norm is here.'
    one = FIRST.replace("# Why the norm is here.", text)
    assert lineage.check(book(one)) == []
    doc = '"""Attends.\n\n# heading\n    """'
    two = FIRST.replace('"""Attends."""', doc)
    assert lineage.outline(two).units["Attention"].text.count("\n") == 5


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("Nothing here.", "must end in one Lineage block, and has 0"),
        (f"{BLOCK}\n\n{BLOCK}", "must end in one Lineage block, and has 2"),
        ("Lineage: chapter one", "should read 'Lineage: first chapter'"),
        ("Lineage: from", "should read 'Lineage: first chapter'"),
        ("Lineage: first chapter\n    new: f", "text after 'Lineage: first chapter'"),
        ("Lineage: first chapter", "makes that 'Lineage: from ch01_one/one.py'"),
        ("Lineage: from ch01_one/two.py", "makes that 'Lineage: from ch01_one/one.py'"),
        (f"{BLOCK}\n    altered: norm", "unknown list 'altered'"),
        (f"{BLOCK}\n    new: a\n    new: b", "the list 'new' appears twice"),
        (f"{BLOCK}\n    new: a a", "a is listed 2 times"),
        (f"{BLOCK}\n    new: a\n    dropped: a", "a is listed 2 times"),
        (f"{BLOCK}\n\nAnd more.", "must end the docstring; found after it"),
        (
            f"{BLOCK}\n    new: a\n    b",
            "must end the docstring; found after it: '    b'",
        ),
    ],
)
def test_a_malformed_block_is_named(book, block, message):
    # The fixture's "first" becomes "second" in the docstring, hence the plain write.
    text = FIRST.replace("Lineage: first chapter", block)
    found = lineage.check(book(FIRST, text))
    assert len(found) == 1 and message in found[0]


def test_the_first_chapter_has_no_parent(book):
    (found,) = lineage.check(book(second()))
    assert "the chapter before it makes that 'Lineage: first chapter'" in found


def test_names_may_wrap(book):
    names = [f"function_number_{i}" for i in range(12)]
    body = "\n\n\n".join(f"def {name}():\n    return 1" for name in names)
    swap = [("def main():", f"{body}\n\n\ndef main():")]
    root = book(FIRST, second(swap=swap))
    block = lineage.declare("ch02", root)
    assert max(map(len, block.splitlines())) <= 88
    assert len(block.splitlines()) > 3
    assert lineage.check(book(FIRST, second(block, swap=swap))) == []


def test_declare_prints_the_block_that_passes(book):
    swap = [("self.a = 1", "self.a = 2"), ("def train():", "def learn():")]
    swap += [("SIZE: int = 3", "SIZE: int = 4")]
    root = book(FIRST, second(swap=swap))
    assert lineage.declare("ch01", root) == "Lineage: first chapter"
    block = lineage.declare("ch02", root)
    assert block == textwrap.dedent(
        """\
        Lineage: from ch01_one/one.py
            changed: SIZE Attention.__init__
            new: learn
            dropped: train"""
    )
    assert lineage.check(book(FIRST, second(block, swap=swap))) == []


def test_the_table_has_every_state(book):
    two = second(swap=[("def train():", "def learn():"), ("self.a = 1", "self.a = 2")])
    three = two.replace("learn", "train")
    root = book(FIRST, two, three)
    assert lineage.table(root).splitlines() == [
        "| definition | ch01 | ch02 | ch03 |",
        "|---|---|---|---|",
        "| `Pair` | new | same | same |",
        "| `SIZE` | new | same | same |",
        "| `norm` | new | same | same |",
        "| `Attention` | new | changed | same |",
        "| `learn` |  | new | dropped |",
        "| `train` | new | dropped | new |",
        "| `main` | new | same | same |",
        "| *same* | 0 | 4 | 5 |",
        "| *changed* | 0 | 1 | 0 |",
        "| *new* | 6 | 1 | 1 |",
        "| *dropped* | 0 | 1 | 1 |",
    ]
    model = lineage.table(root, part="model")
    assert "Attention" in model and "train" not in model
    running = lineage.table(root, part="running")
    assert "Attention" not in running and "train" in running


def test_diff_between_any_two_chapters(book):
    two = second(swap=[("self.a = 1", "self.a = 2")])
    three = second(swap=[("self.a = 1", "self.a = 3"), ("def main():", "def run():")])
    root = book(FIRST, two, three)
    text = lineage.diff("ch01", "ch03", root)
    assert "-        self.a = 1\n+        self.a = 3" in text
    assert "-def main():" in text and "+def run():" in text
    assert "norm" not in text
    head = text.split("\n\n")[0]
    assert head.startswith("To ch03_three/three.py\nLineage: from ch01_one/one.py\n")
    assert "new: run" in head and "dropped: main" in head
    some = lineage.diff("ch01", "ch03", root, ["run"])
    assert "+def run():" in some and "self.a" not in some and "Lineage" not in some
    with pytest.raises(ValueError, match="neither chapter defines fly"):
        lineage.diff("ch01", "ch03", root, ["run", "fly"])
    with pytest.raises(ValueError, match=r"no single chapter starts with 'ch09'.*ch01"):
        lineage.diff("ch01", "ch09", root)


FIX = ("self.a = 1", "self.a = 0")


def sources(root):
    return [c.source for c in discover(root)]


def test_carry_copies_a_fix_forward(book):
    root = book(
        FIRST.replace(*FIX), second(), second().replace("ch01_one/one", "ch02_two/two")
    )
    assert lineage.carry("Attention.__init__", root=root) == [
        "ch02_two/two.py",
        "ch03_three/three.py",
    ]
    assert lineage.check(root) == []
    assert sources(root)[1] == second(swap=[FIX])
    assert lineage.carry("Attention.__init__", root=root) == []
    assert not list(root.rglob("*.partial"))


def test_carry_stops_where_a_chapter_has_its_own(book):
    own = ("self.a = 1", "self.a = 7")
    two = second(f"{BLOCK}\n    changed: Attention.__init__", swap=[own])
    three = second("Lineage: from ch02_two/two.py", swap=[own])
    root = book(FIRST.replace(*FIX), two, three)
    before = sources(root)
    assert lineage.carry("Attention.__init__", root=root) == []
    assert sources(root) == before
    two_fixed = two.replace("self.a = 7", "self.a = 8")
    root = book(FIRST, two_fixed, three)
    written = lineage.carry("Attention.__init__", "ch02", root)
    assert written == ["ch03_three/three.py"]
    assert lineage.check(root) == []


def test_carry_takes_a_class_shell_and_longer_texts(book):
    longer = ("    width = 4\n", "    width = 4\n    depth = 5  # deep\n")
    root = book(FIRST.replace(*longer), second())
    assert lineage.carry("Attention", root=root) == ["ch02_two/two.py"]
    assert lineage.check(root) == []
    longer = ("def train():\n", "# More.\ndef train():\n    # Much more.\n")
    root = book(FIRST.replace(*longer), second())
    lineage.carry("train", root=root)
    assert lineage.check(root) == []
    setter = ("self.a = value", "self.a = value + 1")
    root = book(FIRST.replace(*setter), second())
    lineage.carry("Attention.size", root=root)
    assert lineage.check(root) == []


def test_carry_refuses_when_a_later_copy_holds_an_edit(book):
    edited = second(
        "Lineage: from ch02_two/two.py", swap=[("self.a = 1", "self.a = 9")]
    )
    root = book(FIRST.replace(*FIX), second(), edited)
    before = sources(root)
    with pytest.raises(ValueError, match="differ among themselves .*nothing written"):
        lineage.carry("Attention.__init__", root=root)
    with pytest.raises(ValueError, match="no chapter has a unit 'Atention'"):
        lineage.carry("Atention", root=root)
    assert sources(root) == before


def test_carry_writes_all_files_or_none(book, monkeypatch):
    root = book(
        FIRST.replace(*FIX), second(), second().replace("ch01_one/one", "ch02_two/two")
    )
    before = sources(root)
    write = type(root).write_text

    def full(path, *args, **kwargs):
        if path.name == "three.py.partial":
            raise OSError("disk full")
        return write(path, *args, **kwargs)

    monkeypatch.setattr(type(root), "write_text", full)
    with pytest.raises(OSError, match="disk full"):
        lineage.carry("Attention.__init__", root=root)
    assert sources(root) == before
    assert not list(root.rglob("*.partial"))


def test_discovery(book, tmp_path):
    root = book(FIRST, second())
    assert [c.path for c in discover(root)] == ["ch01_one/one.py", "ch02_two/two.py"]
    assert find("ch02", root).prefix == "ch02"
    (tmp_path / "ch03_empty").mkdir()
    assert unfinished(root) == ["ch03_empty"]
    assert len(discover(root)) == 2
    (tmp_path / "ch02_two" / "extra.py").touch()
    with pytest.raises(ValueError, match="ch02_two must hold .*: extra.py, two.py"):
        discover(root)


def test_the_command_line(book, capsys):
    root = book(FIRST, second(swap=[("# a comment", "# another")]))
    assert lineage.main([], root) == 1
    assert "comment drift" in capsys.readouterr().out
    assert lineage.main(["--declare", "ch02"], root) == 0
    out, err = capsys.readouterr()
    assert "changed: norm" in out and "comment drift: norm" in err
    assert lineage.main(["--declare", "ch05"], root) == 2
    assert "no single chapter starts with 'ch05'" in capsys.readouterr().err
    assert lineage.main(["--diff", "ch01", "ch02"], root) == 0
    assert "+" in capsys.readouterr().out
    assert lineage.main(["--diff", "ch01", "ch02", "--only", "norm"], root) == 0
    assert capsys.readouterr().out.startswith("--- ")
    assert lineage.main(["--table", "--part", "model"], root) == 0
    assert "| `norm` | new | changed |" in capsys.readouterr().out
    assert lineage.main(["--carry", "norm"], root) == 0
    assert "norm: ch02_two/two.py" in capsys.readouterr().out
    assert lineage.main([], root) == 0
    assert "2 chapters keep their lineage" in capsys.readouterr().out
