"""Datasets for image editing by instructions that need reasoning, and models trained on them.

The names below are the public Python interface, described in `docs/api.md`. They are imported on
first use, so `import reasonpix` is fast and needs none of the optional packages. All other modules
are internal, except those for plugin authors: see `docs/plugins.md`.
"""

from typing import TYPE_CHECKING

from reasonpix.core.lazy import lazy_exports

__version__ = "0.1.0"
__all__ = [
    "Client",
    "Comparison",
    "EvaluationFolder",
    "EvaluationRecipe",
    "ReasonPix2Pix",
    "ReasonpixError",
    "Recipe",
    "RunFolder",
    "TrainingRecipe",
    "TrainingResult",
    "__version__",
    "evaluate",
    "generate",
    "load_evaluation_recipe",
    "load_recipe",
    "load_training_recipe",
    "publish",
    "train",
    "write_report",
]

if TYPE_CHECKING:
    from reasonpix.datasets.publishing import publish
    from reasonpix.deployment.server.client import Client
    from reasonpix.editing.pipeline import ReasonPix2Pix
    from reasonpix.errors import ReasonpixError
    from reasonpix.evaluation.comparison import Comparison
    from reasonpix.evaluation.recipe import EvaluationRecipe, load_evaluation_recipe
    from reasonpix.evaluation.report import write_report
    from reasonpix.evaluation.results import EvaluationFolder
    from reasonpix.evaluation.runner import evaluate
    from reasonpix.generation.engine.engine import generate
    from reasonpix.generation.recipe import Recipe, load_recipe
    from reasonpix.generation.run_folder import RunFolder
    from reasonpix.training.recipe import TrainingRecipe, load_training_recipe
    from reasonpix.training.trainer import TrainingResult, train
else:
    __getattr__ = lazy_exports(
        __name__,
        {
            "datasets.publishing": ("publish",),
            "deployment.server.client": ("Client",),
            "editing.pipeline": ("ReasonPix2Pix",),
            "errors": ("ReasonpixError",),
            "evaluation.comparison": ("Comparison",),
            "evaluation.recipe": ("EvaluationRecipe", "load_evaluation_recipe"),
            "evaluation.report": ("write_report",),
            "evaluation.results": ("EvaluationFolder",),
            "evaluation.runner": ("evaluate",),
            "generation.engine.engine": ("generate",),
            "generation.recipe": ("Recipe", "load_recipe"),
            "generation.run_folder": ("RunFolder",),
            "training.recipe": ("TrainingRecipe", "load_training_recipe"),
            "training.trainer": ("TrainingResult", "train"),
        },
        extras={
            "editing.pipeline": "edit",
            "evaluation.report": "evaluate",
            "evaluation.runner": "evaluate",
            "training.trainer": "train",
        },
    )
