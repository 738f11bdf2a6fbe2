"""Create a study from an evaluation's edits."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from reasonpix.core import atomic_dir, decode, encode_png, resized
from reasonpix.evaluation import COPY, TRUTH, EvaluationFolder
from reasonpix.plugin import ReasonpixError
from reasonpix_study.design import Design
from reasonpix_study.store import Study, StudyError, StudyItem

_LOG = logging.getLogger(__name__)

CANDIDATES = (2, 9)
"""Fewest and most methods: workers choose with the keys 1 to 9."""


def create_study(
    evaluation: EvaluationFolder,
    out: Path,
    *,
    methods: Sequence[str] = (),
    kinds: Sequence[str] = (),
    samples: int = 100,
    per_worker: int = 20,
    workers: int | None = None,
    seed: int = 0,
) -> Study:
    """Create a study of an evaluation's edits in a new or empty folder.

    `methods` default to those of the evaluation, if there are four; `kinds` to all kinds. `samples`
    cases are drawn from those that every method edited, and each is judged with every kind of
    instruction. `workers` is the number of invitations: by default as many as it takes to judge
    every sample once; with more, samples are judged by several workers. The same evaluation and
    options give the same study, except for the codes. Raises `ReasonpixError`.
    """
    design = Design(
        benchmark=evaluation.benchmark,
        kinds=_check_names("kind", kinds or evaluation.kinds, evaluation.kinds),
        methods=_methods(evaluation, methods),
        cases=samples,
        per_worker=per_worker,
        seed=seed,
    )
    if not 1 <= per_worker <= samples:
        raise ReasonpixError(
            f"{per_worker} samples for each worker: choose 1 to {samples}, the number of samples "
            "of a kind, because nobody judges a case twice"
        )
    cases = _draw_cases(evaluation, design)
    out = Path(os.path.abspath(out))  # "." has no name of its own
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StudyError(f"{out} is not empty; name a new folder")
    try:
        if out.exists():
            out.rmdir()
        with atomic_dir(out) as draft:
            (draft / "images").mkdir()
            items = _items(evaluation, design, cases, draft / "images")
            Study.write(draft, design, items, design.sheets if workers is None else workers)
    except OSError as error:
        raise StudyError(f"{out} cannot be written: {error.strerror or error}") from error
    return Study(out)


def _methods(evaluation: EvaluationFolder, methods: Sequence[str]) -> tuple[str, ...]:
    if not methods:
        methods = [it for it in evaluation.methods if it not in (TRUTH, COPY)]
        if len(methods) != 4:
            raise ReasonpixError(
                "name the methods to compare with --method (the paper compares four); "
                f"there are {', '.join(evaluation.methods)}"
            )
    fewest, most = CANDIDATES
    if not fewest <= len(methods) <= most:
        raise ReasonpixError(f"name {fewest} to {most} methods to compare, not {len(methods)}")
    return _check_names("method", methods, evaluation.methods)


def _check_names(what: str, names: Sequence[str], available: Sequence[str]) -> tuple[str, ...]:
    """The names. Raises `ReasonpixError` for an unknown or repeated one."""
    if unknown := [name for name in names if name not in available]:
        choices = ", ".join(available)
        raise ReasonpixError(f"the evaluation has no {what} {unknown[0]!r}; there are {choices}")
    if len(set(names)) < len(names):
        raise ReasonpixError(f"a {what} is named twice: {', '.join(names)}")
    return tuple(names)


def _draw_cases(evaluation: EvaluationFolder, design: Design) -> list[str]:
    """Cases that every method edited with every kind of instruction, in random order."""
    complete = [
        case
        for case, entry in evaluation.records.items()
        if set(design.kinds) <= entry.instructions.keys()
        and all(
            isinstance(evaluation.edit(method, kind, case), Path)
            for method in design.methods
            for kind in design.kinds
        )
    ]
    if not 1 <= design.cases <= len(complete):
        raise ReasonpixError(
            f"{design.cases} samples cannot be drawn: all methods edited only "
            f"{len(complete)} of {len(evaluation.records)} cases of {evaluation.root}"
        )
    if incomplete := len(evaluation.records) - len(complete):
        _LOG.warning(
            "%d of %d cases cannot be drawn, because a method has no edit of them",
            incomplete,
            len(evaluation.records),
        )
    return random.Random(f"{design.seed}/cases").sample(complete, design.cases)


def _items(
    evaluation: EvaluationFolder, design: Design, cases: Sequence[str], images: Path
) -> Iterator[StudyItem]:
    """The study's samples; writes their images."""
    for place, case in enumerate(cases):
        before = decode(evaluation.input(case).read_bytes())
        source = _store(images, before)
        for kind in design.kinds:
            instruction = evaluation.records[case].instructions[kind]
            candidates = {}
            for method in design.methods:
                path = evaluation.edit(method, kind, case)
                assert isinstance(path, Path)  # such cases were drawn
                # Another size would reveal the method.
                edited = resized(decode(path.read_bytes()), before.size)
                candidates[method] = _store(images, edited)
            yield StudyItem(place, kind, case, instruction, before.size, source, candidates)


def _store(images: Path, image: Image.Image) -> str:
    """Write an image under a name made from its pixels, and return the name."""
    data = encode_png(image)
    name = f"{hashlib.sha256(data).hexdigest()}.png"
    if not (images / name).exists():
        (images / name).write_bytes(data)
    return name
