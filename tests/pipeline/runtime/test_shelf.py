"""Bundles that come, go and break while a server runs."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import BundleError
from pipeline.runtime.server import Limits, serve
from pipeline.runtime.shelf import Shelf
from tests.pipeline.runtime.serving import ask, eventually, frames_of, logits, said


@pytest.fixture
def quick_looks(monkeypatch):
    monkeypatch.setattr("pipeline.runtime.server.LOOK_S", 0.05)


def test_bundles_are_served_side_by_side_and_swapped_without_a_failed_request(run, make_bundle, tmp_path, quick_looks):
    old, new = make_bundle(), make_bundle(seed=1)
    frames = {bundle.bundle_id: frames_of(bundle, 3) for bundle in (old, new)}
    shelf, over = tmp_path / "shelf", {bundle.bundle_id: threading.Event() for bundle in (old, new)}
    shutil.copytree(old.path, shelf / "1")
    running = run(shelf, limits=Limits(per_second=1e9))

    def device(bundle) -> int:
        count = 0
        with running.connect() as connection:
            while not over[bundle.bundle_id].is_set():
                for frame in frames[bundle.bundle_id]:
                    logits(ask(connection, frame))
                    count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        try:
            before = [pool.submit(device, old) for _ in range(2)]
            shutil.copytree(new.path, tmp_path / "2")
            (tmp_path / "2").rename(shelf / "2")
            eventually(lambda: new.bundle_id in running.server.lanes)
            after = [pool.submit(device, new) for _ in range(2)]
            time.sleep(0.1)
            over[old.bundle_id].set()
            assert all(future.result() for future in before)
            shutil.rmtree(shelf / "1")
            eventually(lambda: old.bundle_id not in running.server.lanes)
        finally:
            for event in over.values():
                event.set()
        assert all(future.result() for future in after)
    with running.connect() as connection:
        assert f"this edge runs {new.bundle_id.hex()}" in said(ask(connection, frames[old.bundle_id][0]))


def test_a_bundle_that_is_replaced_is_served_from_then_on(run, make_bundle, tmp_path, quick_looks):
    old, new = make_bundle(), make_bundle(seed=1)
    running = run(old)
    shutil.copytree(new.path, tmp_path / "next")
    old.path.rename(tmp_path / "old")
    (tmp_path / "next").rename(old.path)
    eventually(lambda: set(running.server.lanes) == {new.bundle_id})
    with running.connect() as connection:
        logits(ask(connection, frames_of(new, 1)[0]))


def test_a_broken_bundle_beside_a_good_one_is_reported_once_and_served_when_it_is_whole(run, make_bundle, tmp_path, quick_looks, capfd):
    good, half_copied, lonely = make_bundle(), make_bundle(seed=1), make_bundle("device-only")
    shelf = tmp_path / "shelf"
    shutil.copytree(good.path, shelf / "good")
    running = run(shelf)
    lonely.path.rename(shelf / "lonely")
    (shelf / "copied").mkdir()
    for name in ("manifest.json", "codec.json", "device.onnx", "device-only.onnx"):
        shutil.copy(half_copied.path / name, shelf / "copied")
    said_so = ""

    def reported() -> bool:
        nonlocal said_so
        said_so += capfd.readouterr().err
        return "copied/edge.onnx cannot be read" in said_so and "has no edge.onnx" in said_so

    eventually(reported)
    time.sleep(0.3)
    capfd.readouterr()
    time.sleep(0.3)
    assert not capfd.readouterr().err, "not again and again"
    shutil.copy(half_copied.path / "edge.onnx", shelf / "copied")
    eventually(lambda: set(running.server.lanes) == {good.bundle_id, half_copied.bundle_id})


def test_what_replaces_a_good_bundle_and_is_broken_does_not_end_it(run, make_bundle, tmp_path, quick_looks, capfd):
    good, bad = make_bundle(), make_bundle(seed=1)
    running, [frame] = run(good), frames_of(good, 1)
    (bad.path / "edge.onnx").write_bytes(b"altered")
    good.path.rename(tmp_path / "old")
    time.sleep(0.3)
    bad.path.rename(good.path)
    eventually(lambda: "edge.onnx is not the file" in capfd.readouterr().err)
    with running.connect() as connection:
        logits(ask(connection, frame))
    good.path.rename(tmp_path / "bad")
    (tmp_path / "old").rename(good.path)
    time.sleep(0.2)
    assert set(running.server.lanes) == {good.bundle_id}


def test_a_shelf_that_cannot_be_looked_at_ends_nothing(make_bundle, tmp_path, monkeypatch, capfd):
    bundle = make_bundle()
    shelf = Shelf(bundle.path.parent)
    [half] = shelf.first()

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.iterdir", denied)
    for _ in range(3):
        assert shelf.look() == ([], {half.bundle_id})
    assert "cannot be looked at" in capfd.readouterr().err


def test_nothing_to_serve_is_one_sentence(make_bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "empty", "holds no bundle"),
        (tmp_path / "nowhere", "cannot be read"),
        (make_bundle("device-only").path, r"has no edge\.onnx"),
    ):
        with pytest.raises(BundleError, match=message):
            serve(path)
