import json
import subprocess
import sys
from functools import partial

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pipeline.errors import BundleError, FrameError
from pipeline.networks import coder_tables
from pipeline.runtime import coder, rans_twin
from pipeline.runtime.coder import CodecTables, build_tables, decode, encode, entropy_bits
from pipeline.runtime.context import CONTEXTS, GROUP, MOST_BIAS, MOST_WEIGHT, ContextModel, Predictor, fit_contexts


def any_model(rng: np.random.Generator, channels: int, plane: tuple[int, int], most: int = 2_000) -> ContextModel:
    """Predictors of weights and biases up to `most`, whose scores are all over the contexts."""

    def integers(bound: int, *lengths: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(int(value) for value in rng.integers(-bound, bound + 1, length)) for length in lengths)

    predictors = (
        Predictor(
            integers(min(most, MOST_WEIGHT), *(seen * (channel % GROUP) + 2 for channel in range(channels))),
            integers(most, *[plane[0]] * channels),
            integers(most, *[plane[1]] * channels),
        )
        for seen in (5, 1)
    )
    return ContextModel(integers(0, channels)[0], *predictors)


@st.composite
def tables(draw, plane=None, max_channels=3):
    """Tables as skewed as integers allow, flat ones and everything between; with a model some of many channels."""
    bits = draw(st.integers(1, 8))
    precision = draw(st.integers(max(bits, 8), 14))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    channels = draw(st.integers(1, max_channels))
    model = None
    if draw(st.booleans()):
        channels = draw(st.integers(1, max_channels) | st.just(GROUP + 3)) if bits <= 4 else channels
        plane = plane or (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
        model = any_model(rng, channels, plane, draw(st.sampled_from([2_000, MOST_BIAS])))
    drawn = draw(st.lists(npst.arrays(np.int64, 1 << bits, elements=st.integers(1, 10) | st.integers(1, 10**6)), min_size=1, max_size=4))
    rows = [coder._rounded(drawn[index % len(drawn)], 1 << precision) for index in rng.permutation(channels * (CONTEXTS if model else 1))]
    return CodecTables(bits, precision, tuple(rows), model)


@st.composite
def coded(draw):
    built = draw(tables())
    plane = built.model.plane if built.model else (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    shape = (built.channels, *plane)
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    draws = {
        "likely": lambda row: rng.choice(built.levels, shape[1:], p=np.array(row) / sum(row)),
        "uniform": lambda row: rng.integers(0, built.levels, shape[1:]),
        "rarest": lambda row: np.full(shape[1:], np.argmin(row)),
        "commonest": lambda row: np.full(shape[1:], np.argmax(row)),
    }
    pick = draws[draw(st.sampled_from(sorted(draws)))]
    return np.stack([pick(row) for row in built.freqs[:: built.contexts]]).astype(np.uint8), built


def flat(built):
    return built.freq_array, built.start_array, built.slot_array


def test_the_extension_is_built_here():
    assert coder.HAVE_C, "run `python setup.py build_ext --inplace`: without it only the twin is tested"


@settings(max_examples=80, deadline=None)
@given(coded())
def test_every_array_round_trips_and_costs_less_than_8_bits_over_the_cross_entropy(case):
    symbols, built = case
    payload = encode(symbols, built)
    assert np.array_equal(decode(payload, symbols.shape, built), symbols)
    assert 8 * len(payload) < entropy_bits(symbols, built) + 8 + 1e-3


@settings(max_examples=60, deadline=None)
@given(coded())
def test_the_twin_writes_the_same_bytes_and_reads_them(case):
    symbols, built = case
    sizes = (*built.predictor_arrays, symbols[0].size, built.levels, built.precision, symbols.shape[2], built.contexts)
    payload = rans_twin.encode(symbols.tobytes(), *flat(built), *sizes)
    assert payload == encode(symbols, built)
    assert rans_twin.decode(payload, built.freq_array, built.entry_array, *sizes) == symbols.tobytes()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("channels", [1, GROUP])
def test_the_largest_scores_a_model_can_have_do_not_wrap(channels, sign):
    def predictor(seen: int) -> Predictor:
        weights = tuple((sign * MOST_WEIGHT,) * (seen * (channel % GROUP) + 2) for channel in range(channels))
        return Predictor(weights, ((sign * MOST_BIAS,) * 2,) * channels, ((sign * MOST_BIAS,) * 3,) * channels)

    rng = np.random.default_rng(0)
    model = ContextModel((0,) * channels, predictor(5), predictor(1))
    row_of = [coder._rounded(rng.integers(1, 1000, 256), 1 << 12) for _ in range(7)]
    built = CodecTables(8, 12, tuple(row_of[index % 7] for index in range(CONTEXTS * channels)), model)
    symbols = rng.integers(128, 256, (channels, 2, 3)).astype(np.uint8)
    payload = encode(symbols, built)
    assert payload == rans_twin.encode(symbols.tobytes(), *flat(built), *built.predictor_arrays, 6, 256, 12, 3, CONTEXTS)
    assert 8 * len(payload) < entropy_bits(symbols, built) + 8


@settings(max_examples=80, deadline=None)
@given(tables((4, 3), 2), st.binary(max_size=40))
def test_any_bytes_are_refused_or_are_the_one_encoding_of_what_they_decode_to(built, payload):
    shape = (built.channels, 4, 3)
    arguments = (built.freq_array, built.entry_array, *built.predictor_arrays, 12, built.levels, built.precision, 3, built.contexts)
    try:
        symbols = decode(payload, shape, built)
    except FrameError:
        with pytest.raises(ValueError, match=r"bytes are left over|first byte is zero"):
            rans_twin.decode(payload, *arguments)
    else:
        assert encode(symbols, built) == payload
        assert rans_twin.decode(payload, *arguments) == symbols.tobytes()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("concentration", [0.05, 1.0])
def test_4096_symbols_cost_at_most_2_percent_and_no_more_than_constriction(bits, concentration):
    rng = np.random.default_rng(bits)
    distributions = rng.dirichlet(np.full(1 << bits, concentration), size=16)
    drawn = np.stack([rng.choice(1 << bits, (9, 16, 16), p=p) for p in distributions], axis=1).astype(np.uint8)
    built, symbols = build_tables(drawn[1:], bits), drawn[0]
    payload_bits, ideal_bits = 8 * len(encode(symbols, built)), entropy_bits(symbols, built)
    assert payload_bits <= max(1.02 * ideal_bits, ideal_bits + 8)

    range_coder, ans = constriction.stream.queue.RangeEncoder(), constriction.stream.stack.AnsCoder()
    for row, channel in zip(built.freqs, symbols, strict=True):
        model = constriction.stream.model.Categorical(np.array(row) / sum(row), perfect=False)
        range_coder.encode(channel.ravel().astype(np.int32), model)
        ans.encode_reverse(channel.ravel().astype(np.int32), model)
    assert payload_bits <= min(range_coder.num_bits(), ans.num_bits()) + 16


def test_the_commonest_symbols_alone_cost_nothing():
    built = build_tables(np.zeros((100, 2, 8, 8), np.uint8), 2)
    zeros = np.zeros((2, 8, 8), np.uint8)
    assert encode(zeros, built) == b""
    assert np.array_equal(decode(b"", (2, 8, 8), built), zeros)


def test_leftover_bytes_are_refused():
    built = build_tables(np.random.default_rng(0).integers(0, 16, (20, 4, 6, 6)).astype(np.uint8), 4)
    symbols = np.random.default_rng(1).integers(0, 16, (4, 6, 6)).astype(np.uint8)
    payload = encode(symbols, built)
    for wrong in (payload + b"\x01", payload + b"\0", b"\0" + payload, payload * 2):
        with pytest.raises(FrameError, match=r"does not hold 144 coded symbols.*send the image again"):
            decode(wrong, (4, 6, 6), built)


def test_symbols_and_shapes_that_do_not_fit_the_tables_are_refused():
    built = build_tables(np.zeros((1, 2, 3, 3), np.uint8), 2)
    with pytest.raises(BundleError, match="out of range"):
        encode(np.full((2, 3, 3), 4, np.uint8), built)
    with pytest.raises(BundleError, match="do not fit codec tables of 2 channels"):
        encode(np.zeros((3, 3, 3), np.uint8), built)
    with pytest.raises(BundleError, match="do not fit codec tables of 2 channels"):
        decode(b"", (2, 0, 3), built)
    modelled = build_tables(np.zeros((1, 2, 3, 3), np.uint8), 2, fit_contexts(np.zeros((1, 2, 3, 3), np.uint8)))
    with pytest.raises(BundleError, match="do not fit codec tables of 2 channels of 3 x 3;"):
        decode(b"", (2, 3, 4), modelled)
    assert built.fit((2, 3, 3))
    assert not any(built.fit(shape) for shape in ((2, "height", None), (2, 3), (2, 3.0, 3), (2, 0, 3)))


def test_tables_follow_the_counts_and_never_give_a_level_nothing():
    symbols = np.array([0] * 90 + [1] * 10, np.uint8).reshape(1, 1, 10, 10)
    built = build_tables(symbols, 2)
    assert built.freqs == (tuple(coder._rounded(np.array([91, 11, 1, 1]), 4096)),)
    assert built.freqs[0] == pytest.approx([4096 * n / 104 for n in (91, 11, 1, 1)], abs=1)
    spike = build_tables(np.zeros((1, 1, 1000, 1000), np.uint8), 8)
    assert min(spike.freqs[0]) == 1
    assert sum(spike.freqs[0]) == 1 << 14


def smooth(count: int, bits: int) -> np.ndarray:
    """Symbols that resemble their neighbours, (count, 2, 12, 12)."""
    noise = np.random.default_rng(bits).normal(size=(count, 2, 16, 16))
    blurred = sum(noise[:, :, y : y + 12, x : x + 12] for y in range(5) for x in range(5)) / 5
    return np.clip(np.round((blurred / 4 + 0.5) * (2**bits - 1)), 0, 2**bits - 1).astype(np.uint8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_neighbours_tell_what_to_expect(bits):
    drawn, fresh = smooth(400, bits), smooth(401, bits)[400]
    static, conditional = build_tables(drawn, bits), build_tables(drawn, bits, fit_contexts(drawn))
    assert len(encode(fresh, conditional)) < 0.85 * len(encode(fresh, static))
    assert np.array_equal(decode(encode(fresh, conditional), fresh.shape, conditional), fresh)
    assert 8 * len(encode(fresh, conditional)) < entropy_bits(fresh, conditional) + 8


@pytest.mark.parametrize(("channels", "bits"), [(3, 8), (2, 4), (1, 1), (3, 3)])
def test_embedded_tables_send_the_first_channels_and_bits_and_restore_the_middle(channels, bits):
    drawn = np.random.default_rng(bits).integers(0, 256, (60, 3, 5, 5)).astype(np.uint8)
    tables = coder.build_embedded_tables(drawn, channels, bits)
    payload = encode(drawn[0], tables)
    back = decode(payload, (3, 5, 5), tables)
    assert np.array_equal(back, coder.as_received(drawn[0], tables))
    assert np.array_equal(encode(back, tables), payload), "what arrives would be sent again as it is"
    error = np.abs(back[:channels].astype(int) - drawn[0][:channels])
    assert error.max() <= 2 ** (7 - bits) if bits < 8 else error.max() == 0
    assert (back[channels:] == 128).all()
    assert 8 * len(payload) < entropy_bits(drawn[0], tables) + 8 < channels * bits * 25 * 1.2 + 8
    assert CodecTables.from_dict(tables.to_dict()) == tables


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (1, 3, 0, 4), (1, 0, 4, 4)])
def test_tables_of_nothing_are_refused(shape):
    for build in (partial(coder.build_embedded_tables, channels=1, bits=2), partial(build_tables, bits=2), partial(coder_tables, bits=2)):
        with pytest.raises(BundleError, match="cannot be built from symbols of shape"):
            build(np.zeros(shape, np.uint8))


def test_more_channels_than_there_is_room_for_contexts_go_without():
    symbols = np.random.default_rng(0).integers(0, 4, (3, 4000, 1, 1)).astype(np.uint8)
    assert coder_tables(symbols, 2).model is None
    wide = symbols * np.uint8(64)
    embedded = coder.build_embedded_tables(wide, 4000, 2)
    assert embedded.model is None
    assert np.array_equal(decode(encode(wide[0], embedded), (4000, 1, 1), embedded) >> 6, symbols[0])


@pytest.mark.parametrize(("channels", "bits"), [(0, 4), (4, 4), (2, 0), (2, 9)])
def test_embedded_tables_of_more_than_there_is_are_refused(channels, bits):
    with pytest.raises(BundleError, match=f"embedded tables of {channels} channels and {bits} bits cannot be built"):
        coder.build_embedded_tables(np.zeros((1, 3, 4, 4), np.uint8), channels, bits)


def test_contexts_cost_next_to_nothing_where_neighbours_tell_nothing():
    drawn = np.random.default_rng(0).choice(8, (3000, 2, 6, 6), p=np.arange(1, 9) / 36).astype(np.uint8)
    pair = build_tables(drawn[:2900], 3), build_tables(drawn[:2900], 3, fit_contexts(drawn[:2900]))
    costs = [sum(entropy_bits(image, tables) for image in drawn[2900:]) for tables in pair]
    assert costs[1] < 1.01 * costs[0]


def test_a_context_seen_once_falls_back_to_its_channel():
    drawn = np.zeros((50, 1, 4, 4), np.uint8)
    drawn[:, :, ::2] = 1
    drawn[0] = 3
    model = fit_contexts(drawn)
    built = build_tables(drawn, 2, model)
    assert all(min(row) >= 1 and sum(row) == 1 << built.precision for row in built.freqs)
    unseen = built.freqs[next(context for context in range(CONTEXTS) if context not in model.contexts(drawn))]
    shares = (np.bincount(drawn.ravel(), minlength=4) + 1) / (drawn.size + 4)
    assert np.array(unseen) / 1024 == pytest.approx(shares, abs=2e-3)


def test_tables_survive_json_and_refuse_nonsense():
    symbols = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)
    built = build_tables(symbols, 4)
    fields = json.loads(json.dumps(built.to_dict()))
    assert CodecTables.from_dict(fields) == built
    modelled = build_tables(symbols, 4, fit_contexts(symbols))
    with_model = json.loads(json.dumps(modelled.to_dict()))
    assert CodecTables.from_dict(with_model) == modelled
    row = fields["freqs"][0]
    for change in (
        {"bits": 0},
        {"bits": 9},
        {"bits": 4.0},
        {"precision": 15},
        {"freqs": []},
        {"freqs": [row[:-1]]},
        {"freqs": [[0, row[0] + row[1], *row[2:]]]},
        {"freqs": [[row[0] + 1, *row[1:]]]},
        {"freqs": [["a"] * 16]},
        {"freqs": 3},
        {"model": with_model["model"]},
        {"model": {}},
        {"model": 3},
        {"embedded": 1},
    ):
        with pytest.raises(BundleError, match="codec tables"):
            CodecTables.from_dict({**fields, **change})
    model = with_model["model"]
    for change in (
        {"centres": []},
        {"centres": [256]},
        {"centres": [0.5]},
        {"mean": {}},
        {"mean": {**model["mean"], "weights": [[1]]}},
        {"mean": {**model["mean"], "weights": [[1, 1 << 15]]}},
        {"mean": {**model["mean"], "weights": [[1, "1"]]}},
        {"mean": {**model["mean"], "rows": [[0] * 3]}},
        {"mean": {**model["mean"], "rows": [[1 << 30] * 4]}},
        {"spread": {**model["spread"], "rows": []}},
        {"spread": {**model["spread"], "columns": [[]]}},
    ):
        with pytest.raises(BundleError, match="codec tables"):
            CodecTables.from_dict({**with_model, "model": {**model, **change}})
    with pytest.raises(BundleError, match="codec tables"):
        CodecTables.from_dict({})


@pytest.mark.parametrize("bits", [0, 9])
def test_tables_of_0_or_9_bits_are_refused(bits):
    with pytest.raises(BundleError, match="bits 1 to 8"):
        build_tables(np.zeros((1, 1, 2, 2), np.uint8), bits)


def test_the_extension_refuses_tables_of_the_wrong_size_instead_of_reading_past_them():
    rans = pytest.importorskip("pipeline.runtime._rans")
    symbols = np.zeros((1, 2, 3, 3), np.uint8)
    built, modelled = build_tables(symbols, 2), build_tables(symbols, 2, fit_contexts(symbols))
    freqs, starts, slots = flat(built)
    none = (b"", b"", b"")
    for arguments in (
        (bytes(18), freqs[:1], starts, slots, *none, 9, 4, 12, 3, 1),
        (bytes(18), freqs, starts[:1], slots, *none, 9, 4, 12, 3, 1),
        (bytes(18), freqs, starts, slots[:1], *none, 9, 4, 12, 3, 1),
        (bytes(17), freqs, starts, slots, *none, 9, 4, 12, 3, 1),
        (bytes(18), freqs, starts, slots, *none, 9, 4, 13, 3, 1),
        (bytes(18), freqs, starts, slots, *none, 9, 4, 64, 3, 1),
        (bytes(18), freqs, starts, slots, *none, 0, 4, 12, 3, 1),
        (bytes(18), freqs, starts, slots, *none, 9, 0, 12, 3, 1),
        (bytes(18), freqs, starts, slots, *none, 9, 4, 12, 0, 1),
        (bytes(18), freqs, starts, slots, *none, 9, 4, 12, 2, 1),
        (bytes(18), freqs, starts, slots, *none, 9, 4, 12, 3, 0),
        (bytes(18), freqs, starts, slots, *none, 9, 4, 12, 3, 2),
        (bytes(18), freqs, starts, slots, *none, 9, 4, 12, 3, CONTEXTS),
        (bytes([9] * 18), freqs, starts, slots, *none, 9, 4, 12, 3, 1),
        (bytes(18), np.zeros_like(freqs), starts, slots, *none, 9, 4, 12, 3, 1),
    ):
        with pytest.raises(ValueError, match=r"fit|range"):
            rans.encode(*arguments)
    with pytest.raises(ValueError, match="fit"):
        rans.decode(b"", freqs, built.entry_array[:1], *none, 9, 4, 12, 3, 1)
    with pytest.raises(ValueError, match="out of range"):
        rans.decode(b"", freqs, np.full_like(built.entry_array, 0xFFFFFFFF), *none, 9, 4, 12, 3, 1)
    sizes = (9, 4, modelled.precision, 3, CONTEXTS)
    for number in range(3):
        for change in (slice(1, None), slice(0, 0)):
            arrays = list(modelled.predictor_arrays)
            arrays[number] = arrays[number][change]
            with pytest.raises(ValueError, match="predictors and symbols do not fit"):
                rans.encode(bytes(18), *flat(modelled), *arrays, *sizes)
            with pytest.raises(ValueError, match="predictors and symbols do not fit"):
                rans.decode(b"", modelled.freq_array, modelled.entry_array, *arrays, *sizes)


def test_without_the_extension_the_twin_is_used():
    code = (
        "import sys; sys.modules['pipeline.runtime._rans'] = None\n"
        "import numpy as np\nfrom pipeline.runtime import coder\nassert not coder.HAVE_C\n"
        "symbols = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)\ntables = coder.build_tables(symbols[None], 4)\n"
        "print(coder.encode(symbols, tables).hex(), (coder.decode(coder.encode(symbols, tables), (1, 4, 4), tables) == symbols).all())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    symbols = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)
    assert out == [encode(symbols, build_tables(symbols[None], 4)).hex(), "True"]
