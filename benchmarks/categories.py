"""Precision and recall of the extractor `spacy` on the captions of plugins/spacy/captions.yaml.

    python benchmarks/categories.py                    # both halves, and each kind of the test half
    python benchmarks/categories.py --show dev         # also what is missed or wrong in one half
    python benchmarks/categories.py --model en_core_web_lg

The rules were tuned on the half `dev` only; `test` shows what they do to other captions. "noun
chunks" are the lemmas of the heads of spaCy's own noun chunks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from reasonpix_spacy import Spacy, SpacyOptions, package

from reasonpix.plugin import Caption

CAPTIONS = Path(__file__).parents[1] / "plugins" / "spacy" / "captions.yaml"


@dataclass(frozen=True)
class Case:
    """A caption, and the categories that a person found in it."""

    kind: str
    half: str
    caption: str
    expected: frozenset[str]


@dataclass(frozen=True)
class Counts:
    """Micro precision and recall: over all categories of all captions."""

    captions: int
    all_right: int
    expected: int
    found: int
    right: int

    @property
    def precision(self) -> str:
        """Share of the categories found that a person found too."""
        return f"{self.right / self.found:.3f}" if self.found else "-"

    @property
    def recall(self) -> str:
        """Share of the categories of a person that were found."""
        return f"{self.right / self.expected:.3f}" if self.expected else "-"


def read_cases(path: Path = CAPTIONS) -> list[Case]:
    """Read a file of captions."""
    kinds = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [
        Case(kind, half, caption, frozenset(expected))
        for kind, halves in kinds.items()
        for half, captions in halves.items()
        for caption, expected in captions.items()
    ]


def extracted(texts: Sequence[str], model: str = "en_core_web_sm") -> list[frozenset[str]]:
    """The categories of each text, from the plugin."""
    extractor = Spacy(SpacyOptions(model=model))
    extractor.load()
    results = extractor.extract([Caption(text=text) for text in texts])
    extractor.close()
    return [frozenset(entity.category for entity in result) for result in results]


def chunked(texts: Sequence[str], model: str) -> list[frozenset[str]]:
    """The heads of spaCy's noun chunks."""
    import spacy

    pipeline: Any = spacy.load(package(model))
    return [
        frozenset(
            chunk.root.lemma_.lower() for chunk in doc.noun_chunks if chunk.root.pos_ != "PRON"
        )
        for doc in pipeline.pipe(texts)
    ]


def count(cases: Sequence[Case], found: Sequence[frozenset[str]]) -> Counts:
    """Compare what was found with what was expected."""
    pairs = [(case.expected, categories) for case, categories in zip(cases, found, strict=True)]
    return Counts(
        captions=len(pairs),
        all_right=sum(expected == categories for expected, categories in pairs),
        expected=sum(len(expected) for expected, _ in pairs),
        found=sum(len(categories) for _, categories in pairs),
        right=sum(len(expected & categories) for expected, categories in pairs),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=Path, default=CAPTIONS, help="another file of this form")
    parser.add_argument("--model", default="en_core_web_sm", help="a pipeline of spaCy")
    parser.add_argument("--show", choices=("dev", "test"), help="list the errors of one half")
    arguments = parser.parse_args()
    cases = read_cases(arguments.captions)
    texts = [case.caption for case in cases]
    found = extracted(texts, arguments.model)
    chunks = chunked(texts, arguments.model)

    def row(name: str, results: Sequence[frozenset[str]], keep: Callable[[Case], bool]) -> None:
        pairs = [pair for pair in zip(cases, results, strict=True) if keep(pair[0])]
        counts = count([case for case, _ in pairs], [categories for _, categories in pairs])
        if counts.captions:
            print(
                f"{name:26} {counts.captions:8} {counts.precision:>9} {counts.recall:>7} "
                f"{counts.all_right:5}/{counts.captions}"
            )

    print(f"{'':26} captions precision  recall  all right")
    for half in ("dev", "test"):
        row(f"{half}, noun chunks", chunks, lambda case, half=half: case.half == half)
        row(half, found, lambda case, half=half: case.half == half)
    for kind in dict.fromkeys(case.kind for case in cases):
        row(f"  {kind}", found, lambda case, kind=kind: (case.kind, case.half) == (kind, "test"))
    for case, categories in zip(cases, found, strict=True):
        if case.half == arguments.show and case.expected != categories:
            missed, wrong = case.expected - categories, categories - case.expected
            print(f"{case.caption!r}: missed {sorted(missed)}, wrong {sorted(wrong)}")


if __name__ == "__main__":
    main()
