"""Build a benchmark from a run over test images, as for Table 3 of the paper.

Each row has an input image and its caption, the ground-truth edit and its caption, and a direct and
a reasoning instruction (section 3.2 of the paper). Images and reasoning instructions of training
datasets are excluded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reasonpix.core.atomic import output_dir
from reasonpix.core.hashing import seed_of
from reasonpix.core.images import UndecodableImage, decode, pixel_digest
from reasonpix.core.parallel import THREADS, prefetch
from reasonpix.core.text import is_text, words_of
from reasonpix.datasets.card import Form, render_card
from reasonpix.datasets.columns import Row, RunColumns, columns_of, schema_of
from reasonpix.datasets.formats import open_reader
from reasonpix.datasets.publishing import accepted
from reasonpix.datasets.reader import PairReader
from reasonpix.datasets.writers import (
    FILE,
    GROUP,
    Written,
    derived_caption,
    image_bytes,
    parquet_row,
    with_article,
    write_rows,
)
from reasonpix.errors import RunError, SourceError
from reasonpix.generation.outcomes import Outcome
from reasonpix.generation.run_folder import RunFolder, refuse_inside_run

TEMPLATES = (
    "Turn the {selected} to {target}.",
    "Turn the {selected} into {target}.",
    "Replace the {selected} with {target}.",
    "Change the {selected} to {target}.",
    "Swap the {selected} for {target}.",
    "Make the {selected} {target}.",
    "Put {target} in the place of the {selected}.",
    "Instead of the {selected}, show {target}.",
)
"""Direct instructions; the first is the paper's "Turn A to B"."""

_FORM = Form(
    what="test cases",
    title="A benchmark for reasoning edits, made with reasonpix",
    columns="`input_image` and `caption`; the ground truth `edited_image` and `edited_caption` "
    "(the input's caption with the target in place of the selected category); "
    "`direct_instruction`, from a template drawn by the record; `edit_prompt` is the reasoning "
    "instruction. `selected` became `target` in `box` (XYXY in pixels of the input image). Images "
    "are lossless. `score_<filter>_<score>` is what a filter measured.",
    data="data/test-*.parquet",
    split="test",
)


@dataclass(frozen=True)
class BenchmarkSummary:
    """A benchmark that was built."""

    rows: int
    left_out: Mapping[str, int]
    """By what a sample shares with the training datasets, the number of such samples."""


@dataclass
class _TrainingData:
    """The contents of the training datasets: digests of images, and words of instructions."""

    images: set[bytes]
    instructions: set[tuple[str, ...]]

    def overlap(self, outcome: Outcome) -> str | None:
        """What a sample shares with them, if anything."""
        sample = outcome.sample
        if {pixel_digest(sample.image()), pixel_digest(sample.edited_image())} & self.images:
            return "an image of the training data"
        if _normalized(sample.instruction) in self.instructions:
            return "an instruction of the training data"
        return None


def build_benchmark(
    run: RunFolder,
    out: Path,
    *,
    count: int | None = None,
    disjoint_from: Sequence[str] = (),
    seed: int = 0,
) -> BenchmarkSummary:
    """Write accepted samples of `run` to the new folder `out`, as split test.

    `count` samples are drawn by `seed` from those that share no image (compared by pixels) and no
    reasoning instruction (compared by words) with the training splits of `disjoint_from`. The same
    run and seed give the same bytes. Raises `RunError` if there are too few samples, and
    `SourceError` if a dataset cannot be read.
    """
    refuse_inside_run(out, "publish")
    with output_dir(out, "publish") as draft:
        training = _TrainingData(set(), set())
        for dataset in disjoint_from:
            _add(training, dataset)
        reasons = dict(prefetch(lambda it: _overlap(training, it), accepted(run), THREADS))
        clean = [record for record, why in reasons.items() if why is None]
        left_out = Counter(why for why in reasons.values() if why)
        wanted = len(clean) if count is None else count
        if not clean or wanted > len(clean):
            raise RunError(
                f"{run} has samples for {len(clean)} rows, but {max(wanted, 1)} are wanted; "
                f"{left_out.total()} more are in the training data. Continue the run with more "
                f"images (`reasonpix generate RECIPE --out {run} --limit N`), or lower --count"
            )
        clean.sort(key=lambda record: seed_of(seed, "benchmark", record))
        chosen = set(clean[:wanted])
        picked = (it for it in accepted(run) if it.sample.record_id in chosen)
        columns = columns_of(run)
        rows = prefetch(lambda outcome: _row(columns, outcome, seed), picked, THREADS)
        written = write_rows(
            rows, schema_of(columns.features), draft, FILE, GROUP, image_bytes, split=_FORM.split
        )
        notes = _notes(disjoint_from, left_out, len(clean) - written, seed)
        text = render_card(run, _FORM, Written(written, columns.features, notes))
        (draft / "README.md").write_text(text, encoding="utf-8")
    return BenchmarkSummary(written, left_out)


def _overlap(training: _TrainingData, outcome: Outcome) -> tuple[str, str | None]:
    try:
        return outcome.sample.record_id, training.overlap(outcome)
    except (UndecodableImage, OSError) as error:
        raise RunError(f"{outcome.sample.item.native_id}: {error}") from error


def _row(columns: RunColumns, outcome: Outcome, seed: int) -> Row:
    sample, row = outcome.sample, parquet_row(columns, outcome)
    if sample.plan:
        template = TEMPLATES[seed_of(seed, "direct", sample.record_id) % len(TEMPLATES)]
        plan = sample.plan
        row["edited_caption"] = derived_caption(sample)
        row["direct_instruction"] = template.format(
            selected=plan.selected, target=with_article("a", plan.target)
        )
    return row


def _add(training: _TrainingData, dataset: str) -> None:
    """Add the training split of a dataset."""
    rows = open_reader(dataset, Path(), "train", None)
    columns = [it for it in (rows.instruction, "direct_instruction") if it in rows.columns]
    for number, texts in enumerate(rows.texts(columns)):
        if isinstance(texts, OSError):
            raise SourceError(f"{rows.name(number)}: {texts}")
        training.instructions |= {_normalized(str(it)) for it in texts.values() if is_text(it)}
    for hashes in prefetch(lambda number: _hashes(rows, number), iter(range(len(rows))), THREADS):
        training.images.update(hashes)


def _hashes(rows: PairReader, number: int) -> list[bytes]:
    try:
        return [pixel_digest(decode(data)) for data in rows.images(number)]
    except (OSError, UndecodableImage) as error:
        raise SourceError(f"{rows.name(number)}: {error}; it cannot be compared") from error


def _normalized(text: str) -> tuple[str, ...]:
    return tuple(words_of(text))


def _notes(
    disjoint_from: Sequence[str], left_out: Mapping[str, int], unused: int, seed: int
) -> tuple[str, ...]:
    """For the card: what the benchmark is disjoint from, and which samples were not used."""
    if not disjoint_from:
        checked = "**Not checked against any training data.**"
    else:
        names = ", ".join(f"`{Path(name).name}`" for name in disjoint_from)
        checked = (
            f"No image (by its pixels) and no reasoning instruction (by its words) is in {names}."
        )
    left = [
        f"{rows} accepted samples share {what} and are left out." for what, rows in left_out.items()
    ]
    drawn = f"Rows and templates are drawn with seed {seed}; {unused} others were available."
    return (" ".join([checked, *left, drawn]),)
