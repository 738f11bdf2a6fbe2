"""The commands on an existing run: look at it, refilter it, clean it, publish it."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote

import click

from reasonpix.cli import console
from reasonpix.cli.options import run_argument, set_option
from reasonpix.core.figures import counted


@click.command("status")
@run_argument
@click.option(
    "--recipe", help="Show what this recipe (a file, or a shipped recipe) would reuse of RUN."
)
@set_option("seed=1 or pipeline.planner=lexicon")
def status_command(run: str, recipe: str | None, overrides: tuple[str, ...]) -> None:
    """Show how far each stage of RUN is, and how its records ended.

    With --recipe, or with --set to change the run's own recipe, show what that recipe would reuse
    and what it would compute.
    """
    from reasonpix.generation.recipe import load_recipe
    from reasonpix.generation.run_folder import RunFolder
    from reasonpix.generation.run_recipe import recipe_of
    from reasonpix.inspection.status import read_status

    folder = RunFolder(run)
    other = None
    if recipe is not None:
        other = load_recipe(recipe, overrides)
    elif overrides:
        other = recipe_of(folder, overrides)
    for line in read_status(folder, other).lines():
        click.echo(line)


@click.command("clean")
@run_argument
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def clean_command(run: str, yes: bool) -> None:
    """Remove the results in RUN that its current recipe does not use."""
    from reasonpix.generation.run_folder import RunFolder
    from reasonpix.inspection.status import clean, superseded, superseded_lines

    folder = RunFolder(run)
    folders = superseded(folder)
    if folders:
        for line in superseded_lines(folders):
            click.echo(line)
        if not yes:
            click.confirm(
                "Remove them? A recipe that needs them would have to recompute them", abort=True
            )
    clean(folder, folders)
    click.echo(f"{counted(len(folders), 'stage folder')} removed")


@click.command("refilter")
@run_argument
@set_option("filters.0.reject_fraction=0.2")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Where to write the page; by default survival.html in RUN.",
)
def refilter_command(run: str, overrides: tuple[str, ...], out: Path | None) -> None:
    """Reapply the filters of RUN, changed by --set, to the stored scores. No model runs.

    Writes a page that shows how many records pass each threshold, and prints its path.
    """
    from reasonpix.generation.outcomes import outcome_counts
    from reasonpix.generation.run_folder import RunFolder
    from reasonpix.inspection.refilter import reapply_filters
    from reasonpix.inspection.threshold_curves import write_survival_page

    folder = RunFolder(run)
    before = None
    if overrides:
        before, after = reapply_filters(folder, overrides)
    else:
        after = outcome_counts(folder)
    console.print_funnel(after, before)
    click.echo(
        f"{after.accepted:,} of {counted(after.total, 'record')} accepted"
        + (f" ({before.accepted} before)" if before else "")
    )
    if before:
        command = f"reasonpix generate {quote(f'{folder}/recipe.yaml')} --out {quote(str(folder))}"
        click.echo(
            f"{folder}/recipe.yaml and {folder}/stages.json were rewritten: `{command}` keeps "
            "these thresholds; another recipe would apply its own again"
        )
    console.print_location(write_survival_page(folder, out, before))


@click.command("inspect")
@run_argument
@click.argument("record")
@click.option("--replay", is_flag=True, help="Recompute its stages and show what differs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect_command(run: str, record: str, replay: bool, as_json: bool) -> None:
    """Show what every stage of RUN did with RECORD.

    RECORD is a record id, a unique prefix of one, or a name in the source. With --replay the exit
    code is 1 when a stage gives a different result now.
    """
    import json

    from reasonpix.generation.run_folder import RunFolder
    from reasonpix.inspection.lineage import trace_record
    from reasonpix.inspection.lineage_text import lineage_lines
    from reasonpix.inspection.replay import replay_lines, replay_record

    folder = RunFolder(run)
    if replay:
        lineage, replayed = replay_record(folder, record)
    else:
        lineage, replayed = trace_record(folder, record), []
    if as_json:
        more = {"replayed": [vars(stage) for stage in replayed]} if replay else {}
        click.echo(json.dumps(lineage.as_dict() | more, indent=1, ensure_ascii=False))
    else:
        lines = [*lineage_lines(lineage)]
        if replay:
            lines += ["", "recomputed", *replay_lines(replayed)]
        click.echo("\n".join(lines))
    if not all(stage.is_identical for stage in replayed):
        sys.exit(1)


@click.command("gallery")
@run_argument
@click.option(
    "--limit",
    type=click.IntRange(0),
    default=1000,
    show_default=True,
    help="Maximum number of accepted records to show, and of other records.",
)
def gallery_command(run: str, limit: int) -> None:
    """Write an HTML page that shows RUN, and print its path."""
    from reasonpix.generation.run_folder import RunFolder
    from reasonpix.inspection.gallery import write_gallery

    console.print_location(write_gallery(RunFolder(run), limit))


@click.command("publish")
@run_argument
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option(
    "--to",
    type=click.Choice(["hf", "instruct-pix2pix", "webdataset", "preference"]),
    default="hf",
    show_default=True,
    help="Format of the dataset.",
)
@click.option(
    "--push-to-hub",
    metavar="USER/NAME",
    help="Upload it to the Hugging Face Hub as this dataset.",
)
@click.option("--private", is_flag=True, help="Make the dataset on the hub private.")
def publish_command(run: str, out: Path, to: str, push_to_hub: str | None, private: bool) -> None:
    """Publish the accepted samples of RUN as a dataset."""
    from reasonpix.datasets import hub
    from reasonpix.datasets.publishing import FORMS, publish
    from reasonpix.generation.run_folder import RunFolder

    if private and not push_to_hub:
        raise click.UsageError("--private needs --push-to-hub USER/NAME")
    if push_to_hub:
        hub.check(push_to_hub)  # before hours of writing
    rows = publish(RunFolder(run), out, to)
    click.echo(
        f"{FORMS[to].count(rows)} in {out}; load them with datasets.load_dataset({str(out)!r})"
    )
    if push_to_hub:
        click.echo(hub.push(out, push_to_hub, private))


@click.command("parts")
@click.argument("places", metavar="RUN|DATASET...", nargs=-1, required=True)
@click.option("--split", default="train", show_default=True, help="Split of datasets to count.")
def parts_command(places: tuple[str, ...], split: str) -> None:
    """Count the samples of runs and published datasets by part, as Table 2 of the paper does.

    Counts the accepted records of a run. A record that several runs or datasets list, such as a run
    and the dataset published from it, counts once.
    """
    from reasonpix.inspection.parts import read_parts, table_lines

    for line in table_lines([read_parts(place, split) for place in places]):
        click.echo(line)


COMMANDS = (
    status_command,
    clean_command,
    refilter_command,
    inspect_command,
    gallery_command,
    publish_command,
    parts_command,
)
