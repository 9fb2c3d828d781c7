# SPDX-License-Identifier: MIT
"""`make demo` shows one row a chapter, and a failure as a failure."""

import json

import demo
import pytest
from chapters import discover

ROW = {"chapter": "ch01_a", "did": "trained", "distance": 9.5e-7, "said": "नमस्ते"}
SCRIPT = """
import sys
from pathlib import Path
assert sys.argv[1:3] == ["demo", "--json"]
print("working")
Path("scratch.txt").write_text("left in its own folder")
{end}
"""


@pytest.fixture
def book(tmp_path, monkeypatch):
    def write(**endings):
        for name, end in endings.items():
            folder = tmp_path / name
            folder.mkdir()
            text = SCRIPT.format(end=end)
            (folder / "a.py").write_text(text, encoding="utf-8")
        chapters = discover(tmp_path)
        monkeypatch.setattr(demo, "discover", lambda: chapters)
        return tmp_path

    return write


def writes(row):
    text = json.dumps(row)
    return f"Path(sys.argv[3]).write_text({text!r}, encoding='utf-8')"


def test_each_chapter_gives_its_row(book, capsys):
    root = book(ch01_a=writes(ROW), ch02_b=writes(ROW | {"chapter": "ch02_b"}))
    assert demo.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert out.count("9.5e-07") == 2 and out.count("नमस्ते") == 2
    assert "ch01_a" in out and "ch02_b" in out and "FAILED" not in out
    assert not list(root.rglob("scratch.txt"))


BAD = {
    "exit": ("sys.exit(2)", "FAILED: exit code 2"),
    "nothing": ("", "FAILED: "),
    "no json": ("Path(sys.argv[3]).write_text('{')", "FAILED: "),
    "another chapter": (writes(ROW | {"chapter": "ch09"}), "not one of"),
    "silent": (writes(ROW | {"said": " "}), "no text under 'said'"),
    "no number": (writes(ROW | {"distance": "small"}), "no finite distance"),
    "nan": (writes(ROW | {"distance": float("nan")}), "no finite distance"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_failure_is_shown_and_the_others_still_run(case, book, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "900")
    end, message = BAD[case]
    book(ch01_a=end, ch02_b=writes(ROW | {"chapter": "ch02_b"}))
    assert demo.main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert "9.5e-07" in out and "FAILED" in out
    assert message in out
    assert "failed: ch01_a" in err


def test_long_cells_wrap_and_combining_signs_take_no_column():
    row = ROW | {"said": "a b c d e f g " * 20, "did": "word " * 30}
    text = demo.table([row, ROW], 90)
    assert max(map(demo.width, text.splitlines())) <= 90
    assert demo.width("नमस्ते") == 4
    lines = demo.table([ROW, ROW | {"said": "plain"}], 100).splitlines()
    assert lines[2].index("9.5e-07") == lines[3].index("9.5e-07")


def test_verify_runs_every_chapter(book, capsys):
    check = "assert 0"
    root = book(ch01_a=check)
    script = root / "ch01_a" / "a.py"
    script.write_text("import sys; sys.exit(sys.argv[1:] != ['verify'])")
    assert demo.main(["verify"]) == 0
    script.write_text("import sys; sys.exit(1)")
    assert demo.main(["verify"]) == 1
    assert "failed: ch01_a" in capsys.readouterr().err
