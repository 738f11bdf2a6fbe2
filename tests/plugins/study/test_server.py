from __future__ import annotations

import random
import re
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from reasonpix_study.store import Study, StudyAnswer

from reasonpix.core.network import listen
from reasonpix.errors import ReasonpixError
from tests.support.study_files import METHODS, serving, small_study


def current(page: httpx2.Response) -> int:
    """The number of the sample that a page asks about; 0 for one that asks about none."""
    assert page.status_code == 200
    found = re.search(r'name="number" value="(\d+)"', page.text)
    return int(found[1]) if found else 0


def judge(client: httpx2.Client, code: str, number: int, position: int) -> httpx2.Response:
    form = {"number": str(number), "position": str(position), "seconds": "1.5"}
    return client.post(f"/{code}/answer", data=form)


def codes_of(folder: Path) -> list[str]:
    with Study(folder) as study:
        return [it.code for it in study.invitations()]


def answers_of(folder: Path) -> list[StudyAnswer]:
    with Study(folder) as study:
        return study.answers()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, httpx2.Client]]:
    """A study with many invitations, and a client of its server."""
    folder = tmp_path_factory.mktemp("served")
    small_study(folder, workers=12).close()
    with (
        serving(folder / "study") as (_, url),
        httpx2.Client(base_url=url, follow_redirects=True) as client,
    ):
        yield folder / "study", client


def test_a_whole_session(served: tuple[Path, httpx2.Client]) -> None:
    folder, client = served
    code = codes_of(folder)[0]
    assert "You will see 4 pictures" in client.get(f"/{code}").text
    assert client.get(f"/{code}").text == client.get(f"/{code}").text
    with Study(folder) as study:
        assert not study.session(1).started  # to look at a link takes no sheet
    page = client.post(f"/{code}/start")
    for number in range(1, 5):
        assert current(page) == number
        assert current(client.get(f"/{code}")) == number
        page = judge(client, code, number, number)
    assert "All 4 answers are stored" in page.text
    with Study(folder) as study:
        mine = [it for it in study.answers() if it.worker == 1]
    assert [(it.position, it.seconds) for it in mine] == [(n, 1.5) for n in range(1, 5)]
    assert "All 4 answers are stored" in client.post(f"/{code}/start").text


def test_nothing_sent_tells_a_method(served: tuple[Path, httpx2.Client]) -> None:
    folder, client = served
    code = codes_of(folder)[1]
    pages = [client.get(f"/{code}"), client.post(f"/{code}/start")]
    for number in range(1, 5):
        for url in dict.fromkeys(re.findall(r'(?:src|href)="([^"]+)"', pages[-1].text)):
            if not url.startswith("data:"):
                got = client.get(url)
                assert got.status_code == 200
                assert got.headers["cache-control"] == "public, max-age=31536000, immutable"
                assert not {"last-modified", "etag", "server"} & got.headers.keys()
                pages.append(got)
        pages.append(judge(client, code, number, 2))
    everything = b"".join(it.content + repr(it.headers).encode() for it in pages).lower()
    for word in (*METHODS, "reasonpix", "case0", "ground truth", "row 1"):
        assert word.lower().encode() not in everything
    assert sum(it.headers["content-type"] == "image/png" for it in pages) >= 4 * 5


def test_hostile_words_stay_words(served: tuple[Path, httpx2.Client]) -> None:
    folder, client = served
    code = codes_of(folder)[2]
    page = client.post(f"/{code}/start")
    seen = ""
    for number in range(1, 5):
        seen += page.text
        page = judge(client, code, number, 1)
    assert "to &lt;b&gt;</h1>" in seen and "<b>" not in seen


def test_headers_of_pages(served: tuple[Path, httpx2.Client]) -> None:
    folder, client = served
    page = client.get(f"/{codes_of(folder)[0]}")
    assert page.headers["cache-control"] == "no-store"
    assert page.headers["referrer-policy"] == "no-referrer"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "set-cookie" not in page.headers


def test_wrong_links(served: tuple[Path, httpx2.Client]) -> None:
    folder, client = served
    code = codes_of(folder)[0]
    for path in ("", "nobody", code[:-1], code + "A", "ü", "images/x.png", "docs", "openapi.json"):
        page = client.get(f"/{path}")
        assert page.status_code == 404 and "There is nothing here" in page.text
    for path in (f"images/{'0' * 64}.png", "images/..%2Fstudy.sqlite", f"images/{'0' * 64}.png%0A"):
        assert client.get(f"/{path}").status_code == 404
    assert client.post("/nobody/start").status_code == 404
    assert judge(client, "nobody", 1, 1).status_code == 404
    assert client.post(f"/{code}").status_code == 405


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"number=1",
        b"number=1&position=0",
        b"number=1&position=5",
        b"number=one&position=1",
        b"number=1&position=1&seconds=nan",
        b"number=1&position=1&seconds=-1",
        b"\xff\xfe=\xff",
        b"number=1&position=" + b"9" * 500,
        b"x" * 2000,
    ],
)
def test_answers_that_cannot_be_are_refused(
    served: tuple[Path, httpx2.Client], body: bytes
) -> None:
    folder, client = served
    code = codes_of(folder)[3]
    client.post(f"/{code}/start")
    refused = client.post(f"/{code}/answer", content=body)
    assert refused.status_code == (413 if len(body) > 1000 else 400)
    assert "Nothing was stored" in refused.text
    assert current(client.get(f"/{code}")) == 1


def test_sent_twice_late_and_from_two_devices(served: tuple[Path, httpx2.Client]) -> None:
    folder, client = served
    code = codes_of(folder)[4]
    client.post(f"/{code}/start")
    with ThreadPoolExecutor(8) as pool:
        for number in range(1, 5):
            ready = threading.Barrier(8)

            def send(
                position: int, number: int = number, ready: threading.Barrier = ready
            ) -> httpx2.Response:
                ready.wait()
                return judge(client, code, number, position)

            after = list(pool.map(send, [1, 2, 3, 4] * 2))
            assert {current(page) for page in after} == {(number + 1) % 5}
    before = [it for it in answers_of(folder) if it.worker == 5]
    assert len(before) == 4
    for number in range(5):
        judge(client, code, number, 1)
    assert [it for it in answers_of(folder) if it.worker == 5] == before


def work(client: httpx2.Client, code: str, seed: int, acknowledged: list[tuple[int, int]]) -> None:
    """Judge until the end or until the server is gone; write down what it took."""
    rng = random.Random(seed)
    try:
        number = current(client.get(f"/{code}")) or current(client.post(f"/{code}/start"))
        while number:
            position = rng.randint(1, 4)
            page = judge(client, code, number, position)
            assert page.status_code == 200
            acknowledged.append((number, position))
            number = current(page)
    except httpx2.TransportError:
        return


def test_many_workers_several_servers_and_kills(tmp_path: Path) -> None:
    """Two servers are killed again and again; every answer that was acknowledged is there."""
    small_study(tmp_path, cases=24, samples=24, per_worker=24, workers=8).close()
    folder = tmp_path / "study"
    codes = codes_of(folder)
    taken: list[list[tuple[int, int]]] = [[] for _ in codes]
    for life in range(3):
        with serving(folder) as (one, url), serving(folder) as (other, second):
            clients = [httpx2.Client(base_url=it, follow_redirects=True) for it in (url, second)]
            with ThreadPoolExecutor(len(codes)) as pool:
                for n, code in enumerate(codes):
                    pool.submit(work, clients[n % 2], code, 100 * life + n, taken[n])
                if life < 2:
                    while sum(map(len, taken)) < 60 * (life + 1):
                        time.sleep(0.005)
                    one.send_signal(signal.SIGKILL)
                    other.send_signal(signal.SIGKILL)
            for client in clients:
                client.close()
        if life < 2:
            assert sum(map(len, taken)) < 8 * 24
    with Study(folder) as study:
        answers = study.answers()
        assert all(it.answered == it.total == 24 for it in study.invitations())
    for worker, acknowledged in enumerate(taken, 1):
        mine = dict(enumerate((it.position for it in answers if it.worker == worker), 1))
        # One that was stored but not acknowledged was judged no second time.
        assert mine.items() >= dict(acknowledged).items()
        assert len(acknowledged) == len(dict(acknowledged)) >= 24 - 2
    assert len({(it.worker, it.case) for it in answers}) == len(answers) == 8 * 24
    db = sqlite3.connect(folder / "study.sqlite")
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(tmp_path: Path, number: signal.Signals) -> None:
    small_study(tmp_path).close()
    with serving(tmp_path / "study") as (process, url):
        assert process.stdout is not None and process.stderr is not None
        with httpx2.Client(base_url=url) as client:  # its connection is still open
            assert client.get("/nobody").status_code == 404
            process.send_signal(number)
            assert process.wait(10) == 0
        assert process.stderr.read() == "stopped; run the same command again to continue\n"
    assert [path.name for path in (tmp_path / "study").glob("study.sqlite*")] == ["study.sqlite"]


def test_invitations_can_be_added_while_it_serves(served: tuple[Path, httpx2.Client]) -> None:
    folder, client = served
    with Study(folder) as study:
        study.invite(1)
        code = study.invitations()[-1].code
    assert current(client.post(f"/{code}/start")) == 1


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ReasonpixError, match=f"127.0.0.1:{port} cannot be served: .*--port"):
            listen("127.0.0.1", port)


def test_a_file_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    small_study(tmp_path).close()
    folder = tmp_path / "study"
    code = codes_of(folder)[0]
    with serving(folder) as (_, url), httpx2.Client(base_url=url) as client:
        db = sqlite3.connect(folder / "study.sqlite")
        db.execute("ALTER TABLE workers RENAME TO gone")
        db.close()
        page = client.get(f"/{code}")
        assert page.status_code == 503 and "One moment, please" in page.text
        db = sqlite3.connect(folder / "study.sqlite")
        db.execute("ALTER TABLE gone RENAME TO workers")
        db.close()
        assert client.get(f"/{code}").status_code == 200
