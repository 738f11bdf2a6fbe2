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
    "UNetGraph",
    "check_pipeline",
    "denoise",
    "load_checkpoint",
    "read_parts",
    "save_checkpoint",
    "vae_scale_factor",
    "working_size",
]

if TYPE_CHECKING:
    from reasonpix.editing.checkpoint import (
        check_pipeline,
        load_checkpoint,
        read_parts,
        save_checkpoint,
        vae_scale_factor,
    )
    from reasonpix.editing.pipeline import CPU_ROWS, SMALL_UNET, ReasonPix2Pix, working_size
    from reasonpix.editing.runtimes.base import TorchNetwork
    from reasonpix.editing.runtimes.modules import UNetGraph
    from reasonpix.editing.sampler import GuidanceBranches, denoise
else:
    __getattr__ = lazy_exports(
        __name__,
        {
            "checkpoint": (
                "check_pipeline",
                "load_checkpoint",
                "read_parts",
                "save_checkpoint",
                "vae_scale_factor",
            ),
            "pipeline": ("CPU_ROWS", "SMALL_UNET", "ReasonPix2Pix", "working_size"),
            "runtimes.base": ("TorchNetwork",),
            "runtimes.modules": ("UNetGraph",),
            "sampler": ("GuidanceBranches", "denoise"),
        },
    )
