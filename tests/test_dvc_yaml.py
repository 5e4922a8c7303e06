"""dvc.yaml names every file a stage's result depends on, and the example's pipeline is the root's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.cli import SECTIONS

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("prepare", "pretrain", "profile", "supernet", "search", "finetune", "export", "evaluate")
CODE = re.compile(r"^(?:\.\./\.\./)?((?:models|pipeline)/.*)$")


def imports(file: Path) -> Iterator[str]:
    """Modules that `file` imports when it runs: anywhere in it, but not for type checking only."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                yield from visit(child)
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return visit(ast.parse(file.read_text()))


def closure(start: Path) -> set[str]:
    """Our files that `start` needs, itself included; empty packages aside."""
    found, waiting = set(), [start]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for name in imports(file):
            candidate = ROOT / (name.replace(".", "/") + ".py")
            if name.split(".")[0] in ("models", "pipeline") and candidate.exists():
                waiting.append(candidate)
    names = {str(file.relative_to(ROOT)) for file in found}
    return names | ({"pipeline/runtime/_rans.c"} if "pipeline/runtime/coder.py" in names else set())


def stages(folder: str = ".") -> dict[str, dict]:
    declared = yaml.safe_load((ROOT / folder / "dvc.yaml").read_text())["stages"]
    return {name: stage.get("do", stage) for name, stage in declared.items()}


def test_the_stages_are_the_flow():
    assert tuple(stages()) == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_code_it_imports(stage):
    declared = {found[1] for dep in stages()[stage]["deps"] if (found := CODE.match(dep))}
    assert declared == closure(ROOT / "pipeline/stages" / f"{stage}.py")


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_are_files(stage):
    assert [dep for dep in stages()[stage]["deps"] if CODE.match(dep) and not (ROOT / dep).is_file()] == []


def test_every_dependency_on_an_artefact_is_an_out_of_an_earlier_stage():
    made: set[str] = set()
    for stage in stages().values():
        for dep in stage["deps"]:
            if dep.startswith("artifacts/"):
                assert dep in made
        for kind in ("outs", "metrics", "plots"):
            made |= {out if isinstance(out, str) else next(iter(out)) for out in stage.get(kind, [])}


def test_nothing_measured_is_locked():
    assert "timing.json" not in (ROOT / "dvc.yaml").read_text()


def test_the_example_runs_the_same_pipeline():
    text = (ROOT / "examples/cifar10/dvc.yaml").read_text()
    assert re.sub(r"\.\./\.\./(?=models/|pipeline/)", "", text) == (ROOT / "dvc.yaml").read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_mlflow_shows_the_parameters_a_stage_depends_on(stage):
    sections = {name.split(".")[0] for name in stages()[stage]["params"]} - {"devices"}
    assert sections <= set(SECTIONS[stage])
