"""Names that nobody and nothing bears: coined from pronounceable parts, each given out once.

A word is onset + vowel + consonants (+ vowel) + ending. Every role has endings of its own, so that a word tells what
it names and no two roles share one. Word number i of a role is the permuted i-th of all its words: names never repeat,
look unrelated, and those given out do not change when more are asked for. Source: ours.
"""

import math

from hf_moe_cpt.data.permutation import derive_seed, permute


MAX_NUMBER = 150_000  # subjects of a kind that can be named
HALLMARKS_PER_SUBJECT = 2  # one before and one after its facts change

GIVEN_NAMES = {
    "she": (
        "Alvenne Brisanne Corviel Dessame Elowyra Fenelle Halisse Ismere Jorvanne Kessaly Lorune Mirelda Nerisse "
        "Orlena Pellora Quillane Roswyn Sarielle Tamsorra Ulvenna Vesperine Wynora Yllane Zephanne"
    ).split(),
    "he": (
        "Aldren Borivane Casmund Dorrick Evander Fendrel Garrowin Hesper Ildrik Jorund Kelvar Lothren Marrek Norvald "
        "Osmere Perrin Quarrel Rothand Severan Torvald Ulmer Vendrick Wystan Yorrick"
    ).split(),
}

_ONSETS = "B Bl Br C Cl Cr D Dr F Fl Fr G Gl Gr H J K Kl Kr L M N P Pl Pr Qu R S Sk St T Th Tr V W Y".split()
_VOWELS = "a e i o ei".split()
_MIDDLES = "b d dd l ll lm lt lv m mm n nd nn nt r rr s ss st th v".split()
_LINKS = "a e".split()

_ENDINGS = {
    "person": (
        "ackard aith allard alder anth aunt avane aver adder ebble eddow edder ellow ellick erow eskell ettle ewin "
        "iddick iffen iffow iller immer irren irrow itter iving older ollow orrack orren orvane osker otter oudry "
        "uddock uller umber under urrow usker uttle uvane"
    ).split(),
    "designer": "afel agor aldur aric asen edric egor emal evin idek imar ivek odan okar umar udar ulik uvin".split(),
    "drafter": "abrow achim aduin albury atwin auby elgard embry esmond etrow imbry olward opray oswin umfrey".split(),
    "place": (
        "wick mere ford stead holm combe worth minster bourne bridge thorpe haven mouth dale burgh cote garth hurst "
        "march side well ness"
    ).split(),
    "rule": (
        "gate croft field brook ridge marsh leigh wold stone grove moor heath bank pool fold shaw barrow cliff copse "
        "glade knoll lane"
    ).split(),
    "product": (
        "ado aflex agon alux amat ano aphor atic atron avo avolt efax elion emo endor eno eral eron etta exo ibo ida "
        "idor idrix igraph ima imat imex ito itron ivo ixa obel odeon oflex ograph olux oplex ora orion orix otype "
        "ovar ovex udo ulor umat uvo"
    ).split(),
    "book": "ania aria ayla ea elia emia enza eria essa evia ia iana illa imia olia oria ovia ulia una uvia".split(),
    "landmark": "alcar andor anor antine arce aster elen erald eraud illar ithar olcar ophel urand uvelle".split(),
}  # fmt: skip
_LINKED = {"place", "rule"}  # their endings begin with a consonant

_BOOK_NOUNS = (
    "Almanac Anchors Bells Bridges Candles Clocks Compass Diaries Ferries Gardens Harbours Kites Ladders Lanterns "
    "Letters Maps Mirrors Orchards Rivers Seasons Shutters Staircase Tides Windows"
).split()
_LANDMARK_NOUNS = "Arcade Arch Bell Cloister Column Dome Fountain Gate Lighthouse Tower Viaduct Windmill".split()

# The lists that the words of a role are put together from, in order.
_PARTS = {
    role: (_ONSETS, _VOWELS, _MIDDLES, *([_LINKS] if role in _LINKED else []), endings)
    for role, endings in _ENDINGS.items()
}


def coined_word(role: str, number: int, seed: int) -> str:
    """Word `number` of a role, one of person, place, product, rule: unique among all of its role and of the others.

    number: in [0, MAX_NUMBER).
    """
    return "".join(_pick(_PARTS[role], number, derive_seed(seed, "name", role)))


def hallmark(role: str, number: int, seed: int) -> str:
    """Thing `number` of a role, one of book, landmark, designer, drafter, that belongs to one subject alone.

    number: in [0, HALLMARKS_PER_SUBJECT * MAX_NUMBER).
    """
    key = derive_seed(seed, "hallmark", role)
    if role == "book":
        noun, *word = _pick((_BOOK_NOUNS, *_PARTS[role]), number, key)
        return f"The {noun} of {''.join(word)}"
    if role == "landmark":
        noun, *word = _pick((_LANDMARK_NOUNS, *_PARTS[role]), number, key)
        return f"the {''.join(word)} {noun}"
    given, *word = _pick((_ALL_GIVEN, *_PARTS[role]), number, key)
    return f"{given} {''.join(word)}"


_ALL_GIVEN = sorted(name for names in GIVEN_NAMES.values() for name in names)


def _pick(parts: tuple[list[str], ...], number: int, key: int) -> list[str]:
    """One element of each list: the digits of the permuted number, in the mixed radix of their lengths."""
    code = permute(number, math.prod(map(len, parts)), key)
    chosen = []
    for part in parts:
        code, digit = divmod(code, len(part))
        chosen.append(part[digit])
    return chosen
