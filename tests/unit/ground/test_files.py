import errno
import hashlib
import os
import stat
import sys
from pathlib import Path

import pytest

from bnexport.errors import DataError, OutputError
from bnexport.files import (
    refuse_existing,
    refuse_existing_file,
    refuse_unwritable,
    sha256,
    staged_directory,
    write_atomically,
)


def full(*_args, **_options):
    raise OSError(errno.ENOSPC, "No space left on device")


def content_of(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too; an empty folder counts as one."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else "<empty>"
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


def old_folder(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "a").write_text("old")


def write(tmp_path: Path, force: bool) -> None:
    with staged_directory(tmp_path / "1", force=force) as stage:
        (stage / "a").write_text("new")


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_a_file_is_written_and_replaced(tmp_path):
    file = tmp_path / "deep" / "er" / "a.txt"
    write_atomically(file, b"old")
    write_atomically(file, b"new\r\n\0")
    assert file.read_bytes() == b"new\r\n\0"
    assert [entry.name for entry in file.parent.iterdir()] == ["a.txt"]


def test_permissions_follow_the_umask(tmp_path, umask):
    write_atomically(tmp_path / "a", b"x")
    with staged_directory(tmp_path / "folder") as stage:
        (stage / "b").write_text("x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "folder", "folder/b")]
    assert modes == [0o666 & ~umask, 0o777 & ~umask, 0o666 & ~umask]


@pytest.mark.parametrize("step", ["os.fsync", "os.fdopen", "pathlib.Path.replace", "pathlib.Path.chmod"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    write_atomically(tmp_path / "a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        with pytest.raises(OutputError, match=r"a can't be written: .*No space left") as caught:
            write_atomically(tmp_path / "a", b"new")
    assert isinstance(caught.value.__cause__, OSError)
    assert content_of(tmp_path) == {"a": "old"}


def test_ctrl_c_leaves_the_old_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    write_atomically(tmp_path / "a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / "a", b"new")
    assert content_of(tmp_path) == {"a": "old"}


def test_a_file_that_can_not_be_there(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for path in ("file/a", "folder", "x" * 300):
        with pytest.raises(OutputError, match="can't be written"):
            write_atomically(tmp_path / path, b"new")
    with pytest.raises(OutputError, match="can't be written"), staged_directory(tmp_path / "file" / "a"):
        pytest.fail("the block must not run")
    assert content_of(tmp_path) == {"file": "old", "folder": "<empty>"}


@pytest.mark.parametrize("follow", [True, False])
def test_a_link_stays_only_where_the_user_named_it(tmp_path, follow):
    """A run or job folder made of links must not change the folder that they lead to."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"old")
    (tmp_path / "link").symlink_to(Path("real", "a"))
    write_atomically(tmp_path / "link", b"new", follow=follow)
    assert (tmp_path / "link").read_bytes() == b"new"
    assert (tmp_path / "real" / "a").read_bytes() == (b"new" if follow else b"old")
    assert (tmp_path / "link").is_symlink() == follow
    assert [entry.name for entry in (tmp_path / "real").iterdir()] == ["a"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in folders")
def test_a_pipe_is_written_or_refused_and_never_replaced(tmp_path):
    """A rename would replace it by a file; as root even /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refuse_unwritable(pipe)
    refuse_existing_file(pipe, force=False)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, b"content", follow=True)
        assert os.read(reader, 100) == b"content"
    finally:
        os.close(reader)
    with pytest.raises(OutputError, match="pipe is a device or a pipe"):
        write_atomically(pipe, b"content")
    assert pipe.is_fifo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc/self/fd")
def test_a_file_behind_a_descriptor_is_appended_to(tmp_path):
    with (tmp_path / "log").open("a") as log:
        log.write("before\n")
        log.flush()
        write_atomically(Path(f"/proc/self/fd/{log.fileno()}"), b"result\n", follow=True)
        log.write("after\n")
    assert (tmp_path / "log").read_text() == "before\nresult\nafter\n"


def test_a_staged_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "models" / "1"
    with staged_directory(target) as stage:
        (stage / "deep").mkdir()
        (stage / "deep" / "a").write_text("x")
        assert not target.exists()
        assert stage.parent == target.parent  # one file system, so that the rename is atomic
    assert content_of(tmp_path) == {"models/1/deep/a": "x"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, DataError])
@pytest.mark.parametrize("force", [False, True])
def test_an_exception_in_the_block_leaves_nothing(tmp_path, error, force):
    if force:
        old_folder(tmp_path)
    raised = error("odd", remedy="") if error is DataError else error("odd")

    def write():
        with staged_directory(tmp_path / "1", force=force) as stage:
            (stage / "a").write_text("new")
            raise raised

    with pytest.raises(error) as caught:
        write()
    assert caught.value is raised
    assert content_of(tmp_path) == ({"1/a": "old"} if force else {})


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.rename", "pathlib.Path.chmod", "tempfile.mkdtemp"])
@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_no_staged_folder(tmp_path, monkeypatch, step, force):
    if force:
        old_folder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        with pytest.raises(OutputError, match=r"1 can't be written: .*No space left"):
            write(tmp_path, force)
    assert content_of(tmp_path) == ({"1/a": "old"} if force else {})


def test_the_block_s_own_system_errors_become_one_sentence(tmp_path):
    with pytest.raises(OutputError, match="No space left"), staged_directory(tmp_path / "1"):
        full()
    assert content_of(tmp_path) == {}


def test_an_existing_folder_needs_force(tmp_path):
    old_folder(tmp_path)
    with pytest.raises(OutputError, match="exists already") as caught, staged_directory(tmp_path / "1"):
        pytest.fail("the block must not run")
    assert "--force" in caught.value.remedy
    assert content_of(tmp_path) == {"1/a": "old"}


def test_force_replaces_the_whole_folder(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "left over").write_text("old")
    with staged_directory(tmp_path / "1", force=True) as stage:
        (stage / "a").write_text("new")
        assert content_of(tmp_path / "1") == {"left over": "old"}
    assert content_of(tmp_path) == {"1/a": "new"}


@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "busy"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_swap_keeps_the_old_folder(tmp_path, monkeypatch, error, failing):
    """The first rename moves the old folder aside, the second moves the new one in."""
    old_folder(tmp_path)
    rename, calls = Path.rename, []

    def flaky(self, target):
        calls.append(self)
        if len(calls) == failing:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", flaky)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write(tmp_path, force=True)
    assert len(calls) == failing + (failing == 2)
    assert content_of(tmp_path) == {"1/a": "old"}


def test_an_interrupt_after_the_swap_keeps_the_new_folder(tmp_path, monkeypatch):
    (tmp_path / "1").mkdir()
    rename = Path.rename

    def late(self, target):
        done = rename(self, target)
        if target == tmp_path / "1":
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, force=True)
    assert content_of(tmp_path) == {"1/a": "new"}


def test_a_folder_that_appeared_meanwhile_is_not_replaced_without_force(tmp_path):
    def write():
        with staged_directory(tmp_path / "1") as stage:
            (stage / "a").write_text("mine")
            (tmp_path / "1").mkdir()
            (tmp_path / "1" / "a").write_text("another user's")

    with pytest.raises(OutputError, match="exists already"):
        write()
    assert content_of(tmp_path) == {"1/a": "another user's"}


def test_force_replaces_folders_alone(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        with pytest.raises(OutputError, match="is not a folder"):
            refuse_existing(tmp_path / name, force=True)
        with pytest.raises(OutputError, match="exists already"):
            refuse_existing(tmp_path / name, force=False)
    refuse_existing(tmp_path / "elsewhere", force=True)
    refuse_existing(tmp_path / "new", force=False)
