"""The stages of a recipe: which component computes what, and what its results follow from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reasonpix.core.hashing import fingerprint
from reasonpix.generation import stages
from reasonpix.generation.outcomes import StageEntry
from reasonpix.generation.recipe import Recipe
from reasonpix.generation.resources import Resources
from reasonpix.generation.samples import Sample
from reasonpix.generation.stages import Result
from reasonpix.plugin import registry
from reasonpix.plugin.components import Component, Planner, PlannerTask, Scorer
from reasonpix.plugin.spec import ComponentSpec


@dataclass(frozen=True)
class Stage:
    """A stage of one recipe: what it runs, and the fingerprint of all its results follow from."""

    name: str
    use: ComponentSpec | None
    compute: Callable[[Sequence[Sample], dict[str, Component[Any]]], list[Result]]
    entry: StageEntry
    follows: tuple[StageEntry, ...]
    """The stages that must let a record through. A filter among them is applied before this."""
    needs: tuple[ComponentSpec, ...] = ()
    """Components beside its own that it calls."""
    questions: tuple[PlannerTask, int] | None = None
    """What a planner is asked, and how often, for each record."""
    sees_images: bool = False
    """Whether it needs the images of every record, so that they are worth decoding ahead."""
    resources: Resources = field(default_factory=Resources)

    @property
    def gates(self) -> tuple[StageEntry, ...]:
        """The filters that it follows: they decide by the scores of the whole run."""
        return tuple(entry for entry in self.follows if entry.is_score)


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, in the order of the data.

    Each fingerprint covers the stage's own component and all that it follows.
    """
    if recipe.editor is None:
        return _rewriting(recipe)
    return _replacing(recipe)


class _Chain:
    """Stages that follow from one another."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.stages: list[Stage] = []
        self.follows: tuple[StageEntry, ...] = ()
        self.before = ""

    def add(
        self,
        name: str,
        function: Any,
        use: ComponentSpec | None,
        verb: PlannerTask | None = None,
        times: int = 1,
        **settings: Any,
    ) -> None:
        """A stage that all later ones follow."""
        slot = use.slot if use else ""
        seed = {"run_seed": self.recipe.seed} if verb or slot == "editor" else {}
        given = settings | seed
        facts = _facts(use, verb) | ({"settings": given} if given else {})
        compute = lambda samples, parts: function(samples, parts.get(slot), **given)  # noqa: E731
        entry = self._entry(name, facts, use)
        self.stages.append(
            Stage(
                name,
                use,
                compute,
                entry,
                self.follows,
                questions=(verb, times) if verb else None,
                sees_images=slot in ("source", "captioner", "grounder", "editor"),
                resources=self._resources(name),
            )
        )
        self.follows = (*self.follows, entry)
        self.before = entry.folder

    def score(self, use: ComponentSpec, is_gate: bool = False) -> None:
        """A filter's measurement; as a gate, what it rejects goes no further."""
        scorer = registry.find("filter", use.name)
        assert issubclass(scorer, Scorer)
        named = [getattr(self.recipe, slot) for slot in sorted(scorer.needs_slots)]
        questions: tuple[PlannerTask, int] | None = (
            ("resolve", 1) if "reader" in scorer.needs_slots else None
        )
        facts = _facts(use, None) | {"settings": {"run_seed": self.recipe.seed}}
        if named:
            facts["uses"] = [
                _facts(used, questions[0] if questions and used.slot == "reader" else None)
                for used in named
            ]
        compute = lambda samples, parts: stages.score(  # noqa: E731
            samples, parts["filter"], parts, self.recipe.seed
        )
        name = f"score-{use.name}"
        entry = self._entry(name, facts, use)
        self.stages.append(
            Stage(
                name,
                use,
                compute,
                entry,
                self.follows,
                tuple(named),
                questions,
                resources=self._resources(name),
            )
        )
        if is_gate:
            self.follows = (*self.follows, entry)
            # Its thresholds decide on what follows, though not on its own scores.
            self.before = fingerprint([entry.folder, entry.options])

    def _resources(self, name: str) -> Resources:
        return self.recipe.resources.get(name, Resources())

    def _entry(self, name: str, facts: dict[str, Any], use: ComponentSpec | None) -> StageEntry:
        digest = fingerprint([name, facts, self.before])
        options = use.options.model_dump(mode="json") if use else {}
        return StageEntry(stage=name, folder=f"{name}-{digest}", component=facts, options=options)


def _facts(use: ComponentSpec | None, verb: PlannerTask | None) -> dict[str, Any]:
    """What a component's results follow from, beside its input."""
    if use is None:
        return {"use": None}
    facts = registry.fingerprint_facts(use.slot, use.name, use.options)
    if verb:
        planner = use.build()
        assert isinstance(planner, Planner)
        facts |= planner.prompt_identity(verb)
    return facts


def _replacing(recipe: Recipe) -> list[Stage]:
    """Parts II and III: an object is replaced, and an instruction asks for it."""
    chain = _Chain(recipe)
    chain.add("read", stages.read, recipe.source)
    chain.add("caption", stages.caption, recipe.captioner)
    chain.add("extract", stages.extract, recipe.extractor)
    chain.add("ground", stages.ground, recipe.grounder)
    chain.add("plan", stages.plan, recipe.planner, "replace")
    chain.add("edit", stages.edit, recipe.editor)
    for use in recipe.filters:
        chain.score(use)
    return chain.stages


def _rewriting(recipe: Recipe) -> list[Stage]:
    """Part I: edits are there; their instructions are rewritten.

    Filters that see images alone come first, so that no rejected pair is paid for (Eq. 1).
    """
    first = [use for use in recipe.filters if not _sees(use)]
    chain = _Chain(recipe)
    chain.add("read", stages.read, recipe.source)
    chain.add("caption", stages.caption, None)
    for use in first:
        chain.score(use, is_gate=True)
    n, orders = recipe.candidates, recipe.orders
    chain.add("rewrite", stages.rewrite, recipe.planner, "rewrite", n, candidates=n)
    # Of a single candidate nothing is asked.
    times = orders if n > 1 else 0
    chain.add("select", stages.select, recipe.planner, "select", times, orders=orders)
    for use in recipe.filters:
        if use not in first:
            chain.score(use)
    return chain.stages


def _sees(use: ComponentSpec) -> frozenset[str]:
    scorer = registry.find("filter", use.name)
    assert issubclass(scorer, Scorer)
    return scorer.requires
