"""The command that serves a model."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from reasonpix.cli import console, options
from reasonpix.errors import ReasonpixError, require_extra

TOKEN = "REASONPIX_TOKEN"
"""The environment variable with what clients have to know."""


@click.command("serve")
@options.editing_model_options
@options.host_option
@options.port_option
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Edits held at once, from the request to the answer; more are sent away with 429.",
)
@click.option(
    "--wait",
    type=click.FloatRange(min=0, max=60_000),
    default=10,
    show_default=True,
    metavar="MS",
    help="How long an edit waits for company while the model is idle.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=86_400),
    default=300,
    show_default=True,
    metavar="S",
    help="Time for one edit; it is given up beyond.",
)
@click.option(
    "--max-bytes",
    type=click.IntRange(min=1),
    default=20 * 2**20,
    show_default=True,
    metavar="N",
    help="Bytes of the largest image file.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=25_000_000,
    show_default=True,
    metavar="N",
    help="Pixels of the largest image.",
)
@click.option(
    "--max-steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Most denoising steps. By default 100, or the model's own if they are more.",
)
@click.option(
    "--max-resolution",
    type=click.IntRange(min=8),
    metavar="N",
    help="Largest --resolution that may be asked for. By default the model's own.",
)
@click.option("--no-page", is_flag=True, help="Serve the API alone, without the page at /.")
def serve_command(
    model: options.EditingModelArguments,
    host: str,
    port: int,
    queue: int,
    wait: float,
    timeout: float,
    max_bytes: int,
    max_pixels: int,
    max_steps: int | None,
    max_resolution: int | None,
    no_page: bool,
) -> None:
    """Serve MODEL: a page for the browser at /, and a REST API at /v1/edits.

    Who knows the address may use it, unless the environment variable REASONPIX_TOKEN holds a token:
    the API then wants it as a bearer token, the page as a password. SIGTERM and Ctrl-C finish the
    edits under way; a second one does not.
    """
    from reasonpix.core.sockets import listen, url_of

    token = _token()
    with require_extra("serve"):
        from reasonpix.deployment.server.process import run_server
        from reasonpix.deployment.server.service import Limits, Service

    name = model.model
    if Path(name).is_dir():  # clients must not see this machine's paths
        name = Path(name).resolve().name
    limits = Limits(queue, timeout, max_bytes, max_pixels, max_steps, max_resolution)
    try:
        with console.graceful_shutdown(), listen(host, port, backlog=2048) as listening:
            url = url_of(host, listening)
            click.echo(f"loading {model.model}; {url}/readyz says when it is ready", err=True)
            service = Service(model.load, name, limits=limits, wait=wait / 1000, token=token)
            run_server(
                service, listening, page=not no_page, ready=lambda: click.echo(f"serving on {url}")
            )
    except KeyboardInterrupt:
        os._exit(0)  # before it served: the interpreter's own end would wait for the model


def _token() -> str | None:
    token = os.environ.get(TOKEN)
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise ReasonpixError(
            f"{TOKEN} is set, and {'has characters that no header can carry' if token else 'empty'}"
            "; give it letters and digits, or unset it to serve without a token"
        )
    return token


COMMANDS = (serve_command,)
