"""A static page that shows a run: funnel, time and cost, and its records, to search and sort."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from reasonpix.core.figures import counted, duration
from reasonpix.generation.model_domains import run_warnings
from reasonpix.generation.outcomes import StageEntry, endings_of, read_stages, verdicts
from reasonpix.generation.run_folder import RunFolder
from reasonpix.generation.statistics import position_bias, spending
from reasonpix.inspection.cards import Card, read_cards
from reasonpix.inspection.reasons import Reason, Tally


def write_gallery(run: RunFolder, limit: int = 1000) -> str:
    """Write `gallery.html` into the run folder, and return its path or URL.

    The page embeds its images and needs no network. It shows up to `limit` accepted pairs and as
    many others; counts cover the whole run, and the page says how many records it leaves out.
    Raises `RunError` if the run is not finished.
    """
    entries = read_stages(run)
    tally = Tally(entries, limit)
    for ending in endings_of(run, entries, verdicts(run, entries)):
        tally.add(ending)
    cards = dict(read_cards(run, entries, tally.shown()))
    run.storage.write("gallery.html", render_page(run, entries, tally, cards).encode())
    return f"{run}/gallery.html"


def render_page(
    run: RunFolder, entries: Sequence[StageEntry], tally: Tally, found: Mapping[str, Card]
) -> str:
    """The page, with the cards that were found of the records that `tally` shows."""
    cards = [found[record_id] for record_id in tally.shown()]
    reasons = tally.reasons()
    funnel = tally.funnel()
    accepted = funnel[-1]["ok"]
    environment = Environment(
        loader=PackageLoader("reasonpix", "pages"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"duration": duration}
    return environment.get_template("gallery.html").render(
        name=run.name,
        warnings=run_warnings(run.plan(), entries),
        total=tally.total,
        accepted=accepted,
        cards=cards,
        left_out=_left_out(tally.total, accepted, cards),
        index=_index(cards, reasons),
        outcomes=_outcomes(cards),
        reasons=[(reason, _shown(reason, found)) for reason in reasons],
        categories=_choices(cards, "category"),
        targets=_choices(cards, "target"),
        funnel=funnel,
        seconds=_seconds(run, entries),
        ignored=run.plan().ignored,
        bias=position_bias(run),
        spent=spending(run),
        recipe=run.storage.read("recipe.yaml").decode(),
    )


def _left_out(total: int, accepted: int, cards: Sequence[Card]) -> str:
    """Which records of the run the page does not show; empty if it shows all."""
    shown = sum(card["status"] == "ok" for card in cards)
    parts = {
        "accepted": accepted - shown,
        "rejected or failed": total - accepted - (len(cards) - shown),
    }
    listed = " and ".join(f"{number:,} {what}" for what, number in parts.items() if number)
    return f"{counted(sum(parts.values()), 'record')} not shown here ({listed})" if listed else ""


def _index(cards: Sequence[Card], reasons: Sequence[Reason]) -> dict[str, Any]:
    """What the page's script searches and sorts by, in the order of the cards."""
    names = list(dict.fromkeys(name for card in cards for name in card["scores"]))
    kinds = {ending.record_id: it.label for it in reasons for ending in it.examples}
    texts = ("id", "source_id", "caption", "change", "instruction", "direct", "reason")
    return {
        "scores": names,
        "records": [
            {
                "id": card["id"],
                "text": "\n".join(filter(None, (card[name] for name in texts))),
                "outcome": _outcome(card),
                "kind": kinds.get(card["id"], ""),
                "category": card["category"],
                "target": card["target"],
                "scores": [card["scores"].get(name) for name in names],
            }
            for card in cards
        ],
    }


def _outcome(card: Card) -> str:
    return "accepted" if card["status"] == "ok" else f"{card['status']} at {card['stage']}"


def _outcomes(cards: Sequence[Card]) -> dict[str, int]:
    """How many cards have each outcome, in the order of the cards."""
    return dict(Counter(_outcome(card) for card in cards))


def _shown(reason: Reason, cards: Mapping[str, Card]) -> int:
    """How many records of a kind are on the page."""
    return sum(ending.record_id in cards for ending in reason.examples)


def _choices(cards: Sequence[Card], name: str) -> list[tuple[str, int]]:
    """The values that cards have, by name, with their counts."""
    return sorted(Counter(card[name] for card in cards if card[name]).items())


def _seconds(run: RunFolder, entries: Sequence[StageEntry]) -> dict[str, float]:
    """Seconds spent on the current stages, by stage."""
    folders = {entry.folder: entry.stage for entry in entries}
    spent = Counter[str]()
    for line in run.journal():
        if line.get("stage") in folders and "seconds" in line:  # otherwise the shard was reopened
            spent[folders[line["stage"]]] += line["seconds"]
    return dict(spent)
