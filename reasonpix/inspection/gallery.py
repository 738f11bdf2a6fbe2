"""A static page to look at a run: the funnel, time and cost, pairs, and why the others ended."""

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
from reasonpix.generation.outcomes import (
    Ending,
    StageEntry,
    endings_of,
    read_stages,
    source_of,
    verdicts,
)
from reasonpix.generation.run_folder import RunFolder, Status
from reasonpix.generation.samples import Sample
from reasonpix.generation.statistics import position_bias, spending
from reasonpix.inspection.lookup import RecordRows, read_record_rows

_KINDS = 200
"""Reasons of one stage that are told apart, and as many of them as a page lists."""
_LISTED = 12
_TELLING = 4
"""Words with which reasons of one kind begin."""


@dataclass
class Reason:
    """Records that ended in one place for one kind of reason."""

    stage: str
    status: Status
    words: list[str]
    """What all of them have in common; "…" stands for what differs."""
    count: int = 0
    first: list[Ending] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The reason without what is peculiar to one record."""
        return " ".join(self.words)[:120]


class Tally:
    """How many records ended where and why, and which of them to show."""

    def __init__(self, entries: Sequence[StageEntry], limit: int) -> None:
        self.accepted: list[Ending] = []
        self.stages = ["source", *(entry.stage for entry in entries)]
        self._limit = limit
        self._ends = {stage: Counter[Status]() for stage in self.stages}
        self._reasons: dict[tuple[str, Status], dict[str, Reason]] = {}

    def add(self, ending: Ending) -> None:
        """Count one record. Each comes once."""
        self._ends[ending.stage][ending.status] += 1
        if ending.status == "ok":
            shown = self.accepted
        else:
            kinds = self._reasons.setdefault((ending.stage, ending.status), {})
            words = _words(ending)
            begin = " ".join(map(_mask, words[:_TELLING]))
            if begin not in kinds and len(kinds) >= _KINDS:
                begin, words = "", ["other", "reasons"]
            reason = kinds.setdefault(begin, Reason(ending.stage, ending.status, words))
            reason.words = _folded(reason.words, words)
            reason.count += 1
            shown = reason.first
        if len(shown) < self._limit:
            shown.append(ending)

    def funnel(self) -> list[dict[str, Any]]:
        """For each stage how many records went on, and how many ended there."""
        going = self.total
        stages: list[dict[str, Any]] = []
        for stage in self.stages:
            rejected, failed = self._ends[stage]["rejected"], self._ends[stage]["failed"]
            going -= rejected + failed
            stages.append({"stage": stage, "ok": going, "rejected": rejected, "failed": failed})
        return stages

    @property
    def total(self) -> int:
        """All records."""
        return sum(ends.total() for ends in self._ends.values())

    def reasons(self) -> list[Reason]:
        """In the order of the stages, the most frequent first. Rare ones of a stage together."""
        reasons = []
        for stage in self.stages:
            for status in ("rejected", "failed"):
                kinds = _merged(list(self._reasons.get((stage, status), {}).values()))
                reasons += sorted(kinds, key=lambda reason: -reason.count)
        return reasons

    def shown(self) -> dict[str, Ending]:
        """The records to show, by id: accepted ones, and of each kind of reason alike many."""
        others: list[Ending] = []
        reasons = self.reasons()
        for turn in range(self._limit):
            others += [it.first[turn] for it in reasons if len(it.first) > turn]
            if len(others) >= self._limit:
                break
        return {it.record_id: it for it in (*self.accepted, *others[: self._limit])}


_QUOTED = r"'[^']*'|\"[^\"]*\""


def _words(ending: Ending) -> list[str]:
    """The words of a reason without a file's name; what is quoted is one word."""
    reason = ending.reason
    if ending.stage in ("source", "read"):
        reason = reason.partition(": ")[2] or reason
    return re.findall(rf"(?:{_QUOTED})\S*|\S+", reason)


def _mask(word: str) -> str:
    return re.sub(rf"{_QUOTED}|\d[\d.]*", "…", word)


def _folded(kind: list[str], reason: list[str]) -> list[str]:
    """The words that two reasons share: an option's value stays, what was measured does not."""
    if kind == reason:
        return kind
    words = [
        one if one == other else _mask(one) if _mask(one) == _mask(other) else "…"
        for one, other in zip(kind, reason, strict=False)
    ]
    if len(kind) != len(reason):  # such as lists, of which only the words before are alike
        words = [*takewhile(lambda word: word != "…", words), "…"]
    return [word for i, word in enumerate(words) if word != "…" or words[i - 1 : i] != ["…"]]


def _merged(reasons: Sequence[Reason]) -> list[Reason]:
    """When there are too many, those that begin alike count as one."""
    if len(reasons) <= _LISTED:
        return list(reasons)
    merged: dict[str, Reason] = {}
    for it in reasons:
        words = it.words[:3] + ["…"] * (len(it.words) > 3)
        one = merged.setdefault(" ".join(words), Reason(it.stage, it.status, words))
        one.count += it.count
        one.first += it.first
    return list(merged.values())


def write_gallery(run: RunFolder, limit: int = 200) -> str:
    """Write `gallery.html` into the run folder and return where it is.

    The page holds its images and needs no network. `limit` bounds the pairs shown, accepted ones
    and others each; the counts are always of the whole run. Raises `RunError` when the run is not
    finished.
    """
    entries = read_stages(run)
    tally = Tally(entries, limit)
    for ending in endings_of(run, entries, verdicts(run, entries)):
        tally.add(ending)
    cards = dict(_cards(run, entries, tally.shown()))
    groups = [
        (reason, [cards[it.record_id] for it in reason.first if it.record_id in cards])
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
        cards=[cards[it.record_id] for it in tally.accepted],
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
    """A card for each record shown. Only the shards that hold one are read."""
    shards = dict.fromkeys(ending.shard for ending in shown.values())
    with closing(source_of(run)) as source:
        for shard in sorted(shards):
            for trace in read_record_rows(run, entries, shard, shown.keys(), source):
                ending = shown[trace.planned.record_id]
                yield ending.record_id, _card(trace, entries, ending)


def _card(trace: RecordRows, entries: Sequence[StageEntry], ending: Ending) -> dict[str, Any]:
    sample = trace.followed(entries)
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
        "input": None,
        "edited": None,
        "small": False,
    }
    return card | (_seen(sample) if sample else {})


def _seen(sample: Sample) -> dict[str, Any]:
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
        "caption": sample.caption.text if sample.caption else "",
        "change": _change(sample),
        "instruction": sample.instruction,
        "candidates": _candidates(sample),
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


def _seconds(run: RunFolder, entries: Sequence[StageEntry]) -> dict[str, float]:
    """Seconds spent on the current stages, by stage."""
    folders = {entry.folder: entry.stage for entry in entries}
    spent = Counter[str]()
    for line in run.journal():
        if line.get("stage") in folders and "seconds" in line:  # or it was reopened
            spent[folders[line["stage"]]] += line["seconds"]
    return dict(spent)
