"""Build a benchmark from a run over test images, as for Table 3 of the paper.

Each row has an input image and its caption, the ground-truth edit and its caption, and a direct and
a reasoning instruction (section 3.2 of the paper). Images and reasoning instructions of training
datasets are excluded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reasonpix.core.atomic import output_dir
from reasonpix.core.english.captions import target_phrase
from reasonpix.core.hashing import seed_of
from reasonpix.core.images import UndecodableImage
from reasonpix.core.parallel import THREADS, prefetch
from reasonpix.core.text import is_text
from reasonpix.datasets.card import Form, render_card
from reasonpix.datasets.columns import Row, RunColumns, columns_of, schema_of
from reasonpix.datasets.publishing import accepted
from reasonpix.datasets.training_data import FILE as TRAINING_DATA
from reasonpix.datasets.training_data import (
    TrainingData,
    image_hash,
    read_training_data,
    training_data_of_dataset,
)
from reasonpix.datasets.writers import (
    FILE,
    GROUP,
    Written,
    image_bytes,
    parquet_row,
    write_rows,
)
from reasonpix.errors import RunError, SourceError
from reasonpix.evaluation.benchmark_formats import REASONING
from reasonpix.evaluation.cases import DIRECT
from reasonpix.evaluation.grounder_filters import filters_by_grounder
from reasonpix.evaluation.training_overlap import CaseContent, TrainingOverlap, measure_overlap
from reasonpix.generation.outcomes import Outcome
from reasonpix.generation.run_folder import RunFolder, refuse_inside_run
from reasonpix.plugin import registry

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
    """By what a sample shares with the training data, the number of such samples."""
    overlaps: Mapping[str, TrainingOverlap]
    """What the rows share with the training data of installed checkpoints, if anything."""


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
    reasoning instruction (compared by words) with the training splits of the datasets, or the
    training data of the models, in `disjoint_from`. The same run and seed give the same bytes.
    Raises `RunError` if there are too few samples, and `SourceError` if a dataset cannot be read.
    """
    refuse_inside_run(out, "publish")
    with output_dir(out, "publish") as draft:
        training = TrainingData()
        for name in disjoint_from:
            training |= _training_data(name)
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
        contents: list[CaseContent] = []
        rows = prefetch(lambda it: _row_and_content(columns, it, seed), picked, THREADS)
        written = write_rows(
            _collected(rows, contents),
            schema_of(columns.features),
            draft,
            FILE,
            GROUP,
            image_bytes,
            split=_FORM.split,
        )
        overlaps = _overlaps_of_checkpoints(contents)
        grounding = filters_by_grounder(run)
        grounding.write(draft)
        notes = _notes(disjoint_from, left_out, len(clean) - written, seed)
        notes += (*(overlap.sentence(name) for name, overlap in overlaps.items()),)
        notes += (grounding.sentence(),)
        text = render_card(run, _FORM, Written(written, columns.features, notes))
        (draft / "README.md").write_text(text, encoding="utf-8")
    return BenchmarkSummary(written, left_out, overlaps)


def _overlap(training: TrainingData, outcome: Outcome) -> tuple[str, str | None]:
    """What a sample shares with the training data, if anything."""
    sample, shared = outcome.sample, None
    try:
        if training.has_image(map(image_hash, (sample.image(), sample.edited_image()))):
            shared = "an image of the training data"
        elif training.has_instruction(sample.instruction):
            shared = "an instruction of the training data"
    except (UndecodableImage, OSError) as error:
        raise RunError(f"{sample.item.native_id}: {error}") from error
    return sample.record_id, shared


def _collected(
    rows: Iterable[tuple[Row, CaseContent]], contents: list[CaseContent]
) -> Iterator[Row]:
    """The rows, while what each may share with training data is added to `contents`."""
    for row, content in rows:
        contents.append(content)
        yield row


def _overlaps_of_checkpoints(contents: Sequence[CaseContent]) -> dict[str, TrainingOverlap]:
    """What the benchmark shares with the training data of each installed checkpoint, by name."""
    found = {}
    for name, folder in sorted(registry.checkpoints().items()):
        if (file := folder / TRAINING_DATA).is_file():
            overlap = measure_overlap(read_training_data(file), contents)
            if not overlap.is_clean:
                found[name] = overlap
    return found


def _row_and_content(columns: RunColumns, outcome: Outcome, seed: int) -> tuple[Row, CaseContent]:
    """A row of the benchmark, and what it may share with training data."""
    row, sample = _row(columns, outcome, seed), outcome.sample
    images = frozenset(map(image_hash, (sample.image(), sample.edited_image())))
    kinds = {DIRECT: row.get("direct_instruction"), REASONING: row["edit_prompt"]}
    instructions = {kind: str(text) for kind, text in kinds.items() if is_text(text)}
    return row, CaseContent(images, instructions)


def _row(columns: RunColumns, outcome: Outcome, seed: int) -> Row:
    sample, row = outcome.sample, parquet_row(columns, outcome)
    if sample.plan:
        template = TEMPLATES[seed_of(seed, "direct", sample.record_id) % len(TEMPLATES)]
        plan = sample.plan
        row["direct_instruction"] = template.format(
            selected=plan.selected, target=target_phrase(plan.target)
        )
    return row


def _training_data(name: str) -> TrainingData:
    """The training data of a model that records them, or the training split of a dataset."""
    folder = registry.checkpoint(name) or Path(name).expanduser()
    for place in (folder, folder / "model"):  # the folder of a training run holds its model
        if (file := place / TRAINING_DATA).is_file():
            return read_training_data(file)
        if (place / "model_index.json").is_file():
            raise SourceError(
                f"{name}: this model does not record its training data ({TRAINING_DATA}); "
                "name the datasets instead"
            )
    return training_data_of_dataset(name)


def _notes(
    disjoint_from: Sequence[str], left_out: Mapping[str, int], unused: int, seed: int
) -> tuple[str, ...]:
    """For the card: what the benchmark is disjoint from, and which samples were not used."""
    if not disjoint_from:
        checked = "**No training data were excluded** (name them with `--disjoint-from`)."
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
