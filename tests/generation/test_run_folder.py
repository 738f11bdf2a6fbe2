from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonpix.core.hashing import fingerprint, seed_of
from reasonpix.errors import RunError
from reasonpix.generation.run_folder import Plan, Row, RunFolder, Shard

SHARD = Shard("000000", 2)
ROWS = [
    Row("a", "ok", output='{"text":"a bee"}', image=b"\x00\xff"),
    Row("b", "failed", "it broke: ü\n"),
]
PLAN = Plan({}, {}, (SHARD,))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
facts = st.dictionaries(st.text(), json_values, min_size=1, max_size=4)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    run.freeze(PLAN)
    return run


@given(facts)
def test_the_order_of_keys_is_irrelevant(value: dict[str, object]) -> None:
    assert fingerprint({key: value[key] for key in reversed(value)}) == fingerprint(value)


@given(facts, st.data())
def test_any_change_changes_the_fingerprint(value: dict[str, object], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(value)))
    other = data.draw(json_values)
    changed = {**value, key: other}
    same = json.dumps(changed, sort_keys=True) == json.dumps(value, sort_keys=True)
    assert (fingerprint(changed) == fingerprint(value)) == same
    without = {k: v for k, v in value.items() if k != key}
    assert fingerprint(without) != fingerprint(value)


@given(
    st.lists(st.integers() | st.text(alphabet=st.characters(exclude_characters="\0")), min_size=1)
)
def test_seeds_follow_from_their_parts(parts: list[str | int]) -> None:
    assert 0 <= seed_of(*parts) < 2**63
    assert seed_of(*parts) == seed_of(*parts)
    assert seed_of(*parts) != seed_of(*parts, 0)


def test_what_is_known_of_fingerprints_stays() -> None:
    # Changing how they are made would throw away everybody's finished stages.
    assert fingerprint({"b": [1, 2.5, None], "a": "ü"}) == "91ff63a7ddb1"
    assert seed_of(0, "plan", "abc") == 6118940280120752742


def test_rows_come_back_as_they_were(run: RunFolder) -> None:
    assert run.done("caption-1") == set()
    run.write("caption-1", SHARD, ROWS)
    assert run.read("caption-1", SHARD) == ROWS
    assert run.done("caption-1") == {"000000"}
    run.write("empty-1", SHARD, [])
    assert run.read("empty-1", SHARD) == []


def test_folder_names_that_look_like_partitions_mean_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "_hidden" / ".dot" / "status=7")
    run.write("caption-1", SHARD, ROWS)
    assert run.read("caption-1", SHARD) == ROWS


def test_a_killed_writer_leaves_no_partial_file(tmp_path: Path) -> None:
    code = """if True:
        import itertools, sys
        from pathlib import Path
        from reasonpix.generation.run_folder import Plan, Row, RunFolder, Shard
        run = RunFolder(Path(sys.argv[1]))
        for number in itertools.count():
            rows = [Row(str(i), "ok", image=bytes([i]) * 100_000) for i in range(20)]
            run.write("edit-1", Shard(f"{number:06d}", 20), rows)
    """
    run = RunFolder(tmp_path)
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    deadline = time.monotonic() + 60
    while len(run.done("edit-1")) < 5 and time.monotonic() < deadline:
        time.sleep(0.003)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    done = run.done("edit-1")
    assert len(done) >= 5
    for name in done:
        rows = run.read("edit-1", Shard(name, 20))
        assert [row.image for row in rows] == [bytes([i]) * 100_000 for i in range(20)]


def test_a_draft_is_no_finished_shard(run: RunFolder, tmp_path: Path) -> None:
    run.write("edit-1", SHARD, ROWS)
    path = tmp_path / "stages" / "edit-1" / "000000.parquet"
    os.rename(path, path.with_name(f".{path.name}.123.tmp"))
    assert run.done("edit-1") == set()


def test_a_torn_journal_line_is_passed_over(run: RunFolder, tmp_path: Path) -> None:
    run.note(stage="edit-1", seconds=1.5)
    run.note(stage="edit-1", seconds=2.5)
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    [line] = run.journal()
    assert line["time"] > 0
    assert {**line, "time": 0} == {"stage": "edit-1", "seconds": 1.5, "time": 0}


def test_no_journal_is_an_empty_one(run: RunFolder) -> None:
    assert list(run.journal()) == []


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run folder.*reasonpix generate"):
        RunFolder(tmp_path).shards()


@pytest.mark.parametrize("content", [b'{"asked": {}, "sha', b"[]", b"{}", b"\xff\xfe", b""])
def test_a_damaged_plan(run: RunFolder, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(RunError, match=r"plan\.json .*start a new run"):
        run.shards()


@pytest.mark.parametrize("damage", ["cut", "empty", "garbled", "gone", "foreign"])
def test_a_damaged_shard_says_which_and_what_to_do(
    run: RunFolder, tmp_path: Path, damage: str
) -> None:
    run.write("edit-1", SHARD, ROWS)
    path = tmp_path / "stages" / "edit-1" / "000000.parquet"
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "garbled":
        path.write_bytes(whole[:4] + bytes(len(whole) - 12) + whole[-8:])
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "foreign": b"PNG"}[damage])
    with pytest.raises(RunError, match=r"000000\.parquet cannot be read.*delete it and run again"):
        run.read("edit-1", SHARD)
