"""A small evaluation folder, a study of it, and a server as a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reasonpix_study.create import create_study
from reasonpix_study.store import Study

from reasonpix.evaluation.results import COPY, TRUTH, CaseRecord, EvaluationFolder, json_lines
from reasonpix.plugin.types import Problem
from tests.support.pair_files import picture, png

METHODS = ("Alphard", "Betelgeuse", "Capella", "Deneb")
KINDS = ("direct", "reasoning")


def evaluation(
    root: Path,
    cases: int = 6,
    methods: Sequence[str] = METHODS,
    size: tuple[int, int] = (24, 16),
    failed: Mapping[str, Sequence[int]] | None = None,
    word: str = "<b>",
) -> EvaluationFolder:
    """Every edit is noise of its own; the truth is larger than the input."""
    folders = {it: it.lower() for it in (TRUTH, COPY, *methods)}
    records = [
        CaseRecord(
            id=f"case{n}",
            row=f"row {n}",
            instructions={
                "direct": f"turn {n} to {word}",
                "reasoning": f"what follows {n} but {word}?",
            },
            caption="",
            edited_caption="",
            groups={},
        ).model_dump()
        for n in range(cases)
    ]
    for name in ("input", "truth"):
        (root / name).mkdir(parents=True)
    index: dict[str, Any] = {"benchmark": "stars", "kinds": list(KINDS), "folders": folders}
    (root / "evaluation.json").write_text(json.dumps(index))
    (root / "cases.jsonl").write_bytes(json_lines(records))
    made = EvaluationFolder(root)
    for n in range(cases):
        (root / "input" / f"case{n}.png").write_bytes(png(picture(n, size)))
        truth = png(picture(n + 500, (2 * size[0], 2 * size[1])))
        (root / "truth" / f"case{n}.png").write_bytes(truth)
        for m, method in enumerate(methods):
            for k, kind in enumerate(KINDS):
                fails = kind == "reasoning" and n in (failed or {}).get(method, ())
                edited = picture(1000 * (m + 1) + 2 * n + k, size)
                problem = Problem(status="failed", reason="no box")
                made.write_edit(method, kind, f"case{n}", problem if fails else edited)
    return made


def small_study(
    folder: Path,
    cases: int = 6,
    size: tuple[int, int] = (24, 16),
    word: str = "<b>",
    **options: Any,
) -> Study:
    edits = evaluation(folder / "evaluation", cases, size=size, word=word)
    options = {"samples": cases, "per_worker": 4} | options
    return create_study(edits, folder / "study", **options)


@contextmanager
def serving(folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`reasonpix study serve` on a free port: the process and its address."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-W", "error", "-m", "reasonpix"),
            *("study", "serve", str(folder), "--port", "0", *more),
        ],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        found = re.match(r"worker 1: (http://.*)/", process.stdout.readline())
        if found is None:
            process.kill()
            raise AssertionError(process.stderr.read())
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
