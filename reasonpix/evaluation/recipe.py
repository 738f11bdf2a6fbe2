"""Recipes for `reasonpix evaluate`: a benchmark, the methods to compare, and how to measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from reasonpix.core.files import yaml_locations
from reasonpix.errors import PluginError, RecipeError
from reasonpix.evaluation.benchmark import BenchmarkOptions
from reasonpix.evaluation.metrics import MetricsOptions
from reasonpix.evaluation.results import COPY, TRUTH
from reasonpix.generation import recipe_catalog
from reasonpix.plugin import registry
from reasonpix.plugin.components import Options
from reasonpix.plugin.spec import Complain, ComponentSpec, check, read_spec, slot_schemas


class EvaluationRecipe(BaseModel):
    """What `reasonpix evaluate` compares. Ground truth and copy of the input are always added."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    seed: int = Field(
        0, ge=0, lt=2**63, description="Determines the noise of each case, the same for all methods"
    )
    benchmark: BenchmarkOptions
    metrics: MetricsOptions = MetricsOptions()
    grounder: ComponentSpec | None = Field(
        None, description="Finds the target in the box of each edit"
    )
    methods: dict[Annotated[str, Field(min_length=1)], ComponentSpec] = Field(
        min_length=1, description="The methods, by names of your choice"
    )

    def as_yaml(self) -> str:
        """The resolved recipe: all options, and the packages of its components."""
        packages = {use.package for use in (*self.methods.values(), self.grounder) if use}
        body = self.model_dump(mode="json", exclude={"grounder", "methods"})
        if self.grounder:
            body["grounder"] = self.grounder.as_yaml()
        body["methods"] = {name: use.as_yaml() for name, use in self.methods.items()}
        head = "".join(f"# {package}\n" for package in sorted(packages))
        return head + yaml.safe_dump(body, sort_keys=False, allow_unicode=True)

    def with_runtime(self, runtime: str) -> EvaluationRecipe:
        """The recipe with this `runtime` for all methods that have the option."""
        methods = {
            name: replace(use, options=use.options.model_copy(update={"runtime": runtime}))
            if "runtime" in type(use.options).model_fields
            else use
            for name, use in self.methods.items()
        }
        return self.model_copy(update={"methods": methods})


def load_evaluation_recipe(
    path: str | Path, overrides: recipe_catalog.Overrides = ()
) -> EvaluationRecipe:
    """Read and check an evaluation recipe, given as a file or by the name of a shipped one.

    `overrides` win over the file: `["seed=1"]`, with values in YAML, or `{"seed": 1}`. Raises
    `RecipeError` with every problem found, each as `file:line:column: path: problem`.
    """
    data, marks, problems = recipe_catalog.read(path, "evaluate", overrides)

    complain = marks.into(problems)
    # Components replace their blocks first, so that problems of both are reported together.
    if data.get("grounder") is not None:
        data["grounder"] = _use("grounder", data["grounder"], ("grounder",), complain)
    if isinstance(data.get("methods"), dict):
        data["methods"] = dict(_methods(data["methods"], complain))
    recipe: EvaluationRecipe | None = check(EvaluationRecipe, data, (), complain)
    if recipe is not None:
        for field in ("clip", "dino"):
            try:
                registry.checkpoint(getattr(recipe.metrics, field).model)
            except PluginError as error:
                complain(("metrics", field), str(error))
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe


def _methods(named: Mapping[str, Any], complain: Complain) -> Iterator[tuple[str, ComponentSpec]]:
    for name, value in named.items():
        at = ("methods", name)
        if name in (TRUTH, COPY):
            complain(at, "this name is reserved for a row that is always added; choose another")
        yield name, _use("method", value, at, complain)


def _use(slot: str, value: Any, at: yaml_locations.Path, complain: Complain) -> ComponentSpec:
    found = read_spec(slot, value, at, complain)
    return found or ComponentSpec(slot, "", Options())


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of an evaluation recipe, with the options of all components."""
    document = EvaluationRecipe.model_json_schema()
    definitions = document["$defs"]
    for name in ("ComponentSpec", "Options"):
        definitions.pop(name, None)
    properties = document["properties"]
    properties["grounder"] = {"$ref": "#/$defs/grounder"}
    properties["methods"]["additionalProperties"] = {"$ref": "#/$defs/method"}
    return {
        **recipe_catalog.schema_head(),
        **document,
        "title": "reasonpix evaluation recipe",
        "$defs": definitions | slot_schemas("grounder") | slot_schemas("method"),
    }
