"""What an install brings: pins that agree with pyproject.toml, no registry address, and a runtime without torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.runtime_start import uv

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
PINS = [Requirement(line) for line in LINES]
HERE = {canonicalize_name(pin.name): pin for pin in PINS if pin.marker is None or pin.marker.evaluate()}
ARM = ["--python-platform", "aarch64-manylinux_2_28", "--python-version", "3.11", "--only-binary", ":all:"]


def test_requirements_are_exact_pins_without_addresses_or_paths() -> None:
    for line in LINES:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][^\s/:@]*( ; [^/:@]+)?", line), f"{line!r} is not a plain pin"


def test_every_declared_dependency_is_pinned_in_its_range() -> None:
    declared = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["train"] + PROJECT["optional-dependencies"]["dev"]
    for requirement in map(Requirement, declared):
        pin = HERE.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement} has no pin; run `make requirements`"
        (exact,) = pin.specifier
        assert requirement.specifier.contains(exact.version), f"{pin} is outside {requirement}; run `make requirements`"


def test_torch_is_not_the_build_that_breaks_torchvision() -> None:
    assert str(HERE["torch"].specifier) != "==2.13.0"


def test_bad_lightning_uploads_are_out_of_range() -> None:
    (lightning,) = (Requirement(text) for text in PROJECT["optional-dependencies"]["train"] if text.startswith("lightning"))
    assert not lightning.specifier.contains("2.6.2")
    assert not lightning.specifier.contains("2.6.3")


@pytest.mark.parametrize("name", ["torch", "torchvision", "mlflow", "dvc", "optuna", "lightning", "onnxruntime", "numpy"])
def test_installed_version_is_the_pinned_one(name: str) -> None:
    (exact,) = HERE[name].specifier
    assert version(name).split("+")[0] == exact.version


def test_base_install_has_no_training_package() -> None:
    names = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert names == {"numpy", "onnxruntime", "pillow", "pydantic", "rich", "typer"}


@pytest.mark.parametrize("extras", [[], ["--extra", "edge", "--extra", "camera"]], ids=["base", "extras"])
def test_a_raspberry_pi_needs_no_compiler(extras: list[str]) -> None:
    """Everything resolves as wheels for 64-bit Arm Linux, by the oldest Python and C library that Raspberry Pi OS 12 may have."""
    uv("pip", "compile", ROOT / "pyproject.toml", *extras, *ARM, "--quiet")


def test_runtime_and_command_line_import_nothing_of_the_training_extra() -> None:
    """In a fresh interpreter in which every package of the extra is missing."""
    blocked = sorted({"torch", "torchvision", "lightning", "mlflow", "optuna", "dvc", "onnx", "onnxscript", "torch_pruning", "sklearn", "matplotlib", "yaml"})
    program = f"""
import pkgutil, sys
for name in {blocked!r}:
    sys.modules[name] = None
import pipeline.cli, pipeline.costs.link, pipeline.runtime
for module in pkgutil.iter_modules(pipeline.runtime.__path__):
    if not module.name.startswith("_") and module.name != "ray_edge":  # which is of the extra `cluster`
        __import__("pipeline.runtime." + module.name)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_missing_extra_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    program = "import sys; sys.modules['torch'] = None; sys.argv = ['coinfer', 'prepare']; from pipeline.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.strip().count("\n") == 0
    assert "pip install" in result.stderr


@pytest.mark.skipif("CI" not in os.environ, reason="a machine without a compiler uses the Python coder")
def test_ci_has_the_c_coder() -> None:
    from pipeline.runtime.coder import HAVE_C

    assert HAVE_C


def test_license_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"


def test_tracked_files_name_no_machine_path_and_no_package_index() -> None:
    files = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    pattern = re.compile("/" + r"(work|root|farm)/|" + "/" + r"tmp/[a-z]+\.|(pypi|download\.pytorch)" + r"\.org")
    for name in filter(None, files.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".csv", ""} and path.is_file():
            found = pattern.search(path.read_text(errors="ignore"))
            assert found is None, f"{name} holds {found[0]}" if found else ""
