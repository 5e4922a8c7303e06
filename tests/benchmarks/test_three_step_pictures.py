from __future__ import annotations

from benchmarks.three_step_pictures import over_noise


def test_noise_is_drawn_from_little_to_much_whatever_the_order_in_the_file() -> None:
    levels = {"0": 0.7, "10": 0.88, "2.5": 0.8, "5": 0.85}
    found = {"channel_uses": 64, "analogue": levels, "pam 1": {**levels, "0": 0.6}, "pam 2": {**levels, "0": 0.65}}
    bits = {"0.05": 0.85, "0.4": 0.5, "0": 0.9}
    rows = {
        "a": {"point": {"codec": {"kind": "jscc-awgn"}}, "validation": found},
        "b": {"point": {"codec": {"kind": "jscc-bsc"}}, "validation": {"channel_uses": 8, "bits": bits}},
    }
    left, right = over_noise({"points": rows}).axes
    lines = [*left.lines, *right.lines]
    assert [list(line.get_xdata()) for line in lines] == [[0, 2.5, 5, 10], [0, 2.5, 5, 10], [0, 0.05, 0.4]]
    assert [line.get_ydata()[0] for line in lines] == [0.7, 0.65, 0.9], "of PAM the best at each level"
