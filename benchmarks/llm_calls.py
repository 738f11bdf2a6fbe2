"""Answers per second of the planner `openai`, with every answer stored, and of the official client.

    python benchmarks/llm_calls.py [--latency 0.2] [--concurrency 64] [--requests 12800]

A server in another process answers every request after `latency` seconds, whatever the load; so
the ideal rate is concurrency / latency, and the ratio is relative to it. The planner gets requests
in shards as in a run, with retries, budget, a ledger on disk, and validation of each answer. The
official client (`chat.completions.create` alone) is called in as many threads for a quarter of the
requests, and sequentially for a few.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from openai import OpenAI
from reasonpix_openai import OpenAIOptions, OpenAIPlanner

from reasonpix.generation.engine.local_executor import shards_at_once
from reasonpix.generation.run_folder import Shard
from reasonpix.llm.ledger import Ledger
from reasonpix.llm.tasks import REPLACE
from reasonpix.plugin.types import EditPlan, ReplaceRequest

ANSWER = {
    "selected": "bee",
    "target": "pear",
    "selected_synonyms": [],
    "target_synonyms": [],
    "instruction": "Something sweet from an orchard would look better there.",
}


def serve(latency_s: float) -> None:
    """Send the same answer to every request after `latency_s`, until standard input closes."""
    message = {"role": "assistant", "content": json.dumps(ANSWER)}
    usage = {"prompt_tokens": 1000, "completion_tokens": 50, "total_tokens": 1050}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage})
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    answer = (head + body).encode()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: *(\d+)", request)
                await reader.readexactly(int(length[1]) if length else 0)
                await asyncio.sleep(latency_s)
                writer.write(answer)
        writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(converse, "127.0.0.1", 0, backlog=1024)
        print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

    asyncio.run(listen())


@contextmanager
def served(latency_s: float) -> Iterator[str]:
    """Run the server; yields its root URL."""
    with subprocess.Popen(
        [sys.executable, __file__, "--serve", str(latency_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout
        yield process.stdout.readline().strip()
        process.stdin.close()


def make_requests(first: int, count: int) -> list[ReplaceRequest]:
    """Different requests, numbered from `first`."""
    return [
        ReplaceRequest(caption=f"a bee and rabbit {n}", categories=("bee", "rabbit"), seed=n)
        for n in range(first, first + count)
    ]


def timed(work: Callable[[], object]) -> tuple[float, float]:
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
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve)
        return
    os.environ["OPENAI_API_KEY"] = "none"
    os.environ["NO_PROXY"] = "127.0.0.1"
    few = 20
    with served(args.latency) as root, tempfile.TemporaryDirectory() as folder:
        planner = OpenAIPlanner(OpenAIOptions(base_url=f"{root}/v1", concurrency=args.concurrency))
        planner.load()
        planner.ledger = Ledger(Path(folder) / "ledger.sqlite")
        client = OpenAI(base_url=f"{root}/v1", max_retries=0)
        prompt = planner.prompt(REPLACE)

        def create(request: ReplaceRequest) -> None:
            body: Any = planner._request(prompt.conversation(request), planner._dialect)
            answer = client.chat.completions.create(**body)
            assert answer.choices[0].message.content

        def plan(requests: list[ReplaceRequest]) -> None:
            # As in a run: several shards of the default size at once.
            shard = Shard("", 32)
            shards = [requests[start : start + 32] for start in range(0, len(requests), 32)]
            with ThreadPoolExecutor(shards_at_once(args.concurrency, [shard])) as workers:
                for plans in workers.map(planner.replace, shards):
                    assert all(isinstance(plan, EditPlan) for plan in plans)

        with ThreadPoolExecutor(args.concurrency) as threads:
            works: dict[str, tuple[Callable[[list[ReplaceRequest]], object], int]] = {
                "reasonpix": (plan, args.requests),
                "official client": (
                    lambda requests: list(threads.map(create, requests)),
                    args.requests // 4,
                ),
                "one at a time": (lambda requests: [create(request) for request in requests], few),
            }
            print(
                f"{args.requests} requests, {args.concurrency} at once, {args.latency:g} s each: "
                f"ideally {args.concurrency / args.latency:g} answers/s"
            )
            print(f"{'':16} {'answers/s':>10} {'ratio':>6} {'CPU ms/answer':>14}")
            for number, (name, (work, count)) in enumerate(works.items()):
                # Open the connections first.
                work(make_requests(number * 10**6, min(count, args.concurrency)))
                requests = make_requests(number * 10**6 + 10**5, count)
                wall, cpu = timed(partial(work, requests))
                ratio = count / wall * args.latency / args.concurrency
                print(f"{name:16} {count / wall:10.1f} {ratio:6.3f} {cpu / count * 1e3:14.2f}")
        planner.close()
        planner.ledger.close()
        client.close()


if __name__ == "__main__":
    main()
