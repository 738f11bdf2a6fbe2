from __future__ import annotations

import pytest

from reasonpix.core.figures import counted, duration


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
