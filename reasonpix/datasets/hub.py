"""Push a published folder to the Hugging Face Hub, in one commit.

The token is that of `HF_TOKEN` or of `hf auth login`; huggingface_hub reads it, nothing here does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from reasonpix.errors import RunError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MOST_FILES = 25_000
"""Files that the hub takes in one commit."""

MOST_IN_FOLDER = 10_000
"""Entries that the hub takes in one folder."""


def check(name: str) -> None:
    """Raise `RunError` when a dataset cannot be pushed to `name` (USER/NAME), before it is made.

    That is without huggingface_hub, network, or a token that is valid, and when the name is none or
    holds a dataset already.
    """
    api = _api()
    with _explained(name):
        owner, slash, own = name.partition("/")
        if not (owner and slash and own) or "/" in own:
            raise RunError(f"{name!r} is no name of a dataset on the hub; give USER/NAME")
        api.whoami()
        _check_empty(api, name)


def push(folder: Path, name: str, private: bool = False) -> str:
    """Create the dataset `name` and upload the folder; returns its address.

    All files appear together or not at all. Raises `RunError` that says how to go on: the folder
    stays as it is.
    """
    from huggingface_hub import CommitOperationAdd

    api = _api()
    files = _files_of(folder)
    options = "--repo-type dataset" + (" --private" if private else "")
    again = f"; {folder} is complete: `hf upload {name} {quote(str(folder))} . {options}` pushes it"
    with _explained(name, again):
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
    return HfApi(library_name="reasonpix")


def _check_empty(api: HfApi, name: str) -> None:
    """Raise `RunError` when the dataset exists and holds anything: it might be somebody's."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = api.list_repo_files(name, repo_type="dataset")
    except RepositoryNotFoundError:
        return
    if held := [file for file in files if file != ".gitattributes"]:
        raise RunError(
            f"{name} holds {len(held)} file{'s' * (len(held) != 1)} already, such as {held[0]}; "
            "push to another name, or delete that dataset on the hub first"
        )


def _files_of(folder: Path) -> list[Path]:
    """All files, sorted. Raises `RunError` when they are more than the hub takes."""
    files: list[Path] = []
    most = 0
    for parent, folders, names in os.walk(folder):
        most = max(most, len(folders) + len(names))
        files += (Path(parent, name) for name in names)
    if len(files) > MOST_FILES or most > MOST_IN_FOLDER:
        raise RunError(
            f"{folder} holds {len(files)} files, more than the hub takes; publish it "
            "--to hf or --to webdataset, which hold many samples in a file"
        )
    return sorted(files)


@contextmanager
def _explained(name: str, again: str = "") -> Iterator[None]:
    """What the hub refuses, in words of ours. No message of it holds the token."""
    import httpx2
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    # ValueError: such as a README that the hub does not take. RuntimeError: an upload that broke.
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        match cause:
            case HFValidationError():
                why = f"{name!r} is no name of a dataset on the hub: {cause}"
            case LocalTokenNotFoundError():
                why = (
                    "the hub wants a token that may write: set HF_TOKEN, or log in once with "
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
                    "see to the network and try again"
                )
            case _:
                why = f"the hub did not take {name}: {error}"
        raise RunError(why + again) from error


def _refusal(name: str, status: int, said: str) -> str:
    said = " ".join(said.split())
    if status == 401:
        return f"the hub does not know the token; set another HF_TOKEN, or log in again ({said})"
    if status == 403:
        return (
            f"the token may not write to {name}; use one that may, at your own name or your "
            f"organisation's ({said})"
        )
    return f"the hub did not take {name}: {said}"
