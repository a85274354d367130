"""How much memory is left, of a machine and of a device; and a full device told in one sentence, with the numbers."""
from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from minivl.limits import InputError

# Files of a control group, by its version: the limit, what is used, and what of that can be dropped, in memory.stat.
GROUPS = {2: ("memory.max", "memory.current", "inactive_file"),
          1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}


@contextmanager
def full_memory_told(device: torch.device, need: str, way_out: str) -> Iterator[None]:
    """Turn torch's error of several lines into an InputError: what was wanted, what the device has, what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        free, total = torch.cuda.mem_get_info(device)
        raise InputError(f"no memory left on {device} for {need}: {free / 1e9:.1f} of its {total / 1e9:.1f} GB are "
                         f"free; {way_out}") from None


def free_memory(root: Path = Path("/")) -> int | None:
    """Tell how many bytes a new model may take: what is available, and what the control groups of this process leave.

    Where the system does not say what is available (macOS), all there is; None: it does not say that either.
    `root`: where /proc and /sys are.
    """
    available = re.search(r"^MemAvailable: *(\d+) kB", _text(root / "proc/meminfo"), re.M)
    if not available:
        with suppress(AttributeError, ValueError, OSError):         # Windows has no sysconf
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return None
    return min([1024 * int(available[1]), *_left_by_groups(root)])


def _left_by_groups(root: Path) -> Iterator[int]:
    """Find what each limit on the way from this process's group up to the root leaves."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, mount = (1, root / "sys/fs/cgroup/memory") if controllers else (2, root / "sys/fs/cgroup")
        limit, used, droppable = GROUPS[version]
        # In a container the path may be that of the host, where this machine has only the last folder, as the root.
        group = mount / path.lstrip("/")
        for folder in (group, *(above for above in group.parents if above.is_relative_to(mount))):
            numbers = [_text(folder / name).strip() for name in (limit, used)]
            if all(number.isdigit() for number in numbers):         # "max": no limit
                cache = re.search(rf"^{droppable} (\d+)$", _text(folder / "memory.stat"), re.M)
                yield max(0, int(numbers[0]) - int(numbers[1]) + (int(cache[1]) if cache else 0))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
