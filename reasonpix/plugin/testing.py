"""For plugin authors: the checks that a component of a slot must pass.

A contract is a class of pytest tests: subclass it, name your component, run pytest.

```python
from reasonpix.plugin.testing import CaptionerContract

class TestMyCaptioner(CaptionerContract):
    component = MyCaptioner
    options = {"model": "tests/tiny"}
```
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, get_args

import numpy as np
from PIL import Image

from reasonpix.plugin.components import (
    Component,
    Edit,
    EditRequest,
    Method,
    MethodRequest,
    PlannerTask,
    Scorer,
    SourceItem,
)
from reasonpix.plugin.types import (
    Box,
    Caption,
    Choice,
    EditPlan,
    Problem,
    ReplaceRequest,
    ResolveRequest,
    RewriteRequest,
    Rewriting,
    SelectRequest,
)

__all__ = [
    "CaptionerContract",
    "EditorContract",
    "EncoderContract",
    "EntityExtractorContract",
    "GrounderContract",
    "MethodContract",
    "PlannerContract",
    "ScorerContract",
    "SourceContract",
    "photographs",
]


def photographs() -> list[Image.Image]:
    """RGB images of awkward shapes: wide, tall, tiny and odd-sized, the same in every run."""
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (101, 37), (33, 97), (17, 16), (128, 80)]
    return [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).resize((w, h))
        for w, h in sizes
    ]


class _Contract:
    """What every component promises. `component` and `options` say which one is tested."""

    component: ClassVar[type[Component[Any]]]
    options: ClassVar[Mapping[str, Any]] = {}

    @cached_property
    def subject(self) -> Any:
        """The component, loaded."""
        subject = self.component(self.component.Options.model_validate(dict(self.options)))
        subject.load()
        return subject

    def test_options_describe_themselves(self) -> None:
        """Every option has a description."""
        for name, field in self.component.Options.model_fields.items():
            assert field.description, f"option {name} has no description"

    def test_neutral_options_exist(self) -> None:
        """`neutral` names options only."""
        assert self.component.Options.fingerprint_exclude <= set(
            self.component.Options.model_fields
        )

    def test_identity_is_json(self) -> None:
        """What enters a fingerprint can be written down."""
        json.dumps(dict(self.subject.fingerprint_facts()))

    def test_importing_is_light(self) -> None:
        """Importing the plugin imports no torch, transformers, diffusers or spacy."""
        heavy = {"torch", "transformers", "diffusers", "spacy", "datasets", "openai"}
        code = f"import sys, {self.component.__module__}; print(*set(sys.modules) & {heavy})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [], f"importing the plugin imports {done.stdout.strip()}"

    def test_it_closes_twice(self) -> None:
        """A run that is interrupted may close a component again: that does nothing."""
        _without_error(self.subject.close, "the first time")
        _without_error(self.subject.close, "again, after it was closed")

    def test_it_closes_without_load(self) -> None:
        """A component that was never loaded, or broke while it was, has nothing to give back."""
        _without_error(self.component(self.subject.options).close, "without load")

    def _same_alone_and_together(self, call: Any, *batches: Sequence[Any]) -> list[Any]:
        """Results of a batch; each must equal the result of its item alone, in any order."""
        together = call(*batches)
        assert len(together) == len(batches[0])
        backwards = call(*(list(reversed(batch)) for batch in batches))
        for i, result in enumerate(together):
            alone = call(*([batch[i]] for batch in batches))
            assert _same(alone[0], result), f"item {i} differs alone and in a batch"
            assert _same(backwards[-1 - i], result), f"item {i} depends on the order of the batch"
        return list(together)


def _without_error(close: Callable[[], None], when: str) -> None:
    try:
        close()
    except Exception as error:
        raise AssertionError(f"close() {when} raises {type(error).__name__}: {error}") from error


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Image.Image) and isinstance(other, Image.Image):
        return one.size == other.size and one.tobytes() == other.tobytes()
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and bool((one == other).all())
    return bool(one == other)


class CaptionerContract(_Contract):
    """What a captioner promises."""

    def test_captions_follow_images(self) -> None:
        """One caption each, whatever the batch."""
        for result in self._same_alone_and_together(self.subject.caption, photographs()):
            assert isinstance(result, Caption | Problem)

    def test_empty_batch(self) -> None:
        """No images, no captions."""
        assert self.subject.caption([]) == []


class EntityExtractorContract(_Contract):
    """What an entity extractor promises."""

    def test_entities_follow_captions(self) -> None:
        """A tuple each, without repeats; a caption without entities gives none."""
        texts = ["a bee and a rabbit", "a bee, a bee and a bee", "", "it is what it is"]
        captions = [Caption(text=text) for text in texts]
        for result in self._same_alone_and_together(self.subject.extract, captions):
            if not isinstance(result, Problem):
                names = [entity.category for entity in result]
                assert len(names) == len(set(names))


class GrounderContract(_Contract):
    """What a grounder promises."""

    def test_groundings_follow_categories(self) -> None:
        """One grounding per category in the order asked; boxes belong to the image given."""
        images = photographs()
        asked = [("bee",), ("rabbit", "bee"), (), ("apple",), ("drum", "cake", "bee")]
        results = self._same_alone_and_together(self.subject.ground, images, asked)
        for image, categories, result in zip(images, asked, results, strict=True):
            if isinstance(result, Problem):
                continue
            assert [grounding.category for grounding in result] == list(categories)
            for grounding in result:
                if grounding.box:
                    assert (grounding.box.width, grounding.box.height) == image.size


class PlannerContract(_Contract):
    """What a planner promises, in each of the verbs that it can do."""

    requests: ClassVar[Sequence[ReplaceRequest]] = [
        ReplaceRequest(caption="a bee and a rabbit", categories=("bee", "rabbit"), seed=seed)
        for seed in range(4)
    ]
    rewrites: ClassVar[Sequence[RewriteRequest]] = [
        RewriteRequest(
            caption="a bee on a daisy",
            edited_caption="a bee on a sunflower",
            instruction="turn the daisy into a sunflower",
            seed=seed,
        )
        for seed in range(4)
    ]
    selects: ClassVar[Sequence[SelectRequest]] = [
        SelectRequest(
            caption="a bee on a daisy",
            edited_caption="a bee on a sunflower",
            instruction="turn the daisy into a sunflower",
            candidates=candidates,
            seed=seed,
        )
        for seed, candidates in enumerate(
            [
                ("Let it land where cooking oil is pressed from.",),
                ("It likes them taller.", "It wants a bloom that follows the light all day."),
                ("It wants a bloom that follows the light all day.", "It likes them taller."),
            ]
        )
    ]
    resolves: ClassVar[Sequence[ResolveRequest]] = [
        ResolveRequest(
            caption="a bee on a daisy",
            instruction="It wants a bloom that follows the light all day.",
            options=options,
            seed=seed,
        )
        for seed, options in enumerate([("sunflower", "rose"), ("tulip", "sunflower", "rose")])
    ]

    def test_it_can_do_something(self) -> None:
        """A planner without a verb stands in no recipe."""
        verbs: tuple[PlannerTask, ...] = get_args(PlannerTask)
        assert any(self.subject.can(verb) for verb in verbs)

    def test_prompt_identities_are_json(self) -> None:
        """What enters the fingerprint of each verb can be written down."""
        for verb in get_args(PlannerTask):
            if self.subject.can(verb):
                json.dumps(dict(self.subject.prompt_identity(verb)))

    def test_rewritings_follow_requests(self) -> None:
        """An instruction that says something each, other than the direct one."""
        if not self.subject.can("rewrite"):
            return
        results = self._same_alone_and_together(self.subject.rewrite, self.rewrites)
        for request, result in zip(self.rewrites, results, strict=True):
            if isinstance(result, Rewriting):
                assert result.instruction.strip()
                assert result.instruction != request.instruction

    def test_selections_follow_requests(self) -> None:
        """One of the candidates each."""
        if not self.subject.can("select"):
            return
        results = self._same_alone_and_together(self.subject.select, self.selects)
        for request, result in zip(self.selects, results, strict=True):
            if isinstance(result, Choice):
                assert result.index < len(request.candidates)

    def test_resolutions_follow_requests(self) -> None:
        """One of the options each."""
        if not self.subject.can("resolve"):
            return
        results = self._same_alone_and_together(self.subject.resolve, self.resolves)
        for request, result in zip(self.resolves, results, strict=True):
            if isinstance(result, Choice):
                assert result.index < len(request.options)

    def test_plans_follow_requests(self) -> None:
        """The selected category is one that was asked, and not the target."""
        if not self.subject.can("replace"):
            return
        results = self._same_alone_and_together(self.subject.replace, self.requests)
        for request, result in zip(self.requests, results, strict=True):
            if isinstance(result, EditPlan):
                assert result.selected in request.categories
                assert result.target != result.selected
                assert result.instruction.strip()


class _EditsContract(_Contract):
    """What edits images promises: an editor, a method."""

    verb: ClassVar[str]
    """Its method that takes the requests."""

    def requests(self) -> list[Any]:
        """What is asked of it, each with an image."""
        raise NotImplementedError

    def test_edits_follow_requests(self) -> None:
        """An RGB image of the same size each, the same whatever the batch."""
        requests = self.requests()
        results = self._same_alone_and_together(getattr(self.subject, self.verb), requests)
        for request, result in zip(requests, results, strict=True):
            if not isinstance(result, Problem):
                assert result.size == request.image.size
                assert result.mode == "RGB"

    def test_input_is_left_alone(self) -> None:
        """The request's image is not drawn on."""
        requests = self.requests()[:1]
        before = requests[0].image.tobytes()
        getattr(self.subject, self.verb)(requests)
        assert requests[0].image.tobytes() == before


class EditorContract(_EditsContract):
    """What an editor promises."""

    verb = "edit"

    def requests(self) -> list[EditRequest]:
        """An edit of each photograph."""
        return [
            EditRequest(
                image=image,
                box=Box(
                    x0=image.width / 4,
                    y0=image.height / 4,
                    x1=image.width * 0.8,
                    y1=image.height * 0.7,
                    width=image.width,
                    height=image.height,
                ),
                selected="bee",
                target="rabbit",
                caption="a bee",
                seed=number,
            )
            for number, image in enumerate(photographs())
        ]


class MethodContract(_EditsContract):
    """What a method of an evaluation promises."""

    component: ClassVar[type[Method[Any]]]
    verb = "apply"

    def requests(self) -> list[MethodRequest]:
        """Two edits of each photograph, of which one does not tell what the edited image shows."""
        return [
            MethodRequest(image, instruction, seed, "a bee", edited_caption)
            for seed, image in enumerate(photographs())
            for instruction, edited_caption in [
                ("turn the bee into a rabbit", "a rabbit"),
                ("something with long ears", ""),
            ]
        ]

    def test_empty_batch(self) -> None:
        """No requests, no edits."""
        assert self.subject.apply([]) == []

    def test_it_sees_captions(self) -> None:
        """`requires` names captions that not every benchmark has; without them there is no edit."""
        assert self.component.requires <= {"caption", "edited_caption"}
        for field in self.component.requires:
            nothing: dict[str, Any] = {field: ""}
            lacking = [dataclasses.replace(it, **nothing) for it in self.requests()[:2]]
            assert all(isinstance(it, Problem) for it in self.subject.apply(lacking)), field


class EncoderContract(_Contract):
    """What an MLLM encoder promises."""

    def test_states_follow_pairs(self) -> None:
        """float32 (tokens, width), one width for all."""
        images = photographs()
        instructions = ["make it red", "more", "it is cold outside", "a b c", "Summer!"]
        widths = set()
        for states in self._same_alone_and_together(self.subject.encode, images, instructions):
            if isinstance(states, Problem):
                continue
            assert states.dtype == np.float32
            assert states.ndim == 2
            widths.add(states.shape[1])
        assert len(widths) <= 1


class SourceContract(_Contract):
    """What a source promises."""

    def test_items_are_stable_and_readable(self) -> None:
        """The same rows in the same order each time, and bytes that hash to what was said."""
        items = list(self.subject.items())
        assert items, "the source lists nothing"
        assert list(self.subject.items()) == items
        found = [item for item in items if isinstance(item, SourceItem)]
        names = [item.native_id for item in found]
        assert len(names) == len(set(names)), "a native id is given twice"
        for item in reversed(found):
            content = hashlib.sha256(self.subject.read(item.native_id)).hexdigest()
            assert content == item.content, f"{item.native_id} reads other bytes than listed"

    def test_pairs_are_whole(self) -> None:
        """All items are pairs or none is; edited images hash to what was said."""
        for item in self.subject.items():
            if not isinstance(item, SourceItem):
                continue
            if not self.subject.gives_pairs:
                assert item.pair is None, f"{item.native_id} is a pair, which `gives_pairs` denies"
                continue
            assert item.pair is not None, f"{item.native_id} is no pair"
            content = hashlib.sha256(self.subject.read_edited(item.native_id)).hexdigest()
            assert content == item.pair.content, (
                f"the edited image of {item.native_id} reads other bytes than listed"
            )


class ScorerContract(_Contract):
    """What a scorer promises. `pipeline` holds the loaded components that it uses."""

    component: ClassVar[type[Scorer[Any]]]
    pipeline: ClassVar[Mapping[str, Component[Any]]] = {}

    def edits(self) -> list[Edit]:
        """An edit of each photograph that turns its middle upside down; all about it is known."""
        return [_upside_down(image, seed) for seed, image in enumerate(photographs())]

    def test_scores_follow_edits(self) -> None:
        """The same finite numbers under the same names for each, whatever the batch."""
        results = self._same_alone_and_together(
            lambda edits: self.subject.score(edits, self.pipeline), self.edits()
        )
        scores = [result for result in results if not isinstance(result, Problem)]
        assert all(math.isfinite(value) for score in scores for value in score.values())
        assert len({frozenset(score) for score in scores}) <= 1

    def test_it_sees_what_there_is(self) -> None:
        """`requires` names fields of an edit that not every recipe can give."""
        fields = {field.name for field in dataclasses.fields(Edit)}
        always = {"read_input", "read_edited", "seed", "caption"}
        assert self.component.requires <= fields - always

    def test_verdicts_follow_scores(self) -> None:
        """A reason or None for each, and none for no scores."""
        results = self.subject.score(self.edits(), self.pipeline)
        scores = [result for result in results if not isinstance(result, Problem)]
        verdicts = self.subject.reject(scores)
        assert len(verdicts) == len(scores)
        assert all(verdict is None or verdict for verdict in verdicts)
        assert self.subject.reject([]) == []


def _upside_down(image: Image.Image, seed: int) -> Edit:
    w, h = image.size
    box = Box(x0=w / 4, y0=h / 4, x1=w * 0.8, y1=h * 0.7, width=w, height=h)
    edited = image.copy()
    edited.paste(image.crop(box.pixels()).rotate(180), box.pixels())
    return Edit(
        read_input=lambda: image,
        read_edited=lambda: edited,
        seed=seed,
        caption="a bee on a daisy",
        instruction="Something with ears.",
        box=box,
        selected="bee",
        target="rabbit",
        synonyms=("bumblebee", "bunny"),
        edited_caption="a rabbit on a daisy",
        direct_instruction="turn the bee into a rabbit",
        candidates=("Something with ears.", "What comes out of a magician's hat?"),
        revealing=("bee", "rabbit"),
        agreement=0.5,
    )
