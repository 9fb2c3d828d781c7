# SPDX-License-Identifier: MIT
"""Write the English-Hindi corpus of chapter 1 from a synchronous grammar.

A synchronous grammar builds a sentence in two languages at once: every choice (who,
does what, to what, where, when) is made once, and each language then spells it out by
its own rules. English keeps subject, verb, object; Hindi puts the verb last and marks
on it, and on every adjective and possessive, the gender and number of a noun that may
stand far away. A translator trained on the pairs has to find these rules:

- order: subject, time, place, recipient, object, verb; postpositions after their noun;
- case: before a postposition nouns take the oblique form (लड़का, लड़के ने);
- ने: the subject of a transitive verb takes ने in the perfective tenses, and the verb
  then agrees with the object (रवि ने किताब पढ़ी), except for verbs such as ला, भूल, मिल;
- को: definite living objects take it, and with it the verb falls back to masculine
  singular (लड़की ने कुत्ते को देखा);
- dative subjects: need, like, should, be hungry (रवि को चाय पसंद है);
- अपना: a possessive that refers to the subject of its own clause;
- honour: elders take plural agreement (मेरी दादी सो रही हैं);
- negation: नहीं stands before the verb, the present auxiliary falls away after it
  (रवि चाय नहीं पीता), and "a" or "any" becomes कोई.

The map is a function: one English sentence has exactly one Hindi sentence. Some
English sentences share one (did not, didn't).

What the test split measures is *composition*. About 8 % of all (verb, object),
(adjective, noun), (subject, verb) and (preposition, place) combinations are held out
by a hash: no training sentence contains one, every test sentence does. So that the
test asks for nothing else, the corpus has no rare words: a word form that fewer than
one in two thousand pairs hold is left out of both splits, with the pairs that hold it.

    python data/make_english_hindi.py             write the two files beside this one
    python data/make_english_hindi.py --check     compare them, exit 1 on a difference
    python data/make_english_hindi.py --sample 9  print nine pairs

`english_hindi.by_hand.tsv` is written by hand, outside the grammar, and kept as it is.
Spelling: Unicode NFC; nukta in ख़ ज़ फ़ ड़ ढ़, none in loans with q or gh (कलम, गरीब);
chandrabindu where no vowel sign stands above the line (हूँ, गाँव), else bindu (नहीं).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path

SEED = 1
DRAWN_PAIRS = 60_000
RAREST_WORD = 1 / 2000
TRAIN_PAIRS = 25_000
TEST_PAIRS = 1_200
HELD_OUT_PERCENT = 8
LARGEST_USE = 1 / 5
HERE = Path(__file__).resolve().parent
FILES = {
    "train": "english_hindi.train.tsv",
    "test": "english_hindi.test.tsv",
}

Combination = tuple[str, str, str]


@dataclass(frozen=True)
class Pair:
    """One sentence in both languages and the word combinations it is made of."""

    english: str
    hindi: str
    combinations: tuple[Combination, ...]
    construction: str = ""


def held_out(combination: Combination) -> bool:
    """Whether the hash marks a (kind, word, word) combination for the test split."""
    digest = hashlib.sha256("\t".join(combination).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def held_out_combinations(drawn: list[Pair]) -> set[Combination]:
    """The combinations that stand in the test split alone.

    Those that the hash marks, but for a combination that is a word's main use: if boxes
    hold things and do nothing else, then without "in the box" nobody could learn how
    box goes on in that place. So it is at most one in five of what either word
    combines with in its kind.
    """
    uses = Counter(c for pair in drawn for c in set(pair.combinations))
    of_word: Counter = Counter()
    for (kind, first, second), n in uses.items():
        of_word[kind, 1, first] += n
        of_word[kind, 2, second] += n
    return {
        (kind, first, second)
        for (kind, first, second), n in uses.items()
        if held_out((kind, first, second))
        and n <= LARGEST_USE * of_word[kind, 1, first]
        and n <= LARGEST_USE * of_word[kind, 2, second]
    }


# ---------------------------------------------------------------------------- nouns

# group: English singular, English plural, Hindi, gender. "-" as plural: a mass noun;
# "-" as singular: plural only.
NOUN_TABLE = """
person: boy boys लड़का m, girl girls लड़की f, man men आदमी m, woman women औरत f,
  child children बच्चा m, student students छात्र m
worker: farmer farmers किसान m, shopkeeper shopkeepers दुकानदार m,
  driver drivers ड्राइवर m,
  tailor tailors दर्ज़ी m, gardener gardeners माली m, fisherman fishermen मछुआरा m,
  singer singers गायक m, soldier soldiers सैनिक m, carpenter carpenters बढ़ई m,
  nurse nurses नर्स f
visitor: guest guests मेहमान m, traveller travellers यात्री m
rogue: thief thieves चोर m
esteemed: teacher teachers शिक्षक m, doctor doctors डॉक्टर m
royal: king kings राजा m, queen queens रानी f, prince princes राजकुमार m,
  princess princesses राजकुमारी f
kin: brother brothers भाई m, sister sisters बहन f, son sons बेटा m,
  daughter daughters बेटी f
peer: friend friends दोस्त m, neighbour neighbours पड़ोसी m
elder: mother mothers माँ f, father fathers पिताजी m, grandmother grandmothers दादी f,
  grandfather grandfathers दादाजी m, uncle uncles चाचा m, aunt aunts चाची f
pet: dog dogs कुत्ता m, cat cats बिल्ली f, parrot parrots तोता m, rabbit rabbits ख़रगोश m
farm: cow cows गाय f, goat goats बकरी f, horse horses घोड़ा m, hen hens मुर्गी f,
  duck ducks बतख़ f, camel camels ऊँट m
wild: lion lions शेर m, elephant elephants हाथी m, monkey monkeys बंदर m,
  bear bears भालू m, tiger tigers बाघ m
small: mouse mice चूहा m, squirrel squirrels गिलहरी f, frog frogs मेंढक m,
  bird birds चिड़िया f, pigeon pigeons कबूतर m, peacock peacocks मोर m
fruit: apple apples सेब m, mango mangoes आम m, banana bananas केला m,
  orange oranges संतरा m, guava guavas अमरूद m, papaya papayas पपीता m,
  lemon lemons नींबू m, coconut coconuts नारियल m
vegetable: potato potatoes आलू m, tomato tomatoes टमाटर m, carrot carrots गाजर f,
  cucumber cucumbers खीरा m
dish: roti rotis रोटी f, samosa samosas समोसा m, sweet sweets मिठाई f, egg eggs अंडा m,
  biscuit biscuits बिस्कुट m, cake cakes केक m
meal: fish - मछली f, dal - दाल f, yogurt - दही m
drink: milk - दूध m, water - पानी m, tea - चाय f, coffee - कॉफ़ी f, juice - रस m,
  lassi - लस्सी f
staple: sugar - चीनी f, salt - नमक m, butter - मक्खन m
money: money - पैसा m
text: book books किताब f, letter letters चिट्ठी f, newspaper newspapers अख़बार m,
  story stories कहानी f, poem poems कविता f
media: song songs गाना m, film films फ़िल्म f
clothing: shirt shirts कमीज़ f, - shoes जूता m, sari saris साड़ी f, cap caps टोपी f,
  sweater sweaters स्वेटर m, kurta kurtas कुर्ता m
wash: - clothes कपड़ा m, - dishes बर्तन m
vessel: cup cups प्याला m, plate plates थाली f, glass glasses गिलास m,
  bottle bottles बोतल f, bucket buckets बाल्टी f, basket baskets टोकरी f, pot pots घड़ा m
tool: spoon spoons चम्मच m, knife knives चाकू m, rope ropes रस्सी f
furniture: chair chairs कुर्सी f, table tables मेज़ f, bed beds पलंग m
opening: door doors दरवाज़ा m, window windows खिड़की f
vehicle: car cars गाड़ी f, bicycle bicycles साइकिल f, boat boats नाव f
coach: bus buses बस f
toy: ball balls गेंद f, doll dolls गुड़िया f, kite kites पतंग f, toy toys खिलौना m
desk: pen pens कलम f, pencil pencils पेंसिल f, notebook notebooks कॉपी f,
  map maps नक्शा m
object: box boxes डिब्बा m, bag bags थैला m, key keys चाबी f, clock clocks घड़ी f,
  umbrella umbrellas छाता m, picture pictures तस्वीर f, ring rings अँगूठी f,
  phone phones फ़ोन m, ticket tickets टिकट m, gift gifts उपहार m,
  blanket blankets कंबल m, necklace necklaces हार m
rubble: stone stones पत्थर m, bell bells घंटी f
light: lamp lamps दीपक m, candle candles मोमबत्ती f
music: flute flutes बाँसुरी f, drum drums ढोल m
plant: flower flowers फूल m, plant plants पौधा m
place: house houses घर m, room rooms कमरा m, kitchen kitchens रसोई f,
  courtyard courtyards आँगन m, roof roofs छत f, garden gardens बगीचा m,
  park parks पार्क m, field fields खेत m, forest forests जंगल m, river rivers नदी f,
  lake lakes झील f, tree trees पेड़ m, road roads सड़क f, bridge bridges पुल m,
  mountain mountains पहाड़ m, village villages गाँव m, city cities शहर m,
  market markets बाज़ार m, shop shops दुकान f, school schools स्कूल m,
  temple temples मंदिर m, library libraries पुस्तकालय m, hospital hospitals अस्पताल m,
  office offices दफ़्तर m, bank banks बैंक m, station stations स्टेशन m
"""

M, F = "m", "f"
FIXED_AA = {"राजा", "चाचा"}  # masculines in -ā that change only in the oblique plural
VOWEL_LETTERS = "अआइईउऊएऐओऔ"
MATRAS = "ाािीुूृेैोौॉ"


@dataclass(frozen=True)
class Noun:
    """A noun: English singular and plural; Hindi direct and oblique forms."""

    english: str
    english_plural: str
    gender: str
    group: str
    forms: tuple[str, str, str, str]  # direct sg, direct pl, oblique sg, oblique pl
    mass: bool = False
    plural_only: bool = False


def decline(hindi: str, gender: str) -> tuple[str, str, str, str]:
    """Direct singular and plural, oblique singular and plural of a Hindi noun.

    Masculines in -ā change (लड़का, लड़के, लड़के, लड़कों), others only in the oblique
    plural; feminines in -ī and -iyā take -iyā̃ (लड़कियाँ), others -ẽ (किताबें). A long
    ī or ū becomes short before the ending (आदमियों, आलुओं).
    """
    stem = hindi[:-1]
    if gender == M:
        if hindi.endswith("ा") and hindi not in FIXED_AA:
            return hindi, stem + "े", stem + "े", stem + "ों"
        endings = {"ी": stem + "ियों", "ई": stem + "इयों", "ू": stem + "ुओं"}
        plural = hindi + ("ओं" if hindi.endswith("ा") else "ों")
        return hindi, hindi, hindi, endings.get(hindi[-1], plural)
    if hindi.endswith("िया"):
        return hindi, hindi + "ँ", hindi, stem + "ों"
    if hindi.endswith("ी"):
        return hindi, stem + "ियाँ", hindi, stem + "ियों"
    if hindi.endswith("ई"):
        return hindi, stem + "इयाँ", hindi, stem + "इयों"
    if hindi.endswith(("ा", "ाँ")):
        return hindi, hindi.rstrip("ँ") + "एँ", hindi, hindi.rstrip("ँ") + "ओं"
    return hindi, hindi + "ें", hindi, hindi + "ों"


def read_nouns(table: str) -> dict[str, Noun]:
    """Parse NOUN_TABLE: English word -> Noun (a plural-only noun by its plural)."""
    nouns = {}
    group = ""
    for entry in table.replace("\n  ", " ").replace("\n", ",").split(","):
        words = entry.split()
        if not words:
            continue
        if words[0].endswith(":"):
            group = words.pop(0)[:-1]
        singular, plural, hindi, gender = words
        name = plural if singular == "-" else singular
        nouns[name] = Noun(
            name,
            name if plural == "-" else plural,
            gender,
            group,
            decline(hindi, gender),
            mass=plural == "-",
            plural_only=singular == "-",
        )
    return nouns


NOUNS = read_nouns(NOUN_TABLE)
GENDER = {name: noun.gender for name, noun in NOUNS.items()}
NAMES = {
    "Ravi": ("रवि", M),
    "Mohan": ("मोहन", M),
    "Arjun": ("अर्जुन", M),
    "Kabir": ("कबीर", M),
    "Amit": ("अमित", M),
    "Rahul": ("राहुल", M),
    "Sita": ("सीता", F),
    "Meera": ("मीरा", F),
    "Anita": ("अनीता", F),
    "Asha": ("आशा", F),
    "Neha": ("नेहा", F),
    "Priya": ("प्रिया", F),
}
HUMAN_GROUPS = [
    "person",
    "worker",
    "visitor",
    "rogue",
    "esteemed",
    "royal",
    "kin",
    "peer",
    "elder",
]
ANIMAL_GROUPS = ["pet", "farm", "wild", "small"]
KIN_GROUPS = ("kin", "peer", "elder")
NUMBERS = {
    "two": "दो",
    "three": "तीन",
    "four": "चार",
    "five": "पाँच",
    "six": "छह",
    "seven": "सात",
    "eight": "आठ",
    "nine": "नौ",
    "ten": "दस",
}


@cache
def words_of(spec: str) -> tuple[str, ...]:
    """The nouns that a list such as "@fruit roti" names: "@" marks a group."""
    names = []
    for word in spec.split():
        if word.startswith("@"):
            group = [n for n, noun in NOUNS.items() if noun.group == word[1:]]
            assert group, word
            names += group
        else:
            assert word in NOUNS, word
            names.append(word)
    return tuple(dict.fromkeys(names))


# ----------------------------------------------------------------------- adjectives

# English, Hindi, the nouns it goes with. "old" has two rows: पुराना for things, बूढ़ा
# for the living. बड़ा and छोटा of people mean elder and younger.
ADJECTIVE_TABLE = """
big | बड़ा | @fruit @toy @vehicle potato box bag table house garden shop temple city
  village room school tree elephant dog bear plate window door basket picture stone
  clock
  cake field park bridge library
small | छोटा | @fruit @toy @vehicle @tool @small boy girl child rabbit goat box bag
  table house garden shop temple village room window door cup bottle basket key bell
  lamp picture stone ring plant flower gift dog cat
new | नया | @clothing @vehicle @toy @desk @furniture @music book house shop school bag
  umbrella clock phone blanket box key ring hospital bridge road film song clothes
  dishes newspaper necklace teacher doctor student driver
old | पुराना | @clothing @vehicle @desk @furniture @music @toy book letter newspaper
  house temple bag umbrella clock phone blanket box key picture bridge city film song
  story clothes dishes ring road
old | बूढ़ा | man woman farmer gardener fisherman tailor dog lion horse elephant camel
  king
good | अच्छा | @text @media @person @fruit friend neighbour teacher doctor driver singer
  tailor shopkeeper sweet cake tea coffee pen school hospital house city
red | लाल | @clothing @vehicle @toy apple tomato chair bag box umbrella flower bucket
  door pencil blanket
blue | नीला | @clothing @vehicle @toy chair bag box umbrella bucket door pencil pen
  flower blanket bird
green | हरा | @clothing @vehicle @toy mango apple chair bag box umbrella bucket door
  pencil bottle parrot
yellow | पीला | @clothing @toy flower bag umbrella mango banana lemon bucket pencil
  papaya blanket bird
white | सफ़ेद | @clothing @farm car house flower cat dog rabbit pigeon bag plate cup
  umbrella blanket mouse
black | काला | @clothing car bag umbrella cat dog goat cow horse bear bicycle pen phone
beautiful | सुंदर | girl woman queen princess house garden temple city village picture
  flower sari necklace ring bird peacock parrot horse lake river park doll clock
  mountain
clean | साफ़ | @clothing room house kitchen glass plate cup water clothes dishes river
  road hospital park
dirty | गंदा | @clothing room kitchen glass plate cup water clothes dishes road river
  bucket bottle blanket
heavy | भारी | box bag bucket stone table bed basket pot
cheap | सस्ता | @clothing @fruit @vegetable @desk bag umbrella phone ticket clock toy
  bicycle
expensive | महँगा | @clothing car bicycle phone ticket clock ring necklace house bag
hungry | भूखा | child boy girl man lion dog cat cow bear tiger monkey traveller parrot
thirsty | प्यासा | child horse camel dog bird elephant goat traveller soldier
clever | चतुर | boy girl child student king queen shopkeeper thief monkey parrot prince
tall | लंबा | boy girl man woman soldier student
kind | दयालु | woman man king queen doctor teacher neighbour nurse farmer
brave | बहादुर | boy girl soldier prince princess king woman
honest | ईमानदार | man woman shopkeeper farmer driver
poor | गरीब | farmer man woman fisherman tailor
rich | अमीर | man woman shopkeeper king
lazy | आलसी | boy student cat dog
tasty | स्वादिष्ट | @dish @meal mango lassi
fresh | ताज़ा | @fruit @vegetable roti milk fish juice butter flower
ripe | पका | mango banana guava papaya tomato
sour | खट्टा | orange lemon yogurt
sweet | मीठा | mango orange guava papaya tea lassi juice
hot | गरम | tea coffee milk water roti samosa dal
cold | ठंडा | water milk juice lassi coffee
long | लंबा | letter story rope road river bridge poem film
interesting | रोचक | @text film
empty | ख़ाली | box bag room bottle glass bucket basket house bus pot
sharp | तेज़ | knife
strong | मज़बूत | rope chair table bridge box
deep | गहरा | river lake
high | ऊँचा | mountain tree roof
quiet | शांत | room village library forest lake temple
younger | छोटा | brother sister
elder | बड़ा | brother sister
"""


@dataclass(frozen=True)
class Adjective:
    """An adjective with the nouns it may describe."""

    english: str
    hindi: str
    nouns: tuple[str, ...]


def read_adjectives(table: str) -> list[Adjective]:
    rows = []
    for line in table.strip().replace("\n  ", " ").split("\n"):
        english, hindi, nouns = (part.strip() for part in line.split("|"))
        rows.append(Adjective(english, hindi, tuple(words_of(nouns))))
    return rows


ADJECTIVES = read_adjectives(ADJECTIVE_TABLE)
ADJECTIVES_OF = {name: [a for a in ADJECTIVES if name in a.nouns] for name in NOUNS}
MOODS = {  # states of a person or an animal, as predicates
    "happy": "ख़ुश",
    "sad": "उदास",
    "ill": "बीमार",
    "tired": "थका हुआ",
    "angry": "नाराज़",
    "ready": "तैयार",
    "busy": "व्यस्त",
}


def inflect(adjective: str, gender: str, number: str, oblique: bool = False) -> str:
    """An adjective (or का, मेरा, अपना) in the gender, number and case of its noun.

    Those in -ā have three forms (बड़ा, बड़े, बड़ी), the others one. Each word of a
    phrase is inflected (थका हुआ, थकी हुई).
    """
    words = []
    for word in adjective.split():
        plural = number == "pl" or oblique
        if word in ("नया", "हुआ"):
            stem = word[:-2] if word == "नया" else "हु"
            word = stem + "ई" if gender == F else stem + "ए" if plural else word
        elif word.endswith("ा"):
            word = word[:-1] + ("ी" if gender == F else "े" if plural else "ा")
        words.append(word)
    return " ".join(words)


# ---------------------------------------------------------------------------- verbs


@dataclass(frozen=True)
class Verb:
    """A verb frame: how it is said in both languages and what goes with it.

    `case` is the postposition of the object: "" means bare, or को on a definite living
    one. `light` is a noun that forms the verb with `root` (मदद कर); the perfective then
    agrees with it unless `case` is "" (बंद कर, साफ़ कर), where it is an adjective.
    `ergative` says whether the subject takes ने in the perfective.
    """

    english: str  # base, third person, past, participle, -ing
    root: str
    subjects: tuple[str, ...]
    objects: tuple[str, ...] = ()
    case: str = ""
    light: str = ""
    ergative: bool = True
    places: str = ""
    flags: str = ""

    @property
    def forms(self) -> list[str]:
        return [form.replace("_", " ") for form in self.english.split("/")]

    @property
    def name(self) -> str:
        return self.forms[0]

    def has(self, flag: str) -> bool:
        return flag in self.flags.split()


LIGHT_GENDER = {
    "मदद": F,
    "पीछा": M,
    "इंतज़ार": M,
    "तारीफ़": F,
    "देखभाल": F,
    "बात": F,
    "काम": M,
    "आराम": M,
    "पढ़ाई": F,
    "कसरत": F,
    "प्यार": M,
    "पानी": M,
}
LIGHT_ADJECTIVES = {"बंद", "साफ़", "ठीक"}

# Place phrases by what people do there.
HOME = "in:house in:room in:courtyard on:roof"
KITCHEN = "in:kitchen in:courtyard in:house"
OUTDOORS = (
    "in:garden in:park in:field near:river near:lake near:house near:temple "
    "near:school "
    "near:forest under:tree behind:house behind:school behind:temple behind:shop "
    "in_front_of:house in_front_of:temple in_front_of:school on:road near:bridge"
)
TOWN = (
    "in:market in:village in:city at:station near:station near:market near:hospital "
    "near:bank near:office near:park in_front_of:shop in_front_of:temple "
    "in_front_of:hospital in_front_of:bank in_front_of:library near:shop near:library"
)
QUIET = "in:library in:room in:garden in:park in:school under:tree in:house near:lake"
STUDY = "in:library in:school in:room in:house"

PREPOSITIONS = {
    "in": "में",
    "on": "पर",
    "at": "पर",
    "under": "के नीचे",
    "near": "के पास",
    "behind": "के पीछे",
    "in front of": "के सामने",
}
GO_PLACES = (
    "market school station temple library hospital office village city bank park"
)

FOLK = "@person @worker @visitor @kin @peer @elder @esteemed"
ADULT = "man woman @worker @peer @elder @esteemed brother sister"
YOUNG = "boy girl child student son daughter brother sister friend"
ANIMALS = "@pet @farm @wild @small"
FOODS = "@fruit @vegetable @dish"


SETS = {  # names that the tables may use in place of a list
    "FOLK": FOLK,
    "ADULT": ADULT,
    "YOUNG": YOUNG,
    "ANIMALS": ANIMALS,
    "FOODS": FOODS,
    "HOME": HOME,
    "KITCHEN": KITCHEN,
    "OUTDOORS": OUTDOORS,
    "TOWN": TOWN,
    "QUIET": QUIET,
    "STUDY": STUDY,
}


def expand(spec: str) -> str:
    """A list with the names of SETS written out."""
    return " ".join(SETS.get(word, word) for word in spec.split())


# A row: English forms (base, third person, past, participle, -ing), the Hindi root with
# its light word, the postposition of the object; then who does it, what to, where.
# Flags:
#   plain     no ने in the perfective
#   stative   no progressive and no modals; the past is habitual (करता था)
#   posture   the progressive is a state (बैठा है); onlyprog: it has no other tense
#   vector    जा goes with it (भूल गया)
#   bare      no को on a definite animal
#   goal      the place follows the object; needplace: it is never left out
#   routine   a definite object may go with a habit; definite: the object always is
#   plural    the object is plural or mass
#   single    the object is not counted (nobody plays six flutes)
#   noown     the object is nobody's yet
#   sudden    nobody plans it: no future
#   noprog, nohabit, nowant, notime, quiet (no time, no place), once (past only)
#   command   it has imperatives
VERB_TABLE = """
eat/eats/ate/eaten/eating | खा
  who: FOLK
  what: apple mango banana orange guava papaya tomato cucumber carrot @dish @meal
  where: KITCHEN under:tree in:garden in:park in:school at:station
  flags: command
drink/drinks/drank/drunk/drinking | पी
  who: FOLK
  what: @drink
  where: KITCHEN in:garden in:shop at:station
  flags: command
read/reads/read/read/reading | पढ़
  who: FOLK @royal
  what: @text
  where: QUIET at:station on:roof
  flags: command
write/writes/wrote/written/writing | लिख
  who: @person @peer @esteemed @royal singer soldier brother sister daughter son
  what: letter story poem book song
  where: STUDY
  flags: command
see/sees/saw/seen/seeing | देख
  who: FOLK thief
  what: FOLK thief @royal ANIMALS
  where: OUTDOORS TOWN in:forest
  flags: nowant noprog nohabit
watch/watches/watched/watched/watching | देख
  who: FOLK
  what: film bird monkey peacock squirrel duck
look at/looks at/looked at/looked at/looking at | देख
  who: FOLK
  what: picture map clock flower necklace ring sari bird peacock
  flags: nohabit command
listen to/listens to/listened to/listened to/listening to | सुन
  who: FOLK @royal
  what: song story poem
  where: HOME in:garden in:park
  flags: command
look for/looks for/looked for/looked for/looking for | ढूँढ
  who: FOLK
  what: @desk @object book letter shoes cap spoon knife ball toy doll dog cat goat cow
    cup bottle
  where: HOME in:market in:garden in:school
  flags: nohabit command
buy/buys/bought/bought/buying | ख़रीद
  who: FOLK
  what: FOODS milk tea juice lassi @clothing @vessel @toy @desk @staple book newspaper
    umbrella
    clock ring phone gift blanket bicycle candle cow goat horse flower flute bag
  where: in:market in:shop
  flags: noown bare command
sell/sells/sold/sold/selling | बेच
  who: man woman farmer shopkeeper fisherman neighbour tailor father mother uncle
  what: FOODS @clothing @vessel @toy milk fish butter flower book newspaper umbrella
    cow goat horse candle blanket basket
  where: in:market in:village in:shop in:city at:station near:temple near:station
    near:school on:road
  flags: bare plural
bring/brings/brought/brought/bringing | ला
  who: FOLK
  what: FOODS @drink @desk @staple book letter newspaper chair bag umbrella key flower
    gift ball rope lamp bottle bucket blanket ticket
  flags: command plain
open/opens/opened/opened/opening | खोल
  who: FOLK
  what: @opening box bag umbrella bottle letter gift book shop
  flags: command routine
close/closes/closed/closed/closing | बंद कर
  who: FOLK
  what: @opening box bag umbrella bottle book shop
  flags: definite command routine
break/breaks/broke/broken/breaking | तोड़
  who: YOUNG man thief
  what: cup plate glass bottle chair window door clock toy pot pencil lamp
  flags: once
wash/washes/washed/washed/washing | धो
  who: FOLK
  what: @clothing @wash @fruit @vegetable cup plate glass bottle car bicycle blanket
    spoon
  where: in:kitchen in:courtyard near:river
  flags: command routine
pick up/picks up/picked up/picked up/picking up | उठा
  who: FOLK
  what: bag box key stone book ball pen pencil bucket basket toy phone cup letter
    umbrella chair
  flags: command nohabit
make/makes/made/made/making | बना
  who: FOLK
  what: tea coffee juice lassi roti samosa sweet cake
  where: KITCHEN
  flags: command
build/builds/built/built/building | बना
  who: carpenter man farmer
  what: table chair bed boat box door toy
  where: in:courtyard in:village in:shop
  flags: noown
draw/draws/drew/drawn/drawing | बना
  who: @person sister brother daughter son friend teacher
  what: picture map
  where: STUDY in:garden
  flags: command
cook/cooks/cooked/cooked/cooking | पका
  who: ADULT
  what: potato fish dal carrot
  where: KITCHEN
  flags: plural command
cut/cuts/cut/cut/cutting | काट
  who: ADULT boy girl
  what: @fruit @vegetable cake rope tree
  where: in:kitchen in:garden
  flags: command
throw/throws/threw/thrown/throwing | फेंक
  who: boy girl child man son daughter friend
  what: ball stone shoes
  where: in:river in:garden
  flags: goal nohabit
catch/catches/caught/caught/catching | पकड़
  who: boy girl man soldier fisherman farmer brother son
  what: ball fish thief parrot rabbit hen goat horse pigeon
  where: in:field in:garden in:village in:forest near:river
hide/hides/hid/hidden/hiding | छिपा
  who: @person thief @kin @peer monkey
  what: key letter gift ring necklace sweet ball doll money book toy
  where: in:room in:box in:bag in:garden under:bed under:tree behind:door in:basket
    under:table
  flags: goal nohabit
put/puts/put/put/putting | रख
  who: FOLK
  what: @desk @vessel book newspaper bag key flower gift lamp phone umbrella
    letter box
  where: on:table on:chair on:bed under:table in:box in:bag in:basket under:chair
    on:roof in:kitchen in:room near:door
  flags: goal command nohabit needplace
send/sends/sent/sent/sending | भेज
  who: FOLK @royal
  what: letter book picture gift flower sweet money poem
pick/picks/picked/picked/picking | तोड़
  who: @person gardener farmer grandmother mother sister daughter @peer aunt
  what: flower mango guava apple orange lemon coconut papaya tomato
  where: in:garden in:field in:forest
  flags: noown command
clean/cleans/cleaned/cleaned/cleaning | साफ़ कर
  who: FOLK
  what: room house kitchen courtyard roof shop table car window bicycle garden temple
    shoes
  flags: command routine definite
repair/repairs/repaired/repaired/repairing | ठीक कर
  who: man boy @worker brother father grandfather uncle friend neighbour
  what: bicycle car chair clock boat bed door phone toy umbrella bridge road bus lamp
  where: in:shop in:courtyard near:house behind:house
  flags: single
forget/forgets/forgot/forgotten/forgetting | भूल
  who: FOLK
  what: key book bag umbrella song story poem phone ticket notebook
  flags: vector plain
sing/sings/sang/sung/singing | गा
  who: FOLK @royal
  what: song
  where: HOME in:garden in:temple in:park in:school under:tree near:river
  flags: command
learn/learns/learned/learned/learning | सीख
  who: YOUNG man woman
  what: song poem
  where: in:school in:house
wear/wears/wore/worn/wearing | पहन
  who: FOLK
  what: @clothing ring necklace
  flags: noprog
sew/sews/sewed/sewn/sewing | सिल
  who: tailor mother grandmother aunt sister woman
  what: shirt kurta clothes bag
  where: in:shop in:house in:room in:courtyard
play/plays/played/played/playing | बजा
  who: singer man boy girl child brother sister friend @royal
  what: flute drum
  where: in:garden in:temple in:park under:tree near:river in:room on:roof in:village
  flags: single
ring/rings/rang/rung/ringing | बजा
  who: man boy girl child woman grandmother grandfather guest
  what: bell
  where: in:temple in:school
  flags: noown command single
fly/flies/flew/flown/flying | उड़ा
  who: YOUNG
  what: kite
  where: on:roof in:field in:park in:garden near:river behind:house
  flags: single
ride/rides/rode/ridden/riding | चला
  who: YOUNG man woman teacher uncle
  what: bicycle
  where: on:road in:park in:village near:lake
  flags: single
drive/drives/drove/driven/driving | चला
  who: driver man woman father uncle brother sister mother doctor neighbour
  what: car bus
  where: on:road in:city in:village
  flags: routine single
water/waters/watered/watered/watering | पानी दे | को
  who: ADULT boy girl
  what: plant tree flower
  where: in:garden in:courtyard on:roof in:field behind:house
  flags: routine command
fill/fills/filled/filled/filling | भर
  who: FOLK
  what: bucket bottle glass pot
  where: near:river in:kitchen in:courtyard
  flags: command
light/lights/lit/lit/lighting | जला
  who: ADULT girl boy
  what: lamp candle
  where: in:temple in:room in:house in:courtyard on:roof
  flags: noown command routine
choose/chooses/chose/chosen/choosing | चुन
  who: FOLK
  what: sari shirt gift ring book sweet flower mango toy picture necklace
  where: in:market in:shop
  flags: noown command nohabit
taste/tastes/tasted/tasted/tasting | चख
  who: FOLK
  what: @dish @meal @fruit tea coffee juice lassi milk
  flags: noown command nohabit
peel/peels/peeled/peeled/peeling | छील
  who: ADULT girl boy daughter
  what: potato banana orange egg carrot apple
  where: in:kitchen in:courtyard
  flags: command
pull/pulls/pulled/pulled/pulling | खींच
  who: man boy girl woman soldier fisherman farmer horse camel elephant
  what: rope boat table box
  flags: nohabit single
count/counts/counted/counted/counting | गिन
  who: FOLK
  what: goat cow hen book chair mango egg ticket bag tree flower money coconut
  where: in:shop
  flags: command bare plural
plant/plants/planted/planted/planting | लगा
  who: @person gardener farmer grandfather grandmother father mother uncle @peer
    teacher
  what: tree flower
  where: in:garden in:field in:park behind:house in_front_of:house near:school
    near:temple near:river in:courtyard
  flags: noown
grow/grows/grew/grown/growing | उगा
  who: farmer gardener grandfather uncle neighbour man woman
  what: @vegetable guava mango banana papaya lemon flower orange
  where: in:field in:garden in:village behind:house near:river
  flags: plural noown noprog notime
ask for/asks for/asked for/asked for/asking for | माँग
  who: FOLK
  what: water tea milk money juice salt book pen sweet ticket key
  flags: noown nohabit
love/loves/loved/loved/loving | प्यार कर | से
  who: FOLK
  what: @kin @elder dog cat horse parrot rabbit child
  flags: stative quiet
be afraid of/is afraid of/was afraid of/been afraid of/being afraid of | डर | से
  who: FOLK @pet goat hen mouse monkey
  what: dog lion bear tiger elephant mouse monkey thief king
  flags: stative quiet copular plain
help/helps/helped/helped/helping | मदद कर | की
  who: FOLK
  what: FOLK
  where: in:kitchen in:field in:shop in:market in:school
  flags: routine command
follow/follows/followed/followed/following | पीछा कर | का
  who: @person soldier thief @pet
  what: thief rabbit cat goat dog mouse bird
  flags: nowant nohabit
wait for/waits for/waited for/waited for/waiting for | इंतज़ार कर | का
  who: FOLK
  what: bus @kin @peer @elder @esteemed guest driver student
  where: at:station in_front_of:school near:market in_front_of:office in:park
    in_front_of:bank near:bridge in_front_of:hospital
  flags: routine command
praise/praises/praised/praised/praising | तारीफ़ कर | की
  who: FOLK @royal
  what: @person @kin @peer singer tailor soldier gardener
  flags: routine
take care of/takes care of/took care of/taken care of/taking care of | देखभाल कर | की
  who: ADULT
  what: child grandmother grandfather mother father cow horse goat garden plant son
    daughter dog
  flags: routine definite
talk to/talks to/talked to/talked to/talking to | बात कर | से
  who: FOLK @royal
  what: FOLK
  where: in:market in:garden in:park at:station in:school in:room in:shop under:tree
    in:courtyard
  flags: routine command
meet/meets/met/met/meeting | मिल | से
  who: FOLK @royal
  what: FOLK
  where: in:market in:park in:temple at:station in:school in:city in:village near:bank
    near:lake in:hospital in:library in:garden
  flags: routine noprog plain
call/calls/called/called/calling | बुला | को
  who: FOLK @royal
  what: FOLK
  flags: nohabit command
teach/teaches/taught/taught/teaching | पढ़ा | को
  who: teacher man woman brother sister mother father aunt friend
  what: student child boy girl son daughter
  where: in:school in:house in:village in:room in:library
  flags: routine
scold/scolds/scolded/scolded/scolding | डाँट | को
  who: @elder @esteemed man woman king neighbour shopkeeper
  what: boy girl child student son daughter thief driver brother sister
  flags: nohabit
wake/wakes/woke/woken/waking | जगा | को
  who: @elder brother sister woman man
  what: child son daughter brother sister boy girl guest
  flags: routine command
sleep/sleeps/slept/slept/sleeping | सो
  who: FOLK dog cat rabbit
  where: HOME under:tree
  flags: plain
sleep/sleeps/slept/slept/sleeping | सो
  who: cow horse lion tiger bear camel elephant goat
  where: under:tree in:forest in:field near:river near:lake
  flags: plain
run/runs/ran/run/running | दौड़
  who: @person @worker @visitor @kin @peer @esteemed dog cat horse goat rabbit
  where: in:park in:field on:road near:river near:lake in:garden behind:house
    in:forest
  flags: plain
sit/sits/sat/sat/sitting | बैठ
  who: FOLK @royal dog cat monkey parrot rabbit
  where: OUTDOORS in:room on:chair on:bed in:courtyard on:roof at:station in:library
    in:shop in:temple in:boat
  flags: posture command plain
stand/stands/stood/stood/standing | खड़ा
  who: FOLK cow horse elephant camel goat
  where: OUTDOORS TOWN on:bridge
  flags: posture onlyprog plain
lie/lies/lay/lain/lying | लेटा
  who: @person @worker @visitor @kin @peer @elder dog cat
  where: on:bed in:room under:tree in:courtyard on:roof in:garden
  flags: posture onlyprog plain
walk/walks/walked/walked/walking | टहल
  who: FOLK @royal
  where: in:garden in:park near:river near:lake on:road on:roof in:forest near:temple
  flags: plain
laugh/laughs/laughed/laughed/laughing | हँस
  who: FOLK @royal
  where: in:room in:garden in:park
  flags: sudden plain
smile/smiles/smiled/smiled/smiling | मुस्कुरा
  who: FOLK @royal
  flags: sudden plain
cry/cries/cried/cried/crying | रो
  who: boy girl child son daughter sister princess woman student
  where: HOME in:garden in:park under:tree at:station in:school
  flags: nohabit sudden nowant plain
play/plays/played/played/playing | खेल
  who: YOUNG dog cat
  where: OUTDOORS in:courtyard in:room on:roof in:village
  flags: plain
play/plays/played/played/playing | खेल
  who: squirrel monkey rabbit goat
  where: in:garden in:park under:tree near:river in:field
  flags: plain
dance/dances/danced/danced/dancing | नाच
  who: boy girl child woman sister daughter friend princess peacock singer
  where: in:garden in:courtyard in:park on:roof in:room near:temple in:village
  flags: plain
work/works/worked/worked/working | काम कर
  who: ADULT
  where: in:field in:office in:shop in:hospital in:bank in:garden in:city in:school
    in:kitchen in:village in:market in:library
  flags: command
rest/rests/rested/rested/resting | आराम कर
  who: FOLK dog cat
  where: HOME under:tree in:garden near:river near:lake in:park
  flags: command
rest/rests/rested/rested/resting | आराम कर
  who: horse cow elephant lion tiger bear camel
  where: under:tree near:river near:lake in:forest
study/studies/studied/studied/studying | पढ़ाई कर
  who: boy girl student son daughter brother sister friend
  where: STUDY in:city in:garden under:tree
  flags: command
exercise/exercises/exercised/exercised/exercising | कसरत कर
  who: FOLK
  where: in:park in:garden in:room on:roof near:lake near:river in:courtyard
live/lives/lived/lived/living | रह
  who: FOLK
  where: in:house in:village in:city near:river near:forest near:market near:school
    near:station near:temple behind:school near:park near:bank near:hospital
    near:library behind:temple near:lake near:bridge
  flags: needplace notime live plain
swim/swims/swam/swum/swimming | तैर
  who: YOUNG man woman fisherman soldier duck frog
  where: in:river in:lake
  flags: plain
bathe/bathes/bathed/bathed/bathing | नहा
  who: FOLK elephant bird duck
  where: in:river in:lake
  flags: command plain
jump/jumps/jumped/jumped/jumping | कूद
  who: monkey frog rabbit cat squirrel goat
  where: in:garden in:field on:roof near:river near:lake
  flags: plain
fly/flies/flew/flown/flying | उड़
  who: bird parrot pigeon
  flags: plain
get up/gets up/got up/got up/getting up | उठ
  who: FOLK
  flags: noprog wakeup plain
fall/falls/fell/fallen/falling | गिर
  who: boy girl child son daughter monkey bird horse
  where: on:road in:river in:courtyard in:field
  flags: once plain
come/comes/came/come/coming | आ
  who: FOLK
  flags: command plain
stop/stops/stopped/stopped/stopping | रुक
  who: FOLK bus car horse
  where: near:bridge in_front_of:shop in_front_of:temple near:market near:river
    in_front_of:school
  flags: noprog nohabit command plain
"""


def read_verbs(table: str) -> list[Verb]:
    """Parse VERB_TABLE."""
    verbs = []
    for entry in table.strip().replace("\n    ", " ").replace("\n  ", "\t").split("\n"):
        head, *lines = entry.split("\t")
        english, hindi, *case = head.split(" | ")
        light, _, root = hindi.rpartition(" ")
        part = dict(line.split(": ") for line in lines)
        flags = part.get("flags", "")
        verbs.append(
            Verb(
                english,
                root,
                tuple(words_of(expand(part["who"]))),
                tuple(words_of(expand(part.get("what", "")))),
                "".join(case),
                light,
                "plain" not in flags.split(),
                expand(part.get("where", "")),
                flags,
            )
        )
    return verbs


VERBS = read_verbs(VERB_TABLE)
GO = Verb("go/goes/went/gone/going", "जा", tuple(words_of(FOLK)), ergative=False)
RETURN = Verb(
    "come back/comes back/came back/come back/coming back",
    "लौट",
    tuple(words_of(FOLK)),
    ergative=False,
)
GIVE = Verb("give/gives/gave/given/giving", "दे", tuple(words_of(FOLK)), flags="command")
SHOW = Verb("show/shows/showed/shown/showing", "दिखा", GIVE.subjects, flags="command")
TELL = Verb("tell/tells/told/told/telling", "सुना", GIVE.subjects, flags="command")
SEND = next(v for v in VERBS if v.name == "send")
GIFTS = words_of(
    "@fruit @dish @desk @toy book letter flower gift key bag umbrella cup water tea "
    "milk "
    "money ring blanket shirt sari ticket newspaper cap shoes necklace"
)
SHOWN = words_of(
    "@toy @desk book letter picture ring sari shirt house shop garden film"
)
SENT = words_of("letter book picture gift money poem ticket newspaper map")
ANIMAL_MEALS = {  # who eats what
    "monkey": "banana mango guava papaya apple coconut",
    "elephant": "banana papaya coconut",
    "parrot": "mango guava tomato",
    "rabbit": "carrot cucumber potato",
    "goat": "carrot potato cucumber roti",
    "mouse": "biscuit roti potato cake",
    "squirrel": "guava apple mango",
    "dog": "roti biscuit egg",
    "cat": "fish",
    "bear": "fish mango apple",
    "duck": "fish",
    "horse": "carrot apple",
    "cow": "roti banana carrot",
    "bird": "guava papaya",
}
ANIMAL_SCENES = [  # subjects, verb, objects: what animals do to others
    ("@pet @farm @wild @small", "drink", "water"),
    ("cat", "drink", "milk"),
    ("cat", "catch", "mouse bird fish pigeon"),
    ("lion tiger", "catch", "goat horse rabbit cow"),
    ("lion tiger bear dog cat monkey elephant horse", "see", "@small @farm rabbit"),
    ("dog cat monkey", "break", "cup plate pot"),
]

# ------------------------------------------------------------------ inflecting verbs

PERFECTIVE = {
    "कर": ("किया", "किए", "की", "कीं"),
    "दे": ("दिया", "दिए", "दी", "दीं"),
    "पी": ("पिया", "पिए", "पी", "पीं"),
    "जा": ("गया", "गए", "गई", "गईं"),
}


@dataclass(frozen=True)
class Agreement:
    """What a verb agrees with: person (1, 2, 3), gender (m, f), number (sg, pl)."""

    person: int = 3
    gender: str = M
    number: str = "sg"

    @property
    def index(self) -> int:
        return (2 if self.gender == F else 0) + (self.number == "pl")


DEFAULT = Agreement()  # masculine singular: when there is nothing to agree with


def perfective(root: str, agree: Agreement) -> str:
    """The perfective participle: पढ़ा पढ़े पढ़ी पढ़ीं, after a vowel आया आए आई आईं."""
    if root in PERFECTIVE:
        return PERFECTIVE[root][agree.index]
    vowel = root[-1] in MATRAS + VOWEL_LETTERS
    endings = ("या", "ए", "ई", "ईं") if vowel else ("ा", "े", "ी", "ीं")
    return root + endings[agree.index]


def unnasal(participle: str) -> str:
    """The feminine plural before an auxiliary: only the last word is nasal."""
    return participle.removesuffix("ं")


def imperfective(root: str, agree: Agreement) -> str:
    """The habitual participle: पढ़ता पढ़ते पढ़ती."""
    return root + "त" + ("ा", "े", "ी", "ी")[agree.index]


def infinitive(root: str, agree: Agreement = DEFAULT) -> str:
    """The infinitive, which agrees like an adjective: पढ़ना पढ़ने पढ़नी."""
    return root + "न" + ("ा", "े", "ी", "ी")[agree.index]


def future(root: str, agree: Agreement) -> str:
    """The future: पढ़ूँगा पढ़ेगा पढ़ेंगे पढ़ेगी पढ़ेंगी, after a vowel जाऊँगा जाएगा."""
    ending = "गी" if agree.gender == F else "गे" if agree.number == "pl" else "गा"
    return subjunctive(root, agree) + ending


def subjunctive(root: str, agree: Agreement) -> str:
    """The subjunctive: पढ़ूँ पढ़े पढ़ें, जाऊँ जाए जाएँ; दे is short (दूँ दे दें)."""
    first = agree.person == 1 and agree.number == "sg"
    plural = agree.number == "pl"
    if root == "दे":
        return "दूँ" if first else "दें" if plural else "दे"
    if root == "पी":
        root = "पि"
    if root[-1] in MATRAS + VOWEL_LETTERS:
        return root + ("ऊँ" if first else "एँ" if plural else "ए")
    return root + ("ूँ" if first else "ें" if plural else "े")


def polite_imperative(root: str) -> str:
    """The request to आप: पढ़िए, खाइए; कीजिए, दीजिए, पीजिए."""
    special = {"कर": "कीजिए", "दे": "दीजिए", "पी": "पीजिए"}
    vowel = root[-1] in MATRAS + VOWEL_LETTERS
    return special.get(root, root + ("इए" if vowel else "िए"))


def familiar_imperative(root: str) -> str:
    """The order to तुम: पढ़ो, खाओ, दो, पियो."""
    special = {"दे": "दो", "पी": "पियो"}
    vowel = root[-1] in MATRAS + VOWEL_LETTERS
    return special.get(root, root + ("ओ" if vowel else "ो"))


def is_now(agree: Agreement) -> str:
    """The present of होना: हूँ, है, हैं."""
    if agree.person == 1 and agree.number == "sg":
        return "हूँ"
    return "हैं" if agree.number == "pl" else "है"


def was(agree: Agreement) -> str:
    """The past of होना: था, थे, थी, थीं."""
    return ("था", "थे", "थी", "थीं")[agree.index]


# --------------------------------------------------------------------- noun phrases


@dataclass(frozen=True)
class Phrase:
    """A noun phrase in both languages, with all that agreement and case ask for."""

    english: str
    direct: str
    oblique: str
    agree: Agreement
    plural: bool = False  # in English; an honoured person is plural in Hindi only
    definite: bool = True
    living: bool = False
    human: bool = False
    noun: str = ""  # the noun or name, "" for a pronoun
    pronoun: str = ""  # its key in PRONOUNS, "" for a noun
    possessive: bool = False  # whether it holds his, her, their or its
    combinations: tuple[Combination, ...] = ()

    @property
    def as_object(self) -> str:
        return PRONOUNS[self.pronoun].accusative if self.pronoun else self.english

    @property
    def refers(self) -> str:
        """The pronoun that takes this phrase up again: he, she, it, they, I, …"""
        if self.pronoun:
            return self.pronoun
        if self.plural:
            return "they"
        if not self.human:
            return "it"
        return "she" if self.agree.gender == F else "he"


@dataclass(frozen=True)
class Pronoun:
    """A pronoun: its English forms and the fused Hindi ones."""

    accusative: str
    possessive: str
    agree: Agreement
    direct: str
    ergative: str
    dative: str
    oblique: str
    genitive: str


def pronoun_row(english: str, person: int, gender: str, number: str, hindi: str):
    accusative, possessive = english.split()
    return Pronoun(
        accusative, possessive, Agreement(person, gender, number), *hindi.split()
    )


PRONOUNS = {
    "I": pronoun_row("me my", 1, M, "sg", "मैं मैंने मुझे मुझ मेरा"),
    "you": pronoun_row("you your", 2, M, "pl", "आप आपने आपको आप आपका"),
    "he": pronoun_row("him his", 3, M, "sg", "वह उसने उसे उस उसका"),
    "she": pronoun_row("her her", 3, F, "sg", "वह उसने उसे उस उसका"),
    "it": pronoun_row("it its", 3, M, "sg", "वह उसने उसे उस उसका"),
    "we": pronoun_row("us our", 1, M, "pl", "हम हमने हमें हम हमारा"),
    "they": pronoun_row("them their", 3, M, "pl", "वे उन्होंने उन्हें उन उनका"),
}
DEMONSTRATIVES = {  # direct and oblique
    "this": ("यह", "इस"),
    "that": ("वह", "उस"),
    "these": ("ये", "इन"),
    "those": ("वे", "उन"),
}
AN = {"honest"}  # words with a consonant letter and a vowel sound


def pronoun(key: str) -> Phrase:
    row = PRONOUNS[key]
    return Phrase(
        key,
        row.direct,
        row.oblique,
        row.agree,
        plural=key in ("you", "we", "they"),
        living=True,
        human=key != "it",
        pronoun=key,
    )


def name_phrase(name: str) -> Phrase:
    hindi, gender = NAMES[name]
    return Phrase(
        name, hindi, hindi, Agreement(3, gender), living=True, human=True, noun=name
    )


def with_postposition(phrase: Phrase, postposition: str) -> str:
    """The phrase before a postposition: लड़के ने, उसने, मुझे, मेरे पास, उसकी मदद.

    Nouns take the oblique form. Pronouns fuse with ने, को, से, में, पर, and take their
    possessive before postpositions that begin with का, के or की.
    """
    if not phrase.pronoun:
        return f"{phrase.oblique} {postposition}"
    row = PRONOUNS[phrase.pronoun]
    if postposition in ("ने", "को"):
        return row.ergative if postposition == "ने" else row.dative
    head, _, rest = postposition.partition(" ")
    if head in ("का", "के", "की"):
        owner = row.genitive[:-1] + head[1:]
        return f"{owner} {rest}".strip()
    return row.oblique + postposition


def genitive(owner: Phrase, agree: Agreement, oblique: bool = False) -> str:
    """The owner's possessive, agreeing with what is owned: रवि की, मेरे, उनका."""
    ending = inflect("का", agree.gender, agree.number, oblique)
    return with_postposition(owner, ending)


def article(word: str) -> str:
    return "an" if word in AN or word[0] in "aeiou" else "a"


def noun_phrase(
    name: str,
    determiner: str = "",
    *,
    plural: bool = False,
    adjective: Adjective | None = None,
    owner: Phrase | None = None,
    own: bool = False,
    one: str = "एक",
    very: bool = False,
) -> Phrase:
    """Build a noun phrase.

    `determiner` is an English word ("the", "a", "this", "two", "some", "any", "no"),
    "own" for the possessive of `owner`, or "". `own` makes that possessive अपना. `one`
    is what "a" becomes: एक, nothing in a question, कोई under negation (H11).
    """
    noun = NOUNS[name]
    assert not (noun.plural_only and determiner in ("a", "this", "that")), name
    plural = plural or noun.plural_only or determiner in NUMBERS
    elder = adjective is not None and adjective.english == "elder"
    honoured = not plural and (elder or noun.group == "elder")
    if noun.group == "esteemed" and determiner in ("the", "own", "this", "that"):
        honoured = honoured or not plural
    any_one = determiner == "any" and not noun.mass
    counted = plural and not any_one and not noun.mass
    counted = counted or name == "money"
    number = "pl" if counted or honoured else "sg"
    agree = Agreement(3, noun.gender, number)
    sg, pl, oblique_sg, oblique_pl = noun.forms
    direct_words, oblique_words, english_words = [], [], []

    def add(english: str, direct: str, oblique: str | None = None) -> None:
        english_words.append(english)
        direct_words.append(direct)
        oblique_words.append(direct if oblique is None else oblique)

    english_noun = noun.english_plural if plural else noun.english
    if determiner == "own":
        english = (
            PRONOUNS[owner.pronoun].possessive
            if owner.pronoun
            else owner.english + "'s"
        )
        if own:
            english = PRONOUNS[owner.refers].possessive
            add(
                english,
                inflect("अपना", noun.gender, number),
                inflect("अपना", noun.gender, number, True),
            )
        else:
            add(english, genitive(owner, agree), genitive(owner, agree, True))
    elif determiner in DEMONSTRATIVES:
        shown = determiner
        if honoured:
            shown = {"this": "these", "that": "those"}[determiner]
            add(determiner, DEMONSTRATIVES[shown][0], DEMONSTRATIVES[shown][1])
        else:
            add(determiner, *DEMONSTRATIVES[determiner])
    elif determiner == "a":
        first = adjective.english if adjective else english_noun
        if very:
            first = "very"
        add(article(first), one)
    elif determiner in NUMBERS:
        add(determiner, NUMBERS[determiner])
    elif determiner == "some":
        some = "थोड़ा" if noun.mass and name != "money" else "कुछ"
        add("some", inflect(some, noun.gender, number))
    elif determiner == "any":
        add("any", "" if noun.mass else "कोई")
    elif determiner:
        add(determiner, "")
    combinations = []
    if adjective:
        add(
            ("very " if very else "") + adjective.english,
            ("बहुत " if very else "") + inflect(adjective.hindi, noun.gender, number),
            ("बहुत " if very else "")
            + inflect(adjective.hindi, noun.gender, number, True),
        )
        combinations.append(("adjective-noun", adjective.english, name))
    direct = pl if counted else sg
    oblique = oblique_pl if counted else oblique_sg
    add(english_noun, direct, oblique)
    indefinite = determiner in ("", "a", "some", "any", "no") or determiner in NUMBERS
    return Phrase(
        " ".join(english_words),
        " ".join(filter(None, direct_words)),
        " ".join(filter(None, oblique_words)),
        agree,
        plural=plural,
        definite=not indefinite,
        living=noun.group in HUMAN_GROUPS + ANIMAL_GROUPS,
        human=noun.group in HUMAN_GROUPS,
        noun=name,
        possessive=determiner == "own",
        combinations=tuple(combinations),
    )


# --------------------------------------------------------------------------- clauses


@dataclass(frozen=True)
class Adjunct:
    """A time, place or companion: what it is in English and in Hindi."""

    english: str
    hindi: str
    combinations: tuple[Combination, ...] = ()


NOTHING = Adjunct("", "")
TIMES = {
    "present": "every day=रोज़; in the morning=सुबह; in the evening=शाम को; "
    "on Sundays=रविवार को",
    "progressive": "now=अभी; today=आज",
    "past": "yesterday=कल; last week=पिछले हफ़्ते; this morning=आज सुबह; today=आज; "
    "last night=कल रात; on Monday=सोमवार को; two days ago=दो दिन पहले",
    "past progressive": "yesterday=कल; in the evening=शाम को; this morning=आज सुबह",
    "future": "tomorrow=कल; next week=अगले हफ़्ते; today=आज; in the evening=शाम को; "
    "tonight=आज रात; on Friday=शुक्रवार को",
}
TIMES = {
    tense: [Adjunct(*pair.split("=")) for pair in row.split("; ")]
    for tense, row in TIMES.items()
}
FREQUENCIES = {
    "often": "अक्सर",
    "always": "हमेशा",
    "sometimes": "कभी-कभी",
    "never": "कभी",
}
ERGATIVE_TENSES = ("past", "perfect", "past perfect")
DATIVE_TENSES = ("should", "must")
CONTRACTIONS = {
    "do not": "don't",
    "does not": "doesn't",
    "did not": "didn't",
    "is not": "isn't",
    "are not": "aren't",
    "was not": "wasn't",
    "were not": "weren't",
    "will not": "won't",
    "has not": "hasn't",
    "have not": "haven't",
    "had not": "hadn't",
    "cannot": "can't",
    "should not": "shouldn't",
}


@dataclass(frozen=True)
class Clause:
    """What a clause says, before either language spells it."""

    subject: Phrase
    verb: Verb
    tense: str
    object: Phrase | None = None
    recipient: Phrase | None = None
    place: Adjunct = NOTHING
    time: Adjunct = NOTHING
    companion: Adjunct = NOTHING
    frequency: str = ""
    negative: bool = False
    contracted: bool = False
    gone: bool = field(default=False)  # the place is a goal and stands by the verb

    @property
    def combinations(self) -> tuple[Combination, ...]:
        """The combinations this clause is made of, in a fixed order."""
        found = []
        name = self.verb.name
        if self.subject.noun:
            found.append(("subject-verb", self.subject.noun, name))
        if self.object is not None and self.object.noun:
            found.append(("verb-object", name, self.object.noun))
        for part in (self.subject, self.object, self.recipient):
            if part is not None:
                found += part.combinations
        for adjunct in (self.place, self.time, self.companion):
            found += adjunct.combinations
        return tuple(dict.fromkeys(found))


def be_form(subject: Phrase, past: bool = False) -> str:
    if past:
        return "were" if subject.plural else "was"
    return "am" if subject.pronoun == "I" else "are" if subject.plural else "is"


def english_verb(clause: Clause) -> tuple[str, str, str]:
    """The English verb as (auxiliary, main part, base); the auxiliary may be ""."""
    subject, verb, tense = clause.subject, clause.verb, clause.tense
    base, third, past, participle, ing = verb.forms
    singular = not subject.plural and subject.pronoun != "I"
    has = "has" if singular else "have"
    if verb.has("copular") and tense in ("present", "past"):
        return be_form(subject, tense == "past"), base.removeprefix("be "), ""
    wants = {"want": "want", "must": "has" if singular else "have", "wanted": "wanted"}
    return {
        "present": ("", third if singular else base, base),
        "progressive": (be_form(subject), ing, ""),
        "past": ("", past, base),
        "past progressive": (be_form(subject, True), ing, ""),
        "future": ("will", base, ""),
        "perfect": (has, participle, ""),
        "past perfect": ("had", participle, ""),
        "already": (has, "already " + participle, ""),
        "had already": ("had", "already " + participle, ""),
        "used to": ("", f"used to {base}", f"use to {base}"),
        "can": ("can", base, ""),
        "should": ("should", base, ""),
        "want": ("", f"{'wants' if singular else 'want'} to {base}", f"want to {base}"),
        "wanted": ("", f"wanted to {base}", f"want to {base}"),
        "must": ("", f"{wants['must']} to {base}", f"have to {base}"),
        "begin": ("", f"began to {base}", f"begin to {base}"),
    }[tense]


def do_support(clause: Clause) -> str:
    if clause.tense in ("past", "wanted", "begin", "used to"):
        return "did"
    singular = not clause.subject.plural and clause.subject.pronoun != "I"
    return "does" if singular else "do"


def english_auxiliary(clause: Clause, question: bool) -> tuple[str, str]:
    """The auxiliary, with not or its contraction, and the rest of the verb."""
    auxiliary, main, base = english_verb(clause)
    if (question or clause.negative) and not auxiliary:
        auxiliary, main = do_support(clause), base
    return auxiliary, main


def negated(auxiliary: str, contracted: bool) -> str:
    full = "cannot" if auxiliary == "can" else f"{auxiliary} not"
    return CONTRACTIONS.get(full, full) if contracted else full


def join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def english_tail(clause: Clause) -> str:
    parts = [p.as_object for p in (clause.recipient, clause.object) if p is not None]
    return join(
        *parts, clause.companion.english, clause.place.english, clause.time.english
    )


def english_statement(clause: Clause) -> str:
    auxiliary, main = english_auxiliary(clause, False)
    if clause.negative:
        auxiliary = negated(auxiliary, clause.contracted)
    return join(
        clause.subject.english, auxiliary, clause.frequency, main, english_tail(clause)
    )


def english_question(clause: Clause, wh: str = "") -> str:
    """Auxiliary before the subject; a negative question contracts (E7)."""
    auxiliary, main = english_auxiliary(clause, True)
    if clause.negative:
        auxiliary = CONTRACTIONS["cannot" if auxiliary == "can" else auxiliary + " not"]
    return join(
        wh,
        auxiliary,
        clause.subject.english,
        clause.frequency,
        main,
        english_tail(clause),
    )


def takes_ko(clause: Clause) -> bool:
    """को marks people always, other living things when they are definite (H17)."""
    thing = clause.object
    if thing.pronoun or thing.human:
        return True
    return thing.living and thing.definite and not clause.verb.has("bare")


def object_words(clause: Clause) -> tuple[str, Agreement | None]:
    """The object in its case, and what a verb may agree with in it."""
    if clause.object is None:
        return "", None
    if clause.verb.case:
        return with_postposition(clause.object, clause.verb.case), None
    if takes_ko(clause):
        return with_postposition(clause.object, "को"), None
    return clause.object.direct, clause.object.agree


def object_agreement(clause: Clause) -> Agreement:
    """What ergative and dative verbs agree with: light noun, bare object or m.sg."""
    light = clause.verb.light
    if light and light not in LIGHT_ADJECTIVES:
        return Agreement(3, LIGHT_GENDER[light])
    return object_words(clause)[1] or DEFAULT


def is_ergative(clause: Clause) -> bool:
    return (
        clause.verb.ergative
        and clause.tense in ERGATIVE_TENSES
        and not (clause.verb.has("stative"))
    )


def subject_words(clause: Clause) -> str:
    """The subject: direct, with ने (perfective of a transitive), or with को (dative)."""
    if clause.tense in DATIVE_TENSES:
        return with_postposition(clause.subject, "को")
    if is_ergative(clause):
        return with_postposition(clause.subject, "ने")
    return clause.subject.direct


def drop_present(participle: str, agree: Agreement) -> str:
    """After नहीं the habitual loses है, and the feminine plural becomes nasal (H13)."""
    feminine_plural = agree.gender == F and agree.number == "pl"
    return participle + ("ं" if feminine_plural else "")


def hindi_verb(clause: Clause, wh: str = "") -> str:
    """The verb with its light word, नहीं and auxiliary, agreeing with the right noun."""
    verb, tense, root = clause.verb, clause.tense, clause.verb.root
    subject = clause.subject.agree
    no = "नहीं" if clause.negative or clause.frequency == "never" else ""
    target = object_agreement(clause) if is_ergative(clause) else subject
    light = join(verb.light, wh) if verb.case else join(wh, verb.light)
    if verb.has("posture") and tense in ("progressive", "past progressive"):
        state = posture(verb.root, subject)
        words = (no, state) if wh else (state, no)  # क्यों नहीं बैठा, बैठा नहीं
        return join(light, *words, be_hindi(subject, tense))
    if (verb.has("stative") or verb.has("live")) and tense == "past":
        return join(light, no, imperfective(root, subject), was(subject))
    if verb.has("vector") and not no and tense in ("present", "past", "future"):
        root, light = "जा", join(light, root)
    if tense == "present":
        return join(light, no, habitual(root, subject, bool(no)))
    if tense in ("progressive", "past progressive"):
        staying = root + " " + inflect("रहा", subject.gender, subject.number)
        return join(light, no, staying, be_hindi(subject, tense))
    if tense == "past":
        return join(light, no, perfective(root, target))
    if tense in ("perfect", "past perfect"):
        done = unnasal(perfective(root, target))
        return join(light, no, done, be_hindi(target, tense))
    if tense in ("already", "had already"):
        finished = "चुक" + ("ा", "े", "ी", "ी")[subject.index]
        return join(light, root, finished, be_hindi(subject, tense))
    if tense == "future":
        return join(light, no, future(root, subject))
    if tense == "used to":
        return join(light, imperfective(root, subject), was(subject))
    if tense == "can":
        return join(light, no, root, habitual("सक", subject, bool(no)))
    if tense == "want":
        return join(light, infinitive(root), no, habitual("चाह", subject, bool(no)))
    if tense == "wanted":
        wanting = imperfective("चाह", subject)
        return join(light, infinitive(root), no, wanting, was(subject))
    if tense == "begin":
        return join(light, root + "ने", perfective("लग", subject))
    target = object_agreement(clause)
    wish = infinitive(root, target)
    if tense == "should":
        return join(light, no, wish, "चाहिए")
    assert tense == "must", tense
    return join(light, no, wish, is_now(target))


def habitual(root: str, agree: Agreement, negative: bool) -> str:
    participle = imperfective(root, agree)
    if negative:
        return drop_present(participle, agree)
    return f"{participle} {is_now(agree)}"


def be_hindi(agree: Agreement, tense: str) -> str:
    past = tense in ("past progressive", "past perfect", "had already", "past")
    return was(agree) if past else is_now(agree)


def posture(root: str, agree: Agreement) -> str:
    """बैठा, खड़ा, लेटा: the state that English calls sitting, standing, lying (H3)."""
    stem = root.removesuffix("ा")
    return stem + ("ा", "े", "ी", "ी")[agree.index]


def hindi_clause(clause: Clause, wh: str = "") -> str:
    """Subject, time, place, companion, recipient, object, [wh], verb."""
    thing, _ = object_words(clause)
    recipient = with_postposition(clause.recipient, "को") if clause.recipient else ""
    place = clause.place.hindi
    before, after = (
        ("", place) if clause.gone or clause.verb.has("goal") else (place, "")
    )
    often = FREQUENCIES.get(clause.frequency, "")
    return join(
        subject_words(clause),
        clause.time.hindi,
        often if often != "कभी" else "",
        clause.companion.hindi,
        before,
        often if often == "कभी" else "",
        recipient,
        thing,
        after,
        hindi_verb(clause, wh),
    )


# -------------------------------------------------------------------------- choosing

BAD_ADJECTIVES = {  # verb: adjectives that make no sense on its object
    "clean": "clean",
    "wash": "clean",
    "drink": "dirty",
    "build": "old dirty heavy empty",
    "sew": "old dirty",
    "buy": "dirty empty",
    "sell": "dirty empty",
    "make": "cold old",
    "plant": "high big old",
    "grow": "high ripe sour big small",
    "cook": "hot tasty",
    "write": "old new",
    "repair": "new",
    "give": "dirty empty",
    "send": "dirty",
    "taste": "dirty tasty good",
    "wear": "clean",
    "bring": "dirty",
    "choose": "dirty old",
    "fill": "dirty",
    "hide": "dirty",
    "peel": "sour tasty hot",
    "draw": "old",
    "water": "high",
    "cut": "high tasty",
    "have": "dirty sour",
    "love": "hungry thirsty lazy",
    "ask for": "dirty",
    "pull": "new cheap",
}
OWNABLE_PLACES = set(
    [
        "house",
        "room",
        "garden",
        "shop",
        "village",
        "field",
        "office",
        "courtyard",
        "city",
    ]
)
SHARED_GROUPS = ("place", "vehicle", "pet", "farm", "kin", "peer", "elder", "esteemed")
OWNED_GROUPS = [
    "pet",
    "farm",
    "clothing",
    "wash",
    "vessel",
    "furniture",
    "vehicle",
    "toy",
    "desk",
    "object",
    "light",
    "music",
    "text",
]


def chance(rng: random.Random, share: float) -> bool:
    return rng.random() < share


def pick(rng: random.Random, weights: dict[str, float]) -> str:
    """One key of a table of weights."""
    point = rng.random() * sum(weights.values())
    for key, weight in weights.items():
        point -= weight
        if point < 0:
            return key
    return key


def some_adjective(
    rng: random.Random, name: str, share: float, verb_name: str = ""
) -> Adjective | None:
    bad = BAD_ADJECTIVES.get(verb_name, "").split()
    if verb_name.removeprefix("by ") not in ("eat", "drink", "ask for"):
        bad += ["hungry", "thirsty"]
    choices = [a for a in ADJECTIVES_OF[name] if a.english not in bad]
    return rng.choice(choices) if choices and chance(rng, share) else None


def owned_phrase(
    rng: random.Random,
    name: str,
    subject: Phrase | None,
    own_share: float = 0.6,
    **options,
) -> Phrase:
    """A possessed noun: my, his, Ravi's …, or the subject's own (अपना, H1)."""
    noun = NOUNS[name]
    if subject is not None and chance(rng, own_share):
        owner = subject
    elif chance(rng, 0.35):
        owner = name_phrase(rng.choice(list(NAMES)))
    else:
        owner = pronoun(rng.choice(["I", "you", "he", "she", "we", "they"]))
    if owner.noun and subject is not None and owner.noun == subject.noun:
        owner = subject
    if subject is not None and {owner.refers, subject.refers} == {"I", "we"}:
        owner = subject
    own = (
        subject is not None
        and owner.refers == subject.refers
        and (owner is subject or bool(owner.pronoun))
    )
    many = owner.refers in ("we", "they")
    if many and noun.group not in SHARED_GROUPS and not noun.mass:
        options["plural"] = True
    return noun_phrase(name, "own", owner=owner, own=own, **options)


def person_phrase(
    rng: random.Random, name: str, subject: Phrase | None = None, verb_name: str = ""
) -> Phrase:
    """A human noun with a fitting determiner; kin always belongs to somebody (S1)."""
    noun = NOUNS[name]
    adjective = some_adjective(rng, name, 0.15, verb_name)
    if noun.group in KIN_GROUPS:
        plural = noun.group != "elder" and chance(rng, 0.12)
        return owned_phrase(rng, name, subject, plural=plural, adjective=adjective)
    if noun.group == "esteemed":
        if chance(rng, 0.3):
            return owned_phrase(rng, name, subject, adjective=adjective)
        return noun_phrase(name, "the", plural=chance(rng, 0.3), adjective=adjective)
    if noun.group == "royal":
        return noun_phrase(name, "the", adjective=adjective)
    determiner = pick(
        rng,
        {
            "the": 5,
            "a": 1.5,
            "this": 1,
            "that": 1,
            "these": 0.5,
            "those": 0.5,
            "two": 1,
            "some": 0.4,
        },
    )
    if determiner == "two":
        determiner = rng.choice(["two", "two", "three", "three", "four", "five"])
    plural = determiner in ("these", "those", "some")
    plural = plural or (determiner == "the" and chance(rng, 0.3))
    return noun_phrase(name, determiner, plural=plural, adjective=adjective)


def animal_phrase(
    rng: random.Random, name: str, subject: Phrase | None = None, verb_name: str = ""
) -> Phrase:
    adjective = some_adjective(rng, name, 0.2, verb_name)
    noun = NOUNS[name]
    if noun.group in ("pet", "farm") and chance(rng, 0.25):
        return owned_phrase(rng, name, subject, adjective=adjective)
    determiner = pick(
        rng,
        {
            "the": 5,
            "a": 2,
            "this": 0.7,
            "that": 0.7,
            "these": 0.4,
            "two": 1,
            "some": 0.4,
        },
    )
    if determiner == "two":
        determiner = rng.choice(["two", "three", "four", "five"])
    plural = determiner in ("these", "some") or (
        determiner == "the" and chance(rng, 0.2)
    )
    return noun_phrase(name, determiner, plural=plural, adjective=adjective)


def choose_subject(
    rng: random.Random, verb: Verb, pronouns: float = 0.32, names: float = 0.24
) -> Phrase:
    people = [n for n in verb.subjects if NOUNS[n].group in HUMAN_GROUPS]
    open_to_all = len(people) > 12
    point = rng.random()
    if open_to_all and point < pronouns:
        return pronoun(rng.choice(["I", "you", "he", "she", "we", "they"]))
    if open_to_all and point < pronouns + names:
        return name_phrase(rng.choice(list(NAMES)))
    name = rng.choice(verb.subjects)
    if NOUNS[name].group in HUMAN_GROUPS:
        return person_phrase(rng, name, None, "by " + verb.name)
    if NOUNS[name].group in ANIMAL_GROUPS:
        return animal_phrase(rng, name, None, "by " + verb.name)
    return noun_phrase(name, "the")


def thing_phrase(
    rng: random.Random,
    name: str,
    subject: Phrase | None,
    *,
    negative: bool = False,
    question: bool = False,
    habitual: bool = False,
    definite: bool = False,
    only_plural: bool = False,
    uncounted: bool = False,
    unowned: bool = False,
    verb_name: str = "",
) -> Phrase:
    """An inanimate object (or a bare animal) with a fitting determiner.

    Under negation "a" and "any" are कोई, in questions "a" is not spelled (H11, H12). A
    habit takes a bare plural or a mass noun (E8).
    """
    noun = NOUNS[name]
    adjective = some_adjective(rng, name, 0.25, verb_name)
    if habitual:
        return noun_phrase(name, "", plural=not noun.mass, adjective=adjective)
    if noun.mass:
        weights = {"": 5, "the": 3, "some": 0 if negative or question else 1.5}
        if negative:
            weights["any"] = 1
        determiner = pick(rng, weights)
        if determiner in ("some", "any") or name == "money":
            adjective = None
        return noun_phrase(name, determiner, adjective=adjective)
    ownable = noun.group in OWNED_GROUPS
    asked = negative or question
    weights = {
        "": 2 if noun.plural_only and not definite else 0,
        "the": 4,
        "a": 0 if definite or noun.plural_only else 3,
        "two": 0 if definite or negative or noun.plural_only else 1.3,
        "some": 0 if definite or asked else 0.8,
        "any": 0.8
        if negative != question and not definite and not noun.plural_only
        else 0,
        "this": 0 if noun.plural_only else 0.9,
        "that": 0 if noun.plural_only else 0.7,
        "these": 0.5,
        "those": 0.3,
        "own": 2.5 if ownable and not unowned else 0,
    }
    if subject is not None and (
        subject.refers in ("he", "she", "they", "it")
        and (subject.pronoun or subject.direct.startswith(("वह ", "वे ")))
    ):
        weights["that"] = weights["those"] = 0  # वह वह … (H15)
    if only_plural:
        weights["a"] = weights["this"] = weights["that"] = 0
        weights["some"] = 0 if asked or definite else 2
    if uncounted:
        for word in ("two", "some", "these", "those", "any"):
            weights[word] = 0
    determiner = pick(rng, weights)
    if negative and determiner in ("a", "any", ""):
        adjective = None
    if determiner == "own":
        plural = (
            noun.plural_only or only_plural or (not uncounted and chance(rng, 0.25))
        )
        return owned_phrase(rng, name, subject, plural=plural, adjective=adjective)
    if determiner == "two":
        determiner = rng.choice(list(NUMBERS)[: 9 if noun.group == "fruit" else 5])
    plural = determiner in ("these", "those", "some", "any") or noun.plural_only
    plural = plural or (
        determiner == "the" and (only_plural or (not uncounted and chance(rng, 0.25)))
    )
    one = "कोई" if negative else "" if question else "एक"
    return noun_phrase(name, determiner, plural=plural, adjective=adjective, one=one)


def choose_object(
    rng: random.Random, verb: Verb, subject: Phrase, name: str | None = None, **options
) -> Phrase:
    """An object for the verb: people by name, pronoun or noun, else a thing."""
    people = [n for n in verb.objects if NOUNS[n].group in HUMAN_GROUPS]
    if name is None and len(people) > 12:
        point = rng.random()
        keys = ["I", "you", "he", "she", "we", "they"]
        near = {"I": ("I", "we"), "we": ("I", "we"), "you": ("you",)}
        bad = near.get(subject.pronoun, (subject.refers,))
        keys = [key for key in keys if key not in bad]
        if point < 0.22:
            return pronoun(rng.choice(keys))
        if point < 0.45:
            names = [n for n in NAMES if n != subject.noun]
            return name_phrase(rng.choice(names))
    name = name or rng.choice([n for n in verb.objects if n != subject.noun])
    noun = NOUNS[name]
    asked = options.get("negative") or options.get("question")
    if noun.group in HUMAN_GROUPS or noun.group in ANIMAL_GROUPS:
        kind = options.get("habitual") or (
            verb.name == "be afraid of" and chance(rng, 0.6)
        )
        if kind and noun.group not in KIN_GROUPS + ("royal",):
            return noun_phrase(name, "", plural=True)
        make = person_phrase if noun.group in HUMAN_GROUPS else animal_phrase
        while True:
            found = make(rng, name, subject, verb.name)
            if asked and not found.definite:
                continue
            if found.direct.startswith(("वह ", "वे ")) and subject.direct.startswith(
                "व"
            ):
                continue
            return found
    if (verb.case or verb.has("definite")) and not noun.mass:
        options["definite"] = True
    if verb.has("plural"):
        options["only_plural"] = True
    if verb.has("single"):
        options["uncounted"] = True
    if verb.has("noown"):
        options["unowned"] = True
    return thing_phrase(rng, name, subject, verb_name=verb.name, **options)


def place_phrase(rng: random.Random, name: str, subject: Phrase | None) -> Phrase:
    adjective = some_adjective(rng, name, 0.12)
    if adjective and adjective.english not in (
        "big",
        "small",
        "new",
        "old",
        "beautiful",
    ):
        adjective = None
    may_own = subject is None or (subject.human and not subject.possessive)
    if name in OWNABLE_PLACES and chance(rng, 0.15) and may_own:
        return owned_phrase(rng, name, subject, 0.8, adjective=adjective)
    determiner = pick(rng, {"the": 8, "this": 1, "that": 0.7})
    if determiner == "that" and subject is not None and subject.direct.startswith("व"):
        determiner = "the"
    return noun_phrase(name, determiner, adjective=adjective)


def place_adjunct(
    rng: random.Random, spec: str, subject: Phrase | None = None
) -> Adjunct:
    """One of the place phrases of a specification such as "in:room under:tree"."""
    preposition, name = rng.choice(spec.split()).replace("_", " ").split(":")
    phrase = place_phrase(rng, name, subject)
    return Adjunct(
        f"{preposition} {phrase.english}",
        with_postposition(phrase, PREPOSITIONS[preposition]),
        (("preposition-place", preposition, name), *phrase.combinations),
    )


def companion_adjunct(rng: random.Random, subject: Phrase) -> Adjunct:
    """With somebody: के साथ."""
    if chance(rng, 0.4):
        person = name_phrase(rng.choice([n for n in NAMES if n != subject.noun]))
    else:
        name = rng.choice(words_of("@kin @peer @elder"))
        person = owned_phrase(rng, name, subject, 1.0)
    return Adjunct(
        f"with {person.as_object}",
        with_postposition(person, "के साथ"),
        person.combinations,
    )


# --------------------------------------------------------------------- constructions


def low(english: str) -> str:
    """A sentence inside another one: lower case except I and names."""
    first = english.split()[0].removesuffix("'s")
    return (
        english if first == "I" or first in NAMES else english[0].lower() + english[1:]
    )


def finish(english: str, hindi: str, question: bool = False) -> tuple[str, str]:
    """Capital letter and final mark."""
    english = english[0].upper() + english[1:] + ("?" if question else ".")
    hindi = hindi + ("?" if question else "।")
    return english, unicodedata.normalize("NFC", hindi)


def tenses_of(verb: Verb) -> dict[str, float]:
    """The tenses a verb goes in, with their weights."""
    if verb.has("onlyprog"):
        return {"progressive": 2, "past progressive": 1}
    if verb.has("once"):
        return {"past": 3, "past perfect": 1} if verb.root == "तोड़" else {"past": 1}
    weights = {
        "present": 4,
        "progressive": 3,
        "past": 5,
        "past progressive": 0.8,
        "future": 3,
        "perfect": 0.6,
        "past perfect": 0.1,
        "already": 0.15,
        "used to": 0.15,
        "begin": 0.1,
        "can": 1,
        "want": 1,
        "wanted": 0.15,
        "should": 0.5,
        "must": 0.2,
    }
    drop = []
    if verb.has("stative"):
        drop = [t for t in weights if t not in ("present", "past")]
    if verb.has("live"):
        drop = [t for t in weights if t not in ("present", "past", "want", "used to")]
        drop.remove("used to") if "used to" in drop else None
    if verb.has("noprog"):
        drop += ["progressive", "past progressive", "begin"]
    if verb.name not in BEGUN.split():
        drop += ["begin"]
    if verb.has("nohabit"):
        drop += ["present", "used to"]
    if verb.has("nowant"):
        drop += ["want", "wanted", "should", "must", "can", "already"]
    if verb.has("sudden"):
        drop += ["future", "want", "wanted", "should", "must", "can", "already"]
    if verb.has("vector"):
        drop += [
            "progressive",
            "past progressive",
            "want",
            "wanted",
            "can",
            "must",
            "should",
            "begin",
            "used to",
            "already",
            "past perfect",
            "perfect",
        ]
    if verb.has("wakeup"):
        drop += ["perfect", "past perfect", "begin"]
    return {t: w for t, w in weights.items() if t not in drop}


def choose_time(rng: random.Random, verb: Verb, tense: str) -> Adjunct:
    if verb.has("wakeup"):
        return rng.choice(
            [
                Adjunct("early", "जल्दी"),
                Adjunct("late", "देर से"),
                Adjunct("in the morning", "सुबह"),
            ]
        )
    if verb.has("quiet") or verb.has("notime"):
        return NOTHING
    share = 0.36
    table = TIMES.get(tense, [])
    if not table or not chance(rng, share):
        return NOTHING
    return rng.choice(table)


def random_clause(
    rng: random.Random,
    *,
    verb: Verb | None = None,
    subject: Phrase | None = None,
    tense: str | None = None,
    negative: bool | None = None,
    question: bool = False,
    bare: bool = False,
    object_name: str | None = None,
) -> Clause:
    """A clause with a verb; `bare` leaves out time and place where they are free."""
    while True:
        frame = verb or choose_verb(rng)
        allowed = tenses_of(frame)
        time = tense or pick(rng, allowed)
        assert not (verb and tense) or tense in allowed, (verb.name, tense)
        assert not (verb and subject) or fits(subject, verb), (verb.name, subject)
        if time in allowed and (subject is None or fits(subject, frame)):
            break
    no = chance(rng, 0.18) if negative is None else negative
    who = subject or choose_subject(rng, frame)
    while time in MODALS and subject is None and not who.human:
        who = choose_subject(rng, frame, 0.4, 0.4)
        if not any(NOUNS[n].group in HUMAN_GROUPS for n in frame.subjects):
            time = "past"
    settled = question or no or time in ("present", "used to")
    while subject is None and (
        (question and who.pronoun in ("I", "we"))
        or (settled and not who.definite)
        or (time in MODALS and not who.human)
    ):
        who = choose_subject(rng, frame)
    if time in ("used to", "begin", "must", "already", "past perfect", "had already"):
        no = False
    habitual = time in ("present", "used to") and not frame.has("stative")
    frequency = ""
    if (
        (
            time == "present"
            and not (frame.has("stative") or frame.has("live"))
            and not bare
        )
        and not no
        and chance(rng, 0.6)
    ):
        frequency = rng.choice(list(FREQUENCIES))
    if question and frequency == "never":
        frequency = ""
    no = no and not frequency
    when = NOTHING if bare or frequency else choose_time(rng, frame, time)
    if frame.has("wakeup"):
        when = choose_time(rng, frame, time)
    alone = time == "present" and not (frame.objects or frame.has("live") or bare)
    if alone and habitual and not (frequency or when.english or frame in (GO, RETURN)):
        when = rng.choice(TIMES["present"])
    about_people = any(NOUNS[n].group in HUMAN_GROUPS for n in frame.objects)
    if (
        time == "present"
        and habitual
        and not (frequency or when.english)
        and (frame.has("definite") or (about_people and frame.has("routine")))
    ):
        if no:
            when = rng.choice(TIMES["present"])
        else:
            frequency = rng.choice(["often", "sometimes", "always"])
    if not who.human and " on " in f" {when.english}":
        when = NOTHING  # animals keep no calendar
    thing = None
    if frame.objects or object_name:
        routine = frame.has("routine") and (frequency or when.english)
        names = None
        if who.noun in ANIMAL_MEALS and frame.name == "eat":
            names = rng.choice(ANIMAL_MEALS[who.noun].split())
        thing = choose_object(
            rng,
            frame,
            who,
            object_name or names,
            negative=no or frequency == "never",
            question=question,
            habitual=habitual and not routine,
            **({"definite": True} if routine or time == "already" else {}),
        )
        if (
            frame.case == "को"
            and time in DATIVE_TENSES
            or takes_ko_object(frame, thing)
        ) and time in DATIVE_TENSES:  # two को in one clause
            return random_clause(
                rng,
                verb=verb,
                subject=subject,
                tense=tense,
                negative=negative,
                question=question,
                bare=bare,
                object_name=object_name,
            )
    place = NOTHING
    share = 0.6 if not frame.objects else 0.3
    if time in ("want", "wanted", "can", "must", "should", "begin", "already"):
        share *= 0.3
    if frame.places and (frame.has("needplace") or (not bare and chance(rng, share))):
        place = place_adjunct(rng, frame.places, who)
    companion = NOTHING
    if (
        not frame.objects
        and not bare
        and who.human
        and frame.name in COMPANY
        and chance(rng, 0.12)
    ):
        companion = companion_adjunct(rng, who)
    return Clause(
        who,
        frame,
        time,
        thing,
        None,
        place,
        when,
        companion,
        frequency,
        no,
        contracted=chance(rng, 0.5),
    )


BEGUN = "eat drink read write cook make sing play run cry laugh dance work study clean "
BEGUN += "wash sew build draw cut swim jump fly walk"
MODALS = ("already", "want", "wanted", "should", "must", "can")
COMPANY = [
    "run",
    "sit",
    "walk",
    "laugh",
    "play",
    "dance",
    "work",
    "study",
    "exercise",
    "live",
    "swim",
]


def takes_ko_object(verb: Verb, thing: Phrase) -> bool:
    return not verb.case and (
        thing.human
        or bool(thing.pronoun)
        or (thing.living and thing.definite)
        and not verb.has("bare")
    )


def fits(subject: Phrase, verb: Verb) -> bool:
    if subject.noun in NOUNS:
        return subject.noun in verb.subjects
    people = [n for n in verb.subjects if NOUNS[n].group in HUMAN_GROUPS]
    return len(people) > 12


VERB_WEIGHTS = {"be afraid of": 0.7, "forget": 0.8}


def choose_verb(rng: random.Random) -> Verb:
    return rng.choice(VERBS)


def spell(clause: Clause, question: bool = False) -> tuple[str, str]:
    if question:
        return finish(english_question(clause), "क्या " + hindi_clause(clause), True)
    return finish(english_statement(clause), hindi_clause(clause))


def simple(rng: random.Random) -> Pair:
    question = chance(rng, 0.13)
    clause = random_clause(rng, question=question)
    return Pair(*spell(clause, question), clause.combinations, "simple")


def animals(rng: random.Random) -> Pair:
    """What animals do: from the tables of meals and scenes (S2)."""
    if chance(rng, 0.5):
        who = rng.choice(list(ANIMAL_MEALS))
        verb_name, what = "eat", rng.choice(ANIMAL_MEALS[who].split())
    else:
        subjects, verb_name, objects = rng.choice(ANIMAL_SCENES)
        who, what = rng.choice(words_of(subjects)), rng.choice(words_of(objects))
        if who == what:
            return animals(rng)
    frame = next(v for v in VERBS if v.name == verb_name and v.objects)
    frame = replace(
        frame,
        subjects=(who,),
        places="near:river under:tree in:field in:forest"
        if verb_name in ("see", "catch")
        else "",
    )
    weights = {
        t: w
        for t, w in tenses_of(frame).items()
        if t
        in ("present", "progressive", "past", "past progressive", "future", "perfect")
    }
    question = chance(rng, 0.1)
    clause = random_clause(
        rng, verb=frame, tense=pick(rng, weights), question=question, object_name=what
    )
    return Pair(*spell(clause, question), clause.combinations, "simple")


def motion(rng: random.Random) -> Pair:
    """Going to a place (no postposition in Hindi) or coming back from it (से)."""
    frame = rng.choice([GO, GO, RETURN])
    question = chance(rng, 0.12)
    tense = pick(
        rng,
        {
            "present": 2,
            "progressive": 2,
            "past": 3,
            "future": 3,
            "perfect": 1,
            "want": 1,
            "must": 1,
            "should": 0.7,
            "can": 0.7,
            "past progressive": 1,
        },
    )
    base = random_clause(rng, verb=frame, tense=tense, question=question)
    clause = replace(base, place=goal(rng, frame), gone=True)
    return Pair(*spell(clause, question), clause.combinations, "simple")


def goal(rng: random.Random, frame: Verb) -> Adjunct:
    """Where one goes to or comes back from: home has no article and no postposition."""
    name = rng.choice(GO_PLACES.split())
    if frame is GO and chance(rng, 0.1):
        return Adjunct("home", "घर")
    word = "to" if frame is GO else "from"
    noun = noun_phrase(name, "the")
    english = f"{word} school" if name == "school" else f"{word} {noun.english}"
    hindi = noun.oblique + ("" if frame is GO else " से")
    return Adjunct(english, hindi, (("preposition-place", word, name),))


def giving(rng: random.Random) -> Pair:
    """Somebody gives, shows, tells or sends somebody something."""
    frame, things = rng.choice(
        [(GIVE, GIFTS), (GIVE, GIFTS), (SHOW, SHOWN), (TELL, ["story"]), (SEND, SENT)]
    )
    question = chance(rng, 0.12)
    tense = pick(
        rng,
        {
            "progressive": 1.5,
            "past": 4,
            "future": 2.5,
            "perfect": 1,
            "want": 0.7,
            "can": 0.4,
            "past progressive": 0.5,
        },
    )
    who = choose_subject(rng, frame)
    no = not question and chance(rng, 0.15)
    while (question and who.pronoun in ("I", "we")) or (
        (question or no) and not who.definite
    ):
        who = choose_subject(rng, frame)
    people = Verb("x/x/x/x/x", "", (), tuple(words_of(FOLK)))
    recipient = choose_object(rng, people, who)
    while recipient.noun and (
        recipient.noun == who.noun or ((question or no) and not recipient.definite)
    ):
        recipient = choose_object(rng, people, who)
    thing = thing_phrase(
        rng, rng.choice(things), who, negative=no, question=question, verb_name="give"
    )
    while thing.possessive:
        thing = thing_phrase(
            rng, thing.noun, who, negative=no, question=question, verb_name="give"
        )
    clause = Clause(
        who,
        frame,
        tense,
        thing,
        recipient,
        negative=no,
        time=choose_time(rng, frame, tense),
        contracted=chance(rng, 0.5),
    )
    return Pair(*spell(clause, question), clause.combinations, "simple")


def copula_words(
    subject: Phrase,
    english: str,
    hindi: str,
    past: bool,
    negative: bool,
    contracted: bool,
    question: bool = False,
    agree: Agreement | None = None,
) -> tuple[str, str]:
    """X is Y: होना stands last, नहीं before it."""
    be = be_form(subject, past)
    agree = agree or subject.agree
    last = was(agree) if past else is_now(agree)
    hindi = join(
        "क्या" if question else "", subject.direct, hindi, "नहीं" * negative, last
    )
    if question:
        be = CONTRACTIONS[be + " not"] if negative else be
        return join(be, subject.english, english), hindi
    if negative:
        be = negated(be, contracted)
    return join(subject.english, be, english), hindi


def described(rng: random.Random) -> Pair:
    """X is tall, X is happy, X is a farmer, potatoes are cheap."""
    past, no = chance(rng, 0.3), chance(rng, 0.2)
    question, short = chance(rng, 0.15), chance(rng, 0.5)
    kind = pick(
        rng,
        {
            "thing": 3,
            "person": 2,
            "mood": 2,
            "generic": 1.2,
            "job": 1,
            "this": 1.2,
            "hungry": 1,
        },
    )
    combinations: tuple[Combination, ...] = ()
    if kind == "generic":
        return generic(rng)
    if kind == "this":
        return this_is(rng)
    if kind == "hungry":
        return hungry(rng)
    if kind == "thing":
        adjective = rng.choice(ADJECTIVES)
        names = [n for n in adjective.nouns if NOUNS[n].group not in HUMAN_GROUPS]
        if not names or adjective.english in ("hungry", "thirsty"):
            return described(rng)
        name = rng.choice(names)
        subject = definite_thing(rng, name)
    elif kind == "person":
        qualities = [
            "good",
            "clever",
            "tall",
            "kind",
            "brave",
            "honest",
            "poor",
            "rich",
            "lazy",
        ]
        adjective = rng.choice(
            [
                a
                for a in ADJECTIVES
                if a.english in qualities
                or a.hindi == "बूढ़ा"
                or a.english == "beautiful"
            ]
        )
        names = [n for n in adjective.nouns if NOUNS[n].group in HUMAN_GROUPS]
        name = rng.choice(names)
        subject = definite_person(rng, name)
    else:
        name = ""
        frame = (
            GIVE
            if kind == "job" or chance(rng, 0.9)
            else Verb("", "", tuple(words_of("@pet")))
        )
        subject = definite_subject(rng, frame, question)
        if kind == "job":
            return job(rng, past, no, question, short)
        mood = rng.choice(list(MOODS)[: None if subject.human else 4])
        english = mood
        hindi = inflect(MOODS[mood], subject.agree.gender, subject.agree.number)
    if name:
        very = chance(rng, 0.2) and not no
        english = ("very " if very else "") + adjective.english
        hindi = ("बहुत " if very else "") + inflect(
            adjective.hindi, subject.agree.gender, subject.agree.number
        )
        combinations = (("adjective-noun", adjective.english, name),)
    e, h = copula_words(subject, english, hindi, past, no, short, question)
    return Pair(*finish(e, h, question), combinations + subject.combinations, "copula")


def definite_thing(rng: random.Random, name: str) -> Phrase:
    """A definite thing as a subject: the, this, my, Ravi's."""
    noun = NOUNS[name]
    ownable = noun.group in OWNED_GROUPS or name in OWNABLE_PLACES - {"city"}
    if ownable and chance(rng, 0.3):
        plural = noun.group != "place" and chance(rng, 0.2)
        return owned_phrase(rng, name, None, plural=noun.plural_only or plural)
    if noun.mass:
        return noun_phrase(name, rng.choice(["the", "this"]))
    if noun.plural_only:
        return noun_phrase(name, rng.choice(["the", "these", "those"]))
    determiner = pick(rng, {"the": 5, "this": 2, "that": 1.5, "these": 1, "those": 0.7})
    plural = determiner in ("these", "those") or (
        determiner == "the" and noun.group != "place" and chance(rng, 0.3)
    )
    return noun_phrase(name, determiner, plural=plural)


def definite_person(rng: random.Random, name: str) -> Phrase:
    while True:
        found = person_phrase(rng, name)
        if found.definite and not found.combinations:
            return found


def definite_subject(rng: random.Random, frame: Verb, question: bool = False) -> Phrase:
    while True:
        found = choose_subject(rng, frame)
        if found.definite and not (question and found.pronoun in ("I", "we")):
            return found


def generic(rng: random.Random) -> Pair:
    """Potatoes are cheap: a truth about the kind takes होते हैं."""
    table = [
        ("mango", "sweet tasty"),
        ("lemon", "sour yellow"),
        ("orange", "sweet"),
        ("samosa", "tasty"),
        ("sweet", "tasty"),
        ("elephant", "big"),
        ("parrot", "green clever"),
        ("mouse", "small"),
        ("monkey", "clever"),
        ("potato", "cheap"),
        ("ring", "expensive"),
        ("car", "expensive"),
        ("pencil", "cheap"),
        ("tomato", "red"),
        ("banana", "yellow sweet"),
        ("mountain", "high"),
        ("story", "interesting"),
        ("bicycle", "cheap"),
        ("peacock", "beautiful"),
        ("flower", "beautiful"),
        ("squirrel", "small"),
        ("carrot", "cheap"),
        ("guava", "sweet cheap"),
        ("papaya", "sweet cheap"),
        ("apple", "expensive red"),
        ("necklace", "expensive"),
        ("phone", "expensive"),
    ]
    name, adjectives = rng.choice(table)
    english = rng.choice(adjectives.split())
    words = {a.english: a.hindi for a in ADJECTIVES}
    noun = noun_phrase(name, "", plural=True)
    agree = noun.agree
    often = rng.choice(["", "", "often", "always", "very"])
    hindi_often = {"": "", "very": "बहुत", **FREQUENCIES}[often]
    e = join(noun.english, "are", often, english)
    h = join(
        noun.direct,
        hindi_often,
        inflect(words[english], agree.gender, "pl"),
        imperfective("हो", agree),
        is_now(agree),
    )
    return Pair(*finish(e, h), (("adjective-noun", english, name),), "copula")


def this_is(rng: random.Random) -> Pair:
    """This is my book, those are Ravi's shoes."""
    group = rng.choice(OWNED_GROUPS + ["kin", "peer"])
    name = rng.choice(words_of("@" + group))
    plural = NOUNS[name].plural_only or chance(rng, 0.3)
    found = owned_phrase(rng, name, None, plural=plural)
    near = chance(rng, 0.6)
    word = (
        ("these" if near else "those") if found.plural else ("this" if near else "that")
    )
    no, question = chance(rng, 0.2), chance(rng, 0.2)
    shown = Phrase(word, DEMONSTRATIVES[word][0], "", found.agree, plural=found.plural)
    if found.possessive and NOUNS[name].group == "elder":
        return this_is(rng)
    e, h = copula_words(
        shown, found.english, found.direct, False, no, chance(rng, 0.5), question
    )
    return Pair(*finish(e, h, question), found.combinations, "copula")


def hungry(rng: random.Random) -> Pair:
    """X is hungry: to X hunger has attached itself (X को भूख लगी है, H18)."""
    question = chance(rng, 0.2)
    subject = definite_subject(rng, GIVE, question)
    word, noun = rng.choice([("hungry", "भूख"), ("thirsty", "प्यास")])
    past, no = chance(rng, 0.3), chance(rng, 0.2)
    e, _ = copula_words(subject, word, "", past, no, chance(rng, 0.5), question)
    h = join(
        "क्या" * question,
        with_postposition(subject, "को"),
        noun,
        "नहीं" * no,
        "लगी",
        "थी" if past else "है",
    )
    found = subject.combinations
    if subject.noun:
        found = (("subject-verb", subject.noun, word), *found)
    return Pair(*finish(e, h, question), found, "copula")


JOBS = [
    "farmer",
    "shopkeeper",
    "driver",
    "tailor",
    "gardener",
    "singer",
    "soldier",
    "carpenter",
]


def job(rng: random.Random, past: bool, no: bool, question: bool, short: bool) -> Pair:
    """X is a farmer: no article in Hindi."""
    while True:
        subject = definite_subject(rng, GIVE, question)
        if (
            subject.plural
            or NOUNS.get(subject.noun)
            and (NOUNS[subject.noun].group not in ("kin", "peer", "elder"))
        ):
            continue
        if subject.agree.gender == M and subject.pronoun != "you":
            break
    name = rng.choice(JOBS + ["teacher", "doctor"])
    e, h = copula_words(
        subject,
        f"{article(name)} {name}",
        NOUNS[name].forms[0],
        past,
        no,
        short,
        question,
    )
    return Pair(*finish(e, h, question), subject.combinations, "copula")


# What may be where: nouns | place phrases.
LOCATION_TABLE = """
@desk @vessel @object book letter newspaper milk | on:table under:table on:chair
  on:bed in:box in:bag in:basket under:chair under:bed in:room in:kitchen on:roof
  near:door near:window in:house
@toy @clothing | on:chair on:bed in:box in:bag under:bed under:table in:room on:roof
  in:courtyard in:basket behind:door under:chair in:house
@fruit @dish @vegetable | on:table in:kitchen in:basket in:bag in:box in:shop
  in:market
@vehicle | on:road near:house in_front_of:house behind:house near:station near:bridge
  in_front_of:shop in_front_of:school near:market in_front_of:hospital behind:temple
  in_front_of:office in_front_of:bank near:temple behind:hospital
@pet | in:house in:room in:garden in:courtyard on:roof under:table under:bed
  under:chair behind:door near:door under:tree behind:house in_front_of:house
  in:kitchen near:window
@farm | in:field near:river under:tree behind:house in:village near:lake on:road
  in_front_of:house near:forest in:courtyard behind:tree behind:temple
@wild | in:forest near:river near:lake under:tree behind:tree near:village
  near:mountain in:forest
bird monkey pigeon squirrel | on:tree on:roof in:garden under:tree in:park near:window
@person @worker @peer @kin @visitor | in:garden in:park in:field near:river near:lake
  near:house near:temple near:school near:forest under:tree behind:house behind:school
  behind:temple behind:shop in_front_of:house in_front_of:temple in_front_of:school
  on:road near:bridge in:market in:village in:city at:station near:station near:market
  near:hospital near:bank near:office near:park in_front_of:shop in_front_of:temple
  in_front_of:hospital in_front_of:bank in_front_of:library near:shop near:library
  in:house in:room in:courtyard on:roof in:library in:school in:hospital in:office
  in:bank in:shop in:temple
@plant tree | in:garden in:courtyard in_front_of:house behind:house near:river in:park
  near:school near:lake in:field
shop bank school temple hospital | near:station near:market in:village in:city
  near:river near:park behind:school behind:market in_front_of:station near:bridge
  behind:temple near:lake in_front_of:hospital behind:hospital behind:bank
  near:library
"""
LOCATIONS = dict(
    row.split(" | ") for row in LOCATION_TABLE.strip().replace("\n  ", " ").split("\n")
)


def located(rng: random.Random) -> Pair:
    """The book is on the table; there is a book on the table (H16)."""
    spec = rng.choice(list(LOCATIONS))
    name = rng.choice(words_of(spec))
    while True:
        place = place_adjunct(rng, LOCATIONS[spec])
        if place.combinations[0][2] != name:
            break
    noun = NOUNS[name]
    past, no = chance(rng, 0.25), chance(rng, 0.18)
    question, short = chance(rng, 0.17), chance(rng, 0.5)
    if chance(rng, 0.45) and noun.group not in KIN_GROUPS:
        return existential(rng, name, place, past, no, question, short)
    if noun.group in HUMAN_GROUPS:
        subject = definite_subject(rng, replace(GIVE, subjects=(name,) * 13), question)
    elif noun.group in ANIMAL_GROUPS:
        while True:
            subject = animal_phrase(rng, name)
            if subject.definite:
                break
    else:
        subject = definite_thing(rng, name)
    e, h = copula_words(subject, place.english, place.hindi, past, no, short, question)
    found = subject.combinations + place.combinations
    return Pair(*finish(e, h, question), found, "location")


def existential(
    rng: random.Random,
    name: str,
    place: Adjunct,
    past: bool,
    no: bool,
    question: bool,
    short: bool,
) -> Pair:
    """There is …: the place comes first in Hindi, the thing before होना."""
    no = no and not question
    noun = NOUNS[name]
    if noun.mass or noun.plural_only:
        thing = noun_phrase(name, "any" if no or question else "some")
    elif no or question:
        thing = noun_phrase(name, "a" if chance(rng, 0.5) else "any", one="कोई")
        if thing.english.startswith("any"):
            thing = noun_phrase(name, "any", plural=True)
    else:
        determiner = rng.choice(["a", "a", "two", "three", "four", "five", "some"])
        determiner = rng.choice(list(NUMBERS)) if determiner == "five" else determiner
        adjective = some_adjective(rng, name, 0.2)
        thing = noun_phrase(
            name, determiner, plural=determiner == "some", adjective=adjective
        )
    be = be_form(thing, past)
    last = was(thing.agree) if past else is_now(thing.agree)
    if question:
        e = join(be, "there", thing.english, place.english)
    else:
        e = join(
            "there", negated(be, short) if no else be, thing.english, place.english
        )
    h = join("क्या" * question, place.hindi, thing.direct, "नहीं" * no, last)
    found = thing.combinations + place.combinations
    return Pair(*finish(e, h, question), found, "location")


HAVINGS = words_of(
    "@desk @toy @clothing @vessel @object @vehicle @fruit book letter money "
    "dog cat cow horse goat hen camel flute drum milk sugar salt candle "
    "lamp house shop"
)


def having(rng: random.Random) -> Pair:
    """X has Y: Y is near X (के पास); of kin, Y is X's (रवि के दो भाई हैं)."""
    question, short = chance(rng, 0.2), chance(rng, 0.5)
    subject = definite_subject(rng, GIVE, question)
    past, no = chance(rng, 0.25), chance(rng, 0.25)
    name = rng.choice(HAVINGS)
    while NOUNS[name].plural_only:
        name = rng.choice(HAVINGS)
    kin = chance(rng, 0.15)
    if kin:
        name, no, question = (
            rng.choice(["brother", "sister", "son", "daughter"]),
            False,
            False,
        )
        determiner = rng.choice(["a", "two", "three", "four"])
        thing = noun_phrase(name, determiner)
        if subject.noun in NOUNS and (
            NOUNS[subject.noun].group in ("kin", "elder") or subject.plural
        ):
            return having(rng)
    else:
        while True:
            thing = thing_phrase(
                rng, name, None, negative=no, question=question, verb_name="have"
            )
            if not thing.definite:
                break
    singular = not subject.plural and subject.pronoun != "I"
    has = "had" if past else "has" if singular else "have"
    helper = "did" if past else "does" if singular else "do"
    if question:
        helper = CONTRACTIONS[helper + " not"] if no else helper
        e = join(helper, subject.english, "have", thing.english)
    elif no:
        e = join(subject.english, negated(helper, short), "have", thing.english)
    else:
        e = join(subject.english, has, thing.english)
    owner = (
        genitive(subject, thing.agree) if kin else with_postposition(subject, "के पास")
    )
    last = was(thing.agree) if past else is_now(thing.agree)
    h = join("क्या" * question, owner, thing.direct, "नहीं" * no, last)
    found = (*subject.combinations, ("verb-object", "have", name), *thing.combinations)
    return Pair(*finish(e, h, question), found, "have")


def dative(rng: random.Random) -> Pair:
    """X needs Y (चाहिए), X likes Y (पसंद), X found Y (मिला): X takes को."""
    verb_name = rng.choice(["need", "like", "find"])
    question, short = chance(rng, 0.17), chance(rng, 0.5)
    subject = definite_subject(rng, GIVE, question)
    no = chance(rng, 0.2)
    past = verb_name == "find"
    if verb_name == "need":
        name = rng.choice(
            words_of(
                "@desk @fruit @drink @staple @vegetable @object @tool "
                "@clothing money chair bicycle house book lamp bucket"
            )
        )
    elif verb_name == "like":
        name = rng.choice(
            words_of(
                "@fruit @drink @dish @meal @media @text @pet @clothing "
                "flower peacock garden house city park kite village"
            )
        )
    else:
        name = rng.choice(
            words_of("@desk @object @toy book letter money cap dog cat goat cow")
        )
    noun = NOUNS[name]
    if verb_name == "like":
        if chance(rng, 0.5) and name not in ("garden", "city", "park", "village"):
            thing = noun_phrase(name, "", plural=not noun.mass)
        else:
            thing = definite_thing(rng, name)
            while thing.possessive:
                thing = definite_thing(rng, name)
    elif verb_name == "find":
        if noun.group in ("pet", "farm") or (not noun.mass and chance(rng, 0.5)):
            thing = owned_phrase(rng, name, subject, 1.0)
        else:
            thing = thing_phrase(rng, name, None, negative=no, question=question)
            while thing.possessive or thing.plural:
                thing = thing_phrase(rng, name, None, negative=no, question=question)
    else:
        while True:
            thing = thing_phrase(rng, name, None, negative=no, question=question)
            if not thing.definite:
                break
    base = verb_name
    clause = Clause(
        subject,
        Verb(f"{base}/{base}s/found/found/{base}ing", "", ()),
        "past" if past else "present",
        thing,
        negative=no,
        contracted=short,
    )
    last = {
        "need": "चाहिए",
        "like": join("पसंद", "नहीं" * no, is_now(thing.agree)),
        "find": perfective("मिल", thing.agree),
    }[verb_name]
    shown = thing.direct
    h = join(
        "क्या" * question,
        with_postposition(subject, "को"),
        shown,
        "नहीं" * (no and verb_name != "like"),
        last,
    )
    e = english_question(clause) if question else english_statement(clause)
    return Pair(*finish(e, h, question), clause.combinations, "dative")


WH_MAKERS = [
    "who",
    "what",
    "where",
    "where_be",
    "when",
    "why",
    "whose",
    "how_many",
    "which",
    "how",
    "price",
]


def wh_question(rng: random.Random) -> Pair:
    """Question words stand right before the verb, whatever they ask for."""
    kind = rng.choice(WH_MAKERS)
    tenses = {"progressive": 2, "past": 3, "future": 2, "past progressive": 0.7}
    tense = pick(rng, tenses)
    if kind in ("whose", "how_many", "how", "price", "where_be"):
        return wh_copula(rng, kind)
    if kind == "who":
        return who_question(rng, tense)
    if kind in ("what", "which"):
        frame = rng.choice([v for v in VERBS if v.name in WHAT_VERBS])
        if kind == "which" and frame.name in ("drink", "cook"):
            return wh_question(rng)
        if tense not in tenses_of(frame):
            tense = "past"
        subject = definite_subject(rng, frame, True)
        if kind == "what":
            clause = Clause(subject, frame, tense, time=wh_time(rng, frame, tense))
            e, h = english_question(clause, "what"), hindi_clause(clause, "क्या")
        else:
            name = rng.choice(
                [
                    n
                    for n in frame.objects
                    if not NOUNS[n].mass
                    and NOUNS[n].group not in HUMAN_GROUPS + ANIMAL_GROUPS
                ]
            )
            thing = noun_phrase(name, "", plural=NOUNS[name].plural_only)
            clause = Clause(
                subject, frame, tense, thing, time=wh_time(rng, frame, tense)
            )
            which = (
                "कौन-से"
                if thing.plural or thing.agree.number == "pl"
                else ("कौन-सी" if thing.agree.gender == F else "कौन-सा")
            )
            if thing.agree.gender == F:
                which = "कौन-सी"
            shown = replace(thing, direct=f"{which} {thing.direct}")
            h = hindi_clause(replace(clause, object=shown))
            e = english_question(replace(clause, object=None), f"which {thing.english}")
        return Pair(*finish(e, h, True), clause.combinations, "wh")
    if kind == "where":
        frame = rng.choice([v for v in VERBS if v.name in WHERE_VERBS])
        wanted = tense if tense in tenses_of(frame) else list(tenses_of(frame))[0]
        clause = random_clause(
            rng, verb=frame, tense=wanted, negative=False, question=True, bare=True
        )
        clause = replace(clause, place=NOTHING)
        word, hindi = "where", "कहाँ"
    elif kind == "when":
        frame = (
            GO
            if chance(rng, 0.4)
            else rng.choice(
                [
                    v
                    for v in VERBS
                    if v.places and not v.has("needplace") and not v.objects
                ]
            )
        )
        wanted = rng.choice(["past", "future"])
        if wanted not in tenses_of(frame):
            return wh_question(rng)
        clause = random_clause(
            rng, verb=frame, tense=wanted, negative=False, question=True, bare=True
        )
        if frame is GO:
            clause = replace(clause, place=goal(rng, GO))
        word, hindi = "when", "कब"
    else:
        frame = choose_verb(rng)
        wanted = rng.choice(["progressive", "progressive", "past"])
        if wanted not in tenses_of(frame):
            return wh_question(rng)
        clause = random_clause(
            rng,
            verb=frame,
            tense=wanted,
            negative=chance(rng, 0.15),
            question=True,
            bare=True,
        )
        word, hindi = "why", "क्यों"
    e, h = english_question(clause, word), hindi_clause(clause, hindi)
    return Pair(*finish(e, h, True), clause.combinations, "wh")


WHAT_VERBS = (
    "eat drink read write buy sell bring make cut throw look_for cook draw pick_up "
    "sing wash hide".replace("_for", " for").split()
)
WHAT_VERBS = [
    "eat",
    "drink",
    "read",
    "write",
    "buy",
    "sell",
    "bring",
    "make",
    "cut",
    "look for",
    "cook",
    "draw",
    "pick up",
    "wash",
    "hide",
    "choose",
    "repair",
]
WHERE_VERBS = [
    "live",
    "play",
    "work",
    "sleep",
    "sit",
    "study",
    "walk",
    "swim",
    "dance",
    "rest",
    "stand",
]


def wh_time(rng: random.Random, frame: Verb, tense: str) -> Adjunct:
    return choose_time(rng, frame, tense) if chance(rng, 0.5) else NOTHING


def who_question(rng: random.Random, tense: str) -> Pair:
    """Who …? कौन stands before the verb, किसने after a definite object."""
    frame = choose_verb(rng)
    if (
        tense not in tenses_of(frame)
        or frame.has("stative")
        or not fits(name_phrase("Ravi"), frame)
    ):
        return who_question(rng, tense)
    who = Phrase("who", "कौन", "किस", DEFAULT, human=True, living=True)
    clause = random_clause(
        rng,
        verb=frame,
        tense=tense,
        subject=name_phrase("Ravi"),
        negative=False,
        bare=not chance(rng, 0.4),
    )
    thing = clause.object
    if thing is not None and (not thing.definite or thing.possessive):
        return who_question(rng, tense)
    if (
        clause.place.english
        and thing is not None
        or "his" in clause.place.english.split()
    ):
        return who_question(rng, tense)
    clause = replace(clause, subject=who, frequency="", companion=NOTHING)
    e = english_statement(clause)
    asked = "किसने" if is_ergative(clause) else "कौन"
    words, _ = object_words(clause)
    place = ("", clause.place.hindi) if frame.has("goal") else (clause.place.hindi, "")
    verb_words = join(asked, hindi_verb(clause))
    if place[1] or frame.case:
        verb_words = join(place[1], hindi_verb(clause, asked))
    h = join(clause.time.hindi, place[0], words, verb_words)
    return Pair(*finish(e, h, True), clause.combinations, "wh")


def wh_copula(rng: random.Random, kind: str) -> Pair:
    """Where is X, whose Y is this, how many Ys …, how is X, how much is X."""
    past = chance(rng, 0.15)
    if kind == "where_be":
        if chance(rng, 0.5):
            subject = definite_subject(rng, GIVE, True)
        else:
            subject = definite_thing(
                rng,
                rng.choice(
                    words_of(
                        "@desk @toy @object @vehicle @clothing bank school hospital "
                        "station shop "
                        "library book letter"
                    )
                ),
            )
        past = past and subject.human
        e = join("where", be_form(subject, past), subject.english)
        h = join(
            subject.direct, "कहाँ", was(subject.agree) if past else is_now(subject.agree)
        )
        return Pair(*finish(e, h, True), subject.combinations, "wh")
    if kind == "how":
        subject = definite_subject(rng, GIVE, True)
        e = join("how", be_form(subject), subject.english)
        how = inflect("कैसा", subject.agree.gender, subject.agree.number)
        h = join(subject.direct, how, is_now(subject.agree))
        return Pair(*finish(e, h, True), subject.combinations, "wh")
    if kind == "price":
        name = rng.choice(
            words_of(
                "@fruit @clothing @desk @toy bag umbrella clock ring "
                "bicycle chair table book phone blanket necklace"
            )
        )
        plural = NOUNS[name].plural_only or chance(rng, 0.4)
        adjective = some_adjective(rng, name, 0.25, "buy")
        if adjective and adjective.english in ("cheap", "expensive", "old", "sour"):
            adjective = None
        thing = noun_phrase(
            name, "these" if plural else "this", plural=plural, adjective=adjective
        )
        agree = thing.agree
        e = join("how much", "are" if plural else "is", thing.english)
        h = join(
            thing.direct,
            "कितने",
            inflect("का", agree.gender, agree.number),
            is_now(agree),
        )
        return Pair(*finish(e, h, True), thing.combinations, "wh")
    if kind == "whose":
        name = rng.choice(
            words_of(
                "@desk @clothing @toy @vessel @object @vehicle @pet "
                "house book letter chair"
            )
        )
        plural = NOUNS[name].plural_only or chance(rng, 0.3)
        thing = noun_phrase(
            name, "", plural=plural, adjective=some_adjective(rng, name, 0.2)
        )
        agree = thing.agree
        near = chance(rng, 0.6)
        word = (
            ("these" if near else "those") if plural else ("this" if near else "that")
        )
        e = join("whose", thing.english, "are" if plural else "is", word)
        h = join(
            DEMONSTRATIVES[word][0],
            inflect("किसका", agree.gender, agree.number),
            thing.direct,
            is_now(agree),
        )
        return Pair(*finish(e, h, True), thing.combinations, "wh")
    spec = rng.choice([s for s in LOCATIONS if "shop bank" not in s])
    name = rng.choice([n for n in words_of(spec) if not NOUNS[n].mass])
    if NOUNS[name].plural_only or NOUNS[name].group in KIN_GROUPS:
        return wh_copula(rng, kind)
    thing = noun_phrase(name, "", plural=True)
    many = "कितनी" if thing.agree.gender == F else "कितने"
    if chance(rng, 0.5) and name in HAVINGS:
        subject = definite_subject(rng, GIVE, True)
        helper = "do" if subject.plural else "does"
        e = join("how many", thing.english, helper, subject.english, "have")
        h = join(with_postposition(subject, "के पास"), many, thing.direct, "हैं")
        found = (*subject.combinations, ("verb-object", "have", name))
        return Pair(*finish(e, h, True), found, "wh")
    while True:
        place = place_adjunct(rng, LOCATIONS[spec])
        if place.combinations[0][2] != name:
            break
    last = was(thing.agree) if past else is_now(thing.agree)
    e = join(
        "how many", thing.english, "were" if past else "are", "there", place.english
    )
    h = join(place.hindi, many, thing.direct, last)
    return Pair(*finish(e, h, True), place.combinations, "wh")


def imperative(rng: random.Random) -> Pair:
    """Please open (खोलिए), open (खोलो), do not open (मत खोलो), please do not (न खोलें).

    English "please" asks for the polite form (आप); without it the order is to तुम.
    """
    frame = rng.choice([v for v in VERBS if v.has("command")] + [GO, GIVE, SHOW])
    polite, no = chance(rng, 0.5), chance(rng, 0.25)
    you = pronoun("you")
    thing = recipient = None
    place = NOTHING
    if frame is GO or frame.name == "come":
        place = goal(rng, GO)
    if frame.objects:
        thing = choose_object(rng, frame, you, definite=True, negative=no)
        while (
            not thing.definite
            and not NOUNS[thing.noun].mass
            or (
                thing.human
                and not thing.pronoun
                and thing.noun in NOUNS
                and NOUNS[thing.noun].group not in KIN_GROUPS + ("esteemed",)
                and thing.english.split()[0] not in ("the", "this", "that")
            )
        ):
            thing = choose_object(rng, frame, you, definite=True, negative=no)
    if frame in (GIVE, SHOW):
        name = rng.choice(GIFTS if frame is GIVE else SHOWN)
        thing = thing_phrase(rng, name, you, definite=True, verb_name="give")
        recipient = pronoun(rng.choice(["I", "I", "he", "she", "they", "we"]))
        if chance(rng, 0.3):
            recipient = name_phrase(rng.choice(list(NAMES)))
    if frame.places and (frame.has("needplace") or (not no and chance(rng, 0.2))):
        while place is NOTHING or " the " not in place.english:
            place = place_adjunct(rng, frame.places, you)
    clause = Clause(
        you,
        frame,
        "present",
        thing,
        recipient,
        place,
        gone=frame is GO or frame.name == "come",
    )
    words, _ = object_words(clause)
    root, light = frame.root, frame.light
    if no:
        order = (
            f"न {subjunctive(root, you.agree)}"
            if polite
            else (f"मत {familiar_imperative(root)}")
        )
    else:
        order = polite_imperative(root) if polite else familiar_imperative(root)
    goal_last = clause.gone or frame.has("goal")
    h = join(
        "कृपया" * polite,
        "" if goal_last else place.hindi,
        with_postposition(recipient, "को") if recipient else "",
        words,
        place.hindi if goal_last else "",
        light,
        order,
    )
    negation = rng.choice(["do not", "don't"]) if no else ""
    e = join("please" * polite, negation, frame.name, english_tail(clause))
    found = tuple(c for c in clause.combinations if c[0] != "subject-verb")
    return Pair(*finish(e, h), found, "imperative")


COMPARATIVES = {
    "big": "bigger",
    "small": "smaller",
    "tall": "taller",
    "old": "older",
    "beautiful": "more beautiful",
    "heavy": "heavier",
    "cheap": "cheaper",
    "expensive": "more expensive",
    "clever": "cleverer",
    "kind": "kinder",
    "sweet": "sweeter",
    "long": "longer",
    "interesting": "more interesting",
    "clean": "cleaner",
    "strong": "stronger",
    "high": "higher",
    "brave": "braver",
    "rich": "richer",
    "poor": "poorer",
    "honest": "more honest",
    "quiet": "quieter",
    "deep": "deeper",
    "tasty": "tastier",
    "lazy": "lazier",
    "good": "better",
}
SUPERLATIVES = {
    key: "best"
    if key == "good"
    else value.replace("more ", "most ").removesuffix("er")
    + ("" if value.startswith("more") else "est")
    for key, value in COMPARATIVES.items()
}
HUMAN_QUALITIES = {
    "tall": "लंबा",
    "clever": "चतुर",
    "kind": "दयालु",
    "brave": "बहादुर",
    "honest": "ईमानदार",
    "rich": "अमीर",
    "lazy": "आलसी",
}


def more(adjective: str, agree: Agreement) -> str:
    """The comparative: adjectives in -ā stand bare (से लंबा), others take ज़्यादा."""
    inflected = inflect(adjective, agree.gender, agree.number)
    return inflected if adjective.endswith("ा") else "ज़्यादा " + inflected


def comparison(rng: random.Random) -> Pair:
    """A is taller than B: A B से लंबा है; the tallest boy: सबसे लंबा लड़का."""
    kind = pick(rng, {"people": 2, "things": 2, "superlative": 2})
    no, short = chance(rng, 0.12), chance(rng, 0.5)
    question = chance(rng, 0.12)
    if kind == "superlative":
        return superlative(rng)
    if kind == "people":
        first = definite_subject(rng, GIVE, question)
        if first.plural and first.pronoun != "you" or first.possessive:
            return comparison(rng)
        if first.combinations:
            return comparison(rng)
        if chance(rng, 0.5):
            second = name_phrase(rng.choice([n for n in NAMES if n != first.noun]))
        else:
            kin = rng.choice(words_of("@kin @peer @elder"))
            second = owned_phrase(rng, kin, first, 0.8)
        english = rng.choice(list(HUMAN_QUALITIES))
        hindi = HUMAN_QUALITIES[english]
        found = first.combinations + second.combinations
    else:
        adjective = rng.choice([a for a in ADJECTIVES if a.english in COMPARATIVES])
        names = [n for n in adjective.nouns if NOUNS[n].group not in HUMAN_GROUPS]
        if len(names) < 2 or adjective.english in ("good",):
            return comparison(rng)
        name = rng.choice(names)
        group = NOUNS[name].group
        same = [n for n in names if NOUNS[n].group == group and n != name]
        plural = not NOUNS[name].mass and chance(rng, 0.2) or NOUNS[name].plural_only
        first = noun_phrase(name, "these" if plural else "this", plural=plural)
        if same and chance(rng, 0.7):
            other = rng.choice(same)
            second = noun_phrase(other, "those" if NOUNS[other].plural_only else "that")
        else:
            second = owned_phrase(rng, name, None, plural=plural)
            if (
                NOUNS[name].mass
                or not plural
                and NOUNS[name].group not in (OWNED_GROUPS + ["place"])
                or NOUNS[name].group == "place"
                and name not in OWNABLE_PLACES
            ):
                return comparison(rng)
        english, hindi = adjective.english, adjective.hindi
        found = (("adjective-noun", english, name), *first.combinations)
    quality = more(hindi, first.agree)
    e, h = copula_words(
        first,
        f"{COMPARATIVES[english]} than {second.as_object}",
        f"{with_postposition(second, 'से')} {quality}",
        False,
        no,
        short,
        question,
    )
    return Pair(*finish(e, h, question), found, "comparison")


def superlative(rng: random.Random) -> Pair:
    """Ravi is the tallest boy in the village: … गाँव का सबसे लंबा लड़का है."""
    if chance(rng, 0.5):
        name = rng.choice(["boy", "girl", "student", "man", "woman"])
        gender = NOUNS[name].gender
        subject = name_phrase(
            rng.choice([n for n, (_, g) in NAMES.items() if g == gender])
        )
        qualities = [q for q in HUMAN_QUALITIES if q not in ("lazy",)]
        english = rng.choice(qualities)
        hindi = HUMAN_QUALITIES[english]
        place = rng.choice(["village", "city", "school"])
        if place == "school" and name in ("man", "woman"):
            place = "village"
        found = (("adjective-noun", english, name),)
    else:
        adjective = rng.choice(
            [
                a
                for a in ADJECTIVES
                if a.english
                in [
                    "big",
                    "beautiful",
                    "old",
                    "high",
                    "long",
                    "deep",
                    "expensive",
                    "clean",
                ]
                and a.hindi != "बूढ़ा"
            ]
        )
        names = [
            n
            for n in adjective.nouns
            if NOUNS[n].group == "place"
            and n not in ("room", "kitchen", "field", "roof", "city", "village")
        ]
        if not names:
            return superlative(rng)
        name = rng.choice(names)
        english, hindi = adjective.english, adjective.hindi
        subject = Phrase("this", "यह", "इस", Agreement(3, NOUNS[name].gender))
        place = rng.choice(["village", "city"])
        found = (("adjective-noun", english, name),)
    noun = NOUNS[name]
    where = noun_phrase(place, "the")
    best = f"the {SUPERLATIVES[english]} {noun.english} in {where.english}"
    words = join(
        genitive(where, subject.agree),
        "सबसे",
        inflect(hindi, noun.gender, "sg"),
        noun.forms[0],
    )
    question = chance(rng, 0.15)
    e, h = copula_words(subject, best, words, False, False, False, question)
    return Pair(*finish(e, h, question), found, "comparison")


def relative(rng: random.Random) -> Pair:
    """The boy who …: जो लड़का …, वह …; the book that I bought: जो किताब …, वह …."""
    if chance(rng, 0.5):
        return relative_person(rng)
    frame = rng.choice(
        [
            v
            for v in VERBS
            if v.name
            in (
                "read",
                "buy",
                "write",
                "bring",
                "eat",
                "wear",
                "make",
                "sell",
                "choose",
                "repair",
                "draw",
                "wash",
                "send",
            )
        ]
    )
    name = rng.choice(
        [n for n in frame.objects if n in OF_THINGS and NOUNS[n].group != "pet"]
    )
    noun = NOUNS[name]
    plural = noun.plural_only or (not noun.mass and chance(rng, 0.25))
    head = noun_phrase(name, "", plural=plural)
    who = definite_subject(rng, frame)
    while who.english.startswith(("that ", "those ")):
        who = definite_subject(rng, frame)
    clause = Clause(who, frame, "past", None, time=wh_time(rng, frame, "past"))
    adjective = rng.choice(OF_THINGS[name])
    agree = head.agree
    past = chance(rng, 0.3)
    target = Clause(who, frame, "past", head, time=clause.time)
    be = "were" if past and plural else "was" if past else "are" if plural else "is"
    e = join(
        "the", head.english, "that", english_statement(clause), be, adjective.english
    )
    again = "वे" if agree.number == "pl" else "वह"
    subject = subject_words(target)
    h = join("जो", head.direct, subject, clause.time.hindi, hindi_verb(target)) + join(
        ",",
        again,
        inflect(adjective.hindi, agree.gender, agree.number),
        was(agree) if past else is_now(agree),
    )
    found = (*target.combinations, ("adjective-noun", adjective.english, name))
    return Pair(*finish(e, h), found, "relative")


OF_THINGS = {
    name: [
        a
        for a in ADJECTIVES_OF[name]
        if a.english not in ("dirty", "ripe", "empty", "small", "high", "fresh")
    ]
    for name in words_of(
        "@text @clothing @fruit @dish @desk @toy table chair bag umbrella "
        "picture ring bicycle clock tea juice gift clothes blanket phone"
    )
    if [
        a
        for a in ADJECTIVES_OF[name]
        if a.english not in ("dirty", "ripe", "empty", "small", "high", "fresh")
    ]
}


def relative_person(rng: random.Random) -> Pair:
    """The boy who is playing is Ravi's brother; जिस with ने in the perfective."""
    while True:
        tense = rng.choice(["progressive", "progressive", "past"])
        frame = choose_verb(rng)
        if tense in tenses_of(frame) and not frame.has("stative"):
            break
    names = [
        n for n in frame.subjects if NOUNS[n].group in ("person", "worker", "visitor")
    ]
    if not names:
        return relative_person(rng)
    name = rng.choice(names)
    plural = chance(rng, 0.2)
    head = noun_phrase(name, "", plural=plural)
    clause = random_clause(
        rng,
        verb=frame,
        subject=head,
        tense=tense,
        negative=False,
        bare=chance(rng, 0.4),
    )
    if "his" in english_tail(clause).split() or "her" in english_tail(clause).split():
        return relative_person(rng)
    if (clause.object and clause.object.possessive) or "their" in english_tail(clause):
        return relative_person(rng)
    clause = replace(clause, companion=NOTHING, frequency="")
    agree = head.agree
    ergative = is_ergative(clause)
    who = ("जिन" if plural else "जिस") if ergative else "जो"
    subject = f"{who} {head.oblique} ने" if ergative else f"{who} {head.direct}"
    inner = hindi_clause(clause).removeprefix(subject_words(clause)).strip()
    again = "वे" if plural else "वह"
    combos = clause.combinations
    if chance(rng, 0.5) and not plural:
        group = rng.choice(["kin", "peer"])
        kin = rng.choice(
            [n for n in words_of("@" + group) if NOUNS[n].gender == agree.gender]
            or ["friend"]
        )
        if NOUNS[kin].gender != agree.gender:
            return relative_person(rng)
        while True:
            owner = owned_phrase(rng, kin, None)
            if not owner.plural:
                break
        rest, hindi = owner.english, owner.direct
    else:
        adjectives = [
            a
            for a in ADJECTIVES_OF[name]
            if a.english not in ("hungry", "thirsty", "small", "new")
        ]
        if not adjectives:
            return relative_person(rng)
        adjective = rng.choice(adjectives)
        rest = adjective.english
        hindi = inflect(adjective.hindi, agree.gender, agree.number)
        combos = (*combos, ("adjective-noun", rest, name))
    english = english_statement(clause).removeprefix(head.english).strip()
    e = join("the", head.english, "who", english, "are" if plural else "is", rest)
    h = join(subject, inner) + join(",", again, hindi, is_now(agree))
    return Pair(*finish(e, h), combos, "relative")


# ------------------------------------------------------------------------- compounds


def again(subject: Phrase) -> Phrase:
    """The pronoun that takes a subject up in the next clause."""
    return pronoun(subject.refers)


def plain_subject(rng: random.Random, verb: Verb) -> Phrase:
    """A definite human subject that a pronoun can take up; no honoured elder."""
    while True:
        found = definite_subject(rng, verb)
        honoured = found.agree.number == "pl" and not found.plural and not found.pronoun
        if found.human and not honoured:
            return found


def verb_named(name: str, objects: bool = True) -> Verb:
    return next(v for v in VERBS if v.name == name and bool(v.objects) == objects)


def statement(clause: Clause) -> tuple[str, str]:
    return english_statement(clause), hindi_clause(clause)


def linked(first, second, english: str, hindi: str, combinations) -> Pair:
    """Two spelled clauses with a conjunction ("," in it where one is due)."""
    e = first[0] + english + " " + low(second[0])
    h = first[1] + hindi + " " + second[1]
    return Pair(*finish(e, h), tuple(dict.fromkeys(combinations)), "compound")


def state(subject: Phrase, word: str, past: bool) -> tuple[str, str]:
    """X is (was) hungry, tired, ill …"""
    needs = {"hungry": "भूख", "thirsty": "प्यास"}
    if word in needs:
        e = join(subject.english, be_form(subject, past), word)
        h = join(
            with_postposition(subject, "को"), needs[word], "लगी", "थी" if past else "है"
        )
        return e, h
    quality = inflect(MOODS[word], subject.agree.gender, subject.agree.number)
    return copula_words(subject, word, quality, past, False, False)


def script_hungry(rng: random.Random) -> Pair:
    """X was hungry, so he ate something."""
    word, verb_name = rng.choice([("hungry", "eat"), ("thirsty", "drink")])
    frame = verb_named(verb_name)
    who = plain_subject(rng, frame)
    past = chance(rng, 0.7)
    clause = random_clause(
        rng,
        verb=frame,
        subject=again(who),
        negative=False,
        bare=True,
        tense="past" if past else "want",
    )
    if clause.object.possessive:
        return script_hungry(rng)
    found = who.combinations + clause.combinations
    return linked(state(who, word, past), statement(clause), ", so", ", इसलिए", found)


def script_tired(rng: random.Random) -> Pair:
    """X was tired, so she rested under the tree."""
    word, names = rng.choice(
        [
            ("tired", ["rest", "sit"]),
            ("ill", ["rest"]),
            ("happy", ["dance", "laugh", "sing", "smile"]),
            ("sad", ["cry"]),
            ("angry", ["scold"]),
            ("busy", ["come"]),
        ]
    )
    verb_name = rng.choice(names)
    frame = verb_named(verb_name, verb_name in ("sing", "scold"))
    who = plain_subject(rng, GIVE)
    clause = random_clause(
        rng,
        verb=replace(frame, subjects=GIVE.subjects),
        subject=again(who),
        tense="past",
        negative=verb_name == "come",
        bare=chance(rng, 0.4),
    )
    if clause.object is not None and (
        clause.object.possessive or not clause.object.definite
    ):
        return script_tired(rng)
    found = who.combinations + clause.combinations
    return linked(state(who, word, True), statement(clause), ", so", ", इसलिए", found)


def script_because(rng: random.Random) -> Pair:
    """X did not go to school because he was ill; also can and will."""
    tense = rng.choice(["past", "past", "future", "can"])
    words = ["ill", "tired", "busy"] + ["angry", "sad"] * (tense == "past")
    word = rng.choice(words)
    frame = (
        GO
        if chance(rng, 0.5)
        else verb_named(
            rng.choice(
                ["play", "study", "work", "swim", "run", "dance", "come", "sleep"][:7]
            ),
            False,
        )
    )
    who = plain_subject(rng, GIVE)
    clause = (
        random_clause(rng, verb=frame, subject=who, tense=tense, negative=True)
        if fits(who, frame)
        else None
    )
    if clause is None:
        return script_because(rng)
    if frame is GO:
        clause = replace(clause, place=goal(rng, GO), gone=True)
    clause = replace(clause, companion=NOTHING)
    second = state(again(who), word, tense == "past")
    return linked(statement(clause), second, " because", " क्योंकि", clause.combinations)


def script_market(rng: random.Random) -> Pair:
    """X went to the market and bought something: ने comes with the second verb."""
    frame, where = rng.choice(
        [
            (verb_named("buy"), "market shop city"),
            (verb_named("meet"), "park market city temple"),
            (verb_named("read"), "library"),
            (verb_named("choose"), "market shop"),
        ]
    )
    tense = rng.choice(["past", "past", "future"])
    who = plain_subject(rng, GIVE)
    going = Clause(who, GO, tense, gone=True, time=choose_time(rng, GO, tense))
    name = rng.choice(where.split())
    place = noun_phrase(name, "the")
    going = replace(
        going,
        place=Adjunct(
            f"to {place.english}", place.oblique, (("preposition-place", "to", name),)
        ),
    )
    going = replace(going, place=replace(going.place, english="to " + place.english))
    second = random_clause(
        rng, verb=frame, subject=again(who), tense=tense, negative=False, bare=True
    )
    if second.object.possessive and second.object.noun not in NOUNS:
        return script_market(rng)
    english = english_statement(second).removeprefix(second.subject.english + " ")
    english = english.removeprefix("will ")
    e, h = statement(going)
    e = f"{e} and {english}"
    subject = subject_words(second) + " " if is_ergative(second) else ""
    rest = hindi_clause(second).removeprefix(subject_words(second) + " ")
    h = f"{h} और {subject}{rest}"
    if going.time.english:
        e = join(
            english_statement(replace(going, time=NOTHING)),
            "and",
            english,
            going.time.english,
        )
    return Pair(*finish(e, h), going.combinations + second.combinations, "compound")


def script_gift(rng: random.Random) -> Pair:
    """X bought a book and gave it to his mother: the object is not repeated."""
    name = rng.choice(
        words_of(
            "@toy @clothing @desk book flower ring bag umbrella blanket "
            "necklace sweet phone gift"
        )
    )
    frame = verb_named("buy")
    if name not in frame.objects or NOUNS[name].plural_only:
        return script_gift(rng)
    who = plain_subject(rng, GIVE)
    adjective = some_adjective(rng, name, 0.35, "buy")
    determiner = rng.choice(["a", "a", "a", "two", "three"])
    thing = noun_phrase(name, determiner, adjective=adjective)
    tense = rng.choice(["past", "past", "past", "future"])
    first = Clause(who, frame, tense, thing)
    kin = rng.choice(words_of("@kin @peer @elder"))
    to = owned_phrase(rng, kin, who, 1.0)
    given = "gave" if tense == "past" else "give"
    e = join(
        english_statement(first),
        "and",
        given,
        "it" if not thing.plural else "them",
        "to",
        to.english,
    )
    verb_form = (
        perfective("दे", thing.agree) if tense == "past" else future("दे", who.agree)
    )
    h = join(hindi_clause(first), "और", with_postposition(to, "को"), verb_form)
    return Pair(*finish(e, h), first.combinations + to.combinations, "compound")


def script_while(rng: random.Random) -> Pair:
    """X is reading and Y is sleeping: two scenes at the same time."""
    tense = rng.choice(["progressive", "past progressive"])
    clauses = []
    for _ in range(2):
        frame = choose_verb(rng)
        while (
            tense not in tenses_of(frame) or frame.has("goal") or frame.name == "come"
        ):
            frame = choose_verb(rng)
        people = tuple(n for n in frame.subjects if NOUNS[n].group in HUMAN_GROUPS)
        if len(people) < 5:
            return script_while(rng)
        clauses.append(
            random_clause(
                rng,
                verb=replace(frame, subjects=people),
                tense=tense,
                negative=False,
                bare=chance(rng, 0.3),
            )
        )
    first, second = clauses
    one, two = first.subject, second.subject
    same = one.refers == two.refers and (one.pronoun or two.pronoun)
    if same or one.noun == two.noun != "" or first.verb.name == second.verb.name:
        return script_while(rng)
    if not (one.definite and two.definite):
        return script_while(rng)
    if " that " in english_tail(first) + english_tail(second):
        return script_while(rng)
    if second.object is not None and (
        second.object.pronoun or second.object.possessive
    ):
        return script_while(rng)
    second = replace(second, time=NOTHING)
    first = replace(first, time=NOTHING)
    found = first.combinations + second.combinations
    return linked(statement(first), statement(second), " and", " और", found)


SAME_VERBS = {  # what two people do alike, with comparable things
    "eat": "@fruit @dish",
    "drink": "@drink",
    "buy": "@fruit @vegetable @clothing @toy @desk",
    "read": "@text",
    "peel": "potato carrot banana orange",
    "wash": "@clothing cup plate glass",
    "draw": "picture map",
    "bring": "@fruit @desk",
    "write": "letter poem story",
}


def script_same(rng: random.Random) -> Pair:
    """X ate an apple, but Y ate a banana: one verb, two subjects and two objects."""
    verb_name = rng.choice(list(SAME_VERBS))
    frame = verb_named(verb_name)
    tense = rng.choice(["past", "past", "progressive", "future", "present"])
    group = rng.choice(SAME_VERBS[verb_name].split())
    names = words_of(SAME_VERBS[verb_name] if group[0] != "@" else group)
    names = [n for n in names if n in frame.objects and not NOUNS[n].plural_only]
    number = rng.choice(["a", "a", "a", "two", "three", ""])
    if tense == "present" or NOUNS[names[0]].mass:
        number = ""
    clauses = []
    for name in rng.sample(names, 2):
        who = plain_subject(rng, frame)
        while not fits(who, frame):
            who = plain_subject(rng, frame)
        plural = number == "" and not NOUNS[name].mass
        thing = noun_phrase(name, number, plural=plural)
        clauses.append(Clause(who, frame, tense, thing))
    first, second = clauses
    one, two = first.subject, second.subject
    if one.refers == two.refers and (
        one.pronoun or two.pronoun or one.noun == two.noun
    ):
        return script_same(rng)
    english, hindi = rng.choice([(" and", " और"), (", but", ", लेकिन")])
    found = first.combinations + second.combinations
    return linked(statement(first), statement(second), english, hindi, found)


def script_like(rng: random.Random) -> Pair:
    """X likes tea, but he does not like coffee."""
    who = plain_subject(rng, GIVE)
    groups = rng.choice(["@drink", "@fruit", "@dish", "@text", "@vegetable"])
    first, second = rng.sample(words_of(groups), 2)
    one, two = (noun_phrase(n, "", plural=not NOUNS[n].mass) for n in (first, second))
    like = Verb("like/likes/liked/liked/liking", "", ())
    a = Clause(who, like, "present", one)
    b = Clause(
        again(who), like, "present", two, negative=True, contracted=chance(rng, 0.5)
    )
    h1 = join(with_postposition(who, "को"), one.direct, "पसंद", is_now(one.agree))
    h2 = join(
        with_postposition(b.subject, "को"), two.direct, "पसंद नहीं", is_now(two.agree)
    )
    return linked(
        (english_statement(a), h1),
        (english_statement(b), h2),
        ", but",
        ", लेकिन",
        a.combinations + b.combinations,
    )


def script_money(rng: random.Random) -> Pair:
    """X wants to buy a bicycle, but he does not have any money."""
    frame = verb_named("buy")
    who = plain_subject(rng, frame)
    clause = random_clause(
        rng, verb=frame, subject=who, tense="want", negative=False, bare=True
    )
    if clause.object.possessive:
        return script_money(rng)
    short = chance(rng, 0.5)
    owner = again(who)
    singular = not owner.plural and owner.pronoun != "I"
    e = join(owner.english, negated("does" if singular else "do", short), "have money")
    h = join(with_postposition(owner, "के पास"), "पैसे नहीं हैं")
    return linked(
        statement(clause),
        (e, h),
        ", but",
        ", लेकिन",
        (*clause.combinations, ("verb-object", "have", "money")),
    )


def script_rain(rng: random.Random) -> Pair:
    """It was raining, so X stayed at home / did not go out; if it rains …"""
    who = plain_subject(rng, GIVE)
    agree = who.agree
    if chance(rng, 0.5):
        if chance(rng, 0.5):
            second = (
                join(who.english, "stayed at home"),
                join(who.direct, "घर पर", perfective("रह", agree)),
            )
            found = who.combinations
        else:
            clause = Clause(
                who,
                GO,
                "past",
                place=goal(rng, GO),
                gone=True,
                negative=True,
                contracted=chance(rng, 0.5),
            )
            second, found = statement(clause), clause.combinations
        return linked(
            ("it was raining", "बारिश हो रही थी"), second, ", so", ", इसलिए", found
        )
    if chance(rng, 0.5):
        second = (
            join(who.english, "will stay at home"),
            join(who.direct, "घर पर", future("रह", agree)),
        )
        found = who.combinations
    else:
        clause = Clause(
            who,
            GO,
            "future",
            place=goal(rng, GO),
            gone=True,
            negative=True,
            contracted=chance(rng, 0.5),
        )
        second, found = statement(clause), clause.combinations
    return linked(("if it rains", "अगर बारिश होगी"), second, ",", ", तो", found)


def script_when(rng: random.Random) -> Pair:
    """When X came home, Y was cooking: जब …, तब …."""
    who = plain_subject(rng, GIVE)
    frame = choose_verb(rng)
    people = tuple(n for n in frame.subjects if NOUNS[n].group in HUMAN_GROUPS)
    if "past progressive" not in tenses_of(frame) or len(people) < 5:
        return script_when(rng)
    clause = random_clause(
        rng,
        verb=replace(frame, subjects=people),
        tense="past progressive",
        negative=False,
        bare=True,
    )
    subject = clause.subject
    if subject.pronoun and subject.refers == who.refers or not subject.definite:
        return script_when(rng)
    if subject.noun == who.noun != "" or (clause.object and clause.object.pronoun):
        return script_when(rng)
    e1 = join("when", who.english, "came home")
    h1 = join("जब", who.direct, "घर", perfective("आ", who.agree))
    return linked(
        (e1, h1), statement(clause), ",", ", तब", who.combinations + clause.combinations
    )


def script_says(rng: random.Random) -> Pair:
    """X says that Y will come tomorrow: कि."""
    who = plain_subject(rng, GIVE)
    while who.pronoun in ("I", "you", "we"):
        who = plain_subject(rng, GIVE)
    clause = random_clause(
        rng,
        tense=rng.choice(["future", "progressive", "past"]),
        negative=chance(rng, 0.15),
    )
    subject = clause.subject
    if not subject.definite or subject.noun == who.noun != "":
        return script_says(rng)
    if subject.english.startswith(("that ", "those ")) or not subject.human:
        return script_says(rng)
    singular = not who.plural and who.pronoun != "I"
    word, root = rng.choice([("say", "कह"), ("think", "सोच"), ("know", "जान")])
    e1 = join(who.english, word + "s" * singular, "that")
    h1 = join(who.direct, imperfective(root, who.agree), is_now(who.agree), "कि")
    return linked(
        (e1, h1), statement(clause), "", "", who.combinations + clause.combinations
    )


def script_search(rng: random.Random) -> Pair:
    """X looked for the key, but he did not find it."""
    frame = verb_named("look for")
    who = plain_subject(rng, frame)
    clause = random_clause(
        rng,
        verb=frame,
        subject=who,
        tense="past",
        negative=False,
        bare=chance(rng, 0.5),
    )
    thing = clause.object
    if not thing.definite:
        return script_search(rng)
    clause = replace(clause, time=NOTHING)
    it = "them" if thing.plural else "it"
    short = chance(rng, 0.5)
    owner = again(who)
    found = "वे" if thing.plural else "वह"
    e2 = join(owner.english, negated("did", short), "find", it)
    h2 = join(
        with_postposition(owner, "को"), found, "नहीं", perfective("मिल", thing.agree)
    )
    return linked(statement(clause), (e2, h2), ", but", ", लेकिन", clause.combinations)


SCRIPTS = {
    script_hungry: 1.6,
    script_tired: 1.4,
    script_because: 1.6,
    script_market: 1.6,
    script_gift: 1.5,
    script_while: 2.6,
    script_same: 1.5,
    script_like: 0.8,
    script_money: 0.8,
    script_rain: 0.8,
    script_when: 1.6,
    script_says: 1.6,
    script_search: 0.6,
}


def compound(rng: random.Random) -> Pair:
    """Two related clauses from one of the scripts."""
    return pick(rng, SCRIPTS)(rng)


CONSTRUCTIONS = {  # weights: simple clauses are about two thirds
    simple: 44,
    animals: 2,
    motion: 4,
    giving: 6,
    described: 8,
    located: 7,
    having: 4,
    dative: 4,
    wh_question: 5,
    imperative: 5,
    comparison: 3,
    relative: 3.5,
    compound: 20,
}


def pairs(seed: int = SEED) -> Iterator[Pair]:
    """Endless pairs, the same for the same seed on every supported Python."""
    rng = random.Random(seed)
    while True:
        yield pick(rng, CONSTRUCTIONS)(rng)


# ----------------------------------------------------------------------- romanising

CONSONANTS = dict(
    zip(
        "कखगघङचछजझञटठडढणतथदधनपफबभमयरलवशषसह",
        [
            "k",
            "kh",
            "g",
            "gh",
            "ṅ",
            "ch",
            "chh",
            "j",
            "jh",
            "ñ",
            "ṭ",
            "ṭh",
            "ḍ",
            "ḍh",
            "ṇ",
            "t",
            "th",
            "d",
            "dh",
            "n",
            "p",
            "ph",
            "b",
            "bh",
            "m",
            "y",
            "r",
            "l",
            "v",
            "sh",
            "ṣ",
            "s",
            "h",
        ],
        strict=True,
    )
)
NUKTA = {"क": "q", "ख": "kh", "ग": "g", "ज": "z", "ड": "ṛ", "ढ": "ṛh", "फ": "f"}
VOWELS = dict(
    zip(
        "अआइईउऊऋएऐओऔऑ",
        ["a", "ā", "i", "ī", "u", "ū", "ri", "e", "ai", "o", "au", "o"],
        strict=True,
    )
)
VOWEL_SIGNS = dict(
    zip(
        "ािीुूृेैोौॉ",
        ["ā", "i", "ī", "u", "ū", "ri", "e", "ai", "o", "au", "o"],
        strict=True,
    )
)
HOMORGANIC = {"p": "m", "b": "m", "m": "m"}


def romanise(hindi: str) -> str:
    """Devanagari in plain Latin letters: लड़के ने -> laṛke ne, सब्ज़ी -> sabzī.

    The unwritten vowel (a) is left out where Hindi does not say it: at the end of a
    word, and between VC and CV (the rule of Ohala 1983). ṁ marks a nasal vowel; before
    a stop it is the nasal of that stop. For figure labels on machines without a
    Devanagari font.
    """
    out, word = [], []
    for char in unicodedata.normalize("NFC", hindi) + "\0":
        if "\u0900" <= char <= "\u0963":
            word.append(char)
            continue
        out.append(romanise_word("".join(word)))
        word = []
        out.append({"।": ".", "\0": ""}.get(char, char))
    return "".join(out)


def romanise_word(word: str) -> str:
    """One word: units of consonants and a vowel, then schwa deletion."""
    units: list[list[str]] = []  # [consonants, vowel, nasal, "inherent" or ""]
    for char in word:
        if char in CONSONANTS:
            if units and units[-1][3] == "halant":
                units[-1][0] += CONSONANTS[char]
                units[-1][1], units[-1][3] = "a", "inherent"
                units[-1][4] += char
            else:
                units.append([CONSONANTS[char], "a", "", "inherent", char])
        elif char == "़":
            base = units[-1][4][-1]
            plain = CONSONANTS[base]
            units[-1][0] = units[-1][0].removesuffix(plain) + NUKTA.get(base, plain)
        elif char == "्":
            units[-1][1], units[-1][3] = "", "halant"
        elif char in VOWEL_SIGNS:
            units[-1][1], units[-1][3] = VOWEL_SIGNS[char], ""
        elif char in VOWELS:
            units.append(["", VOWELS[char], "", "", ""])
        elif char in "ंँ":
            units[-1][2] = char
    drop_schwas(units)
    letters = []
    for index, (consonants, vowel, nasal, _, _) in enumerate(units):
        letters.append(consonants + vowel)
        if nasal:
            after = units[index + 1][0] if index + 1 < len(units) else ""
            stop = nasal == "ं" and after and after[0] not in "shyrlvfz"
            letters.append((HOMORGANIC.get(after[0], "n")) if stop else "ṁ")
    return "".join(letters)


def drop_schwas(units: list[list[str]]) -> None:
    """Delete the inherent vowel finally and in VC_CV, from the right."""
    last = len(units) - 1
    if last > 0 and units[last][3] == "inherent" and not units[last][2]:
        cluster = len(units[last][4]) > 1
        if not (cluster and units[last][4][-1] in "रयवल"):
            units[last][1] = ""
    for i in range(last - 1, 0, -1):
        single = len(units[i][4]) == 1 and units[i][3] == "inherent" and not units[i][2]
        before = units[i - 1][1] != ""
        after = units[i + 1][1] != "" and len(units[i + 1][4]) == 1
        if single and before and after:
            units[i][1] = ""


# --------------------------------------------------------------------------- writing


def by_hand_sentences() -> set[str]:
    """The sentences of english_hindi.by_hand.tsv, which the corpus must not hold."""
    text = (HERE / "english_hindi.by_hand.tsv").read_text(encoding="utf-8")
    return {sentence for line in text.splitlines() for sentence in line.split("\t")}


def build(
    seed: int = SEED, train: int = TRAIN_PAIRS, test: int = TEST_PAIRS
) -> dict[str, list[Pair]]:
    """The two splits. A pair with a held-out combination is for the test split only.

    Both keep to the words that `well_attested` leaves. The test split leaves out pairs
    whose Hindi stands in the training split (another English sentence may share it).
    """
    apart = by_hand_sentences()
    seen: dict[str, str] = {}
    drawn: list[Pair] = []
    for pair in islice(pairs(seed), DRAWN_PAIRS):
        if pair.english in apart or pair.hindi in apart:
            continue
        if pair.english in seen:
            other = seen[pair.english]
            assert other == pair.hindi, f"{pair.english}: {other} / {pair.hindi}"
            continue
        seen[pair.english] = pair.hindi
        drawn.append(pair)
    kept: list[Pair] = []
    waiting: list[Pair] = []
    common = well_attested(drawn)
    apart_combinations = held_out_combinations(common)
    for pair in common:
        known = apart_combinations.isdisjoint(pair.combinations)
        (kept if known else waiting).append(pair)
    assert len(kept) >= train, f"only {len(kept)} training pairs"
    kept = kept[:train]
    hindi = {pair.hindi for pair in kept}
    words = {word for pair in kept for word in pair_words(pair)}
    fresh = [
        pair
        for pair in waiting
        if pair.hindi not in hindi and words.issuperset(pair_words(pair))
    ]
    assert len(fresh) >= test, f"only {len(fresh)} test pairs"
    rng = random.Random(seed + 1)
    rng.shuffle(fresh)
    return {"train": kept, "test": fresh[:test]}


def well_attested(drawn: list[Pair], share: float = RAREST_WORD) -> list[Pair]:
    """The pairs whose every word, on both sides, stands in at least `share` of them.

    Each pair that is dropped makes its other words rarer, so this repeats until no
    pair is dropped any more.
    """
    kept = [(pair, set(pair_words(pair))) for pair in drawn]
    while True:
        counts = Counter(word for _, words in kept for word in words)
        rare = {word for word, n in counts.items() if n < share * len(kept)}
        left = [(pair, words) for pair, words in kept if not words & rare]
        if len(left) == len(kept):
            return [pair for pair, _ in kept]
        kept = left


def pair_words(pair: Pair) -> list[str]:
    """The words of both sides without their punctuation."""
    text = f"{pair.english} {pair.hindi}"
    return [word.strip(".,?।").lower() for word in text.split()]


def as_tsv(split: list[Pair]) -> str:
    return "".join(f"{pair.english}\t{pair.hindi}\n" for pair in split)


def write_atomically(path: Path, text: str) -> None:
    """Write beside the file, then rename: a reader never sees half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--sample", type=int, metavar="N", help="print N pairs")
    parser.add_argument("--seed", type=int, default=SEED, help="for --sample")
    args = parser.parse_args(argv)
    if args.sample is not None:
        if args.sample < 1:
            parser.error(f"--sample must be at least 1, got {args.sample}")
        for _, pair in zip(range(args.sample), pairs(args.seed), strict=False):
            print(f"{pair.english}\t{pair.hindi}")
        return 0
    if not args.out.is_dir():
        parser.error(f"no such folder: {args.out}; create it first")
    texts = {FILES[name]: as_tsv(split) for name, split in build().items()}
    if args.check:
        different = [
            name
            for name, text in texts.items()
            if not (args.out / name).is_file()
            or (args.out / name).read_bytes() != text.encode()
        ]
        for name in different:
            print(
                f"{args.out / name} differs from what this program makes; run it "
                "without --check to write it anew",
                file=sys.stderr,
            )
        return 1 if different else 0
    for name, text in texts.items():
        write_atomically(args.out / name, text)
        print(
            f"{args.out / name}: {len(text.splitlines())} pairs, "
            f"{len(text.encode())} bytes"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
