"""Refusal of names and places of files that lead out of a folder, or that look like another name."""

from __future__ import annotations

import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from bnexport.files import Refusal
from bnexport.validation.limits import limit, shown

#: Characters that look like a separator or a dot: "..∕x" is one name and looks like a path.
LOOK_ALIKES = "\u2044\u2215\u2216\u29f5\u29f8\u29f9\ufe68\uff0f\uff3c\u2024\uff0e\u2025\u2026\ua789\uff1a"
#: Names that Windows gives to devices in every folder, with any ending ("Naming Files, Paths, and Namespaces").
DEVICES = frozenset(
    ["con", "prn", "aux", "nul", "conin$", "conout$"]
    + [f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789\u00b9\u00b2\u00b3"]
)
#: Categories of Unicode with invisible or misleading characters: controls, formats (some reverse the direction of text),
#: surrogates, private and unassigned characters, line and paragraph ends.
HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def check_name(name: str) -> None:
    """Refuse a name that is not a plain relative path with "/" on every system."""
    if (problem := name_problem(name)) is not None:
        raise Refusal(f"has the file name {shown(name)}, which {problem}")


def name_problem(name: str) -> str | None:
    """Return the reason why a name is not a plain relative path, as the end of a sentence; None if it is one."""
    if (problem := _characters_problem(name)) is not None:
        return problem
    parts = name.split("/")
    if len(parts) > limit("name-parts"):
        return f"is {len(parts)} folders deep, more than {limit('name-parts')}"
    for part in parts:
        if (problem := _part_problem(part)) is not None:
            return problem
    return None


def _characters_problem(name: str) -> str | None:
    if not name:
        return "is empty"
    if name.startswith("/") or name[1:2] == ":":
        return "is absolute"
    if "\\" in name:
        return "has a backslash"
    for char in name:
        if unicodedata.category(char) in HIDDEN or (char.isspace() and char != " "):
            return f"has the hidden character U+{ord(char):04X}"
        if char in LOOK_ALIKES:
            return f"has U+{ord(char):04X}, which looks like another character"
    if any(char in ':*?"<>|' for char in name):
        return "has a character that Windows reserves"
    return None if unicodedata.is_normalized("NFC", name) else "is not in Unicode's composed form (NFC)"


def _part_problem(part: str) -> str | None:
    if part in ("", ".", ".."):
        return f"has the part {part!r}" if part else "has an empty part"
    if len(part.encode()) > limit("name-bytes"):
        return f"has a part of more than {limit('name-bytes')} bytes"
    if part != part.rstrip(". ") or part != part.lstrip(" "):
        return "has a part that starts or ends with a space, or ends with a dot"
    if part.split(".")[0].rstrip().casefold() in DEVICES:
        return "is a device on Windows"
    return None


def check_twins(names: Iterable[str]) -> None:
    """Refuse different names that are one file on a system that ignores case."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other is not name:
            raise Refusal(f"has {shown(other)} and {shown(name)}, which are one file on some systems")


def place_problem(folder: Path, name: str) -> str | None:
    """Return the reason why a file below a folder is not a separate plain file; None if it is, or does not exist.

    Every part of the path is checked, because a linked folder leads out as well as a linked file. A file with a second name
    (a hard link) may be any file of the disk, and can be changed through its other name.
    """
    place = folder
    for part in name.split("/"):
        place = place / part
        try:
            found = place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if stat.S_ISLNK(found.st_mode):
            return f"{name} is not a plain file: it is reached through a symbolic link"
    if not stat.S_ISREG(found.st_mode):
        return f"{name} is not a plain file"
    if found.st_nlink > 1:
        return f"{name} is not a plain file: it has {found.st_nlink} names (hard links)"
    return None


def check_regular(path: Path) -> None:
    """Refuse a pipe, a socket or a device: reading a pipe never ends, and a device has no size."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise Refusal("is not a plain file")
