import io
import json
import logging
import select
import threading

import pytest

from bnexport.serving.access_log import JsonLog


class Stuck(io.StringIO):
    """A stream whose reader waits for a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def write(self, text: str) -> int:
        assert self.gate.wait(240)
        return super().write(text)


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_one_object_per_line_in_order() -> None:
    stream = io.StringIO()
    log = JsonLog(stream)
    for index in range(5):
        log.event("step", index=index, text="é\n")
    log.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["event"], line["index"], line["text"]) for line in lines] == [("step", i, "é\n") for i in range(5)]


def test_a_slow_reader_blocks_no_writer_and_dropped_lines_are_counted() -> None:
    stream = Stuck()
    log = JsonLog(stream)
    for index in range(1000):
        log.event("step", index=index)
    stream.gate.set()
    while not log._pieces.empty():
        pass
    log.event("last")
    log.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    dropped = sum(line["lines"] for line in lines if line["event"] == "log lines dropped")
    assert sum(line["event"] == "step" for line in lines) + dropped == 1000
    assert dropped > 500


def test_a_reader_that_went_away_blocks_no_writer() -> None:
    log = JsonLog(Gone())
    log.event("one")
    log.event("two")
    log.close()
    assert not log._thread.is_alive()


def test_lines_of_one_process_among_several_name_it_and_come_in_pieces_that_a_pipe_takes_whole() -> None:
    pieces: list[str] = []

    class Pieces(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    log = JsonLog(Pieces(), process=3)
    for index in range(100):
        log._entries.append({"index": index, "text": "x" * 300})
    log.event("long", text="y" * 3 * select.PIPE_BUF)
    log.event("short")
    log.close()
    assert all(piece.endswith("\n") for piece in pieces)
    assert [len(piece) > select.PIPE_BUF for piece in pieces].count(True) == 1, "only a line that is longer by itself"
    lines = [json.loads(line) for line in "".join(pieces).splitlines()]
    assert [line["index"] for line in lines[:100]] == list(range(100))
    assert [(line["event"], line["process"]) for line in lines[100:]] == [("long", 3), ("short", 3)]


def test_logs_of_libraries_are_json_too() -> None:
    stream = io.StringIO()
    log = JsonLog(stream)
    logger = logging.getLogger("a library")
    log.take_over("a library")
    logger.info("not this")
    logger.warning("it is %s", "late")
    try:
        raise ZeroDivisionError("on purpose")
    except ZeroDivisionError:
        logger.exception("a callback failed\n")
    log.close()
    late, failed = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (late["event"], late["logger"], late["message"]) == ("warning", "a library", "it is late")
    assert (failed["event"], failed["message"]) == ("fault", "a callback failed\n")
    assert failed["trace"].endswith("ZeroDivisionError: on purpose")
    assert (logger.handlers, logger.propagate) == ([], True)


def test_a_name_that_is_not_utf8_does_not_stop_a_line() -> None:
    stream = io.StringIO()
    log = JsonLog(stream)
    log.event("poll failed", reason="/models/\udcff can't be read")
    log.event("next")
    log.close()
    bad, good = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (bad["event"], bad["reason"][-13:], good["event"]) == ("poll failed", "can't be read", "next")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_lines_are_json_in_any_encoding(encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace")
    log = JsonLog(stream)
    log.event("request", path="/v2/models/caf\u00e9\U0001f600")
    log.close()
    assert json.loads(stream.buffer.getvalue())["path"] == "/v2/models/caf\u00e9\U0001f600"  # type: ignore[attr-defined]
