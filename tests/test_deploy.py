"""The systemd units: systemd accepts them, their commands exist, and the page says what they may be told. Also what `make arm` says where it cannot run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from pipeline.cli import app
from pipeline.runtime.server import DRAIN_S

ROOT = Path(__file__).resolve().parents[1]
UNITS = sorted((ROOT / "deploy").glob("*.service"))
PROGRAM = "/opt/coinfer/bin/coinfer"


def settings(unit: Path, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", unit.read_text(), re.MULTILINE)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit_and_finds_it_shut_in(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace(PROGRAM, shutil.which("true") or "/bin/true"))
    verified = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")
    rated = subprocess.run(["systemd-analyze", "security", "--offline=true", "--threshold=20", copy], capture_output=True, text=True, check=False)
    assert rated.returncode == 0, rated.stdout


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_what_a_unit_runs_exists_and_the_page_names_its_settings(unit: Path) -> None:
    defaults = dict(word.split("=", 1) for line in settings(unit, "Environment") for word in line.split())
    (command,) = settings(unit, "ExecStart")
    program, name, *options = shlex.split(re.sub(r"\$\{?(\w+)\}?", lambda found: defaults[found[1]], command))
    assert program == PROGRAM
    typer.main.get_command(app).commands[name].make_context(name, options)  # raises on an option it does not know
    page = (ROOT / "docs/deploy.md").read_text()
    assert f"deploy/{unit.name}" in page
    for setting, default in defaults.items():
        assert re.search(rf"`{setting}` \({re.escape(default)}" if default else rf"`{setting}`|{setting}=", page), f"{setting} ({default}) is not on the page"


def test_systemd_leaves_the_edge_time_to_answer_what_it_has() -> None:
    (stop_s,) = settings(ROOT / "deploy/coinfer-edge.service", "TimeoutStopSec")
    assert float(stop_s) > DRAIN_S


def test_arm_says_in_a_sentence_what_it_lacks(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, ROOT / "tools/arm64.py"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("arm64: needs qemu-aarch64-static and mmdebstrap; on Debian: apt-get install ")
    assert result.stderr.count("\n") == 1
