"""An interrupt that some code swallows still stops what comes after it."""

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest

from bnexport import interrupts
from bnexport.files import staged_directory, write_atomically

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")


def lose_an_interrupt() -> None:
    with contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGINT)


def test_a_lost_interrupt_keeps_files_from_appearing(tmp_path: Path) -> None:
    with interrupts.noted():
        lose_an_interrupt()
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / "file", b"content")
        write_atomically(tmp_path / "later", b"raised once")
    assert [item.name for item in tmp_path.iterdir()] == ["later"]


def test_a_lost_interrupt_is_left_to_the_main_thread(tmp_path: Path) -> None:
    with interrupts.noted():
        lose_an_interrupt()
        writer = threading.Thread(target=write_atomically, args=(tmp_path / "file", b"content"))
        writer.start()
        writer.join()
        assert (tmp_path / "file").read_bytes() == b"content"
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_a_lost_interrupt_keeps_a_folder_from_appearing(tmp_path: Path) -> None:
    with interrupts.noted(), pytest.raises(KeyboardInterrupt), staged_directory(tmp_path / "folder") as stage:
        (stage / "file").write_bytes(b"content")
        lose_an_interrupt()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_raised_as_usual_and_the_handler_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts.noted():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with interrupts.noted():
        interrupts.check()  # the one from before is forgotten


def test_sigterm_is_an_interrupt_and_the_handler_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interrupts.terminable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_change_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with interrupts.noted(), interrupts.terminable():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
