"""`reasonpix serve` under many clients, with dynamic batches and without.

    python benchmarks/serving.py [--clients 200] [--seconds 60] [--model mini/reasonpix2pix]

The server is a subprocess; the clients are coroutines of this process. Each client sends one edit
after the other. When it is rejected (429, 503) it retries after the response's Retry-After, plus or
minus half. Every accepted edit must be answered with 200 and the right PNG, or it counts as lost;
right is what the first run gave for the same request on an idle server. At the end the clients
wait for the edits under way; throughput counts only answers before the end. CPU seconds per edit
show how much a throughput depends on other programs: on a busy machine, run both with
OMP_NUM_THREADS=1.

`--batch-size 1` is the same server with batches of one edit, so the UNet and the VAE compute one at
a time. The encoder `llava` always computes four pairs on a CPU, so with batches of one, three of
them are wasted. That is part of the ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from PIL import Image
from reasonpix_mini.world import scene

from reasonpix.core.images import encode_png

KINDS = 8
"""Different requests; clients choose among them at random."""
WARM = 1 / 3
"""Share of the time after which memory should no longer grow."""
WANTED = 1.5
AWAY = (429, 503)


@dataclass(frozen=True)
class Edit:
    """A request, and the size of its image."""

    image: bytes
    size: tuple[int, int]
    form: dict[str, str]


@dataclass
class Seen:
    """Measurements of the clients and of the server's memory."""

    latencies_s: list[float] = field(default_factory=list)
    in_time: int = 0
    """Edits answered before the end."""
    away: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    """Accepted edits without the right answer, by reason."""
    rss_mb: list[float] = field(default_factory=list)
    cpu_s: float = 0
    """Of the server, until the last answer."""


def edits() -> list[Edit]:
    """Requests, all different."""
    made = []
    for n in range(KINDS):
        one = scene("test", n)
        image = Image.fromarray(one.render())
        words = f"Replace the {one.placements[0].category} by something that can fly"
        made.append(Edit(encode_png(image), image.size, {"instruction": words, "seed": str(n)}))
    return made


@contextmanager
def served(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server's process and URL once it is ready; ended by SIGTERM."""
    with subprocess.Popen(
        [sys.executable, "-m", "reasonpix", "serve", "--port", "0", "--no-page", *options],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout
            found = re.search(r"http://\S+", process.stdout.readline())
            if not found:
                raise SystemExit("the server did not start")
            yield process, found[0]
        finally:
            process.send_signal(signal.SIGTERM)
            if code := process.wait(60):
                raise SystemExit(f"the server ended with {code}")


def resident_mb(process: subprocess.Popen[str]) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024


def cpu_s(process: subprocess.Popen[str]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def post(client: httpx2.AsyncClient, edit: Edit) -> httpx2.Response:
    files = {"image": ("scene.png", edit.image, "image/png")}
    return await client.post("/v1/edits", data=edit.form, files=files)


def problem(answer: httpx2.Response, edit: Edit, wanted: bytes | None) -> str:
    """What is wrong with the answer to an accepted request; nothing if it is right."""
    if answer.status_code != 200:
        return f"status {answer.status_code}: {answer.text[:80]}"
    with Image.open(io.BytesIO(answer.content), formats=["PNG"]) as image:
        image.load()
        if image.size != edit.size:
            return "an image of another size"
    if wanted is not None and hashlib.sha256(answer.content).digest() != wanted:
        return "another image than the same request gave before"
    return ""


async def ask(
    client: httpx2.AsyncClient, number: int, todo: list[Edit], right: list[bytes], until: float
) -> Seen:
    """One client, from now on until then."""
    rng = random.Random(number)
    seen = Seen()
    await asyncio.sleep(rng.random())
    while (started := time.perf_counter()) < until:
        kind = rng.randrange(len(todo))
        try:
            answer = await post(client, todo[kind])
        except httpx2.HTTPError as error:
            seen.lost[type(error).__name__] += 1
            continue
        now = time.perf_counter()
        if answer.status_code in AWAY:
            seen.away += 1
            pause = float(answer.headers["retry-after"]) * rng.uniform(0.5, 1.5)
            await asyncio.sleep(min(pause, max(0, until - now)))
        elif found := problem(answer, todo[kind], right[kind]):
            seen.lost[found] += 1
        else:
            seen.latencies_s.append(now - started)
            seen.in_time += now < until
    return seen


async def load(
    process: subprocess.Popen[str], url: str, clients: int, seconds: float, todo: list[Edit]
) -> Seen:
    """All clients at once."""
    limits = httpx2.Limits(max_connections=clients)
    whole = Seen()
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        right = []
        for edit in todo:  # alone, which warms it up as well
            answer = await post(client, edit)
            if found := problem(answer, edit, None):
                raise SystemExit(f"a single edit: {found}")
            right.append(hashlib.sha256(answer.content).digest())
        whole.rss_mb.append(resident_mb(process))
        before = cpu_s(process)
        until = time.perf_counter() + seconds
        asking = [
            asyncio.create_task(ask(client, number, todo, right, until))
            for number in range(clients)
        ]
        while time.perf_counter() < until:
            await asyncio.sleep(seconds / 120)
            whole.rss_mb.append(resident_mb(process))
        for seen in await asyncio.gather(*asking):
            whole.latencies_s += seen.latencies_s
            whole.in_time += seen.in_time
            whole.away += seen.away
            whole.lost += seen.lost
        whole.cpu_s = cpu_s(process) - before
    whole.rss_mb.append(resident_mb(process))
    return whole


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--model", default="mini/reasonpix2pix")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--queue", type=int, default=64)
    given = parser.parse_args()
    common = ("--model", given.model, "--runtime", given.runtime, "--queue", str(given.queue))
    print(f"{given.clients} clients, {given.seconds:g} s, {given.model}, runtime {given.runtime}")
    print(
        f"{'':>16} {'edits/s':>8} {'accepted':>9} {'lost':>5} {'sent away':>10} "
        f"{'p50 s':>6} {'p95 s':>6} {'CPU s/edit':>10} "
        f"{'RSS MB: start':>14} {'warm':>5} {'most':>5} {'end':>5}"
    )
    rates = []
    lost: Counter[str] = Counter()
    todo = edits()
    for name, options in (("dynamic batches", ()), ("batches of one", ("--batch-size", "1"))):
        with served(*common, *options) as (process, url):
            seen = asyncio.run(load(process, url, given.clients, given.seconds, todo))
        rates.append(seen.in_time / given.seconds)
        lost += seen.lost
        rss = seen.rss_mb
        accepted = len(seen.latencies_s) + seen.lost.total()
        p50, p95 = (statistics.quantiles(seen.latencies_s, n=20)[n] for n in (9, 18))
        memory = (rss[0], rss[int(len(rss) * WARM)], max(rss), rss[-1])
        print(
            f"{name:>16} {rates[-1]:8.2f} {accepted:9} {seen.lost.total():5} {seen.away:10} "
            f"{p50:6.1f} {p95:6.1f} {seen.cpu_s / accepted:10.2f} {memory[0]:14.0f} "
            + " ".join(f"{it:5.0f}" for it in memory[1:])
        )
    ratio = rates[0] / rates[1]
    reached = "reached" if ratio >= WANTED else "missed"
    print(f"dynamic batches are {ratio:.2f}x as fast; {WANTED}x wanted: {reached}")
    for reason, count in lost.most_common():
        print(f"lost {count}: {reason}")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
