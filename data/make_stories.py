# SPDX-License-Identifier: MIT
"""Write data/stories.txt: short stories from a little simulated world.

A story is told by playing it. `Story` casts characters (each with a kind, a gender and
perhaps a skill), things (each with an owner and one look) and places, and a plot moves
them through sub-goals: meet, lose, search, ask, fetch, mend, thank, go home. What has
happened decides what can follow: only a flyer or a climber fetches a kite from a tree,
a hero who could do it alone never asks for help, what was lost is what is found, a
broken drum is mended with what drums are made of, and a ball that was red stays red.

Every sentence is drawn from a list of templates. In a template, `{h.he}` is an
attribute of a character, a thing or a place of this story, and `[big|small]` is a free
choice.

The format is that of the TinyStories files: a newline between paragraphs and a line
`<|endoftext|>` after every story. The same command writes the same bytes everywhere:
the only source of chance is `random.Random(...).random()`, whose values Python
guarantees to be the same in every version.

    python data/make_stories.py             write stories.txt beside this file
    python data/make_stories.py --check     exit 1 if the file is not as made
    python data/make_stories.py --sample 3  print three stories

Because the world is known, a text can be held against it: `consistency(text)` is the
share of stories that keep to their characters and things, `faults(story)` names what is
wrong with one story, and `distinct_sentences(text)` tells how much is not repeated.
"""

import argparse
import functools
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

END = "<|endoftext|>"
N_STORIES = 4550
SEED = 2024
MAX_NAMES, MAX_THINGS = 3, 2

# --------------------------------------------------------------------------------------
# The world: who lives in it, what they own, where they go.


def lines(block: str) -> list[str]:
    return block.strip().split("\n")


def words(block: str) -> list[str]:
    return block.split()


# name, kind, gender, skill. A child has no skill of its own and solves with tools.
PEOPLE = words("""
Anna girl she -      Ben boy he -         Clara girl she -     Dan boy he -
Emma girl she -      Leo boy he -         Lily girl she -      Max boy he -
Mia girl she -       Omar boy he -        Nora girl she -      Ravi boy he -
Zoe girl she -       Tom boy he -         Bruno bear he strong Bella pony she strong
Kiki bird she fly    Olga owl she fly     Rex dog he smell     Ruby rabbit she fast
Pip mouse he small   Milo mole he dig     Otto otter he swim   Tilly turtle she swim
Felix cat he climb   Hazel squirrel she climb
""")
CAST = [tuple(PEOPLE[i : i + 4]) for i in range(0, len(PEOPLE), 4)]
NAMES = tuple(name for name, *_ in CAST)
KINDS = {name: kind for name, kind, *_ in CAST}
GENDERS = {name: gender for name, _, gender, _ in CAST}
HANDS = {
    "girl": "hand hands",
    "boy": "hand hands",
    "bird": "wing wings",
    "owl": "wing wings",
    "pony": "hoof hooves",
    "turtle": "foot feet",
}
RAN = {"bird": "flew", "owl": "flew", "turtle": "hurried", "mole": "hurried"}
# A pony does not sew, bake or hide under a bed: it helps others.
NEVER_HERO = {"Bella"}
TRAITS = words("""kind brave curious clever cheerful careful gentle patient friendly
lively playful thoughtful polite happy quiet""")


class Character:
    """Someone in a story, with the words that refer to them (`he`, `His`, `paw`, …)."""

    def __init__(self, row: tuple[str, ...], trait: str) -> None:
        self.name, self.kind, self.he, self.skill = row
        self.him, self.his = {"he": ("him", "his"), "she": ("her", "her")}[self.he]
        self.He, self.His = self.he.capitalize(), self.his.capitalize()
        self.hand, self.hands = HANDS.get(self.kind, "paw paws").split()
        self.ran = RAN.get(self.kind, "ran")
        self.trait = trait
        self.is_child = self.kind in ("girl", "boy")
        # How a friend is first named; Story.meet chooses.
        self.new = self.friend = f"{self.name} the {self.kind}"

    def __format__(self, spec: str) -> str:
        return self.name


@dataclass(frozen=True)
class Kit:
    """What the world knows of one sort of thing."""

    looks: str
    use: str  # "flying" in "flying his kite"
    traps: str  # where it can get stuck: tree, water, hole, log
    breaks: str = ""
    mend: str = ""


THINGS = {
    "ball": Kit("red blue green striped", "playing with", "tree water hole"),
    "kite": Kit(
        "yellow orange red purple",
        "flying",
        "tree",
        "the paper ripped from end to end",
        "some strong paper and a pot of glue",
    ),
    "hat": Kit("blue black white pink", "wearing", "tree water"),
    "scarf": Kit("purple striped yellow grey", "wearing", "tree water"),
    "boat": Kit(
        "white green blue brown",
        "playing with",
        "water",
        "the mast snapped in two",
        "a smooth stick and a drop of glue",
    ),
    "doll": Kit(
        "pink yellow purple white",
        "playing with",
        "hole log",
        "one of its arms came off",
        "a needle and some thread",
    ),
    "bell": Kit("golden silver brown", "ringing", "hole"),
    "whistle": Kit("silver black orange", "blowing", "hole"),
    "book": Kit(
        "green brown red blue",
        "reading",
        "log",
        "three of its pages tore",
        "some clear tape",
    ),
    "basket": Kit("brown yellow white", "carrying", "water log"),
    "blanket": Kit(
        "orange grey striped pink",
        "carrying",
        "log tree",
        "it tore on a rusty nail",
        "a needle and some wool",
    ),
    "drum": Kit(
        "green red golden blue",
        "playing",
        "log",
        "the skin split down the middle",
        "a round piece of leather",
    ),
    "lantern": Kit(
        "silver black golden",
        "carrying",
        "log",
        "the glass cracked",
        "a new piece of glass",
    ),
    "umbrella": Kit(
        "black striped pink yellow",
        "carrying",
        "tree water",
        "one of its ribs bent",
        "a bit of wire",
    ),
    "key": Kit("silver golden black", "holding", "hole"),
}
LOOKS = tuple(sorted({look for kit in THINGS.values() for look in kit.looks.split()}))


class Thing:
    """A tracked thing: `{t}` is its noun, `{t.full}` the noun with its one look."""

    def __init__(self, noun: str, look: str) -> None:
        self.noun, self.look, self.kit = noun, look, THINGS[noun]
        self.full = f"{look} {noun}"
        self.use, self.breaks, self.mend = self.kit.use, self.kit.breaks, self.kit.mend

    def __format__(self, spec: str) -> str:
        return self.noun


# place: preposition, then spots to look behind, sit by or meet at.
PLACES = {
    "garden": "in: rose bush, wooden bench, little gate, garden shed",
    "forest": "in: old oak tree, hollow log, tall pine tree, thick ferns",
    "river": "by: stone bridge, big flat rock, willow tree, tall reeds",
    "park": "in: slide, swings, fountain, duck pond",
    "farm": "on: big barn, haystack, hen house, rusty tractor",
    "beach": "on: sand dunes, rock pool, old pier, pile of seaweed",
    "meadow": "in: broken fence, patch of clover, tall thistles, mossy stump",
    "village": "in: old well, bakery, market stall, post office",
    "hill": "on: windmill, heap of stones, crooked tree, shepherd's hut",
    "lake": "by: wooden dock, fishing hut, water lilies, muddy bank",
    "orchard": "in: plum tree, row of beehives, stone wall, wheelbarrow",
}


class Place:
    """`{p}` is "the farm", `{p.at}` "on the farm", `{p.spot}` one fixed spot there."""

    def __init__(self, noun: str, spot: str) -> None:
        self.noun, self.spot = noun, "the " + spot
        self.at = f"{PLACES[noun].split(':')[0]} the {noun}"

    def __format__(self, spec: str) -> str:
        return "the " + self.noun


WEATHER = {
    "sunny": """
    - The sun was [warm|bright] and the sky was blue.
    - It was a [bright|lovely|fine], sunny day.
    - The [sun was shining|sunshine was golden], and bees hummed [in the
      grass|around].""",
    "windy": """
    - The wind blew, and the leaves [danced|rustled|whirled about].
    - It was a [windy|breezy] day, and clouds raced across the sky.""",
    "cloudy": """
    - [Grey|Soft grey|Fluffy white] clouds [covered|filled|drifted across] the sky.
    - It was a [mild|grey|quiet] day, and the air was [still|soft].""",
    "fresh": """
    - It had rained in the night, and [everything smelled fresh|there were puddles].
    - Drops of dew [sparkled|glittered|shone] on the grass.""",
    "cold": """
    - The air was [cold|chilly|crisp], and the ground was [hard|white with frost].
    - It was a [cold|frosty] day, and {h} could see {h.his} own breath.""",
}

OPENINGS = """
- {day}, a {h.trait} {h.kind} named {h} went to {p}.
- Once upon a time, a {h.trait} {h.kind} named {h} lived near {p}.
- {h} was a {h.trait} {h.kind} who lived [near|close to|not far from] {p}.
- There was once a {h.trait} {h.kind} called {h}, and {p} was {h.his} favourite place.
- In a [little|small|cosy|tiny] house near {p} lived a {h.kind} named {h}.
- {day}, a {h.kind} called {h} came to {p}. {h.He} was a very {h.trait} {h.kind}.
"""
DAYS = lines("""
One morning
One day
One afternoon
One Saturday
Early one morning
One Sunday
One Thursday
One bright morning
After lunch one day
One Monday after breakfast
""")

# --------------------------------------------------------------------------------------
# Telling


@functools.cache
def alternatives(block: str) -> tuple[str, ...]:
    """The items of a list written with leading dashes."""
    items = re.split(r"^\s*- ", block, flags=re.M)
    return tuple(" ".join(item.split()) for item in items if item.strip())


def a_or_an(text: str) -> str:
    """Templates write `a` before a slot; before a vowel sound it becomes `an`."""
    return re.sub(r"\b([Aa]) (?=(?!one\b|use|uni)[aeiou])", r"\1n ", text)


class Story:
    """One story while it is being told: who and what is in it, and its paragraphs.

    `facts` records what happened, as tuples that start with a verb, so that the world's
    logic can be tested apart from the words.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.plot = ""
        self.cast: list[Character] = []
        self.things: list[Thing] = []
        self.places: list[Place] = []
        self.facts: list[tuple[str, ...]] = []
        self.slots: dict[str, object] = {}
        self.paragraphs: list[list[str]] = [[]]

    def pick(self, options: Sequence) -> Any:
        """One of a sequence; only `random()` is drawn, see the module's docstring."""
        return options[int(self.rng.random() * len(options))]

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def shuffled(self, items: Iterable) -> list:
        items, out = list(items), []
        while items:
            out.append(items.pop(int(self.rng.random() * len(items))))
        return out

    def hero(
        self, *, child: bool = False, lacks: str = "", traits: str = ""
    ) -> Character:
        """Cast `{h}`, more often a child; `lacks` names the skills not wanted."""
        child = child or self.chance(0.6)
        rows = [
            row
            for row in CAST
            if row[0] not in NEVER_HERO
            and (row[1] in ("girl", "boy")) == child
            and row[3] not in lacks.split()
        ]
        hero = Character(self.pick(rows), self.pick(traits.split() or TRAITS))
        self.cast.append(hero)
        self.slots["h"] = hero
        return hero

    def meet(self, slot: str = "f", skills: str = "", sort: str = "") -> Character:
        """Cast a further character who has one of `skills` ("-" is a child's lack)."""
        taken = [who.name for who in self.cast]
        rows = [
            row
            for row in CAST
            if row[0] not in taken
            and (not skills or row[3] in skills.split())
            and (sort != "child" or row[3] == "-")
            and (sort != "animal" or row[3] != "-")
            and (sort != "hands" or row[1] not in ("pony", "bird", "owl", "turtle"))
        ]
        # Children are half of the cast, but friends are more fun when they are animals.
        rows += [row for row in rows if row[3] != "-"]
        who = Character(self.pick(rows), self.pick(TRAITS))
        hero = self.cast[0]
        if who.is_child:
            forms = [
                f"a {who.kind} named {who.name}",
                f"a {who.trait} {who.kind} called {who.name}",
            ]
            forms += [f"{hero.his} friend {who.name}"] * 2
        else:
            forms = [f"{who.name} the {who.kind}"] * 3
            forms.append(f"a {who.trait} {who.kind} named {who.name}")
            forms.append(f"{hero.his} friend {who.name} the {who.kind}")
        who.new = self.pick(forms)
        if who.is_child:
            who.friend = f"{hero.his} friend {who.name}"
        self.cast.append(who)
        self.slots[slot] = who
        return who

    def thing(self, slot: str = "t", nouns: str = "") -> Thing:
        """Bring a tracked thing into the story."""
        taken = [thing.noun for thing in self.things]
        pool = nouns.split() or [noun for noun in THINGS if noun != "key"]
        noun = self.pick([noun for noun in pool if noun not in taken])
        thing = Thing(noun, self.pick(THINGS[noun].looks.split()))
        self.things.append(thing)
        self.slots[slot] = thing
        return thing

    def place(self, slot: str = "p", nouns: str = "") -> Place:
        """Choose a place that the story has not been to."""
        taken = [place.noun for place in self.places]
        pool = nouns.split() or list(PLACES)
        noun = self.pick([noun for noun in pool if noun not in taken])
        place = Place(noun, self.pick(PLACES[noun].split(": ")[1].split(", ")))
        self.places.append(place)
        self.slots[slot] = place
        return place

    def fact(self, *words: object) -> None:
        self.facts.append(tuple(f"{word}" for word in words))

    def fill(self, template: str, **more: object) -> str:
        """Resolve `[a|b]` choices from the inside out, then slots, then a and an."""
        while "[" in template:
            template = re.sub(
                r"\[([^\[\]]*)\]", lambda m: self.pick(m[1].split("|")), template
            )
        return a_or_an(template.format(**self.slots, **more))

    def say(self, block: str, **more: object) -> None:
        """Tell one of the alternatives in `block`, as one or more whole sentences."""
        text = self.fill(self.pick(alternatives(block)), **more)
        text = re.sub(r'^"?[a-z]', lambda m: m[0].upper(), text)
        text = re.sub(r"(?<=[.!?] )[a-z]", lambda m: m[0].upper(), text)
        self.paragraphs[-1].append(text)

    def may(self, block: str, p: float = 0.5, **more: object) -> None:
        if self.chance(p):
            self.say(block, **more)

    def para(self) -> None:
        self.paragraphs.append([])

    def text(self) -> str:
        return "\n".join(" ".join(par) for par in self.paragraphs if par)

    # Sub-goals that many plots share.

    def open(self, weather: str = "sunny windy cloudy fresh cold") -> None:
        """Introduce `{h}` at or near `{p}`; `weather` is what the plot allows."""
        self.say(OPENINGS, day=self.pick(DAYS))
        self.may(WEATHER[self.pick(weather.split())], 0.55)

    def own(self) -> None:
        """Say that `{t}` is the hero's."""
        self.say(
            """
        - {h} had a {t.full} and [loved it very much|took it everywhere].
        - {h.His} favourite toy was a {t.full}.
        - {h} was {t.use} {h.his} {t.full}, which had been a [birthday present|gift].
        - {h.His} [grandmother|uncle|aunt] had given {h.him} a {t.full}.
        """
            if self.slots["t"].noun in ("ball", "kite", "boat", "doll", "drum")
            else """
        - {h} had a {t.full} and [loved it very much|took it everywhere].
        - {h} was {t.use} {h.his} {t.full}, which had been a [birthday present|gift].
        - {h.His} grandmother had given {h.him} a {t.full}.
        """
        )
        self.fact("owns", self.slots["h"], self.slots["t"])

    def sigh(self) -> None:
        """The hero does not know what to do."""
        self.say("""
        - {h} [sat down|stood still] and sighed.
        - {h} did not know what to do.
        - A [big|fat|salty] tear rolled down {h.his} [cheek|face|nose].
        - {h} felt like crying.
        - "Oh dear," said {h}. "What [shall|can] I do now?"
        """)

    def ask(self, problem: str) -> None:
        """`{f}` comes along and hears of the problem, which `{h}` states in words."""
        self.say("""
        - {f.new} came by and asked, "[What is wrong|What is the matter|Why are you
          sad]?"
        - Just then, {f.new} [came along|stopped to look|came around the corner].
        - Then {h} met {f.new}. "Can I help?" asked {f}.
        - {f.new} [heard {h.him}|saw {h.him}] and [hurried over|came closer].
        """)
        self.say(f"""
        - "{problem}," said {{h}}[.| sadly.| softly.]
        - "{problem}!" {{h.he}} [said|cried]. "[Can|Could|Will] you help me?"
        - "[Please help|Please help me]," said {{h}}. "{problem}."
        """)

    def thank(self) -> None:
        self.say("""
        - "Thank you, {f}!" said {h}. "You are a [true|good|wonderful|real] friend."
        - {h} [hugged|thanked] {f} and [smiled|laughed|beamed].
        - "I could not have done it [alone|without you]," said {h}. {f}
          [smiled|blushed].
        - {h} was so [happy|glad|thankful] that {h.he} [danced|jumped for joy|cheered].
        - "[How can I thank you?|You did it!]" cried {h}. "[I was glad to help|It was
          nothing|Friends help each other]," said {f}.
        """)

    def part(self) -> None:
        """A last sentence for {h} and {f}; it fits any happy end."""
        self.say(
            """
        - From that day on, {h} and {f} were [best|good|close] friends.
        - Then they [walked|went] home together [before it got dark|for supper|singing].
        - They [talked|laughed] about it [for many days|all the way home|for a long
          time].
        - That [night|evening], {h} fell asleep with a smile on {h.his} face.
        - And {h} never forgot that day.
        - Afterwards, they shared {food} and watched the [clouds|sunset|first stars].
        - {h.His} mother was [proud of {h.him}|very pleased] when she heard the story.
        """,
            food=self.pick(TREATS),
        )


TREATS = lines("""
an apple
a bag of nuts
a honey cake
some ripe plums
a slice of bread and jam
a bowl of berries
two sweet pears
a plate of pancakes
some warm buns
a jug of milk
a piece of cheese
a handful of cherries
""")

PLOTS: dict[str, Callable[[Story], None]] = {}


def plot(tell: Callable[[Story], None]) -> Callable[[Story], None]:
    PLOTS[tell.__name__] = tell
    return tell


# --------------------------------------------------------------------------------------
# The plots. Each casts its story, then tells it by sub-goals; what a branch has decided
# is what the next one works with.

SEARCHES = """
- {h} looked [near|behind|beside] {q.spot} {q.at}, but there was no {t}.
- First {h.he} searched [{q.at}|around {q.spot} {q.at}]. There was nothing there.
- {h} went to {q} and looked [everywhere|high and low], but the {t} was not there.
- {h} went to {q}, peeped behind {q.spot} and found only a [snail|feather|beetle].
"""

FOUND_ENDS = """
- Since then, {h} always puts the {t} back in its [place|box|corner].
- {h} tied a ribbon to the {t}, so that {h.he} would never lose it again.
- That night, {h} slept with the {t} beside {h.his} pillow.
- "I will take better care of it," {h} promised.
"""


@plot
def lost(s: Story) -> None:
    """Something is lost; it is found where it was left, by a way the finder can."""
    s.hero(lacks="fly smell")
    s.place()
    t = s.thing()
    f = s.meet(skills="fly smell -")
    s.place("q")
    r = s.place("r")
    s.open()
    s.say("""
    - {h} had a {t.full} and [loved it very much|never went out without it].
    - {h.His} grandmother had given {h.him} a {t.full}.
    - {h} wanted to show everyone {h.his} new {t}. It was a [fine|lovely] {t.full}.
    """)
    s.say("""
    - But that day, the {t} was [gone|missing].
    - But now {h.he} could not find the {t} [anywhere|in any corner].
    - But when {h} looked for the {t}, it was nowhere to be seen.
    """)
    s.para()
    s.say(SEARCHES)
    s.sigh()
    s.ask("I have lost my {t}")
    s.para()
    if f.skill == "fly":
        s.say("""
        - {f} flew up [high|into the air] and looked [all around|down]. "I can see it
          {r.at}!" {f.he} called.
        - "I will look from above," said {f}. {f.He} flew in a wide circle until {f.he}
          spotted something {r.at}.
        """)
    elif f.skill == "smell":
        s.say("""
        - {f} put {f.his} nose to the ground and [sniffed|snuffled]. The trail led to
          {r}.
        - {f} sniffed the air and followed the [smell|scent] all the way to {r}.
        """)
    else:
        s.say("""
        - "Where did you go yesterday?" asked {f}. {h} thought hard. "I was {r.at}!"
        - "I think I saw a {t} {r.at}," said {f}. "Come [quickly|along|with me]!"
        """)
    s.fact("found", t, f, f.skill, r)
    s.say("""
    - They hurried there, and beside {r.spot} lay the {t.full}.
    - And there it was! The {t.full} was lying [right|just] [behind|next to] {r.spot}.
    - Sure enough, the {t} was [waiting|hidden|lying] near {r.spot}, a little dusty but
      [safe|whole].
    """)
    s.thank()
    s.may(FOUND_ENDS, 0.6)


# What no wind could do.
BALL_UP = """
- One [high throw|strong kick], and the {t} flew up into a tall tree and stayed there.
- {h} threw the {t} [too high|up high], and it got caught in the top of a tree.
"""

# obstacle: places, how it gets there, what fails, what each skill does, and a tool.
TRAPS = {
    "tree": (
        "garden forest park orchard meadow",
        """
        - A sudden [gust of wind|breeze] lifted the {t} high into a tall tree.
        - Whoosh! The wind [snatched|grabbed|took] the {t} and blew it up into a tree.
        """,
        """
        - {h} jumped as high as {h.he} could, but the branch was too far away.
        - {h} threw a stick at it, but the stick just fell back down.
        - {h} stood on a [bucket|box|stump], but that was [still|much] too low.
        - {h} shook the trunk, but only [leaves|twigs|acorns] came down.
        """,
        {
            "fly": """
            - {f} flew up, took the {t} in {f.his} beak and [brought it down|let it
              drop].
            - {f} spread {f.his} wings, flew to the top and pushed the {t} free.""",
            "climb": """
            - {f} climbed [quickly|nimbly] from branch to branch and carried the {t}
              down.
            - {f} dug {f.his} claws into the bark, climbed up and freed the {t}.""",
        },
        """
        - {f} fetched a ladder from the shed. {h} held it [steady|tight] while {f}
          climbed up and untangled the {t}.
        - "Wait here," said {f}, and came back with a long rake. Together they
          hooked the {t} and pulled it down.""",
    ),
    "water": (
        "river lake",
        """
        - Splash! The {t} [fell|rolled|slid] into the water and drifted away.
        - The {t} slipped into the water, and soon it was floating far from the bank.
        """,
        """
        - {h} reached out as far as {h.he} could, but the {t} was too far away.
        - {h} tried to pull it in with a twig, but the twig broke.
        - {h} threw [pebbles|stones] behind it, but it only [bobbed|drifted] away.
        """,
        {
            "swim": """
            - {f} slid into the water, swam out and pushed the {t} to the bank.
            - With a few strong strokes, {f} swam to the {t} and brought it back.""",
        },
        """
        - {f} ran to get a fishing net with a long [pole|handle]. Together they
          [scooped|lifted] the {t} out of the water.
        - {f} tied a hook to a rope. {h} threw it twice, and the second time it
          caught the {t}.""",
    ),
    "hole": (
        "garden forest meadow farm hill park",
        """
        - It slipped from {h.his} {h.hand} and [rolled|dropped] into a deep, narrow
          hole.
        - Plop! The {t} [tumbled|rolled|vanished] down a dark hole in the ground.
        """,
        """
        - {h} lay down and stretched out one {h.hand}, but the hole was too deep.
        - {h} poked around with a stick, but the stick was too short.
        - {h} tried to dig, but the ground was full of [stones|roots].
        """,
        {
            "small": """
            - {f} was so small that {f.he} crawled right in and pushed the {t} out.
            - {f} squeezed into the hole and came back with the {t}, covered in
              dust.""",
            "dig": """
            - {f} dug a [new|short|neat] tunnel from the side, and out rolled the {t}.
            - {f} dug so fast that the earth flew. In a minute {f.he} held up the
              {t}.""",
        },
        """
        - {f} had an idea. They tied a [hook|bent nail|magnet] to a string and pulled
          the {t} up, [inch by inch|very slowly].
        - {f} brought a long spoon and some sticky [honey|dough]. They pressed it on
          the {t} and lifted it out.""",
    ),
    "log": (
        "forest hill river farm",
        """
        - The {t} slid down the slope and got stuck under a [huge|heavy] log.
        - A log rolled down the slope and came to rest [right|just] on top of the {t}.
        """,
        """
        - {h} pushed the log, but it did not move [at all|one bit].
        - {h} pulled and tugged, but the {t} was stuck [fast|tight].
        - {h} kicked the log and only hurt {h.his} [toe|foot].
        """,
        {
            "strong": """
            - {f} leaned against the log and rolled it away as if it were a
              [twig|straw].
            - {f} took a deep breath, heaved, and the log rolled [aside|away].""",
        },
        """
        - {f} found a strong pole. They pushed it under the log, leaned on it, and the
          log rolled away.
        - "Two are stronger than one," said {f}. They counted to three and pushed,
          and the log [moved|rolled over].""",
    ),
}


@plot
def stuck(s: Story) -> None:
    """A thing is out of reach: skill gets it back, or a tool, or only patience."""
    trap = s.pick(list(TRAPS))
    places, how, fails, skilled, tool = TRAPS[trap]
    s.hero(lacks=" ".join(skilled))
    s.place(nouns=places)
    t = s.thing(nouns=" ".join(n for n, kit in THINGS.items() if trap in kit.traps))
    way = s.pick(["skill", "skill", "skill", "tool", "tool", "wait"])
    f = s.meet(skills=" ".join(skilled) if way == "skill" else "-")
    s.open("sunny cloudy fresh")
    s.own()
    s.say(BALL_UP if trap == "tree" and t.noun == "ball" else how)
    s.para()
    for block in s.shuffled(alternatives(fails))[: 1 if s.chance(0.5) else 2]:
        s.say(block)
    s.may(
        """
    - "Oh no, my {t}!" cried {h}.
    - {h} felt [sad|helpless|very small].
    """,
        0.5,
    )
    s.para()
    s.ask("I cannot get my {t}")
    if way == "wait":
        s.fact("left", t, trap)
        s.say("""
        - {f} tried too, but [in vain|it was no use|nothing helped].
        - They tried together until [sunset|supper time], but nothing helped.
        """)
        s.say("""
        - "We will come back tomorrow with my father," said {f}. So they went home.
        - "You can play with my [marbles|puzzle|skipping rope] today," said {f}.
        """)
        s.say("""
        - {h} was still a little sad, but it was good to have a friend.
        - {h} sighed, but {h.he} was glad that {f} had tried.
        """)
        return
    s.may(
        """
    - "[I can do that|Leave it to me|That is easy for me|Let me try]," said {f}.
    - "[Do not worry|Do not cry|Cheer up]," said {f}. "[I know what to do|I can help]."
    """,
        0.6,
    )
    s.say(skilled[f.skill] if way == "skill" else tool)
    s.fact("fetched", t, trap, f, f.skill, way)
    s.may(
        """
    - {h} [held|hugged] the {t.full} tightly.
    - Now {h} had {h.his} {t} back.
    """,
        0.5,
    ) if trap != "log" else s.say("""
    - {h} pulled out the {t.full}. It was [muddy|a bit flat|dusty], but [whole|safe].
    """)
    s.thank()
    s.may(
        """
    - From that day on, {h} and {f} were [best|good|close] friends.
    - {h} was [much|far] more careful with the {t} after that.
    - They played until [supper|sunset|the bats came out].
    """,
        0.6,
    )


FOODS = words("""apple pear cookie bun carrot peach sandwich muffin pancake cake pie
waffle banana""")


@plot
def sharing(s: Story) -> None:
    """One bite for two: given at once, or refused, regretted and made good."""
    s.hero()
    s.meet()
    s.place()
    s.slots["x"] = food = s.pick(FOODS)
    s.open()
    s.say("""
    - {h.His} mother had [given {h.him}] a {x} for lunch.
    - {h} had a [fresh|big|sweet|tasty] {x} in {h.his} bag.
    - {h} sat down near {p.spot} and took out a [lovely|big] {x}.
    """)
    s.say("""
    - Then {f.new} came along. {f.He} had nothing to eat.
    - {f.new} sat down nearby and looked at the {x}. {f.He} was hungry, too.
    - Before {h} took a bite, {f.new} came by. {f.His} [tummy|stomach]
      [rumbled|growled].
    """)
    s.para()
    if s.chance(0.45):
        s.fact("shared", food, "at once")
        s.say("""
        - "Would you like some?" asked {h}. {h.He} broke the {x} in two and gave {f} the
          bigger [half|piece].
        - "You can have half," said {h}. {f} [smiled|grinned] and said thank you.
        - {h} looked at the {x}, then at {f}. "Let us share it," {h.he} said.
        """)
        s.say("""
        - The {x} tasted twice as good because they ate it together.
        - They sat by {p.spot}, chewed slowly and [told jokes|watched the birds|talked].
        - Not a single crumb was left for the [ants|sparrows|pigeons].
        """)
        s.say("""
        - {f} wiped {f.his} mouth. "Next time, I will bring [nuts|grapes|raisins] for
          both of us," {f.he} said.
        - "You are so kind," said {f}. "Come and play at my house tomorrow."
        """)
        s.part()
        return
    s.fact("shared", food, "later")
    s.say("""
    - "[Can|May] I have a bite?" asked {f}. "No, it is mine!" said {h}.
    - {h} hid the {x} behind {h.his} back. "Go away," {h.he} said.
    - {h} turned away and ate the [whole {x}|{x}] as fast as {h.he} could.
    """)
    s.say("""
    - {f} walked away with tears in {f.his} eyes.
    - {f} said nothing and left with a [hanging|bowed] head.
    """)
    s.para()
    s.say("""
    - Soon {h} felt [lonely|ashamed]. The {x} did not taste good [at all|any more].
    - {h} had a tummy ache, and {h.his} heart felt heavy, too.
    """)
    s.say("""
    - {h.He} {h.ran} after {f}. "I am sorry," {h.he} said. "I was
      [selfish|mean|greedy]."
    - The next day, {h} went to {f}. "[I am sorry|Please forgive me]," {h.he} said.
    """)
    s.say("""
    - {h} gave {f} [a plum|a roll|an egg], and {f} smiled again.
    - "Here is a [roll|bread roll]. It is all for you," {h} said. {f} broke
      it in two and gave {h} half.
    """)
    s.may(
        """
    - After that, {h} always shared {h.his} lunch.
    - "It tastes better with a friend," said {h}, and {f} nodded.
    - They ate side by side, and all was well.
    """,
        0.7,
    )


NOISES = lines("""
a loud scratching:a little hedgehog making its nest|a hedgehog digging for worms
a strange howling:the wind in an empty bottle|the wind in a hollow pipe
a soft tapping:a branch knocking on a window|a moth tapping on the glass
a great splash:a fat frog jumping for flies|a frog hopping into a puddle
a creepy creaking:an old door that needed oil|a loose board in the wind
a deep rumbling:a cow with a bad cold|an old man snoring in the hay
a quiet rustling:two kittens playing in the leaves|a lost chick in dry leaves
""")


@plot
def fear(s: Story) -> None:
    """A noise in the dark turns out to be something harmless that makes that noise."""
    s.hero(traits="shy gentle quiet little careful dreamy")
    s.place()
    s.meet()
    row = s.pick(NOISES).split(":")
    s.slots["noise"], source = row[0], s.pick(row[1].split("|"))
    s.slots["source"] = source
    s.fact("noise", row[0], source)
    s.open("cloudy windy fresh")
    s.say("""
    - When it grew dark, {h.he} heard {noise}.
    - That evening, there was {noise} [close by|near {p.spot}].
    - On the way home in the dark, {h} heard {noise} [behind|near] {p.spot}.
    """)
    s.say("""
    - {h.His} [legs|knees] began to shake. "It must be a monster!" {h.he} thought.
    - {h} was so [frightened|scared|afraid] that {h.he} [could not move|held {h.his}
      breath].
    - "A [ghost|giant|dragon]!" {h.he} whispered, and {h.his} heart beat fast.
    """)
    s.para()
    s.say("""
    - {h} {h.ran} to {f.new}. "Something is out there!" {h.he} [cried|gasped|panted].
    - Luckily, {f.new} came by. "What is it? You are trembling," {f.he} said.
    """)
    s.say("""
    - "Let us look together," said {f} and took {h.his} {h.hand}.
    - "Shall we find out what it is?" asked {f}. {h} [nodded|gulped].
    - "Stay close to me," said {f}, and they went [slowly|step by step] towards the
      sound.
    """)
    if s.chance(0.5):
        s.thing(nouns="lantern")
        s.say("""
        - {f} [lit|fetched] a {t.full}, so that they could see the path.
        - They took a {t.full} and held it [high|up high].
        """)
        s.say("""
        - In the light of the {t}, they saw {source}. That was all!
        - {f} lifted the {t} and [laughed|smiled]. It was only {source}!
        - The {t} lit up every corner, and there it was: {source}.
        """)
    else:
        s.say("""
        - They [tiptoed|crept] closer and closer, and what did they see? It was only
          {source}!
        - {f} [pointed|peeped around the corner]. "Look," {f.he} said. "It is {source}."
        - There was no monster at all. It was just {source}.
        """)
    s.para()
    s.say("""
    - {h} [laughed|giggled] until {h.his} [sides|tummy] hurt.
    - {h} felt a little silly, but {f} said, "Everyone is afraid sometimes."
    - "Things look [different|smaller] when you know them," said {f}.
    """)
    s.may(
        """
    - From then on, {h} was not afraid of the dark.
    - The next time {h.he} heard it, {h} only smiled and went back to sleep.
    - {h} was proud, because being brave means looking even when you are afraid.
    - Then {f} walked home with {h}, and the moon lit their path.
    """,
        0.8,
    )


# gift: what it is made from, each with the place where it is got; then how it is made.
GIFTS = {
    "a cake": ("flour:village eggs:farm berries:forest", "baked"),
    "a wreath": ("daisies:meadow ivy:forest ribbon:village", "made"),
    "a pot of soup": ("carrots:garden water:river mushrooms:forest", "cooked"),
    "a necklace": ("shells:beach string:village feathers:farm", "made"),
    "a fruit salad": ("cherries:orchard grapes:hill mint:garden", "made"),
    "a soft pillow": ("wool:farm cloth:village lavender:hill", "sewed"),
    "a birthday card": ("paper:village petals:meadow leaves:park", "made"),
    "a pot of jam": ("plums:orchard sugar:village blackberries:meadow", "cooked"),
}
PLURAL_PARTS = words("""eggs berries daisies carrots mushrooms shells feathers cherries
grapes petals leaves plums blackberries""")


# The first, the second and the third part.
GATHER = (
    """
    - [First|To begin with], {h.he} [went|walked] to {q} for {part}.
    - {h} [got|fetched] {part} {q.at} [first|to start with].
    """,
    """
    - Then {h.he} [got|found|collected] {part} {q.at}.
    - Next came the {part}, which {h.he} [got|found] {q.at}.
    """,
    """
    - After that, {h.he} [went|hurried] to {q} to [get|fetch] {part}.
    - Last of all, {h} [got|found] {part} {q.at}.
    """,
)


@plot
def gift(s: Story) -> None:
    """A present is made from parts; a missing part comes from someone who has it."""
    h = s.hero()
    s.meet(sort="child") if s.chance(0.5) else s.meet()
    gift = s.pick(list(GIFTS))
    parts, made = GIFTS[gift]
    s.slots.update(x=gift, the_x=gift.replace("a ", "the ", 1), made=made)
    parts = s.shuffled(pair.split(":") for pair in parts.split())
    if s.chance(0.4):
        s.thing(nouns="basket")
    used = [place for _, place in parts]
    s.place(nouns=" ".join(n for n in PLACES if n not in used))
    s.open()
    s.say("""
    - It was almost the birthday of {f.friend}, and {h} wanted to give {f.him} {x}.
    - {f.friend} was [ill in bed|feeling sad], so {h} decided to make {f.him} {x}.
    - {h} wanted to surprise {f.friend} with {x}.
    """)
    s.para()
    if s.things:
        s.say(
            """
        - {h} took a {t.full} and set off.
        - {h} hung {h.his} {t.full} over one arm and went to look for everything.
        """
            if h.is_child
            else """
        - {h} took a {t.full} and set off.
        """
        )
    missing = s.chance(0.4)
    for i, (part, where) in enumerate(parts):
        s.slots["part"], place = part, s.place("q", where)
        if i == 2 and missing:
            o = s.meet("o", sort="animal")
            s.slots["be"] = "were" if part in PLURAL_PARTS else "was"
            s.say("""
            - But {q.at} there {be} no {part} [left|to be found].
            - {h} looked for {part} {q.at}, too, but there {be} none.
            """)
            s.say("""
            - Luckily, {o.new} had some. "Take mine," {o.he} said.
            - "I have [plenty of|lots of|more than enough] {part} at home," said
              {o.new}. "You can have some."
            """)
            s.fact("got", part, o)
        else:
            s.say(GATHER[i])
            s.fact("got", part, place.noun)
    s.para()
    if s.things:
        s.say("""
        - Now the {t} was full, and {h} went home.
        - {h} carried the [full|heavy] {t} home.
        """)
    s.say("""
    - {h} worked [all afternoon|until the evening|very hard], and at last {the_x} was
      ready.
    - At home, {h} {made} {the_x} with [great|much] care.
    """)
    s.say("""
    - When {f} saw it, {f.his} eyes [grew big|lit up|shone]. "Is it for me?" {f.he}
      asked.
    - {f} was so surprised that {f.he} could [hardly|not] speak.
    - {f} opened the door and [gasped|squealed] with joy.
    """)
    s.say("""
    - "It is the [best|nicest|loveliest] present ever," said {f}.
    - {f} [gave {h} a big hug|hugged {h} for a long time].
    - "You made it yourself? Thank you!" said {f}.
    """)
    if missing:
        s.may("- They [called|invited] {o}, too, and had a [little|merry|jolly] party.")
    else:
        s.may("""
        - {h} learned that giving is as nice as getting.
        - {h} went home, and {h.his} heart felt warm.
        """)


@plot
def broken(s: Story) -> None:
    """A borrowed thing breaks; it is hidden or confessed, and always mended."""
    h = s.hero()
    s.meet(sort="hands")
    s.place()
    s.thing(nouns=" ".join(noun for noun, kit in THINGS.items() if kit.breaks))
    s.open()
    s.say("""
    - {f.new} had a {t.full}, and {h} was allowed to [hold|borrow] it.
    - {f.new} let {h} [borrow|hold] a {t.full}. "Please be careful," {f.he} said.
    - {f.new} had left a {t.full} near {p.spot}, and {h} picked it up.
    """)
    s.say("""
    - But {h} [slipped|stumbled|tripped], and {t.breaks}.
    - {h} spun around with it and bumped into a [post|wall|tree]. Then {t.breaks}!
    - Crash! {h} dropped it, and {t.breaks}.
    """)
    s.para()
    if s.chance(0.5):
        s.fact("hid", h)
        s.say("""
        - {h} was [scared|worried], so {h.he} hid the {t} behind {p.spot}.
        - "[Nobody|No one] must know," thought {h} and covered the {t} with leaves.
        """)
        s.say("""
        - "Have you seen my {t}?" asked {f}. "No," said {h}, but {h.his} [voice|knees]
          shook.
        - Soon {f} was looking for it everywhere. {h} [looked at the ground|said
          nothing].
        """)
        s.say("""
        - All night, {h} could not sleep. In the morning, {h.he} told {f} [the
          truth|everything].
        - {h.His} tummy hurt more and more. At last {h.he} said, "I broke it, and I hid
          it. I am so sorry."
        """)
    else:
        s.fact("confessed", h)
        s.say("""
        - {h} wanted to run away, but {h.he} [took a deep breath|was brave] and stayed.
        - For a moment, {h} thought of hiding it. But that would not be [fair|right].
        """)
        s.say("""
        - "I broke your {t}," {h.he} told {f}. "I am [very|so|really] sorry."
        - {h.He} carried the {t} back to {f} and told {f.him} [everything|the truth].
        """)
    s.say("""
    - {f} was [quiet|silent] for a moment. "Thank you for telling me," {f.he} said.
    - {f} was [cross|angry|upset] at first, but then {f.he} [nodded|smiled a little].
    - "Telling the truth was [hard|brave]," said {f}. "I am not angry."
    """)
    s.para()
    s.fact("mended", s.slots["t"], s.slots["t"].mend)
    s.say("""
    - Together they mended the {t} with {t.mend}.
    - {h} fetched {t.mend}, and they [fixed|repaired|mended] the {t.full} together.
    """)
    s.say("""
    - It was [almost|nearly] as good as new.
    - You could still see where it had been mended, but {f} did not mind.
    - "Now it is [special|even nicer]," said {f}, "because we fixed it together."
    """)


CREATURES = lines("""
bird:had hurt its wing:{h} wrapped the wing in a soft bandage
kitten:was stuck on a high wall:{h} lifted it down gently
hedgehog:was caught in a net:{h} cut the net, one thread at a time
lamb:had a thorn in its foot:{h} pulled out the thorn and washed the foot
fox:was shivering in the snow:{h} gave it warm milk and a bed of straw
fawn:had lost its mother:{h} stayed with it until its mother came
duckling:had fallen into a ditch:{h} lifted it out and dried it
""")
TROUBLES = {
    "lost {h.his} way in the fog": """
    - Step by step, the {x} led {h.him} out of the fog and [home|back to the path].
    - {h} followed the {x}, and soon {h.he} saw the lights of {h.his} own house.""",
    "dropped a silver coin in the tall grass": """
    - The {x} [poked|searched] about in the grass and laid the coin at {h.his} feet.
    - The {x} scratched in the grass until something shiny came to light.""",
    "fell into a deep ditch and could not get out": """
    - The {x} called so loudly that [the farmer|a shepherd] came and pulled {h.him} out.
    - The {x} ran for help, and soon [the miller|the farmer] came with a rope.""",
}


@plot
def good_turn(s: Story) -> None:
    """Help given to a small creature comes back as the kind of help that is needed."""
    h = s.hero(child=s.chance(0.8))
    s.place(nouns="forest meadow hill farm orchard")
    kind, trouble, aid = s.pick(CREATURES).split(":")
    mishap = s.pick(list(TROUBLES))
    s.slots["x"] = kind
    s.fact("helped", h, kind, trouble)
    s.open("cold") if "snow" in trouble else s.open("sunny cloudy fresh windy")
    s.say(f"""
    - Near {{p.spot}}, {{h.he}} found a little {{x}} that {trouble}.
    - There {{h}} heard a [small|weak|thin] cry. A young {{x}} {trouble}.
    - {{h}} saw a tiny {{x}} beside {{p.spot}}. It {trouble}.
    """)
    s.say("""
    - "[Poor little thing|You poor thing]," said {h}. "[I will help you|Hold still]."
    - {h} felt sorry for it and [knelt|bent] down.
    - "Do not be afraid," {h} whispered [softly|gently].
    """)
    s.say(f"""
    - {aid}.
    - Very [slowly|carefully], {aid}.
    """)
    s.say("""
    - The {x} looked at {h.him} with [bright|shining|dark] eyes, then it [went|hurried]
      away.
    - Soon the {x} was [well|safe] again and disappeared among the bushes.
    """)
    s.para()
    s.say(f"""
    - A [week|month] later, {{h}} {mishap}.
    - Many [days|weeks] [went by|passed]. Then, one evening, {{h}} {mishap}.
    """)
    s.say("""
    - Nobody heard {h.him} call, but suddenly the {x} was there!
    - {h} was about to [cry|give up] when {h.he} saw the little {x} again.
    """)
    s.say(TROUBLES[mishap])
    s.fact("returned", kind, mishap)
    s.para()
    s.say("""
    - "You remembered me," said {h} [happily|with a smile].
    - "One good turn [deserves|brings] another," said {h.his} grandfather that night.
    - {h} knew then that kindness comes back.
    - {h} [stroked|patted] the {x}. "Now you have helped me," {h.he} said.
    """)


@plot
def race(s: Story) -> None:
    """A race on foot: the faster one rests, or stops to help, or is caught up with."""
    h = s.hero(lacks="fly", traits="proud quick lively")
    s.place()
    s.place("q")
    f = s.meet(skills="- strong smell fast small dig climb")
    s.open("sunny cloudy windy fresh")
    s.say("""
    - "[I am faster than you|Nobody is as fast as I am]!" {h} said to {f.new}.
    - {h} [liked to boast|boasted] about winning, so {f.new} asked for a race.
    """)
    s.say("""
    - "From here to {q.spot} {q.at}," said {f}. "Ready, steady, go!"
    - They agreed to race to {q}. "One, two, three, go!" they [shouted|cried].
    """)
    s.para()
    end = s.pick(["rest", "help", "tie"])
    s.fact("race", end, h, f)
    s.say("""
    - {h} shot off like an arrow and was soon far ahead.
    - At first, {h} was [ahead|in the lead] by [twenty|thirty|fifty] steps.
    """)
    if end == "rest":
        s.say("""
        - "I have [plenty of|so much] time," {h.he} thought, and lay down under a
          [bush|tree].
        - {h.He} stopped to pick [blackberries|strawberries] and forgot the time.
        """)
        s.say("""
        - {f} kept going, step after step, and [went|slipped] past.
        - {f} did not stop once. {f.He} passed {h} without a [sound|word].
        """)
        s.say("""
        - When {h} looked up, {f} was already at the [finish|goal]. {f} had won!
        - {h} hurried on as fast as {h.he} could, but it was too late. {f} had won.
        """)
        s.say("""
        - "I should not have [boasted|bragged]," said {h}. "[Well done|You won fairly]!"
        - {h} [swallowed hard|blushed] and shook {f.his} {f.hand}. "You were better
          today."
        """)
    elif end == "help":
        s.say("""
        - Then {h.he} heard a cry. {f} had [tripped over a root|twisted a foot|fallen
          down].
        - Halfway, {h} looked back. {f} was sitting on the ground, holding one knee.
        """)
        s.say("""
        - {h} wanted to win, but {h.he} turned around and went back.
        - "The race can wait," thought {h}, and {h.he} {h.ran} back to {f}.
        """)
        s.say("""
        - {h.He} cleaned the [scratch|scrape], and they walked to the finish side by
          side.
        - "Lean on me," said {h}. They reached the finish together, very slowly.
        """)
        s.say("""
        - "You lost the race, but you won a friend," said {f}.
        - "Stopping for me was better than winning," said {f}, and {h} [smiled|agreed].
        """)
    else:
        s.say("""
        - But {f} knew a short cut past {p.spot} and caught up.
        - {f} was slower, but {f.he} breathed calmly and never got tired.
        """)
        s.say("""
        - They reached {q.spot} at exactly the same moment.
        - In the end, nobody could say who was first.
        """)
        s.say("""
        - They looked at each other and [burst out laughing|laughed].
        - "We both won," said {f}, and {h} [agreed|shook {f.his} {f.hand}].
        """)
    s.may(
        """
    - Then they drank cold [lemonade|water|milk] in the shade.
    - "Same time next week?" asked {f}. "Of course," said {h}.
    - After that, {h} never [boasted|bragged] about being fast again.
    """,
        0.7,
    )


HIDING = lines("""
high up in a tree:climb fly
at the bottom of a dark hole:small dig
under the water lilies:swim
inside a pile of leaves:-  strong small
behind a curtain of ivy:-
in an empty barrel:-  small strong
under an old sack:- smell fast small
inside a wheelbarrow full of hay:- small climb
behind a stack of firewood:- smell fast strong
""")


@plot
def hide_and_seek(s: Story) -> None:
    """The hider hides where only such a hider can; a sound gives the place away."""
    s.hero()
    p = s.place(nouns="garden forest park farm orchard lake")
    spots = [spot.split(":") for spot in HIDING]
    if p.noun != "lake":
        spots = [spot for spot in spots if "water" not in spot[0]]
    where, skills = s.pick(spots)
    f, o = s.meet(skills=skills), None
    s.slots["where"] = where
    s.fact("hid", f, f.skill, where)
    s.open("sunny cloudy fresh windy")
    s.say("""
    - "Let us play hide-and-seek," said {f.new}.
    - {f.new} wanted to play hide-and-seek. {h} was the first to seek.
    """)
    s.say("""
    - {h} closed {h.his} eyes and counted to [ten|twenty|thirty]. "Ready or not, here I
      come!"
    - {h} covered both eyes and counted [slowly|aloud|backwards] from [ten|twenty].
    """)
    s.para()
    s.say("""
    - {h.He} looked behind {p.spot}, but nobody was there.
    - First {h.he} searched around {p.spot}. There was no [sign|trace] of {f}.
    """)
    if s.chance(0.4):
        o = s.meet("o")
        s.say("""
        - "Have you seen {f}?" {h.he} asked {o.new}. {o} [grinned|winked] and said
          nothing.
        - {o.new} [came by|walked past]. "I promised not to tell," {o.he} said with a
          wink.
        """)
    s.say("""
    - {h} looked [left and right|everywhere], and [still|yet] there was no {f}.
    - Minutes passed. "Where can {f.he} be?" {h} wondered.
    """)
    s.say("""
    - Suddenly, {h.he} heard a [giggle|sneeze|tiny cough]. There was somebody {where}!
    - Then something tickled {f}'s nose. "Achoo!" There was a loud sneeze {where}.
    - Then {h} held still and listened. Somebody was breathing {where}.
    """)
    s.say("""
    - "[Found you|I see you|There you are]!" {h} [shouted|cried|called].
    - {h} [tiptoed|crept] closer. "Got you!" {h.he} [shouted|laughed].
    """)
    s.para()
    s.say("""
    - "I was {where} the whole time," [laughed|chuckled] {f}. "Now it is my turn."
    - {f} came out. "You are a good [seeker|finder]," {f.he} said.
    """)
    if o:
        s.may("- Then {o} played, too, and they did not stop until [dusk|supper].", 0.8)
    else:
        s.may(
            """
        - They played until they were called in for [supper|tea].
        - They [took turns|played on] until the sun [set|went down].
        """,
            0.8,
        )


SHELTERS = {
    "forest": "a dry cave|a hollow tree|a hut made of branches",
    "hill": "a shepherd's hut|the old windmill|a little cave",
    "meadow": "a hay shed|a stone bridge over the ditch|an empty stable",
    "beach": "the fishing hut|the old pier|a cave in the cliff",
    "farm": "the big barn|the hen house|the cart shed",
    "lake": "the boathouse|the fishing hut|a roof of thick willows",
}


@plot
def storm(s: Story) -> None:
    """A storm comes up; whoever has found shelter makes room for one more."""
    h, p = s.hero(), s.place(nouns=" ".join(SHELTERS))
    f = s.meet()
    s.slots["shelter"] = s.pick(SHELTERS[p.noun].split("|"))
    s.open("cloudy windy")
    s.say("""
    - [All at once|Suddenly], dark clouds came up, and thunder [rumbled|rolled|growled].
    - Then the sky turned [black|as dark as ink], and big drops began to fall.
    - A flash of lightning lit the sky. [Boom|Crack]! Then it [poured|rained] hard.
    """)
    if s.chance(0.4):
        s.thing(nouns="umbrella")
        s.say("""
        - {h} opened {h.his} {t.full}, but the wind [turned it inside out|bent it].
        - {h} had a {t.full}, but the storm was too strong for it.
        """)
    s.say("""
    - {h} {h.ran} to {shelter} and [shook|wiped] the rain from {h.his} face.
    - {h} had to find [shelter|a dry place], and {h.he} found {shelter}.
    - There was only one dry place, {shelter}, and {h} hurried there.
    """)
    s.para()
    s.say("""
    - [Soon|A minute later] {h.he} heard a voice. Outside in the rain stood {f.new}.
    - Then {f.new} came, [dripping|wet to the skin] and shaking with cold.
    """)
    s.say("""
    - "[May|Can] I come in?" asked {f}. "Of course," said {h}. "There is room for two."
    - "Come in, quickly!" called {h} and moved over to make room.
    """)
    s.say("""
    - {h} gave {f} half of {h.his} [dry bread|sandwich|biscuits], and they waited.
    - They sat close together and kept each other warm.
    - To pass the time, they [told riddles|sang songs|told stories] until the thunder
      was far away.
    """)
    if s.chance(0.4):
        o = s.meet("o", skills="small dig climb fast")
        s.say("""
        - Then {o.new} peeped in. "Is there room for me as well?" {o.he} asked. They
          squeezed together.
        - A little later, {o.new} knocked, too. It was a [tight|snug] fit, but they
          managed.
        """)
        s.fact("sheltered", h, f, o)
    else:
        s.fact("sheltered", h, f)
    s.para()
    s.say("""
    - At last the rain stopped, and a rainbow [stretched|stood] over {p}.
    - After an hour, the sun came out and every leaf [glittered|shone].
    """)
    s.say("""
    - "The storm was not so bad with [a friend|you]," said {h}.
    - "If you had not let me in, I would be ill tomorrow," said {f}. "Thank you."
    - They jumped over the puddles all the way home.
    - They splashed through the puddles, and nobody minded the mud.
    """)


# what is built, from what, where, how it goes wrong and how that is put right.
BUILDS = [
    (
        "a tree house",
        "boards and nails",
        "forest garden orchard",
        "the floor wobbled",
        "added two strong posts",
        "They drank tea among the leaves",
    ),
    (
        "a sand castle",
        "wet sand and shells",
        "beach",
        "a wave washed it away",
        "built it again, higher up",
        "It had four towers and a moat",
    ),
    (
        "a raft",
        "logs and rope",
        "lake river",
        "the knots came loose",
        "tied every knot twice",
        "It carried them both across",
    ),
    (
        "a snowman",
        "snow and two lumps of coal",
        "hill park meadow",
        "its head rolled off",
        "packed the snow more firmly",
        "It wore a smile made of pebbles",
    ),
    (
        "a little bridge",
        "planks and stones",
        "river farm",
        "the middle sank",
        "put a big stone under the middle",
        "Even the sheep could cross it",
    ),
    (
        "a bird table",
        "a post and a plank",
        "garden park farm",
        "the plank was crooked",
        "sawed one side a little shorter",
        "Sparrows and robins came to eat",
    ),
    (
        "a swing",
        "a rope and a board",
        "orchard garden forest",
        "the rope slipped",
        "moved it to a thicker branch",
        "They swung so high that they could see far away",
    ),
    (
        "a go-cart",
        "an old crate and four wheels",
        "village hill farm",
        "a wheel fell off",
        "found a longer bolt",
        "It rattled down the lane at top speed",
    ),
]


@plot
def building(s: Story) -> None:
    """Something is built; the first try fails in its own way, the second one holds."""
    s.hero(traits="clever busy patient cheerful lively")
    s.meet(sort="hands")
    what, of, places, flaw, cure, joy = s.pick(BUILDS)
    s.slots.update(x=what, the_x=what.replace("a ", "the ", 1), of=of)
    s.place(nouns=places)
    s.open("cold" if "snow" in of else "sunny cloudy windy fresh")
    s.say("""
    - {h} wanted to build {x}[.| all by {h.him}self.]
    - "I will build {x}," {h} [decided|thought|said to {h.him}self].
    """)
    s.say("""
    - {h.He} gathered {of} and [began at once|set to work].
    - For that, {h.he} needed {of}.
    """)
    s.para()
    s.fact("built", what, flaw, cure)
    s.say(f"""
    - {{h}} worked [hard|for hours|all morning], but {flaw}.
    - [At first|Soon] it looked [fine|splendid], but then {flaw}.
    """)
    s.say("""
    - "It is no good," [sighed|groaned|moaned] {h}.
    - {h} was ready to give up.
    - {h} frowned.
    """)
    s.say("""
    - Just then, {f.new} came by. "I have an idea," {f.he} said.
    - {f.new} looked at it from all sides. "Almost right," {f.he} said.
    - "[Shall|Can] I help?" asked {f.new}.
    """)
    s.say(f"""
    - Together they {cure}, and this time {{the_x}} was [strong|firm|just right].
    - {{f}} showed {{h}} what to do. They {cure}, and it [worked|held].
    """)
    s.para()
    s.say(f"""
    - {joy}.
    - "We did it!" they cried. {joy}.
    """)
    s.say("""
    - "Two heads are better than one," said {h}.
    - "[If it breaks, we mend it|Never give up|Try, and try again]," said {f}, and {h}
      [laughed|nodded].
    - Everyone who saw {the_x} [admired|praised] it.
    - {h} was [glad|happy] that {h.he} had not given up.
    """)


# what is learnt: what teachers can, where, how it fails first, the trick.
LESSONS = [
    (
        "swim",
        "swim",
        "lake river",
        "swallowed a lot of water",
        "Kick slowly and look straight ahead",
    ),
    (
        "climb a tree",
        "climb",
        "forest orchard",
        "slid down the trunk",
        "Hold on with both arms and test each branch",
    ),
    (
        "follow a trail",
        "smell",
        "forest hill",
        "went round in a circle",
        "Keep low and take your time",
    ),
    (
        "run fast",
        "fast",
        "park meadow",
        "got a stitch",
        "Take short steps and breathe deeply",
    ),
    (
        "lift a heavy sack",
        "strong",
        "farm village",
        "only moved it an inch",
        "Bend your knees and keep your back straight",
    ),
    (
        "tie a bow",
        "-",
        "garden village",
        "made a terrible knot",
        "Make two loops and cross them",
    ),
    (
        "skip with a rope",
        "-",
        "park garden",
        "got tangled up",
        "Listen to the beat and jump lightly",
    ),
    (
        "skim stones",
        "- swim",
        "lake beach",
        "heard only a plop",
        "Choose a flat stone and throw it low",
    ),
    (
        "paint a sunset",
        "-",
        "hill beach",
        "mixed a muddy brown",
        "Start with yellow and wait until it dries",
    ),
    (
        "juggle",
        "-",
        "park village",
        "dropped everything",
        "Begin with one plum, then take two",
    ),
    (
        "dig a tunnel",
        "dig",
        "garden hill",
        "got earth in both eyes",
        "Push the soil behind you, bit by bit",
    ),
]


@plot
def learning(s: Story) -> None:
    """A skill is learnt from somebody who has it, over several days of practice."""
    what, skills, places, fail, trick = s.pick(LESSONS)
    s.hero(lacks=skills.replace("-", ""), child="-" in skills or s.chance(0.7))
    s.place(nouns=places)
    f = s.meet(skills=skills)
    s.slots["x"] = what
    s.fact("taught", what, f, f.skill)
    s.open("sunny cloudy fresh" if what != "paint a sunset" else "sunny")
    s.say("""
    - {h} wanted to learn how to {x}.
    - There was one thing {h.he} could not do. {h.He} could not {x}.
    - All {h.his} friends could {x}, but {h} could not.
    """)
    s.say(f"""
    - {{h.He}} tried, but {{h.he}} {fail}.
    - The first time, {{h.he}} {fail}. The second time was no better.
    """)
    s.para()
    s.say("""
    - "Can you teach me?" {h.he} asked {f.new}. "[Gladly|With pleasure|Of course]," said
      {f}.
    - {f.new} had been watching. "I can show you," {f.he} said [kindly|with a smile].
    """)
    s.say(f"""
    - "{trick}," {{f.he}} [said|explained|told {{h.him}}].
    - {{f}} [thought for a moment|came closer]. "{trick}," {{f.he}} said.
    """)
    s.say("""
    - {h} practised [every day|each morning|day after day] for a [week|fortnight].
    - It took [many tries|a long time], but {h} did not give up.
    - On the first day it went badly. By [Friday|the third day] it was better.
    """)
    s.para()
    s.say("""
    - At last, {h.he} could {x}! {f} [cheered|clapped|whooped].
    - And one fine day, it worked. "Look, I can {x}!" {h.he} shouted.
    """)
    s.say("""
    - "Practice makes perfect," said {f}.
    - "I am [proud of you|so happy for you]," said {f}. {h} [glowed|beamed].
    - Later, {h} taught a little cousin how to {x}, too.
    - {h} thanked {f} with a [bunch of flowers|drawing].
    """)


MESSAGES = lines("""
the party starts at four
the baby has come
supper will be early today
the road is closed
the circus is coming
the cows have got out
school is shut tomorrow
the train will be late
grandmother arrives on the evening train
the apples are ripe
the wolf has been seen near the sheep
there will be a storm tonight
""")


@plot
def message(s: Story) -> None:
    """A message must arrive, and arrive right; something on the way gets in between."""
    s.hero()
    s.place()
    s.place("q")
    f = s.meet()
    s.meet("o")
    s.slots["x"] = news = s.pick(MESSAGES)
    s.slots["big_x"] = news[0].upper() + news[1:]
    s.open()
    s.say("""
    - {h.His} [mother|father|uncle|aunt] sent {h.him} to {f.friend} {q.at} with a
      message: {x}.
    - There was [urgent|important] news for {f.friend} {q.at}: {x}. {h} was to tell
      {f.him}.
    """)
    s.say("""
    - {h} [repeated|whispered] the words so that {h.he} would not forget them.
    - "{big_x}, {x}," {h} [murmured|muttered] at every step.
    """)
    s.para()
    end = s.pick(["forgot", "delay", "river"])
    s.fact("message", end, f)
    s.say("""
    - On the way, {h.he} met {o.new}.
    - Halfway there, {o.new} called {h.his} name.
    """)
    if end == "forgot":
        s.say("""
        - {o} told {h.him} a long, [funny|exciting] story. After that, the message was
          gone!
        - They talked about this and that, and {h} [forgot|could not remember] the
          message.
        """)
        s.say("""
        - {h} did not want to make something up, so {h.he} {h.ran} back and asked again.
        - "What was it? I must go back and ask," said {h}. "A wrong message is worse
          than a late one."
        """)
    elif end == "delay":
        s.say("""
        - "Come and play with me!" said {o}. {h} [longed|wanted] to stay.
        - "Sit down and eat some [nuts|cake|melon]," said {o}. It looked delicious.
        """)
        s.say("""
        - But {h} shook {h.his} head. "First the message, then the fun," {h.he} said.
        - "Later," said {h}. "Somebody is waiting for me."
        """)
    else:
        s.say("""
        - "The path ahead is [flooded|blocked by a fallen tree]," {o} said.
        - "[Be careful|Stop]! The little bridge is broken," said {o}.
        """)
        s.say("""
        - {o} showed {h.him} another way, over the [hill|fields]. It was longer, but
          dry.
        - They laid a plank across and {h} [balanced|stepped] over it.
        """)
    s.para()
    s.say("""
    - {h} arrived out of breath. "{big_x}!" {h.he} [said|called] to {f}.
    - At last {h} [stood in front of|found] {f}. "{big_x}," {h.he} said.
    """)
    s.say("""
    - "[Good to know|I am glad you told me]," said {f}. "You came just in time."
    - "Thank you, {h}," said {f}. "I can [rely on|trust] you."
    - {f} [listened|nodded] and gave {h.him} a [peppermint|shiny coin|ripe apricot].
    """)
    if end == "delay":
        s.may(
            "- Then {h} went back to {o}, and they [played|had fun] until the evening."
        )
    else:
        s.may("""
        - {h} walked home [slowly|happily].
        - {h} felt very grown up that day.
        """)


@plot
def trading(s: Story) -> None:
    """Two things change hands; one trade is regretted and turned back, one is not."""
    s.hero()
    s.place(nouns="village park garden farm")
    s.meet(sort="hands")
    toys = "ball kite boat doll whistle book drum hat scarf"
    t, u = s.thing("t", toys), s.thing("u", toys)
    s.open("sunny cloudy fresh windy")
    s.own()
    s.say("""
    - {f.new} had a {u.full}, and {h} [liked|admired] it at once.
    - But then {h.he} saw {f.new}, who was {u.use} a {u.full}.
    """)
    s.say("""
    - "Will you [trade|swap]?" asked {h}. "My {t} for your {u}." {f} [agreed|nodded].
    - "I will give you my {t} for it," said {h}. "[Deal|Done|All right]!" said {f}.
    """)
    s.fact("traded", t, u)
    s.para()
    if s.chance(0.5):
        s.say("""
        - {h} [loved|enjoyed] the {u} all day. But at bedtime {h.he} missed the {t}.
        - The next morning, {h} [thought of|missed] the {t}. The {u} was nice, but it
          was not the same.
        """)
        s.say("""
        - {h.He} went to {f} and asked, "Can we trade back?"
        - "I am sorry," {h.he} told {f}. "May I have my {t} again?"
        """)
        if s.chance(0.5):
            s.say("""
            - {f} laughed. "I missed my {u}, too!" {f.he} said.
            - "I was going to ask you the same," said {f}, and they both laughed.
            """)
            s.say("""
            - So {h} got the {t.full} back, and {f} the {u.full}.
            - They swapped back, and everyone was [happy|pleased] again.
            """)
            s.fact("traded back", u, t)
            s.may(
                """
            - "Old friends are the best friends," said {h} to the {t}.
            - After that, they lent each other their toys instead.
            """,
                0.8,
            )
        else:
            s.say("""
            - {f} shook {f.his} head. "A trade is a trade," {f.he} said. "But you can
              visit it [every day|whenever you like]."
            - "No," said {f}, "but let us play with both of them together."
            """)
            s.say("""
            - {h} thought about it. That was fair.
            - So the two of them met every [day|afternoon], and {h} was content.
            - "Next time, I will think before I trade," said {h}.
            """)
            s.fact("kept", u, t)
    else:
        s.say("""
        - {f} [loved|liked] the {t.full}, and {h} loved the {u.full}.
        - {h} could not stop smiling at the {u.full}. {f} was just as [happy|pleased]
          with the {t}.
        """)
        s.say("""
        - They played together until the [lamps|street lamps] were lit.
        - "Take good care of it," said {f}. "I will," {h} promised. "And you, too."
        """)
        s.say("""
        - Both were sure that they had made the better trade.
        - "A good trade makes two people glad," said {h}'s grandfather.
        """)
        s.part()
        s.fact("kept", u, t)


# prank: cry, what really happens later
CRIES = lines("""
Fire:the kitchen curtain caught fire:put out the fire with buckets of water
A wolf:a grey wolf came down from the hills:chased the wolf away with pots and pans
Help, I am drowning:the water pulled {h.him} away:threw {h.him} a rope
A snake:a real snake lay across the path:led {h.him} around it
Thieves:a thief climbed through the window:caught the thief
""")


@plot
def lie(s: Story) -> None:
    """False alarms use up trust; the truth, told in time, wins it back."""
    s.hero(child=True, traits="bored naughty lively cheeky")
    p = s.place(nouns="village farm park river")
    s.meet()
    cries = [row.split(":") for row in CRIES]
    if p.noun == "river":
        cries = [row for row in cries if "drown" in row[0] or "snake" in row[0]]
    else:
        cries = [row for row in cries if "drown" not in row[0]]
    cry, real, aid = s.pick(cries)
    s.slots["x"] = cry
    s.open("sunny cloudy fresh")
    s.say("""
    - {h} wanted to play a [trick|joke|prank].
    - {h.He} liked to play [tricks|jokes|pranks] on others.
    """)
    s.say("""
    - "{x}!" {h.he} shouted. {f.new} came running, but there was nothing. {h} only
      laughed.
    - "{x}!" {h.he} screamed. When {f.new} hurried to help, {h} laughed and laughed.
    """)
    s.para()
    if s.chance(0.55):
        s.fact("cried", "believed at last", cry)
        s.say(f"""
        - The next [day|week], {real}. "{{x}}!" cried {{h}}, and this time it was true.
        - Then, one evening, {real}. {{h}} shouted as loudly as {{h.he}} could.
        """)
        s.say("""
        - "You cannot fool me [twice|again]," said {f} and stayed at home.
        - At first, {f} did not believe {h.him} and did not come.
        """)
        s.say("""
        - "It is true! I promise!" {h} [called|begged], and there were tears in {h.his}
          voice.
        - "Please, please believe me!" cried {h}. {h.His} voice sounded different now.
        """)
        s.say(f"""
        - So {{f}} came after all and {aid}.
        - {{f}} heard that {{h.he}} was really afraid. {{f.He}} came and {aid}.
        """)
    else:
        s.fact("cried", "said sorry", cry)
        s.say("""
        - {f} did not laugh. "I was [worried|so afraid] for you," {f.he} said and walked
          away.
        - "That was not funny," said {f}. "[If you lie, nobody will believe you|One day
          you will really need help]."
        """)
        s.say("""
        - {h} thought about it all night. It had [been a mean joke].
        - {h} stopped laughing. {h.He} felt [hot|small] with shame.
        """)
        s.say("""
        - "It was a lie, and I am sorry," {h.he} told {f} the next morning.
        - {h} picked a bunch of [flowers|daisies] and went to say sorry to {f}.
        """)
    s.para()
    s.say("""
    - "I will never [lie|trick you] again," said {h}, and {h.he} kept {h.his} word.
    - From then on, {h} told only the truth, and {f} trusted {h.him} again.
    - "Trust is like [glass|an egg]," said {f}. "[Handle it with care|Be careful with
      it]."
    """)


@plot
def neighbour(s: Story) -> None:
    """Somebody new moves in; a first step is made, and a shared liking makes
    friends."""
    s.hero(traits="shy kind curious friendly polite")
    s.place()
    f = s.meet(sort=s.pick(["child", "animal"]))
    s.thing(nouns="ball kite drum book boat doll whistle umbrella")
    s.open()
    s.say("""
    - That week, somebody moved into the [empty|old] house next door. It was a {f.kind}
      named {f}.
    - There was a new neighbour, a {f.kind} named {f}.
    """)
    s.say("""
    - "I wonder what {f.he} is like," thought {h}.
    - {f} sat all alone on the [steps|doorstep] and looked sad.
    - Nobody talked to {f.him}, because nobody knew {f.him}.
    """)
    s.para()
    step = s.pick(["shy", "gift", "thing"])
    s.fact("welcomed", step, f)
    if step == "shy":
        s.say("""
        - {h} wanted to say hello, but the words would not come out. {h.He} only waved.
        - Three times {h} walked up to the door, and three times {h.he} turned back.
        """)
        s.say("""
        - Then {f} [opened the window|came over] and said, "Hello! Do you want to see my
          {t.full}?"
        - At last {f} came out with a {t.full}. "Shall we play?" {f.he} asked.
        """)
    elif step == "gift":
        s.say("""
        - {h} [took|carried] a warm [plum pie|loaf of bread|apple cake] to the door and
          knocked.
        - {h} picked some flowers and knocked on the door. "Welcome!" {h.he} said.
        """)
        s.say("""
        - "[How kind|How lovely]! Come in," said {f}. On the shelf {h} saw a {t.full}.
        - {f} was so [surprised|happy] that {f.he} showed {h} a {t.full}.
        """)
    else:
        s.say("""
        - Then {h} saw a {t.full} [among the boxes|on the cart|on the steps].
        - When the boxes were carried in, a {t.full} [fell|rolled] out. {h} picked it
          up.
        """)
        s.say("""
        - "Is this {t} yours?" {h.he} asked. "Yes, [it is my favourite|I love it]," said
          {f}.
        - "What a [nice|fine] {t}!" said {h}. {f} [smiled|looked up] for the first time.
        """)
    s.say("""
    - It turned out that both of them loved [stories|singing|jokes|picnics|mud pies].
    - They found out that they were both [five|six|seven] years old.
    - {h} showed {f} the best [place to play|short cut|hiding place] {p.at}.
    """)
    s.para()
    s.say("""
    - "I am glad you live here now," said {h}.
    - "I thought I would have no friends here," said {f}. "Now I have [one|you]."
    - The next morning, {f} was already waiting at the gate.
    - Soon it felt as if {f} had always lived there.
    """)
    s.may(
        """
    - And every day after that, they [played|laughed] together.
    - A new neighbour can be a new friend.
    """,
        0.4,
    )


GUIDES = {
    "fly": """
    - {f} flew above the trees and called, "This way! I can see your roof from here!"
    - "Follow me," said {f} and flew slowly from branch to branch, always in sight.""",
    "smell": """
    - {f} sniffed the ground. "Your own footprints will lead us back," {f.he} said.
    - {f} put {f.his} nose to the path and followed {h.his} scent all the way back.""",
    "-": """
    - {f} knew every path. "First the stream, then left at the white rock," {f.he} said.
    - {f} took out a compass. "Your house is to the north," {f.he} said.""",
}


@plot
def lost_way(s: Story) -> None:
    """The hero goes astray and comes home by a guide, or by signs laid down before."""
    h = s.hero(lacks="fly smell")
    s.place(nouns="forest hill meadow lake")
    marks = s.pick(["white pebbles", "bits of red wool", "nutshells", "chalk arrows"])
    s.slots["x"] = marks
    s.open("cloudy windy fresh")
    own_way = s.chance(0.35)
    if own_way:
        s.say(
            """
        - Before {h.he} set out, {h} filled {h.his} pockets with {x}. "To find my way
          back," {h.he} said.
        - {h} had a plan. Every few steps, {h.he} dropped {x} along the path.
        """
            if "chalk" not in marks
            else """
        - {h} had a plan. At every corner, {h.he} drew {x} on the stones.
        """
        )
    s.say("""
    - {h} chased a butterfly, further and further away from the path.
    - {h} picked mushrooms, one here and one there, and did not look up.
    - {h} wanted to see where the [stream|trail] went and walked on and on.
    """)
    s.say("""
    - When {h.he} turned around, nothing looked [familiar|the same]. {h} was lost.
    - Then a fog came down, and {h} did not know where {h.he} was.
    - All the paths looked alike, and the shadows grew [long|longer].
    """)
    s.para()
    if own_way:
        s.fact("home", h, "marks", marks)
        s.say("""
        - "[Do not panic|Keep calm]," {h.he} told {h.him}self. Then {h.he} saw them.
        - {h.He} [swallowed hard|took a deep breath] and looked at the ground.
        """)
        s.say("""
        - There were the {x}! One after another, they led {h.him} back.
        - {h} found the {x}, one by one, and followed them.
        """)
        s.say("""
        - The moon was up when {h} reached the door. Supper was still warm.
        - At the garden gate stood {h.his} father with a lamp. They hugged each other.
        """)
        s.say("""
        - "Good that you thought ahead," said {h.his} grandmother.
        - "A good plan is the best friend on a journey," thought {h}.
        - {h} never went out without a plan.
        """)
        return
    f = s.meet(skills="fly smell -")
    s.say("""
    - "Hello? Is anybody there?" {h.he} called. Only the echo answered.
    - {h} sat down on a stone and [sniffed|shivered]. It was very quiet.
    - {h} tried one path and then another, but both of them ended at a swamp.
    """)
    s.say("""
    - Then there was a rustle, and {f.new} came out of the bushes.
    - After a while, {f.new} heard {h.him} and came closer.
    """)
    s.say("""
    - "Are you lost?" {f.he} asked. {h} nodded.
    - "I want to go home, but I do not know the way," said {h}.
    """)
    s.say(GUIDES[f.skill])
    s.fact("home", h, f.skill, f)
    s.para()
    s.say("""
    - Soon {h} saw the [lights|chimney] of {h.his} own house.
    - They came out [by|near] {p.spot}, and from there {h} knew the way.
    """)
    s.thank()
    s.may(
        """
    - "Next time, stay on the path," said {f} with a wink.
    - {h}'s mother [gave|served] them both a big bowl of [soup|porridge].
    """,
        0.6,
    )


SEEDS = lines("""
a sunflower:tall and golden:it grew taller than the fence
a pumpkin:round and orange:it was too heavy to carry alone
a bean:green and curly:it climbed to the top of its pole
a strawberry plant:small and bright:it had nine sweet berries
an apple tree:thin and straight:it had its first white blossoms
a tomato plant:red and juicy:there was enough for a salad
a poppy:red as fire:the bees came from far away
""")


@plot
def seed(s: Story) -> None:
    """A seed is planted, neglected or harmed, cared for again, and grows."""
    s.hero(child=s.chance(0.8), traits="patient curious gentle careful")
    s.place(nouns="garden farm orchard")
    s.meet()
    plant, looks, joy = s.pick(SEEDS).split(":")
    s.slots["x"] = plant
    harm = s.pick(["dry", "snails", "frost", "impatient"])
    s.fact("planted", plant, harm)
    s.say(OPENINGS, day=s.pick(["One spring morning", "In April", "One day in spring"]))
    s.say("""
    - {f.new} gave {h.him} a [tiny|small] seed. "This will be {x}," {f.he} said.
    - {h} got a seed from {f.new}. It was to become {x}.
    """)
    s.say("""
    - {h} dug a hole near {p.spot}, put in the seed and [watered|covered] it.
    - {h} planted it in soft, dark soil and gave it water every day.
    """)
    s.para()
    if harm == "impatient":
        s.say("""
        - A day passed, then another. "Why does nothing happen?" asked {h}.
        - After three days, {h} wanted to dig it up to see if it was growing.
        """)
        s.say("""
        - "Wait," said {f}. "[It is working under the ground|Good things take time]."
        - "Be patient," said {f}. "You cannot see it, but it is making roots."
        """)
        s.say("- One morning, a green [tip|shoot] peeped out of the ground.")
    else:
        s.say("""
        - [Soon|After ten days] a little green [tip|shoot] peeped out of the ground.
        - Then two tiny leaves [appeared|came up], and {h} was [delighted|overjoyed].
        """)
        s.say(
            {
                "dry": """
            - But then came hot days. {h} forgot the water, and the leaves [drooped|hung
              down].
            - {h} played all week and did not water it. The leaves turned yellow.""",
                "snails": """
            - But one morning, there were holes in the leaves. Snails had [come|been
              there]!
            - In the night, hungry snails nibbled at the leaves.""",
                "frost": """
            - But one evening, it grew very cold. "Frost will kill it," said {f}.
            - Then the wind turned cold, and there was ice on the puddles.""",
            }[harm]
        )
        s.say(
            {
                "dry": """
            - "I am sorry, little plant," said {h} and gave it [fresh|plenty of] water
              at once.
            - {f} helped {h.him} to carry water from the well, can after can.""",
                "snails": """
            - {h} and {f} picked them off and carried them to the [ditch|compost heap].
            - {f} put a ring of [ashes|eggshells] around it, and the snails stayed
              away.""",
                "frost": """
            - {h} and {f} covered it with straw and a warm sack.
            - {f} helped {h.him} to put a big glass jar over it.""",
            }[harm]
        )
    s.para()
    s.say(
        f"""
    - In summer, the plant was {looks}, and {joy}.
    - The months went by. At last {joy}.
    - It grew and grew, until {joy}.
    """
        if "tree" not in plant
        else f"""
    - Three years later, {joy}.
    - The tree grew slowly. When {{h}} had grown, too, {joy}.
    """
    )
    s.say("""
    - "You cared for it well," said {f}. {h} was very proud.
    - "From such a tiny seed!" said {h} in wonder.
    - {h} and {f} sat beside it every evening.
    - "Thank you for the seed," said {h} to {f}. "It is our plant now."
    """)


GAMES = lines("""
marbles:whether a marble on the line was in or out
leapfrog:who had to bend down first
hopscotch:whether a foot had touched the line
a board game:who could throw the dice again
tag:whether the old tree was a safe place
a card game:whether the queen or the king was higher
skittles:how far away they had to stand
""")


@plot
def quarrel(s: Story) -> None:
    """A quarrel over rules; it ends by a judge, by a new rule, or by missing each
    other."""
    h = s.hero()
    f = s.meet()
    s.place()
    game, issue = s.pick(GAMES).split(":")
    on = "" if issue.startswith("whether") else "on "
    s.slots.update(x=game, issue=issue, on_issue=on + issue)
    s.open("sunny cloudy fresh windy")
    s.say("""
    - {h} and {f.new} played {x} near {p.spot}.
    - {f.new} came over, and they played {x} [together|until noon].
    """)
    s.say("""
    - But then they [quarrelled|argued] about {issue}.
    - [At first it was fun|All went well for a while]. Then they could not agree
      {on_issue}.
    """)
    s.say("""
    - "You are cheating!" [shouted|yelled] {h}. "No, you are!" [shouted|yelled] {f}.
    - "That is against the rules!" said {h}. "Not against mine!" said {f}.
    - "I make the rules," said {h}. "Then play alone," said {f}.
    """)
    s.para()
    end = s.pick(["judge", "rule", "miss"])
    s.fact("quarrel", end, h, f)
    if end == "judge":
        s.meet("o")
        s.say("""
        - {o.new} heard the noise. "Tell me about it, one after the other," {o.he} said.
        - They went to {o.new} and asked {o.him} to decide.
        """)
        s.say("""
        - {o} listened to both of them. "Toss a coin," {o.he} said. "Then nobody is
          cross."
        - "Today you play by one rule, and tomorrow by the other," said {o}.
        - "Who wants to play, and who wants to be right?" asked {o}. They had to
          [laugh|grin].
        """)
    elif end == "rule":
        s.say("""
        - They stood there with folded arms and said nothing for a long time.
        - {h} counted to ten and [breathed in|breathed out] slowly.
        """)
        s.say("""
        - "Let us make a new rule that we both like," {h} said at last.
        - "What if we write the rules down before we play?" asked {f}.
        """)
        s.say("""
        - They scratched it on a flat stone, so that nobody could forget it.
        - They thought of a rule that was fair to both, and shook on it.
        """)
    else:
        s.say("""
        - {h} went home and slammed the door. But playing alone was [dull|boring].
        - {f} went one way, and {h} went the other. It was a long, quiet afternoon.
        """)
        s.say("""
        - "{f} is more important than any game," thought {h} and went to find {f}.
        - In the evening, {h} could not stand it any longer and knocked on {f}'s door.
        """)
        s.say("""
        - "I am sorry I shouted," said {h}. "Me, too," said {f}.
        - Both of them said "Sorry!" at the same moment, and both of them laughed.
        """)
    s.para()
    s.say(
        """
    - Then they played on, and this time nobody [shouted|cheated|complained].
    - They started again from the beginning, and it was more fun than before.
    - And who won? They forgot to count.
    """
        if end != "miss"
        else """
    - The next day, they played {x} again, and nobody [shouted|complained].
    - And who had been right? They never talked about it again.
    """
    )
    s.may("""
    - A friend is worth more than a win.
    - "Rules are there so that everyone has fun," said {h}.
    - {h} and {f} were friends again.
    """)


# danger: places, how, skills and how each saves, and the way without a skill.
DANGERS = {
    "water": (
        "river lake",
        """
        - {f} leaned too far over the water, slipped and fell in.
        - The bank crumbled under {f}'s feet, and down {f.he} slid into the deep
          water.""",
        {"swim": "jumped in, swam to {f} and pulled {f.him} to the bank"},
        "held out a long branch, and {f} grabbed it and was pulled ashore",
        "was wet and cold, but safe",
    ),
    "pit": (
        "forest hill farm meadow",
        """
        - {f} did not see the old [pit|well shaft] under the leaves and fell in.
        - Suddenly the ground gave way, and {f} slid into a deep pit.""",
        {"dig": "dug a sloping tunnel down to {f}, who crawled out"},
        "tied a rope to a tree, and {f} climbed up, one knot after another",
        "was covered with earth, but safe",
    ),
    "rock": (
        "hill beach",
        """
        - A big stone rolled down and trapped {f}'s foot.
        - Some stones slid down, and {f} could not pull one foot free.""",
        {"strong": "lifted the stone, and {f} pulled the foot out"},
        "pushed a thick pole under the stone and lifted it, and {f} was free",
        "limped a little, but nothing was broken",
    ),
    "tree": (
        "forest orchard park",
        """
        - {f} had climbed higher and higher and did not dare to come down.
        - {f} was sitting on a thin branch, high up in a tree, and the branch
          cracked.""",
        {"climb": "climbed up and showed {f} where to put each foot"},
        "brought the longest ladder in the village and held it while {f} climbed down",
        "trembled, but stood on firm ground again",
    ),
}


@plot
def rescue(s: Story) -> None:
    """A friend is in danger; the hero runs for the one who can help, or finds a
    tool."""
    danger = s.pick(list(DANGERS))
    places, how, skilled, tool, state = DANGERS[danger]
    skill = next(iter(skilled))
    h = s.hero(lacks=skill)
    s.place(nouns=places)
    f = s.meet(sort="child")
    s.open("sunny cloudy fresh windy")
    s.say("""
    - {h} was out walking with {f.new}.
    - {h} and {f.new} were [exploring|looking for treasure|playing explorers].
    """)
    s.say(how)
    s.say(
        """
    - "Help! [Help|Help me]!" {f} [cried|screamed].
    - "I am stuck! Please get help!" called {f}.
    """
        if danger != "water"
        else """
    - "Help! Help!" {f} [cried|screamed] and splashed about.
    """
    )
    s.para()
    if s.chance(0.6):
        o = s.meet("o", skills=skill)
        s.say("""
        - {h} could not help alone. {h.He} {h.ran} as fast as {h.he} could and found
          {o.new}.
        - "Hold on!" called {h}. {h.He} {h.ran} to fetch {o.new}.
        """)
        s.say("""
        - "{f} is in danger! Come quickly!" {h} [panted|gasped]. They hurried back.
        - There was no time to explain. "Come!" {h} cried, and {o} came at once.
        """)
        s.say(f"""
        - {{o}} {skilled[skill]}.
        - {{o}} did not wait a second. {{o.He}} {skilled[skill]}.
        """)
        s.fact("rescued", f, danger, o, o.skill)
        saver = "{o}"
    else:
        s.say("""
        - {h} was afraid, but {h.he} [kept calm|thought quickly].
        - "I am here. Do not move," called {h} and looked around.
        """)
        s.say(f"""
        - {{h}} {tool}.
        - Then {{h.he}} had an idea. {{h}} {tool}.
        """)
        s.fact("rescued", f, danger, h, "tool")
        saver = "{h}"
    s.para()
    s.say(f"""
    - {{f}} {state}.
    - At last it was over. {{f}} {state}.
    """)
    s.say(f"""
    - "You saved me," {{f}} said to {saver} and [would not let go|cried a little].
    - "Thank you, {saver}," said {{f}}. "I was so frightened."
    - {{f}} hugged {saver}. "I will be more careful," {{f.he}} promised.
    """)
    s.may(
        """
    - That evening, they all drank hot cocoa by the fire.
    - The whole village talked about it for days.
    - "In danger, keep a cool head," said {h.his} grandfather.
    """,
        0.6,
    )


PICNIC = lines("""
a loaf of bread
a bowl of strawberries
a jar of pickles
a dozen boiled eggs
a chocolate cake
a big melon
a bottle of juice
a potato salad
a bag of crisps
a tray of sausages
a lemon tart
some cucumber sandwiches
""")
MISHAPS = {
    "ants": (
        "An army of ants marched right across the {x}",
        "moved everything to a flat rock",
        "left the ants a few crumbs, so that they stayed away",
    ),
    "rain": (
        "Then it began to rain",
        "carried everything under a thick tree and sat close to the trunk",
        "held a big cloth over their heads and ate under it",
    ),
    "forgot": (
        "But nobody had brought any [plates|spoons]",
        "used big, clean leaves",
        "ate with their fingers and licked them clean",
    ),
    "goat": (
        "Then a hungry goat came and ate the {y}",
        "gave the goat some grass and saved the rest",
        "shared what was left and laughed at the goat's white beard",
    ),
}


@plot
def picnic(s: Story) -> None:
    """Everyone brings something; something goes wrong, and they make the best of it."""
    s.hero()
    s.place(nouns="meadow park lake hill beach orchard")
    s.meet()
    s.meet("o")
    foods = s.shuffled(PICNIC)
    # Ants walk over a cake and a goat eats it; neither does that to a bottle of juice.
    foods.sort(key=lambda food: "bottle" in food or "jar" in food)
    s.slots["fx"], s.slots["fy"], s.slots["fz"] = foods[:3]
    s.slots.update(x=foods[0].split()[-1], y=foods[1].split()[-1])
    mishap = s.pick(list(MISHAPS))
    trouble, *cures = MISHAPS[mishap]
    s.fact("picnic", mishap, *foods[:3])
    s.open("sunny" if mishap != "rain" else "cloudy")
    s.say("""
    - {h} invited {f.friend} and {o.friend} to a picnic {p.at}.
    - "Let us have a picnic {p.at}," {h} said to {f.friend} and {o.friend}.
    """)
    s.say("""
    - {h} brought {fx}, {f} brought {fy}, and {o} came with {fz}.
    - {h} packed {fx}. {f} carried {fy}, and {o} arrived with {fz}.
    """)
    s.para()
    if s.chance(0.5):
        s.thing(nouns="blanket")
        s.say("""
        - They spread a {t.full} near {p.spot} and set out the food.
        - {f} had thought of a {t.full}, and they all sat down on it.
        """)
    else:
        s.say("""
        - They [sat down|found a place] near {p.spot} and unpacked everything.
        - They spread a cloth [on the ground|in the shade] and set out the food.
        """)
    s.say(f"""
    - {trouble}!
    - {trouble}! "Oh no!" cried {{f}}.
    """)
    s.say("""
    - {o} was [cross|upset], but {h} only laughed.
    - "Now everything is [ruined|spoilt]," said {o}. "Not at all," said {h}.
    - "What now?" asked {f}. {h} thought for a moment.
    """)
    cure = s.pick(cures)
    s.say(f"""
    - So they {cure}.
    - At last {{h}} had an idea. They {cure}.
    """)
    s.para()
    s.say(
        """
    - After the meal, they [played tag|sang their favourite songs].
    - They ate until their tummies were [full|round] and lay down in the sun.
    - Nothing had ever tasted so good.
    """
        if mishap != "rain"
        else """
    - Nothing had ever tasted so good.
    - The drops pattered on the leaves, and they sang along.
    """
    )
    if s.things:
        s.may("""
        - Then they shook the {t} and folded it up.
        - There were more crumbs on the {t} than on the ground.
        """)
    s.say("""
    - "It was the funniest picnic ever," said {f}.
    - "Things do not have to be perfect to be fun," said {h}.
    - On the way home, they already planned the next one.
    - Everyone helped to pick up the [rubbish|scraps], and the place was clean again.
    """)


LOCKED = lines("""
garden gate:a bench under the roses
old chest:a pile of grandfather's letters
little cupboard:the last jar of honey
tool shed:a rake and a spade
music box:a tiny dancer that turned around
attic door:a trunk full of costumes
wooden chest:a crown made of paper and a treasure map
""")


@plot
def missing_key(s: Story) -> None:
    """Something is locked, the key is missing; it is where its story says it must
    be."""
    s.hero()
    s.place(nouns="garden farm orchard village")
    f = s.meet(skills="fly smell small -")
    s.thing(nouns="key")
    lock, inside = s.pick(LOCKED).split(":")
    s.slots.update(x=lock, inside=inside)
    s.open()
    s.say("""
    - At {h.his} grandmother's house there was a {x}. But it was locked, and its
      {t.full} was gone.
    - {h} wanted to open the {x}. But where was its {t.full}?
    - The {x} was locked, and nobody knew where its {t.full} was.
    """)
    s.say("""
    - {h} pulled and [pushed|shook], but the {x} stayed shut.
    - {h} looked under the mat and [in|inside] every drawer. Nothing!
    - {h} tried a hairpin, but the lock did not [move|turn].
    """)
    s.ask("I cannot find the {t}")
    s.para()
    if f.skill == "fly":
        s.say("""
        - "Magpies like shiny things," said {f}. {f.He} flew up to a nest in the tallest
          tree.
        - {f} remembered a magpie's nest and flew up to it.
        """)
        s.say("""
        - In the nest, between a button and a bottle top, lay the {t}.
        - The {t} was there, and {f} brought a glass bead for the magpie instead.
        """)
    elif f.skill == "smell":
        s.say("""
        - "Who had it last?" asked {f}. {f.He} sniffed the lock and followed the smell.
        - {f} sniffed the {x} and ran along the wall with {f.his} nose to the ground.
        """)
        s.say("""
        - Beside {p.spot}, {f} began to scratch, and the {t} came to light.
        - The trail ended at {p.spot}. There lay the {t}.
        """)
    elif f.skill == "small":
        s.say("""
        - "I will look where you cannot," said {f} and slipped through a crack in the
          floor.
        - {f} crawled under the {x}, where it was dark and dusty.
        """)
        s.say("""
        - A moment later, {f.he} came back, pulling the {t} behind {f.him}.
        - "Here it is!" {f.he} squeaked and pushed the {t} out.
        """)
    else:
        s.say("""
        - "When was it last open?" asked {f}. "On a rainy day," said {h}. Then both of
          them thought of the raincoat.
        - "Let us think," said {f}. "Who wore this old coat last?" {h} reached into its
          pocket.
        """)
        s.say("""
        - In the left pocket, under a handkerchief, was the {t}.
        - And there, in a hole in the lining, was the {t}.
        """)
    s.fact("key", f, f.skill, lock)
    s.para()
    s.say(
        """
    - Click! The lock opened. Inside there was {inside}.
    - The {t} turned with a [squeak|click], and they saw {inside}.
    """
        if "gate" not in lock and "door" not in lock
        else """
    - Click! The {x} opened. Behind it they found {inside}.
    - The {t} turned with a [squeak|click]. Behind the {x} there was {inside}.
    """
    )
    s.say("""
    - "It was worth the search," said {f}.
    - {h} hung the {t} on a [nail|hook] beside the door. "Now it has a home," {h.he}
      said.
    - "Thank you, {f}," said {h}. "You think like a detective."
    - They looked at each other and [smiled|cheered].
    """)


ACTS = lines("""
sing a song
recite a poem
dance
play the piano
do a magic trick
tell a story
play the violin
turn a cartwheel
act as the king
act as the dragon
""")


@plot
def stage(s: Story) -> None:
    """Stage fright before a show; a friend's way of helping works, or mends a slip."""
    s.hero(child=True, traits="shy quiet careful dreamy")
    s.place(nouns="village park farm garden")
    f = s.meet()
    s.slots["x"] = s.pick(ACTS)
    s.open("sunny cloudy fresh windy")
    s.say("""
    - There was going to be a [show|festival] {p.at}, and {h} was to {x}.
    - Everyone [in class|in the family] had a part in the show. {h} was to {x}.
    """)
    s.say("""
    - {h} had [practised|rehearsed] for weeks. But now {h.his} stomach was full of
      butterflies.
    - But when {h.he} saw all the [people|chairs|faces], {h.his} mouth went dry.
    - "I cannot do it. They will all stare at me," {h.he} said, and {h.his} knees shook.
    """)
    s.para()
    if s.chance(0.5):
        s.fact("stage", "helped", f)
        s.say("""
        - {f.new} [found|saw] {h.him} behind the curtain.
        - "What is the matter?" asked {f.new}.
        """)
        s.say("""
        - "Look only at me," said {f}. "Then it is [just|only] the two of us."
        - "Imagine that they are all [cabbages|penguins|turnips]," said {f}. {h} had to
          laugh.
        - "Breathe in and count to four," said {f}. They did it together, three times.
        """)
        s.say("""
        - {h} stepped on the stage. [Softly|Slowly] at first, then [boldly|freely],
          {h.he} began.
        - Then the curtain opened, and {h}'s fear was gone.
        """)
    else:
        s.fact("stage", "slip", f)
        s.say("""
        - The curtain opened. {h} began well, but in the middle {h.he} forgot what came
          next.
        - {h.He} started, made a mistake and stopped. It was [terribly|very] quiet.
        """)
        s.say("""
        - {f.new}, who sat in the first row, [smiled at|nodded to] {h.him}.
        - Then somebody began to clap along. It was {f.new}.
        """)
        s.say("""
        - {h} took heart, started again and did it without a mistake.
        - {h} laughed at {h.him}self, and everybody laughed kindly. Then {h.he} went on.
        """)
    s.para()
    s.say("""
    - The people [clapped|cheered|stamped their feet], and {h} took a [deep|low] bow.
    - The applause was so loud that the pigeons flew away.
    - "Bravo! [Again|More]!" [called|cried] the crowd.
    """)
    s.say("""
    - "You were [brave|wonderful|great]," said {f}.
    - "I was afraid, and I did it anyway," said {h} proudly.
    - "Thank you for being there," {h} told {f} afterwards.
    """)
    s.may("- {h} could hardly wait for the next show.", 0.3)


GOODS = lines("""
flour:baker
milk:milkman
eggs:farmer
nails:carpenter
thread:tailor
honey:beekeeper
paper:shopkeeper
candles:shopkeeper
butter:dairy woman
onions:farmer
rice:grocer
soap:grocer
medicine:doctor
potatoes:farmer
""")


@plot
def errand(s: Story) -> None:
    """An errand with money: too much change, a lost coin, or a tempting stall."""
    s.hero(child=True)
    s.place(nouns="village")
    goods, seller = s.pick(GOODS).split(":")
    s.slots.update(x=goods, y=seller)
    end = s.pick(["change", "coin", "tempted"])
    f = s.meet(skills="fly smell small -" if end == "coin" else "")
    s.fact("errand", end, goods)
    s.say(
        """
    - {day}, a {h.trait} {h.kind} named {h} was sent to {p} with a coin to buy {x}.
    - There was once a {h.trait} {h.kind} called {h}. {day}, {h.his} mother gave {h.him}
      a coin and sent {h.him} to buy {x}.
    - "Please buy some {x}," said the mother of a {h.kind} named {h}. "Here is a coin."
    """,
        day=s.pick(["One morning", "One day", "One Friday", "One market day"]),
    )
    if s.chance(0.4):
        s.thing(nouns="basket")
        s.say("""
        - {h} took a {t.full} and walked down the lane.
        - With a {t.full} in one hand and the coin in the other, {h} set off.
        """)
    else:
        s.may(
            """
        - {h} held the coin tightly and walked down the lane.
        - {h} was proud to go all alone.
        - {h} took a bag and hopped from stone to stone.
        """,
            0.7,
        )
    s.para()
    if end == "change":
        s.say("""
        - The {y} handed over the {x} and counted out the change.
        - {h} paid, took the {x} and thanked the {y}.
        """)
        s.say("""
        - Outside, {h.he} met {f.new} and counted the money. There were [two|three]
          coins too many!
        """)
        s.say("""
        - "You could buy [sweets|a toy] with that," said {f}. {h} thought about it.
        - "Lucky you! Nobody will notice," said {f}. But {h} frowned.
        """)
        s.say("""
        - "It is not mine," {h.he} said and went back to the {y}.
        - {h} turned around. "The {y} will miss it tonight," {h.he} said.
        """)
        s.say("""
        - "You are an honest {h.kind}," said the {y} and gave them both [a bun|a plum|an
          apple].
        - "How honest!" cried the {y} and gave each of them [a bun|a peach|a fig].
        """)
    elif end == "coin":
        s.say("""
        - But on the way, {h} stumbled, and the coin rolled away and [vanished|was
          gone].
        - But there was a hole in {h.his} pocket, and suddenly the coin was gone.
        """)
        s.say("""
        - {h} crawled through the dust and looked under every [leaf|cart]. No coin!
        - "How can I go home without {x}?" {h.he} [sobbed|sighed].
        """)
        s.say("""
        - {f.new} stopped beside {h.him}. "What are you looking for?" {f.he} asked.
        """)
        s.say(
            {
                "fly": """
            - {f} flew along the lane and saw something glitter. It was the coin!""",
                "smell": """
            - {f} sniffed the empty pocket, followed the smell and found the coin.""",
                "small": """
            - {f} slipped into a crack between two stones and pushed out the coin.""",
                "-": """
            - "Let us walk back, step by step," said {f}, and behind a wheel lay the
              coin.
            - {f} knelt down and looked along the ground. There, something
              glittered!""",
            }[f.skill]
        )
        s.fact("coin", f, f.skill)
        s.say("""
        - So {h} bought the {x} after all.
        - {h} hugged {f} and hurried to the {y} to buy {x}.
        """)
    else:
        s.say("""
        - At the first stall there were [gingerbread men|toffee apples|paper windmills].
        - There was a stall with [roasted almonds|candy floss|colourful balloons].
        """)
        s.say("""
        - "Buy one for us!" said {f.new}. {h} looked at the coin in {h.his} hand.
        - {f.new} stood there as well. "Do you want one, too?" {f.he} asked.
        """)
        s.say("""
        - It was hard, but {h} shook {h.his} head. "This money is for {x}," {h.he} said.
        - "I would like to," said {h}, "but the money is not mine."
        """)
        s.say("""
        - {h.He} bought the {x} from the {y} and went home without [looking
          back|stopping].
        - Then {h.he} ran on to the {y} and bought the {x}.
        """)
    if s.things and end != "tempted":
        s.may(
            """
        - Into the {t} went the {x}, and {h} walked home.
        - {h} put the {x} into the {t} and hurried home.
        """,
            0.8,
        )
    s.para()
    s.say("""
    - At home, {h.his} mother was [pleased|proud]. "I can trust you," she said.
    - "[Well done|You did that well]," said {h.his} father and [ruffled|stroked]
      {h.his} hair.
    """)
    if end == "tempted":
        s.say("""
        - The next day, {h} got a coin for {h.him}self and shared a treat with {f}.
        - And on Sunday, they all went to the market together.
        """)
    else:
        s.may("""
        - {h} slept well that night.
        - {h} told the family all about {f}.
        - {h.He} felt very big.
        """)


# --------------------------------------------------------------------------------------
# Holding a text against the world

KIND_WORDS = sorted(set(KINDS.values()))
NAME = re.compile(r"\b(?:" + "|".join(NAMES) + r")\b")
THING = re.compile(r"\b(" + "|".join(THINGS) + r")s?\b", re.I)
LOOK_THING = re.compile(
    r"\b(" + "|".join(LOOKS) + r") (" + "|".join(THINGS) + r")\b", re.I
)
ANY_NAME, ANY_KIND = "|".join(NAMES), "|".join(KIND_WORDS)
NAME_KIND = re.compile(
    rf"\b(?P<n1>{ANY_NAME}) the (?P<k1>{ANY_KIND})\b"
    rf"|\b(?P<k2>{ANY_KIND}) (?:named|called) (?P<n2>{ANY_NAME})\b"
)
RELATIVES = re.compile(
    r"\b(?:(?:grand)?(?:mother|father)|uncle|aunt|sister|brother|man|men|woman|mum|dad|"
    r"king|queen|family|farmer|shepherd|miller|thief)\b",
    re.I,
)
PRONOUNS = {
    "he": re.compile(r"\b(?:he|him|his|himself)\b", re.I),
    "she": re.compile(r"\b(?:she|her|hers|herself)\b", re.I),
}
OTHER = {"he": "she", "she": "he"}


def split_stories(text: str) -> list[str]:
    """The stories of a text in TinyStories format; an unfinished last one counts."""
    return [story.strip() for story in text.split(END) if story.strip()]


def faults(story: str) -> list[str]:
    """What is wrong with one story, as far as this world's bookkeeping can tell.

    - `names`: more than three of the world's characters appear.
    - `things`: more than two of the tracked things appear.
    - `kind`: someone is given two kinds, or another kind than this world's ("Pip the
      bear").
    - `stranger`: a name appears without an introduction (kind, "named", "friend X").
    - `no origin`: a tracked thing's first mention is "the …": nobody brought it.
    - `look`: one thing has two looks ("red ball", later "blue ball").
    - `pronoun`: a pronoun of one gender while everybody named so far is of the other,
      and nobody else who could be meant (a mother, a farmer) has been mentioned.

    What it cannot see: a swap of two characters or things that are both in the story,
    an invented name or thing outside this world's lists, a pronoun after a girl and a
    boy have both been named, an event out of order, sense, grammar. A story without
    faults need not be a good one.
    """
    names = list(dict.fromkeys(NAME.findall(story)))
    things = list(dict.fromkeys(noun.lower() for noun in THING.findall(story)))
    found = []
    if len(names) > MAX_NAMES:
        found.append(f"names: {len(names)} of them ({', '.join(names)})")
    if len(things) > MAX_THINGS:
        found.append(f"things: {len(things)} of them ({', '.join(things)})")
    for match in NAME_KIND.finditer(story):
        name, kind = match["n1"] or match["n2"], match["k1"] or match["k2"]
        if KINDS[name] != kind:
            wrong = f"{name} is called a {kind}, not a {KINDS[name]}"
            found.append(f"kind: {a_or_an(wrong)}")
    for name in names:
        if not introduced(story, name):
            found.append(f"stranger: {name} is never introduced")
    for noun in things:
        first = re.search(rf"\b{noun}s?\b", story, re.I)
        if re.search(
            rf"\bthe (?:(?:{'|'.join(LOOKS)}) )?$", story[: first.start()], re.I
        ):
            found.append(f"no origin: the {noun} comes from nowhere")
    looks: dict[str, str] = {}
    for look, noun in LOOK_THING.findall(story.lower()):
        if looks.setdefault(noun, look) != look:
            found.append(f"look: the {noun} is {looks[noun]} and {look}")
    if wrong := wrong_pronoun(story):
        found.append(f"pronoun: {wrong!r}, and nobody so far is meant by it")
    return found


def wrong_pronoun(story: str) -> str:
    """The first pronoun that nobody mentioned so far can be meant by, or ""."""
    mentions = list(NAME.finditer(story))
    if not mentions:
        return ""
    gender = GENDERS[mentions[0][0]]
    ends = [m.start() for m in mentions if GENDERS[m[0]] != gender] + [len(story)]
    part = story[: ends[0]]
    if someone := RELATIVES.search(part):
        part = part[: someone.start()]
    wrong = PRONOUNS[OTHER[gender]].search(part)
    return wrong[0] if wrong else ""


def introduced(story: str, name: str) -> bool:
    """Whether the first mention of `name` says who that is."""
    first = re.search(rf"\b{name}\b", story)
    before, after = story[: first.start()], story[first.end() :]
    kind = KINDS[name]
    return bool(
        re.search(rf"\b(?:{kind} (?:named|called)|friend) $", before)
        or re.match(rf" the {kind}\b| was a \w+ {kind}\b", after)
    )


def consistency(text: str) -> float:
    """The share of stories in `text` with at most 3 names and at most 2 tracked things.

    Stories end at `<|endoftext|>`; an unfinished last one counts, empty ones do not.
    The corpus scores 1. Only the names and things of this world are counted, and only
    how many there are: a swap between two that belong to the story goes unseen, and so
    does an invented name (`faults` looks closer). ValueError if there is no story.
    """
    stories = split_stories(text)
    if not stories:
        raise ValueError("consistency needs at least one story, and the text has none")
    keeps = [
        len(set(NAME.findall(story))) <= MAX_NAMES
        and len({noun.lower() for noun in THING.findall(story)}) <= MAX_THINGS
        for story in stories
    ]
    return sum(keeps) / len(stories)


def sentences(text: str) -> list[str]:
    """The sentences of all stories; a quotation and its "said Tom" are one sentence."""
    out = []
    for line in text.replace(END, "").split("\n"):
        out += re.split(
            r'(?<=[.!?])\s+(?=["A-Z])|(?<=[.!?]")\s+(?=[A-Z"])', line.strip()
        )
    return [sentence for sentence in out if sentence]


def distinct_sentences(text: str) -> float:
    """Distinct sentences over all sentences: how much is not repeated word by word."""
    found = sentences(text)
    if not found:
        raise ValueError(
            "distinct_sentences needs text, and there is no sentence in it"
        )
    return len(set(found)) / len(found)


# --------------------------------------------------------------------------------------
# Writing


def tell(rng: random.Random, name: str | None = None) -> Story:
    """Play one story; `name` fixes the plot."""
    story = Story(rng)
    story.plot = name or story.pick(list(PLOTS))
    PLOTS[story.plot](story)
    return story


def tell_all(n: int = N_STORIES, seed: int = SEED) -> list[Story]:
    """`n` stories, all distinct, in the order in which they are told."""
    rng = random.Random(seed)
    stories: dict[str, Story] = {}
    while len(stories) < n:
        story = tell(rng)
        stories.setdefault(story.text(), story)
    return list(stories.values())


def corpus(n: int = N_STORIES, seed: int = SEED) -> str:
    return "".join(f"{story.text()}\n{END}\n" for story in tell_all(n, seed))


def write(path: Path, text: str) -> None:
    """Write `text` so that a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return value


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"make_stories.py: {message}; see --help\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="make_stories.py", description="Write the corpus of stories, stories.txt."
    )
    here = Path(__file__).resolve().parent
    parser.add_argument(
        "--out", type=Path, default=here, metavar="DIR", help="folder of stories.txt"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare only; exit 1 if it would differ"
    )
    parser.add_argument(
        "--sample", type=positive, metavar="N", help="print N stories and write nothing"
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="another seed for --sample"
    )
    args = parser.parse_args(argv)
    if args.seed is not None and not args.sample:
        parser.error("--seed goes with --sample; the corpus has its own seed")
    if args.sample:
        sys.stdout.write(corpus(args.sample, SEED if args.seed is None else args.seed))
        return 0
    path = args.out / "stories.txt"
    text = corpus()
    try:
        if args.check:
            same = path.read_bytes() == text.encode()
            print(f"{path}: {'as made' if same else 'differs; run make_stories.py'}")
            return 0 if same else 1
        write(path, text)
    except OSError as error:
        parser.error(
            f"cannot {'read' if args.check else 'write'} {path}: {error.strerror}"
        )
    print(f"{path}: {N_STORIES:,} stories, {len(text):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
