"""Counters of several processes: whole at any moment, summed, and never falling."""

import os
import pickle
from collections import Counter
from collections.abc import Iterator

import pytest

from bnexport.serving.counters import (
    ModelStatistics,
    ModelTotals,
    Records,
    Share,
    Totals,
    new_memory,
    note_end,
    note_start,
    read_totals,
)

KEY = ("bn_lenet", "1")


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = new_memory()
    yield descriptor
    os.close(descriptor)


def statistics(requests: int, *, rows: int = 3, ns: int = 1_500_000) -> ModelStatistics:
    found = ModelStatistics()
    for _ in range(requests):
        found.executed(requests=1, rows=rows, queue_ns=10, infer_ns=20)
        found.answered(ns, ok=True)
    found.answered(7, ok=False)
    return found


def totals(requests: int, *, ready: bool = True, waiting: int = 0) -> Totals:
    served = ModelTotals(ready, waiting, 1, statistics(requests))
    calls = Counter({("/inference.GRPCInferenceService/ModelInfer", "OK"): 2 * requests})
    return Totals(Counter({("v2", 200): requests, ("", 404): 1}), calls, 3, 2, {KEY: served})


def test_a_record_is_whole_although_its_writer_was_killed(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(memory)
    assert records.read(0) is None
    for text in (b"first", b"second, which is longer", b"3"):
        assert records.write(0, text)
        assert records.read(0) == text
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[: len(data) // 2], offset))
    for _ in range(3):
        records.write(0, b"a record that its writer could not finish")
        assert records.read(0) == b"3"
    monkeypatch.undo()
    assert Records(memory).write(0, b"the successor's")
    assert records.read(0) == b"the successor's"


def test_heartbeats_are_other_bytes_each_time_and_touch_no_record(memory: int) -> None:
    records = Records(memory)
    records.write(0, b"of 0")
    before = [records.heartbeat(slot) for slot in (0, 255)]
    for slot in (0, 255, 0, 255):
        other = records.heartbeat(255 - slot)
        assert records.heartbeat(slot) == records.heartbeat(slot)
        records.beat(slot)
        assert records.heartbeat(slot) not in before
        assert records.heartbeat(255 - slot) == other
        before.append(records.heartbeat(slot))
    assert records.read(0) == b"of 0"


def test_slots_do_not_touch_each_other_and_what_is_too_large_is_not_written(memory: int) -> None:
    records = Records(memory)
    large = bytes(2**24 - 16)
    for slot in (0, 1, 2, 1):
        assert records.write(slot, large if slot == 1 else b"%d" % slot)
    assert [records.read(slot) for slot in (0, 1, 2, 3)] == [b"0", large, b"2", None]
    assert not records.write(0, large + b"x")
    assert records.read(0) == b"0"


def test_a_record_holds_everything_that_was_counted(memory: int) -> None:
    before, records = totals(5, waiting=2), Records(memory)
    before.processes, before.starts = {3: 1234}, {3: 2}
    records.write(3, pickle.dumps(before))
    after = read_totals(records, 3)
    assert after == before
    assert after.models[KEY].statistics.to_json(*KEY) == statistics(5).to_json(*KEY) | {  # type: ignore[union-attr]
        "last_inference": before.models[KEY].statistics.last_ms  # type: ignore[union-attr]
    }


def test_sums_leave_the_counters_of_each_process_alone(memory: int) -> None:
    records = Records(memory)
    own, other = totals(4, waiting=1), totals(6, ready=False, waiting=2)
    first, second = Share(records, 0, 2), Share(records, 1, 2)
    second.publish(other)
    for _ in range(3):
        together = first.together(own)
        assert together.requests == {("v2", 200): 10, ("", 404): 2}
        assert sum(together.calls.values()) == 20
        assert (together.active, together.calls_active, together.processes) == (6, 4, {0: os.getpid(), 1: os.getpid()})
        found = together.models[KEY]
        assert (found.ready, found.waiting, found.sessions) == (False, 3, 2), "ready if all are"
        assert found.statistics is not None
        assert (found.statistics.rows, found.statistics.success.count, found.statistics.fail.count) == (30, 10, 2)
        assert sum(found.statistics.seconds.counts) == 10
        assert found.statistics.by_size[3].count == 10
    assert own.models[KEY].statistics.rows == 12  # type: ignore[union-attr]
    assert second.together(other).models[KEY].statistics.rows == 30  # type: ignore[union-attr]


def test_a_successor_continues_the_counters(memory: int) -> None:
    records = Records(memory)
    for start in (1, 2, 3):
        note_start(records, 0)
        share = Share(records, 0, 2)
        published = share.publish(totals(2, waiting=5))
        assert published.starts == {0: start}
        assert published.requests["v2", 200] == 2 * start
        assert published.models[KEY].statistics.rows == 6 * start  # type: ignore[union-attr]
        assert published.models[KEY].waiting == 5
        note_end(records, 0)
        left = read_totals(records, 0)
        assert (left.active, left.calls_active, left.processes, left.starts) == (0, 0, {}, {0: start})
        assert sum(left.calls.values()) == 4 * start
        assert (left.models[KEY].ready, left.models[KEY].waiting, left.models[KEY].sessions) == (None, 0, 0)
        assert left.requests["v2", 200] == 2 * start
    seen = Share(records, 1, 2).together(totals(1))
    assert seen.models[KEY].ready is True, "ended processes do not count"
    assert seen.models[KEY].statistics.rows == 21  # type: ignore[union-attr]


def test_a_version_loaded_again_and_one_that_went(memory: int) -> None:
    share = Share(Records(memory), 0, 1)
    first = totals(3)
    share.publish(first)
    assert share.publish(first).models[KEY].statistics.rows == 9  # type: ignore[union-attr]
    again = totals(2)
    for _ in range(2):
        assert share.publish(again).models[KEY].statistics.rows == 15  # type: ignore[union-attr]
    assert share.publish(Totals()).models == {}
    unloaded = Totals(models={KEY: ModelTotals(ready=False)})
    assert share.publish(unloaded).models[KEY].statistics is None
    assert share.publish(totals(1)).models[KEY].statistics.rows == 18  # type: ignore[union-attr]
