"""The doors of the house: make targets, the CI script and the workflow say only what exists."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def make(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments], cwd=cwd, capture_output=True, text=True, env={**os.environ, "MAKEFLAGS": "", "MAKELEVEL": "0", **env}, check=False
    )


def targets() -> list[str]:
    return re.findall(r"^  make ([a-z0-9]+) ", make().stdout, re.MULTILINE)


def test_make_alone_lists_every_target_with_a_sentence() -> None:
    assert make("help").stdout == make().stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert sorted(targets()) == sorted(phony[1].split())


@pytest.mark.parametrize("target", ["help", "install", "repro", "test", "lint", "ui", "cifar10", "requirements", "clean"])
def test_target_is_known_to_make(target: str) -> None:
    result = make("-n", target)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def copied_makefile(tmp_path: Path) -> Path:
    """The Makefile in a folder of its own whose `.venv` looks installed and whose tools print their arguments."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for tool in ("python", "dvc", "uv", "mlflow"):
        script = tmp_path / ".venv/bin" / tool
        script.write_text(f'#!/bin/sh\necho "{tool} $*" "in $(basename "$PWD")" "$MLFLOW_TRACKING_URI"\n')
        script.chmod(0o755)
    (tmp_path / ".venv/.installed").touch()
    (tmp_path / "examples/cifar10").mkdir(parents=True)
    return tmp_path


def test_repro_runs_dvc_then_the_report_and_installs_nothing_twice(copied_makefile: Path) -> None:
    result = make("repro", cwd=copied_makefile)
    name = copied_makefile.name
    assert [line.strip() for line in result.stdout.splitlines()] == [f"dvc repro in {name}", f"python -m pipeline.cli report in {name}"]


def test_changed_requirements_are_installed_again(copied_makefile: Path) -> None:
    os.utime(copied_makefile / "requirements.txt", (2**32, 2**32))
    assert "uv pip install --quiet -r requirements.txt" in make("-n", "repro", cwd=copied_makefile).stdout


def test_the_index_of_torch_is_remembered_and_a_change_is_installed(copied_makefile: Path) -> None:
    uv = copied_makefile / ".venv/bin/uv"
    uv.write_text('#!/bin/sh\ncase "$*" in *"-r -") cat > /dev/null ;; esac\necho "uv $*"\n')

    def installs(*arguments: str) -> int:
        return make(*arguments, cwd=copied_makefile).stdout.count("--index-url file:///wheels")

    assert installs("repro") == 0
    assert installs("repro", "TORCH_INDEX=file:///wheels") == 2  # the command, and what it printed
    assert "uv" not in make("repro", cwd=copied_makefile).stdout
    os.utime(copied_makefile / "requirements.txt", (2**32, 2**32))
    assert installs("repro") == 2


def test_index_switch_takes_only_torch_from_there_and_leaves_cuda_out(copied_makefile: Path) -> None:
    """The pins are piped to uv: torch alone to the given index, all but CUDA to the usual one."""
    os.utime(copied_makefile / "requirements.txt", (2**32, 2**32))
    uv = copied_makefile / ".venv/bin/uv"
    uv.write_text('#!/bin/sh\nif [ "$(echo "$*" | grep -c -- "-r -")" = 1 ]; then echo "$*:" $(cut -d= -f1); fi\n')
    lines = make("install", "TORCH_INDEX=file:///wheels", cwd=copied_makefile).stdout.splitlines()
    from_index, rest = (line for line in lines if line.startswith("pip install"))
    assert "--index-url file:///wheels" in from_index
    assert from_index.split(": ")[1] == "torch torchvision"
    assert "--index-url" not in rest
    assert not re.search(r" (nvidia|cuda|triton)", rest)
    assert " lightning " in rest


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_takes_an_archive_or_a_folder_and_logs_to_the_root_database(copied_makefile: Path, packed: bool) -> None:
    data = copied_makefile / "some images"
    (data / "train/cat").mkdir(parents=True)
    (data / "train/cat/0.jpg").write_bytes(b"jpeg")
    if packed:
        data = Path(shutil.make_archive(str(data), "xztar", data))
    for _ in range(2):  # a second call replaces what the first one unpacked
        result = make("cifar10", f"DATA={data}", cwd=copied_makefile, MLFLOW_TRACKING_URI="")
        assert result.returncode == 0, result.stderr
    assert (copied_makefile / "examples/cifar10/data/train/cat/0.jpg").read_bytes() == b"jpeg"
    assert f"dvc repro in cifar10 sqlite:///{copied_makefile}/mlflow.db" in result.stdout
    assert "python -m pipeline.cli report in cifar10" in result.stdout
    assert f"dvc repro in cifar10 sqlite:///{copied_makefile}/other.db" in make("cifar10", cwd=copied_makefile, MLFLOW_TRACKING_URI="sqlite:///other.db").stdout


def test_cifar10_keeps_the_images_it_has_when_the_new_ones_are_no_good(copied_makefile: Path) -> None:
    kept = copied_makefile / "examples/cifar10/data/train/cat"
    kept.mkdir(parents=True)
    broken = copied_makefile / "images.tar"
    broken.write_bytes(b"no archive")
    assert make("cifar10", f"DATA={broken}", cwd=copied_makefile).returncode != 0
    result = make("cifar10", "DATA=examples/cifar10/data", cwd=copied_makefile)
    assert result.returncode != 0
    assert "leave DATA out" in result.stdout
    assert kept.is_dir()


def test_cifar10_refuses_weights_that_its_parameters_do_not_name(copied_makefile: Path) -> None:
    folder = copied_makefile / "examples/cifar10"
    (folder / "weights").mkdir()
    (folder / "params.yaml").write_text("backbone:\n  weights: weights/known.safetensors\n")
    for name in ("known", "other"):
        (copied_makefile / f"{name}.safetensors").write_bytes(b"weights")
    refused = make("cifar10", "WEIGHTS=other.safetensors", cwd=copied_makefile)
    assert refused.returncode != 0
    assert "names no weights of other.safetensors; set backbone.weights" in refused.stdout
    for weights in ("known.safetensors", "examples/cifar10/weights/known.safetensors"):
        assert make("cifar10", f"WEIGHTS={weights}", cwd=copied_makefile).returncode == 0
    assert make("cifar10", "WEIGHTS=.", cwd=copied_makefile).returncode == 0
    assert [path.name for path in (folder / "weights").iterdir()] == ["known.safetensors"]
    assert (folder / "weights/known.safetensors").read_bytes() == b"weights"


def test_cifar10_says_when_its_data_is_missing(copied_makefile: Path) -> None:
    result = make("cifar10", "DATA=nowhere", cwd=copied_makefile)
    assert result.returncode != 0
    assert "DATA=nowhere does not exist" in result.stdout


def test_bench_names_the_benchmarks(copied_makefile: Path) -> None:
    (copied_makefile / "benchmarks").mkdir()
    (copied_makefile / "benchmarks/quickstart.py").write_text('if __name__ == "__main__":\n    pass\n')
    (copied_makefile / "benchmarks/helper.py").touch()
    for name in ("NAME=", "NAME=helper"):
        result = make("bench", name, cwd=copied_makefile)
        assert result.returncode != 0
        assert result.stdout.endswith("give NAME, one of: quickstart\n")
    assert make("bench", "NAME=quickstart", cwd=copied_makefile).stdout.startswith(".venv/bin/python benchmarks/quickstart.py")


def workflow_steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_command_of_a_workflow_exists(path: Path) -> None:
    commands = [line for step in workflow_steps(yaml.safe_load(path.read_text())) for line in step.get("run", "").splitlines() if line.strip()]
    assert commands
    for command in commands:
        for part in command.split("|"):
            program, *arguments = shlex.split(part)
            if program == "make":
                assert set(arguments) <= set(targets()), command
            elif "/" in program:
                assert os.access(ROOT / program, os.X_OK), f"{command}: {program} is not an executable of this repository"
            else:
                assert program == "grep", f"{command}: {program} is not known to this repository"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_has_least_permissions_and_pinned_actions(path: Path) -> None:
    text = path.read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert "concurrency" in workflow
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 60
    uses = re.findall(r"uses: (.*)", text)
    assert uses
    for action in uses:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), f"{action} is not pinned by commit with its version beside it"
    for step in workflow_steps(workflow):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_ci_lints_tests_and_runs_the_pipeline() -> None:
    commands = " ".join(step.get("run", "") for step in workflow_steps(yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())))
    assert ".ci/run" in commands
    assert "make repro" in commands
    script = (ROOT / ".ci/run").read_text()
    for command in ("make install", "make lint", "make test", "assert HAVE_C"):
        assert command in script
    assert "mypy" in make("-n", "lint").stdout
