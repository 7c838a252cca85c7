"""The folder for files that can be recreated."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "LORATUNE_CACHE"


def cache_dir() -> Path:
    """Return the folder for files that can be recreated: `$LORATUNE_CACHE`, else `~/.cache/loratune`."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(CACHE_VARIABLE) or f"{home}/loratune").expanduser()
