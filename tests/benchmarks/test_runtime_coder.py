"""All ways give back the symbols, the twin the same bytes as C, and what is counted is what was coded."""

import numpy as np
import pytest

from benchmarks.runtime_coder import compared, figures
from pipeline.runtime import coder
from pipeline.runtime.context import fit_contexts


@pytest.mark.skipif(not coder.HAVE_C, reason="the C coder is not built")
def test_ways_are_measured_on_the_same_symbols():
    before = coder._encode
    steps = np.random.default_rng(0).integers(-1, 2, (8, 16, 16, 16)).cumsum(axis=3)
    symbols = (steps % 16).astype(np.uint8)
    raw = compared(symbols, coder.build_tables(symbols, 4, fit_contexts(symbols)), coder.build_tables(symbols, 4), rounds=4, twin_rounds=2)
    assert coder._encode is before
    assert raw["symbols"] == 4096
    assert raw["bytes"]["python"] == raw["bytes"]["c"][:2]
    assert raw["bytes"]["raw"] == [2048] * 4
    assert max(raw["bytes"]["c"]) < min(raw["bytes"]["c_static"]) < 2048
    assert {name: len(parts["decode"]) for name, parts in raw["ms"].items()} == {"python": 2} | dict.fromkeys(("c", "c_static", "zlib", "zstd", "raw"), 4)
    assert figures(raw)["coder_ms_4096.python"]["value"] > figures(raw)["coder_ms_4096.c"]["value"]


def test_figures_add_encoding_and_decoding_of_the_same_round():
    found = figures({"symbols": 4096, "ms": {"c": {"encode": [1.0, 2.0, 9.0], "decode": [9.0, 1.0, 1.0]}}, "bytes": {"c": [10, 20]}})
    assert (found["coder_ms_4096.c"]["value"], found["coder_bytes_4096.c"]["value"]) == (10.0, 15.0)
