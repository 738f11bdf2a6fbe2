"""The sticker world as a source, the lexicon planner, and the words themselves."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pluggy
import pytest
import reasonpix_mini
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from reasonpix_mini import world
from reasonpix_mini.lexicon import Lexicon, LexiconOptions, canonical, mentioned
from reasonpix_mini.stickers import Stickers, StickersOptions

from reasonpix import hookspecs
from reasonpix.records import EditPlan, Problem, ReplaceRequest
from reasonpix.slots import SourceItem
from reasonpix.testing import PlannerContract

LEXICON = Path(reasonpix_mini.__file__).with_name("lexicon.yaml")
ROWS: dict[str, dict[str, Any]] = {}
GIVE_AWAYS: dict[str, list[str]] = {}
FRAMES: list[dict[str, str]] = []


def _read() -> None:
    lexicon = yaml.safe_load(LEXICON.read_text(encoding="utf-8"))
    ROWS.update({row["name"]: row for row in lexicon["categories"]})
    GIVE_AWAYS.update(lexicon["give_aways"])
    FRAMES.extend(lexicon["frames"])


_read()
NAMES = list(ROWS)


def tokens(text: str) -> list[str]:
    return re.findall(r"[a-zà-ÿ]+", text.lower())


def forms(name: str) -> set[str]:
    """All words that must not occur in an instruction about `name`, with their plurals."""
    row = ROWS[name]
    words = {row["name"], row["plural"], *row["synonyms"], *GIVE_AWAYS.get(name, [])}
    plurals = {word + "s" for word in words} | {word + "es" for word in words}
    return words | plurals | {word[:-1] + "ies" for word in words if word.endswith("y")}


ALL_FORMS = {word: name for name in NAMES for word in forms(name)}


def phrases(*kinds: str) -> list[tuple[str, str]]:
    return [(name, phrase) for name in NAMES for kind in kinds for phrase in ROWS[name][kind]]


# --- the words -----------------------------------------------------------------------------------


def test_every_category_has_enough_words() -> None:
    assert len(NAMES) == 32
    for name, row in ROWS.items():
        assert len(row["references"]) >= 5, name
        assert len(row["hints"]) >= 16, name
        assert len(row["held_out_hints"]) == 4, name


def test_no_phrase_names_any_category() -> None:
    for name, phrase in phrases("references", "hints", "held_out_hints"):
        named = [word for word in tokens(phrase) if word in ALL_FORMS]
        assert named == [], f"{name}: {phrase!r} says {named}"


def test_no_phrase_comes_twice() -> None:
    everything = [phrase for _, phrase in phrases("references", "hints", "held_out_hints")]
    assert sorted(everything) == sorted(set(everything))


def test_hints_are_indefinite_and_references_definite() -> None:
    for _, hint in phrases("hints", "held_out_hints"):
        assert re.match(r"(an?|something|someone|one of) \w", hint), hint
        article, first = hint.split()[:2]
        if article in ("a", "an"):
            vowel = first[0] in "aeiouAEIOU" and not first.startswith(("one", "uk", "Eu"))
            assert (article == "an") == vowel, hint
    for _, reference in phrases("references"):
        assert reference.startswith("the "), reference
    for _, phrase in phrases("references", "hints", "held_out_hints"):
        assert not phrase.endswith("."), phrase
        assert not set("{}\n") & set(phrase), phrase


EVERYWHERE = """
after again against animal before behind called children creature every favourite hands insect
instrument machine named other plant something their thing under vehicle which whose without years
"""


def test_held_out_hints_share_no_telling_word_with_training() -> None:
    """A word of five letters or more, by its first five, links hints unless it is everywhere."""

    def stems(hints: list[str]) -> set[str]:
        return {
            word[:5]
            for hint in hints
            for word in tokens(hint)
            if len(word) >= 5 and word not in EVERYWHERE.split()
        }

    shared = {
        name: stems(row["hints"]) & stems(row["held_out_hints"]) for name, row in ROWS.items()
    }
    assert not any(shared.values()), {name: words for name, words in shared.items() if words}


def test_frames_are_complete_and_name_nothing() -> None:
    assert len(FRAMES) >= 12
    for frame in FRAMES:
        assert re.findall(r"{\w+}", frame["alone"]) == ["{hint}"]
        assert sorted(re.findall(r"{\w+}", frame["among"])) == ["{hint}", "{reference}"]
        for text in frame.values():
            assert text[-1] in ".?"
            assert not [word for word in tokens(text) if word in ALL_FORMS]


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("rabbit", "rabbit"),
        ("Bunnies", "rabbit"),
        ("cacti", "cactus"),
        ("cactuses", "cactus"),
        ("puppies", "dog"),
        ("butterflies", "butterfly"),
        ("fish", "fish"),
        ("toadstools", "mushroom"),
        ("bird", None),
        ("beekeeper", None),
        ("fish bowl", None),
        ("", None),
    ],
)
def test_words_lead_to_their_category(word: str, name: str | None) -> None:
    assert canonical(word) == name


def test_mentioned_is_word_by_word() -> None:
    assert mentioned("Two BUNNIES, a street and a pancake") == {"rabbit"}


# --- the planner ---------------------------------------------------------------------------------


class TestLexiconContract(PlannerContract):
    component = Lexicon
    options: ClassVar = {"hints": "held_out"}


def plan(
    *categories: str, caption: str | None = None, seed: int = 0, hints: str = "train"
) -> EditPlan | Problem:
    text = " and ".join(f"a {name}" for name in categories) if caption is None else caption
    request = ReplaceRequest(caption=text, categories=categories, seed=seed)
    (answer,) = Lexicon(LexiconOptions.model_validate({"hints": hints})).replace([request])
    return answer


@settings(max_examples=400, deadline=None)
@given(
    st.integers(0, 2**63 - 1),
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True),
    st.sampled_from(["hints", "held_out_hints"]),
)
def test_plans(seed: int, names: list[str], kind: str) -> None:
    answer = plan(*names, seed=seed, hints="train" if kind == "hints" else "held_out")
    assert isinstance(answer, EditPlan)
    assert answer.selected in names
    assert answer.target not in names
    assert ROWS[answer.target]["group"] == ROWS[answer.selected]["group"]
    secret = forms(answer.selected) | forms(answer.target)
    assert not secret & set(tokens(answer.instruction)), answer.instruction
    assert set(answer.synonyms) <= secret - {answer.selected, answer.target}
    assert set(ROWS[answer.target]["synonyms"]) <= set(answer.synonyms)
    other = "held_out_hints" if kind == "hints" else "hints"
    assert any(hint in answer.instruction for hint in ROWS[answer.target][kind])
    assert not any(hint in answer.instruction for hint in ROWS[answer.target][other])
    if len(names) > 1:
        lower = answer.instruction.lower()
        assert any(reference in lower for reference in ROWS[answer.selected]["references"])
    assert answer.instruction[0].isupper()
    assert "{" not in answer.instruction


def test_seeds_reach_every_target_frame_and_hint() -> None:
    plans = [plan("bee", seed=seed) for seed in range(1500)]
    found = [answer for answer in plans if isinstance(answer, EditPlan)]
    assert {answer.target for answer in found} == {"butterfly", "ladybug", "snail"}
    text = "\n".join(answer.instruction for answer in found)
    for target in ("butterfly", "ladybug", "snail"):
        assert all(hint in text for hint in ROWS[target]["hints"])
    assert all(frame["alone"].split("{")[0] in text for frame in FRAMES)


def test_an_object_that_is_only_in_the_caption_is_spared_and_told_apart() -> None:
    for seed in range(60):
        answer = plan("bee", caption="a bee, a moth and a snail", seed=seed)
        assert isinstance(answer, EditPlan)
        assert answer.target == "ladybug"
        lower = answer.instruction.lower()
        assert any(reference in lower for reference in ROWS["bee"]["references"])


def test_words_are_answered_as_they_were_asked() -> None:
    answer = plan("woman", "Bunnies", caption="a woman with bunnies")
    assert isinstance(answer, EditPlan)
    assert answer.selected == "Bunnies"
    assert ROWS[answer.target]["group"] == "animals"
    assert "rabbit" in answer.synonyms


def test_unknown_categories_are_rejected() -> None:
    answer = plan("woman", "beach")
    assert answer == Problem(status="rejected", reason="knows none of the categories woman, beach")
    assert isinstance(plan(caption="nothing"), Problem)


def test_a_caption_that_names_the_whole_group_is_rejected() -> None:
    answer = plan("bee", caption="a bee, a butterfly, a ladybug and a snail")
    assert answer == Problem(status="rejected", reason="the caption already names all bugs")
    other = plan("bee", "cake", caption="a bee, a butterfly, a ladybug, a snail and a cake")
    assert isinstance(other, EditPlan)
    assert other.selected == "cake"


def test_identity_follows_the_words() -> None:
    expected = hashlib.sha256(LEXICON.read_bytes()).hexdigest()
    assert Lexicon(LexiconOptions()).identity() == {"lexicon": expected}


# --- the source ----------------------------------------------------------------------------------


def source(**options: object) -> Stickers:
    return Stickers(StickersOptions.model_validate({"split": "test", "count": 4} | options))


def listed(stickers: Stickers) -> list[SourceItem]:
    rows = list(stickers.items())
    assert all(isinstance(row, SourceItem) for row in rows)
    return rows


def test_items_are_the_scenes_and_read_gives_their_bytes() -> None:
    stickers = source(start=15)
    rows = listed(stickers)
    assert [row.native_id for row in rows] == ["test/15", "test/16", "test/17", "test/18"]
    for row, index in zip(rows, itertools.count(15), strict=False):
        data = stickers.read(row.native_id)
        assert hashlib.sha256(data).hexdigest() == row.content
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
        assert (np.asarray(image) == world.scene("test", index).render()).all()
        assert row.caption is None
    assert listed(source(start=15)) == rows


def test_splits_differ_and_captions_are_optional() -> None:
    contents = {
        row.content
        for split in ("train", "validation", "test")
        for row in listed(source(split=split))
    }
    assert len(contents) == 12
    captions = [row.caption for row in listed(source(captions=True))]
    assert captions == [world.scene("test", index).caption for index in range(4)]


@pytest.mark.parametrize("objects", [1, 3])
def test_the_number_of_objects_can_be_fixed(objects: int) -> None:
    stickers = source(objects=objects, captions=True, count=6)
    for row in listed(stickers):
        assert row.caption is not None
        assert len(mentioned(row.caption)) == objects
        assert hashlib.sha256(stickers.read(row.native_id)).hexdigest() == row.content


@pytest.mark.parametrize("native_id", ["test/4", "train/0", "test/-1", "test/x", "test", ""])
def test_reading_what_is_not_listed_is_an_os_error(native_id: str) -> None:
    with pytest.raises(OSError, match="there are test/0 to test/3"):
        source().read(native_id)


def test_options_are_checked() -> None:
    for wrong in ({"split": "dev"}, {"count": 0}, {"objects": 4}, {"start": -1}, {"seed": 1}):
        with pytest.raises(ValidationError):
            source(**wrong)


# --- the plugin ----------------------------------------------------------------------------------


def test_checkpoints_are_the_folders_with_weights() -> None:
    root = Path(reasonpix_mini.__file__).parent / "checkpoints"
    carried = reasonpix_mini.checkpoints()
    holding = {path.relative_to(root).parts[0] for path in root.rglob("*.safetensors")}
    assert carried == {f"mini/{folder}": root / folder for folder in holding}


def test_hooks_fit_the_specs() -> None:
    manager = pluggy.PluginManager("reasonpix")
    manager.add_hookspecs(hookspecs)
    manager.register(reasonpix_mini)
    manager.check_pending()
    assert manager.hook.sources() == [[Stickers]]
    assert manager.hook.planners() == [[Lexicon]]
    assert manager.hook.checkpoints() == [reasonpix_mini.checkpoints()]
