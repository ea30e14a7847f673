"""The smallest ASGI application on uvicorn: it reads the whole body and answers a given number of bytes.

``python echo_app.py PORT BYTES``
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

_answer = b""


async def app(_scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    """Answer any request."""
    chunks = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            break
    b"".join(chunks)
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", str(len(_answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": _answer})


if __name__ == "__main__":
    _answer = bytes(int(sys.argv[2]))
    silent = {"log_config": None, "access_log": False, "server_header": False, "date_header": False}
    uvicorn.run(app, port=int(sys.argv[1]), lifespan="off", interface="asgi3", **silent)
