"""Search for a data set's files in the given folder, the folder of BNEXPORT_DATA and the user's cache; download."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bnexport.data.dataset_table import DataFile, DatasetInfo
from bnexport.errors import DataError, NetworkError
from bnexport.files import input_errors, write_atomically
from bnexport.optional import installed, one_line

#: Called with the file's name, the bytes so far, and the total bytes (None if the server does not send them).
DownloadProgress = Callable[[str, int, int | None], None]

TIMEOUT_S = 30.0
#: The largest official file has 26 MB; a server that sends more than this limit sends another file.
MAX_BYTES = 128 * 2**20
_BLOCK = 2**18


def download_file(
    path: Path, urls: Sequence[str], md5: str, remedy: str, progress: DownloadProgress | None = None
) -> None:
    """Download a file from the first address that delivers it with the right MD5, and write it atomically."""
    reasons = []
    for url in urls:
        # OSError covers URLError, HTTPError, timeouts and resets; ValueError an address that is not one.
        try:
            content = _fetch(url, path.name, progress)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reasons.append(f"{url}: {one_line(error)}")
            continue
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
            write_atomically(path, content)
            return
        reasons.append(f"{url}: received {len(content)} bytes with a wrong MD5")
    raise NetworkError(f"{path.name} could not be downloaded ({'; '.join(reasons)})", remedy=remedy)


def _fetch(url: str, name: str, progress: DownloadProgress | None) -> bytes:
    """Return the body at an address; raises http.client.IncompleteRead for a short one."""
    request = urllib.request.Request(url, headers={"User-Agent": "bnexport"})
    with contextlib.closing(urllib.request.urlopen(request, timeout=TIMEOUT_S)) as response:
        announced = response.headers.get("Content-Length", "")
        total = int(announced) if announced.isdigit() else None
        content = bytearray()
        while block := response.read(_BLOCK):
            content += block
            if len(content) > MAX_BYTES:
                raise ValueError(f"received more than {MAX_BYTES} bytes")
            if progress is not None:
                progress(name, len(content), total)
    if total is not None and len(content) < total:
        raise http.client.IncompleteRead(b"", total - len(content))
    return bytes(content)


#: Environment variable with a root of data sets, which is only read.
DATA_VARIABLE = "BNEXPORT_DATA"


@dataclass(frozen=True)
class Located:
    """Checked files of a data set."""

    paths: tuple[Path, ...]  # Packed or unpacked files, in the order of the request
    origin: str  # Origin, in words


def locate(
    info: DatasetInfo,
    files: Sequence[DataFile],
    *,
    data_dir: str | Path | None = None,
    fetch: bool = False,
    progress: DownloadProgress | None = None,
) -> Located:
    """Find files, or download them.

    A given ``data_dir`` is the only folder that is searched. Otherwise the first of BNEXPORT_DATA and the cache that has all
    files is used. The MD5 of a packed file is checked; for an unpacked file no MD5 is published, so its reader checks it.
    """
    cache = cache_folder()
    variable = os.environ.get(DATA_VARIABLE)
    roots = [Path(data_dir)] if data_dir else [*([Path(variable)] if variable else []), cache]
    for root in roots:
        paths = [path for file in files if (path := _find(raw_folder(root, info), file)) is not None]
        if len(paths) < len(files):
            continue
        wrong = [path for path, file in zip(paths, files, strict=True) if not _is_right(path, file)]
        if not wrong:
            return Located(tuple(paths), str(raw_folder(root, info)))
        if root != cache or not fetch:
            raise _wrong_md5(wrong[0])
    if not fetch:
        places = ", ".join(str(raw_folder(root, info)) for root in roots)
        raise DataError(f"{info.title} is missing (searched {places})", remedy=remedy(info))
    return _download_missing(info, files, Path(data_dir) if data_dir else cache, progress)


def cache_folder() -> Path:
    """Return bnexport's folder in the user's cache.

    Without platformdirs, as on serving machines, it is the folder that platformdirs returns on Linux.
    """
    if not installed("platformdirs"):
        return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "bnexport"
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("bnexport"))


def raw_folder(root: Path, info: DatasetInfo) -> Path:
    """Return the folder of a set's files below a root (torchvision's layout)."""
    return root / info.folder / "raw"


def remedy(info: DatasetInfo) -> str:
    """Return the remedy for a set that is missing and can't be downloaded."""
    return (
        f"Put its four .gz files into DIR/{info.folder}/raw and pass --data-dir DIR or set {DATA_VARIABLE}=DIR, "
        "or use --dataset digits, which needs no files"
    )


def _download_missing(
    info: DatasetInfo, files: Sequence[DataFile], target: Path, progress: DownloadProgress | None
) -> Located:
    folder = raw_folder(target, info)
    paths = []
    for file in files:
        path = _find(folder, file)
        if path is not None and not _is_right(path, file):
            if target != cache_folder():
                raise _wrong_md5(path)  # the user's files are not overwritten
            path = None
        if path is None:
            path = folder / file.name
            download_file(path, [mirror + file.name for mirror in info.mirrors], file.md5, remedy(info), progress)
        paths.append(path)
    return Located(tuple(paths), f"downloaded to {folder}")


def _find(folder: Path, file: DataFile) -> Path | None:
    """Return the packed file, which can be checked, else the unpacked one, else None."""
    return next((path for path in (folder / file.name, folder / file.name.removesuffix(".gz")) if path.is_file()), None)


def _is_right(path: Path, file: DataFile) -> bool:
    """Return True if a packed file has its MD5; an unpacked one is not checked."""
    if path.name != file.name:
        return True
    with input_errors(path, DataError, remedy="Check the file's permissions"), path.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == file.md5


def _wrong_md5(path: Path) -> DataError:
    return DataError(
        f"{path} has a wrong MD5, so it is damaged or another file", remedy="Delete it, or copy the official file there"
    )
