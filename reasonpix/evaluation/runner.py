"""Run an evaluation: every method edits every case by each kind of instruction, and is measured.

Edits are stored one by one, scores by method and kind. So a run that was stopped continues where it
stopped, and a method that is added later costs only its own edits.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from reasonpix.core.atomic import Locked, lock, write_atomically
from reasonpix.core.hashing import fingerprint, seed_of
from reasonpix.core.images import UndecodableImage, decode, encode_png
from reasonpix.core.memory import is_out_of_memory
from reasonpix.errors import PluginError, ReasonpixError, RecipeError, RunError, WeightsError
from reasonpix.evaluation.benchmark import read_benchmark
from reasonpix.evaluation.cases import DIRECT, Benchmark, Case
from reasonpix.evaluation.metrics import Metrics, is_measurable
from reasonpix.evaluation.recipe import EvaluationRecipe, load_evaluation_recipe
from reasonpix.evaluation.results import COPY, TRUTH, CaseRecord, EvaluationFolder, json_lines
from reasonpix.evaluation.training_overlap import TrainingOverlap, method_overlaps
from reasonpix.plugin import registry
from reasonpix.plugin.components import Component, Grounder, Method, ModelOptions
from reasonpix.plugin.edits import MethodRequest
from reasonpix.plugin.intended_images import domain_of_dataset, domain_warnings
from reasonpix.plugin.spec import ComponentSpec
from reasonpix.plugin.types import Problem
from reasonpix.plugin.weights import check_weights

_LOG = logging.getLogger(__name__)

PhaseProgress = Callable[[str, int, int], None]
"""Called with the name of a phase, how many items are done, and how many there are."""

VERSION = "1"
"""Increase it when methods get other requests: edits made before become stale."""


class _EditJob(NamedTuple):
    """An edit to make."""

    case: Case
    kind: str


def evaluate(
    recipe: EvaluationRecipe | str | Path,
    out: str | Path,
    progress: PhaseProgress = lambda phase, done, total: None,
    *,
    retry_failed: bool = False,
) -> EvaluationFolder:
    """Make the edits and scores that `out` lacks. Relative paths start at the working directory.

    `recipe` is a loaded recipe, a file, or the name of a shipped recipe. Everything that needs no
    model is checked first. A case that a method cannot edit is stored with the reason;
    `retry_failed` tries those again. Raises `ReasonpixError`.
    """
    if not isinstance(recipe, EvaluationRecipe):
        recipe = load_evaluation_recipe(recipe)
    out = Path(out)
    methods = {name: _build_method(spec) for name, spec in recipe.methods.items()}
    grounder = recipe.grounder.build() if recipe.grounder else None
    assert grounder is None or isinstance(grounder, Grounder)
    metrics = Metrics(recipe.metrics, grounder)
    components: dict[str, Component[Any]] = {
        f"methods.{name}": method for name, method in methods.items()
    } | ({"grounder": grounder} if grounder else {})
    _check_components(components)
    benchmark = read_benchmark(recipe.benchmark, Path())
    measurable = any(map(is_measurable, benchmark.cases))
    if measurable:
        metrics.check()
    made_for = [(name, it.intended_images) for name, it in components.items()]
    made_for += metrics.made_for() if measurable else []
    domain = domain_of_dataset(recipe.benchmark.path) if recipe.benchmark.path else ""
    for line in domain_warnings(made_for, domain, "the benchmark's images"):
        _LOG.warning(line)
    _check_captions(benchmark, methods)
    overlaps = method_overlaps(methods, benchmark.cases)
    for name, overlap in overlaps.items():
        if overlap and not overlap.is_clean:
            _LOG.warning(overlap.sentence(name))
    with _locked(out):
        folder = _prepare(recipe, benchmark, metrics.notes(benchmark), overlaps, out, progress)
        run = _Run(benchmark, folder, progress, retry_failed)
        if measurable and not run.folder.measured_with:
            _check_loading(metrics)
        for name, method in methods.items():
            run.edit(name, method, recipe.seed)
        if measurable:
            run.measure(metrics)
    return run.folder


# -- Before the first edit ------------------------------------------------------------------------


def _build_method(spec: ComponentSpec) -> Method[Any]:
    component = spec.build()
    assert isinstance(component, Method)
    return component


def _check_components(components: Mapping[str, Component[Any]]) -> None:
    """Raise `RecipeError` for every problem that is cheap to detect, such as missing folders."""
    problems = []
    for path, component in components.items():
        options = component.options
        try:
            component.check()
            for field in options.weights if isinstance(options, ModelOptions) else ():
                if weights := getattr(options, field):
                    check_weights(options.model_copy(update={"model": weights}))
        except ReasonpixError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise RecipeError(problems)


def _check_captions(benchmark: Benchmark, methods: dict[str, Method[Any]]) -> None:
    """Raise `RecipeError` for a method that needs captions, if a case has none."""
    problems = [
        f"methods.{name}: {method.name!r} needs the {field} of every case, but {case.row} has none"
        for name, method in methods.items()
        for field in sorted(method.requires)
        if (case := next((it for it in benchmark.cases if not getattr(it, field)), None))
    ]
    if problems:
        raise RecipeError(problems)


def _check_loading(metrics: Metrics) -> None:
    """Load the metrics' models once, before hours of editing. Raises `WeightsError`."""
    try:
        with closing(metrics):
            metrics.load()
    except ReasonpixError:
        raise
    except Exception as error:  # libraries raise nearly anything for models of another kind
        if is_out_of_memory(error):
            raise
        raise WeightsError(
            f"metrics or grounder: a model cannot be loaded; it may be of another kind: "
            f"{type(error).__name__}: {error}"
        ) from error


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other processes out of the folder."""
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(out))
        except Locked as error:
            raise RunError(f"another process is evaluating in {out}; wait for it") from error
        except OSError as error:
            raise RunError(
                f"{out} cannot be written: {error.strerror}; name another folder"
            ) from error
        yield


def _prepare(
    recipe: EvaluationRecipe,
    benchmark: Benchmark,
    notes: Mapping[str, Sequence[str]],
    overlaps: Mapping[str, TrainingOverlap | None],
    out: Path,
    progress: PhaseProgress,
) -> EvaluationFolder:
    """Write recipe, cases and images. Raises `RunError` if the folder holds something else."""
    folder = EvaluationFolder(out)
    if any(out.iterdir()) and not (out / "evaluation.json").is_file():
        raise RunError(f"{out} holds something else; name a new folder")
    records = {case.id: _record_of(case) for case in benchmark.cases}
    stored = folder.records if (out / "cases.jsonl").is_file() else {}
    common = stored.keys() & records
    if (stored and not common) or any(
        # A benchmark may have moved: only `row` tells where it is.
        stored[case].model_copy(update={"row": ""}) != records[case].model_copy(update={"row": ""})
        for case in common
    ):
        raise RunError(f"{out} holds the evaluation of another benchmark; name a new folder")
    index = {
        "benchmark": benchmark.name,
        "notes": notes,
        "training_overlaps": {
            name: overlap and overlap.model_dump() for name, overlap in overlaps.items()
        },
        "kinds": benchmark.kinds,
        "folders": {TRUTH: TRUTH, COPY: COPY}
        | {name: _edits_folder(spec, recipe.seed) for name, spec in recipe.methods.items()},
    }
    write_atomically(out / "evaluation.json", json.dumps(index, indent=1).encode())
    write_atomically(out / "recipe.yaml", recipe.as_yaml().encode())
    for done, case in enumerate(benchmark.cases):
        progress("read", done, len(benchmark.cases))
        _store_image(folder.input(case.id), case.read_input(), case)
        if case.read_truth:
            _store_image(folder.root / "truth" / f"{case.id}.png", case.read_truth(), case)
    progress("read", len(benchmark.cases), len(benchmark.cases))
    rows = (record.model_dump() for record in records.values())
    write_atomically(out / "cases.jsonl", json_lines(rows))
    return EvaluationFolder(out)


def _record_of(case: Case) -> CaseRecord:
    return CaseRecord(
        id=case.id,
        row=case.row,
        instructions=dict(case.instructions),
        caption=case.caption,
        edited_caption=case.edited_caption,
        local_caption=case.local_caption,
        groups=dict(case.groups),
        target=case.target,
        box=case.box.xyxy if case.box else None,
        mask=hashlib.sha256(case.read_mask().tobytes()).hexdigest() if case.read_mask else None,
    )


def _store_image(path: Path, image: Image.Image, case: Case) -> None:
    """Write an image. Raises `RunError` if another one is stored: its edits would be reused."""
    try:
        stored = decode(path.read_bytes())
    except (FileNotFoundError, UndecodableImage):  # or damaged
        write_atomically(path, encode_png(image))
        return
    if (stored.size, stored.tobytes()) != (image.size, image.tobytes()):
        raise RunError(
            f"{case.row}: its image differs from the one in {path}, which was edited; "
            "name a new folder"
        )


def _edits_folder(spec: ComponentSpec, seed: int) -> str:
    """Of a method's edits. It depends on the model, options and seed, not on the recipe's name."""
    facts = registry.fingerprint_facts(spec.slot, spec.name, spec.options)
    return f"{spec.name}-{fingerprint([VERSION, facts, seed])}"


# -- Edits and scores -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A prepared folder, and what is computed into it."""

    benchmark: Benchmark
    folder: EvaluationFolder
    progress: PhaseProgress
    retry_failed: bool

    def edit(self, name: str, method: Method[Any], seed: int) -> None:
        """Make a method's missing edits. Those of one case are adjacent in a batch."""
        folder = self.folder
        jobs = [_EditJob(case, kind) for case in self.benchmark.cases for kind in case.instructions]
        failed = {kind: folder.failures(name, kind) for kind in folder.kinds if self.retry_failed}
        todo = [
            job
            for job in jobs
            if folder.edit(name, job.kind, job.case.id) is None
            or job.case.id in failed.get(job.kind, ())
        ]
        if not todo:
            return
        done = len(jobs) - len(todo)
        self.progress(name, done, len(jobs))
        # Twice the batch size, so that the two kinds of a case fit and a batch is still full.
        options = method.options
        step = 2 * options.batch_size if isinstance(options, ModelOptions) else 16
        with closing(method):
            method.load()
            for first in range(0, len(todo), step):
                batch = todo[first : first + step]
                requests = [self._request(job, seed) for job in batch]
                sizes = [request.image.size for request in requests]
                edits = _apply(method, requests)
                for job, size, edit in zip(batch, sizes, edits, strict=True):
                    _check_edit(method, job.case, edit, size)
                    folder.write_edit(name, job.kind, job.case.id, edit)
                done += len(batch)
                self.progress(name, done, len(jobs))

    def _request(self, job: _EditJob, seed: int) -> MethodRequest:
        case = job.case
        return MethodRequest(
            image=_open_rgb(self.folder.input(case.id)),
            instruction=case.instructions[job.kind],
            # All methods and kinds of instruction get the same noise, so that differences are
            # theirs.
            seed=seed_of(seed, "evaluate", case.id),
            caption=case.caption,
            edited_caption=case.edited_caption if job.kind == DIRECT else "",
        )

    def measure(self, metrics: Metrics) -> None:
        """Score edits that have no scores, or scores of other metrics or other edits."""
        facts = metrics.fingerprint_facts()
        stale = [
            (method, kind, cases)
            for method in self.folder.methods
            for kind in self.folder.kinds
            if (cases := self._edited_cases(method, kind))
            and self._is_stale(method, kind, cases, facts)
        ]
        if not stale:
            return
        total = sum(len(cases) for *_, cases in stale)
        before = 0
        self.progress("measure", 0, total)
        with closing(metrics):
            metrics.load()
            for method, kind, cases in stale:

                def report(done: int, _: int, before: int = before) -> None:
                    self.progress("measure", before + done, total)

                readers = [self._reader(method, kind, case) for case in cases]
                scores = metrics.measure(cases, readers, report)
                before += len(cases)
                ids = [case.id for case in cases]
                self.folder.write_scores(method, kind, facts, ids, scores)

    def _edited_cases(self, method: str, kind: str) -> Sequence[Case]:
        return [
            case
            for case in self.benchmark.cases
            if kind in case.instructions
            and isinstance(self.folder.edit(method, kind, case.id), Path)
        ]

    def _is_stale(
        self, method: str, kind: str, cases: Sequence[Case], facts: Mapping[str, Any]
    ) -> bool:
        measured_with, rows = self.folder.score_rows(method, kind)
        if measured_with != facts or set(rows) != {case.id for case in cases}:
            return True
        return self.retry_failed and bool(self.folder.failures(method, kind))

    def _reader(self, method: str, kind: str, case: Case) -> Callable[[], Image.Image]:
        path = self.folder.edit(method, kind, case.id)
        assert isinstance(path, Path)
        return lambda: _open_rgb(path)


def _apply(method: Method[Any], requests: Sequence[MethodRequest]) -> list[Image.Image | Problem]:
    """The edits. If a batch raises, each request is tried alone, so that only bad ones fail."""
    try:
        edits = method.apply([replace(it, image=it.image.copy()) for it in requests])
    except Exception as error:
        # These concern the method as a whole.
        if isinstance(error, ReasonpixError) or is_out_of_memory(error):
            raise
        if len(requests) > 1:
            return [edit for request in requests for edit in _apply(method, [request])]
        return [Problem(status="failed", reason=f"{type(error).__name__}: {error}")]
    if len(edits) != len(requests):
        raise PluginError(
            f"method {method.name!r} returned {len(edits)} results for {len(requests)} requests"
        )
    return edits


def _check_edit(
    method: Method[Any], case: Case, edit: Image.Image | Problem, size: tuple[int, int]
) -> None:
    if not isinstance(edit, Problem) and (edit.mode, edit.size) != ("RGB", size):
        raise PluginError(
            f"method {method.name!r}: {case.row}: the edit is {edit.mode}, {edit.width}x"
            f"{edit.height} pixels; it must be RGB and of the input's size, {size[0]}x{size[1]}"
        )


def _open_rgb(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
