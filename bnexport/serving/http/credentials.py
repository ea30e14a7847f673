"""What a server is given to know its clients by, and to be known by: the token, and the files of TLS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bnexport.errors import UsageError
from bnexport.optional import one_line


def read_token(file: Path) -> bytes:
    """The token in a file, without the white space around it.

    Raises:
        UsageError: The file can't be read, is empty, or holds what no header can.
    """
    try:
        token = file.read_bytes().strip()
    except OSError as error:
        raise UsageError(f"{file} can't be read: {one_line(error)}", remedy="Give a file with one token") from error
    if len(token) < 16 or len(token) > 4096 or any(not 0x21 <= byte <= 0x7E for byte in token):
        raise UsageError(
            f"{file} holds no token of 16 to 4096 visible ASCII characters", remedy="Write one: openssl rand -hex 32"
        )
    return token


def tls_options(certificate: Path, key: Path) -> dict[str, Any]:
    """What uvicorn is given for TLS.

    Args:
        certificate: PEM, with those that it needs behind it.
        key: PEM.

    Raises:
        UsageError: The key has a passphrase: OpenSSL would ask for it at the terminal.
    """
    try:  # a pipe can be read only once
        locked = key.is_file() and b"ENCRYPTED" in key.read_bytes()
    except OSError as error:
        raise UsageError(f"{key} can't be read: {one_line(error)}", remedy="Check its permissions") from error
    if locked:
        raise UsageError(
            f"the key in {key} has a passphrase",
            remedy="Give one without, in a file of this user alone: openssl pkey -in KEY -out PLAIN",
        )
    return {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
