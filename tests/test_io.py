"""Files that are complete or absent, whatever ends a write; what cannot be read is named."""

import contextlib
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from rlhf_fast.errors import UserError
from rlhf_fast.io import (
    check_writable,
    read_jsonl,
    write_directory_atomic,
    write_file_atomic,
    write_jsonl,
)


@pytest.fixture
def full_disk():
    """A limit on the size of files, which shows as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_half_written(tmp_path, full_disk):
    tensors = {"a": torch.zeros(9000)}
    with pytest.raises(UserError, match=r"cannot write .*kept.safetensors.*free space"):
        write_file_atomic(tmp_path / "kept.safetensors", lambda path: save_file(tensors, path))
    with pytest.raises(UserError, match="cannot write .*model: .*free space"):
        write_directory_atomic(
            tmp_path / "model", lambda path: save_file(tensors, path / "a.safetensors")
        )
    with pytest.raises(UserError, match=r"cannot write .*rows.jsonl: File too large.*free space"):
        write_jsonl(tmp_path / "rows.jsonl", [{"text": "x" * 9000}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_ends_a_write_leaves_nothing(tmp_path, error):
    def fail(path):
        (path / "part" if path.is_dir() else path).write_text("half")
        raise error

    (tmp_path / "old").write_text("whole")
    with pytest.raises(error):
        write_file_atomic(tmp_path / "old", fail)
    with pytest.raises(error):
        write_directory_atomic(tmp_path / "new", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "whole"


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_who_may_read_a_folder_may_read_its_weights(tmp_path, umask):
    """safetensors 0.8 leaves files to their owner alone; others would find no adapter or model."""

    def fill(path):
        (path / "config.json").write_text("{}")
        save_file({"a": torch.zeros(1)}, path / "model.safetensors")

    before = os.umask(umask)
    write_directory_atomic(tmp_path / "model", fill)
    os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("write", [write_file_atomic, write_directory_atomic])
def test_two_writers_at_once_do_not_mix(tmp_path, write):
    """Each has a place of its own; the one that ends last stays, or is refused."""
    path = tmp_path / "result"

    def fill(text, then):
        def fill_now(partial):
            (partial / "a" if partial.is_dir() else partial).write_text(text)
            then()

        return fill_now

    def second():
        write(path, fill("second", lambda: None))
        assert len(list(tmp_path.iterdir())) == 2  # that of the first is not taken for a leftover

    write(path, fill("first", second))
    assert (path / "a" if path.is_dir() else path).read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_leave_goes_with_the_next_write(tmp_path):
    code = "import os, sys; from pathlib import Path; from rlhf_fast.io import write_file_atomic;"
    code += "write_file_atomic(Path(sys.argv[1]), lambda partial: os.kill(os.getpid(), 9))"
    path, others = (
        tmp_path / "rows[1].jsonl",
        ["rows[1].jsonl.mine.partial", "rows1.0123abcd.partial"],
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    (tmp_path / f"{path.name}.0123abcd.partial").mkdir()
    for name in others:
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == 4
    write_jsonl(path, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, *others])


def test_a_place_that_another_writer_takes_for_left_is_given_up(tmp_path, monkeypatch):
    """Between the making of a directory and its lock another process may lock it, to remove it."""
    path, flock, taken = tmp_path / "file", fcntl.flock, []

    def at_the_same_time(file, operation):
        if not taken:
            taken.extend(tmp_path.glob("file.*.partial"))
            flock(stack.enter_context(directory(taken[0])), operation)
        flock(file, operation)

    def write(partial):
        shutil.rmtree(taken[0])
        partial.write_text("text")

    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(fcntl, "flock", at_the_same_time)
        write_file_atomic(path, write)
    assert path.read_text() == "text" and list(tmp_path.iterdir()) == [path]


@contextlib.contextmanager
def directory(path):
    """Its descriptor."""
    file = os.open(path, os.O_RDONLY)
    yield file
    os.close(file)


def test_files_have_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    write_jsonl(tmp_path / "rows.jsonl", [])
    write_directory_atomic(tmp_path / "model", lambda path: None)
    os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("rows.jsonl", "model")]
    assert modes == [0o640, 0o750]


def test_what_cannot_be_written_is_known_before(tmp_path):
    check_writable(tmp_path / "new" / "rows.jsonl")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*: (File exists|Not a directory); choose"):
        check_writable(tmp_path / "file" / "rows.jsonl")
    with pytest.raises(UserError, match="cannot write .*: File name too long"):
        check_writable(tmp_path / ("x" * 250))  # which has no room for the unfinished file's


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*rows.jsonl: Is a directory"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_rows_are_written_and_read_one_at_a_time(tmp_path):
    """Files of large runs take gigabytes: memory holds their rows, and no text beside them."""
    path = tmp_path / "rows.jsonl"
    tracemalloc.start()
    write_jsonl(path, ({"text": "x" * 10_000} for _ in range(300)))
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    rows = read_jsonl(path)
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 300 and path.stat().st_size > 3_000_000
    assert written < 500_000 and read < 3_500_000


def test_the_byte_that_is_no_text_is_counted_from_the_beginning(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": "b"}\n{"a": "\xff"}\n')
    with pytest.raises(UserError, match="not UTF-8 text .* at byte 18"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_unpaired_surrogates_are_written_and_read(tmp_path):
    rows = [{"text": "cut in half: \ud83d"}, {"text": "\U0001f600 ß"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert "ß" in (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
