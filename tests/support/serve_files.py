"""`reasonpix serve` as a subprocess, a fake model served in this process, and requests to them."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx2
import numpy as np
import uvicorn
from PIL import Image, ImageOps

from reasonpix.core.network import listen, url_of
from reasonpix.deployment.server.app import create_app
from reasonpix.deployment.server.process import uvicorn_config
from reasonpix.deployment.server.service import Limits, Service
from reasonpix.editing.config import SamplingSettings
from reasonpix.editing.pipeline import EditTask, ReasonPix2Pix
from reasonpix.editing.pipeline_parts import working_image
from reasonpix.plugin.types import Problem

SERVE = "from reasonpix.cli.serve import serve_command; serve_command()"


def picture(seed: int = 0, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Random blobs."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@contextmanager
def started(
    model: Path | str,
    *more: object,
    token: str | None = None,
    command: str = SERVE,
    path: tuple[Path, ...] = (),
    page: bool = False,
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`reasonpix serve` on a free port, possibly still loading: the process and its URL."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    }
    environment.pop("REASONPIX_TOKEN", None)
    if token is not None:
        environment["REASONPIX_TOKEN"] = token
    words = ["--model", model, "--port", 0, "--device", "cpu", *more]
    words += [] if page else ["--no-page"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        found = re.search(r"(http://\S+)/readyz", process.stderr.readline())
        if found is None:
            process.kill()
            raise AssertionError(process.stderr.read())
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@contextmanager
def serving(
    model: Path | str,
    *more: object,
    token: str | None = None,
    command: str = SERVE,
    path: tuple[Path, ...] = (),
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The same, ready for edits."""
    with started(model, *more, token=token, command=command, path=path) as (process, url):
        assert process.stdout is not None and process.stderr is not None
        if process.stdout.readline() != f"serving on {url}\n":
            process.kill()
            raise AssertionError(process.stderr.read())
        yield process, url


def ask(
    client: httpx2.Client, image: Image.Image | bytes, instruction: str, **fields: object
) -> httpx2.Response:
    """Request an edit."""
    data = image if isinstance(image, bytes) else encoded(image)
    values = {"instruction": instruction, **{name: str(it) for name, it in fields.items()}}
    return client.post("/v1/edits", data=values, files={"image": ("image", data)})


def figures(client: httpx2.Client) -> Mapping[str, float]:
    """The values of /metrics, by name and labels."""
    lines = client.get("/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and line[0] != "#")
    return {name: float(value) for name, value in pairs}


class FakeModel:
    """Inverts images: at once, or, if `held`, once `free` is set.

    `batches` are the instructions that it was given together, `steps` how many it has taken.
    """

    def __init__(self, held: bool = False, rows: int = 4) -> None:
        self.rows = rows
        self.device = "cpu"
        self.runtime = "fake"
        self.settings = SamplingSettings(resolution=32, num_inference_steps=10)
        self.batches: list[list[str]] = []
        self.steps = 0
        self.free = threading.Event()
        if not held:
            self.free.set()

    def working_image(self, image: Image.Image, resolution: int) -> Image.Image:
        return working_image(image, resolution, 8)

    def resolve_settings(self, **changes: float | None) -> SamplingSettings:
        given = {name: it for name, it in changes.items() if it is not None}
        return self.settings.model_copy(update=given)

    def edit(
        self,
        tasks: Iterable[EditTask],
        settings: SamplingSettings,
        advance: Callable[[float], None],
    ) -> Iterator[tuple[int, Image.Image | Problem]]:
        asked = list(tasks)
        self.batches.append([task.instruction for task in asked])
        if any(task.instruction == "break" for task in asked):
            raise ValueError("a plugin is broken")
        if any(task.instruction == "exhaust" for task in asked):
            raise MemoryError
        for _ in range(settings.num_inference_steps):
            while not self.free.wait(0.01):
                advance(0)
            self.steps += 1
            advance(1 / settings.num_inference_steps)
        for number, task in enumerate(asked):
            if task.instruction == "decline":
                yield number, Problem(status="failed", reason="there is nothing to edit")
            else:
                yield number, ImageOps.invert(task.image)


@contextmanager
def faked(
    model: FakeModel, limits: Limits | None = None, *, page: bool = False, **options: Any
) -> Iterator[tuple[Service, httpx2.Client]]:
    """Serve a `FakeModel` in a thread of this process; yields the service and a client."""
    load = lambda: cast(ReasonPix2Pix, model)  # noqa: E731
    service = Service(load, "fake", limits=limits or Limits(), **options)
    service.batcher.model.result(10)
    server = uvicorn.Server(uvicorn_config(create_app(service, page=page)))
    with listen("127.0.0.1", 0, 2048) as listening:
        url = url_of("127.0.0.1", listening)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            with httpx2.Client(base_url=url, timeout=20, trust_env=False) as client:
                yield service, client
        finally:
            model.free.set()
            server.should_exit = True
            thread.join()
            service.batcher.close()
            service.image_threads.shutdown()


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)
