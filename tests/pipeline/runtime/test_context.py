import numpy as np
import pytest

from pipeline.runtime.coder import build_tables, entropy_bits
from pipeline.runtime.context import CONTEXTS, GROUP, fit_contexts


def bits_of(drawn: np.ndarray, fresh: np.ndarray, bits: int, *, with_model: bool = True) -> float:
    """Mean over the images of `fresh`, by tables of `drawn`."""
    tables = build_tables(drawn, bits, fit_contexts(drawn) if with_model else None)
    return float(np.mean([entropy_bits(image, tables) for image in fresh]))


def test_a_channel_that_repeats_one_before_it_costs_next_to_nothing_wherever_it_lies() -> None:
    first = np.random.default_rng(0).integers(0, 8, (600, 1, 6, 5))
    for move in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
        twice = np.concatenate([first, 7 - np.roll(first, move, (2, 3))], 1).astype(np.uint8)
        kept = twice[:, :, 1:-1, 1:-1]  # of what was rolled in at the edges nothing is known
        assert bits_of(kept[:500], kept[500:], 3) < bits_of(kept[:500, :1], kept[500:, :1], 3) + 0.35 * 12 * 3


def test_symbols_that_vary_more_where_the_channel_before_is_far_from_its_centre_are_told_apart() -> None:
    rng = np.random.default_rng(1)
    first = rng.choice([0, 7, 8, 15], (2000, 1, 4, 4), p=[0.25, 0.25, 0.25, 0.25])
    second = 8 + rng.integers(-1, 2, first.shape) * np.where(np.abs(first - 8) > 4, 6, 0)
    drawn = np.concatenate([first, second], 1).astype(np.uint8)
    known = 16 * (2 + 0.5 * np.log2(3))  # two bits a place of the first channel, then one of three steps at every other place
    assert bits_of(drawn[:1800], drawn[1800:], 4) == pytest.approx(known, rel=0.05)
    assert bits_of(drawn[:1800], drawn[1800:], 4, with_model=False) > 1.15 * known


def test_each_row_and_column_has_a_level_of_its_own() -> None:
    level = np.array([0, 4])[:, None] + np.array([0, 8])
    drawn = (level + np.random.default_rng(2).integers(0, 2, (1000, 1, 2, 2))).astype(np.uint8)
    assert bits_of(drawn[:900], drawn[900:], 4) == pytest.approx(4, abs=0.3)


def test_no_channel_looks_beyond_its_group() -> None:
    rng = np.random.default_rng(3)
    drawn = rng.integers(0, 4, (400, GROUP + 2, 2, 2)).astype(np.uint8)
    drawn[:, GROUP + 1] = drawn[:, GROUP]  # sees the one of its own group
    model = fit_contexts(drawn)
    assert [len(weights) for weights in model.mean.weights[-3:]] == [5 * (GROUP - 1) + 2, 2, 7]
    other = drawn.copy()
    other[:, :GROUP] = rng.integers(0, 4, (400, GROUP, 2, 2))
    assert np.array_equal(model.contexts(drawn)[:, GROUP:], model.contexts(other)[:, GROUP:])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 4, 4), (5, 2, 1, 7), (300, 4, 2, 2)])
@pytest.mark.parametrize("value", [0, 255])
def test_what_never_changes_has_a_model_too(shape: tuple[int, ...], value: int) -> None:
    symbols = np.full(shape, value, np.uint8)
    model = fit_contexts(symbols)
    contexts = model.contexts(symbols)
    assert contexts.shape == shape
    assert contexts.max() < CONTEXTS
    assert bits_of(symbols, symbols, 8) < 4 * symbols[0].size
