"""Sizes in words."""

from __future__ import annotations


def human(size: float) -> str:
    """Bytes in powers of ten, as disks and downloads count."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"
