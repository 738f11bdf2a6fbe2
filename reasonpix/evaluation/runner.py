"""Run an evaluation: every method edits every case by each kind of instruction, and is measured.

Edits are kept one by one, scores by method and kind: a run that was stopped goes on where it was,
and a method that is added later costs only its own edits.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from reasonpix.core.hashing import fingerprint, seed_of
from reasonpix.core.images import UndecodableImage, decode, encode_png
from reasonpix.core.memory import is_out_of_memory
from reasonpix.core.storage import write_atomically
from reasonpix.errors import PluginError, ReasonpixError, RecipeError, RunError, WeightsError
from reasonpix.evaluation.benchmark import read_benchmark
from reasonpix.evaluation.cases import DIRECT, Benchmark, Case
from reasonpix.evaluation.metrics import Metrics
from reasonpix.evaluation.recipe import EvaluationRecipe
from reasonpix.evaluation.results import COPY, TRUTH, CaseRecord, EvaluationFolder, lines
from reasonpix.plugin import registry
from reasonpix.plugin.components import Component, Grounder, Method, MethodRequest, ModelOptions
from reasonpix.plugin.spec import ComponentSpec
from reasonpix.plugin.types import Problem
from reasonpix.plugin.weights import check_weights

Report = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""

VERSION = "1"
"""Raise it when methods are asked in another way: edits made before go stale."""


@dataclass(frozen=True)
class _Job:
    """An edit to be made."""

    case: Case
    kind: str


def evaluate(
    recipe: EvaluationRecipe, out: Path, report: Report, *, retry_failed: bool = False
) -> EvaluationFolder:
    """Make the edits and scores that `out` lacks. Paths in `recipe` are relative to where you are.

    Everything that can be checked without a model is checked first. A case that a method cannot
    edit is kept with its reason; `retry_failed` tries those again. Raises `ReasonpixError`.
    """
    methods = {name: _method(use) for name, use in recipe.methods.items()}
    grounder = recipe.grounder.build() if recipe.grounder else None
    assert grounder is None or isinstance(grounder, Grounder)
    metrics = Metrics(recipe.metrics, grounder)
    named: dict[str, Component[Any]] = {f"methods.{name}": it for name, it in methods.items()}
    _check(named | ({"grounder": grounder} if grounder else {}))
    metrics.check()
    benchmark = read_benchmark(recipe.benchmark, Path())
    _check_captions(benchmark, methods)
    with _alone(out):
        folder = _prepare(recipe, benchmark, out, report)
        if not folder.identity:
            _try(metrics)
        for name, method in methods.items():
            _edit(folder, benchmark, name, method, recipe.seed, report, retry_failed)
        _measure(folder, benchmark, metrics, report, retry_failed)
    return folder


def _method(use: ComponentSpec) -> Method[Any]:
    component = use.build()
    assert isinstance(component, Method)
    return component


def _check(named: Mapping[str, Component[Any]]) -> None:
    """Raise `RecipeError` for all that is cheap to see, such as folders that are not there."""
    problems = []
    for where, component in named.items():
        options = component.options
        try:
            for field in options.weights if isinstance(options, ModelOptions) else ():
                if weights := getattr(options, field):
                    check_weights(options.model_copy(update={"model": weights}))
            component.check()
        except ReasonpixError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise RecipeError(problems)


def _try(metrics: Metrics) -> None:
    """Load what will measure, once before hours of editing. Raises `WeightsError`."""
    try:
        with closing(metrics):
            metrics.load()
    except ReasonpixError:
        raise
    except Exception as error:  # libraries raise nearly anything for models of another kind
        if is_out_of_memory(error):
            raise
        raise WeightsError(
            f"metrics or grounder: a model cannot be loaded, it may be of another kind: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_captions(benchmark: Benchmark, methods: dict[str, Method[Any]]) -> None:
    """Raise `RecipeError` for a method that starts from captions, where there are none."""
    problems = [
        f"methods.{name}: {method.name!r} needs the {field} of every case, and {case.row} has none"
        for name, method in methods.items()
        for field in sorted(method.requires)
        if (case := next((it for it in benchmark.cases if not getattr(it, field)), None))
    ]
    if problems:
        raise RecipeError(problems)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """No other process works in the folder meanwhile."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror}; name another folder") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"another process is evaluating in {out}; wait for it") from error
        yield
    finally:
        os.close(lock)


def _prepare(
    recipe: EvaluationRecipe, benchmark: Benchmark, out: Path, report: Report
) -> EvaluationFolder:
    """Write down what is evaluated. Raises `RunError` for the folder of something else."""
    folder = EvaluationFolder(out)
    if any(out.iterdir()) and not (out / "evaluation.json").is_file():
        raise RunError(f"{out} holds something else; name a new folder")
    entries = {case.id: _entry(case) for case in benchmark.cases}
    known = folder.entries if (out / "cases.jsonl").is_file() else {}
    common = known.keys() & entries
    if (known and not common) or any(_says(known[it]) != _says(entries[it]) for it in common):
        raise RunError(f"{out} holds the evaluation of another benchmark; name a new folder")
    index = {
        "benchmark": benchmark.name,
        "kinds": benchmark.kinds,
        "folders": {TRUTH: TRUTH, COPY: COPY}
        | {name: _folder(use, recipe.seed) for name, use in recipe.methods.items()},
    }
    write_atomically(out / "evaluation.json", json.dumps(index, indent=1).encode())
    write_atomically(out / "recipe.yaml", recipe.as_yaml().encode())
    for done, case in enumerate(benchmark.cases):
        report("read", done, len(benchmark.cases))
        _keep(folder.input(case.id), case.read_input(), case)
        if case.read_truth:
            _keep(folder.root / "truth" / f"{case.id}.png", case.read_truth(), case)
    report("read", len(benchmark.cases), len(benchmark.cases))
    write_atomically(out / "cases.jsonl", lines(entry.model_dump() for entry in entries.values()))
    return EvaluationFolder(out)


def _entry(case: Case) -> CaseRecord:
    return CaseRecord(
        id=case.id,
        row=case.row,
        instructions=dict(case.instructions),
        caption=case.caption,
        edited_caption=case.edited_caption,
        groups=dict(case.groups),
        target=case.target,
        box=case.box.xyxy if case.box else None,
        mask=hashlib.sha256(case.read_mask().tobytes()).hexdigest() if case.read_mask else None,
    )


def _says(entry: CaseRecord) -> dict[str, Any]:
    """What it says, wherever the benchmark lies now."""
    return entry.model_dump(exclude={"row"})


def _keep(path: Path, image: Image.Image, case: Case) -> None:
    """Edits of another image under the same name would be taken for those of this one."""
    try:
        kept = decode(path.read_bytes())
    except (FileNotFoundError, UndecodableImage):  # or one that was damaged
        write_atomically(path, encode_png(image))
        return
    if (kept.size, kept.tobytes()) != (image.size, image.tobytes()):
        raise RunError(
            f"{case.row}: its image is not the one that {path} was made from; name a new folder"
        )


def _folder(use: ComponentSpec, seed: int) -> str:
    """Of a method's edits, whatever it is called: another model, option or seed has another."""
    identity = registry.fingerprint_facts(use.slot, use.name, use.options)
    return f"{use.name}-{fingerprint([VERSION, identity, seed])}"


def _edit(
    folder: EvaluationFolder,
    benchmark: Benchmark,
    name: str,
    method: Method[Any],
    seed: int,
    report: Report,
    retry_failed: bool,
) -> None:
    """Make a method's edits that are missing. Those of one case are asked for together."""
    every = [_Job(case, kind) for case in benchmark.cases for kind in case.instructions]
    failed = {kind: folder.failures(name, kind) for kind in benchmark.kinds if retry_failed}
    jobs = [
        job
        for job in every
        if folder.edit(name, job.kind, job.case.id) is None
        or job.case.id in failed.get(job.kind, ())
    ]
    if not jobs:
        return
    done = len(every) - len(jobs)
    report(name, done, len(every))
    # Twice, so that the kinds of a case lie side by side and a batch can still be filled.
    options = method.options
    at_once = 2 * options.batch_size if isinstance(options, ModelOptions) else 16
    with closing(method):
        method.load()
        for first in range(0, len(jobs), at_once):
            some = jobs[first : first + at_once]
            requests = [_request(folder, job, seed) for job in some]
            sizes = [request.image.size for request in requests]
            edits = _applied(method, requests)
            for job, size, edited in zip(some, sizes, edits, strict=True):
                if not isinstance(edited, Problem) and (edited.mode, edited.size) != ("RGB", size):
                    raise PluginError(
                        f"method {method.name!r}: {job.case.row}: the edit is {edited.mode} of "
                        f"{edited.width}x{edited.height} pixels; RGB of {size[0]}x{size[1]}, the "
                        "input's size, is wanted"
                    )
                folder.keep(name, job.kind, job.case.id, edited)
            done += len(some)
            report(name, done, len(every))


def _applied(method: Method[Any], requests: Sequence[MethodRequest]) -> list[Image.Image | Problem]:
    """The edits; where a batch breaks each is tried alone, so that a bad one costs one."""
    try:
        edits = method.apply([replace(it, image=it.image.copy()) for it in requests])
    except Exception as error:
        # Our own errors are of the method as a whole, and so is memory that runs out.
        if isinstance(error, ReasonpixError) or is_out_of_memory(error):
            raise
        if len(requests) > 1:
            return [edit for request in requests for edit in _applied(method, [request])]
        return [Problem(status="failed", reason=f"{type(error).__name__}: {error}")]
    if len(edits) != len(requests):
        raise PluginError(
            f"method {method.name!r} gave {len(edits)} results for {len(requests)} requests"
        )
    return edits


def _request(folder: EvaluationFolder, job: _Job, seed: int) -> MethodRequest:
    case = job.case
    return MethodRequest(
        image=_opened(folder.input(case.id)),
        instruction=case.instructions[job.kind],
        # The same noise for all methods and kinds of instruction: differences are theirs.
        seed=seed_of(seed, "evaluate", case.id),
        caption=case.caption,
        edited_caption=case.edited_caption if job.kind == DIRECT else "",
    )


def _opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")


def _measure(
    folder: EvaluationFolder,
    benchmark: Benchmark,
    metrics: Metrics,
    report: Report,
    retry_failed: bool,
) -> None:
    """Score what is not scored yet, or was by other metrics or on other edits."""
    identity = metrics.fingerprint_facts()

    def is_stale(method: str, kind: str, cases: Sequence[Case]) -> bool:
        again = retry_failed and bool(folder.failures(method, kind))
        return again or folder.measured(method, kind) != (identity, {it.id for it in cases})

    stale = [
        (method, kind, cases)
        for method in folder.methods
        for kind in folder.kinds
        if (cases := _measurable(folder, benchmark, method, kind)) and is_stale(method, kind, cases)
    ]
    if not stale:
        return
    total = sum(len(cases) for *_, cases in stale)
    before = 0
    report("measure", 0, total)
    with closing(metrics):
        metrics.load()
        for method, kind, cases in stale:

            def measured(done: int, _: int, before: int = before) -> None:
                report("measure", before + done, total)

            readers = [_reader(folder, method, kind, case) for case in cases]
            found = metrics.measure(cases, readers, measured)
            before += len(cases)
            folder.keep_scores(method, kind, identity, [case.id for case in cases], found)


def _measurable(
    folder: EvaluationFolder, benchmark: Benchmark, method: str, kind: str
) -> Sequence[Case]:
    """The cases of which there is an edit."""
    return [
        case
        for case in benchmark.cases
        if kind in case.instructions and isinstance(folder.edit(method, kind, case.id), Path)
    ]


def _reader(
    folder: EvaluationFolder, method: str, kind: str, case: Case
) -> Callable[[], Image.Image]:
    path = folder.edit(method, kind, case.id)
    assert isinstance(path, Path)
    return lambda: _opened(path)
