"""The card of a published dataset: what made it, how many came through, and why the others did not.

It follows from the run alone: nothing in it tells where, when or with how many workers it ran.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from reasonpix import __version__
from reasonpix.datasets.writers import Feature, Written
from reasonpix.errors import PluginError, RunError
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
from reasonpix.plugin.spec import ComponentSpec

_NO_TRACE = ("resources", "shard_size")
"""What a recipe says of how to compute, and no sample shows."""


@dataclass(frozen=True)
class Form:
    """A form of dataset, as its card tells of it."""

    what: str
    """What a row is, in the plural."""
    columns: str
    """What stands where, for people."""
    task: str = "image-to-image"
    """The hub's name of the task."""
    data: str | None = None
    """The files that `datasets` reads, a pattern; None when it cannot read this form."""
    features: Mapping[str, Feature] | None = None
    """Those of the columns; None when they are told by the files."""
    split: str = "train"
    """That the files are of."""
    title: str = "Reasoning edits made with reasonpix"


@dataclass(frozen=True)
class _Part:
    """A component of the run, as its recipe and its stages tell of it."""

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
    def telling(self) -> dict[str, Any]:
        """Its options without those that leave no trace in the dataset."""
        known = self.facts.get("options")
        if self.is_filter or known is None:
            return {
                k: v for k, v in self.options.items() if k not in ModelOptions.fingerprint_exclude
            }
        return {k: v for k, v in self.options.items() if k in known or k == "model"}


def card(run: RunFolder, form: Form, written: Written) -> str:
    """The dataset's README.md. Raises `RunError` when the run's recipe cannot be read."""
    comments, recipe = _read_recipe(run)
    entries, ended = read_stages(run), outcome_counts(run)
    parts = list(_parts(recipe, entries))
    licences = _licences(parts)
    sections = [
        f"# {form.title}",
        f"{_what(form, written.rows)}, made by the pipeline of ReasonPix2Pix (CVPRW 2024) as "
        f"implemented in reasonpix {__version__}.",
        *written.notes,
        "## What stands where",
        form.columns,
        "## What made it",
        _table(("slot", "component", "package", "model"), _components(parts, packages_of(run))),
        *_weights(parts),
        *_prompts(entries),
        "## Licences",
        "Images keep their source's licence; what a model made, that of the model.",
        _table(("of", "licence"), _told(licences, parts)),
        "## Filters",
        _filters(parts, ended),
        "## How many came through",
        _table(
            ("stage", "ok", "rejected", "failed"),
            (
                (stage, *(str(counts[status]) for status in ("ok", "rejected", "failed")))
                for stage, counts in ended.stages
            ),
        ),
        *([f"{bias}."] if (bias := position_bias(run)) else []),
        "## Why the others did not",
        _ends(ended),
        "## Recipe",
        _planned(run),
        f"```yaml\n{''.join(comments)}{_dump(_told_recipe(recipe, parts))}```",
    ]
    head = _head(form, written.rows, licences)
    return f"---\n{_dump(head)}---\n\n" + "\n\n".join(sections) + "\n"


def _what(form: Form, rows: int) -> str:
    return f"{rows} {form.what if rows != 1 else form.what.replace('s ', ' ', 1)}"


def _dump(content: Any) -> str:
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text


def _table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "–"


# -- The head -------------------------------------------------------------------------------------


def _head(form: Form, rows: int, licences: Mapping[str, str | None]) -> dict[str, Any]:
    """What the hub reads. A licence is named when that of every part is known."""
    head: dict[str, Any] = {"pretty_name": form.title}
    known = list(dict.fromkeys(name for name in licences.values() if name))
    if all(licences.values()):
        head["license"] = known if len(known) > 1 else known[0]
    head |= {
        "task_categories": [form.task],
        "language": ["en"],
        "size_categories": [_size(rows)],
        "tags": ["instruction-based-image-editing", "reasonpix"],
    }
    if form.data is None:
        return head | {"viewer": False}
    if form.features:
        features = [{"name": n, **_for_yaml(f)} for n, f in form.features.items()]
        # Without splits: `datasets` wants the bytes of each in memory as well, or it warns.
        head["dataset_info"] = {"features": features}
    files = [{"split": form.split, "path": form.data}]
    return head | {"configs": [{"config_name": "default", "data_files": files}]}


def _for_yaml(feature: Feature) -> dict[str, Any]:
    match feature.get("_type"):
        case "Image":
            return {"dtype": "image"}
        case "Value":
            return {"dtype": feature["dtype"]}
        case "List":
            inner = _for_yaml(feature["feature"])
            return {"list": inner.get("dtype") or inner["struct"]}
        case _:
            return {"struct": [{"name": n, **_for_yaml(part)} for n, part in feature.items()]}


def _size(rows: int) -> str:
    limits = {"1K": 1_000, "10K": 10_000, "100K": 100_000, "1M": 1_000_000, "10M": 10_000_000}
    names = ["n<1K", *(f"{low}<n<{high}" for low, high in pairwise(limits)), "n>10M"]
    return names[sum(rows >= limit for limit in limits.values())]


# -- The run --------------------------------------------------------------------------------------


def _read_recipe(run: RunFolder) -> tuple[list[str], dict[str, Any]]:
    """The comments on top, which name the packages, and the recipe itself."""
    text = recipe_text(run)
    try:
        recipe = yaml.safe_load(text)
        assert isinstance(recipe, dict)
    except (yaml.YAMLError, AssertionError) as error:
        what = " ".join(str(error).split()) or "it is no recipe"
        raise RunError(
            f"{run}/recipe.yaml cannot be read: {what}; run `reasonpix generate` again to write it"
        ) from error
    comments = re.match(r"(?:#.*\n)*", text)
    return comments[0].splitlines(keepends=True) if comments else [], recipe


def _parts(recipe: Mapping[str, Any], entries: Sequence[StageEntry]) -> Iterator[_Part]:
    """The components that the recipe names, each with what its stage knows of it.

    Filters are those that decide now, which may be others than when the run began.
    """
    facts: dict[tuple[str, str], Mapping[str, Any]] = {}
    for entry in entries:
        for component in (entry.component, *entry.component.get("uses", ())):
            if component["use"]:
                facts.setdefault((component["slot"], component["use"]), component)
    deciding = (scorer_of(entry) for entry in entries if entry.is_score)
    filters = (
        ComponentSpec("filter", scorer.name, scorer.options).as_yaml() for scorer in deciding
    )
    named = [("source", recipe["source"]), *recipe["pipeline"].items()]
    named += [("filter", block) for block in filters]
    for slot, block in named:
        options = {name: option for name, option in block.items() if name != "use"}
        yield _Part(slot, block["use"], options, facts.get((slot, block["use"]), {}))


def _components(parts: Sequence[_Part], versions: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    for part in parts:
        package = _package(part.use)
        version = versions.get(package, "")
        yield part.slot, part.use, f"{package} {version}", str(part.options.get("model") or "")


def _package(use: str) -> str:
    try:
        dist = registry.entry(use).dist
    except PluginError:
        return "?"  # published on a machine that lacks the plugin
    return dist.name if dist else "?"


def _weights(parts: Sequence[_Part]) -> list[str]:
    """A table of the weights: their revision, and the SHA-256 of what was read."""
    rows = dict.fromkeys(
        (
            part.weights,
            part.options.get("revision") or ("" if "weights" in part.facts else "not named"),
            ", ".join(part.facts.get("weights", {}).values()),
        )
        for part in parts
        if part.weights
    )
    return [_table(("weights", "revision", "SHA-256"), list(rows))] if rows else []


def _prompts(entries: Sequence[StageEntry]) -> list[str]:
    """The prompts of an LLM, by what identifies them."""
    asked = [
        (entry.stage, component["prompt"])
        for entry in entries
        for component in (entry.component, *entry.component.get("uses", ()))
        if "prompt" in component
    ]
    return [_table(("prompt of", "SHA-256"), asked)] if asked else []


def _filters(parts: Sequence[_Part], ended: OutcomeCounts) -> str:
    counts = dict(ended.stages)
    rows = [
        (
            part.use,
            ", ".join(f"{k}={v}" for k, v in part.telling.items() if v is not None),
            str(counts[f"score-{part.use}"]["rejected"]),
        )
        for part in parts
        if part.is_filter
    ]
    return _table(("filter", "settings", "rejected"), rows) if rows else "There were none."


def _planned(run: RunFolder) -> str:
    """How many records the recipe was run on: a part of the source has to be named to be remade."""
    plan = run.plan()
    records = f"{plan.rows} record{'s were' if plan.rows != 1 else ' was'} planned"
    if plan.complete:
        return f"{records}, all that the source holds."
    return (
        f"{records}, and the source may hold more. With the recipe in `recipe.yaml`, the same is "
        f"made by `reasonpix generate recipe.yaml --out DIR --limit {plan.rows}`."
    )


def _ends(ended: OutcomeCounts) -> str:
    counts = dict(ended.stages)
    lines = [
        f"- {stage}: {counts[stage][status]} {status}, such as: {' '.join(reason.split())}"
        for (stage, status), reason in sorted(ended.examples.items())
    ]
    return "\n".join(lines) or "Every record was accepted."


def _told_recipe(recipe: Mapping[str, Any], parts: Sequence[_Part]) -> dict[str, Any]:
    """The resolved recipe, without what leaves no trace in the dataset."""
    told = {key: value for key, value in recipe.items() if key not in _NO_TRACE}
    blocks = [(part, {"use": part.use, **part.telling}) for part in parts]
    told["source"] = blocks[0][1]
    filters = [block for part, block in blocks if part.is_filter]
    told["pipeline"] = {part.slot: block for part, block in blocks[1 : len(blocks) - len(filters)]}
    return told | {"filters": filters}


# -- Licences -------------------------------------------------------------------------------------


def _licences(parts: Sequence[_Part]) -> dict[str, str | None]:
    """The licence of the images and of each of the weights, None where it is not known."""
    source = parts[0]
    # Where the sources that read images of the user's keep them.
    places = (source.options[name] for name in ("path", "images") if name in source.options)
    found = (_licence_of(place, source.options, "dataset") for place in places)
    licences = {"images": next(filter(None, found), None)}
    for part in parts:
        if part.weights:
            licences[part.weights] = _licence_of(part.weights, part.options, "model")
    return licences


def _told(licences: Mapping[str, str | None], parts: Sequence[_Part]) -> Iterator[tuple[str, str]]:
    for of, licence in licences.items():
        where = f"the source {parts[0].use}" if of == "images" else of
        yield of, licence or f"see {where}"
    for package in dict.fromkeys(_package(part.use) for part in parts):
        yield f"package {package}", _package_licence(package)


def _licence_of(name: str, options: Mapping[str, Any], kind: str) -> str | None:
    """What the card of a folder or of a hub repository says, as far as it is on this machine."""
    try:
        place = registry.checkpoint(name) or Path(name)
    except PluginError:
        return None
    if place.exists():
        readme = (place if place.is_dir() else place.parent) / "README.md"
    elif (cached := _cached_card(name, options, kind)) is not None:
        readme = cached
    else:
        return None
    try:
        head = readme.read_text(encoding="utf-8").split("---\n", 2)
        said = yaml.safe_load(head[1]) if len(head) == 3 and not head[0] else {}
    except (OSError, ValueError, yaml.YAMLError):
        return None
    licence = said.get("license") if isinstance(said, dict) else None
    return licence.lower() if isinstance(licence, str) else None  # as the hub writes them


def _cached_card(name: str, options: Mapping[str, Any], kind: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    where, revision = options.get("cache_dir"), options.get("revision")
    try:
        found = try_to_load_from_cache(
            name, "README.md", cache_dir=where, revision=revision, repo_type=kind
        )
    except HFValidationError:
        return None  # no name of a repository
    return Path(found) if isinstance(found, str) else None


def _package_licence(package: str) -> str:
    """What a package's metadata says."""
    try:
        metadata = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return "not stated"
    said = (metadata.get_all("License-Expression") or metadata.get_all("License") or [""])[0]
    classified = [
        line.rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier") or ()
        if line.startswith("License ::")
    ]
    # Some write the whole text there.
    return said if said and "\n" not in said else ", ".join(classified) or "not stated"
