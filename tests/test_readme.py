# SPDX-License-Identifier: MIT
"""Every number in a README comes from somewhere, and every command works."""

import hashlib
import json
import re
import textwrap
from pathlib import Path

import pytest
import readme
import results
from chapters import ROOT, discover

READMES = readme.readmes()


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(params=READMES, ids=name)
def page(request):
    return request.param


def test_every_chapter_has_a_readme():
    missing = [c.name for c in discover() if not c.readme.is_file()]
    assert not missing, f"without README.md: {missing}"


def test_the_generated_regions_are_current(page):
    advice = "python tests/readme.py --write"
    assert readme.rendered(page) == page.read_text(encoding="utf-8"), advice


def test_no_number_stands_in_prose(page):
    found = readme.loose_numbers(page.read_text(encoding="utf-8"))
    assert not found, (
        f"{name(page)}: these look like measurements; put them into a region "
        f"(tests/readme.py says how): {found}"
    )


def test_the_commands_exist_with_their_flags(page):
    found = readme.commands(page.read_text(encoding="utf-8"))
    wrong = [w for w in map(readme.problem, found) if w]
    assert not wrong, "\n".join(wrong)


def test_the_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    targets += re.findall(r"""<img[^>]+src=["']([^"']+)""", text)
    local = [t for t in targets if "://" not in t and not t.startswith("mailto:")]
    missing = [t for t in local if not (page.parent / t).exists()]
    assert not missing, f"{name(page)} links to what is not there: {missing}"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return readme.copy_tree(tmp_path_factory.mktemp("copy") / "tree")


QUICK = [
    pytest.param(c, id=f"{name(p)}: {c.text}")
    for p in READMES
    for c in readme.commands(p.read_text(encoding="utf-8"))
    if c.run
]


@pytest.mark.parametrize("command", QUICK)
def test_the_quick_commands_run(command, tree):
    failure = readme.run(command, tree, timeout=240)
    assert failure is None, failure


def test_the_recorded_results_are_current():
    found = results.problems()
    assert not found, "\n".join(found)


# ---------------------------------------------------------------------------
# the checkers' own tests
# ---------------------------------------------------------------------------

CHAPTER = '''\
"""A chapter that adds one.

Lineage: first chapter
"""

import argparse

SIZE = 3


def add(x):
    """One more."""
    return x + 1  # a comment


# running the chapter


def talk():
    return "hello"


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int)
    parser.parse_args(argv)
    raise RuntimeError("the command was run")


if __name__ == "__main__":
    main()
'''


@pytest.fixture
def book(tmp_path):
    """A repository with one chapter, a data file and an empty README."""
    folder = tmp_path / "ch01_one"
    folder.mkdir()
    stem = f"one_{abs(hash(tmp_path.as_posix())) % 10**8}"
    (folder / f"{stem}.py").write_text(CHAPTER, encoding="utf-8")
    (tmp_path / "data.txt").write_text("some data\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("# A book\n", encoding="utf-8")
    (tmp_path / "Makefile").write_text("demo: x\n\t@$(BIN)/python a.py\nlab:\n\ttrue\n")
    return tmp_path


def script(book):
    return next(book.glob("ch01_one/*.py"))


def record(book, **edits):
    path = book / "ch01_one" / "results" / "train.json"
    data = {"exact": {"short": 0.968}, "rows": [1, 2]}
    source = script(book).relative_to(book).as_posix()
    sources = edits.get("sources", [f"{source}::model", "data.txt"])
    results.write(path, "python one.py", data, sources, edits.get("files", ()), book)
    return path


def write(book, text):
    path = book / "ch01_one" / "README.md"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def test_a_template_is_filled_from_records_and_code(book):
    record(book)
    path = write(
        book,
        """\
        <!-- begin: template
        Exact: {{results/train.json exact.short :: .1%}}, {{results/train.json rows.1}},
        by {{results/train.json @command}}, size {{= chapter.SIZE * 1000 :: ,}}.
        -->
        stale
        <!-- end -->
        """,
    )
    text = readme.rendered(path, book)
    assert "\nExact: 96.8%, 2,\nby python one.py, size 3,000.\n<!-- end -->" in text
    path.write_text(text, encoding="utf-8")
    assert readme.rendered(path, book) == text
    path.write_text(text.replace("96.8%", "97.8%"), encoding="utf-8")
    assert readme.rendered(path, book) == text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "<!-- begin: template\n{{results/no.json a}}\n-->\n<!-- end -->",
            "no such rec",
        ),
        (
            "<!-- begin: template\n{{results/train.json b}}\n-->\n<!-- end -->",
            "has no b",
        ),
        (
            "<!-- begin: template\n{{results/train.json rows :: d}}\n-->\n<!-- end -->",
            "unsupported format",
        ),
        ("<!-- begin: tables -->\n<!-- end -->", "unknown region 'tables'"),
        ("<!-- begin: chapters -->\n", "1 regions begin and 0 end"),
    ],
)
def test_a_wrong_region_is_named(book, body, message):
    record(book)
    with pytest.raises(ValueError, match=message):
        readme.rendered(write(book, body), book)


def test_the_other_regions(book):
    path = book / "README.md"
    kinds = ("chapters", "lineage-table model")
    text = "".join(f"<!-- begin: {kind} -->\n<!-- end -->\n" for kind in kinds)
    path.write_text(text, encoding="utf-8")
    out = readme.rendered(path, book)
    assert "| ch01_one | A chapter that adds one. | [one_" in out
    assert "| `add` | new |" in out and "talk" not in out
    page = write(book, "<!-- begin: lineage-counts model -->\n<!-- end -->")
    rows = readme.rendered(page, book).splitlines()
    listed = [line for line in out.splitlines() if line.startswith("| `")]
    assert f"| new | {sum('| new |' in line for line in listed)} |" in rows
    page = write(book, "<!-- begin: lineage -->\n<!-- end -->")
    assert "The first chapter: 4 definitions, all new." in readme.rendered(page, book)


@pytest.mark.parametrize(
    "text",
    [
        "It reaches 96.8 % in the end.",
        "It reaches 97% in the end.",
        "The distance is 9.5e-7.",
        "It writes 9,300 tokens/s.",
        "It takes 180 seconds on a laptop.",
        "A loss of .54 is good.",
        "BLEU 98 is high.",
        "The model has 1.1 million parameters.",
        "It needs 93 MB of disk.",
        "about 22 times faster",
    ],
)
def test_a_loose_number_is_caught(text):
    assert readme.loose_numbers(f"# Title\n\nWords.\n\n{text}\n") != []
    assert readme.loose_numbers(text)[0].startswith("line 1:")
    assert readme.loose_numbers(f"```\n{text}\n```\n") == []
    assert readme.loose_numbers(f"{text} <!-- stated: the paper, table 2 -->") == []
    region = f"<!-- begin: template\n{text}\n-->\n{text}\n<!-- end -->"
    assert readme.loose_numbers(region) == []
    assert readme.loose_numbers(f"{region}\n\n{text}") != []


@pytest.mark.parametrize(
    "text",
    [
        "Python 3.11 or newer, tested on Python 3.11 and 3.13, torch 2.13.0.",
        "Vaswani et al. 2017, §5.3 and eq. 1 of arXiv:1706.03762.",
        "GPT-2 124M and Llama 3.2, in 7 chapters with 1,024 ranks.",
        "See `results/train.json` for `0.968` and [a link](https://a.b/1.5).",
    ],
)
def test_a_name_with_a_number_is_no_measurement(text):
    assert readme.loose_numbers(text) == []


def test_commands_are_found_with_their_lines():
    text = textwrap.dedent(
        """\
        Words.

        <!-- run -->
        ```bash
        $ make demo   # the comment
        # a comment
        python a.py \\
            --steps 3
        ```

        ```powershell
        .venv\\Scripts\\python a.py
        ```

        ```text
        no command
        ```
        """
    )
    found = [(c.line, " ".join(c.text.split()), c.run) for c in readme.commands(text)]
    assert found == [
        (5, "make demo", True),
        (8, "python a.py --steps 3", True),
        (12, ".venv\\Scripts\\python a.py", False),
    ]


def test_wrong_commands_are_named_and_right_ones_are_not_run(book):
    path = script(book).relative_to(book).as_posix()

    def problem(text):
        return readme.problem(readme.Command(1, text, False), book)

    for right in (
        "make demo",
        "make PYTHON=python3.12 demo",
        f"python {path}",
        f"python {path} --steps 3",
        f"OMP_NUM_THREADS=1 python {path} --steps 3",
        f".venv\\Scripts\\python {path} --steps 3",
        f"python {path} --help",
        f"echo 3 | python {path}",
        "python -m venv .venv",
        "git clone URL",
    ):
        assert problem(right) is None, right
    for wrong, message in {
        "make dmo": "no such target: dmo",
        f"python {path} --stps 3": "unrecognized arguments: --stps 3",
        f"python {path} --steps three": "invalid int value: 'three'",
        "python ch01_one/gone.py": "no such script: ch01_one/gone.py",
        "python -m nothing": "unknown module nothing",
        f"echo 3 | python {path} -x": "unrecognized arguments: -x",
        "frobnicate": "unknown command frobnicate",
    }.items():
        assert message in (problem(wrong) or ""), wrong


def test_a_failing_command_shows_its_end(book):
    path = script(book).relative_to(book).as_posix()
    failure = readme.run(readme.Command(1, f"python {path} --steps 3", True), book)
    assert "exit code 1" in failure and "the command was run" in failure
    good = readme.Command(1, f"python {path} --help", True)
    assert readme.run(good, book) is None


def test_make_targets_are_run_as_their_script(book):
    assert readme.recipe(readme.Command(1, "make demo", False), book) == "python a.py"
    assert readme.recipe(readme.Command(1, "make lab", False), book) is None
    assert not readme.is_setup(readme.Command(1, "make demo", False), book)
    assert readme.is_setup(readme.Command(1, "make lab", False), book)
    real = readme.Command(1, "make verify", False)
    assert readme.recipe(real, ROOT) == "python tests/demo.py verify"
    assert readme.is_setup(readme.Command(1, "make check-readme", False), ROOT)


def test_all_commands_are_run_each_once(book, capsys):
    (book / "a.py").write_text("print('ran')\n", encoding="utf-8")
    text = """\
    ```bash
    git clone URL
    make lab
    make demo
    python a.py
    ```

    ```powershell
    .venv\\Scripts\\python a.py
    ```
    """
    write(book, text)
    assert readme.run_all(book) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == ["$ make demo", "1 commands ran"]
    (book / "a.py").write_text("raise SystemExit('broken')\n", encoding="utf-8")
    assert readme.run_all(book) == 1
    assert "make demo: exit code 1\nbroken" in capsys.readouterr().out


# ---------------------------------------------------------------------------
# recorded results
# ---------------------------------------------------------------------------


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_a_record_is_current_until_its_sources_change(book):
    path = record(book)
    assert results.problems(book) == []
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert set(kept) == {"command", "machine", "date", "sources", "data"}
    assert "torch" in kept["machine"]
    for old, new in [
        ("# a comment", "# another"),
        ('"""One more."""', '"""And one."""'),
        ('return "hello"', 'return "goodbye"'),  # below the banner
    ]:
        edit(script(book), old, new)
    assert results.problems(book) == []
    edit(script(book), "x + 1", "x + 2")
    (found,) = results.problems(book)
    assert "was recorded with another" in found
    assert "::model; run again: python one.py" in found
    edit(script(book), "x + 2", "x + 1")
    edit(book / "data.txt", "some", "other")
    (found,) = results.problems(book)
    assert "data.txt; run again" in found


def test_the_hash_is_the_same_on_every_python(tmp_path):
    function = (
        '@cache\ndef f(x):\n    """Doc."""\n    return f"{x[0]!r:>{x[1]}}"  # c\n'
    )
    text = f'"""Doc."""\n\n{function}'
    (tmp_path / "a.py").write_text(text, encoding="utf-8")
    lines = '@cache\ndef f(x):\n    return f"{x[0]!r:>{x[1]}}"'
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert results.digest("a.py", tmp_path) == expected
    assert results.digest("a.py::f", tmp_path) == expected


def test_a_single_definition_can_be_a_source(book):
    source = script(book).relative_to(book).as_posix()
    record(book, sources=[f"{source}::talk", f"{source}::SIZE"])
    edit(script(book), "x + 1", "x + 2")
    assert results.problems(book) == []
    edit(script(book), "hello", "goodbye")
    assert "::talk" in results.problems(book)[0]
    edit(script(book), "def talk", "def chat")
    assert "::talk" in results.problems(book)[0]
    with pytest.raises(ValueError, match="has 0 top-level definitions of gone"):
        record(book, sources=[f"{source}::gone"])
    with pytest.raises(ValueError, match="at least one source"):
        record(book, sources=[])


def test_new_hashes_are_accepted_with_a_reason(book):
    path = record(book)
    edit(script(book), "x + 1", "1 + x")
    assert results.accept(path, "a sum has no order", book)
    assert results.problems(book) == []
    (entry,) = json.loads(path.read_text(encoding="utf-8"))["accepted"]
    assert entry["reason"] == "a sum has no order"
    assert results.main(["--accept", str(path)]) == 2


def test_files_belong_to_a_record(book):
    folder = book / "ch01_one" / "results"
    folder.mkdir()
    (folder / "loss.png").write_bytes(b"figure")
    assert "no record beside it lists it" in results.problems(book)[0]
    record(book, files=["loss.png"])
    assert results.problems(book) == []
    (folder / "loss.png").write_bytes(b"another")
    assert "not the file that was recorded" in results.problems(book)[0]
    (folder / "loss.png").unlink()
    assert "not the file that was recorded" in results.problems(book)[0]


def test_a_malformed_record_is_named(book):
    path = record(book)
    kept = json.loads(path.read_text(encoding="utf-8"))
    del kept["machine"]
    path.write_text(json.dumps(kept), encoding="utf-8")
    assert "train.json: train.json lacks machine" in results.problems(book)[0]
    Path(path).write_text("{", encoding="utf-8")
    assert "train.json: " in results.problems(book)[0]


def test_what_cannot_be_fetched_is_told_from_what_is_wrong(tmp_path):
    def needs(text):
        return readme.needs_hub(readme.Command(1, text, False), tmp_path)

    assert needs("python data/download.py gpt2")
    assert needs("python ch02_gpt2/gpt2.py verify --model data/hub/gpt2")
    assert not needs("python ch02_gpt2/gpt2.py verify")
    (tmp_path / "data/hub/gpt2").mkdir(parents=True)
    assert not needs("python ch02_gpt2/gpt2.py verify --model data/hub/gpt2")


def test_a_make_target_with_shell_in_it_is_not_run_as_one_script():
    def script(text):
        return readme.recipe(readme.Command(1, text, False), readme.ROOT)

    assert script("make demo") == "python tests/demo.py demo"
    assert script("make test") is None, "its download goes on after an error"
