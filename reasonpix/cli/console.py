"""What commands share on the console: the funnel of a run, logs, and stopping on a signal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from reasonpix.generation.outcomes import OutcomeCounts

STOPPED = "stopped; run the same command again to continue"


@contextmanager
def graceful_shutdown(deferred: Callable[[int], bool] = lambda number: False) -> Iterator[None]:
    """Stop gracefully on the first SIGINT or SIGTERM, and immediately on the second.

    The first signal raises `KeyboardInterrupt(number)`, unless `deferred(number)` returns true
    because the work ends by itself. The second one leaves without the interpreter's shutdown,
    which would wait for threads.
    """
    import os
    import signal

    def stop(number: int, _: object) -> None:
        if deferred(number):
            return
        for signal_number in previous:
            signal.signal(signal_number, leave)
        raise KeyboardInterrupt(number)

    def leave(number: int, _: object) -> None:
        os.write(2, f"\n{STOPPED}\n".encode())
        os._exit(128 + number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def exit_when_stopped(message: str = STOPPED) -> Iterator[None]:
    """Like `graceful_shutdown`; a stopped command prints `message` and exits with 128 + signal."""
    try:
        with graceful_shutdown():
            yield
    except KeyboardInterrupt as stopped:
        click.echo(message, err=True)
        sys.exit(128 + (stopped.args or (2,))[0])


def show_logs(debug: bool) -> None:
    """Print the package's log, such as waits for a batch job; with `debug`, all of it."""
    import logging

    class Echo(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            click.echo(self.format(record), err=True)

    logger = logging.getLogger("reasonpix")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.handlers = [Echo()]


def print_funnel(counts: OutcomeCounts, before: OutcomeCounts | None = None) -> None:
    """How many records passed each stage, and how many did `before`."""
    earlier = dict(before.stages) if before else {}
    head = f"{'stage':>22} {'ok':>8} {'rejected':>8} {'failed':>8}"
    click.echo(head + (f" {'ok before':>10}" if before else ""))
    for stage, ended in counts.stages:
        line = f"{stage:>22} {ended['ok']:8} {ended['rejected']:8} {ended['failed']:8}"
        click.echo(line + (f" {earlier[stage]['ok']:10}" if stage in earlier else ""))


def print_location(place: str) -> None:
    """Print a URL as it is, and a path as an absolute one."""
    click.echo(place if "://" in place else Path(place).resolve())
