"""Personal data -> typed placeholders: <EMAIL>, <IBAN>, <CARD>, <IP>, <PHONE>.

email   a local part, @, and a host name whose last label is a top-level domain by its form, not a file's suffix
iban    by the checksum and the structure of its country (`stdnum.iban`)
card    13 to 19 digits, bare or in groups, of an issuer's prefix and length, by Luhn's checksum (`stdnum.luhn`)
ip      an address of version 4 with a first byte above 0, or of version 6; not where it reads as the number of a
        version or section, and not the unspecified or a loopback address
phone   a valid number (`phonenumbers`) with a + and country code, or of one of `regions` in groups as they are written
        there, or of bare digits after a word such as "phone"; not the number of a book

A regular expression finds candidates, so that text without digits, "@" and ":" costs little.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence

from fastlm.data._extras import require

KINDS = ("email", "iban", "card", "ip", "phone")  # in the order that they are looked for

_HOST = re.compile(r"@((?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}([a-zA-Z]{2,24}))(?![\w@-])")
_LOCAL = re.compile(r"[\w.+%'-]+$")
# What follows the @ in icon@2x.png is no host.
_FILES = frozenset(("png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "json", "html", "txt", "md", "pdf", "zip"))
# Each begins with a class of characters, which the engine scans for; a look-behind at every place is 4 times as slow.
_IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9][A-Z])[A-Z][0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_CARD = re.compile(
    r"[0-9](?<![\w.+-][0-9])[0-9]{3}(?:[0-9]{9,15}|([ -])(?:[0-9]{4}\1[0-9]{4}\1[0-9]{1,7}|[0-9]{6}\1[0-9]{4,5}))"
    r"(?![\w-]|\.[0-9])"
)
_IPV4 = re.compile(r"[0-9](?<![\w.-][0-9])[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![\w-]|\.\w)")
_IPV6 = re.compile(
    r"[0-9A-Fa-f](?<![\w:.][0-9A-Fa-f])[0-9A-Fa-f]{0,3}:(?:(?:[0-9A-Fa-f]{1,4}:){1,6}|:)[0-9A-Fa-f:.]*"
    r"|::[Ff]{4}:[0-9.]+"
)
_VERSION = re.compile(
    r"(?:\b(?:v|ver|version|versions|release|releases|build|firmware|section|sections|chapter|clause|article|appendix"
    r"|table|figure|fig|rule|oid|kernel|driver|revision|rev)[.:]?\s*(?:number\s*|no\.?\s*|#\s*|is\s*)?"
    r"|[=<>~!^]=?\s*|\w/|§\s*)$",
    re.IGNORECASE,
)
_NETWORK = re.compile(r"\b(?:ip|ips|ipv4|address|host|hostname|server|dns|ping|gateway|node|from)\b", re.IGNORECASE)
_PHONE = re.compile(
    r"[+(0-9](?<![\w.,/+-][+(0-9])(?:(?<=[+(])[0-9])?[0-9 ().\u00a0/\u2010-\u2013-]{5,24}[0-9](?![\w/-]|[.,][0-9])"
)
_CALLED = re.compile(r"\b(?:phone|tel|telephone|mobile|cell|call|fax|whatsapp|contact|dial|sms)\b", re.IGNORECASE)
_BOOK = re.compile(r"\b(?:isbn|issn|ean|doi|oclc|lccn)\b[^\n]{0,12}$", re.IGNORECASE)
_DECIMAL = re.compile(r"[0-9]+\.[0-9]+")
_GROUPS, _MOST_GROUPS = re.compile("[0-9]+"), 7  # more are a row of a table, at 0.1 ms a look by `phonenumbers`
_BEFORE = 30  # characters before a candidate that say what it is


class Scrubber:
    """scrubber(text) -> (the text with placeholders, {kind: (how many, their characters)}).

    kinds    any of KINDS; "phone" needs `phonenumbers`, "card" and "iban" `python-stdnum` (extra `privacy`)
    regions  ISO 3166 codes, where phone numbers without a country code are from

    ValueError for an unknown kind or region, and without a package.
    """

    def __init__(self, kinds: Sequence[str], regions: Sequence[str] = ("US", "GB")):
        unknown = sorted(set(kinds) - set(KINDS))
        if unknown:
            raise ValueError(f"scrub: expected any of {', '.join(KINDS)}, got {', '.join(map(repr, unknown))}")
        self.regions = tuple(regions)
        finders = {"email": _emails, "iban": self._ibans, "card": self._cards, "ip": _addresses, "phone": self._phones}
        self._finders = {kind: finders[kind] for kind in KINDS if kind in kinds}
        if "iban" in kinds:
            self._iban = require("stdnum.iban").is_valid
        if "card" in kinds:
            self._luhn = require("stdnum.luhn").is_valid
        if "phone" in kinds:
            self._numbers = require("phonenumbers")
            wrong = [region for region in self.regions if region not in self._numbers.SUPPORTED_REGIONS]
            if wrong:
                raise ValueError(f"phone_regions: expected ISO 3166 codes, as US, got {', '.join(map(repr, wrong))}")

    def __call__(self, text: str) -> tuple[str, dict[str, tuple[int, int]]]:
        taken = {}
        for kind, find in self._finders.items():
            spans = find(text)
            if spans:
                taken[kind] = len(spans), sum(end - start for start, end in spans)
                text = _replace(text, spans, f"<{kind.upper()}>")
        return text, taken

    def _ibans(self, text: str) -> list[tuple[int, int]]:
        spans = []
        for match in _IBAN.finditer(text):
            start, end = match.span()
            while end - start >= 15:  # a word in capitals may follow: without it
                if self._iban(text[start:end], check_country=False):
                    spans.append((start, end))
                    break
                end = text.rfind(" ", start, end)
        return spans

    def _cards(self, text: str) -> list[tuple[int, int]]:
        return _spans(_CARD, text, self._is_card)

    def _is_card(self, match: re.Match) -> bool:
        digits = re.sub(r"\D", "", match.group())
        return _issued(digits) and self._luhn(digits)

    def _phones(self, text: str) -> list[tuple[int, int]]:
        return [span for match in _PHONE.finditer(text) if (span := self._phone(match)) is not None]

    def _phone(self, match: re.Match) -> tuple[int, int] | None:
        found = match.group()
        bare = found.lstrip("(")  # a bracket may be around a number of any kind
        digits = sum(map(str.isdigit, found))
        if not 7 <= digits <= 15 or len(_GROUPS.findall(found)) > _MOST_GROUPS:
            return None
        before = match.string[max(0, match.start() - _BEFORE) : match.start()]
        if _BOOK.search(before):
            return None
        numbers = self._numbers
        leniency = numbers.Leniency.STRICT_GROUPING
        if found.startswith("+"):
            leniency = numbers.Leniency.VALID
        elif bare.isdecimal():
            if not _CALLED.search(re.split("[0-9]", before)[-1]):  # a word before another number is about that one
                return None
            leniency = numbers.Leniency.VALID
        elif (digits == 10 and found.count("-") == 3) or _DECIMAL.fullmatch(bare):  # ISBN-10 has three hyphens
            return None
        for region in self.regions[:1] if found.startswith("+") else self.regions:
            for number in numbers.PhoneNumberMatcher(found, region, leniency):
                opened = number.raw_string.count("(") > number.raw_string.count(")")  # a bracket around the number
                return match.start() + number.start + opened, match.start() + number.end
        return None


def _spans(pattern: re.Pattern, text: str, accept: Callable[[re.Match], bool]) -> list[tuple[int, int]]:
    return [match.span() for match in pattern.finditer(text) if accept(match)]


def _replace(text: str, spans: list[tuple[int, int]], placeholder: str) -> str:
    pieces, at = [], 0
    for start, end in spans:
        pieces += text[at:start], placeholder
        at = end
    return "".join([*pieces, text[at:]])


def _emails(text: str) -> list[tuple[int, int]]:
    spans, after = [], 0
    for match in _HOST.finditer(text) if "@" in text else ():
        if match.group(2).lower() in _FILES:
            continue
        at = match.start()
        low = max(after, at - 64)
        local = _LOCAL.search(text[low:at])
        start = low + local.start() if local else at
        while start < at and text[start] in ".'-":  # a quotation mark or a dash before the address
            start += 1
        if start < at and text[at - 1] != ".":
            spans.append((start, match.end()))
            after = match.end()
    return spans


def _addresses(text: str) -> list[tuple[int, int]]:
    spans = _spans(_IPV4, text, _is_ipv4)
    if ":" in text:
        for match in _IPV6.finditer(text):
            address = match.group().rstrip(".")
            if address.endswith(":") and not address.endswith("::"):
                address = address[:-1]
            if _is_ipv6(address) and text[match.start() + len(address) :][:1].isalnum() is False:
                spans.append((match.start(), match.start() + len(address)))
    kept, after = [], 0
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if start >= after:
            kept.append((start, end))
            after = end
    return kept


def _is_ipv4(match: re.Match) -> bool:
    octets = match.group().split(".")
    if any((len(octet) > 1 and octet[0] == "0") or int(octet) > 255 for octet in octets) or octets[0] in ("0", "127"):
        return False
    before = match.string[max(0, match.start() - _BEFORE) : match.start()]
    if _VERSION.search(before):
        return False
    # Four small numbers are more often a version: 0.01% of addresses have all bytes below 25, and those of 10.0.0.0/8
    # are written often.
    return octets[0] == "10" or any(int(octet) >= 25 for octet in octets) or bool(_NETWORK.search(before))


def _is_ipv6(address: str) -> bool:
    if not any(map(str.isdigit, address)) or sum(c != ":" for c in address) < 4:  # C++ has a::b
        return False
    try:
        found = ipaddress.IPv6Address(address)
    except ValueError:
        return False
    return not found.is_loopback and not found.is_unspecified


def _issued(digits: str) -> bool:
    """Whether an issuer has cards of this prefix and length (ISO/IEC 7812; Visa, Mastercard, American Express,
    Discover, JCB, Diners Club, UnionPay, Maestro)."""
    length, two, four = len(digits), int(digits[:2]), int(digits[:4])
    if digits[0] == "4":
        return length in (13, 16, 19)
    if 51 <= two <= 55 or 2221 <= four <= 2720:
        return length == 16
    if two in (34, 37):
        return length == 15
    if two in (36, 38, 39) or 3000 <= four <= 3059:
        return length in (14, 16)
    if two in (62, 65) or four == 6011 or 6440 <= four <= 6499 or 3528 <= four <= 3589:
        return 16 <= length <= 19
    return four in (5018, 5020, 5038, 6304, 6759, 6761, 6762, 6763) and 16 <= length <= 19
