import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.search.hypervolume import Box, hypervolume
from tests.pipeline.search.fake_measures import measurement

BOX = Box((0.5, 100.0, 1000.0), (1.0, 1.0, 1.0))


def test_one_candidate_covers_the_cuboid_between_it_and_the_reference():
    assert hypervolume([measurement(0.75, 10.0, 10.0)], BOX) == pytest.approx(0.5 * 0.5 * 2 / 3)


def test_what_does_not_beat_the_reference_everywhere_counts_nothing():
    assert hypervolume([measurement(0.5, 1.0, 1.0), measurement(0.9, 100.0, 1.0), measurement(0.9, 1.0, 2000.0)], BOX) == 0
    assert hypervolume([], BOX) == 0


def test_sending_nothing_is_as_good_as_one_byte():
    assert hypervolume([measurement(1.0, 1.0, 0.0)], BOX) == pytest.approx(1)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.floats(0.5, 1), st.floats(1, 100), st.floats(1, 1000)), min_size=1, max_size=6))
def test_it_is_the_share_of_the_box_that_is_dominated(rows):
    """Against counting points of a grid."""
    found = [measurement(*row) for row in rows]
    axis = (np.arange(24) + 0.5) / 24
    grid = np.stack(np.meshgrid(axis, axis, axis), -1).reshape(-1, 1, 3)
    counted = (BOX.losses(found) <= grid).all(-1).any(1).mean()
    assert hypervolume(found, BOX) == pytest.approx(counted, abs=0.13)


def test_a_box_around_fronts_reaches_the_best_of_their_union():
    box = Box.around((0.5, 100.0, 1000.0), [measurement(0.9, 50.0, 10.0), measurement(0.7, 5.0, 500.0), measurement(0.4, 200.0, 2000.0)])
    assert box == Box((0.5, 100.0, 1000.0), (0.9, 5.0, 10.0))
    assert Box.around((0.5, 100.0, 1000.0), []).losses([measurement(0.5, 100.0, 1000.0)]).tolist() == [[0, 0, 0]]
