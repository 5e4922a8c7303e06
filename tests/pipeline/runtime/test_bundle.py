import functools
import json
import os
import shutil

import numpy as np
import pytest
from onnx import TensorProto, helper

from benchmarks.fuzz_inputs import rehashed
from pipeline.errors import BundleError, CoinferError
from pipeline.runtime.bundle import CODEC, DEVICE, DEVICE_ONLY, EDGE, FILES, MANIFEST, Bundle
from pipeline.runtime.coder import build_tables
from pipeline.runtime.context import fit_contexts
from pipeline.runtime.preprocess import Preprocessing
from tests.pipeline.runtime.conftest import model


@pytest.mark.parametrize("kind", sorted(FILES))
def test_a_bundle_loads_with_everything_the_halves_need(make_bundle, kind):
    written = make_bundle(kind)
    bundle = Bundle.load(written.path)
    assert sorted(path.name for path in bundle.path.iterdir()) == sorted([MANIFEST, *FILES[kind]])
    assert (bundle.kind, bundle.classes, bundle.preprocessing.image_size) == (kind, ["ant", "bee", "cat"], 8)
    assert len(bundle.bundle_id) == 4
    assert bundle.manifest["opset"] == 18
    if kind == "split":
        assert bundle.code_shape == (2, 4, 4)
        assert bundle.points[0].bits == 3


def test_the_same_contents_give_the_same_bundle_and_others_another(make_bundle):
    first = (make_bundle().path / MANIFEST).read_bytes()
    assert (make_bundle().path / MANIFEST).read_bytes() == first
    assert make_bundle(seed=1).bundle_id != make_bundle().bundle_id


@pytest.mark.parametrize("name", [MANIFEST, *FILES["split"]])
def test_a_missing_file_is_named(make_bundle, name):
    bundle = make_bundle()
    (bundle.path / name).unlink()
    with pytest.raises(BundleError, match=name):
        Bundle.load(bundle.path)


@pytest.mark.parametrize("name", [MANIFEST, *FILES["split"]])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 1.0])
def test_one_changed_byte_is_named(make_bundle, name, where):
    path = make_bundle().path / name
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=name):
        Bundle.load(path.parent)


@pytest.mark.parametrize("name", FILES["split"])
def test_a_half_swapped_with_another_bundles_is_named(make_bundle, name):
    ours, theirs = make_bundle(seed=0), make_bundle(seed=1)
    shutil.copy(theirs.path / name, ours.path / name)
    with pytest.raises(BundleError, match=f"{name} is not the file this bundle was written with"):
        Bundle.load(ours.path)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match=MANIFEST):
        Bundle.load(tmp_path)
    for text in ("[]", "{}", '{"bundle_id": 3}', "\x00", "[" * 100000):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(BundleError, match=MANIFEST):
            Bundle.load(tmp_path)


NONSENSE = {
    "kind": [None, 1, [], {}, "whole", "edge-only"],
    "sha256": [None, 7, True, [*FILES["split"]], {}, "device.onnx"],
    "shapes": [None, [], {}, {EDGE: {"input": [2, 4, 4]}}],
    "classes": [None, [], 3, "abc", [1, 2, 3], ["ant"]],
    "preprocessing": [None, [], 5, "nothing", {}],
    "candidate": [None, [], "webp"],
    "shapes edge.onnx": [None, 3, [], {}, {"input": 4, "output": [3]}, {"input": [2, 4], "output": [3]}, {"input": [2, 4, 4], "output": [4]}],
    "shapes edge.onnx input": [[2, 1 << 32, 1 << 32], [2, 4, -4], [2, 4, 4.0], [2, True, 4]],
    "preprocessing image_size": [0, 10**6, "8", True, None, 9],
    "preprocessing mean": [[0, 0], 3, "abc", ["0", "0", "0"], [10**400, 0, 0], [1e300, 0, 0]],
    "preprocessing std": [[1, 1, 0], [1, 1, 1e-300], [True, 1, 1]],
}


@pytest.mark.parametrize(("place", "value"), [(place, value) for place, values in NONSENSE.items() for value in values])
def test_a_manifest_that_fits_its_hashes_and_says_nonsense_is_refused(make_bundle, place, value):
    path = make_bundle().path / MANIFEST
    manifest = json.loads(path.read_bytes())
    *holders, last = place.split()
    functools.reduce(dict.__getitem__, holders, manifest)[last] = value
    path.write_bytes(rehashed({MANIFEST: json.dumps(manifest).encode()})[MANIFEST])
    with pytest.raises(BundleError, match=r"export (the bundle|it) again"):
        Bundle.load(path.parent)


@pytest.mark.parametrize("quality", [None, 0, 101, "60", True])
def test_an_edge_only_bundle_without_a_quality_is_refused(make_bundle, quality):
    with pytest.raises(BundleError, match="no usable candidate"):
        make_bundle("edge-only", quality=quality)


def test_operating_points_whose_tables_would_fill_the_memory_are_refused(make_bundle):
    bundle = make_bundle()
    table = bundle.points[0].to_dict() | {"precision": 14, "bits": 1, "freqs": [[1 << 13, 1 << 13]] * (1 << 12), "embedded": False}
    (bundle.path / CODEC).write_text(json.dumps({"points": [table] * 3}))
    for name, data in rehashed({path.name: path.read_bytes() for path in bundle.path.iterdir()}).items():
        (bundle.path / name).write_bytes(data)
    with pytest.raises(BundleError, match="too many tables for 3 operating points"):
        Bundle.load(bundle.path)


def test_a_half_that_is_not_what_the_manifest_says_is_not_run(make_bundle):
    for changes, message in (
        ({DEVICE: numbers_of((2, 4, 4), TensorProto.FLOAT)}, r"device\.onnx maps a tensor\(float\) to a tensor\(float\) where"),
        ({DEVICE: numbers_of((2, 4, 5), TensorProto.UINT8)}, r"device\.onnx maps .* unlike its manifest says"),
        ({DEVICE: b"nothing"}, r"device\.onnx cannot be run by ONNX Runtime"),
    ):
        bundle = make_bundle()
        for name, data in rehashed({path.name: path.read_bytes() for path in bundle.path.iterdir()} | changes).items():
            (bundle.path / name).write_bytes(data)
        with pytest.raises(BundleError, match=message):
            Bundle.load(bundle.path).session(DEVICE, 1)


def numbers_of(shape: tuple[int, ...], kind: int) -> bytes:
    """A model that cuts numbers out of the image."""
    node = helper.make_node
    nodes = [
        node("Flatten", ["image"], ["flat"]),
        node("Slice", ["flat", "from", "to", "axis"], ["some"]),
        node("Reshape", ["some", "shape"], ["code"]),
        node("Cast", ["code"], ["symbols"], to=kind),
    ]
    numbers = {"from": [0], "to": [int(np.prod(shape))], "axis": [1], "shape": [-1, *shape]}
    inputs, outputs = ("image", TensorProto.FLOAT, ["batch", 3, 8, 8]), ("symbols", kind, ["batch", *shape])
    return model(nodes, inputs, outputs, **{name: np.array(value, np.int64) for name, value in numbers.items()})


def test_a_bundle_of_another_schema_says_so(make_bundle, monkeypatch):
    bundle = make_bundle()
    monkeypatch.setattr("pipeline.runtime.bundle.SCHEMA_VERSION", 4)
    with pytest.raises(BundleError, match="schema 3, this version reads 4"):
        Bundle.load(bundle.path)


def test_halves_that_do_not_fit_each_other_are_not_written(make_bundle, tmp_path):
    three_channels, other_plane = build_tables(np.zeros((1, 3, 4, 4), np.uint8), 3), np.zeros((1, 2, 9, 9), np.uint8)
    for changes, message in (
        ({"classes": ["ant", "bee"]}, rf"{DEVICE_ONLY} maps .* to \[3\]"),
        ({"points": [three_channels]}, f"{DEVICE} gives .* the codec has 3 channels"),
        ({"points": [build_tables(other_plane, 3, fit_contexts(other_plane))]}, f"{DEVICE} gives .* the codec has .* channels of 9 x 9"),
        ({"points": []}, CODEC),
        ({"preprocessing": Preprocessing(9)}, f"{DEVICE_ONLY} maps"),
        ({"files": {DEVICE: b"", EDGE: b"", DEVICE_ONLY: b""}}, "cannot be run by ONNX Runtime"),
    ):
        with pytest.raises(BundleError, match=message):
            make_bundle(**changes)
        assert not any(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_bundle(make_bundle):
    old = make_bundle()
    with pytest.raises(BundleError):
        make_bundle(classes=["ant", "bee"])
    assert Bundle.load(old.path).bundle_id == old.bundle_id


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_no_permission_at_the_out_path_is_one_sentence(make_bundle, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CoinferError, match="cannot write"):
        make_bundle()


def test_an_out_path_that_cannot_be_a_folder_is_one_sentence(make_bundle, tmp_path):
    (tmp_path / "split-0").write_text("in the way")
    with pytest.raises(CoinferError, match="cannot write"):
        make_bundle()


def test_a_file_the_kind_lacks_is_refused(make_bundle):
    with pytest.raises(BundleError, match=r"edge-only bundle and has no device\.onnx"):
        make_bundle("edge-only").session(DEVICE, 1)


def test_nothing_in_a_manifest_names_a_path_of_this_machine(make_bundle):
    bundle = make_bundle()
    assert str(bundle.path.parent) not in json.dumps(bundle.manifest)


def test_a_file_replaced_after_loading_is_not_run(make_bundle):
    bundle, other = make_bundle(), make_bundle(seed=1)
    (bundle.path / DEVICE_ONLY).write_bytes((other.path / DEVICE_ONLY).read_bytes())
    bundle.session(DEVICE, 1)
    with pytest.raises(BundleError, match=f"{DEVICE_ONLY} is not the file this bundle was written with"):
        bundle.session(DEVICE_ONLY, 1)
