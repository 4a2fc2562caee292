# SPDX-License-Identifier: MIT
"""What a page was made with: versions, machine, threads."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ddpnopt.experiments.fingerprint import code_hash, package_version

LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "pandas", "matplotlib")


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment() -> dict[str, str]:
    """Describe this process's environment; no names of machines, users or folders.

    Returns:
        What and its value, in the order to show them.
    """
    return {
        "ddpnopt": package_version(),
        "numeric code": code_hash(),
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        **{name: _installed(name) for name in LIBRARIES},
        "platform": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": f"{_processor()}, {_cores()} cores",
        "threads": "one torch thread per training",
    }
