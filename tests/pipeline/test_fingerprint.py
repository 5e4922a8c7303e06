from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.fingerprint import TRAINING_CODE, fingerprint


def test_it_names_the_code_and_the_libraries() -> None:
    found = fingerprint(TRAINING_CODE, "resnet8")
    assert {"models/cifar.py", "pipeline/training.py"} <= set(found["files"])
    assert "pipeline/cli.py" not in found["files"]
    assert "torch" in found["versions"]
    assert fingerprint(TRAINING_CODE, "resnet8") == found


@pytest.mark.parametrize("file", ["mynet_a/model.py", "mynet_b.py"])
def test_a_users_network_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("A = 1\n")
    backbone = f"{file.removesuffix('.py').replace('/', '.')}:build"
    before = fingerprint((), backbone)
    assert list(before["files"]) == [file]
    path.write_text("A = 2\n")
    assert fingerprint((), backbone) != before


def test_a_module_that_is_not_there_is_left_to_who_builds_it() -> None:
    assert fingerprint((), "no_such_package.model:build")["files"] == {}
