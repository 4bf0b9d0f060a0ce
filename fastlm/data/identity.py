"""Whether prepared data is what a preparation would make: its identity, and what differs where it is not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fastlm.data.shards import Dataset, open_dataset, read_manifest
from fastlm.data.sources import SourceFile, is_prepared
from fastlm.data.texts import Progress
from fastlm.storage import file_checksum


class OtherPreparation(ValueError):
    """A directory holds the preparation of other text, or by other settings; `differences` says which."""

    def __init__(self, out: Path, differences: list[str]):
        self.differences = differences
        super().__init__(
            f"out: {out} exists and holds another preparation: {'; '.join(differences)}. Name another directory, or "
            "delete it"
        )


def setting_differences(settings: dict, before: dict) -> list[str]:
    """A phrase for each entry of a manifest's settings that differs."""
    names = [name for name in {**before, **settings} if settings.get(name) != before.get(name)]
    return [f"data.{name} is {settings.get(name)!r}, was {before.get(name)!r}" for name in names]


def already(out: Path, identity: str, settings: dict) -> Dataset:
    """What lies in `out`, where it is the preparation `identity` by `settings`. ValueError where a shard is damaged."""
    if not is_prepared(out):
        raise ValueError(f"out: {out} exists and holds something else; name another directory, or delete it")
    manifest = read_manifest(out)
    if manifest["preparation"] != identity:
        differences = setting_differences(settings, manifest["settings"])
        other = "files of the text were changed, added or removed, or another version of fastlm prepared it"
        raise OtherPreparation(out, differences or [other])
    if manifest["validation"]["rows"]:
        open_dataset(out, split="validation", strict=True)
    return open_dataset(out, strict=True)


def checksums(files: Iterable[SourceFile], progress: Progress) -> list[list[str]]:
    """[name, checksum] of every file: what makes two preparations the same, wherever the files lie."""
    total, done, contents = sum(file.size for file in files), 0, []
    for file in files:
        try:
            contents.append([file.name, file_checksum(file.path)])
        except OSError as error:
            contents.append([file.name, f"unreadable: {error.strerror}"])
        done += file.size
        progress("checksums", done, total)
    return contents
