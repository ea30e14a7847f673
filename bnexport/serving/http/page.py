"""The web page at /, the list of models that it displays, and the models' reports."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import re
from importlib import resources
from typing import Any

from bnexport.bundle import REPORT, Bundle
from bnexport.errors import BnexportError, NotServing, RequestError
from bnexport.optional import one_line
from bnexport.serving.http.exchange import Exchange, Reply, json_reply
from bnexport.serving.repository import Version
from bnexport.serving.state import ServerState

HTML = b"text/html; charset=utf-8"
#: Headers of all pages: browsers guess no types, send no referrer, and cache nothing.
_COMMON = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)
#: A report is an untrusted file of its bundle: it runs no script, and has another origin than this server.
REPORT_POLICY = (
    b"sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: Displayed characters of a verdict's summary.
_SUMMARY = 500


async def page(_state: ServerState, _exchange: Exchange) -> Reply:
    """Return the page in HTML. It contains nothing about the models and needs no token."""
    content, policy = _page()
    return Reply(200, content, HTML, (*_COMMON, (b"content-security-policy", policy)))


@functools.cache
def _page() -> tuple[bytes, bytes]:
    """Return the file, and a policy that allows only its script and style (W3C, "Content Security Policy Level 3")."""
    content = resources.files("bnexport.serving.http").joinpath("page.html").read_bytes()
    script, style = (_hashes(content, tag) for tag in (b"script", b"style"))
    policy = (
        b"default-src 'none'; script-src %s; style-src %s; connect-src 'self'; img-src data:; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return content, policy % (script, style)


def _hashes(content: bytes, tag: bytes) -> bytes:
    found = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), content, re.DOTALL)
    return b" ".join(b"'sha256-%s'" % base64.b64encode(hashlib.sha256(text).digest()) for text in found)


async def models(state: ServerState, _exchange: Exchange) -> Reply:
    """List every model version: its state, signature, labels and verdict."""
    entries = [_described(state, name, version, entry) for name, version, entry in state.repository.each()]
    return json_reply({"models": entries})


def _described(state: ServerState, name: str, version: str, entry: Version) -> dict[str, Any]:
    value: dict[str, Any] = {"name": name, "version": version, "state": entry.state, "reason": entry.reason}
    served = entry.served
    if served is None:
        nothing = {"labels": None, "image": None, "verdict": None, "report": False}
        return value | {"newest": False, "inputs": [], "outputs": []} | nothing
    metadata, image = served.metadata([version]), served.preprocessing
    return value | {
        "newest": state.repository.newest.get(name) is served,
        "inputs": [
            {**tensor, "smallest": [spec.smallest.get(dim, 1) if isinstance(dim, str) else dim for dim in spec.shape]}
            for tensor, spec in zip(metadata["inputs"], served.signature.inputs, strict=True)
        ],
        "outputs": metadata["outputs"],
        "labels": None if served.labels is None else list(served.labels),
        "image": None if image is None else {key: getattr(image, key) for key in ("channels", "height", "width")},
        "verdict": _verdict(served.bundle),
        "report": REPORT in served.bundle.manifest.files,
    }


def _verdict(bundle: Bundle) -> dict[str, Any] | None:
    """Return the verdict of the verification at export from the manifest; its values are untrusted."""
    verdict = bundle.manifest.verification
    if "passed" not in verdict:
        return None
    return {"passed": verdict["passed"] is True, "summary": str(verdict.get("summary", ""))[:_SUMMARY]}


async def report(state: ServerState, _exchange: Exchange, name: str, version: str) -> Reply:
    """Return the HTML report of a model's verification at export, from its bundle."""
    bundle = state.repository.resolve(name, version).bundle
    content = await asyncio.to_thread(_report, bundle, f"{name}/{version}")
    return Reply(200, content, HTML, (*_COMMON, (b"content-security-policy", REPORT_POLICY)))


def _report(bundle: Bundle, shown: str) -> bytes:
    if REPORT not in bundle.manifest.files:
        raise RequestError(f"{shown} has no report", remedy="Write one with bnexport fold-and-export", status=404)
    try:
        content = bundle.file(REPORT).read_bytes()
    except (BnexportError, OSError) as error:
        reason = one_line(error)
        raise NotServing(f"the report of {shown} can't be read: {reason}", remedy="Repair the bundle") from error
    if hashlib.sha256(content).hexdigest() != bundle.manifest.files[REPORT]["sha256"]:
        raise NotServing(f"the report of {shown} was changed after it was written", remedy="Repair the bundle")
    return content
