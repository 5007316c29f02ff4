"""Files that are complete or absent: each is written beside its place and renamed into it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from safetensors import SafetensorError

from rlhf_fast.errors import UserError

Record = TypeVar("Record")
_FAILED = (OSError, SafetensorError)  # the latter is how a full disk shows to whoever saves tensors
PARTIAL = ".partial"
"""How names end that writers use meanwhile."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, as where a text was cut after so many UTF-16 units: it has no UTF-8."""

AT_WORK = (
    "everything saved before is intact: free space (or fix the permission), then repeat the "
    "command or `rlhf-fast resume RUN`"
)
BEFORE_WORK = "choose another place, or fix the permission or free space"


def write_atomic(path: Path, text: str | Iterable[str]) -> None:
    """Writes `text`, or its parts, to `path`; on failure the previous file stays as it was."""

    def write(partial: Path) -> None:
        with open(partial, "w", encoding="utf-8") as f:
            f.writelines([text] if isinstance(text, str) else text)

    write_file_atomic(path, write)


def write_file_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(partial)` on a path that becomes `path` only when it is complete.

    Whoever may read a new file may read it.
    """
    try:
        with _partial(path) as partial:
            write(partial)
            _settle(partial, partial.parent)
            os.replace(partial, path)
    except _FAILED as error:
        raise _cannot_write(path, error) from error


def write_directory_atomic(path: Path, fill: Callable[[Path], None]) -> None:
    """Calls `fill(directory)` on a fresh directory that becomes `path` only when it is complete.

    Whoever may read the directory may read its files.
    """
    try:
        with _partial(path) as partial:
            partial.mkdir()
            fill(partial)
            for file in filter(Path.is_file, partial.rglob("*")):
                _settle(file, partial)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(partial, path)
    except _FAILED as error:
        raise _cannot_write(path, error) from error


def _settle(file: Path, directory: Path) -> None:
    """Readable as a new directory is, since safetensors 0.8 leaves files to their owner alone; and
    on the disk."""
    file.chmod(directory.stat().st_mode & 0o666)
    with open(file, "rb") as f:
        os.fsync(f.fileno())


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A place for one writer of several, in a directory beside `path` that goes in the end.

    The directory's lock goes with the process, which tells what killed writers left: that is
    removed first. It is not the file's, as libraries replace files when they write them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 8}{PARTIAL}"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as held:
        directory = None
        while directory is None or not directory.exists():  # as if it was removed before its lock
            directory = _place(path)
            directory.mkdir()
            try:
                held.enter_context(_locked(directory))
            except BlockingIOError:  # by another writer, who is about to remove it
                directory = None
            except OSError:  # a file system without locks
                pass
        held.callback(shutil.rmtree, directory, ignore_errors=True)
        yield directory / path.name


def _place(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Raises OSError where it is locked already or cannot be."""
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


def check_writable(path: Path) -> None:
    """Raises unless a file could be made there; leaves nothing, whenever it is killed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            _place(path).lstat()  # refuses names that are too long
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _cannot_write(path, error, BEFORE_WORK) from error


def lock(path: Path) -> BinaryIO:
    """Keeps other processes out of the file's folder until the result is closed.

    The lock goes with the process, however that ends; the file is made if it is absent, and stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")
    except OSError as error:
        raise _cannot_write(path, error, BEFORE_WORK) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{path.parent}: another process is at work on this run") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
            raise
    return file


def _cannot_write(path: Path, error: Exception, advice: str = AT_WORK) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"cannot write {path}: {reason}; {advice}")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomic(path, map(_line, rows))


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Adds one row by one write: it is there whole, whatever ends the process later."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(_line(row).encode())
    except OSError as error:
        raise _cannot_write(path, error) from error


def _line(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    return f"{text if SURROGATE.search(text) is None else json.dumps(row)}\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object per line; a broken line is an error that names file and line."""
    return list(_rows(path))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """One row at a time: the text of a whole file takes as much memory as its rows."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno}): "
                f"{line[:80]!r}"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: must be a JSON object, got {type(row).__name__}")
        yield row


def _lines(path: Path) -> Iterator[str]:
    start = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                # Programs on Windows begin a file with a mark.
                yield line.decode("utf-8" if start else "utf-8-sig").removesuffix("\n")
                start += len(line)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        where = start + error.start
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {where})") from None


def read_records(path: Path, from_json: Callable[[dict[str, Any]], Record]) -> list[Record]:
    """The rows of a file as records; one that lacks a field is an error that names both."""
    records = []
    for number, row in enumerate(_rows(path), 1):
        try:
            records.append(from_json(row))
        except KeyError as error:
            raise UserError(
                f"{path}:{number}: field `{error.args[0]}` is missing, fields: {sorted(row)}; is "
                f"this the output of the stage before?"
            ) from error
        except (TypeError, AttributeError) as error:
            raise UserError(
                f"{path}:{number}: must be what the stage before writes, got fields {sorted(row)} "
                f"({error})"
            ) from error
    return records
