"""Names of sources → labels of tables and charts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Shorten each name to its last part, or to as many last parts as distinguish it from the others."""
    parts = {name: name.rstrip("/").split("/") for name in names}
    count = dict.fromkeys(parts, 1)
    for name, own in parts.items():
        while count[name] < len(own) and any(
            other[-count[name] :] == own[-count[name] :] for key, other in parts.items() if key != name
        ):
            count[name] += 1
    return {name: "/".join(own[-count[name] :]) for name, own in parts.items()}
