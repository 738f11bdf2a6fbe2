"""The command that serves a model."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from reasonpix.cli import console, options
from reasonpix.errors import ReasonpixError, require_extra

TOKEN = "REASONPIX_TOKEN"
"""The environment variable that holds the token clients must send."""


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
    help="Edits accepted at once, running or waiting; further requests get status 429.",
)
@click.option(
    "--wait",
    type=click.FloatRange(min=0, max=60_000),
    default=10,
    show_default=True,
    metavar="MS",
    help="How long an edit waits for others to join its batch when the model is idle.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=86_400),
    default=300,
    show_default=True,
    metavar="S",
    help="Longest time for one edit, in seconds; after that it is cancelled.",
)
@click.option(
    "--max-bytes",
    type=click.IntRange(min=1),
    default=20 * 2**20,
    show_default=True,
    metavar="N",
    help="Largest image file, in bytes.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=25_000_000,
    show_default=True,
    metavar="N",
    help="Largest image, in pixels.",
)
@click.option(
    "--max-steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Most denoising steps per edit. By default 100, or the model's own number if larger.",
)
@click.option(
    "--max-resolution",
    type=click.IntRange(min=8),
    metavar="N",
    help="Largest resolution a request may use. By default the model's own.",
)
@click.option("--no-page", is_flag=True, help="Serve only the API, without the page at /.")
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

    Without REASONPIX_TOKEN anyone who can reach the address can use the server. If this environment
    variable holds a token, the API requires it as a bearer token and the page asks for it. SIGTERM
    or Ctrl-C shuts down gracefully; a second signal stops immediately.
    """
    from reasonpix.core.network import listen, url_of

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
        os._exit(0)  # not serving yet; a normal exit would wait for the model to load


def _token() -> str | None:
    token = os.environ.get(TOKEN)
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise ReasonpixError(
            f"{TOKEN} {'has characters that a header cannot carry' if token else 'is empty'}; use "
            "letters and digits, or unset it to serve without a token"
        )
    return token


COMMANDS = (serve_command,)
