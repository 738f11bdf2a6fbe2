"""The command `train`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reasonpix.cli import console
from reasonpix.cli.options import set_option
from reasonpix.core.figures import counted
from reasonpix.errors import ReasonpixError, require_extra

if TYPE_CHECKING:
    from reasonpix.training.recipe import TrainingRecipe
    from reasonpix.training.trainer import Progress, TrainingResult


@click.command("train")
@click.argument("recipe")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The folder of the run. The trained model will be in its model/.",
)
@set_option("seed=1 or steps=2000")
def train_command(recipe: str, out: Path, overrides: tuple[str, ...]) -> None:
    """Train an editing model from RECIPE (a file, or the name of a shipped recipe).

    Run the same command again to resume. On several GPUs: accelerate launch -m reasonpix train
    RECIPE --out DIR
    """
    from reasonpix.training.recipe import load_training_recipe

    checked = load_training_recipe(recipe, overrides)
    # Of a launcher's processes only the first prints, even errors that they share.
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        result = _run(checked, out, is_main)
    except ReasonpixError:
        if is_main:
            raise
        sys.exit(1)
    if is_main:
        _print_result(result)


def _run(recipe: TrainingRecipe, out: Path, is_main: bool) -> TrainingResult:
    """Train with progress bars; a signal saves a checkpoint and exits with 128 + signal."""
    signals: list[int] = []
    launched = "RANK" in os.environ
    try:
        with _TrainingBars(is_main) as bars:

            def stops_after_step(number: int) -> bool:
                signals.append(number)
                # A launcher forwards a signal that the terminal has already sent.
                return bars.steps_taken and (launched or len(signals) == 1)

            with console.graceful_shutdown(stops_after_step):
                with require_extra("train"):
                    from reasonpix.training.trainer import train

                return train(recipe, out, bars.show, lambda: bool(signals))
    except KeyboardInterrupt as stopped:
        if is_main:
            click.echo(console.STOPPED, err=True)
        sys.exit(128 + (*signals, *stopped.args, 2)[0])


def _print_result(result: TrainingResult) -> None:
    if result.skipped:
        row, reason = result.skipped[0]
        click.echo(f"left out {counted(len(result.skipped), 'row')}, such as {row}: {reason}")
    if views := result.views_without_edit:
        count = counted(len(views), "view")
        click.echo(f"left out {count} without a visible edit, such as {views[0]}")
    if result.skipped or views:
        click.echo(f"full list: {shlex.quote(str(result.model.parent / 'left-out.jsonl'))}")
    folder = shlex.quote(str(result.model))
    click.echo(f"the model is in {folder}; edit with it:")
    click.echo(f"reasonpix edit IMAGE --instruction TEXT --model {folder}")


class _TrainingBars:
    """A progress bar for each stage, with loss, images/s and remaining time, if `visible`."""

    def __init__(self, visible: bool) -> None:
        self.visible = visible
        self.steps_taken = False
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _TrainingBars:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        terminal = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description:>8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=terminal,
            disable=not (self.visible and terminal.is_terminal),
            speed_estimate_period=600,
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self._bars.stop()

    def show(self, now: Progress) -> None:
        """Update the bar of the current stage."""
        self.steps_taken = now.stage in ("align", "train")
        facts = ""
        if now.loss is not None and now.rate is not None:
            facts = f"loss {now.loss:.4f}  {now.rate:.3g} images/s"
        if not self._tasks:
            self._bars.start()
        if now.stage not in self._tasks:
            # Begin where a resumed run begins, or the remaining time would be wrong.
            task = self._bars.add_task(now.stage, total=now.total, completed=now.done, facts=facts)
            self._tasks[now.stage] = task
        self._bars.update(self._tasks[now.stage], completed=now.done, total=now.total, facts=facts)


COMMANDS = (train_command,)
