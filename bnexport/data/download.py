"""Downloads that arrive whole and checked, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from bnexport.errors import NetworkError
from bnexport.files import write_atomically
from bnexport.optional import one_line

#: Called with the file's name, the bytes so far, and the bytes in all (None when the server does not say).
DownloadProgress = Callable[[str, int, int | None], None]

TIMEOUT_S = 30.0
#: The largest official file has 26 MB; a server that sends more sends something else.
MAX_BYTES = 128 * 2**20
_BLOCK = 2**18


def download_file(
    path: Path, urls: Sequence[str], md5: str, remedy: str, progress: DownloadProgress | None = None
) -> None:
    """Fetch a file from the first address that delivers it with the right MD5, and write it atomically.

    Args:
        path: Where it goes.
        urls: Tried in order.
        md5: Of the file's bytes.
        remedy: For the error's text, when no address delivers.
        progress: Told of the bytes as they come.

    Raises:
        NetworkError: No address delivered it; each one's reason is named. Nothing is written.
        OutputError: It can't be written.
    """
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
        reasons.append(f"{url}: {len(content)} bytes came, with a wrong MD5")
    raise NetworkError(f"{path.name} could not be downloaded ({'; '.join(reasons)})", remedy=remedy)


def _fetch(url: str, name: str, progress: DownloadProgress | None) -> bytes:
    """The body at an address; raises http.client.IncompleteRead when less came than was announced."""
    request = urllib.request.Request(url, headers={"User-Agent": "bnexport"})
    with contextlib.closing(urllib.request.urlopen(request, timeout=TIMEOUT_S)) as response:
        announced = response.headers.get("Content-Length", "")
        total = int(announced) if announced.isdigit() else None
        content = bytearray()
        while block := response.read(_BLOCK):
            content += block
            if len(content) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES} bytes came")
            if progress is not None:
                progress(name, len(content), total)
    if total is not None and len(content) < total:
        raise http.client.IncompleteRead(b"", total - len(content))
    return bytes(content)
