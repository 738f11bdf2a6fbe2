"""The commands for a user study."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from reasonpix.cli import console, options
from reasonpix.errors import require_extra

if TYPE_CHECKING:
    from reasonpix.evaluation.study.store import Study

_folder = click.argument("folder", metavar="STUDY", type=click.Path(path_type=Path))
_url = click.option("--url", metavar="URL", help="Under which workers reach the server.")


@click.group()
def study() -> None:
    """Let people pick the best of several methods' edits."""


@study.command()
@click.argument("evaluation", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="METHOD",
    help="Compare this method; given once for each. By default the evaluation's four.",
)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    metavar="KIND",
    help="Judge by this kind of instructions. By default by all the evaluation has.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    metavar="N",
    help="Samples of each kind.",
)
@click.option(
    "--per-worker",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="N",
    help="Samples that one worker judges.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Invitations. By default enough for every sample to be judged once; with more, samples "
    "are judged by several workers, whose agreement is then reported.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the choice of samples, and of who sees which in which order.",
)
@_url
def create(
    evaluation: Path,
    out: Path,
    methods: tuple[str, ...],
    kinds: tuple[str, ...],
    samples: int,
    per_worker: int,
    workers: int | None,
    seed: int,
    url: str | None,
) -> None:
    """Make a study of the edits in EVALUATION, the folder of `reasonpix evaluate`.

    Prints one link for each worker.
    """
    from reasonpix.evaluation.results import EvaluationFolder
    from reasonpix.evaluation.study.create import create_study

    with create_study(
        EvaluationFolder(evaluation),
        out,
        methods=methods,
        kinds=kinds,
        samples=samples,
        per_worker=per_worker,
        workers=workers,
        seed=seed,
    ) as made:
        design = made.design
        _print_links(made, url)
    click.echo(
        f"{design.cases} samples by {' and '.join(design.kinds)} instructions; "
        f"{design.sheets} workers judge each of them once"
    )
    click.echo(f"serve it: reasonpix study serve {quote(str(out))}")


@study.command()
@_folder
@options.host_option
@options.port_option
@_url
def serve(folder: Path, host: str, port: int, url: str | None) -> None:
    """Serve the pages of STUDY, until Ctrl-C or SIGTERM. Every answer is stored at once."""
    from reasonpix.evaluation.study.store import Study

    with require_extra("study"):
        from reasonpix.deployment.server import sockets
        from reasonpix.evaluation.study import server

    with Study(folder) as served:
        taken = sockets.listen(host, port)
        try:
            with console.graceful_shutdown():
                _print_links(served, url or sockets.address(host, taken))
                server.serve(served, taken)
        except KeyboardInterrupt:
            click.echo(console.STOPPED, err=True)
        finally:
            taken.close()


@study.command()
@_folder
@click.option(
    "--add",
    type=click.IntRange(min=1),
    metavar="N",
    help="Make N invitations more. The server need not be stopped.",
)
@_url
def codes(folder: Path, add: int | None, url: str | None) -> None:
    """Print the workers' links of STUDY, and how far each worker is."""
    from reasonpix.evaluation.study.store import Study

    with Study(folder) as shown:
        if add:
            shown.invite(add)
        _print_links(shown, url)


@study.command()
@_folder
def report(folder: Path) -> None:
    """Print what the workers of STUDY chose, and write answers.csv and report.json into it."""
    from reasonpix.evaluation.study.report import study_report

    study_report(folder).print()
    for name in ("answers.csv", "report.json"):
        click.echo((folder / name).resolve())


def _print_links(study: Study, url: str | None) -> None:
    base = (url or "http://127.0.0.1:8000").rstrip("/")
    for it in study.invitations():
        click.echo(f"worker {it.worker}: {base}/{it.code}  {it.answered} of {it.total}")


COMMANDS = (study,)
