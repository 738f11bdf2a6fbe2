"""Answers per second: the planner `openai`, every answer stored, against the bare official client.

    python benchmarks/llm_calls.py [--latency 0.2] [--concurrency 64] [--requests 12800]

A server in a process of its own takes `latency` seconds for every answer, however many it is asked
for at once; so the ideal is concurrency / latency, and the ratio is to that. The planner gets its
questions as in a run, two groups of 8 x concurrency at a time, and answers them through its
retries, its accounts, a ledger on disk, and the checks of each answer. The official client is
called in as many threads (`chat.completions.create`, nothing else) for a quarter of the requests,
and one at a time for a few.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from openai import OpenAI
from reasonpix_openai import OpenAIOptions, OpenAIPlanner

from reasonpix.ledger import Ledger
from reasonpix.records import EditPlan, ReplaceRequest
from reasonpix.tasks import REPLACE

SERVER = Path(__file__).parents[1] / "tests" / "openai_server.py"


@contextmanager
def served(latency_s: float) -> Iterator[str]:
    """The root URL of a server that takes so long for every answer."""
    with subprocess.Popen(
        [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        root = process.stdout.readline().strip()
        script = json.dumps({"latency": latency_s}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{root}/script", script)).close()
        yield root
        process.stdin.close()


def questions(first: int, count: int) -> list[ReplaceRequest]:
    """Questions of which no two are equal."""
    return [
        ReplaceRequest(caption=f"a bee and rabbit {n}", categories=("bee", "rabbit"), seed=n)
        for n in range(first, first + count)
    ]


def taken(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one call."""
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - start_cpu


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests", type=int, default=12800)
    args = parser.parse_args()
    os.environ["OPENAI_API_KEY"] = "none"
    os.environ["NO_PROXY"] = "127.0.0.1"
    few = 20
    with served(args.latency) as root, tempfile.TemporaryDirectory() as folder:
        planner = OpenAIPlanner(OpenAIOptions(base_url=f"{root}/v1", concurrency=args.concurrency))
        planner.load()
        planner.ledger = Ledger(Path(folder) / "ledger.sqlite")
        client = OpenAI(base_url=f"{root}/v1", max_retries=0)
        prompt = planner.prompt(REPLACE)

        def create(question: ReplaceRequest) -> None:
            request: Any = planner._request(prompt.conversation(question), planner._dialect)
            answer = client.chat.completions.create(**request)
            assert answer.choices[0].message.content

        def ours(asked: list[ReplaceRequest]) -> None:
            size = 8 * args.concurrency
            groups = [asked[start : start + size] for start in range(0, len(asked), size)]
            with ThreadPoolExecutor(2) as workers:
                for plans in workers.map(planner.replace, groups):
                    assert all(isinstance(plan, EditPlan) for plan in plans)

        with ThreadPoolExecutor(args.concurrency) as threads:
            works: dict[str, tuple[Callable[[list[ReplaceRequest]], object], int]] = {
                "reasonpix": (ours, args.requests),
                "official client": (
                    lambda asked: list(threads.map(create, asked)),
                    args.requests // 4,
                ),
                "one at a time": (lambda asked: [create(question) for question in asked], few),
            }
            print(
                f"{args.requests} requests, {args.concurrency} at once, {args.latency:g} s each: "
                f"ideally {args.concurrency / args.latency:g} answers/s"
            )
            print(f"{'':16} {'answers/s':>10} {'ratio':>6} {'CPU ms/answer':>14}")
            for number, (name, (work, count)) in enumerate(works.items()):
                work(questions(number * 10**6, min(count, args.concurrency)))  # opens connections
                asked = questions(number * 10**6 + 10**5, count)
                wall, cpu = taken(partial(work, asked))
                ratio = count / wall * args.latency / args.concurrency
                print(f"{name:16} {count / wall:10.1f} {ratio:6.3f} {cpu / count * 1e3:14.2f}")
        planner.close()
        planner.ledger.close()
        client.close()


if __name__ == "__main__":
    main()
