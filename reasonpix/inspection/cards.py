"""What the gallery shows of one record: its images, texts, boxes and scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from PIL.Image import Image

from reasonpix.core import images
from reasonpix.core.images import UndecodableImage
from reasonpix.generation.chains import CORE_STAGES
from reasonpix.generation.outcomes import Ending, StageEntry, source_of
from reasonpix.generation.run_folder import RunFolder
from reasonpix.inspection.lookup import RecordRows, read_record_rows
from reasonpix.plugin.samples import Sample

Card = dict[str, Any]

_PIXELS = 256
"""Longest side of an image on the page: thousands of images are in one file."""

_data_url = partial(images.data_url, lossless=128, shown=_PIXELS)


def read_cards(
    run: RunFolder, entries: Sequence[StageEntry], shown: Mapping[str, Ending]
) -> Iterator[tuple[str, Card]]:
    """A card for each record shown. Reads only the shards that hold one."""
    shards = dict.fromkeys(ending.shard for ending in shown.values())
    with closing(source_of(run)) as source:
        for shard in sorted(shards):
            for trace in read_record_rows(run, entries, shard, shown.keys(), source):
                ending = shown[trace.planned.record_id]
                yield ending.record_id, _card(trace, entries, ending)


def _card(trace: RecordRows, entries: Sequence[StageEntry], ending: Ending) -> Card:
    sample = trace.final_sample(entries)
    card: Card = {
        "id": ending.record_id,
        "source_id": trace.item.native_id,
        "status": ending.status,
        "stage": ending.stage,
        "reason": ending.reason,
        "scores": trace.scores(entries),
        "direct": trace.item.pair.instruction if trace.item.pair else "",
        "caption": "",
        "instruction": "",
        "change": "",
        "category": "",
        "target": "",
        "candidates": [],
        "boxes": [],
        "outputs": {},
        "images": {},
        "missing": [],
        "input": None,
        "edited": None,
        "small": False,
        "ratio": 1.0,
    }
    card |= _card_facts(sample) if sample else {}
    if ending.stage in ("source", "read"):  # the reason says it already
        card["missing"] = []
    return card


def _card_facts(sample: Sample) -> Card:
    """What a card shows of a sample."""
    image: Image | None = None
    edited: str | None = None
    missing: list[str] = []
    try:
        image = sample.image()
    except (UndecodableImage, OSError) as error:
        missing.append(f"input image: {error}")
    try:
        edited = _data_url(sample.edited_image()) if sample.has_edit else None
    except (UndecodableImage, OSError) as error:
        missing.append(f"edited image: {error}")
    groundings = [
        {
            "category": g.category,
            "left": 100 * g.box.x0 / g.box.width,
            "top": 100 * g.box.y0 / g.box.height,
            "width": 100 * (g.box.x1 - g.box.x0) / g.box.width,
            "height": 100 * (g.box.y1 - g.box.y0) / g.box.height,
            "selected": bool(sample.plan and sample.plan.selected == g.category),
        }
        for g in sample.groundings
        if g.box
    ]
    return {
        "input": _data_url(image) if image else None,
        "edited": edited,
        "small": bool(image and max(image.size) <= 128),
        "ratio": image.width / image.height if image else 1.0,
        "boxes": groundings,
        "outputs": {
            name: output.model_dump_json()
            for name, output in sample.outputs.items()
            if name not in CORE_STAGES
        },
        "images": _images(sample, missing),
        "missing": missing,
        "caption": sample.caption.text if sample.caption else "",
        "change": _change(sample),
        "category": sample.plan.selected if sample.plan else "",
        "target": sample.plan.target if sample.plan else "",
        "instruction": sample.instruction,
        "candidates": _candidates(sample),
    }


def _images(sample: Sample, missing: list[str]) -> dict[str, str]:
    """The images that stages of plugins made, as data URLs by name; adds those it cannot read."""
    shown: dict[str, str] = {}
    for name in sorted(sample.images.keys() - {"input", "paired", "edited"}):
        try:
            shown[name] = _data_url(sample.image(name))
        except (UndecodableImage, OSError) as error:
            missing.append(f"image {name}: {error}")
    return shown


def _change(sample: Sample) -> str:
    if sample.plan:
        return f"{sample.plan.selected} → {sample.plan.target}"
    return (sample.item.pair.caption or "") if sample.item.pair else ""


def _candidates(sample: Sample) -> list[Card]:
    """The candidate instructions, and in how many presentation orders each was chosen."""
    candidates, selection = sample.candidates, sample.selection
    return [
        {
            "instruction": candidate.instruction,
            "chosen": bool(selection and selection.chosen == index),
            "votes": selection.choices.count(index) if selection else 0,
        }
        for index, candidate in enumerate(candidates.candidates if candidates else ())
    ]
