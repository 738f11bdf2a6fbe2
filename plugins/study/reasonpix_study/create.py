"""Making a study of an evaluation's edits."""

from __future__ import annotations

import hashlib
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

CANDIDATES = (2, 9)
"""How many methods can be compared: the keys 1 to 9 choose."""


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
    """Make a study of an evaluation's edits in a new folder.

    `methods` are by default the evaluation's four, `kinds` all it has; `samples` cases are drawn
    of those that every method has edited, and each is to be judged by every kind. `workers` is the
    number of invitations, by default enough for every sample to be judged once; with more of them
    samples are judged by several workers. Same evaluation, same options: the same study, but for
    the codes. Raises `ReasonpixError`, for what cannot be had.
    """
    design = Design(
        benchmark=evaluation.benchmark,
        kinds=_named("kind", kinds or evaluation.kinds, evaluation.kinds),
        methods=_methods(evaluation, methods),
        cases=samples,
        per_worker=per_worker,
        seed=seed,
    )
    if not 1 <= per_worker <= samples:
        raise ReasonpixError(
            f"{per_worker} samples for each worker: it takes 1 to {samples}, as many as there are "
            "samples of a kind, because nobody judges one twice"
        )
    cases = _drawn(evaluation, design)
    out = Path(os.path.abspath(out))  # "." has no name of its own
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StudyError(f"{out} is not empty; name a new folder")
    try:
        if out.exists():
            out.rmdir()
        with atomic_dir(out) as draft:
            (draft / "images").mkdir()
            found = _samples(evaluation, design, cases, draft / "images")
            Study.write(draft, design, found, design.sheets if workers is None else workers)
    except OSError as error:
        raise StudyError(f"{out} cannot be written: {error.strerror or error}") from error
    return Study(out)


def _methods(evaluation: EvaluationFolder, methods: Sequence[str]) -> tuple[str, ...]:
    if not methods:
        methods = [it for it in evaluation.methods if it not in (TRUTH, COPY)]
        if len(methods) != 4:
            raise ReasonpixError(
                "name the methods to compare by --method, the paper compares four; "
                f"there are {', '.join(evaluation.methods)}"
            )
    fewest, most = CANDIDATES
    if not fewest <= len(methods) <= most:
        raise ReasonpixError(f"name {fewest} to {most} methods to compare, not {len(methods)}")
    return _named("method", methods, evaluation.methods)


def _named(what: str, names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The names, each of them known and given once."""
    if unknown := [name for name in names if name not in known]:
        raise ReasonpixError(f"no {what} {unknown[0]!r} in it; there are {', '.join(known)}")
    if len(set(names)) < len(names):
        raise ReasonpixError(f"a {what} is named twice: {', '.join(names)}")
    return tuple(names)


def _drawn(evaluation: EvaluationFolder, design: Design) -> list[str]:
    """Cases that every method has edited by every kind of instruction, in a random order."""
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
            f"{design.cases} samples cannot be drawn: every method has edited "
            f"{len(complete)} of {len(evaluation.records)} cases of {evaluation.root}"
        )
    return random.Random(f"{design.seed}/cases").sample(complete, design.cases)


def _samples(
    evaluation: EvaluationFolder, design: Design, cases: Sequence[str], images: Path
) -> Iterator[StudyItem]:
    """The samples of the study. Their images are written."""
    for place, case in enumerate(cases):
        before = decode(evaluation.input(case).read_bytes())
        stored = _store(images, before)
        for kind in design.kinds:
            instruction = evaluation.records[case].instructions[kind]
            candidates = {}
            for method in design.methods:
                path = evaluation.edit(method, kind, case)
                assert isinstance(path, Path)  # or the case would not have been drawn
                # A size of its own would give a method away.
                edited = resized(decode(path.read_bytes()), before.size)
                candidates[method] = _store(images, edited)
            yield StudyItem(place, kind, case, instruction, before.size, stored, candidates)


def _store(images: Path, image: Image.Image) -> str:
    """Write an image, if it is not there, and return its name. Only its pixels are kept."""
    data = encode_png(image)
    name = f"{hashlib.sha256(data).hexdigest()}.png"
    if not (images / name).exists():
        (images / name).write_bytes(data)
    return name
