"""Personal data: precision and recall on a labelled set, and the cases that the rules are about."""

import pytest
from personal_data import PLACEHOLDERS, negatives, positives

from fastlm.data.scrub import KINDS, Scrubber


@pytest.fixture(scope="module")
def scrubber():
    return Scrubber(KINDS)


def test_precision_and_recall_on_a_labelled_set(scrubber):
    labelled, hard = positives(300), negatives(5000)
    found, wrong = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for kind, text, expected in labelled:
        scrubbed, _ = scrubber(text)
        found[kind] += scrubbed == expected
        if scrubbed not in (expected, text):  # another kind, or another span
            wrong[kind] += 1
    for text in hard:
        _, taken = scrubber(text)
        for kind, (count, _) in taken.items():
            wrong[kind] += count
    others = [kind for kind in KINDS if kind != "phone"]
    hits, misses = sum(found[kind] for kind in others), sum(wrong[kind] for kind in others)
    assert hits / (hits + misses) >= 0.99, (found, wrong)
    assert hits / (300 * len(others)) >= 0.98, (found, wrong)
    assert found["phone"] / (found["phone"] + wrong["phone"]) >= 0.90, (found, wrong)
    assert found["phone"] / 300 >= 0.80, (found, wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail 'a.b+c@x-y.co.uk'.", "mail '<EMAIL>'."),
        ("a@b, x@y.c1, @me, icon@2x.png, a@@b.de", "a@b, x@y.c1, @me, icon@2x.png, a@@b.de"),
        ("é.à@exämple.de", "<EMAIL>"),
        ("127.0.0.1 and ::1 and 0.0.0.0 and 256.1.1.1", "127.0.0.1 and ::1 and 0.0.0.0 and 256.1.1.1"),
        ("8.8.8.8 is small, ping 8.8.8.8, 10.0.0.7", "8.8.8.8 is small, ping <IP>, <IP>"),
        ("1.3.6.1.4.1.311 and 203.0.113.9.", "1.3.6.1.4.1.311 and <IP>."),
        ("fe80::1ff:fe23:4567:890a, ::ffff:203.0.113.9, a::b", "<IP>, <IP>, a::b"),
        ("4111 1111 1111 1111; 4111-1111 1111-1111; 4111111111111112", "<CARD>; 4111-1111 1111-1111; 4111111111111112"),
        ("DE89 3704 0044 0532 0130 00 AND CO", "<IBAN> AND CO"),
        ("DE88 3704 0044 0532 0130 00", "DE88 3704 0044 0532 0130 00"),
        ("(1117485800150) (290.441746841103) (212-555-1234)", "(1117485800150) (290.441746841103) (<PHONE>)"),
        ("phone 2125551234, id 2125551234", "phone <PHONE>, id 2125551234"),
    ],
)
def test_cases(scrubber, text, expected):
    assert scrubber(text)[0] == expected


def test_counts_and_repetition(scrubber):
    text, taken = scrubber("x@y.org and z@y.org from 203.0.113.9")
    assert text == "<EMAIL> and <EMAIL> from <IP>"
    assert taken == {"email": (2, 14), "ip": (1, 11)}
    assert scrubber(text) == (text, {})
    assert all(scrubber(placeholder)[0] == placeholder for placeholder in PLACEHOLDERS)


def test_only_what_was_asked_for():
    assert Scrubber(("email",))("x@y.org 203.0.113.9")[0] == "<EMAIL> 203.0.113.9"
    with pytest.raises(ValueError, match=r"scrub: expected any of email, iban, card, ip, phone, got 'name'"):
        Scrubber(("name",))
    with pytest.raises(ValueError, match="phone_regions: expected ISO 3166 codes, as US, got 'UK'"):
        Scrubber(("phone",), regions=("UK",))
