"""The installed versions, for tests of what an older one has not."""

from __future__ import annotations

from importlib import metadata


def version_of(package: str) -> tuple[int, ...]:
    """Major and minor version of a package, and its patch where that is a number; empty where it is not installed."""
    try:
        words = metadata.version(package).partition("+")[0].split(".")
    except metadata.PackageNotFoundError:
        return ()
    return tuple(int(word) for word in words if word.isdigit())
