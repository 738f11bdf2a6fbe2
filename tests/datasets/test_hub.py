"""Pushing to a hub on this machine, with the real huggingface_hub in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from reasonpix.datasets.hub import push
from reasonpix.datasets.publishing import publish
from reasonpix.errors import RunError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.recipe import load_recipe
from tests.conftest import WriteRecipe
from tests.support import hub_server
from tests.support.hub_server import Hub

TOKEN = "hf_planted1234567890abcdefghijklmnopqr"

PUSH = """if True:
    import sys
    from pathlib import Path
    from reasonpix.errors import RunError
    from reasonpix.datasets.hub import check, push
    name, private, *verbs = sys.argv[1:]
    try:
        if "check" in verbs:
            check(name)
        if "push" in verbs:
            print(push(Path("dataset"), name, private == "private"))
    except RunError as error:
        sys.exit(f"RunError: {error}")
"""

Push = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server.running(TOKEN) as running:
        yield running


@pytest.fixture
def dataset(write_recipe: WriteRecipe, tmp_path: Path) -> Path:
    run = generate(load_recipe(write_recipe()), tmp_path / "run")
    publish(run, tmp_path / "dataset")
    return tmp_path / "dataset"


@pytest.fixture
def pushing(tmp_path: Path) -> Push:
    def call(
        where: str,
        name: str = "ada/edits",
        private: str = "",
        verbs: str = "push",
        command: Sequence[str] = (),
        **more: str,
    ) -> subprocess.CompletedProcess[str]:
        pytest.importorskip("huggingface_hub")
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_ENDPOINT": where,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": TOKEN,
            **more,
        }
        return subprocess.run(
            command or [sys.executable, "-c", PUSH, name, private, *verbs.split()],
            cwd=tmp_path,
            env={key: value for key, value in environment.items() if value},
            capture_output=True,
            text=True,
        )

    return call


def told(done: subprocess.CompletedProcess[str]) -> str:
    """What a refused call says, on one line."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr[done.stderr.index("RunError: ") :].strip()


def test_the_files_arrive_in_one_commit_and_the_token_goes_nowhere(
    hub: Hub, dataset: Path, pushing: Push, tmp_path: Path
) -> None:
    done = pushing(hub.url, verbs="check push")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/datasets/ada/edits"
    there = hub.files["ada/edits"]
    here = {
        path.relative_to(dataset).as_posix(): path.read_bytes()
        for path in dataset.rglob("*")
        if path.is_file()
    }
    assert set(here) == {"README.md", "data/train-00000.parquet"}
    assert {name: data for name, data in there.items() if name != ".gitattributes"} == here
    assert hub.commits == 1
    assert list(hub.large.values()) == [here["data/train-00000.parquet"]]  # it went by LFS
    assert not hub.private["ada/edits"]
    assert TOKEN not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_a_private_dataset_is_created_private(hub: Hub, dataset: Path, pushing: Push) -> None:
    assert pushing(hub.url, private="private").returncode == 0
    assert hub.private["ada/edits"]


def test_a_token_of_the_login_serves_as_well(
    hub: Hub, dataset: Path, pushing: Push, tmp_path: Path
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(TOKEN)
    assert pushing(hub.url, verbs="check push", HF_TOKEN="").returncode == 0
    assert "ada/edits" in hub.files


@pytest.mark.parametrize("verb", ["check", "push"])
def test_what_somebody_has_there_is_not_touched(
    hub: Hub, dataset: Path, pushing: Push, verb: str
) -> None:
    hub.files["ada/edits"] = {".gitattributes": b"", "data.csv": b"precious"}
    message = told(pushing(hub.url, verbs=verb))
    assert "ada/edits already has 1 file, such as data.csv; push to another name" in message
    assert hub.files["ada/edits"] == {".gitattributes": b"", "data.csv": b"precious"}
    assert hub.commits == 0


def test_an_empty_dataset_of_that_name_is_filled(hub: Hub, dataset: Path, pushing: Push) -> None:
    hub.files["ada/edits"] = {".gitattributes": b""}
    done = pushing(hub.url, verbs="check push")
    assert done.returncode == 0, done.stderr
    assert "README.md" in hub.files["ada/edits"]


@pytest.mark.parametrize("verb", ["check", "push"])
def test_without_a_token_it_says_how_to_give_one(
    hub: Hub, dataset: Path, pushing: Push, verb: str
) -> None:
    message = told(pushing(hub.url, verbs=verb, HF_TOKEN=""))
    assert "HF_TOKEN" in message
    assert hub.files == {}


@pytest.mark.parametrize("verb", ["check", "push"])
def test_a_wrong_token_is_told(hub: Hub, dataset: Path, pushing: Push, verb: str) -> None:
    wrong = "hf_" + "w" * 34
    message = told(pushing(hub.url, verbs=verb, HF_TOKEN=wrong))
    assert "the hub rejected the token; set another HF_TOKEN, or log in again" in message
    assert wrong not in message
    assert hub.files == {}


def test_a_token_that_may_not_write_is_told_with_the_way_on(dataset: Path, pushing: Push) -> None:
    with hub_server.running(TOKEN, may_write=False) as hub:
        assert pushing(hub.url, verbs="check").returncode == 0  # it may read
        message = told(pushing(hub.url, private="private"))
    assert "the token has no write access to ada/edits" in message
    assert message.endswith(
        "; dataset is complete: `hf upload ada/edits dataset . --repo-type dataset --private` "
        "pushes it"
    )
    # What it says is true.
    command = message.split("`")[-2].split()
    with hub_server.running(TOKEN) as hub:
        done = pushing(hub.url, command=[str(Path(sys.executable).with_name("hf")), *command[1:]])
        assert done.returncode == 0, done.stderr
        assert set(hub.files["ada/edits"]) >= {"README.md", "data/train-00000.parquet"}
        assert hub.private["ada/edits"]


def test_a_hub_that_is_not_there_is_told(dataset: Path, pushing: Push) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        where = f"http://127.0.0.1:{taken.getsockname()[1]}"
        message = told(pushing(where, verbs="check"))
    assert f"{where} cannot be reached: " in message
    assert "check the network and try again" in message


def test_offline_it_says_so(hub: Hub, dataset: Path, pushing: Push) -> None:
    message = told(pushing(hub.url, verbs="check", HF_HUB_OFFLINE="1"))
    assert message == "RunError: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"
    assert hub.calls == []


@pytest.mark.parametrize("name", ["edits", "ada/", "/edits", "a/b/c", "ada/ed its", "ada/--"])
def test_what_is_no_name_is_told_before_anything_is_asked(
    hub: Hub, pushing: Push, name: str
) -> None:
    message = told(pushing(hub.url, name=name, verbs="check"))
    assert f"{name!r} is not a valid dataset name on the hub" in message
    assert "POST /api/repos/create" not in hub.calls


def test_more_files_than_the_hub_takes_are_refused_here() -> None:
    pytest.importorskip("huggingface_hub")
    fast = Path("/dev/shm")
    with TemporaryDirectory(dir=fast if fast.is_dir() else None) as folder:
        for number in range(10_001):
            os.mknod(f"{folder}/{number}")
        with pytest.raises(
            RunError, match="10001 files, which exceeds the hub's limits; publish --to"
        ):
            push(Path(folder), "ada/edits")
