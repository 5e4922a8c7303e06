import contextlib
import errno
import os
from pathlib import Path

import pytest

from pipeline.errors import CoinferError
from pipeline.files import atomic_directory, atomic_path, atomic_write_bytes, atomic_write_json, read_json


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    target = tmp_path / "out.bin"
    atomic_write_bytes(target, b"old")
    with contextlib.suppress(RuntimeError), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.bin"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    target = tmp_path / "bundle"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("old")
    with contextlib.suppress(RuntimeError), atomic_directory(target) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["bundle"]


def test_no_space_left_is_one_sentence(tmp_path):
    with pytest.raises(CoinferError, match=r"cannot write .*: No space left on device; free some space") as caught, atomic_path(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(CoinferError, match="No space left"), atomic_path(tmp_path / "x"), open("/dev/full", "w") as full:
        full.write("a")


def test_a_path_that_cannot_hold_a_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CoinferError, match=r"cannot write .*file.*; free some space or check the permissions"):
        atomic_write_bytes(tmp_path / "file" / "x", b"")


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs a folder that even root cannot write to")
def test_no_permission_is_one_sentence():
    with pytest.raises(CoinferError, match=r"cannot write /proc/x: .*; free some space or check the permissions"):
        atomic_write_bytes(Path("/proc/x"), b"")


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    target = tmp_path / "m.json"
    atomic_write_json(target, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        atomic_write_json(target, {"a": float("nan")})
    assert read_json(target, "metrics") == {"a": 1}


@pytest.mark.parametrize(("content", "words"), [(None, "is missing; run `dvc repro`"), ("{", "cannot be read"), ("\x00\xff", "cannot be read")])
def test_unreadable_json_says_what_to_do(tmp_path, content, words):
    target = tmp_path / "m.json"
    if content is not None:
        target.write_bytes(content.encode("latin1"))
    with pytest.raises(CoinferError, match=words):
        read_json(target, "metrics")
