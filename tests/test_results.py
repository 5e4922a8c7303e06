"""What README shows is what results/*.json say."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.readme import BLOCKS, TARGETS, pictures, readme

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "results").glob("*.json"))


@pytest.mark.parametrize("target", TARGETS)
def test_tables_are_made_from_the_results(target):
    text = (ROOT / target).read_text()
    assert readme(text) == text, "run `make readme`"


@pytest.mark.parametrize("name", [name for name in BLOCKS.values() if (ROOT / f"results/{name}.json").exists()])
def test_pictures_are_made_from_the_results(name):
    for file, figure in pictures(name, json.loads((ROOT / f"results/{name}.json").read_text())).items():
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=110)
        now, kept = (np.asarray(Image.open(source)) for source in (drawn, ROOT / "results" / file))
        assert now.shape == kept.shape, "run `make readme`"
        assert np.array_equal(now, kept), "run `make readme`"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_results_file_says_what_it_is(path):
    results = json.loads(path.read_text())
    assert set(results) == {"name", "commit", "date", "machine", "dataset", "seeds", "figures", "raw"}
    assert results["name"] == path.stem
    for figure in results["figures"].values():
        assert set(figure) == {"value", "unit", "n", "spread", "how"}
        assert figure["how"]
