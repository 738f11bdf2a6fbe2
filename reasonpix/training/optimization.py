"""One optimizer step over the micro-batches of all devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel

from reasonpix.training.loss import Batch
from reasonpix.training.randomness import seed_micro_batch
from reasonpix.training.session import Session


def optimizer_step(
    session: Session, batches: Sequence[Batch], aligning: bool, should_stop: Callable[[], bool]
) -> tuple[float, bool]:
    """Take one step; return the mean loss of all devices, and whether any of them should stop."""
    accelerator, recipe = session.accelerator, session.recipe
    optimizer = session.state.optimizer
    # After alignment the connector's dropout is off: the UNet has to rely on its tokens.
    session.model.train().connector.train(aligning or not recipe.align_steps)
    optimizer.zero_grad(set_to_none=True)
    count = sum(len(batch.h) for batch in batches)
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches):
        is_last = number == len(batches) - 1
        part = accelerator.process_index * len(batches) + number
        seed_micro_batch(recipe.seed, session.state.step, part)
        # Devices exchange gradients once, after the last micro-batch.
        sync = nullcontext() if is_last else accelerator.no_sync(session.loss)
        with sync, _attention_kernel(accelerator):
            loss = session.loss(batch, aligning) * (len(batch.h) / count)
            accelerator.backward(loss)
        total += loss.detach()
    if recipe.max_gradient_norm is not None:
        trained = [weight for group in optimizer.param_groups for weight in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, recipe.max_gradient_norm)
    optimizer.step()
    outcome = torch.stack([total, total.new_tensor(float(should_stop()))])
    mean_loss, stop = accelerator.reduce(outcome, "mean").tolist()
    return mean_loss, stop > 0


def _attention_kernel(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """Avoid the flash kernel on a CPU in bfloat16: its backward pass is several times slower."""
    is_slow = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    return sdpa_kernel(SDPBackend.MATH) if is_slow else nullcontext()
