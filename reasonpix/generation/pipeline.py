"""The stages of a recipe: which component computes what, and what its results depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from reasonpix.core.hashing import fingerprint
from reasonpix.errors import RunError
from reasonpix.generation.outcomes import StageEntry
from reasonpix.generation.recipe import Recipe
from reasonpix.generation.resources import Resources
from reasonpix.generation.scoring import SCORE
from reasonpix.plugin import registry
from reasonpix.plugin.components import Component, Planner, PlannerTask, Scorer
from reasonpix.plugin.samples import ImageFacts, Sample
from reasonpix.plugin.spec import ComponentSpec
from reasonpix.plugin.stages import Result, StageSpec
from reasonpix.plugin.types import Problem


@dataclass(frozen=True)
class Stage:
    """A stage of one recipe: what it runs, and the fingerprint of what its results depend on."""

    spec: StageSpec
    use: ComponentSpec | None
    entry: StageEntry
    upstream: tuple[StageEntry, ...]
    """The stages that must let a record through. A filter among them is applied before this."""
    settings: Mapping[str, int] = field(default_factory=dict)
    """The recipe's settings that its function takes."""
    needs: tuple[ComponentSpec, ...] = ()
    """Components of other slots that it calls."""
    questions: tuple[PlannerTask, int] | None = None
    """What it asks a planner, and how often, for each record."""
    resources: Resources = field(default_factory=Resources)

    @property
    def name(self) -> str:
        """The name of the stage."""
        return self.spec.name

    @property
    def components(self) -> tuple[ComponentSpec, ...]:
        """All components that it calls."""
        return (*((self.use,) if self.use else ()), *self.needs)

    @property
    def needs_images(self) -> bool:
        """Whether it decodes the images of every record, so that decoding ahead pays off."""
        return self.spec.needs_images and self.use is not None

    @property
    def gates(self) -> tuple[StageEntry, ...]:
        """The filters before it: they decide by the scores of the whole run."""
        return tuple(entry for entry in self.upstream if entry.is_score)

    def compute(
        self, samples: Sequence[Sample], components: Mapping[str, Component[Any]]
    ) -> list[Result]:
        """One result for each sample; `components` are loaded, by slot.

        Raises `RunError` if the stage returns another number of results.
        """
        pipeline = {"pipeline": components} if self.entry.is_score else {}
        component = components.get(self.use.slot) if self.use else None
        results = self.spec.function(samples, component, **pipeline, **self.settings)
        if not isinstance(results, list) or len(results) != len(samples):
            got = f"a list of {len(results)}" if isinstance(results, list) else repr(results)
            raise RunError(
                f"stage {self.name!r} returned {got} for {len(samples)} samples; "
                "it returns a list with one result for each sample, in the same order"
            )
        return [
            _checked(self.spec, sample, result)
            for sample, result in zip(samples, results, strict=True)
        ]


def _checked(spec: StageSpec, sample: Sample, result: Result) -> Result:
    """The result, or a problem that says what its stage's declaration does not allow."""
    # By the class itself: pydantic takes long to say what is an instance.
    if type(result) is spec.output and spec.image is None:
        return result
    if isinstance(result, Problem):
        return Problem(status=result.status, reason=result.reason)
    if mistake := _mistake(spec, sample, result):
        return Problem(status="failed", reason=f"stage {spec.name!r} {mistake}")
    return result


def _mistake(spec: StageSpec, sample: Sample, result: Any) -> str:
    """What a stage's result has that its declaration does not allow; empty for a good one."""
    output, *images = result if isinstance(result, tuple) else (result,)
    if type(output) is not spec.output:  # what a subclass adds could not be read back
        return f"returned {type(output).__name__} where {spec.output.__name__} is declared"
    if spec.image is None:
        what = "returned an image, but declares none: set `image` in its StageSpec"
        return what if images else ""
    if len(images) != 1 or not isinstance(images[0], Image):
        return f"declares the image {spec.image!r}, but did not return one with its output"
    [image] = images
    facts = sample.output("read", ImageFacts)
    size = (facts.width, facts.height) if facts else image.size
    # A stored image is read back as RGB: another mode would change when the stage is reused.
    if (image.mode, image.size) != ("RGB", size):
        width, height = image.size
        return (
            f"returned an image of mode {image.mode} and {width}x{height} pixels; "
            f"it must be RGB and of the input's size, {size[0]}x{size[1]}"
        )
    return ""


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, in the order of the data.

    Each fingerprint covers the stage's own component and everything before it. Filters come last;
    before a stage with `filters_first` run those that can decide by then, and it follows them.
    """
    graph = _StageGraphBuilder(recipe)
    waiting = list(recipe.filters)
    shown: set[str] = set()
    for spec in recipe.chain:
        if spec.filters_first:
            ready = [use for use in waiting if _scorer(use).requires <= shown]
            waiting = [use for use in waiting if use not in ready]
            for use in ready:
                graph.add_filter(use, is_gate=True)
        graph.add(spec)
        shown |= {spec.name, *spec.shows}
    for use in waiting:
        graph.add_filter(use)
    return graph.stages


class _StageGraphBuilder:
    """Stages that follow one another."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.stages: list[Stage] = []
        self._upstream: tuple[StageEntry, ...] = ()
        self._before = ""
        """What the next stage depends on: the folder before it, and the filters that gate it."""

    def add(self, spec: StageSpec) -> None:
        """A stage that all later ones follow."""
        questions = (
            (spec.task, spec.questions(self._recipe.settings)) if spec.task is not None else None
        )
        entry = self._add(spec, self._recipe.component(spec.slot), questions)
        self._upstream = (*self._upstream, entry)
        self._before = entry.folder

    def add_filter(self, use: ComponentSpec, is_gate: bool = False) -> None:
        """The stage that scores edits for a filter. What a gate rejects goes no further."""
        needs = tuple(self._recipe.pipeline[slot] for slot in sorted(_scorer(use).needs_slots))
        tasks = [task for other in needs if (task := registry.slot(other.slot).task) is not None]
        spec = dataclasses.replace(SCORE, name=f"score-{use.name}")
        entry = self._add(spec, use, (tasks[0], 1) if tasks else None, needs)
        if is_gate:
            self._upstream = (*self._upstream, entry)
            # Its thresholds decide which records continue, but do not change its scores.
            self._before = fingerprint([entry.folder, entry.options])

    def _add(
        self,
        spec: StageSpec,
        use: ComponentSpec | None,
        questions: tuple[PlannerTask, int] | None,
        needs: tuple[ComponentSpec, ...] = (),
    ) -> StageEntry:
        settings = {name: self._recipe.settings[name] for name in spec.settings}
        facts = _facts(use, spec.task) | ({"settings": settings} if settings else {})
        if needs:
            facts["uses"] = [_facts(other, registry.slot(other.slot).task) for other in needs]
        entry = StageEntry(
            stage=spec.name,
            folder=f"{spec.name}-{fingerprint([spec.name, facts, self._before])}",
            component=facts,
            options=use.options.model_dump(mode="json") if use else {},
        )
        resources = self._recipe.resources.get(spec.name, Resources())
        self.stages.append(
            Stage(spec, use, entry, self._upstream, settings, needs, questions, resources)
        )
        return entry


def _facts(use: ComponentSpec | None, task: PlannerTask | None) -> dict[str, Any]:
    """What a component's results depend on, beside its input."""
    if use is None:
        return {"use": None}
    facts = registry.fingerprint_facts(use.slot, use.name, use.options)
    if task:
        planner = use.build()
        assert isinstance(planner, Planner)
        facts |= planner.prompt_identity(task)
    return facts


def _scorer(use: ComponentSpec) -> type[Scorer[Any]]:
    scorer = registry.find("filter", use.name)
    assert issubclass(scorer, Scorer)
    return scorer
