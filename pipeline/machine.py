"""What a measured number was measured on; never a host name."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.runtime.coder import HAVE_C


def describe_machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GB (1e9 bytes), operating system, and the versions that matter for speed."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "os": platform.system(),
        "arch": platform.machine(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in ("numpy", "onnxruntime", "pillow")}},
        "coder": "c" if HAVE_C else "python",
    }


def cpu_name() -> str:
    """The processor's model as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]  # Arm has no model name
    return next(iter(names), platform.processor() or platform.machine())
