"""Free memory of the devices and of the host."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def free_on_host() -> int:
    """Returns the bytes that this process can allocate, within the limits of its container."""
    return max(0, min([psutil.virtual_memory().available, *_free_in_cgroups()]))


def free_on_devices(devices: Sequence[jax.Device]) -> int | None:
    """Returns the bytes that are free on every device; None if a device does not report them."""
    if devices[0].platform == "cpu":  # they share the memory of the host
        return free_on_host() // len(devices)
    free = []
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        free.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return max(0, min(free))


def _free_in_cgroups() -> Iterator[int]:
    """Yields the bytes left within each memory limit of the control groups of this process."""
    try:
        memberships = _MEMBERSHIP.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, used, prefix = _CGROUPS, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):  # cgroups v1
            top, prefix = _CGROUPS / "memory", "total_"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        names = Path(path).parts[1:]
        for depth in range(len(names) + 1):
            group = top.joinpath(*names[:depth])
            # Not every group has a limit, and a container does not see the outer groups.
            try:
                maximum, current = (group / limit).read_text().strip(), (group / used).read_text()
                stat = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if maximum != "max":
                # The kernel frees cached files before it kills a process.
                cached = (stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
                yield int(maximum) - int(current) + sum(map(int, cached))
