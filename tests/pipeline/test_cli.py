import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def coinfer(*arguments, cwd, code="from pipeline.cli import main; main()"):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, check=False
    )


def test_an_unknown_device_is_one_sentence(workdir):
    run = coinfer("search", "--device", "robot", cwd=workdir)
    assert run.returncode == 1
    assert run.stderr == "coinfer: params.yaml has no device robot; it has camera.\n"


def test_a_missing_extra_is_one_sentence(workdir):
    hide = "import sys; sys.modules['torch'] = None; from pipeline.cli import main; main()"
    run = coinfer("prepare", cwd=workdir, code=hide)
    assert run.returncode == 1
    assert "install the training extra" in run.stderr
    assert "Traceback" not in run.stderr


def test_ctrl_c_outside_the_long_part_of_a_stage_is_one_sentence(workdir):
    code = "import pipeline.stages.prepare as stage, signal; stage.run = lambda **_: signal.raise_signal(signal.SIGINT); from pipeline.cli import main; main()"
    result = coinfer("prepare", cwd=workdir, code=f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {code}")
    assert result.returncode == 130
    assert result.stderr == "coinfer: prepare was interrupted; nothing half-written was kept, `dvc repro` goes on.\n"


def test_a_report_before_any_run_says_what_to_run(workdir):
    run = coinfer("report", cwd=workdir)
    assert run.returncode == 1
    assert "dvc repro" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "command",
    ["prepare", "pretrain", "profile", "search", "finetune", "export", "evaluate", "report", "params", "edge", "device", "link", "profile-agent", "bundle"],
)
def test_every_command_has_help(command, workdir):
    run = coinfer(command, "--help", cwd=workdir)
    assert run.returncode == 0
    assert "Usage" in run.stdout
