"""The card of a published dataset: what made it, how many samples passed, and why others did not.

It depends on the run alone, not on where, when or with how many workers it ran.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from reasonpix import __version__
from reasonpix.datasets.columns import Feature
from reasonpix.datasets.licences import licence_of, package_licence
from reasonpix.datasets.writers import Written
from reasonpix.errors import PluginError, RunError
from reasonpix.generation.model_domains import run_warnings
from reasonpix.generation.outcomes import (
    OutcomeCounts,
    StageEntry,
    outcome_counts,
    read_stages,
    scorer_of,
)
from reasonpix.generation.run_folder import RunFolder
from reasonpix.generation.run_recipe import packages_of, recipe_text
from reasonpix.generation.statistics import position_bias
from reasonpix.plugin import registry
from reasonpix.plugin.components import ModelOptions
from reasonpix.plugin.intended_images import CARD_KEY
from reasonpix.plugin.spec import ComponentSpec

SOURCE_KEY = "image_source"
"""Key at the top of the card: the component that the images came from."""

_UNPUBLISHED_KEYS = ("resources", "shard_size")
"""Recipe keys that say how to compute and have no effect on samples."""


@dataclass(frozen=True)
class Form:
    """A form of dataset, as its card describes it."""

    what: str
    """What a row is, in the plural."""
    columns: str
    """Description of the columns or files."""
    data: str | Sequence[str]
    """Patterns of the files that `datasets` reads."""
    task: str = "image-to-image"
    """The hub's name of the task."""
    split: str = "train"
    """Split of the files."""
    title: str = "Reasoning edits made with reasonpix"

    def count(self, rows: int) -> str:
        """The number of rows with the noun, such as "1 preference pair of instructions"."""
        return f"{rows} {self.what if rows != 1 else self.what.replace('s ', ' ', 1)}"


@dataclass(frozen=True)
class _Part:
    """A component of the run, as its recipe and its stages describe it."""

    slot: str
    use: str
    options: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def is_filter(self) -> bool:
        return self.slot == "filter"

    @property
    def weights(self) -> str | None:
        """The name of its weights, if it has any."""
        return self.options.get("model") if "revision" in self.facts.get("options", ()) else None

    @property
    def published_options(self) -> dict[str, Any]:
        """Its options without those that have no effect on samples."""
        recorded = self.facts.get("options")
        if self.is_filter or recorded is None:
            excluded = ModelOptions.fingerprint_exclude
            return {k: v for k, v in self.options.items() if k not in excluded}
        return {k: v for k, v in self.options.items() if k in recorded or k == "model"}

    @property
    def package(self) -> str:
        try:
            dist = registry.entry(self.use).dist
        except PluginError:
            return "?"  # the plugin is not installed on this machine
        return dist.name if dist else "?"


def render_card(run: RunFolder, form: Form, written: Written) -> str:
    """The dataset's README.md. Raises `RunError` when the run's recipe cannot be read."""
    comments, recipe = _read_recipe(run)
    entries, counts = read_stages(run), outcome_counts(run)
    parts = list(_parts(recipe, entries))
    licences = _licences(parts)
    environment = Environment(
        loader=PackageLoader("reasonpix", "datasets"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is Markdown
    )
    environment.filters |= {"cell": _cell, "yaml": _dump}
    return environment.get_template("card.md.jinja").render(
        head=_head(form, written, licences, run.plan().source),
        form=form,
        summary=form.count(written.rows),
        version=__version__,
        notes=(
            *(f"> **Warning.** {warning}." for warning in run_warnings(run.plan(), entries)),
            *written.notes,
        ),
        components=_component_rows(parts, packages_of(run)),
        weights=_weight_rows(parts),
        prompts=_prompt_rows(entries),
        licences=_licence_rows(licences, parts),
        filters=_filter_rows(parts, counts),
        stages=[
            (stage, *(str(count[status]) for status in ("ok", "rejected", "failed")))
            for stage, count in counts.stages
        ],
        position_bias=position_bias(run),
        examples=_examples(counts),
        planned=_planned(run),
        comments=comments,
        recipe=_published_recipe(recipe, parts),
    )


def _dump(content: Any) -> str:
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "–"


# -- The head -------------------------------------------------------------------------------------


def _head(
    form: Form,
    written: Written,
    licences: Mapping[str, str | None],
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """Metadata for the hub. It names a licence only if that of every part is known."""
    head: dict[str, Any] = {"pretty_name": form.title}
    names = list(dict.fromkeys(name for name in licences.values() if name))
    if all(licences.values()):
        head["license"] = names if len(names) > 1 else names[0]
    head |= {
        "task_categories": [form.task],
        "language": ["en"],
        "size_categories": [_size(written.rows)],
        "tags": ["instruction-based-image-editing", "reasonpix"],
    }
    head[SOURCE_KEY] = source["use"]
    if domain := source.get("domain"):
        head[CARD_KEY] = domain
    if written.features:
        features = [{"name": n, **_feature_metadata(f)} for n, f in written.features.items()]
        # Without splits: `datasets` warns unless each has its size in memory too.
        head["dataset_info"] = {"features": features}
    data = form.data if isinstance(form.data, str) else [*form.data]
    files = [{"split": form.split, "path": data}]
    return head | {"configs": [{"config_name": "default", "data_files": files}]}


def _feature_metadata(feature: Feature) -> dict[str, Any]:
    match feature.get("_type"):
        case "Image":
            return {"dtype": "image"}
        case "Value":
            return {"dtype": feature["dtype"]}
        case "List":
            inner = _feature_metadata(feature["feature"])
            return {"list": inner.get("dtype") or inner["struct"]}
        case _:
            parts = [{"name": n, **_feature_metadata(part)} for n, part in feature.items()]
            return {"struct": parts}


def _size(rows: int) -> str:
    limits = {"1K": 1_000, "10K": 10_000, "100K": 100_000, "1M": 1_000_000, "10M": 10_000_000}
    names = ["n<1K", *(f"{low}<n<{high}" for low, high in pairwise(limits)), "n>10M"]
    return names[sum(rows >= limit for limit in limits.values())]


# -- The run --------------------------------------------------------------------------------------


def _read_recipe(run: RunFolder) -> tuple[str, dict[str, Any]]:
    """The comments at the top, which name the packages, and the recipe itself."""
    text = recipe_text(run)
    try:
        recipe = yaml.safe_load(text)
        assert isinstance(recipe, dict)
    except (yaml.YAMLError, AssertionError) as error:
        problem = " ".join(str(error).split()) or "it is not a recipe"
        raise RunError(
            f"{run}/recipe.yaml cannot be read: {problem}; "
            "run `reasonpix generate` again to write it"
        ) from error
    comments = re.match(r"(?:#.*\n)*", text)
    return comments[0] if comments else "", recipe


def _parts(recipe: Mapping[str, Any], entries: Sequence[StageEntry]) -> Iterator[_Part]:
    """The recipe's components, each with the facts of its stage.

    Filters are the current ones, which may differ from those of the first call.
    """
    facts: dict[tuple[str, str], Mapping[str, Any]] = {}
    for entry in entries:
        for component in (entry.component, *entry.component.get("uses", ())):
            if component["use"]:
                facts.setdefault((component["slot"], component["use"]), component)
    scorers = (scorer_of(entry) for entry in entries if entry.is_score)
    filters = (ComponentSpec("filter", scorer.name, scorer.options).as_yaml() for scorer in scorers)
    blocks = [("source", recipe["source"]), *recipe["pipeline"].items()]
    blocks += [("filter", block) for block in filters]
    for slot, block in blocks:
        options = {name: option for name, option in block.items() if name != "use"}
        yield _Part(slot, block["use"], options, facts.get((slot, block["use"]), {}))


def _published_recipe(recipe: Mapping[str, Any], parts: Sequence[_Part]) -> dict[str, Any]:
    """The resolved recipe, without what has no effect on samples."""
    published = {key: value for key, value in recipe.items() if key not in _UNPUBLISHED_KEYS}
    blocks = [(part, {"use": part.use, **part.published_options}) for part in parts]
    published["source"] = blocks[0][1]
    published["pipeline"] = {p.slot: block for p, block in blocks[1:] if not p.is_filter}
    return published | {"filters": [block for part, block in blocks if part.is_filter]}


def _planned(run: RunFolder) -> str:
    """How many records the run planned, and how to plan as many again."""
    plan = run.plan()
    records = f"{plan.rows} record{'s were' if plan.rows != 1 else ' was'} planned"
    if plan.complete:
        return f"{records}, all that the source holds."
    return (
        f"{records}, and the source may hold more. With the recipe in `recipe.yaml`, the same is "
        f"made by `reasonpix generate recipe.yaml --out DIR --limit {plan.rows}`."
    )


def _examples(counts: OutcomeCounts) -> list[str]:
    """For each stage and status the number of records and one of the reasons."""
    stages = dict(counts.stages)
    return [
        f"{stage}: {stages[stage][status]} {status}, such as: {' '.join(reason.split())}"
        for (stage, status), reason in sorted(counts.examples.items())
    ]


def _licences(parts: Sequence[_Part]) -> dict[str, str | None]:
    """The licence of the images and of each of the weights, None if unknown."""
    options = parts[0].options
    # The options of sources that read the user's images.
    paths = (options[name] for name in ("path", "images") if name in options)
    licences = {
        "images": next(filter(None, (licence_of(p, options, "dataset") for p in paths)), None)
    }
    for part in parts:
        if part.weights:
            licences[part.weights] = licence_of(part.weights, part.options, "model")
    return licences


# -- Rows of the tables ---------------------------------------------------------------------------

_Rows = list[tuple[str, ...]]


def _component_rows(parts: Sequence[_Part], versions: Mapping[str, str]) -> _Rows:
    return [
        (
            part.slot,
            part.use,
            f"{part.package} {versions.get(part.package, '')}",
            str(part.options.get("model") or ""),
        )
        for part in parts
    ]


def _weight_rows(parts: Sequence[_Part]) -> _Rows:
    """Name and revision of the weights, and the SHA-256 of the files that were read."""
    rows = dict.fromkeys(
        (
            part.weights,
            part.options.get("revision") or ("" if "weights" in part.facts else "not named"),
            ", ".join(part.facts.get("weights", {}).values()),
        )
        for part in parts
        if part.weights
    )
    return list(rows)


def _prompt_rows(entries: Sequence[StageEntry]) -> _Rows:
    return [
        (entry.stage, component["prompt"])
        for entry in entries
        for component in (entry.component, *entry.component.get("uses", ()))
        if "prompt" in component
    ]


def _licence_rows(licences: Mapping[str, str | None], parts: Sequence[_Part]) -> _Rows:
    rows: _Rows = []
    for name, licence in licences.items():
        origin = f"the source {parts[0].use}" if name == "images" else name
        rows.append((name, licence or f"see {origin}"))
    packages = dict.fromkeys(part.package for part in parts)
    return rows + [(f"package {package}", package_licence(package)) for package in packages]


def _filter_rows(parts: Sequence[_Part], counts: OutcomeCounts) -> _Rows:
    stages = dict(counts.stages)
    return [
        (
            part.use,
            ", ".join(f"{k}={v}" for k, v in part.published_options.items() if v is not None),
            str(stages[f"score-{part.use}"]["ok"]),
            str(stages[f"score-{part.use}"]["rejected"]),
        )
        for part in parts
        if part.is_filter
    ]
