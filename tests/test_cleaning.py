"""Cleaning: each rule at its bounds, its count and its sample; repair beside ftfy itself."""

import pickle
import sys
import time

import ftfy
import pytest
from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data.cleaning import Cleaner, Cleaning, CleaningReport, clean_text
from fastlm.data.cleaning.c4 import c4
from fastlm.data.cleaning.gopher import gopher
from fastlm.data.cleaning.repair import _SETTINGS, Repair

# What ftfy's pattern is made of, and its neighbours: white space, letters, digits, controls, surrogates.
_CLASSES = "".join(MOJIBAKE_CATEGORIES.values()).replace("-", "")
_TROUBLE = (
    _CLASSES
    + "\x80\x85\x9f\xa0ÀÑàñΑΩαωЀЯаџ═╬ÒÖÙÜòöøü ab.-9\n\n\r\t\x1b[31m\ud83d\ude00\udc80ВГРСΒΓΞΟ°µßøØÙ×√≈‚ÄÃÂœβ€ā€вЂГў"
)


@pytest.fixture(scope="module")
def repair():
    return Repair()


def test_repair():
    text, rule = Cleaner(Cleaning(repair=True, min_chars=1))("sch\u00c3\u00b6n \u201cGr\u00fc\u00dfe\u201d &lt; \ufb01")
    assert (text, rule) == ("sch\u00f6n \u201cGr\u00fc\u00dfe\u201d &lt; \ufb01", None)


@given(st.text(st.sampled_from(sorted(set(_TROUBLE))), max_size=30) | st.text(max_size=40))
@settings(max_examples=600, deadline=None)
def test_repair_is_ftfys(repair, text):
    assert repair(text) == ftfy.fix_text(text, ftfy.TextFixerConfig(**_SETTINGS))


def test_a_line_without_a_clue_is_not_bad(repair):
    """Random lines of up to 6 characters of ftfy's classes, so that each alternative of its pattern occurs."""
    import random

    rng, alphabet, bad = random.Random(0), sorted(set(_TROUBLE) - {"\n"}), 0
    for _ in range(60_000):
        line = "".join(rng.choices(alphabet, k=rng.randint(2, 6)))
        if is_bad(line):
            bad += 1
            assert not repair.is_clean(line), ascii(line)
    assert bad > 10_000


def test_repair_skips_what_is_proven(repair):
    for text in (
        "plain {ascii}\n",
        "Он сказал: \u00abда\u00bb\n",
        "你好，世界\u3002",
        "\u201cquoted\u201d \u2013 it\u2019s",
        "\u0645\u0631\u062d",
    ):
        assert repair.is_clean_line(text)
    for text in ("\x1b[31mred", "sch\u00c3\u00b6n", "\ud83d"):
        assert not repair.is_clean_line(text)


_PROSE = (
    "The committee met in the old library and spoke about how people have always kept letters with care. "
    "It was late when they agreed to print a small book of them. Nobody thought that so many readers would write back, "
    "yet within a month every shelf in town held a copy. Some were sent abroad; others went missing on the way."
)

_LINES = "\n".join(" ".join(_PROSE.split()[i : i + 4]) for i in range(0, 60, 4))


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (None, _PROSE),
        ("gopher: words", " ".join(_PROSE.split()[:49])),
        ("gopher: mean word length", " ".join(word + "xxxxxxx" for word in _PROSE.split())),
        ("gopher: symbols", _PROSE + " #" * 9),
        ("gopher: symbols", _PROSE + " \u2026" * 9),
        ("gopher: bullet lines", "\n".join("- " + " ".join(_PROSE.split()[i : i + 8]) for i in range(0, 64, 8))),
        ("gopher: ellipsis lines", "\n".join(" ".join(_PROSE.split()[i : i + 16]) + " ..." for i in range(0, 64, 16))),
        ("gopher: words without letters", _PROSE + " 12345" * 20),
        (
            "gopher: stop words",
            " ".join(
                w
                for w in (_PROSE + _PROSE.upper()[:60]).split()
                if w not in {"the", "be", "to", "of", "and", "that", "have", "with"} and not w.isupper()
            ),
        ),
        ("gopher: duplicate lines", _PROSE + "\nthe very same line of words here" * 4),
        ("gopher: duplicate paragraphs", _LINES + "\n\na small one" * 3 + "\n\nc"),
        ("gopher: top n-gram", _PROSE + " over and" * 12),
        (
            "gopher: duplicate n-grams",
            _PROSE + " " + " ".join(_PROSE.split()[5:20]) + " x " + " ".join(_PROSE.split()[40:52]),
        ),
    ],
)
def test_gopher(rule, text):
    assert gopher(text) == rule


def test_gopher_at_its_bounds():
    words = _PROSE.split()
    assert gopher(" ".join(words[:50])) is None
    assert gopher(" ".join(words) + " #" * (len(words) // 8)) == "gopher: symbols"
    assert gopher(" ".join(words) + " #" * (len(words) // 10)) is None
    # A repeated 10-gram of a tenth of the characters is kept, of more dropped.
    alphabet = [f"word{i:03d}" for i in range(400)]
    for i in range(0, 380, 40):
        alphabet[i] = ("the", "of")[i // 40 % 2]
    assert gopher(" ".join(alphabet)) is None
    assert gopher(" ".join(alphabet + alphabet[100:119])) is None
    assert gopher(" ".join(alphabet + alphabet[100:125])) == "gopher: duplicate n-grams"


def test_c4():
    kept = "One line that has six words. Another sentence follows.\nA third one is here now!"
    page = (
        "Home | About\n"
        + kept
        + "\nToo short.\nThis line has JavaScript in it, doesn't it?\nRead our Privacy Policy before you go.\n"
        "It goes on and on ..."
    )
    text, rule, taken = c4(page.replace("words.", "words [12].").replace("here now", "here [citation needed] now"))
    assert (text, rule) == (kept, None)
    assert taken == {
        "c4: citation marks": 5 + 18,
        "c4: line without an end mark": 12 + 21,
        "c4: line of few words": 10,
        "c4: line with javascript": 43,
        "c4: policy line": 38,
    }
    for text, rule in (
        (kept + "\n{ }", "c4: curly bracket"),
        (kept + " Lorem Ipsum dolor sit amet.", "c4: lorem ipsum"),
        ("One line that has six words. Another sentence follows.", "c4: few sentences"),
    ):
        assert c4(text)[:2] == (None, rule)


def test_languages():
    german = "Der Ausschuss traf sich in der alten Bibliothek und sprach lange \u00fcber die Briefe der Leute."
    for detector in ("py3langid", "lingua"):
        cleaner = Cleaner(Cleaning(languages=("en", "fr"), detector=detector))
        assert cleaner(_PROSE) == (_PROSE, None)
        assert cleaner(german) == (None, "language: de")
    with pytest.raises(ValueError, match=r"languages: expected codes that py3langid knows \(.* en .*\), got xx"):
        Cleaner(Cleaning(languages=("xx",)))


def test_every_rule_is_counted_with_a_sample():
    settings = Cleaning(min_chars=5, max_chars=400, filters=("c4",), scrub=("email",))
    cleaner = Cleaner(settings)
    kept = "One line that has six words. Another sentence follows.\nA third one goes to a.b@example.org now!"
    texts = [kept, " \0\n", "abc", "x" * 401, kept.replace("\n", "\r\nHome\r\n"), kept + "{", "mail me@example.org {"]
    results = [cleaner(text, ordinal=i, place=f"a.txt:{i}") for i, text in enumerate(texts)]
    scrubbed = kept.replace("a.b@example.org", "<EMAIL>")
    dropped = ["empty", "too short", "too long", "c4: curly bracket"]
    assert (
        results
        == [(scrubbed, None), *((None, rule) for rule in dropped[:3]), (scrubbed, None)] + [(None, dropped[3])] * 2
    )
    report = cleaner.report.as_dict()
    assert (report["documents"], report["kept"]) == (7, 2)
    assert report["characters"] == sum(map(len, texts))
    assert report["kept_characters"] == 2 * len(scrubbed)
    rules = report["rules"]
    assert {rule: (taken["documents"], taken["dropped"], taken["characters"]) for rule, taken in rules.items()} == {
        "line ends": (1, 0, 2),
        "control characters": (1, 0, 1),
        "spaces": (1, 0, 1),
        "blank lines": (1, 0, 1),
        "empty": (1, 1, 0),
        "too short": (1, 1, 3),
        "too long": (1, 1, 401),
        "c4: curly bracket": (2, 2, len(kept) + 1 + 21),
        "c4: line without an end mark": (1, 0, 4),
        "scrub: email": (2, 0, 30),
    }
    assert rules["too long"]["sample"] == {"ordinal": 3, "place": "a.txt:3", "text": "x" * 200}
    assert rules["scrub: email"]["sample"]["became"] == "A third one goes to <EMAIL> now!"[-32:]
    assert "example.org" not in str(report)  # nor in a sample of another rule
    assert rules["c4: line without an end mark"]["sample"]["text"].endswith(
        "follows.\nHome\nA third one goes to <EMAIL> now!"
    )


@given(st.lists(st.text("ab \n\t\0\u0301e", max_size=12), max_size=12), st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_reports_of_parts_merge_into_that_of_the_whole(texts, a, b):
    a, b = sorted((a, b))

    def report(low, high):
        cleaner = Cleaner(Cleaning(min_chars=3))
        for i in range(low, min(high, len(texts))):
            cleaner(texts[i], ordinal=(0, i), place=str(i))
        return CleaningReport.from_dict(cleaner.report.as_dict())

    def merged(*parts):
        total = CleaningReport()
        for part in parts:
            total.merge(part)
        return total.as_dict()

    whole = report(0, 99).as_dict()
    first, second, third = report(0, a), report(a, b), report(b, 99)
    assert merged(first, second, third) == merged(third, first, second) == whole


def test_a_duplicate_leaves_what_was_kept():
    cleaner = Cleaner(Cleaning())
    for i in range(2):
        cleaner("the same text", ordinal=i)
    cleaner.report.take_kept("duplicate", 13, ordinal=1, place="b", text=lambda: "the same text")
    assert (cleaner.report.kept, cleaner.report.kept_characters) == (1, 13)
    assert pickle.loads(pickle.dumps(Cleaner(Cleaning(scrub=("email",)), cleaner.report).report)) == cleaner.report
    assert cleaner.report.rules["duplicate"].dropped == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filters": ("fineweb",)}, "filters: expected any of c4, gopher, each once, got"),
        ({"scrub": ("email", "email")}, "scrub: expected any of email, iban, card, ip, phone, each once"),
        ({"detector": "fasttext"}, "detector: expected one of py3langid, lingua, got 'fasttext'"),
        ({"min_confidence": 2}, "min_confidence: expected a number from 0 to 1, got 2"),
        ({"max_chars": -1}, "max_chars: expected an integer of at least 0, got -1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Cleaning(**settings)


@pytest.mark.parametrize(
    ("package", "settings", "extra"),
    [
        ("ftfy", {"repair": True}, "data"),
        ("py3langid", {"languages": ("en",)}, "language"),
        ("phonenumbers", {"scrub": ("phone",)}, "privacy"),
        ("stdnum", {"scrub": ("iban",)}, "privacy"),
    ],
)
def test_a_missing_package_names_its_extra(package, settings, extra, monkeypatch):
    from fastlm.data.cleaning import language

    language._py3langid.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(ValueError, match=rf"need the package {package}; pip install fastlm\[{extra}\]"):
        Cleaner(Cleaning(**settings))


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_the_default_is_clean_text(text):
    cleaned = clean_text(text)
    expected = cleaned if cleaned.strip() and len(cleaned) >= 8 else None
    assert Cleaner(Cleaning())(text)[0] == expected


_HARD = (
    "a@" * 9,
    "a.",
    "1 ",
    "1.",
    "ab:",
    "::",
    "4111 ",
    "DE89 ",
    "[1]",
    '..."',
    " ",
    "\t",
    "é",
    "Ã©",
    "#",
    "x",
    "\n",
    "{",
    "(1",
    "-",
)


@pytest.mark.parametrize("piece", _HARD, ids=ascii)
def test_every_rule_is_linear_in_the_text(piece):
    """Text without a space, and text of what begins each pattern."""
    cleaner = Cleaner(Cleaning(repair=True, filters=("c4", "gopher"), scrub=("email", "ip", "phone", "card", "iban")))
    scrubber = cleaner._scrub
    times = []
    for size in (20_000, 80_000):
        text = (piece * size)[:size]
        start = time.process_time()
        cleaner(text)
        if text.strip():
            gopher(text)
        scrubber(text)
        times.append(time.process_time() - start)
    assert times[1] < 10 * max(times[0], 0.02), times
