"""The commands for a run that is there: how far it is, its filters, single records, old results."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from reasonpix.cli.options import set_option

if TYPE_CHECKING:
    from reasonpix.generation.outcomes import OutcomeCounts

_run = click.argument("run")


@click.command()
@_run
@click.option("--recipe", help="Tell what this recipe (a file, or a shipped one) would reuse.")
@set_option
def status(run: str, recipe: str | None, overrides: tuple[str, ...]) -> None:
    """Show for each stage of RUN what is reused, done, to do, and failed.

    With a recipe, or with --set for the run's own: what it would reuse and compute in RUN.
    """
    from reasonpix.generation.recipe import load_recipe
    from reasonpix.generation.recipe_catalog import locate
    from reasonpix.generation.run_folder import RunFolder
    from reasonpix.generation.run_recipe import recipe_of
    from reasonpix.inspection.status import status as status_of

    folder = RunFolder(run)
    asked = None
    if recipe is not None:
        asked = load_recipe(locate(recipe), overrides)
    elif overrides:
        asked = recipe_of(folder, overrides)
    for line in status_of(folder, asked).lines():
        click.echo(line)


@click.command()
@_run
@click.option("--yes", is_flag=True, help="Do not ask.")
def clean(run: str, yes: bool) -> None:
    """Remove the results of RUN that no current stage needs, after asking."""
    from reasonpix.generation.run_folder import RunFolder
    from reasonpix.inspection.status import clean as remove
    from reasonpix.inspection.status import superseded, superseded_lines

    folder = RunFolder(run)
    found = superseded(folder)
    if found:
        for line in superseded_lines(found):
            click.echo(line)
        if not yes:
            click.confirm("Remove them? To go back to them would compute them again", abort=True)
    remove(folder, found)
    click.echo(f"{len(found)} stage folder{'s' * (len(found) != 1)} removed")


@click.command()
@_run
@set_option
@click.option(
    "--out", type=click.Path(path_type=Path), help="The page; survival.html in RUN by default."
)
def refilter(run: str, overrides: tuple[str, ...], out: Path | None) -> None:
    """Apply the filters of RUN anew, changed by --set, from stored scores: no model is asked.

    Draws how many records survive each threshold, and prints where the page is.
    """
    from reasonpix.generation.outcomes import outcome_counts
    from reasonpix.generation.run_folder import RunFolder
    from reasonpix.inspection.refilter import refilter as apply
    from reasonpix.inspection.threshold_curves import draw_survival

    folder = RunFolder(run)
    if overrides:
        before, after = apply(folder, overrides)
        _print_funnel(after, before)
        again = f"reasonpix generate {quote(f'{folder}/recipe.yaml')} --out {quote(str(folder))}"
        click.echo(
            f"{folder}/recipe.yaml and {folder}/stages.json are rewritten: `{again}` keeps these "
            "thresholds, another recipe applies its own again"
        )
        page = draw_survival(folder, out, before)
    else:
        _print_funnel(outcome_counts(folder))
        page = draw_survival(folder, out)
    click.echo(page if "://" in page else Path(page).resolve())


def _print_funnel(after: OutcomeCounts, before: OutcomeCounts | None = None) -> None:
    earlier = {} if before is None else dict(before.stages)
    head = f"{'stage':>22} {'ok':>8} {'rejected':>8} {'failed':>8}"
    click.echo(head + (f" {'ok before':>10}" if before else ""))
    for stage, counts in after.stages:
        line = f"{stage:>22} {counts['ok']:8} {counts['rejected']:8} {counts['failed']:8}"
        click.echo(line + (f" {earlier[stage]['ok']:10}" if stage in earlier else ""))
    were = f" ({before.accepted} before)" if before else ""
    records = f"record{'s' * (after.total != 1)}"
    click.echo(f"{after.accepted} of {after.total} {records} accepted{were}")


@click.command()
@_run
@click.argument("record")
@click.option("--replay", is_flag=True, help="Compute its stages anew, and say what differs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(run: str, record: str, replay: bool, as_json: bool) -> None:
    """Show the whole way of RECORD through RUN: its id, how that begins, or its name in the source.

    With --replay the exit code is 1 when a stage gives something else now.
    """
    import json

    from reasonpix.generation.run_folder import RunFolder
    from reasonpix.inspection.lineage import lineage
    from reasonpix.inspection.lineage_text import lines
    from reasonpix.inspection.replay import replay as replayed_of
    from reasonpix.inspection.replay import replay_lines

    folder = RunFolder(run)
    told, replayed = replayed_of(folder, record) if replay else (lineage(folder, record), [])
    if as_json:
        more = {"replayed": [vars(it) for it in replayed]} if replay else {}
        click.echo(json.dumps(told.as_dict() | more, indent=1, ensure_ascii=False))
    else:
        for line in lines(told):
            click.echo(line)
        if replay:
            click.echo("\ncomputed anew")
            for line in replay_lines(replayed):
                click.echo(line)
    if not all(it.is_identical for it in replayed):
        sys.exit(1)


COMMANDS = (status, clean, refilter, inspect)
