"""Peak memory of a stage and the host it ran on: for the manifest, outside of every digest."""

from __future__ import annotations

import os
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

_MB = 2**20


def reset_peak() -> None:
    """Start a new measurement of the peak, where the system allows it."""
    with suppress(OSError):  # not Linux, or not allowed: the peak is then that of the process so far
        Path("/proc/self/clear_refs").write_text("5")
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """Megabytes: resident memory, and that of the first GPU where one is in use."""
    used = {"peak_memory_mb": round(_resident() / _MB, 1)}
    if (cuda := _cuda()) is not None:
        used["peak_gpu_memory_mb"] = round(cuda.max_memory_allocated() / _MB, 1)
    return used


def host() -> dict[str, Any]:
    """What a result may depend on beyond its key: the machine's kind and torch's number of threads."""
    torch, cuda = sys.modules.get("torch"), _cuda()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "gpu": cuda.get_device_name() if cuda else None,
    }


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _resident() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
