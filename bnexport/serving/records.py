"""A record and a heartbeat per process of a server, in memory that all of them hold open; the record is what they counted."""

from __future__ import annotations

import os
import struct
import time
import zlib

#: Before a record's bytes: its number in the order of writing, its length, and its CRC-32.
_HEAD = struct.Struct("<QII")
#: Bytes of one of the two places that each slot has. What is not written takes no memory.
_PLACE = 1 << 24
_TRIES = 5
#: A heartbeat, and the bytes before the records that are kept for those of all slots.
_BEAT, _BEATS = struct.Struct("<Q"), 4096


class Records:
    """Slots with one record each; each slot has one writer at a time, and any number of readers.

    A record is written to the older of two places. So a reader finds a whole one at any moment, also when the writer was
    killed in the middle of a write. The memory has no name: nothing is left of it when the last process ends.

    Args:
        descriptor: Of the memory, made by ``new_memory`` in the process that starts the others.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, slot: int, record: bytes) -> bool:
        """Replace a slot's record.

        Returns:
            Whether it did: a record of more than 16 MB, which is the counters of some ten thousand models, is not written.
        """
        if len(record) > _PLACE - _HEAD.size:
            return False
        numbers = [found[0] if (found := self._place(slot, index)) is not None else 0 for index in (0, 1)]
        older = numbers.index(min(numbers))
        head = _HEAD.pack(max(numbers) + 1, len(record), zlib.crc32(record))
        os.pwrite(self._descriptor, head + record, _offset(slot, older))
        return True

    def read(self, slot: int) -> bytes | None:
        """A slot's newest record; None before the first."""
        for _ in range(_TRIES):  # both places can be torn only when the writer wrote twice meanwhile
            found = [place for index in (0, 1) if (place := self._place(slot, index)) is not None]
            if found:
                return max(found)[1]
        return None

    def beat(self, slot: int) -> None:
        """Show that a slot's process is alive."""
        os.pwrite(self._descriptor, _BEAT.pack(time.monotonic_ns()), slot * _BEAT.size)

    def heartbeat(self, slot: int) -> bytes:
        """What ``beat`` wrote last: other bytes each time."""
        return os.pread(self._descriptor, _BEAT.size, slot * _BEAT.size)

    def _place(self, slot: int, index: int) -> tuple[int, bytes] | None:
        """Number and bytes of a record; None where there is none, or a torn one."""
        start = _offset(slot, index)
        head = os.pread(self._descriptor, _HEAD.size, start)
        if len(head) < _HEAD.size:
            return None
        number, length, crc = _HEAD.unpack(head)
        record = os.pread(self._descriptor, length, start + _HEAD.size)
        return (number, record) if number and len(record) == length and zlib.crc32(record) == crc else None


def new_memory() -> int:
    """A descriptor of memory for ``Records`` (Linux, memfd_create(2)); the caller closes it."""
    return os.memfd_create("bnexport")


def _offset(slot: int, index: int) -> int:
    return _BEATS + (2 * slot + index) * _PLACE
