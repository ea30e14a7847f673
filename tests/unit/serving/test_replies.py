import gzip
import json
import zlib

import pytest

from bnexport import errors
from bnexport.serving.http.exchange import Reply, error_reply, packed


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.RequestError("x", remedy="y"), 400),
        (errors.RequestError("x", remedy="y", status=404), 404),
        (errors.NotServing("x", remedy="y"), 503),
        (errors.NotServing("x", remedy="y", status=504), 504),
        (errors.FeedError("x", remedy="y"), 400),
        (errors.DataError("x", remedy="y"), 400),
        (errors.BundleError("x", remedy="y"), 500),
        (errors.RuntimeUnavailable("x", remedy="y"), 500),
        (errors.MissingDependency("x", remedy="y"), 501),
    ],
)
def test_errors_have_a_status_and_one_sentence(error: errors.BnexportError, status: int) -> None:
    reply = error_reply(error)
    assert (reply.status, json.loads(reply.body)) == (status, {"error": "x. y"})
    assert (dict(reply.headers).get(b"retry-after") == b"1") == (status == 503)


def test_control_characters_are_not_sent() -> None:
    assert json.loads(error_reply(errors.DataError("a\x1b[2J\nb", remedy="")).body)["error"] == "a?[2J?b"


@pytest.mark.parametrize(
    ("accepted", "unpack"),
    [
        (b"gzip", gzip.decompress),
        (b"deflate", zlib.decompress),
        (b"br, deflate;q=0.5, gzip;q=0", zlib.decompress),
        (b"GZIP, deflate", gzip.decompress),
        (b"identity", None),
        (b"gzip; q=0", None),
        (b"gzip;Q=0.000, deflate;q=0.010", zlib.decompress),
        (b"*;", None),
    ],
)
def test_packing_follows_the_client(accepted: bytes, unpack) -> None:
    body = b"abc" * 1000
    reply = packed(Reply(200, body), accepted)
    assert (unpack(reply.body) if unpack else reply.body) == body
    assert (b"content-encoding" in dict(reply.headers)) == (unpack is not None)
    assert packed(Reply(200, body[:1000]), accepted).body == body[:1000]
