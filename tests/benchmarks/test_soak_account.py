"""What is planned, and the books of answers that came as they should and as they should not."""

import json

import pytest

from benchmarks.soak_account import CALM_S, DRAIN, KILL, RESET, SILENT, WARM_UP, Account, growth, plan

EXPECTED = {path: [{"label": "bee", "probability": at + number / 10} for number in range(4)] for path, at in (("split", 0.1), ("device-only", 0.15))}


def line(number: int, path: str = "split", picture: int | None = None) -> bytes:
    picture = number % 4 if picture is None else picture
    return json.dumps({"frame": number, "path": path, "total_ms": 2.0, **EXPECTED[path][picture]}).encode()


def heard(lines: list[bytes], asked: int | None = None) -> Account:
    """An account of pictures asked every second, answered half a second later."""
    account = Account(EXPECTED)
    for number in range(len(lines) if asked is None else asked):
        account.ask(float(number))
    for number, each in enumerate(lines):
        account.hear(each, number + 0.5)
    return account


def test_each_disruption_has_its_share_of_the_run_and_time_to_recover() -> None:
    planned = plan(1800, 20, 5, 3)
    assert planned == plan(1800, 20, 5, 3) != plan(1800, 20, 5, 4)
    kinds = [each.kind for each in planned]
    assert {kind: kinds.count(kind) for kind in kinds} == {RESET: 10, SILENT: 10, KILL: 5, DRAIN: 1}
    assert planned[0].at_s >= WARM_UP * 1800
    ends = [each.at_s + each.for_s + CALM_S for each in planned]
    assert all(end_s <= after.at_s for end_s, after in zip(ends, planned[1:], strict=False))
    assert ends[-1] <= 1800
    assert max(each.at_s for each in planned if each.kind in (KILL, DRAIN)) < 1260


def test_growth_is_of_the_end_over_what_follows_the_warm_up() -> None:
    assert growth([10] * 10 + [100] * 10 + [170] * 70 + [103] * 10, 10) == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("lines", "counts"),
    [
        ([line(number, "device-only" if number == 2 else "split") for number in range(6)], {}),
        ([line(0), line(1)], {"lost": 2}),
        ([line(0), line(1), line(2), line(3), line(3)], {"doubled": 1, "wrong": 1}),
        ([line(0), line(1), line(2, picture=1), line(3)], {"lost": 1, "doubled": 1, "wrong": 1}),
        ([line(0), line(1, picture=0), line(2, picture=1), line(3, picture=2)], {"lost": 3, "doubled": 3, "wrong": 3}),
        ([line(0), b'{"frame": 1, "error": "no"}', line(2), line(3)], {"lost": 1, "wrong": 1}),
        ([line(0), line(1, picture=3), line(2), line(3)], {"lost": 1, "wrong": 1}),
        ([line(number) for number in range(5)], {"doubled": 1}),
    ],
)
def test_an_answer_is_told_by_its_content(lines: list[bytes], counts: dict[str, int]) -> None:
    asked = 6 if len(lines) == 6 else 4
    found = heard(lines, asked).exactly_once()
    assert found == {"asked": asked, "answered": len(lines), "lost": 0, "doubled": 0, "wrong": 0} | counts


def test_an_outage_ends_with_its_cause_and_recovery_with_the_first_answer_by_splitting() -> None:
    account = heard([line(number, "device-only" if 3 <= number < 7 else "split") for number in range(10)])
    outages = [(3.2, 4.7)]
    assert account.recoveries_s(outages) == [pytest.approx(7.5 - 4.7)]
    assert account.shares(outages) == {"outside": {"answered": 8, "split": 6}, "settled": {"answered": 5, "split": 5}}
    assert account.recoveries_s([(8.0, 9.9)]) == [None]
    assert account.by_second() == {"split": [1, 1, 1, 0, 0, 0, 0, 1, 1, 1], "alone": [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]}
