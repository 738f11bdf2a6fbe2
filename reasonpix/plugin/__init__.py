"""The plugin API: what plugins import, from here and the submodules `weights`, `testing`, `fakes`.

`docs/plugins.md` shows how to write a plugin, and what `API_VERSION` promises.
"""

from reasonpix.core.api_version import API_VERSION
from reasonpix.core.english.captions import EDITED_CAPTIONS, edited_caption
from reasonpix.core.files.ignored import Ignored
from reasonpix.core.hashing import seed_of
from reasonpix.core.memory import is_out_of_memory
from reasonpix.errors import InvalidBox, PluginError, ReasonpixError, SourceError, WeightsError
from reasonpix.plugin.components import (
    Captioner,
    Component,
    Editor,
    EntityExtractor,
    Grounder,
    Method,
    MLLMEncoder,
    ModelOptions,
    Options,
    Planner,
    PlannerTask,
    Scorer,
    Source,
    SourceItem,
    SourcePair,
)
from reasonpix.plugin.edits import Edit, EditRequest, MethodRequest
from reasonpix.plugin.filters import RejectIf, ThresholdFilter, ThresholdOptions
from reasonpix.plugin.hookspecs import hookimpl
from reasonpix.plugin.intended_images import IntendedImages
from reasonpix.plugin.samples import Sample, SampleImage
from reasonpix.plugin.slots import SlotSpec
from reasonpix.plugin.stages import Result, StageSpec, check_results
from reasonpix.plugin.types import (
    Box,
    Caption,
    Choice,
    EditPlan,
    Entity,
    Grounding,
    Problem,
    Record,
    ReplaceRequest,
    ResolveRequest,
    RewriteRequest,
    Rewriting,
    SelectRequest,
)

__all__ = [
    "API_VERSION",
    "EDITED_CAPTIONS",
    "Box",
    "Caption",
    "Captioner",
    "Choice",
    "Component",
    "Edit",
    "EditPlan",
    "EditRequest",
    "Editor",
    "Entity",
    "EntityExtractor",
    "Grounder",
    "Grounding",
    "Ignored",
    "IntendedImages",
    "InvalidBox",
    "MLLMEncoder",
    "Method",
    "MethodRequest",
    "ModelOptions",
    "Options",
    "Planner",
    "PlannerTask",
    "PluginError",
    "Problem",
    "ReasonpixError",
    "Record",
    "RejectIf",
    "ReplaceRequest",
    "ResolveRequest",
    "Result",
    "RewriteRequest",
    "Rewriting",
    "Sample",
    "SampleImage",
    "Scorer",
    "SelectRequest",
    "SlotSpec",
    "Source",
    "SourceError",
    "SourceItem",
    "SourcePair",
    "StageSpec",
    "ThresholdFilter",
    "ThresholdOptions",
    "WeightsError",
    "check_results",
    "edited_caption",
    "hookimpl",
    "is_out_of_memory",
    "seed_of",
]
