"""`reasonpix study`: create a study, serve its pages, list its links, report its answers."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from reasonpix.cli import STOPPED, graceful_shutdown, host_option, port_option

if TYPE_CHECKING:
    from reasonpix_study.store import Study

_study_argument = click.argument("folder", metavar="STUDY", type=click.Path(path_type=Path))
_url_option = click.option(
    "--url", metavar="URL", help="Address at which workers reach the server."
)


@click.group()
def study() -> None:
    """Let people pick the best of several methods' edits."""


@study.command("create")
@click.argument("evaluation", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="METHOD",
    help="A method to compare; repeat it for each. Needed unless the evaluation has four.",
)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    metavar="KIND",
    help="A kind of instructions to judge by; repeat it for each. Default: all.",
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
    help="Number of invitations. Default: as many as it takes to judge every sample once. With "
    "more, several workers judge the same samples, and their agreement is reported.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Determines the samples, their assignment to workers, and the order of candidates.",
)
@_url_option
def create_command(
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
    """Create a study of the edits in EVALUATION, a folder written by `reasonpix evaluate`.

    Prints one link for each worker.
    """
    from reasonpix.evaluation import EvaluationFolder
    from reasonpix_study.create import create_study

    with create_study(
        EvaluationFolder(evaluation),
        out,
        methods=methods,
        kinds=kinds,
        samples=samples,
        per_worker=per_worker,
        workers=workers,
        seed=seed,
    ) as created:
        design = created.design
        _print_links(created, url)
    click.echo(
        f"{design.cases} samples with {' and '.join(design.kinds)} instructions; "
        f"{design.sheets} workers judge each of them once"
    )
    click.echo(f"serve it: reasonpix study serve {quote(str(out))}")


@study.command("serve")
@_study_argument
@host_option
@port_option
@_url_option
def serve_command(folder: Path, host: str, port: int, url: str | None) -> None:
    """Serve the pages of STUDY until Ctrl-C or SIGTERM. Every answer is stored immediately."""
    from reasonpix.core import listen, url_of
    from reasonpix_study.server import serve_study
    from reasonpix_study.store import Study

    with Study(folder) as opened, listen(host, port) as listening:
        try:
            with graceful_shutdown():
                _print_links(opened, url or url_of(host, listening))
                serve_study(opened, listening)
        except KeyboardInterrupt:
            click.echo(STOPPED, err=True)


@study.command("codes")
@_study_argument
@click.option(
    "--add",
    type=click.IntRange(min=1),
    metavar="N",
    help="Add N invitations. The server may keep running.",
)
@_url_option
def codes_command(folder: Path, add: int | None, url: str | None) -> None:
    """Print the link and the progress of each worker of STUDY."""
    from reasonpix_study.store import Study

    with Study(folder) as opened:
        if add:
            opened.invite(add)
        _print_links(opened, url)


@study.command("report")
@_study_argument
def report_command(folder: Path) -> None:
    """Print the results of STUDY so far, and write answers.csv and report.json into it."""
    from reasonpix_study.report import write_report

    write_report(folder).print()
    for name in ("answers.csv", "report.json"):
        click.echo((folder / name).resolve())


def _print_links(study: Study, url: str | None) -> None:
    base = (url or "http://127.0.0.1:8000").rstrip("/")
    for invitation in study.invitations():
        progress = f"{invitation.answered} of {invitation.total}"
        click.echo(f"worker {invitation.worker}: {base}/{invitation.code}  {progress}")
