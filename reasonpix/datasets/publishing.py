"""Publish the accepted samples of a finished run as a dataset, in one of several forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from reasonpix.core.atomic import output_dir
from reasonpix.core.figures import counted
from reasonpix.datasets import preference, writers
from reasonpix.datasets.card import Form, render_card
from reasonpix.datasets.columns import columns_of
from reasonpix.datasets.writers import Written
from reasonpix.errors import ReasonpixError, RunError
from reasonpix.generation.outcomes import Outcome, outcome_counts, read_outcomes
from reasonpix.generation.run_folder import RunFolder, Status, refuse_inside_run
from reasonpix.plugin.registry import nearest

_FACTS = (
    "`part` is the part of the paper's dataset (I, II or III). `edited_caption` describes the "
    "edited image; where an object was replaced, it is the caption with the target in its place. "
    "`direct_instruction` and `candidates` (of which `chosen` is the index of the "
    "one taken) belong to rewritten pairs; `selected`, `target` and `box` (XYXY in pixels of the "
    "input image) to replaced objects. `source_id` names the image in its source. "
    "`score_<filter>_<score>` is what a filter measured, null where it did not measure the sample."
)

_TRIPLES = "triples of input image, reasoning instruction and edited image"

FORMS: Mapping[str, Form] = {
    "hf": Form(
        what=_TRIPLES,
        columns="`input_image`, `edit_prompt`, `edited_image` are what diffusers' InstructPix2Pix "
        f"trainer reads: `edit_prompt` is the reasoning instruction, images are lossless. {_FACTS}",
        data="data/train-*.parquet",
    ),
    "instruct-pix2pix": Form(
        what=_TRIPLES,
        columns="A folder for each sample, listed in `seeds.json`: `0_0.jpg` before and `0_1.jpg` "
        "after (JPEG of quality 100, colours not subsampled); `prompt.json` with the caption "
        "before (`input`), the reasoning instruction (`edit`) and the caption after (`output`). "
        "`metadata.jsonl` has a row for each sample, so that `datasets.load_dataset` gives "
        "`input_image`, `edit_prompt` (the reasoning instruction), `edited_image` and the other "
        f"columns. {_FACTS}",
        data=("metadata.jsonl", "*/0_?.jpg"),
    ),
    "webdataset": Form(
        what=_TRIPLES,
        columns="Each sample is `<record_id>.input.png`, `.edited.png` (both lossless) and "
        f"`.json`, where `edit_prompt` is the reasoning instruction. {_FACTS}",
        data="data/train-*.tar",
    ),
    "preference": Form(
        what="preference pairs of instructions",
        columns="`prompt` is what P_gen was asked, `chosen` and `rejected` are answers to it: the "
        "candidate that P_select chose, and one that it did not, in the form that the prompt asks "
        "for. `agreement` is the share of the orders asked in which P_select chose that candidate, "
        "null where fewer than two were answered; `chosen_votes` and `rejected_votes` count the "
        "orders for either. `record_id` names the sample.",
        task="text-generation",
        data="data/train-*.parquet",
    ),
}
"""The forms by the name that `reasonpix publish --to` takes."""

Writer = Callable[[RunFolder, Iterator[Outcome], Path], Written]

_WRITERS: Mapping[str, Writer] = {
    "hf": lambda run, accepted, folder: writers.write_parquet(accepted, folder, columns_of(run)),
    "instruct-pix2pix": lambda run, accepted, folder: writers.write_instruct_pix2pix(
        accepted, folder, columns_of(run)
    ),
    "webdataset": lambda run, accepted, folder: writers.write_webdataset(
        accepted, folder, columns_of(run)
    ),
    "preference": lambda run, accepted, folder: preference.write_preference(
        accepted, folder, preference.prompt_of(run)
    ),
}


def publish(
    run: RunFolder | str | Path,
    out: str | Path,
    to: str = "hf",
    report: Callable[[int], None] = lambda done: None,
) -> int:
    """Write the accepted samples of `run` to the new folder `out`; returns the number of rows.

    `to` is a format: hf, instruct-pix2pix, webdataset or preference. The folder appears complete or
    not at all, and the same run gives the same bytes. `report` is called with the number of samples
    read. Raises `RunError` if the run is unfinished, accepted nothing or does not suit the format,
    and if `out` exists or cannot be written.
    """
    if to not in FORMS:
        raise ReasonpixError(f"no dataset format {to!r}{nearest(str(to), FORMS)}")
    form = FORMS[to]
    if not isinstance(run, RunFolder):
        run = RunFolder(run)
    refuse_inside_run(Path(out), "publish")
    with output_dir(Path(out), "publish") as draft:
        written = _WRITERS[to](run, accepted(run, report), draft)
        (draft / "README.md").write_text(render_card(run, form, written), encoding="utf-8")
    return written.rows


def accepted(
    run: RunFolder, report: Callable[[int], None] = lambda done: None
) -> Iterator[Outcome]:
    """The outcomes that a dataset is made of. Raises `RunError`, also if there are none."""
    done = 0
    try:
        for outcome in read_outcomes(run):
            if outcome.status == "ok":
                done += 1
                report(done)
                yield outcome
        if done == 0:
            raise RunError(_nothing_accepted(run))
    except OSError as error:
        raise RunError(f"{run} cannot be read: {error}") from error


def _nothing_accepted(run: RunFolder) -> str:
    """Where the records of a run ended that accepted none, and what to do about it."""
    counts = outcome_counts(run)
    if counts.total == 0:
        return f"{run} has no records: its source listed none; see `reasonpix status {run}`"
    ended: dict[tuple[str, Status], int] = {
        (stage, status): dict(counts.stages)[stage][status] for stage, status in counts.examples
    }
    (stage, status), _ = max(ended.items(), key=lambda item: item[1])
    if stage in ("source", "read"):
        cure = f"repair the images, then `reasonpix generate {run}/recipe.yaml --out {run} "
        cure += "--limit all`"
    elif status == "failed":
        cure = f"repair what failed, then `reasonpix generate {run}/recipe.yaml --out {run} "
        cure += "--retry-failed`"
    elif stage.startswith("score-"):
        cure = f"try other thresholds with `reasonpix refilter {run}`"
    else:
        cure = "change the recipe, or plan more records with `--limit`"
    where = ", ".join(f"{stage} {status} {n:,}" for (stage, status), n in ended.items())
    example = " ".join(counts.examples[stage, status].split())
    return (
        f"{run} accepted none of its {counted(counts.total, 'record')}: {where} (such as: "
        f"{example}); {cure}; `reasonpix gallery {run}` shows all reasons"
    )
