"""Preference pairs of Part I: what P_select chose against what it did not, to train a P_gen with.

The rows are those that TRL's trainers call conversational, with an explicit prompt: `prompt`,
`chosen` and `rejected` are lists of messages. The prompt is the very conversation that the planner
was asked to continue, and the answers are in the form it asks for, so that the trained model can
take the planner's place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reasonpix.core.parallel import Size
from reasonpix.datasets.writers import (
    TEXT,
    Feature,
    Row,
    Written,
    many,
    schema_of,
    value,
    write_rows,
)
from reasonpix.errors import RecipeError, RunError
from reasonpix.generation.outcomes import Outcome, read_stages
from reasonpix.generation.run_folder import RunFolder
from reasonpix.llm.prompts import Prompt
from reasonpix.llm.tasks import REWRITE
from reasonpix.llm.types import Message
from reasonpix.plugin.samples import Sample
from reasonpix.plugin.types import RewriteRequest, Rewriting

_TURNS = many({"role": TEXT, "content": TEXT})

FEATURES: Mapping[str, Feature] = {
    "prompt": _TURNS,
    "chosen": _TURNS,
    "rejected": _TURNS,
    "record_id": TEXT,
    "agreement": value("float32"),
    "chosen_votes": value("int32"),
    "rejected_votes": value("int32"),
}

FILE = Size(rows=100_000, bytes=500_000_000)
GROUP = Size(rows=1000, bytes=16_000_000)


def prompt_of(run: RunFolder) -> Prompt[Any, Any, Any]:
    """P_gen as the run asked it: the planner's own file, or the built-in one.

    Raises `RunError` when the run rewrote nothing, or its prompt is no more what it was.
    """
    entry = next((entry for entry in read_stages(run) if entry.stage == "rewrite"), None)
    if entry is None:
        raise RunError(
            f"{run} holds no candidates: preference pairs come from runs that rewrite instructions "
            "(Part I), those of a recipe without an editor"
        )
    named = (entry.options.get("prompts") or {}).get("rewrite")
    try:
        prompt: Prompt[Any, Any, Any] = Prompt(REWRITE, Path(named) if named else None)
    except RecipeError as error:
        raise RunError(f"the prompt of P_gen that {run} asked with: {error}") from error
    # A planner that is no LLM has none: what an LLM would be asked in its place is the built-in.
    if entry.component.get("prompt") not in (None, prompt.digest):
        where = named or "the built-in prompt of this version of reasonpix"
        raise RunError(
            f"{where} is not what {run} asked P_gen with (its SHA-256 was "
            f"{entry.component['prompt']}); bring it back, or run `reasonpix generate` again"
        )
    return prompt


def write_preference(
    accepted: Iterator[Outcome], folder: Path, prompt: Prompt[Any, Any, Any], size: Size = FILE
) -> Written:
    """`data/train-00000.parquet` …: a row for each distinct candidate that was not chosen.

    Raises `RunError` when P_select never had a choice.
    """
    asked = single = ties = 0

    def rows() -> Iterator[Row]:
        nonlocal asked, single, ties
        for outcome in accepted:
            found = list(_rows(outcome.sample, prompt))
            asked += bool(found)
            single += bool(found) and found[0]["agreement"] is None
            ties += sum(row["chosen_votes"] == row["rejected_votes"] for row in found)
            yield from found

    total = write_rows(rows(), schema_of(FEATURES), folder, size, GROUP, _weigh)
    if total == 0:
        raise RunError(
            "no accepted sample had two candidates to choose from; set candidates: 4 or more"
        )
    notes = [f"The pairs are of {asked} sample{'s' * (asked != 1)}."]
    if ties:
        notes.append(
            f"Ties: {ties}, where as many orders chose the rejected candidate as the chosen "
            "one, which came first. Leave them out with `chosen_votes > rejected_votes`."
        )
    if single:
        notes.append(
            f"Of {single} sample{'s' * (single != 1)} P_select answered in one order only: there "
            "`agreement` is unknown, and null."
        )
    return Written(total, tuple(notes))


def _rows(sample: Sample, prompt: Prompt[Any, Any, Any]) -> Iterator[Row]:
    """The pairs of a sample; none when its candidate was chosen unasked."""
    given, chosen, pair = sample.candidates, sample.selection, sample.item.pair
    if given is None or chosen is None or not chosen.asked:
        return
    assert pair is not None and pair.caption is not None and sample.caption is not None
    request = RewriteRequest(
        caption=sample.caption.text,
        edited_caption=pair.caption,
        instruction=pair.instruction,
        seed=0,  # no word of the conversation hangs on it
    )
    messages = [turn.model_dump() for turn in prompt.conversation(request).messages]
    best = given.candidates[chosen.chosen]
    # P_select saw equal candidates once, by the index of the first.
    texts = [candidate.instruction for candidate in given.candidates]
    for index, candidate in enumerate(given.candidates):
        if candidate.instruction == best.instruction or texts.index(texts[index]) != index:
            continue
        yield {
            "prompt": messages,
            "chosen": [_answer(best, prompt)],
            "rejected": [_answer(candidate, prompt)],
            "record_id": sample.record_id,
            "agreement": chosen.agreement if len(chosen.choices) > 1 else None,
            "chosen_votes": chosen.choices.count(chosen.chosen),
            "rejected_votes": chosen.choices.count(index),
        }


def _answer(candidate: Rewriting, prompt: Prompt[Any, Any, Any]) -> dict[str, str]:
    """The answer that gives this candidate, its keys in the order of the prompt's schema."""
    fields = candidate.model_dump(mode="json")
    ordered = {name: fields[name] for name in prompt.answer_schema["properties"]}
    content = json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))
    return Message(role="assistant", content=content).model_dump()


def _weigh(row: Row) -> int:
    turns = (*row["prompt"], *row["chosen"], *row["rejected"])
    return sum(len(turn["content"]) for turn in turns)
