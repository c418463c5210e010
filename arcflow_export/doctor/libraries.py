"""Compare the installed libraries with the requirements of this project's extras: an extra -> what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement

from arcflow_export.doctor.findings import Finding
from arcflow_runtime.installing import command_for_extra

_PROJECT = "arcflow"


@dataclass(frozen=True)
class Libraries:
    """The libraries of one extra: `here` are installed in a version that fits, `wrong` are missing or do not fit."""

    here: tuple[str, ...]
    wrong: tuple[str, ...]


def libraries(extra: str = "") -> Libraries:
    """Compare the requirements of an extra, or of the runtime alone, with what is installed.

    Raises:
        metadata.PackageNotFoundError: this project itself is not installed, so its requirements are unknown.
        KeyError: the installed version has no such extra.
    """
    if extra and extra not in (metadata.metadata(_PROJECT).get_all("Provides-Extra") or ()):
        raise KeyError(extra)
    here, wrong = [], []
    for requirement in _requirements(extra):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            here.append(f"{requirement.name} {version}")
        else:
            wrong.append(f"{requirement.name} must be {requirement.specifier}, got {version}")
    return Libraries(tuple(here), tuple(wrong))


def check_libraries(extra: str, purpose: str, needed: bool) -> Finding:
    """Check the libraries of an extra. If what was asked does not need them, a missing one is a note, not a failure."""
    name = f"libraries for {purpose}"
    try:
        found = libraries(extra)
    except metadata.PackageNotFoundError:
        return Finding(name, "note", f"{_PROJECT} runs without being installed, so its requirements are unknown")
    except KeyError:
        found_text = f"the installed {_PROJECT} has no extra {extra!r}"
        return Finding(name, "note", found_text, f"install it again; run: {command_for_extra(extra)}")
    if not found.wrong:
        return Finding(name, "ok", ", ".join(found.here) or "none are needed on this platform")
    return Finding(name, "fail" if needed else "note", ", ".join(found.wrong), f"run: {command_for_extra(extra)}")


def _requirements(extra: str) -> list[Requirement]:
    """The requirements of an extra on this machine; extras that it includes are followed."""
    found: list[Requirement] = []
    for text in metadata.requires(_PROJECT) or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # the format of a newer Python
            continue
        marker = requirement.marker
        if extra and (marker is None or marker.evaluate({"extra": ""})):
            continue
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        if requirement.name == _PROJECT:
            for included in sorted(requirement.extras):
                found += _requirements(included)
        else:
            found.append(requirement)
    return found
