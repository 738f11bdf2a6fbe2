from __future__ import annotations

import pytest

from reasonpix.core.figures import byte_size, counted, duration, listed, rate


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (0.0000004, "0.4 µs"),
        (0.000012, "12 µs"),
        (0.0004, "400 µs"),
        (0.00421, "4.21 ms"),
        (0.04, "40 ms"),
        (0.99949, "999 ms"),
        (0.9996, "1 s"),
        (1.2345, "1.23 s"),
        (38, "38 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min"),
        (125, "2 min 5 s"),
        (3599.6, "1 h"),
        (12_000, "3 h 20 min"),
        (400_000, "111 h 7 min"),
        (-0.04, "-40 ms"),
    ],
)
def test_a_duration_keeps_its_digits(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_counts_have_their_noun() -> None:
    assert [counted(number, "record") for number in (0, 1, 2, 28_058)] == [
        "0 records",
        "1 record",
        "2 records",
        "28,058 records",
    ]


def test_sizes_and_rates_keep_their_digits() -> None:
    sizes = [byte_size(n) for n in (0, 812, 999, 3_400, 999_600, 1_250_000_000, 5 * 10**15)]
    assert sizes == ["0 B", "812 B", "999 B", "3.4 kB", "1 MB", "1.25 GB", "5e+03 TB"]
    assert [rate(1, 24), rate(300, 2), rate(0, 2), rate(3, 0)] == ["0.0417/s", "150/s", "0/s", ""]


@pytest.mark.parametrize(
    ("names", "text"),
    [([], ""), (["a"], "a"), (list("abc"), "a, b, c"), (list("abcde"), "a, b, c and 2 more")],
)
def test_the_first_names_are_listed_and_the_others_counted(names: list[str], text: str) -> None:
    assert listed(names) == text
