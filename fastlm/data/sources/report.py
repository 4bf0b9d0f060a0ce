"""What became of the records that were read: counts, reasons and first places."""

from __future__ import annotations

from dataclasses import dataclass, field

_PLACES = 5  # how many examples the report keeps of a reason


@dataclass
class Report:
    """What became of the records: how many were read and kept, and how many were set aside, why, and where first."""

    read: int = 0
    kept: int = 0
    bytes_read: int = 0
    set_aside: dict[str, dict] = field(default_factory=dict)

    def reject(self, reason: str, place: str) -> None:
        entry = self.set_aside.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < _PLACES:
            entry["first"].append(place)

    def merge(self, after: Report) -> None:
        """Add the counts of a report on later records. Merging parts in order gives the report of the whole."""
        self.read += after.read
        self.kept += after.kept
        self.bytes_read += after.bytes_read
        for reason, other in after.set_aside.items():
            entry = self.set_aside.setdefault(reason, {"count": 0, "first": []})
            entry["count"] += other["count"]
            entry["first"] = (entry["first"] + other["first"])[:_PLACES]

    def reasons(self) -> str:
        """One line: `3 malformed JSON (first: a.jsonl:7), 1 binary file (first: b.txt)`."""
        lines = (f"{entry['count']} {reason} (first: {entry['first'][0]})" for reason, entry in self.set_aside.items())
        return ", ".join(lines) or "nothing set aside"

    def as_dict(self) -> dict:
        return {"read": self.read, "kept": self.kept, "set_aside": self.set_aside}
