"""Preference pairs of Part I, to train a P_gen: the candidate P_select chose, and one it did not.

The rows are in TRL's conversational format with an explicit prompt: `prompt`, `chosen` and
`rejected` are lists of messages. The prompt is the conversation that the planner sent, and the
answers have the form it asks for, so the trained model can replace the planner.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reasonpix.core.figures import counted
from reasonpix.core.parallel import Size
from reasonpix.datasets.columns import TEXT, Feature, Row, list_of, schema_of, value
from reasonpix.datasets.writers import Written, write_rows
from reasonpix.errors import RecipeError, RunError
from reasonpix.generation.outcomes import Outcome, read_stages
from reasonpix.generation.run_folder import RunFolder
from reasonpix.llm.prompts import Prompt
from reasonpix.llm.tasks import REWRITE
from reasonpix.llm.types import Message
from reasonpix.plugin.samples import Sample
from reasonpix.plugin.types import RewriteRequest, Rewriting

_TURNS = list_of({"role": TEXT, "content": TEXT})

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
    """The prompt P_gen of a run: the planner's own file, or the built-in one.

    Raises `RunError` if the run rewrote nothing, or if the prompt has changed since.
    """
    entry = next((entry for entry in read_stages(run) if entry.stage == "rewrite"), None)
    if entry is None:
        raise RunError(
            f"{run} has no candidates: preference pairs need a run that rewrites instructions "
            "(Part I: a recipe without an editor)"
        )
    prompt_file = (entry.options.get("prompts") or {}).get("rewrite")
    try:
        prompt: Prompt[Any, Any, Any] = Prompt(REWRITE, Path(prompt_file) if prompt_file else None)
    except RecipeError as error:
        raise RunError(f"the prompt P_gen of {run}: {error}") from error
    # Planners that are not LLMs have no prompt: the built-in one takes its place.
    if entry.component.get("prompt") not in (None, prompt.digest):
        where = prompt_file or "the built-in prompt of this version of reasonpix"
        raise RunError(
            f"{where} is not the prompt P_gen of {run} (its SHA-256 was "
            f"{entry.component['prompt']}); restore it, or run `reasonpix generate` again"
        )
    return prompt


def write_preference(
    accepted: Iterator[Outcome], folder: Path, prompt: Prompt[Any, Any, Any], size: Size = FILE
) -> Written:
    """`data/train-00000.parquet` …: a row for each distinct candidate that was not chosen.

    Raises `RunError` if samples were accepted and none of them gives a pair.
    """
    samples = single = ties = 0
    without_choice = Counter[str]()

    def rows() -> Iterator[Row]:
        nonlocal samples, single, ties
        for outcome in accepted:
            pairs = list(_rows(outcome.sample, prompt))
            samples += bool(pairs)
            single += bool(pairs) and pairs[0]["agreement"] is None
            ties += sum(row["chosen_votes"] == row["rejected_votes"] for row in pairs)
            if not pairs:
                without_choice[_missing_choice(outcome.sample)] += 1
            yield from pairs

    total = write_rows(rows(), schema_of(FEATURES), folder, size, GROUP, _weigh)
    causes = "; ".join(f"{counted(n, 'sample')} {why}" for why, n in sorted(without_choice.items()))
    if total == 0 and without_choice:
        raise RunError(
            f"{counted(without_choice.total(), 'accepted sample')}, but none gives a pair: {causes}"
        )
    notes = [f"The pairs come from {counted(samples, 'sample')}."]
    if without_choice:
        notes.append(f"Accepted samples that give no pair: {causes}.")
    if ties:
        notes.append(
            f"Ties: {ties}, where as many orders chose the rejected candidate as the chosen "
            "one; the earlier order decided. Filter them out with `chosen_votes > rejected_votes`."
        )
    if single:
        notes.append(
            f"P_select answered in one order only for {counted(single, 'sample')}; their "
            "`agreement` is null."
        )
    return Written(total, FEATURES, tuple(notes))


def _rows(sample: Sample, prompt: Prompt[Any, Any, Any]) -> Iterator[Row]:
    """The pairs of a sample; none if its only candidate was chosen without asking."""
    selection, pair = sample.selection, sample.item.pair
    if sample.candidates is None or selection is None or not selection.asked:
        return
    assert pair is not None and pair.caption is not None and sample.caption is not None
    request = RewriteRequest(
        caption=sample.caption.text,
        edited_caption=pair.caption,
        instruction=pair.instruction,
        seed=0,  # not part of the conversation
    )
    messages = [turn.model_dump() for turn in prompt.conversation(request).messages]
    candidates = sample.candidates.candidates
    best = candidates[selection.chosen]
    # P_select saw equal candidates once, by the index of the first.
    texts = [candidate.instruction for candidate in candidates]
    for index, candidate in enumerate(candidates):
        if candidate.instruction == best.instruction or texts.index(candidate.instruction) != index:
            continue
        yield {
            "prompt": messages,
            "chosen": [_answer(best, prompt)],
            "rejected": [_answer(candidate, prompt)],
            "record_id": sample.record_id,
            "agreement": selection.agreement if len(selection.choices) > 1 else None,
            "chosen_votes": selection.choices.count(selection.chosen),
            "rejected_votes": selection.choices.count(index),
        }


def _missing_choice(sample: Sample) -> str:
    """Why an accepted sample gives no pair, and how to change that."""
    count = len(sample.candidates.candidates) if sample.candidates else 0
    if count > 1:
        return (
            "had only equal candidates (raise the planner's `temperature`, or the number of "
            "`candidates`)"
        )
    return "had a single candidate (set `candidates: 4` or more, and generate again)"


def _answer(candidate: Rewriting, prompt: Prompt[Any, Any, Any]) -> dict[str, str]:
    """The answer that gives this candidate, its keys in the order of the prompt's schema."""
    fields = candidate.model_dump(mode="json")
    ordered = {name: fields[name] for name in prompt.answer_schema["properties"]}
    content = json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))
    return Message(role="assistant", content=content).model_dump()


def _weigh(row: Row) -> int:
    turns = (*row["prompt"], *row["chosen"], *row["rejected"])
    return sum(len(turn["content"]) for turn in turns)
