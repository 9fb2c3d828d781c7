# SPDX-License-Identifier: MIT
"""The stories: as made, readable, true to their world; and the measures see breaches.

Tables here are written independently of those in data/make_stories.py, so that a slip
in the generator is not repeated by its test.
"""

import hashlib
import importlib.util
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "make_stories.py"
STORIES = SCRIPT.with_name("stories.txt")

spec = importlib.util.spec_from_file_location("make_stories", SCRIPT)
ms = importlib.util.module_from_spec(spec)
sys.modules["make_stories"] = ms  # dataclasses look their module up
spec.loader.exec_module(ms)

BOYS = ms.words("Ben Dan Leo Max Omar Ravi Tom Bruno Rex Pip Milo Otto Felix")
GIRLS = ms.words("Anna Clara Emma Lily Mia Nora Zoe Bella Kiki Olga Ruby Tilly Hazel")
CHILDREN = BOYS[:7] + GIRLS[:7]
NAMES = BOYS + GIRLS
ANY_NAME = rf"\b(?:{'|'.join(NAMES)})\b"
THINGS = ms.words("""ball kite hat scarf boat doll bell whistle book basket blanket
drum lantern umbrella key""")


@pytest.fixture(scope="module")
def told():
    """The corpus as `Story` objects, which know their cast, things and facts."""
    return ms.tell_all()


@pytest.fixture(scope="module")
def text():
    return STORIES.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def stories(text):
    return text.removesuffix("\n<|endoftext|>\n").split("\n<|endoftext|>\n")


def find(pattern, stories):
    """Every match of `pattern` with some context, for a readable failure."""
    found = []
    for story in stories:
        for m in re.finditer(pattern, story):
            found.append(story[max(0, m.start() - 40) : m.end() + 30])
    return found


# The file


def test_the_file_is_as_made(capsys):
    assert ms.main(["--check"]) == 0
    assert "as made" in capsys.readouterr().out


def test_same_bytes_whatever_the_hash_seed_and_the_number_of_runs(tmp_path):
    digests = set()
    for hash_seed in ("1", "2"):
        command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / hash_seed)]
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        subprocess.run(command, check=True, capture_output=True, env=env, timeout=30)
        assert [path.name for path in (tmp_path / hash_seed).iterdir()] == [
            STORIES.name
        ]
        made = (tmp_path / hash_seed / "stories.txt").read_bytes()
        digests.add(hashlib.sha256(made).hexdigest())
    assert digests == {hashlib.sha256(STORIES.read_bytes()).hexdigest()}


def test_chance_is_drawn_by_random_alone(monkeypatch):
    """Only `random()` has values that Python promises for every version."""
    for name in ("choice", "shuffle", "sample", "randint", "choices", "randrange"):
        monkeypatch.delattr(random.Random, name)
    assert ms.corpus(50).count(ms.END) == 50


def test_check_sees_one_changed_byte(tmp_path, capsys):
    data = bytearray(STORIES.read_bytes())
    data[1000] ^= 1
    (tmp_path / "stories.txt").write_bytes(data)
    assert ms.main(["--check", "--out", str(tmp_path)]) == 1
    assert "differs" in capsys.readouterr().out


def test_format_is_that_of_tinystories(text, stories):
    assert STORIES.read_bytes() == text.encode("ascii") and "\r" not in text
    assert text.endswith("\n<|endoftext|>\n")
    assert all(story == story.strip() and "\n\n" not in story for story in stories)
    assert not find(r"<|\||>|\t", stories)


def test_sizes(text, stories):
    assert 4_500 <= len(stories) <= 5_500
    assert len(text) <= 2_600_000
    assert 500 <= sum(map(len, stories)) / len(stories) <= 600
    assert all(250 <= len(story) <= 900 for story in stories)


def test_all_distinct_so_that_the_held_out_stories_are_unseen(stories):
    assert len(set(stories)) == len(stories)
    held_out = stories[-(len(stories) // 20) :]
    assert not set(held_out) & set(stories[: -len(held_out)])


def test_vocabulary(text):
    words = Counter(re.findall(r"[a-z']+", text.replace(ms.END, "").lower()))
    assert len(words) >= 1_500
    assert sum(count >= 5 for count in words.values()) >= 1_500  # none by one-offs


def test_plots_are_many_and_well_mixed(told):
    shares = Counter(story.plot for story in told)
    assert len(shares) >= 20
    assert min(shares.values()) >= len(told) // 100
    held_out = told[-(len(told) // 20) :]
    assert {story.plot for story in held_out} == set(shares)


def test_the_file_holds_the_told_stories(told, stories):
    assert [story.text() for story in told] == stories


# English


def test_articles(stories):
    assert not find(r"\b[Aa] (?!one\b|used|uni)[aeiouAEIOU]", stories)
    assert not find(r"\b[Aa]n (?!hour|honest)[^aeiouAEIOU]", stories)
    assert not find(r"\b[Aa] (?:hour|honest)", stories)
    assert not find(
        r"\b(?:[Aa]n?|[Tt]he|[Hh]is|[Tt]heir) (?:an?|the|his|her)\b", stories
    )
    plurals = "eggs|berries|leaves|nuts|shells|carrots|sandwiches|flowers|stones"
    assert not find(rf"\b[Aa]n? (?:\w+ )?(?:{plurals})\b", stories)


def test_no_word_is_doubled(stories):
    assert not find(r"\b(\w+) \1\b", stories)


def test_was_and_were(stories):
    assert not find(r"\b(?:[Tt]hey|[Ww]e|[Yy]ou) was\b", stories)
    assert not find(r"(?<!if )\b(?:[Hh]e|[Ss]he|[Ii]t|I) (?:were|are)\b", stories)
    assert not find(r"\b(?:[Hh]e|[Ss]he|[Ii]t) (?:have|do)\b", stories)
    assert not find(r"\b(?:him|her|them) (?:was|is|had|has)\b(?! \w+ing)", stories)


def test_punctuation(stories):
    assert not find(r"[{}\[\]_*#]", stories)  # a slot or a choice left unresolved
    assert not find(r"  | [.,!?]|[,;][.,!?]|\.\.|[!?][.,]|^ | $", stories)
    assert not find(r"[.,!?][A-Za-z]", stories)


def test_paragraphs_begin_and_end_like_sentences(stories):
    for story in stories:
        for paragraph in story.split("\n"):
            assert re.match(r'"?[A-Z]', paragraph), paragraph
            assert re.search(r'[.!?]"?$', paragraph), paragraph


def test_sentences_begin_with_capitals(stories):
    assert not find(r"[.!?] [a-z]", stories)
    # After a closing quotation mark, small letters only for "…?" asked Tom.
    verbs = r"(?:said|asked|cried|called|he|she|they|came|laughed|chuckled|shouted|{})"
    names = (
        "sighed|moaned|groaned|yelled|thought|told|explained|gasped|panted|whispered|at"
    )
    assert not find(rf'[.!?]" (?!{verbs.format(names)}\b)[a-z]', stories)


def test_quotes_are_balanced_and_hug_their_text(stories):
    for story in stories:
        for paragraph in story.split("\n"):
            assert paragraph.count('"') % 2 == 0, paragraph
            # A quotation that goes on after its speaker goes on in small letters.
            spoken = re.sub(r'," said \w+, "', " ", paragraph).split('"')[1::2]
            assert all(re.match(r"[A-Z].*[.,!?]$", quote) for quote in spoken), (
                paragraph
            )


def test_a_statement_is_not_closed_by_a_full_stop_before_its_speaker(stories):
    assert not find(r'\." (?:said|he said|she said|asked)\b', stories)


RELATIVE = re.compile(
    r"mother|father|uncle|aunt|\bm[ae]n\b|king|queen|family|farmer|shepherd|miller|thief"
)


def test_pronouns_fit_as_long_as_one_character_is_named(stories):
    """Up to the second name every he or she is the first; then they may mix."""
    checked = 0
    for story in stories:
        names = list(re.finditer(ANY_NAME, story))
        others = [m for m in names if m[0] != names[0][0]]
        part = story[: others[0].start()] if others else story
        if RELATIVE.search(part):
            continue
        wrong = "she|her|herself" if names[0][0] in BOYS else "he|him|his|himself"
        checked += bool(re.search(r"\b(?:he|him|his|she|her)\b", part, re.I))
        assert not re.search(rf"\b(?:{wrong})\b", part, re.I), part
    assert checked > len(stories) / 2


# The world


def test_names_and_things_are_those_of_the_story(told):
    for story in told:
        text = story.text()
        names = set(re.findall(ANY_NAME, text))
        things = set(re.findall(rf"\b({'|'.join(THINGS)})s?\b", text.lower()))
        assert names == {who.name for who in story.cast}, text
        assert things == {thing.noun for thing in story.things}, text
        assert len(names) <= 3 and len(things) <= 2


LOOKS = "red|blue|green|yellow|orange|purple|pink|white|black|brown|silver|golden|grey|"
LOOKS += "striped"


def test_a_thing_keeps_its_look(told):
    for story in told:
        for thing in story.things:
            looks = re.findall(rf"\b({LOOKS}) {thing.noun}\b", story.text())
            assert set(looks) <= {thing.look}, story.text()


CAN = {
    r"(?:flew|spread (?:his|her) wings)": "Kiki Olga",
    r"(?:swam|slid into the water|jumped in)": "Otto Tilly",
    r"(?:climbed (?:quickly|nimbly|up and showed)|dug h\w\w claws)": "Felix Hazel",
    r"(?:crawled (?!through|out)|squeezed into|slipped (?:in|through).* crack)": "Pip",
    r"dug (?:a (?!hole)|so )": "Milo",
    r"(?:rolled it away|leaned against the log|lifted the stone, and)": "Bruno Bella",
    r"(?:put (?:his|her) nose to|sniffed (?:the|at))": "Rex",
}


@pytest.mark.parametrize("deed", CAN)
def test_only_those_who_can_do_it(deed, stories):
    pattern = rf"\b({'|'.join(NAMES)}) {deed}"
    doers = Counter(m[1] for story in stories for m in re.finditer(pattern, story))
    assert set(doers) == set(CAN[deed].split()), doers


NEEDS = {
    "tree": "Kiki Olga Felix Hazel",
    "water": "Otto Tilly",
    "hole": "Pip Milo",
    "log": "Bruno Bella",
}


def test_who_fetches_a_thing_and_who_needs_help(told):
    ways = Counter()
    for story in told:
        for verb, *rest in story.facts:
            if verb != "fetched":
                continue
            thing, trap, helper, _, way = rest
            ways[trap, way] += 1
            assert thing == story.things[0].noun
            assert helper in (NEEDS[trap].split() if way == "skill" else CHILDREN)
            assert story.cast[0].name not in NEEDS[trap].split(), "could do it alone"
    assert set(ways) == {(trap, way) for trap in NEEDS for way in ("skill", "tool")}


def test_what_is_found_is_what_was_lost(told):
    for story in told:
        if story.plot == "lost":
            (found,) = [fact for fact in story.facts if fact[0] == "found"]
            (thing,) = story.things
            end = story.text().split("\n")[-1]
            assert found[1] == thing.noun and re.search(rf"\b{thing.noun}\b", end)
            assert (
                f"the {found[4].removeprefix('the ')}" in end or "there it was" in end
            )
            assert story.cast[0].skill not in ("fly", "smell")


MENDS = dict(kite="paper", boat="stick", doll="needle", book="tape", blanket="needle")
MENDS |= dict(drum="leather", lantern="glass", umbrella="wire")


def test_broken_things_are_mended_with_what_they_are_made_of(told):
    mended = {f[1:] for s in told for f in s.facts if f[0] == "mended"}
    assert {thing for thing, _ in mended} == set(MENDS)
    assert all(MENDS[thing] in cure for thing, cure in mended)
    for story in told:
        if story.plot == "broken":
            assert MENDS[story.things[0].noun] in story.text().split("\n")[-1]


def test_a_lesson_is_taught_by_someone_who_can(told):
    teachers = {
        "swim": "Otto Tilly",
        "climb a tree": "Felix Hazel",
        "follow a trail": "Rex",
        "run fast": "Ruby",
        "lift a heavy sack": "Bruno Bella",
        "dig a tunnel": "Milo",
    }
    taught = [f[1:] for s in told for f in s.facts if f[0] == "taught"]
    for what, teacher, _ in taught:
        if what in teachers:
            assert teacher in teachers[what].split()
    assert set(teachers) <= {what for what, *_ in taught}


def test_rescuers(told):
    able = {"water": "Otto Tilly", "pit": "Milo", "rock": "Bruno Bella"}
    able |= {"tree": "Felix Hazel"}
    for story in told:
        for fact in story.facts:
            if fact[0] == "rescued":
                _, victim, danger, saver, skill = fact
                assert victim in CHILDREN
                assert skill == "tool" or saver in able[danger].split()


def test_a_traded_thing_goes_back_only_if_it_was_traded_back(told):
    ends = Counter()
    for story in told:
        if story.plot == "trading":
            t, u = story.things
            facts = [fact[0] for fact in story.facts]
            back = "traded back" in facts
            assert back != ("kept" in facts)
            ends[back] += 1
            returned = f"got the {t.full} back" in story.text()
            assert back or not returned
    assert min(ends.values()) > 20


# The measures


def test_the_corpus_is_consistent(text, stories):
    assert ms.consistency(text) == 1.0
    wrong = [(fault, story) for story in stories for fault in ms.faults(story)]
    assert not wrong, wrong[0]


FOUR_NAMES = "Tom and Mia met Pip and Rex."
THREE_THINGS = "Tom had a ball, a kite and two drums."
FINE = "A boy named Tom had a red ball. He met Pip the mouse."


def test_consistency_by_hand():
    text = f"{FINE}\n{ms.END}\n{FOUR_NAMES}\n{ms.END}\n{THREE_THINGS}\n{ms.END}\n\n"
    assert ms.consistency(text) == 1 / 3
    assert ms.consistency(text + FINE[:20]) == 2 / 4  # an unfinished story counts
    assert ms.consistency(f"{ms.END}\n{FINE}") == 1  # an empty one does not
    with pytest.raises(ValueError, match="at least one story"):
        ms.consistency(f"\n{ms.END}\n")


def test_consistency_falls_when_names_or_things_are_swapped(stories):
    """One mention swapped for a newcomer is a breach where the story was full."""
    rng = random.Random(1)
    full = [s for s in stories if len(set(re.findall(ANY_NAME, s))) == 3]
    swapped = [swap(s, NAMES, rng) for s in full]
    assert ms.consistency(ms.END.join(swapped)) == 0
    pairs = [s for s in stories if len(set(ms.THING.findall(s))) == 2]
    swapped = [swap(s, THINGS, rng) for s in pairs]
    assert len(pairs) > 100 and ms.consistency(ms.END.join(swapped)) == 0


def swap(story, words, rng):
    """`story` with one mention of one of `words`, not the first, made another word."""
    found = list(re.finditer(rf"\b(?:{'|'.join(words)})\b", story))
    again = [m for i, m in enumerate(found) if m[0] in [x[0] for x in found[:i]]]
    mention = again[int(rng.random() * len(again))]
    new = [word for word in words if not re.search(rf"\b{word}\b", story)]
    word = new[int(rng.random() * len(new))]
    return story[: mention.start()] + word + story[mention.end() :]


def test_faults_sees_every_name_swapped_for_a_newcomer(stories):
    rng = random.Random(2)
    for story in stories[:1000]:
        broken = swap(story, NAMES, rng)
        assert any(
            fault.startswith(("stranger", "names")) for fault in ms.faults(broken)
        )


def test_faults_sees_most_things_swapped_for_another(stories):
    """ "his kite" where his ball was passes: the share that is seen is not 1."""
    rng = random.Random(3)
    with_things = [s for s in stories if len(ms.THING.findall(s)) > 1]
    seen = [bool(ms.faults(swap(s, THINGS, rng))) for s in with_things]
    assert 0.7 < sum(seen) / len(seen) < 1


@pytest.mark.parametrize(
    "story, fault",
    [
        (FINE, ""),
        (FOUR_NAMES, "names: 4"),
        (THREE_THINGS, "things: 3"),
        (FINE.replace("mouse", "bear"), "kind: Pip is called a bear, not a mouse"),
        ("A boy named Tom sat down. Mia laughed.", "stranger: Mia"),
        ("A boy named Tom took the red drum.", "no origin: the drum"),
        (FINE + " The blue ball rolled away.", "look: the ball is red and blue"),
        (FINE.replace("He", "She"), "pronoun: 'She'"),
        ("His mother called a boy named Tom. She was tired.", ""),
        ("A boy named Tom met a girl called Mia. She laughed.", ""),
    ],
)
def test_faults_by_hand(story, fault):
    found = ms.faults(story)
    if not fault:
        assert found == []
    else:
        assert any(one.startswith(fault) for one in found), found


def test_sentences_by_hand():
    text = f'It rained. "Oh no!" said Tom. "Come in," said Mia.\nIt rained.\n{ms.END}\n'
    expected = [
        "It rained.",
        '"Oh no!" said Tom.',
        '"Come in," said Mia.',
        "It rained.",
    ]
    assert ms.sentences(text) == expected
    assert ms.distinct_sentences(text) == 3 / 4
    with pytest.raises(ValueError, match="no sentence"):
        ms.distinct_sentences(ms.END)


# The command line


def test_sample_prints_and_writes_nothing(capsys, monkeypatch):
    monkeypatch.setattr(ms, "write", None)
    assert ms.main(["--sample", "3", "--seed", "7"]) == 0
    first = capsys.readouterr().out
    assert first == ms.corpus(3, 7) and first.count(ms.END) == 3
    assert ms.main(["--sample", "3"]) == 0
    assert capsys.readouterr().out != first


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sample", "0"], "'0' is not a whole number above zero"),
        (["--sample", "many"], "'many' is not a whole number above zero"),
        (["--seed", "3"], "--seed goes with --sample"),
        (["--colour"], "unrecognized arguments"),
        (["--check", "--out", "nowhere"], "cannot read"),
        (["--out", "a_file"], "cannot write"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        ms.main(arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]
    assert Path("a_file").read_text(encoding="utf-8") == "mine"
