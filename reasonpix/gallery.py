"""A static page to look at a run: pairs with boxes and instructions, the funnel, the time."""

from __future__ import annotations

import base64
from collections import Counter
from contextlib import suppress
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL.Image import Image

from reasonpix.images import UndecodableImage, encode_png
from reasonpix.outcomes import Outcome, funnel, outcomes, read_stages
from reasonpix.run import RunFolder
from reasonpix.samples import Sample
from reasonpix.summary import position_bias, spending_lines


def gallery(run: RunFolder, limit: int = 200) -> str:
    """Write `gallery.html` into the run folder and return where it is.

    The page holds its images and needs no network. `limit` bounds the pairs shown, accepted ones
    and others each; the counts are always of the whole run.
    """
    accepted: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for outcome in outcomes(run):
        shown = accepted if outcome.status == "ok" else others
        if len(shown) < limit:
            shown.append(_card(outcome))
    stages = funnel(run)
    environment = Environment(
        loader=PackageLoader("reasonpix", "pages"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("gallery.html").render(
        name=run.name,
        accepted=accepted,
        others=others,
        funnel=stages,
        total=sum(stages[0][1].values()),
        seconds=_seconds(run),
        bias=position_bias(run),
        spending=spending_lines(run, stages[-1][1]["ok"]),
        recipe=run.storage.read("recipe.yaml").decode(),
    )
    run.storage.write("gallery.html", page.encode())
    return f"{run}/gallery.html"


def _card(outcome: Outcome) -> dict[str, Any]:
    sample = outcome.sample
    image: Image | None = None
    edited: bytes | None = None
    with suppress(UndecodableImage, OSError):
        image = sample.image()
        edited = sample.edited_png() if sample.has_edit else None
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
        "id": sample.record_id,
        "source_id": sample.item.native_id,
        "input": _data_url(encode_png(image)) if image else None,
        "edited": _data_url(edited) if edited else None,
        "small": bool(image and max(image.size) <= 128),
        "boxes": groundings,
        "caption": sample.caption.text if sample.caption else "",
        "change": _change(sample),
        "instruction": sample.instruction,
        "direct": sample.item.pair.instruction if sample.item.pair else "",
        "candidates": _candidates(sample),
        "scores": dict(outcome.scores),
        "status": outcome.status,
        "stage": outcome.stage,
        "reason": outcome.reason,
    }


def _change(sample: Sample) -> str:
    if sample.plan:
        return f"{sample.plan.selected} → {sample.plan.target}"
    return (sample.item.pair.caption or "") if sample.item.pair else ""


def _candidates(sample: Sample) -> list[dict[str, Any]]:
    """The instructions that were to choose from, and in how many orders each was chosen."""
    given, chosen = sample.candidates, sample.selection
    return [
        {
            "instruction": candidate.instruction,
            "chosen": bool(chosen and chosen.chosen == index),
            "votes": chosen.choices.count(index) if chosen else 0,
        }
        for index, candidate in enumerate(given.candidates if given else ())
    ]


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _seconds(run: RunFolder) -> dict[str, float]:
    """Seconds spent on the current stages, by stage."""
    folders = {entry.folder: entry.stage for entry in read_stages(run)}
    spent = Counter[str]()
    for line in run.journal():
        if line.get("stage") in folders:
            spent[folders[line["stage"]]] += line["seconds"]
    return dict(spent)
