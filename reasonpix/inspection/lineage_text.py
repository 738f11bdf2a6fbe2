"""The lineage of a record as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from reasonpix.core.figures import counted, duration
from reasonpix.inspection.lineage import Lineage, Question, Step


def lineage_lines(lineage: Lineage) -> Iterator[str]:
    """A lineage as text."""
    yield f"record {lineage.record_id} of {lineage.run}, shard {lineage.shard}"
    where = f" at {lineage.stage}" if lineage.status != "accepted" else ""
    yield f"{lineage.status}{where}{f': {lineage.reason}' if lineage.reason else ''}"
    yield ""
    yield f"source: {lineage.source['use']} ({lineage.source['package']})"
    yield from _values(lineage.item)
    for step in lineage.steps:
        if step.status != "not reached":
            yield ""
            yield from _step_lines(step)
    if missed := [step.stage for step in lineage.steps if step.status == "not reached"]:
        yield ""
        yield f"not reached: {', '.join(missed)}"
    if lineage.published is not None:
        yield ""
        yield "published columns, without images"
        yield from _values(lineage.published)


def _step_lines(step: Step) -> Iterator[str]:
    use = step.component["use"]
    by = f" by {use} {step.component['version']} ({step.package})" if use else ""
    yield f"{step.stage}: {step.status}{by}"
    if step.reason:
        yield f"    reason: {step.reason}"
    if step.status == "to do":
        return
    yield f"    results: stages/{step.folder}"
    weights = step.component.get("weights")
    yield from _values({"weights": weights, "options": step.options or None})
    shown_above = ("slot", "use", "version", "weights", "options")
    yield from _values({k: v for k, v in step.component.items() if k not in shown_above})
    if step.seeds:
        yield f"    seeds: {', '.join(map(str, step.seeds))}"
    shown: list[tuple[str, str]] = []
    for number, question in enumerate(step.questions, 1):
        yield from _question_lines(number, question, shown)
        shown = question.messages
    if step.unanswered:
        yield f"    {counted(step.unanswered, 'question')} without a stored answer"
    if step.note:
        yield f"    {step.note}"
    if step.output is not None:
        yield "    output:"
        yield from _values(step.output, "        ")
    if step.image:
        yield f"    image: {step.image['width']}x{step.image['height']} pixels, " + (
            f"{step.image['bytes']} bytes, sha256 {step.image['sha256']}"
        )
    if step.verdict:
        yield f"    verdict: {'' if step.verdict == 'accepted' else 'rejected: '}{step.verdict}"
    if step.seconds is not None and step.shard_seconds is not None:
        finished = f", finished {step.finished}" if step.finished else ""
        share, whole = duration(step.seconds), duration(step.shard_seconds)
        yield f"    time: {share} (its share of {whole}){finished}"


def _question_lines(
    number: int, question: Question, shown: Sequence[tuple[str, str]]
) -> Iterator[str]:
    """A question, without the leading turns that it shares with the previous one, `shown`."""
    cost = "no price" if question.cost is None else f"cost {question.cost:.6f}"
    yield (
        f"    question {number} ({question.task}, seed {question.seed}): "
        f"{question.prompt_tokens} + {question.completion_tokens} tokens, {cost}, "
        f"{duration(question.seconds)}, attempt {question.attempts}, {question.time}"
    )
    pairs = zip(question.messages, shown, strict=False)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    if same:
        yield f"        [the first {same} turns are the same as in question {number - 1}]"
    for role, text in question.messages[same:]:
        yield f"        [{role}]"
        yield from (f"          {line}" for line in text.splitlines())
    refused = "" if question.refusal is None else f"; refused: {question.refusal}"
    without = f"; given without {', '.join(question.left_out)}" if question.left_out else ""
    yield f"        [answer, {question.finish_reason}{without}{refused}]"
    yield from (f"          {line}" for line in question.answer.splitlines())


def _values(facts: dict[str, Any], indent: str = "    ") -> Iterator[str]:
    for name, value in facts.items():
        if value is not None and value != {}:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{indent}{name}: {text}"
