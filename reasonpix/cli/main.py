"""The command line: parses, calls, prints. Whatever is heavy is imported by the command itself."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reasonpix.cli import console, evaluate, export, model, recipes, runs, serve, study
from reasonpix.cli.options import set_option

if TYPE_CHECKING:
    from reasonpix.generation.engine.engine import ExecutorName


class _Commands(click.Group):
    """Explains our own errors in one line each; `--debug` shows where they came from."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            from reasonpix.errors import ReasonpixError, RecipeError

            if ctx.params.get("debug") or not isinstance(error, ReasonpixError):
                raise
            click.echo(str(error), err=True)
            ctx.exit(2 if isinstance(error, RecipeError) else 1)


class _Limit(click.ParamType[float]):
    """A number of images, or all of them."""

    name = "N|all"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if value == "all":
            return math.inf
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is no number of images, and not 'all'", param, ctx)
        return int(value)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="reasonpix")
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
def main(debug: bool) -> None:
    """Make datasets for image editing by instructions that need reasoning."""


for command in (
    *runs.COMMANDS,
    *model.COMMANDS,
    *evaluate.COMMANDS,
    *export.COMMANDS,
    *serve.COMMANDS,
    recipes.recipes,
    recipes.plugins,
    study.study,
):
    main.add_command(command)

_run = click.argument("run")


@main.command()
@click.argument("recipe")
@click.option("--out", required=True, help="The run folder: a path, or a URL such as s3://…")
@set_option
@click.option(
    "--limit",
    type=_Limit(),
    help="Use only the first N images. A later call may give more, or 'all'.",
)
@click.option(
    "--target-accepted",
    type=click.IntRange(min=1),
    metavar="N",
    help="Use about as many images as it takes for N accepted samples, in rounds.",
)
@click.option("--shard-size", type=click.IntRange(min=1), help="Override the recipe's shard size.")
@click.option("--retry-failed", is_flag=True, help="Compute the records anew that failed.")
@click.option("--seed", type=click.IntRange(min=0), help="Override the recipe's seed.")
@click.option(
    "--max-cost",
    type=click.FloatRange(min=0, max=1e12),
    help="Stop before LLM answers of this run cost more in all, in the currency of the recipe's "
    "prices; with a higher limit the same command goes on.",
)
@click.option("--dry-run", is_flag=True, help="Estimate calls, tokens and cost; ask nothing.")
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="What does the work: this process, or Ray.",
)
@click.option(
    "--address", help="Address of a running Ray cluster; without it, one of this machine."
)
def generate(
    recipe: str,
    out: str,
    overrides: tuple[str, ...],
    limit: float | None,
    target_accepted: int | None,
    shard_size: int | None,
    retry_failed: bool,
    seed: int | None,
    max_cost: float | None,
    dry_run: bool,
    executor: ExecutorName,
    address: str | None,
) -> None:
    """Run RECIPE (a file, or the name of a shipped one) over its images into a run folder.

    Run the same command again to go on where it stopped.
    """
    if not out:
        raise click.UsageError("--out: name a folder")
    if address and executor != "ray":
        raise click.UsageError("--address goes with --executor ray")
    if dry_run and retry_failed:
        raise click.UsageError("--dry-run cannot tell what --retry-failed will ask")
    from reasonpix.generation.engine import engine
    from reasonpix.generation.recipe import load_recipe
    from reasonpix.generation.recipe_catalog import locate

    if seed is not None:
        overrides = (*overrides, f"seed={seed}")
    if shard_size is not None:
        overrides = (*overrides, f"shard_size={shard_size}")
    checked = load_recipe(locate(recipe), overrides)
    if dry_run:
        console.print_estimate(checked, out, limit, target_accepted)
        return
    console.tell_of_waits(click.get_current_context().find_root().params["debug"])
    try:
        with console.graceful_shutdown(), console.Bars() as bars:
            run = engine.generate(
                checked,
                out,
                limit,
                bars.show,
                max_cost,
                target_accepted=target_accepted,
                retry_failed=retry_failed,
                executor=executor,
                address=address,
            )
    except KeyboardInterrupt as stopped:
        click.echo(console.STOPPED, err=True)
        sys.exit(128 + (stopped.args or (2,))[0])
    console.print_summary(run, target_accepted)


@main.command()
@_run
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option(
    "--to",
    type=click.Choice(["hf", "instruct-pix2pix", "webdataset", "preference"]),
    default="hf",
    show_default=True,
    help="Form of the dataset.",
)
@click.option(
    "--push-to-hub",
    metavar="USER/NAME",
    help="Upload it to the Hugging Face Hub as this dataset.",
)
@click.option("--private", is_flag=True, help="Create that dataset private.")
def publish(run: str, out: Path, to: str, push_to_hub: str | None, private: bool) -> None:
    """Publish the accepted samples of RUN as a dataset."""
    from reasonpix.datasets import hub
    from reasonpix.datasets.publish import FORMS
    from reasonpix.datasets.publish import publish as write
    from reasonpix.generation.run_folder import RunFolder

    if private and not push_to_hub:
        raise click.UsageError("--private goes with --push-to-hub USER/NAME")
    if push_to_hub:
        hub.check(push_to_hub)  # before hours of writing
    rows = write(RunFolder(run), out, to)
    how = f"; load them with datasets.load_dataset({str(out)!r})" if FORMS[to].data else ""
    what = FORMS[to].what.replace("s ", " ", 1) if rows == 1 else FORMS[to].what
    click.echo(f"{rows} {what} in {out}{how}")
    if push_to_hub:
        click.echo(hub.push(out, push_to_hub, private))


@main.command()
@_run
@click.option("--limit", default=200, show_default=True, help="Pairs to show of each kind.")
def gallery(run: str, limit: int) -> None:
    """Write a page to look at RUN, and print its path."""
    from reasonpix.generation.run_folder import RunFolder
    from reasonpix.inspection.gallery import gallery as write

    page = write(RunFolder(run), limit)
    click.echo(page if "://" in page else Path(page).resolve())


if __name__ == "__main__":
    sys.exit(main())
