"""Errors of the profile's predictions, and of simpler ones, on halves that were timed."""

import pytest

from benchmarks.predictor import errors, figures


def half(backbone, predicted_ms, took_ms, macs, params):
    fields = {"backbone": backbone, "precision": "fp32", "candidate": {}, "shipped_ms": 2 * took_ms}
    return fields | {"predicted_ms": predicted_ms, "macs": macs, "params": params, "visits_ms": [took_ms, 1.1 * took_ms] * 2}


@pytest.fixture
def raw():
    """Times in proportion to MACs within each backbone, not to parameters; each second visit takes a tenth more."""
    return {"halves": [half("one", 1.05, 1.0, 100, 7), half("one", 2.1, 2.0, 200, 7), half("two", 6.3, 3.0, 50, 1), half("two", 6.3, 6.0, 100, 2)]}


def test_errors_are_relative_to_what_was_measured(raw):
    found = errors(raw["halves"])
    assert found["predicted"] == pytest.approx([0, 0, 1, 0], abs=1e-9)
    assert found["shipped"] == pytest.approx([2 / 1.05 - 1] * 4)
    assert found["macs"] == pytest.approx([0] * 4, abs=1e-9)
    assert found["params"] == pytest.approx([0.5, 0.25, 0, 0], abs=1e-9)
    assert found["repeated"] == pytest.approx([0.1] * 4)


def test_figures_are_in_per_cent_over_all_and_by_backbone(raw):
    found = figures(raw)
    assert found["predictor_mdape"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["predictor_p90ape"]["value"] == pytest.approx(70)
    assert found["predictor_mdape.two.fp32"]["value"] == pytest.approx(50)
    assert found["measurement_repeatability"]["value"] == pytest.approx(10)
