"""The models of a server: a bundle, or a folder of models with versions, synchronised with the disk.

A new or changed version is loaded while the old one serves, verified, and only then replaces it. The old one answers the
requests that it has accepted, and is closed after that.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnexport.bundle import MANIFEST, Bundle, bundle_hint
from bnexport.errors import BnexportError, BundleError, NotServing, RequestError, Unavailable
from bnexport.files import input_errors
from bnexport.optional import one_line
from bnexport.plain_table import printable
from bnexport.serving.served_model import ServedModel, ServingSettings, open_served
from bnexport.validation.limits import shown

#: Models' names that need no quoting in a URL, and versions, both as in Triton.
_NAME, _VERSION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"), re.compile(r"[1-9][0-9]{0,17}")
_NAMES = (
    "a model's name has letters, digits, _ . and -, its version is a number like 1, not 01: NAME/VERSION/manifest.json"
)
READY, UNAVAILABLE = "READY", "UNAVAILABLE"
_UNLOADED = "unloaded"  # as in Triton's index
Log = Callable[..., None]


@dataclass
class Version:
    """One version of a model."""

    path: Path  # Folder of its bundle
    seen: object = None  # State of its files when it was loaded; a different value means that they changed
    served: ServedModel | None = None  # The open model; None if it is not ready
    reason: str = ""  # Reason for not serving the version that is on disk
    missed: int = 0  # Consecutive polls without it on disk; a folder that is being replaced is missing for a moment

    @property
    def state(self) -> str:
        """READY or UNAVAILABLE."""
        return READY if self.served is not None else UNAVAILABLE


@dataclass
class Repository:
    """The model versions that a server serves, from a bundle or a folder of models (NAME/VERSION/manifest.json).

    ``log`` receives an event's name and its fields.
    """

    path: Path
    settings: ServingSettings
    log: Log
    models: dict[str, dict[str, Version]] = field(default_factory=dict)
    newest: dict[str, ServedModel] = field(default_factory=dict)  # Name -> newest version that is ready
    _closing: set[asyncio.Task[None]] = field(default_factory=set)

    def load(self) -> None:
        """Open every version before the server listens."""
        places = find_bundles(self.path)
        if not places:
            if other := _misnamed(self.path, ()):
                raise BundleError(f"{other[0]} can't be served under its name", remedy=f"Rename it: {_NAMES}")
            raise BundleError(
                f"{self.path} contains no bundle",
                remedy=bundle_hint(
                    self.path, other="Give a bundle such as models/bn_lenet/1, or a folder such as models/"
                ),
            )
        for folder in _left_out(self.path, places.values()):
            self.log("folder left out", folder=str(folder), reason=_NAMES)
        for (name, version), folder in places.items():
            entry = self.models.setdefault(name, {}).setdefault(version, Version(folder))
            entry.seen = _looks(folder)
            self._switch(name, version, entry, self._opened(name, version, folder, strict=True))

    def resolve(self, name: str, version: str | None = None) -> ServedModel:
        """Return the model that a URL names."""
        if version is None and (found := self.newest.get(name)) is not None:
            return found
        versions = self.models.get(name)
        if versions is None:
            raise _unknown(name)
        entry = versions[max(versions, key=int)] if version is None else versions.get(version)
        if entry is None:
            raise RequestError(
                f"model {name!r} has no version {shown(str(version))}",
                remedy=f"It has: {', '.join(versions)}",
                status=404,
            )
        if entry.served is None:
            repaired = "" if entry.reason == _UNLOADED else "Repair the bundle, then "
            raise NotServing(
                f"model {name!r} is not ready: {entry.reason}", remedy=f"{repaired}load it again".capitalize()
            )
        return entry.served

    def problems(self) -> dict[str, str]:
        """Return model and version, such as "bn_lenet/1" -> the reason for not serving the version on disk."""
        return {f"{name}/{version}": entry.reason for name, version, entry in self.each() if entry.reason}

    def ready(self) -> bool:
        """Return True if there is a model, and every model can answer that was not unloaded by a request."""
        return bool(self.newest) and all(name in self.newest or _unloaded(self.models[name]) for name in self.models)

    def each(self) -> Iterator[tuple[str, str, Version]]:
        """Yield every known version."""
        for name, versions in self.models.items():
            for version, entry in versions.items():
                yield name, version, entry

    def index(self, *, only_ready: bool = False) -> list[dict[str, Any]]:
        """Return the answer to v2/repository/index (Triton, "Model Repository Extension")."""
        return [
            {"name": name, "version": version, "state": entry.state, "reason": entry.reason}
            for name, version, entry in self.each()
            if entry.served is not None or not only_ready
        ]

    async def poll(self) -> None:
        """Compare with the disk once: load new and changed versions, close removed ones."""
        places = await asyncio.to_thread(find_bundles, self.path)
        for (name, version), folder in places.items():
            entry = self.models.get(name, {}).get(version) or Version(folder)
            looks = await asyncio.to_thread(_looks, folder)
            if looks != entry.seen:
                entry.seen = looks
                served = await asyncio.to_thread(self._opened, name, version, folder)
                self.models.setdefault(name, {})[version] = entry
                self._switch(name, version, entry, served)
        for name, version, entry in list(self.each()):
            entry.missed = 0 if (name, version) in places else entry.missed + 1
            if entry.missed > 1:
                self._forget(name, version, entry)

    async def reload(self, name: str) -> None:
        """Load every version of a model again, even if its files did not change."""
        places = {
            key: folder for key, folder in (await asyncio.to_thread(find_bundles, self.path)).items() if key[0] == name
        }
        if not places:
            raise _unknown(name, remedy="Copy its folder into the folder of models first")
        for (_, version), folder in places.items():
            entry = self.models.setdefault(name, {}).setdefault(version, Version(folder))
            entry.seen = await asyncio.to_thread(_looks, folder)
            self._switch(name, version, entry, await asyncio.to_thread(self._opened, name, version, folder))
        if reasons := [entry.reason for entry in self.models[name].values() if entry.reason]:
            raise RequestError(f"model {name!r} can't be loaded: {reasons[0]}", remedy="Repair the bundle")

    def unload(self, name: str) -> None:
        """Close every version of a model; the index lists it as unavailable."""
        if name not in self.models:
            raise _unknown(name)
        for version, entry in self.models[name].items():
            self._replace(name, version, entry, None)
            entry.reason = _UNLOADED

    async def close(self) -> None:
        """Close every version, after its last answer."""
        for name, version, entry in list(self.each()):
            self._forget(name, version, entry)
        await asyncio.gather(*self._closing)

    def _opened(self, name: str, version: str, folder: Path, *, strict: bool = False) -> ServedModel | str:
        """Open a model, or return the reason for failing. ``strict`` raises errors of the machine, such as a missing engine."""
        try:
            return open_served(name, version, folder, self.settings)
        except Unavailable as error:
            if strict:
                raise
            return printable(error.sentence)
        except BnexportError as error:
            return printable(error.sentence)
        except Exception as error:  # one bad bundle must not stop the others
            return printable(f"{type(error).__name__}: {one_line(error)}")

    def _switch(self, name: str, version: str, entry: Version, opened: ServedModel | str) -> None:
        if isinstance(opened, str):
            entry.reason = opened
            self.log("model not loaded", model=name, version=version, reason=opened, serving=entry.served is not None)
            return
        self._replace(name, version, entry, opened)
        entry.reason = ""
        replay = opened.replay
        if opened.tuning is not None:
            self.log("tuning", model=name, version=version, result=opened.tuning)
        self.log(
            "model ready", model=name, version=version, runtime=opened.spec.name, workers=opened.batcher.workers,
            golden={"n": replay.n, "error": replay.error, "bound": replay.bound},
        )  # fmt: skip

    def _replace(self, name: str, version: str, entry: Version, served: ServedModel | None) -> None:
        """Send new requests to another model; the old one still answers accepted requests."""
        old, entry.served = entry.served, served
        ready = [item for item in self.models[name].values() if item.served is not None]
        newest = max(ready, key=lambda item: int(item.served.version) if item.served else 0, default=None)
        if newest is None or newest.served is None:
            self.newest.pop(name, None)
        else:
            self.newest[name] = newest.served
        if old is not None:
            task = asyncio.get_running_loop().create_task(old.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            self.log("model closing", model=name, version=version)

    def _forget(self, name: str, version: str, entry: Version) -> None:
        self._replace(name, version, entry, None)
        del self.models[name][version]
        if not self.models[name]:
            del self.models[name]


def find_bundles(path: Path) -> Mapping[tuple[str, str], Path]:
    """Find the bundles below a path: (name, version) -> folder.

    A single bundle has the name and version of its manifest. In a folder of models, the folders' names count, as in Triton.
    """
    if (path / MANIFEST).is_file():
        manifest = Bundle.open(path).manifest
        if not _NAME.fullmatch(manifest.name):
            name = shown(manifest.name)
            raise BundleError(
                f"{path} has the name {name}, which is not valid in a URL", remedy="Export it under another name"
            )
        return {(manifest.name, str(manifest.version)): path}
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise BundleError(f"{path} {what}", remedy="Give a bundle, or a folder of models such as models/")
    with input_errors(path, BundleError, remedy="Check its permissions"):
        return {
            (model.name, version.name): version
            for model in sorted(path.iterdir())
            if _NAME.fullmatch(model.name) and model.is_dir()
            for version in sorted(model.iterdir(), key=lambda item: (len(item.name), item.name))
            if _VERSION.fullmatch(version.name) and (version / MANIFEST).is_file()
        }


def _misnamed(path: Path, found: Iterable[Path]) -> list[Path]:
    """Return bundles in visible folders whose names are not a model's name and version."""
    try:
        folders = {file.parent for file in path.glob(f"[!.]*/[!.]*/{MANIFEST}") if file.is_file()}
    except OSError:
        return []
    return sorted(folders - set(found))


def _left_out(path: Path, found: Collection[Path]) -> list[Path]:
    """Return visible folders that are not served: misnamed bundles, and folders without a bundle."""
    if (path / MANIFEST).is_file():
        return []
    odd = _misnamed(path, found)
    models = {folder.parent for folder in (*found, *odd)}
    empty = [folder for folder in sorted(path.glob("[!.]*")) if folder.is_dir() and folder not in models]
    return [*empty, *odd]


def _unknown(name: str, remedy: str = "The index (POST v2/repository/index) lists them") -> RequestError:
    return RequestError(f"the server has no model {shown(name)}", remedy=remedy, status=404)


def _unloaded(versions: Mapping[str, Version]) -> bool:
    """Return True if a request unloaded every version. The server then stays ready, as in Triton."""
    return all(entry.reason == _UNLOADED for entry in versions.values())


def _looks(folder: Path) -> object:
    """Return sizes and times of a bundle's files, which change when a file is written."""
    try:
        stats = [
            (item.relative_to(folder).as_posix(), item.stat()) for item in sorted(folder.rglob("*")) if item.is_file()
        ]
    except OSError:
        return None
    # Archives and package managers set the same st_mtime for all files; they can't set st_ctime.
    return tuple((name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino) for name, found in stats)
