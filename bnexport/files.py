"""Files and folders that are complete or absent: written under another name, synchronised, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from bnexport import interrupts
from bnexport.errors import BadInput, OutputError
from bnexport.optional import one_line

#: Reading the umask sets it, so two threads must not do it at once.
_UMASK = threading.Lock()


class Refusal(ValueError):
    """Reason for not opening an untrusted file, as a sentence without its subject: "holds 70000 files, more than 65536"."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes, *, follow: bool = False) -> None:
    """Write a file so that a reader gets the old content or the new content, never a part.

    A link is replaced. With ``follow``, for a file that the user names, a link stays and the file behind it is replaced, and a
    device or a pipe (/dev/null, /dev/stderr) is written as it is.

    Raises:
        OutputError: The folder can't be written, the disk is full, or without ``follow`` a device or pipe is there. The old
            file is unchanged.
        KeyboardInterrupt: An earlier interrupt was swallowed (see ``interrupts``).
    """
    interrupts.check()
    with output_errors(path):
        if _is_special(path) and (follow or not path.is_symlink()):
            if not follow:
                raise OutputError(f"{path} is a device or a pipe", remedy="Choose another file")
            path.write_bytes(content)
            return
        if follow and path.is_symlink() and path.parts[:2] in (("/", "dev"), ("/", "proc")):
            with path.open("ab") as file:  # the file of a redirection, which other writers have open
                file.write(content)
            return
        path = Path(os.path.realpath(path)) if follow else path
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(beside).chmod(0o666 & ~_umask())  # mkstemp sets 0600, but services of other users read the file
            Path(beside).replace(path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def staged_directory(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` at the end of the block, or is deleted after an exception.

    ``force`` replaces an existing ``path``, which stays until the new folder is complete; OutputError without it.
    """
    refuse_existing(path, force=force)
    missing = [folder for folder in path.parents if not folder.exists()]
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        with output_errors(path):
            yield stage
            stage.chmod(0o777 & ~_umask())
            for file in (entry for entry in stage.rglob("*") if entry.is_file()):
                _sync_file(file)
            interrupts.check()
            refuse_existing(path, force=force)  # it may have been created during the block
            _swap_in(stage, path)
            sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process may have written into one of them
            for folder in missing:
                folder.rmdir()
        raise


def forget_reader() -> None:
    """Redirect standard output to the null device, after its reader (head, less) has ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise OutputError if ``path`` exists and must not be replaced; called before long work."""
    if not path.exists() and not path.is_symlink():
        return
    if not force:
        raise OutputError(f"{path} exists already", remedy="Choose another folder, or pass --force to replace it")
    if not path.is_dir() or path.is_symlink():
        raise OutputError(f"{path} is not a folder, so --force does not replace it", remedy="Choose another folder")


def refuse_existing_file(
    path: Path, *, force: bool, read: Iterable[Path] = (), role: str = "file that is read"
) -> None:
    """Raise OutputError if a file can't be written to ``path``; called before long work.

    ``read`` are inputs, which are never replaced; ``role`` is their name in the message.
    """
    if any(file.exists() and path.exists() and file.samefile(path) for file in read):
        raise OutputError(f"{path} is the {role}", remedy="Choose another file")
    if path.is_dir():
        raise OutputError(f"{path} is a folder", remedy="Choose another file")
    if path.exists() and not force and not _is_special(path):
        raise OutputError(f"{path} exists already", remedy="Choose another file, or pass --force to replace it")


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Convert an OSError while writing below ``path`` to OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} can't be written: {one_line(error)}",
            remedy="Free some space or choose a folder that this user may write; existing files are unchanged",
        ) from error


@contextlib.contextmanager
def input_errors(what: object, kind: type[BadInput], *, remedy: str) -> Iterator[None]:
    """Convert an OSError inside the block to ``kind``: "WHAT can't be read: ..."."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what} can't be read: {one_line(error)}", remedy=remedy) from error


def refuse_unwritable(path: Path) -> None:
    """Refuse a file that can't be written, before the work whose result it gets: OutputError."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder", remedy="Give the name of a file")
    if _is_special(path):
        return
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "this user may not write in" if folder.is_dir() else "there is a file, not a folder, at"
        raise OutputError(f"{path} can't be written: {why} {folder}", remedy="Choose another folder")


def _swap_in(stage: Path, path: Path) -> None:
    """Rename ``stage`` to ``path``; an old folder is moved aside first and moved back if that fails."""
    if not path.exists():
        stage.rename(path)
        return
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
    try:
        path.rename(aside / "old")
        stage.rename(path)
    finally:
        if not path.exists():
            (aside / "old").rename(path)
        shutil.rmtree(aside, ignore_errors=True)


def _is_special(path: Path) -> bool:
    """Return whether this is a device, a pipe or a socket, which a rename would replace by a plain file."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def refuse_overlap(out: Path, source: Path) -> None:
    """Raise OutputError if the output folder is the source, contains it, or is inside it."""
    place, origin = out.resolve(), source.resolve()
    if place.is_relative_to(origin) or origin.is_relative_to(place):
        relation = "is inside" if place.is_relative_to(origin) else "contains"
        raise OutputError(f"{out} {'is' if place == origin else relation} {source}", remedy="Choose another folder")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a folder for this process inside the block; the folder is created, and the lock ends with the process.

    Windows and file systems without locks are not supported: the block runs unlocked there. An OutputError reports that
    another process has the lock, or that the folder can't be created.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with output_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"another run is writing into {folder}", remedy="Wait for its end, or choose another folder"
                ) from None
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` durable, on POSIX systems."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    with _UMASK:
        mask = os.umask(0)
        os.umask(mask)
    return mask
