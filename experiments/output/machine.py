"""What figures depend on: processor, devices, load, versions, date."""

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

_PACKAGES = (
    *("ce-jax", "jax", "jaxlib", "optax", "torch", "keras", "tokamax"),
    *("liger-kernel", "cut-cross-entropy", "numpy"),
)


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, devices, load at the start, versions, date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        # Windows has none.
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (path.read_text().splitlines() if path.exists() else ())
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
