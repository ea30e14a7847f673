"""The page at /: one file that asks the other routes, what it is told about the models, and their reports."""

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
from bnexport.serving.http.exchange import Exchange, State
from bnexport.serving.http.reply import Reply, json_reply
from bnexport.serving.repository import Version
from bnexport.tensors import TensorSpec

HTML = b"text/html; charset=utf-8"
#: Of all pages: no guessing of types, no address of this server to others, nothing old.
_COMMON = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)
#: A report comes with its bundle, from whoever made that: no script runs in it, and it is a stranger to this origin.
REPORT_POLICY = (
    b"sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: Characters of a verdict's summary that are shown.
_SUMMARY = 500


async def page(_state: State, _exchange: Exchange) -> Reply:
    """Return the page, in HTML; it contains nothing about the models and is open without a token."""
    content, policy = _page()
    return Reply(200, content, HTML, (*_COMMON, (b"content-security-policy", policy)))


@functools.cache
def _page() -> tuple[bytes, bytes]:
    """Read the file, and make the policy (W3C, "Content Security Policy Level 3") for its own script and style alone."""
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


async def models(state: State, _exchange: Exchange) -> Reply:
    """List every model version: its state, signature, labels and verdict."""
    entries = [_described(state, name, version, entry) for name, version, entry in state.repository.each()]
    return json_reply({"models": entries})


def _described(state: State, name: str, version: str, entry: Version) -> dict[str, Any]:
    value: dict[str, Any] = {
        "name": name,
        "version": version,
        "state": entry.state,
        "reason": entry.reason,
        "newest": False,
        "inputs": [],
        "outputs": [],
        "labels": None,
        "image": None,
        "verdict": None,
        "report": False,
    }
    served = entry.served
    if served is None:
        return value
    metadata, image = served.metadata([version]), served.preprocessing
    return value | {
        "newest": state.repository.newest(name) is served,
        "inputs": [
            {**tensor, "smallest": _smallest(spec)}
            for tensor, spec in zip(metadata["inputs"], served.signature.inputs, strict=True)
        ],
        "outputs": metadata["outputs"],
        "labels": None if served.labels is None else list(served.labels),
        "image": None if image is None else {key: getattr(image, key) for key in ("channels", "height", "width")},
        "verdict": _verdict(served.bundle),
        "report": REPORT in served.bundle.manifest.files,
    }


def _smallest(spec: TensorSpec) -> list[int]:
    """Return the shape of the smallest tensor that the input takes."""
    return [spec.smallest.get(dim, 1) if isinstance(dim, str) else dim for dim in spec.shape]


def _verdict(bundle: Bundle) -> dict[str, Any] | None:
    """Return the manifest's verdict of the verification at export; its values are untrusted."""
    told = bundle.manifest.verification
    if "passed" not in told:
        return None
    return {"passed": told["passed"] is True, "summary": str(told.get("summary", ""))[:_SUMMARY]}


async def report(state: State, _exchange: Exchange, name: str, version: str) -> Reply:
    """Return the report of a model's verification at export, in HTML, from its bundle."""
    bundle = state.repository.resolve(name, version).bundle
    content = await asyncio.to_thread(_report, bundle, f"{name}/{version}")
    return Reply(200, content, HTML, (*_COMMON, (b"content-security-policy", REPORT_POLICY)))


def _report(bundle: Bundle, shown: str) -> bytes:
    if REPORT not in bundle.manifest.files:
        raise RequestError(f"{shown} has no report", remedy="bnexport fold-and-export writes one", status=404)
    try:
        content = bundle.file(REPORT).read_bytes()
    except (BnexportError, OSError) as error:
        reason = one_line(error)
        raise NotServing(f"the report of {shown} can't be read: {reason}", remedy="Mend the bundle") from error
    if hashlib.sha256(content).hexdigest() != bundle.manifest.files[REPORT]["sha256"]:
        raise NotServing(f"the report of {shown} was changed after it was written", remedy="Mend the bundle")
    return content
