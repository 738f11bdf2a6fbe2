"""Push a published folder to the Hugging Face Hub, in one commit.

huggingface_hub reads the token from `HF_TOKEN` or `hf auth login`; this module never does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from reasonpix.core.figures import counted
from reasonpix.errors import ReasonpixError, RunError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAX_FILES = 25_000
"""The hub's limit of files in one commit."""

MAX_IN_FOLDER = 10_000
"""The hub's limit of entries in one folder."""


def check(name: str) -> None:
    """Check, before publishing, that a dataset can be pushed to `name` (USER/NAME).

    Raises `RunError` if huggingface_hub, the network or a valid token is missing, if the name is
    invalid, or if the hub already has a dataset of this name, and `ReasonpixError` for a proxy that
    cannot be used.
    """
    api = _api()
    with _explain_errors(name):
        owner, slash, own = name.partition("/")
        if not (owner and slash and own) or "/" in own:
            raise RunError(f"{name!r} is not a valid dataset name on the hub; give USER/NAME")
        api.whoami()
        _check_empty(api, name)


def push(folder: Path, name: str, private: bool = False) -> str:
    """Create the dataset `name` and upload the folder; return its URL.

    All files appear together or not at all. On failure, raises a `RunError` that gives the command
    to push the folder, which is kept.
    """
    from huggingface_hub import CommitOperationAdd

    api = _api()
    files = _files_of(folder)
    options = "--repo-type dataset" + (" --private" if private else "")
    again = f"; {folder} is complete: `hf upload {name} {quote(str(folder))} . {options}` pushes it"
    with _explain_errors(name, again):
        url = api.create_repo(name, repo_type="dataset", private=private or None, exist_ok=True)
        _check_empty(api, name)
        api.create_commit(
            name,
            [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
            commit_message="Publish with reasonpix",
            repo_type="dataset",
        )
    return str(url)


def _api() -> HfApi:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise RunError(
            "--push-to-hub needs the package huggingface_hub: pip install 'reasonpix[hub]'"
        ) from error
    from reasonpix.plugin.hub_client import check_hub_proxy, connect_hub

    check_hub_proxy()
    connect_hub()
    return HfApi(library_name="reasonpix")


def _check_empty(api: HfApi, name: str) -> None:
    """Raise `RunError` if the dataset exists and is not empty: somebody may use it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = api.list_repo_files(name, repo_type="dataset")
    except RepositoryNotFoundError:
        return
    if present := [file for file in files if file != ".gitattributes"]:
        raise RunError(
            f"{name} already has {counted(len(present), 'file')}, such as {present[0]}; push to "
            "another name, or delete that dataset on the hub first"
        )


def _files_of(folder: Path) -> list[Path]:
    """All files, sorted. Raises `RunError` if they exceed the hub's limits."""
    files: list[Path] = []
    largest = 0
    for parent, folders, names in os.walk(folder):
        largest = max(largest, len(folders) + len(names))
        files += (Path(parent, name) for name in names)
    if len(files) > MAX_FILES or largest > MAX_IN_FOLDER:
        raise RunError(
            f"{folder} has {len(files)} files, which exceeds the hub's limits; publish "
            "--to hf or --to webdataset, which put many samples in one file"
        )
    return sorted(files)


@contextmanager
def _explain_errors(name: str, again: str = "") -> Iterator[None]:
    """Translate the hub's errors into `RunError`. None of its messages contains the token."""
    import httpx2
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except RunError:
        raise
    except ReasonpixError as error:  # of the proxy
        raise RunError(str(error) + again) from error
    # ValueError: for example an invalid README. RuntimeError: an upload that broke off.
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        match cause:
            case ReasonpixError():
                why = str(cause)
            case HFValidationError():
                why = f"{name!r} is not a valid dataset name on the hub: {cause}"
            case LocalTokenNotFoundError():
                why = (
                    "the hub needs a token with write access: set HF_TOKEN, or log in once with "
                    "`hf auth login`"
                )
            case OfflineModeIsEnabled():
                why = "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"
            case HfHubHTTPError():
                why = _refusal(name, cause.response.status_code, str(cause))
            case httpx2.HTTPError():
                where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
                why = (
                    f"{where} cannot be reached: {str(cause) or type(cause).__name__}; "
                    "check the network and try again"
                )
            case _:
                why = f"the hub rejected {name}: {error}"
        raise RunError(why + again) from error


def _refusal(name: str, status: int, message: str) -> str:
    message = " ".join(message.split())
    if status == 401:
        return f"the hub rejected the token; set another HF_TOKEN, or log in again ({message})"
    if status == 403:
        return (
            f"the token has no write access to {name}; use one that has, or push to your own or "
            f"your organisation's account ({message})"
        )
    return f"the hub rejected {name}: {message}"
