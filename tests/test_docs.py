"""README and docs: every command, parameter, link and file they name exists, and what is quick is run as a reader would."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

from pipeline.cli import app
from pipeline.params import markdown, parse_params
from tests.conftest import QUICK_PLAN

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(<!-- long -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block; what `long` ones show is run small in tests/test_pipeline.py."""

    page: str
    long: bool
    language: str
    text: str


BLOCKS = [Block(page.name, bool(long), language, text) for page in PAGES for long, language, text in FENCE.findall(page.read_text())]
COMMANDS = sorted({(block.page, block.long, line) for block in BLOCKS if block.language == "sh" for line in block.text.splitlines() if line.strip()})
COINFER = typer.main.get_command(app)


def words(command: str) -> list[str]:
    found = shlex.split(command, comments=True)
    return ["coinfer", *found[3:]] if found[:3] == ["python", "-m", "pipeline.cli"] else found


def name_of(command: tuple[str, bool, str]) -> str:
    return f"{command[0]}: {' '.join(shlex.split(command[2], comments=True))}"


def blocks_of(page: str, language: str) -> list[str]:
    return [block.text for block in BLOCKS if (block.page, block.language) == (page, language)]


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_command_exists(command: tuple[str, bool, str]) -> None:
    program, *arguments = words(command[2])
    if program == "make":
        result = subprocess.run(
            ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MAKEFLAGS": "", "MAKELEVEL": "0"}, check=False
        )
        assert result.returncode == 0, result.stderr
    elif program == "coinfer":
        name, *options = arguments
        COINFER.commands[name].make_context(name, options)  # raises on an option or value it does not know
    elif program == "dvc":
        from dvc.cli.parser import get_main_parser

        get_main_parser().parse_args(arguments)
    else:
        pytest.fail(f"{program} is none of make, coinfer and dvc")


def test_every_page_shows_commands_and_some_are_quick() -> None:
    assert {page for page, _, _ in COMMANDS} >= {"README.md", "own-data.md", "own-backbone.md", "own-device.md", "figures.md"}
    assert len([command for command in COMMANDS if not command[1]]) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for name in re.findall(r"`((?:models|pipeline|profiles|examples|results|benchmarks|docs|\.ci)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text()):
        headings = re.findall(r"^#+ (.*)$", (page.parent / target).read_text() if target else page.read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def merged(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return fields | {key: merged(fields[key], value) if isinstance(value, dict) and key in fields else value for key, value in changes.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_parameters_shown_are_accepted(page: Path) -> None:
    fields = yaml.safe_load((ROOT / "params.yaml").read_text())
    for block in blocks_of(page.name, "yaml"):
        parse_params(merged(fields, yaml.safe_load(block)))
    for key in re.findall(r"`((?:run|data|backbone|pretrain|devices|search|objective|finetune|evaluate)\.[a-z_]+)(?:: [^`]*)?`", page.read_text()):
        assert f"| `{key}` |" in markdown(), f"{page.name} names {key}"


def test_readme_says_what_coinfer_is_and_fits_the_first_screen() -> None:
    first = (ROOT / "README.md").read_text().splitlines()[:16]
    assert "device and an edge server" in " ".join(first[:10])
    assert "make repro" in (ROOT / "README.md").read_text()[:2000]


def test_page_of_parameters_is_what_the_command_prints() -> None:
    result = run("python -m pipeline.cli params", ROOT)
    assert (ROOT / "docs/params.md").read_text().strip().endswith(result.stdout.strip()), "run `python -m pipeline.cli params > docs/params.md`"


def run(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a shown command as typed, `python` being this one."""
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": f"sqlite:///{cwd}/mlflow.db" if cwd != ROOT else "",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(["bash", "-ec", command], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def quick(page: str) -> list[str]:
    return [line for shown, long, line in COMMANDS if shown == page and not long]


@pytest.mark.parametrize("page", ["README.md", "figures.md"])
def test_quick_commands_run(page: str) -> None:
    assert quick(page)
    for command in quick(page):
        result = run(command, ROOT)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()


@pytest.fixture
def reader(tmp_path: Path, digits_fields: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """A reader's folder with `data/photos` as own-data.md draws it, and quick parameters with the changes that page shows."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 4)):
        for shade, name in ((40, "cat"), (200, "dog")):
            folder = tmp_path / "data/photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(shade, 30, (40, 56, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:04}.jpg")
    (shown,) = blocks_of("own-data.md", "yaml")
    fields = merged(digits_fields, yaml.safe_load(shown))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path, fields


def test_own_data_and_own_network_work_as_the_pages_say(reader: tuple[Path, dict[str, Any]]) -> None:
    """The module and the parameters shown, less the weights they name; `prepare` as shown, then every further stage."""
    folder, fields = reader
    (module,) = blocks_of("own-backbone.md", "python")
    (folder / "mynet").mkdir()
    (folder / module.splitlines()[0].removeprefix("# ")).write_text(module)
    fields = merged(fields, merged(yaml.safe_load(blocks_of("own-backbone.md", "yaml")[0]), {"backbone": {"weights": None}, "pretrain": {"epochs": 1}}))
    (folder / "params.yaml").write_text(yaml.safe_dump(fields))
    shutil.copytree(ROOT / "profiles", folder / "profiles")
    (folder / "profiles/measure.json").write_text(json.dumps(QUICK_PLAN))
    for command in (
        *quick("own-data.md"),
        *(f"python -m pipeline.cli {stage}" for stage in ("pretrain", "profile", "supernet", "search", "finetune", "export", "evaluate", "report")),
    ):
        result = run(command, folder)
        assert result.returncode == 0, result.stderr
    assert json.loads((folder / "artifacts/data/card.json").read_text())["classes"] == ["cat", "dog"]
    assert (folder / "artifacts/backbone/weights.safetensors").is_file()
