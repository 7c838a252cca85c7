"""The folder for files that can be created again, and for rows that were given from Python."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "LORATUNE_CACHE"


def cache_dir() -> Path:
    """Return the folder: `$LORATUNE_CACHE`, or else `~/.cache/loratune`."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(CACHE_VARIABLE) or f"{home}/loratune").expanduser()
