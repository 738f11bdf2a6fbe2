"""Statistics of a run: the cost of LLM answers, and the position bias of P_select."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from reasonpix.generation.outcomes import read_stages
from reasonpix.generation.run_folder import RunFolder
from reasonpix.llm.budget import Spending
from reasonpix.llm.ledger import Ledger
from reasonpix.llm.ledger_sync import ledger_file
from reasonpix.plugin.samples import Selection


@dataclass(frozen=True)
class PositionBias:
    """How P_select chose among the same candidates in several orders."""

    records: int
    agreement: float
    """Mean share of the orders in which the chosen candidate was chosen."""
    unanimous: float
    """Share of the records for which every order chose the same candidate."""
    first: float
    """Share of all choices that picked the first candidate shown."""
    expected: float
    """The expected `first` by chance."""
    least: float
    """The lowest possible `agreement`: every order chose another candidate."""
    unanswered: int
    """Records left out because fewer than two orders were answered."""

    def __str__(self) -> str:
        """A one-line summary."""
        return (
            f"P_select, asked in several orders about {self.records} records: "
            f"{self.agreement:.0%} of choices agree ({self.least:.0%} at least), "
            f"{self.unanimous:.0%} of records unanimous; "
            f"first place chosen {self.first:.0%} ({self.expected:.0%} by chance)"
            + (f"; {self.unanswered} more answered in one order only" if self.unanswered else "")
        )


def position_bias(run: RunFolder) -> PositionBias | None:
    """The position bias of P_select in this run; None if nothing was chosen in several orders."""
    answered = unanimous = shown = unanswered = 0
    agreement = first = expected = least = 0.0
    for selection in _selections(run):
        if selection.asked < 2:
            continue
        if len(selection.orders) < 2:
            unanswered += 1
            continue
        answered += 1
        agreement += selection.agreement
        unanimous += selection.agreement == 1
        least += 1 / selection.asked
        for order, choice in zip(selection.orders, selection.choices, strict=True):
            shown += 1
            first += order[0] == choice
            expected += 1 / len(order)
    if not answered:
        return None
    return PositionBias(
        records=answered,
        agreement=agreement / answered,
        unanimous=unanimous / answered,
        first=first / shown,
        expected=expected / shown,
        least=least / answered,
        unanswered=unanswered,
    )


def _selections(run: RunFolder) -> Iterator[Selection]:
    for entry in read_stages(run):
        if entry.stage == "select":
            for shard in run.shards():
                for _, output in run.outputs(entry.folder, shard):
                    yield Selection.model_validate_json(output)


def spending(run: RunFolder) -> Spending:
    """The cost of all LLM answers in this run folder, also of those from earlier recipes."""
    with ledger_file(run.storage, write_back=False) as path:
        if not path.exists():
            return Spending()
        with Ledger(path) as ledger:
            return ledger.spent()


def left_out(run: RunFolder) -> dict[str, int]:
    """Parameters that a server refused, each with the number of answers given without it."""
    with ledger_file(run.storage, write_back=False) as path:
        if not path.exists():
            return {}
        with Ledger(path) as ledger:
            return ledger.left_out()


def spending_lines(run: RunFolder, accepted: int) -> list[str]:
    """Tokens and cost by task and per accepted sample, as lines of text."""
    spent = spending(run)
    lines = [
        f"{task}: {part.answers} answers, {part.prompt_tokens} prompt and "
        f"{part.completion_tokens} answer tokens, {_money(part)}"
        for task, part in spent.by_task.items()
    ]
    if paid := spent.cost + spent.lost_cost:
        each = f": {paid / accepted:.6f} for each accepted sample" if accepted else ""
        lines.append(f"paid for all answers in this run folder: {_money(spent)}{each}")
    if spent.estimated:
        cost = ", so their cost is the most that they can have cost" if paid else ""
        lines.append(f"the server did not report the tokens of {spent.estimated} answers{cost}")
    lines += [
        f"{answers} answers were given without {name}, which the server refused"
        for name, answers in left_out(run).items()
    ]
    return lines


def _money(spent: Spending) -> str:
    priced = spent.answers > spent.unpriced or not spent.answers
    lost = f" and at most {spent.lost_cost:.4f} for {spent.lost} lost calls" if spent.lost else ""
    return (f"{spent.cost:.4f}" if priced else "no price given") + lost
