"""Whole runs against a server that fails, is slow, and charges; they are killed in the middle.

The server writes its own bill, so that what a run pays is not taken from the run's own word.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from reasonpix.llm.ledger import Ledger
from reasonpix.llm.types import Price
from tests.support.llm_server import Server, served

KEY = "sk-recognisable-0123456789"
RECORDS = 500
CONCURRENCY = 32
PRICE = Price(prompt=1.0, completion=2.0)


def was_asked(server: Server, times: int) -> bool:
    return server.log("count")["requests"] >= times


def asked_of(server: Server) -> list[str]:
    """What was asked, in order, in a form that `stored` gives as well."""
    return [_question(body["messages"], body["seed"]) for body in server.bodies()]


def bill_of(server: Server) -> float:
    """What it charges in all."""
    return sum(
        PRICE.of(entry["prompt_tokens"], entry["completion_tokens"])
        for entry in server.log("bill").values()
    )


def _question(messages: list[dict[str, str]], seed: int) -> str:
    return json.dumps([messages, seed % 2**31])


@dataclass
class Run:
    """`reasonpix generate` in a process of its own, as often as it takes."""

    folder: Path
    out: str = field(default="", init=False)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command("generate", self.folder / "recipe.yaml", "--out", self.path, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> int:
        output, _ = process.communicate(timeout=120)
        self.out += output
        return process.returncode

    def killed(self, when: Callable[[], bool]) -> None:
        """Start it, and kill it once `when` is true."""
        process = self.start()
        try:
            while not when():
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
        assert self.finish(process) == -signal.SIGKILL

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "reasonpix", *map(str, arguments)]

    @property
    def path(self) -> Path:
        return self.folder / "run"

    def stored(self) -> set[str]:
        """The questions whose answers are stored."""
        with Ledger(self.path / "llm.sqlite") as ledger:
            return {
                _question([turn.model_dump() for turn in messages], answer.conversation.seed)
                for answer in ledger.answers()
                for messages in [answer.conversation.messages]
            }

    def endings(self) -> dict[str, tuple[str, str]]:
        """How each record ended: status and reason of the last stage that saw it."""
        ends = {}
        for stage in ("read", "caption", "extract", "ground", "plan", "edit"):
            for path in sorted(self.path.glob(f"stages/{stage}-*/*.parquet")):
                for row in pq.read_table(path).to_pylist():
                    ends[row["record_id"]] = (row["status"], row["reason"])
        return ends


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        yield server


def prepared(folder: Path, server: Server, records: int = RECORDS, **options: Any) -> Run:
    planner = {
        "use": "openai",
        "base_url": f"{server.root}/v1",
        "concurrency": CONCURRENCY,
        "price": PRICE.model_dump(),
        **options,
    }
    recipe = {
        "source": {"use": "fake-source", "count": records},
        "pipeline": {
            "captioner": "fake-captioner",
            "extractor": "fake-extractor",
            "grounder": "fake-grounder",
            "planner": planner,
            "editor": "fake-editor",
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Run(folder)


# Together a third of all attempts.
RATES = {
    "429": 0.03,
    "429-after": 0.02,
    "500": 0.04,
    "cut": 0.02,
    "cut-body": 0.02,
    "stall": 0.02,
    "no-json": 0.04,
    "wrong-schema": 0.03,
    "refusal": 0.03,
    "empty": 0.03,
    "length": 0.02,
    "leak": 0.03,
}
FAULTS = {"rates": RATES, "seed": 1, "stall": 2.0, "retry_after": 0.2}


@dataclass(frozen=True)
class Ordeal:
    """A run that met all faults, and was killed twice."""

    run: Run
    server: Server
    kills: list[tuple[int, set[str]]]
    """Requests that were made, and questions whose answers were stored, when it was killed."""
    published: Path


@pytest.fixture(scope="module")
def ordeal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ordeal]:
    folder = tmp_path_factory.mktemp("ordeal")
    with served() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        server.script(latency=0.05, faults=FAULTS)
        run = prepared(folder, server, timeout_s=0.8, max_retries=1)
        kills = []
        for enough in (150, 350):
            run.killed(partial(was_asked, server, enough))
            kills.append((len(asked_of(server)), run.stored()))
        assert run.finish(run.start()) == 0, run.out
        published = folder / "dataset"
        done = subprocess.run(
            run.command("publish", run.path, "--out", published),
            capture_output=True,
            text=True,
        )
        run.out += done.stdout + done.stderr
        assert done.returncode == 0, run.out
        yield Ordeal(run, server, kills, published)


def test_every_record_ends_with_a_reason(ordeal: Ordeal) -> None:
    ends = ordeal.run.endings()
    assert len(ends) == RECORDS
    counts = Counter(status for status, _ in ends.values())
    assert counts["ok"] > RECORDS / 2
    assert counts["rejected"] and counts["failed"]
    assert sum(counts[status] for status in ("ok", "rejected", "failed")) == RECORDS
    assert all(reason for status, reason in ends.values() if status != "ok")


def test_every_kind_of_fault_was_met(ordeal: Ordeal) -> None:
    reasons = " ".join(reason for _, reason in ordeal.run.endings().values())
    assert "refused: " in reasons
    assert "no usable answer" in reasons
    assert "attempts" in reasons
    # What is not seen in the endings is seen in the bill: charged, and never handed over.
    bill = ordeal.server.log("bill").values()
    assert any(entry["charged"] > entry["delivered"] for entry in bill)
    assert any(entry["asked"] > entry["charged"] for entry in bill)


def test_what_was_stored_is_not_asked_again(ordeal: Ordeal) -> None:
    asked = asked_of(ordeal.server)
    for made, stored in ordeal.kills:
        assert len(stored) > 50
        assert stored <= set(asked[:made])
        assert not stored & set(asked[made:])


def test_the_key_is_nowhere(ordeal: Ordeal) -> None:
    requests = ordeal.server.log("requests")["requests"]
    assert {request["authorization"] for request in requests} == {f"Bearer {KEY}"}
    shown = {"stdout and stderr": ordeal.run.out}
    for path in [*ordeal.run.path.rglob("*"), *ordeal.published.rglob("*")]:
        if path.is_file():
            shown[str(path)] = path.read_bytes().decode("latin-1")
        if path.suffix == ".parquet":  # compressed
            shown[f"rows of {path}"] = repr(pq.read_table(path).to_pylist())
    # The server did repeat it, in answers and in errors.
    assert [name for name, text in shown.items() if "[API key]" in text]
    assert [name for name, text in shown.items() if "recognisable" in text] == []


def test_only_calls_in_flight_are_paid_twice_after_a_kill(tmp_path: Path, server: Server) -> None:
    server.script(latency=0.1)
    run = prepared(tmp_path, server)
    for enough in (120, 300):
        run.killed(partial(was_asked, server, enough))
    stored = run.stored()
    assert run.finish(run.start()) == 0, run.out
    ends = Counter(status for status, _ in run.endings().values())
    assert ends == {"ok": RECORDS}
    asked = Counter(asked_of(server))
    assert len(asked) == RECORDS
    assert len(stored) >= 300 - 2 * CONCURRENCY
    assert asked.total() - RECORDS <= 2 * CONCURRENCY
    bill = server.log("bill").values()
    assert sum(entry["charged"] for entry in bill) == asked.total()
    # A run that is finished asks nothing.
    assert run.finish(run.start()) == 0
    assert Counter(asked_of(server)) == asked


def test_the_cost_limit_holds_by_the_server_s_own_bill(tmp_path: Path, server: Server) -> None:
    charging = {"cut": 0.04, "cut-body": 0.04, "stall": 0.02, "500": 0.04, "no-json": 0.05}
    server.script(latency=0.05, faults={"rates": charging, "stall": 2.0})
    run = prepared(tmp_path, server, timeout_s=0.8)
    paid = 0.0
    for limit in (0.002, 0.05, 0.3):
        assert run.finish(run.start("--max-cost", str(limit))) == 1, run.out
        assert "raise --max-cost" in run.out
        assert paid <= bill_of(server) <= limit
        paid = bill_of(server)
        if limit > 0.01:  # One call may cost 0.007.
            assert paid > limit / 3
    assert run.finish(run.start("--max-cost", "10")) == 0, run.out
    assert len(run.endings()) == RECORDS
    assert bill_of(server) > paid
    asked = Counter(asked_of(server))
    stored = run.stored()
    assert stored <= set(asked)
    # Stopping lost no answer: nothing that was handed over in full was asked for again.
    bill = server.log("bill").values()
    assert all(entry["delivered"] <= 1 for entry in bill)


def test_a_killed_run_waits_for_the_batch_that_it_handed_in(tmp_path: Path, server: Server) -> None:
    server.script(batches="in_progress")
    run = prepared(tmp_path, server, records=40, batch=True)
    run.killed(lambda: bool(server.log()["batches"]))
    server.tell("batches", {"become": "completed"})
    assert run.finish(run.start()) == 0, run.out
    assert Counter(status for status, _ in run.endings().values()) == {"ok": 40}
    assert len(server.log()["batches"]) == 1
    assert [entry["charged"] for entry in server.log("bill").values()] == [1] * 40


def test_a_run_tells_what_the_server_refused_and_did_not_report(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And reaches it past a proxy that could not be used."""
    monkeypatch.setenv("ALL_PROXY", "socks5://me:recognisable@127.0.0.1:9")
    server.script(refuses=["seed", "temperature"], form="usage-absent")
    run = prepared(tmp_path, server, records=3)
    assert run.finish(run.start()) == 0, run.out
    assert run.out.count("does not accept seed, which is left out") == 1
    assert "3 answers were given without seed, which the server refused" in run.out
    assert "3 answers were given without temperature, which the server refused" in run.out
    assert "the server did not report the tokens of 3 answers, so their cost is the most" in run.out
    told = subprocess.run(
        run.command("inspect", run.path, next(iter(run.endings()))), capture_output=True, text=True
    )
    assert "[answer, stop; given without seed, temperature]" in told.stdout, told


def test_a_proxy_that_cannot_be_used_is_told_on_one_line(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5h://me:recognisable@127.0.0.1:9")
    run = prepared(tmp_path, server, records=3, base_url="http://llm.example/v1")
    assert run.finish(run.start()) == 1
    [line] = run.out.splitlines()
    assert line.startswith(
        "ALL_PROXY names a SOCKS proxy, which needs another package: pip install"
    )
    assert not run.path.exists()
