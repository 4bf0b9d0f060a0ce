"""Text for benchmarks of data preparation, made from a seed.

Documents of 0.2 to 20 KB in eight scripts, two thirds of them with English function words, with dates, numbers,
addresses, lists, code, mojibake and repeated passages; one in ten is an earlier one with a few words changed.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate

_ENGLISH = (
    *("the", "of", "and", "to", "in", "that", "is", "was", "he", "for", "it", "with", "as", "his", "on"),
    *("be", "at", "by", "had", "not", "are", "but", "from", "or", "have", "an", "they", "which"),
)
# Name -> letters, and how many of a document in a hundred are in it.
_SCRIPTS = {
    "english": ("abcdefghijklmnopqrstuvwxyz", 64),
    "french": ("abcdefilmnoprstuvéèàçêôùœ", 8),
    "german": ("abcdefghiklmnoprstuwzäöüß", 6),
    "russian": ("абвгдежзийклмнопрстуфхцчшщыьэюя", 7),
    "greek": ("αβγδεζηθικλμνξοπρστυφχψωάέήίό", 3),
    "arabic": ("ابتثجحخدذرزسشصضطظعغفقكلمنهوي", 3),
    "hindi": ("अआइईउऊएऐओऔकखगघचछजझटठडढणतथदधनपफबभमयरलवशषसह", 3),
    "chinese": ("".join(map(chr, range(0x4E00, 0x4E00 + 2500))), 6),
}
_VOCABULARY = 20_000
_RECENT = 2000  # an altered document is one of so many before it
_COMMAS = (" ", " ", " ", " ", " ", " ", " ", ", ", "; ", " \u2013 ")
_ENDS = (". ", ". ", ". ", "? ", "! ", ".\n", ".\n\n")


def made_text(size: int, seed: int = 0) -> list[str]:
    """Documents of `size` bytes of UTF-8 in all, or a little more; a function of the seed."""
    return list(made_documents(size, seed))


def made_documents(size: int, seed: int = 0) -> Iterator[str]:
    """The documents of `made_text`, one after another: the last _RECENT are in memory."""
    rng = random.Random(seed)
    vocabularies = {}
    for name, (letters, _) in _SCRIPTS.items():
        longest = 2 if name == "chinese" else 11
        words = ["".join(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(_VOCABULARY)]
        weights = [1 / (rank + 10) for rank in range(_VOCABULARY)]  # Zipf's law
        vocabularies[name] = words, list(accumulate(weights))
    names, shares = list(_SCRIPTS), [share for _, share in _SCRIPTS.values()]
    recent, made = deque(maxlen=_RECENT), 0
    while made < size:
        if recent and rng.random() < 0.1:
            text = _changed(rng, rng.choice(recent))
        else:
            name = rng.choices(names, shares)[0]
            text = _document(rng, name, *vocabularies[name])
        recent.append(text)
        made += len(text.encode())
        yield text


def _document(rng: random.Random, name: str, vocabulary: Sequence[str], weights: Sequence[float]) -> str:
    count = int(40 * 80 ** rng.random())
    words = rng.choices(vocabulary, cum_weights=weights, k=count)
    between = "" if name == "chinese" else " "
    pieces = []
    while words:
        sentence = words[: rng.randint(5, 25)]
        del words[: len(sentence)]
        if name == "english":
            for at in range(0, len(sentence), 2):
                sentence[at] = rng.choice(_ENGLISH)
        pieces.append(sentence[0].capitalize())
        for word in sentence[1:]:
            pieces += (rng.choice(_COMMAS) if between else ""), word
        pieces.append(rng.choice(_ENDS) if between else rng.choice(("\u3002", "\uff0c", "\u3002\n")))
        if rng.random() < 0.08:
            pieces.append(_oddity(rng))
    return "".join(pieces)


def _oddity(rng: random.Random) -> str:
    day = rng.randrange(1, 29)
    forms = (
        f"On {rng.randrange(1900, 2030)}-{rng.randrange(1, 13):02d}-{day:02d} it was {rng.random():.4f}. ",
        f"See \u201cpart {rng.randrange(99)}\u201d \u2014 it\u2019s there. ",
        f"Write to user{rng.randrange(999)}@example.org or call +1 212 555 {rng.randrange(1000, 9999)}. ",
        f"From {rng.randrange(1, 255)}.{rng.randrange(256)}.{rng.randrange(256)}.{day} at 12:{10 + day}. ",
        "\n- a list\n- of things\n- in lines\n",
        "\r\n    for i in range(10):\r\n        print(i)\t# code\r\n",
        "It was \u00e2\u20ac\u0153sch\u00c3\u00b6n\u00e2\u20ac\u009d. ",
        f"{rng.randrange(10**9, 10**10)} and ISBN 978-3-16-148410-{rng.randrange(10)}. ",
        "The same passage is in many of the pages that are here, and it was in all of those before them. ",
    )
    return rng.choice(forms)


def _changed(rng: random.Random, text: str) -> str:
    words = text.split(" ")
    for _ in range(max(1, len(words) // 100)):
        words[rng.randrange(len(words))] = "changed"
    return " ".join(words)
