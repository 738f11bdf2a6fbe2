"""A static page that shows a run: funnel, time and cost, accepted pairs, and what was rejected."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL.Image import Image

from reasonpix.core.images import UndecodableImage, data_url
from reasonpix.generation.chains import CORE_STAGES
from reasonpix.generation.outcomes import (
    Ending,
    StageEntry,
    endings_of,
    read_stages,
    source_of,
    verdicts,
)
from reasonpix.generation.run_folder import RunFolder, Status
from reasonpix.generation.statistics import position_bias, spending
from reasonpix.inspection.lookup import RecordRows, read_record_rows
from reasonpix.plugin.samples import Sample

_MAX_KINDS = 200
"""Kinds of reasons that are kept for each stage; further ones count as "other reasons"."""
_MAX_LISTED = 12
"""Kinds of reasons that the page lists for each stage."""
_PREFIX_WORDS = 4
"""Reasons that share this many first words are of one kind."""


@dataclass
class Reason:
    """Records that ended at one stage for one kind of reason."""

    stage: str
    status: Status
    words: list[str]
    """What all of them share; "…" replaces what differs."""
    count: int = 0
    examples: list[Ending] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The reason without the parts that differ between records."""
        return " ".join(self.words)[:120]


class Tally:
    """Counts where and why records ended, and picks the ones to show."""

    def __init__(self, entries: Sequence[StageEntry], limit: int) -> None:
        self.accepted: list[Ending] = []
        self.stages = ["source", *(entry.stage for entry in entries)]
        self._limit = limit
        self._counts = {stage: Counter[Status]() for stage in self.stages}
        self._reasons: dict[tuple[str, Status], dict[str, Reason]] = {}

    def add(self, ending: Ending) -> None:
        """Count one record. Each comes once."""
        self._counts[ending.stage][ending.status] += 1
        if ending.status == "ok":
            shown = self.accepted
        else:
            kinds = self._reasons.setdefault((ending.stage, ending.status), {})
            words = _words(ending)
            prefix = " ".join(map(_mask, words[:_PREFIX_WORDS]))
            if prefix not in kinds and len(kinds) >= _MAX_KINDS:
                prefix, words = "", ["other", "reasons"]
            reason = kinds.setdefault(prefix, Reason(ending.stage, ending.status, words))
            reason.words = _merge_words(reason.words, words)
            reason.count += 1
            shown = reason.examples
        if len(shown) < self._limit:
            shown.append(ending)

    def funnel(self) -> list[dict[str, Any]]:
        """For each stage, how many records passed it, and how many ended there."""
        passed = self.total
        stages: list[dict[str, Any]] = []
        for stage in self.stages:
            rejected, failed = self._counts[stage]["rejected"], self._counts[stage]["failed"]
            passed -= rejected + failed
            stages.append({"stage": stage, "ok": passed, "rejected": rejected, "failed": failed})
        return stages

    @property
    def total(self) -> int:
        """All records."""
        return sum(counts.total() for counts in self._counts.values())

    def reasons(self) -> list[Reason]:
        """By stage, the most frequent first; if a stage has too many, similar ones are merged."""
        reasons = []
        for stage in self.stages:
            for status in ("rejected", "failed"):
                kinds = _merge_similar(list(self._reasons.get((stage, status), {}).values()))
                reasons += sorted(kinds, key=lambda reason: -reason.count)
        return reasons

    def shown(self) -> dict[str, Ending]:
        """The records to show, by id: accepted ones, and equally many of each kind of reason."""
        others: list[Ending] = []
        reasons = self.reasons()
        for turn in range(self._limit):
            others += [r.examples[turn] for r in reasons if len(r.examples) > turn]
            if len(others) >= self._limit:
                break
        return {ending.record_id: ending for ending in (*self.accepted, *others[: self._limit])}


_QUOTED = r"'[^']*'|\"[^\"]*\""


def _words(ending: Ending) -> list[str]:
    """The words of a reason, without a file's name; a quotation is one word."""
    reason = ending.reason
    if ending.stage in ("source", "read"):
        reason = reason.partition(": ")[2] or reason
    return re.findall(rf"(?:{_QUOTED})\S*|\S+", reason)


def _mask(word: str) -> str:
    return re.sub(rf"{_QUOTED}|\d[\d.]*", "…", word)


def _merge_words(kind: list[str], reason: list[str]) -> list[str]:
    """The words that two reasons share. A measured value becomes "…"; an equal one stays."""
    if kind == reason:
        return kind
    words = [
        word if word == other else _mask(word) if _mask(word) == _mask(other) else "…"
        for word, other in zip(kind, reason, strict=False)
    ]
    if len(kind) != len(reason):  # such as lists: only the words before them agree
        words = [*takewhile(lambda word: word != "…", words), "…"]
    return [word for i, word in enumerate(words) if word != "…" or words[i - 1 : i] != ["…"]]


def _merge_similar(reasons: Sequence[Reason]) -> list[Reason]:
    """Reasons; if there are too many, those with the same first words are merged."""
    if len(reasons) <= _MAX_LISTED:
        return list(reasons)
    merged: dict[str, Reason] = {}
    for reason in reasons:
        words = reason.words[:3] + ["…"] * (len(reason.words) > 3)
        kind = merged.setdefault(" ".join(words), Reason(reason.stage, reason.status, words))
        kind.count += reason.count
        kind.examples += reason.examples
    return list(merged.values())


def write_gallery(run: RunFolder, limit: int = 200) -> str:
    """Write `gallery.html` into the run folder, and return its path or URL.

    The page embeds its images and needs no network. It shows up to `limit` accepted pairs and as
    many others; counts cover the whole run. Raises `RunError` if the run is not finished.
    """
    entries = read_stages(run)
    tally = Tally(entries, limit)
    for ending in endings_of(run, entries, verdicts(run, entries)):
        tally.add(ending)
    cards = dict(_cards(run, entries, tally.shown()))
    groups = [
        (reason, [cards[end.record_id] for end in reason.examples if end.record_id in cards])
        for reason in tally.reasons()
    ]
    funnel = tally.funnel()
    environment = Environment(
        loader=PackageLoader("reasonpix", "pages"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("gallery.html").render(
        name=run.name,
        total=tally.total,
        accepted=funnel[-1]["ok"],
        cards=[cards[ending.record_id] for ending in tally.accepted],
        groups=groups,
        funnel=funnel,
        seconds=_seconds(run, entries),
        bias=position_bias(run),
        spent=spending(run),
        recipe=run.storage.read("recipe.yaml").decode(),
    )
    run.storage.write("gallery.html", page.encode())
    return f"{run}/gallery.html"


def _cards(
    run: RunFolder, entries: Sequence[StageEntry], shown: dict[str, Ending]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A card for each record shown. Reads only the shards that hold one."""
    shards = dict.fromkeys(ending.shard for ending in shown.values())
    with closing(source_of(run)) as source:
        for shard in sorted(shards):
            for trace in read_record_rows(run, entries, shard, shown.keys(), source):
                ending = shown[trace.planned.record_id]
                yield ending.record_id, _card(trace, entries, ending)


def _card(trace: RecordRows, entries: Sequence[StageEntry], ending: Ending) -> dict[str, Any]:
    sample = trace.final_sample(entries)
    card: dict[str, Any] = {
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
        "candidates": [],
        "boxes": [],
        "outputs": {},
        "images": {},
        "input": None,
        "edited": None,
        "small": False,
    }
    return card | (_card_facts(sample) if sample else {})


def _card_facts(sample: Sample) -> dict[str, Any]:
    """What a card shows of a sample."""
    image: Image | None = None
    edited: str | None = None
    with suppress(UndecodableImage, OSError):
        image = sample.image()
        edited = data_url(sample.edited_image()) if sample.has_edit else None
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
        "input": data_url(image) if image else None,
        "edited": edited,
        "small": bool(image and max(image.size) <= 128),
        "boxes": groundings,
        "outputs": {
            name: output.model_dump_json()
            for name, output in sample.outputs.items()
            if name not in CORE_STAGES
        },
        "images": _images(sample),
        "caption": sample.caption.text if sample.caption else "",
        "change": _change(sample),
        "instruction": sample.instruction,
        "candidates": _candidates(sample),
    }


def _images(sample: Sample) -> dict[str, str]:
    """The images that stages of plugins made, as data URLs by name."""
    images: dict[str, str] = {}
    for name in sample.images.keys() - {"input", "paired", "edited"}:
        with suppress(UndecodableImage, OSError):
            images[name] = data_url(sample.image(name))
    return dict(sorted(images.items()))


def _change(sample: Sample) -> str:
    if sample.plan:
        return f"{sample.plan.selected} → {sample.plan.target}"
    return (sample.item.pair.caption or "") if sample.item.pair else ""


def _candidates(sample: Sample) -> list[dict[str, Any]]:
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


def _seconds(run: RunFolder, entries: Sequence[StageEntry]) -> dict[str, float]:
    """Seconds spent on the current stages, by stage."""
    folders = {entry.folder: entry.stage for entry in entries}
    spent = Counter[str]()
    for line in run.journal():
        if line.get("stage") in folders and "seconds" in line:  # otherwise the shard was reopened
            spent[folders[line["stage"]]] += line["seconds"]
    return dict(spent)
