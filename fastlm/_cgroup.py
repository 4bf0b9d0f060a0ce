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
        if quota.isdigit() and period.strip().isdigit():
            found.append(int(quota) / int(period))
    return min(found, default=None)


def free_memory() -> int | None:
    """Bytes that this process may still allocate, cached files being given up; None where there is no limit."""
    found = []
    for group in _groups("memory"):
        for limit, usage, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            if (most := read(group / limit)).isdigit():
                stat = dict(line.split() for line in read(group / "memory.stat").splitlines())
                used = int(read(group / usage) or 0) - int(stat.get(cached, 0))
                found.append(max(0, int(most) - max(0, used)))
    return min(found, default=None)


def read(path: Path) -> str:
    """A file's text, "" where it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _groups(controller: str) -> list[Path]:
    """The directories of the group of this process and of those above it, in both versions of control groups."""
    places = {_MOUNT: None, _MOUNT / controller: None}
    for line in read(_GROUPS).splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        for mount in [_MOUNT / names, _MOUNT / controller] if names else [_MOUNT]:
            own = mount / path.lstrip("/")
            places |= dict.fromkeys([place for place in (own, *own.parents) if mount in (place, *place.parents)])
    return list(places)
