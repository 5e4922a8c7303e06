"""Which coinfer this is, as devices and edges tell each other."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def coinfer_version() -> str:
    """Of the installed package; "unknown" in a checkout that is not installed."""
    try:
        return version("coinfer")
    except PackageNotFoundError:
        return "unknown"
