import base64

from benchmarks.runtime_fuzz import input_of, measure
from tests.benchmarks.traps import Traps

KINDS = {1: "KeyError: 'a surprise'", 2: "the process ended with 3", 3: "hangs for 3 s", 4: "takes ", 5: "MemoryError"}


def test_whatever_an_input_does_is_counted_and_the_next_one_follows() -> None:
    raw = measure(24, 378, {"traps": (Traps, 1.0)}, hang_s=3)
    found = raw["targets"]["traps"]
    inputs = [input_of("traps", 378, index, Traps(None)) for index in range(24)]
    expected = {index: KINDS[data[0] % 16] for index, (data, _) in enumerate(inputs) if data[0] % 16 in KINDS}
    assert set(expected.values()) == set(KINDS.values())
    kept = {failure["index"]: failure for failure in found["kept"]}
    assert {index: failure["what"].startswith(expected.get(index, "?")) for index, failure in kept.items()} == dict.fromkeys(expected, True)
    assert all(base64.b64decode(failure["input"]) == inputs[index][0] for index, failure in kept.items())
    assert (raw["inputs"], found["inputs"], raw["failures"]) == (24, 24, len(expected))
    assert found["answered"] + found["refused"] == 24 - len(expected) + sum(what == KINDS[4] for what in expected.values())
    assert raw["checked"] == sum(is_checked for _, is_checked in inputs)
