"""Sentences with personal data and with what looks like it, made by rule: labelled, and the same for a seed."""

import ipaddress
import random
import string
import uuid

PLACEHOLDERS = ("<EMAIL>", "<IP>", "<PHONE>", "<CARD>", "<IBAN>")

_PLAIN = ("{} was in the log.", "We found {} there", "Please use {}, then wait.", "({})", "See: {}\nand go on.", "{}")
_SAID = {
    "email": ("Write to {}.", "From: <{}>", "mailto:{}", *_PLAIN),
    "ip": ("The server at {} answered.", "Connect to {} now", "http://{}/index", *_PLAIN),
    "phone": ("Call {} today.", "Tel: {}", "Our number is {}.", *_PLAIN),
    "card": ("Card {} was declined.", "Pay with {}.", *_PLAIN),
    "iban": ("Transfer to {} please.", "IBAN: {}", *_PLAIN),
}


def _digits(rng, count):
    return "".join(rng.choices(string.digits, k=count))


def _hex(rng, count):
    return "".join(rng.choices("0123456789abcdef", k=count))


def _email(rng):
    first, last = (
        rng.choice(("anna", "J", "li", "Maria", "omar", "x")),
        rng.choice(("smith", "OBrien", "garcia", "ng", "lee")),
    )
    local = rng.choice(
        (f"{first}.{last}", f"{first}_{last}{rng.randrange(99)}", f"{first}+news", f"{last}{_digits(rng, 3)}")
    )
    host = rng.choice(("example", "mail.uni-bonn", "my-company", "x1", "a.b.c", "post24"))
    return f"{local}@{host}.{rng.choice(('com', 'de', 'co.uk', 'org', 'museum', 'io', 'ac.jp'))}"


def _ip(rng):
    if rng.random() < 0.5:
        return ".".join(str(rng.randrange(low, 256)) for low in (128, 0, 0, 30))
    number = 0x2001 << 112 | rng.getrandbits(112) & ~(0xFFFFFFFF << (16 * rng.randrange(4)))
    address = ipaddress.IPv6Address(number)
    return rng.choice((address.compressed, address.exploded))


def _phone(rng):
    area, exchange = rng.choice(("212", "415", "312", "617", "202")), f"{rng.randrange(2, 10)}{_digits(rng, 2)}"
    line = _digits(rng, 4)
    exchange = "345" if exchange[1:] == "11" else exchange  # N11 are services
    made = (
        f"({area}) {exchange}-{line}",
        f"{area}-{exchange}-{line}",
        f"+1 {area} {exchange} {line}",
        f"+1-{area}-{exchange}-{line}",
        f"020 7946 {line}",
        f"+44 20 7946 {line}",
        f"+49 30 {rng.randrange(2, 9)}{_digits(rng, 6)}",
        f"+33 1 {' '.join(str(rng.randrange(40, 60)) for _ in range(4))}",
        f"+91 98{_digits(rng, 3)} {_digits(rng, 5)}",
    )
    return rng.choice(made)


def luhn_digit(digits):
    total = sum(sum(divmod(int(d) * (2 - i % 2), 10)) for i, d in enumerate(reversed(digits)))
    return str(-total % 10)


def _card(rng):
    prefix, length = rng.choice(
        (("4", 16), ("53", 16), ("2345", 16), ("37", 15), ("6011", 16), ("3530", 16), ("36", 14))
    )
    body = prefix + _digits(rng, length - 1 - len(prefix))
    return _grouped(rng, body + luhn_digit(body))


def _grouped(rng, digits):
    cuts = (4, 10) if len(digits) < 16 else (4, 8, 12)
    parts = [digits[a:b] for a, b in zip((0, *cuts), (*cuts, None))]
    return rng.choice((" ", "-", "")).join(parts)


def _iban(rng):
    country, length, letters = rng.choice(
        (("DE", 22, 0), ("GB", 22, 4), ("NL", 18, 4), ("FR", 27, 0), ("AT", 20, 0), ("CH", 21, 0))
    )
    body = "".join(rng.choices(string.ascii_uppercase, k=letters)) + _digits(rng, length - 4 - letters)
    number = int("".join(str(int(c, 36)) for c in body + country + "00"))
    compact = f"{country}{98 - number % 97:02d}{body}"
    return rng.choice((compact, " ".join(compact[i : i + 4] for i in range(0, len(compact), 4))))


_MADE = {"email": _email, "ip": _ip, "phone": _phone, "card": _card, "iban": _iban}


def positives(count, seed=0):
    """(kind, sentence, the sentence with its placeholder), `count` of each kind."""
    rng = random.Random(seed)
    made = []
    for kind, make in _MADE.items():
        for _ in range(count):
            said = rng.choice(_SAID[kind])
            value = make(rng)
            if said == "http://{}/index" and ":" in value:
                said = "http://[{}]/index"
            made.append((kind, said.format(value), said.format(f"<{kind.upper()}>")))
    return made


def _isbn(rng):
    ten = "".join(rng.choices(string.digits, k=9))
    check = -sum((10 - i) * int(d) for i, d in enumerate(ten)) % 11
    ten = f"{ten[0]}-{ten[1:4]}-{ten[4:]}-{'X' if check == 10 else check}"
    thirteen = "978" + _digits(rng, 9)
    check = -sum(int(d) * (1 + 2 * (i % 2)) for i, d in enumerate(thirteen)) % 10
    thirteen = f"978-{thirteen[3]}-{thirteen[4:6]}-{thirteen[6:]}-{check}"
    return rng.choice((f"ISBN {ten}", ten, f"ISBN {thirteen.replace('-', '')}", thirteen, f"ISBN-13: {thirteen}"))


def _version(rng):
    three = ".".join(str(rng.randrange(40)) for _ in range(3))
    four = f"{three}.{rng.randrange(300)}"
    return rng.choice(
        (three, f"v{four}", f"version {four}", f"numpy=={four}", f"lib@{three}", f"Chrome/{four}", f"Release {four}")
    )


def _date(rng):
    y, m, d = rng.randrange(1900, 2030), rng.randrange(1, 13), rng.randrange(1, 29)
    h, n, s = rng.randrange(24), rng.randrange(60), rng.randrange(60)
    forms = (
        f"{y}-{m:02d}-{d:02d}",
        f"{d:02d}.{m:02d}.{y}",
        f"{m}/{d}/{y} {h:02d}:{n:02d}",
        f"{y}-{m:02d}-{d:02d}T{h:02d}:{n:02d}:{s:02d}Z",
        f"{y}{m:02d}{d:02d}{h:02d}{n:02d}{s:02d}",
        f"{h:02d}:{n:02d}:{s:02d}",
        f"{y}-{y + 4}",
        f"1{_digits(rng, 9)}",
        f"1{_digits(rng, 12)}",
    )
    return rng.choice(forms)


def _hash(rng):
    return rng.choice(
        (
            _hex(rng, 32),
            _hex(rng, 40),
            _hex(rng, 64),
            _hex(rng, 7),
            f"sha256:{_hex(rng, 64)}",
            str(uuid.UUID(int=rng.getrandbits(128))),
        )
    )


def _number(rng):
    wrong = "4" + _digits(rng, 14)
    wrong += str((int(luhn_digit(wrong)) + rng.randrange(1, 10)) % 10)
    mac = ":".join(_hex(rng, 2) for _ in range(6))
    forms = (
        f"{rng.uniform(-90, 90):.6f}, {rng.uniform(-180, 180):.6f}",
        f"${rng.randrange(1, 999)},{_digits(rng, 3)},{_digits(rng, 3)}",
        f"{rng.random() * 1000:.12f}",
        _grouped(rng, wrong),
        mac,
        f"300.{rng.randrange(256)}.{rng.randrange(256)}.999",
        f"section {rng.randrange(1, 9)}.{rng.randrange(9)}.{rng.randrange(9)}.{rng.randrange(9)}",
        f"DE{_digits(rng, 2)} was the code",
        f"std::vec{rng.randrange(9)}::at",
        f"@{rng.choice(('anna', 'property', 'dataclass', 'team_2'))}",
        f"icon{rng.randrange(9)}@2x.png",
        f"pp. {rng.randrange(100, 400)}-{rng.randrange(400, 900)}",
        f"#{_digits(rng, 8)}",
        f"{_digits(rng, 5)}-{_digits(rng, 4)}",
        f"{rng.randrange(10**5, 10**6)} of {rng.randrange(10**6, 10**7)}",
    )
    return rng.choice(forms)


def negatives(count, seed=1):
    """`count` sentences without personal data: numbers of books, versions, dates, hashes and other numbers."""
    rng = random.Random(seed)
    makers = (_isbn, _version, _date, _hash, _number)
    return [rng.choice(_PLAIN).format(makers[i % len(makers)](rng)) for i in range(count)]
