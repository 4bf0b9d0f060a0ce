"""What the control groups of this process allow: processor time and memory. Linux alone has them.

A limit may lie on any group above the process's own, so all of them are read. In a container the path of the group may
be the host's and not exist here; the root of the mount is then the container's own group.
"""

from __future__ import annotations

from pathlib import Path

_GROUPS, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cpu_quota() -> float | None:
    """Cores' worth of time that this process may use; None where there is no limit."""
    found = []
    for group in _groups("cpu"):
        quota, _, period = read(group / "cpu.max").partition(" ")
        if not quota:  # version 1
            quota, period = read(group / "cpu.cfs_quota_us"), read(group / "cpu.cfs_period_us")
        if (time := _number(quota)) and (each := _number(period)):
            found.append(time / each)
    return min(found, default=None)


def free_memory() -> int | None:
    """Bytes that this process may still allocate, cached files being given up; None where there is no limit."""
    found = []
    for group in _groups("memory"):
        for limit, usage, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            if (most := _number(read(group / limit))) is not None:
                stat = dict(line.partition(" ")[::2] for line in read(group / "memory.stat").splitlines())
                used = (_number(read(group / usage)) or 0) - (_number(stat.get(cached, "")) or 0)
                found.append(max(0, most - max(0, used)))
    return min(found, default=None)


def read(path: Path) -> str:
    """A file's text, "" where it cannot be read. Names of groups may be any bytes."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    """The number that `text` is; None for "max", "-1" and anything else."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _groups(controller: str) -> list[Path]:
    """The directories of the group of this process and of those above it, in both versions of control groups."""
    places = {_MOUNT: None, _MOUNT / controller: None}
    for line in read(_GROUPS).splitlines():
        _, _, rest = line.partition(":")
        names, separator, path = rest.partition(":")
        if not separator or (names and controller not in names.split(",")):
            continue
        for mount in [_MOUNT / names, _MOUNT / controller] if names else [_MOUNT]:
            own = mount / path.lstrip("/")
            places |= dict.fromkeys([place for place in (own, *own.parents) if mount in (place, *place.parents)])
    return list(places)
