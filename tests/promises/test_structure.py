"""The architecture that CONTRIBUTING.md describes: sizes, names, and where to find tests."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "reasonpix"
PACKAGES = [CORE, *sorted((ROOT / "plugins").glob("*/reasonpix_*"))]
MODULES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
SCRIPTS = ROOT / "plugins" / "mini" / "reasonpix_mini" / "training"
"""Training scripts of the mini checkpoints: their functions may be long."""

VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base_utils", "tools"}

TESTED_THROUGH = {
    "cli/test_main.py": "cli/console cli/options cli/generate cli/recipes",
    "core/test_atomic.py": "core/hashing core/tensor_store",
    "core/english/test_captions.py": "core/english/agreement core/english/caption_words "
    "core/english/noun_phrases core/english/vocabulary",
    "core/test_remote_storage.py": "core/lease",
    "core/files/test_folder.py": "core/files/ignored",
    "datasets/test_card.py": "datasets/licences",
    "datasets/test_pairs.py": "core/files/splits datasets/formats datasets/json_readers "
    "datasets/reader datasets/table_readers",
    "deployment/export/test_exporter.py": "cli/export deployment/export/converters",
    "deployment/server/test_app.py": "cli/serve deployment/server/metrics "
    "deployment/server/middleware deployment/server/openapi deployment/server/process "
    "deployment/server/request deployment/server/service",
    "editing/runtimes/test_manifest.py": "editing/runtimes/base editing/runtimes/binding "
    "editing/runtimes/modules editing/runtimes/names editing/runtimes/onnx "
    "editing/runtimes/openvino",
    "editing/test_model.py": "editing/config editing/connectors",
    "editing/test_pipeline.py": "editing/pipeline_parts editing/sampler",
    "cli/test_edit.py": "editing/file_edits editing/image_grid editing/output_files",
    "evaluation/report/test_report.py": "evaluation/comparison evaluation/report/page "
    "evaluation/report/plots evaluation/report/tables evaluation/report/writer",
    "evaluation/test_metrics.py": "evaluation/embedders evaluation/pixel_metrics",
    "evaluation/test_runner.py": "cli/evaluate editing/method evaluation/cases evaluation/results",
    "datasets/test_ignored.py": "generation/components/metadata_folder",
    "generation/components/test_sources.py": "generation/components/file_source "
    "generation/components/hub_dataset generation/components/image_folder "
    "generation/components/instruct_pix2pix generation/components/v3det",
    "generation/test_chains.py": "plugin/stages",
    "generation/engine/test_engine.py": "generation/engine/reopening",
    "generation/engine/test_local_executor.py": "core/memory generation/engine/unit "
    "generation/resources",
    "generation/engine/test_ray_executor.py": "generation/engine/ray_worker",
    "generation/test_recipe.py": "core/files/yaml_locations generation/run_recipe plugin/spec",
    "generation/test_run_folder.py": "generation/outcomes",
    "generation/test_stages.py": "generation/pipeline generation/replace_stages "
    "generation/rewrite_stages generation/scoring",
    "inspection/test_gallery.py": "generation/statistics inspection/cards inspection/reasons",
    "inspection/test_lineage.py": "inspection/lineage_text inspection/lookup",
    "llm/test_dispatch.py": "llm/batch_jobs llm/live_calls llm/types",
    "llm/test_ledger.py": "llm/budget llm/requests",
    "llm/test_ledger_sync.py": "llm/ledger_merge",
    "plugin/test_intended_images.py": "generation/model_domains",
    "plugin/test_registry.py": "core/lazy plugin/hookspecs plugin/slots",
    "plugin/test_testing.py": "plugin/components plugin/edits plugin/testing/base "
    "plugin/testing/data plugin/testing/editing plugin/testing/perception plugin/testing/planning",
    "promises/test_llm_runs.py": "inspection/cost_estimate inspection/stored_answers",
    "training/test_feature_cache.py": "core/parallel training/features",
    "training/test_trainer.py": "training/batches training/checkpointing training/distributed "
    "training/loss training/optimization training/randomness training/session training/setup "
    "training/state training/tracking training/validation",
}
"""For modules without a test file of their own, the file that tests them through their callers."""


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_module_has_more_than_400_lines() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert not {str(path): count for path, count in lines.items() if count > 400}


def test_no_folder_has_more_than_15_modules() -> None:
    counts = Counter(path.parent for path in MODULES if path.name != "__init__.py")
    assert not {str(folder): count for folder, count in counts.items() if count > 15}


def test_no_function_has_more_than_60_lines() -> None:
    def size(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        assert function.end_lineno is not None
        return function.end_lineno - function.lineno + 1

    assert not {
        f"{path}:{function.lineno} {function.name}": size(function)
        for path in MODULES
        if not path.is_relative_to(SCRIPTS)
        for function in functions(path)
        if size(function) > 60
    }


def test_no_module_holds_a_function_of_its_own_name() -> None:
    """Else `from package import name` is ambiguous to a reader."""
    assert not [
        str(path)
        for path in MODULES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == path.stem
    ]


def test_modules_are_named_after_what_they_hold() -> None:
    assert not [str(path) for path in MODULES if path.stem in VAGUE or path.parent.name in VAGUE]


def names() -> list[str]:
    paths = [path.relative_to(CORE).with_suffix("") for path in CORE.rglob("*.py")]
    return sorted(path.as_posix() for path in paths if not path.name.startswith("__"))


@pytest.mark.parametrize("name", names())
def test_every_module_has_its_test_where_one_looks_for_it(name: str) -> None:
    mirrored = ROOT / "tests" / Path(name).parent / f"test_{Path(name).name}.py"
    through = [test for test, modules in TESTED_THROUGH.items() if name in modules.split()]
    assert mirrored.exists() + len(through) == 1, (name, str(mirrored), through)


def test_the_list_of_other_places_is_up_to_date() -> None:
    assert not [test for test in TESTED_THROUGH if not (ROOT / "tests" / test).exists()]
    listed = [name for modules in TESTED_THROUGH.values() for name in modules.split()]
    assert not set(listed) - set(names())
