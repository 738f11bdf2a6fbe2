"""The editing model: network, checkpoints and inference.

Plugins that load, sample or measure editing models import the names below.
"""

from typing import TYPE_CHECKING

from reasonpix.core.lazy import lazy_exports

__all__ = [
    "CPU_ROWS",
    "SMALL_UNET",
    "GuidanceBranches",
    "ReasonPix2Pix",
    "TorchNetwork",
    "TrainingData",
    "UNetGraph",
    "check_pipeline",
    "check_scheduler",
    "decoded_image",
    "denoise",
    "load_checkpoint",
    "read_model_training_data",
    "read_parts",
    "read_scheduler",
    "save_checkpoint",
    "vae_scale_factor",
    "working_size",
]

if TYPE_CHECKING:
    from reasonpix.datasets.training_data import TrainingData
    from reasonpix.editing.checkpoint import (
        load_checkpoint,
        read_model_training_data,
        save_checkpoint,
    )
    from reasonpix.editing.decoded_images import decoded_image
    from reasonpix.editing.pipeline import CPU_ROWS, SMALL_UNET, ReasonPix2Pix
    from reasonpix.editing.pipeline_parts import (
        check_pipeline,
        read_parts,
        vae_scale_factor,
        working_size,
    )
    from reasonpix.editing.runtimes.base import TorchNetwork
    from reasonpix.editing.runtimes.modules import UNetGraph
    from reasonpix.editing.sampler import GuidanceBranches, denoise
    from reasonpix.editing.schedulers import check_scheduler, read_scheduler
else:
    __getattr__ = lazy_exports(
        __name__,
        {
            "checkpoint": (
                "TrainingData",
                "load_checkpoint",
                "read_model_training_data",
                "save_checkpoint",
            ),
            "decoded_images": ("decoded_image",),
            "pipeline": ("CPU_ROWS", "SMALL_UNET", "ReasonPix2Pix"),
            "pipeline_parts": ("check_pipeline", "read_parts", "vae_scale_factor", "working_size"),
            "runtimes.base": ("TorchNetwork",),
            "runtimes.modules": ("UNetGraph",),
            "sampler": ("GuidanceBranches", "denoise"),
            "schedulers": ("check_scheduler", "read_scheduler"),
        },
    )
