"""Runs over hundreds of bad images: each is read correctly, or is a row with a reason."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import run
from threading import Thread
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonpix.core.files.ignored import Ignored
from reasonpix.core.images import MAX_PIXELS, UndecodableImage, decode
from reasonpix.errors import SourceError
from reasonpix.generation.engine.engine import generate
from reasonpix.generation.outcomes import Outcome, read_outcomes, read_stages
from reasonpix.generation.recipe import load_recipe
from reasonpix.generation.run_folder import RunFolder
from reasonpix.plugin.components import SourceItem
from reasonpix.plugin.registry import find
from tests.conftest import FAKES, WriteRecipe
from tests.support.image_cases import (
    DAMAGED,
    FORMATS,
    NO_IMAGE,
    PICTURE,
    TOO_LARGE,
    Case,
    cases,
    plain,
)
from tests.support.image_files import Array, encoded, png

CASES = cases()
SOUND = plain("png")


def special_files(folder: Path) -> dict[str, Array | str]:
    """Make what is no plain file; gives the pixels or the reason that must come of each name."""
    elsewhere = folder.with_name("elsewhere")
    for name in ("target.png", "real/in.png"):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).write_bytes(SOUND)
    (folder / "linked file.png").symlink_to(elsewhere / "target.png")
    (folder / "linked link.png").symlink_to("linked file.png")
    (folder / "linked nowhere.png").symlink_to("nowhere.png")
    (folder / "linked itself.png").symlink_to("linked itself.png")
    (folder / "linked ring a.png").symlink_to("linked ring b.png")
    (folder / "linked ring b.png").symlink_to("linked ring a.png")
    (folder / "linked zeros.png").symlink_to("/dev/zero")
    (folder / "linked folder").symlink_to(elsewhere / "real")
    (folder / "linked folder again").symlink_to(elsewhere / "real")
    (folder / "linked folder.png").symlink_to(folder / "deep")
    (folder / "deep" / "loop").symlink_to(folder)
    (elsewhere / "real" / "loop").symlink_to(elsewhere / "real")
    (elsewhere / "real" / "back").symlink_to(folder)
    (folder / "empty folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    os.mknod(folder / "socket.png", stat.S_IFSOCK | 0o600)
    with (folder / "sparse.png").open("wb") as file:
        file.truncate((1 << 30) + 1)
    (folder / "notes.txt").write_text("no image")
    (folder / "no suffix").write_bytes(SOUND)
    (folder / ".png").write_bytes(SOUND)
    for raw in (b"\xff.png", b"\xfe/in.png"):
        path = os.path.join(os.fsencode(folder), raw)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(SOUND)
    return {
        "no suffix": PICTURE,
        "linked file.png": PICTURE,
        "linked link.png": PICTURE,
        "linked nowhere.png": "No such file",
        "linked itself.png": "Too many levels of symbolic links",
        "linked ring a.png": "Too many levels of symbolic links",
        "linked ring b.png": "Too many levels of symbolic links",
        "linked zeros.png": "not a regular file",
        "linked folder/in.png": PICTURE,
        "pipe.png": "not a regular file",
        "socket.png": "not a regular file",
        "sparse.png": "1073741825 bytes exceed the limit",
        "'\\udcff.png'": "its name is not UTF-8",
        "'\\udcfe/in.png'": "its name is not UTF-8",
    }


@dataclass
class Finished:
    """A run over all cases and special files: how it ended, and how each of them did."""

    run: Path
    exit_status: int
    peak_bytes: int
    outcomes: dict[str, Outcome]
    listed: list[str]
    special: dict[str, Array | str]


ALONE = """if True:
    import atexit, re
    from pathlib import Path
    from reasonpix.cli.main import cli

    def tell():
        status = Path("/proc/self/status").read_text()
        Path("peak").write_text(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])

    atexit.register(tell)
    cli()
"""
"""What wait4 tells of a process counts what that held which it was forked from."""


def run_alone(recipe: Path, out: Path) -> tuple[int, int]:
    """`reasonpix generate` in a process of its own; its exit status and peak memory in bytes."""
    command = [sys.executable, "-c", ALONE, "generate", str(recipe), "--out", str(out)]
    environment = {**os.environ, "HF_HOME": str(out.parent / "hf"), "HF_HUB_OFFLINE": "1"}
    with (out.parent / "log").open("w") as log:
        done = run(command, cwd=out.parent, env=environment, stdout=log, stderr=log)
    return done.returncode, int((out.parent / "peak").read_text()) * 1024


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("bad")
    for case in CASES:
        path = root / "images" / case.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(case.data)
    special = special_files(root / "images")
    source = {"use": "image-folder", "path": str(root / "images")}
    recipe = {"shard_size": 50, "source": source, "pipeline": FAKES}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    status, peak = run_alone(root / "recipe.yaml", root / "run")
    ended = list(read_outcomes(RunFolder(root / "run"))) if status == 0 else []
    names = [outcome.sample.item.native_id for outcome in ended]
    return Finished(
        root / "run", status, peak, dict(zip(names, ended, strict=True)), names, special
    )


def test_there_are_more_than_two_hundred() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 200
    assert 100 < sum(case.pixels is not None for case in CASES) < len(CASES) - 100


def test_nothing_stops_the_run_and_nothing_is_missing(finished: Finished) -> None:
    assert finished.exit_status == 0
    wanted = [case.name for case in CASES] + list(finished.special)
    assert sorted(finished.listed) == sorted(wanted)
    assert len({o.sample.record_id for o in finished.outcomes.values()}) == len(wanted)


def test_what_is_ignored_is_kept_with_the_plan(finished: Finished) -> None:
    ignored = json.loads((finished.run / "plan.json").read_text())["ignored"]
    assert ignored == {
        "hidden": {"count": 1, "names": [".png"]},
        "not an image (.txt)": {"count": 1, "names": ["notes.txt"]},
    }


def test_memory_stays_bounded(finished: Finished) -> None:
    # The largest sound image takes a few KB; a bomb or the sparse file takes from 0.3 to 10 GB.
    # One image of the most pixels that are let in takes 300 MB; no more than a few are decoded.
    assert finished.peak_bytes < 800e6


@pytest.mark.parametrize("case", CASES, ids=[ascii(case.name) for case in CASES])
def test_each_is_read_correctly_or_says_why_not(case: Case, finished: Finished) -> None:
    outcome = finished.outcomes[case.name]
    if case.reason:
        assert (outcome.status, outcome.stage) == ("failed", "read")
        assert outcome.reason.startswith(f"{case.name}: ")
        assert re.search(case.reason, outcome.reason.removeprefix(case.name)), outcome.reason
        return
    assert (outcome.status, outcome.stage, outcome.reason) == ("ok", "", "")
    image = outcome.sample.image()
    assert image.mode == "RGB"
    assert case.is_met_by(np.asarray(image))
    # What is edited is that image, turned upright and all.
    assert outcome.sample.edited_image().size == image.size


def test_what_is_no_plain_file(finished: Finished) -> None:
    for name, wanted in finished.special.items():
        outcome = finished.outcomes[name]
        if isinstance(wanted, str):
            assert (outcome.status, outcome.stage) == ("failed", "source"), name
            assert re.search(re.escape(wanted), outcome.reason), outcome.reason
        else:
            assert (outcome.status, outcome.reason) == ("ok", ""), name
            assert np.array_equal(np.asarray(outcome.sample.image()), wanted), name


# -- decode --------------------------------------------------------------------------------------

VALID = [plain(kind) for kind in FORMATS] + [case.data for case in CASES if len(case.data) < 4000]
AT = st.integers(0, 4000)
CHANGE = st.one_of(
    st.tuples(st.just("flip"), AT, st.integers(1, 255)),
    st.tuples(st.just("set"), AT, st.sampled_from([0, 255, 127, 128, 1])),
    st.tuples(st.just("cut"), AT, st.integers(1, 200)),
    st.tuples(st.just("double"), AT, st.integers(1, 200)),
    st.tuples(st.just("insert"), AT, st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("end"), AT, st.just(0)),
)


def changed(data: bytes, kind: str, at: int, by: Any) -> bytes:
    at %= max(len(data), 1)
    match kind:
        case "flip":
            return data[:at] + bytes([data[at] ^ by]) + data[at + 1 :] if data else data
        case "set":
            return data[:at] + bytes([by] * 4) + data[at + 4 :]
        case "cut":
            return data[:at] + data[at + by :]
        case "double":
            return data[: at + by] + data[at:]
        case "insert":
            return data[:at] + by + data[at:]
    return data[:at]


@settings(max_examples=1500, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(VALID), st.lists(CHANGE, min_size=1, max_size=4))
def test_decode_raises_nothing_else_and_does_not_hang(
    data: bytes, changes: list[tuple[str, int, Any]]
) -> None:
    for change in changes:
        data = changed(data, *change)
    started = time.perf_counter()
    try:
        image = decode(data)
    except UndecodableImage as error:
        assert str(error)
        assert str(error) != "damaged image: "
    else:
        assert image.mode == "RGB"
        assert 0 < image.width * image.height <= MAX_PIXELS
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("kind", FORMATS)
def test_wherever_a_file_is_cut_no_half_image_comes(kind: str) -> None:
    data = plain(kind)
    whole = np.asarray(decode(data))
    refused = 0
    for end in range(len(data)):
        try:
            image = decode(data[:end])
        except UndecodableImage:
            refused += 1
        else:
            assert np.array_equal(np.asarray(image), whole), end
    assert refused > len(data) // 2


def test_the_limit_is_reached_and_not_passed() -> None:
    side = 10_000
    assert side * side == MAX_PIXELS
    image = decode(encoded(Image.new("1", (side, side), 1), "PNG"))
    assert image.size == (side, side)
    assert image.getpixel((side - 1, side - 1)) == (255, 255, 255)
    with pytest.raises(UndecodableImage, match=TOO_LARGE):
        decode(encoded(Image.new("1", (side, side + 1), 1), "PNG"))


@pytest.mark.filterwarnings("error")
def test_threads_do_not_hear_pillow_warn_nor_lose_other_warnings() -> None:
    # Above Pillow's own limit it warns, which here would be an error.
    large = png((9_500, 9_500), 1, 0, b"")
    reasons: list[str] = []

    def work() -> None:
        for _ in range(20):
            with pytest.raises(UndecodableImage) as raised:
                decode(large)
            reasons.append(str(raised.value))

    before = list(warnings.filters)
    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reasons) == 80
    assert all(re.search(DAMAGED, reason) and "bomb" not in reason for reason in reasons)
    assert warnings.filters == before


# -- sources -------------------------------------------------------------------------------------


def test_an_image_that_becomes_a_pipe_after_the_plan(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(SOUND)
    path = write_recipe(source={"use": "image-folder", "path": str(folder)})
    generate(load_recipe(path), tmp_path / "run")
    (folder / "b.png").unlink()
    os.mkfifo(folder / "b.png")
    run = generate(load_recipe(path, ["pipeline.captioner.caption=a cat"]), tmp_path / "run")
    first, second = read_outcomes(run)
    assert first.status == "ok"
    assert (second.status, second.stage) == ("failed", "caption")
    assert "not a regular file" in second.reason


@contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder of a user who is not root: root may read everything."""
    with tempfile.TemporaryDirectory() as name:
        root = os.geteuid() == 0
        if root:
            os.chown(name, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)


def test_what_may_not_be_read() -> None:
    cls = find("source", "image-folder")
    with as_nobody() as folder:
        for name in ("closed/in.png", "closed.png", "open.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(SOUND)
        for name in ("closed", "closed.png"):
            (folder / name).chmod(0)
        source = cls(cls.Options.model_validate({"path": folder}))
        try:
            closed, file, sound = source.items()  # type: ignore[attr-defined]
            folder.chmod(0o300)
            with pytest.raises(SourceError, match=r"path: .*Permission denied"):
                list(source.items())  # type: ignore[attr-defined]
        finally:
            folder.chmod(0o700)
            (folder / "closed").chmod(0o700)
    reason = "a folder that cannot be searched (Permission denied)"
    assert closed == Ignored("closed/", reason)
    assert (file[0], file[1].reason) == ("closed.png", "closed.png: Permission denied")
    assert isinstance(sound, SourceItem)


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(SOUND)
    names = ["good.png", "bad\0.png", "x" * 300 + ".png"]
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    (tmp_path / "v3det.json").write_text(json.dumps({"images": images}))
    cls = find("source", "v3det")
    options = {"annotations": tmp_path / "v3det.json", "images": tmp_path}
    good, null, long = cls(cls.Options.model_validate(options)).items()  # type: ignore[attr-defined]
    assert isinstance(good, SourceItem)
    assert null[1].reason == r"'bad\x00.png': embedded null byte"
    assert long[1].reason.endswith(".png: File name too long")


def test_pairs_of_which_an_image_is_bad(tmp_path: Path) -> None:
    """InstructPix2Pix data: an input or an edited image of each kind of damage, others sound."""
    jpeg, folder = plain("jpeg"), tmp_path / "data" / "1"
    folder.mkdir(parents=True)
    pairs: dict[str, tuple[bytes | None, bytes | None, str, str]] = {
        "sound": (jpeg, jpeg, "", ""),
        "cut input": (jpeg[:300], jpeg, "read", DAMAGED),
        "cut edit": (jpeg, jpeg[:300], "read", DAMAGED),
        "empty edit": (jpeg, b"", "read", "the file is empty"),
        "bomb": (png((60_000, 60_000), 8, 2, b""), jpeg, "read", TOO_LARGE),
        "other size": (jpeg, encoded(Image.new("RGB", (8, 8)), "JPEG"), "read", "edited image of"),
        "no edit": (jpeg, None, "source", "No such file"),
        "no input": (None, jpeg, "source", "No such file"),
        "page": (b"<html>", jpeg, "read", NO_IMAGE),
        "last": (jpeg, plain("png"), "", ""),
    }
    for seed, (first, second, _, _) in pairs.items():
        for number, data in enumerate((first, second)):
            if data is not None:
                (folder / f"{seed}_{number}.jpg").write_bytes(data)
    os.mkfifo(folder / "pipe_0.jpg")
    (folder / "pipe_1.jpg").write_bytes(jpeg)
    words = {"input": "a bee", "edit": "turn it green", "output": "a green bee"}
    (folder / "prompt.json").write_text(json.dumps(words))
    (folder.parent / "2").mkdir()
    os.mkfifo(folder.parent / "2" / "prompt.json")
    seeds = [["1", [*pairs, "pipe"]], ["2", ["any"]]]
    (folder.parent / "seeds.json").write_text(json.dumps(seeds))

    source = {"use": "instruct-pix2pix", "path": str(folder.parent), "pairs": True}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {"part": "rewrite", "source": source, "pipeline": {"planner": "fake-planner"}}
        )
    )
    ended = list(read_outcomes(generate(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run")))
    wanted = [
        *[(f"1/{seed}_0.jpg", stage, reason) for seed, (_, _, stage, reason) in pairs.items()],
        ("1/pipe_0.jpg", "source", "not a regular file"),
        ("2/any_0.jpg", "source", "2/prompt.json: not a regular file"),
    ]
    assert [outcome.sample.item.native_id for outcome in ended] == [name for name, _, _ in wanted]
    for outcome, (name, stage, reason) in zip(ended, wanted, strict=True):
        assert outcome.stage == stage, name
        assert re.search(reason, outcome.reason), outcome.reason
        assert (outcome.status == "ok") == (stage == "")


def test_a_dataset_with_bad_images(tmp_path: Path) -> None:
    """A Hugging Face dataset: cells of each kind of damage, others sound."""
    pytest.importorskip("datasets")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "there.png").write_bytes(SOUND)
    cmyk = encoded(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "TIFF")
    cells: list[tuple[bytes | None, str | None, str, str]] = [
        (SOUND, None, "", ""),
        (SOUND[:40], None, "read", DAMAGED),
        (b"", None, "read", "the file is empty"),
        (None, None, "source", "row 3: no image"),
        (b"<html>", None, "read", NO_IMAGE),
        (png((60_000, 60_000), 8, 2, b""), None, "read", TOO_LARGE),
        (cmyk, "misleading.png", "", ""),
        (None, str(tmp_path / "there.png"), "", ""),
        (None, str(tmp_path / "nowhere.png"), "source", "row 8: .*No such file"),
        (None, str(tmp_path / "pipe.png"), "source", "row 9: .*not a regular file"),
        (SOUND, None, "", ""),
    ]
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": data, "path": path} for data, path, _, _ in cells], kind)
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"image": images}), tmp_path / "data" / "train.parquet")
    source = {"use": "hf-dataset", "path": str(tmp_path / "data")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"source": source, "pipeline": FAKES}))
    status, _ = run_alone(tmp_path / "recipe.yaml", tmp_path / "run")
    log = (tmp_path / "log").read_text()
    assert status == 0, log
    rows = endings(tmp_path / "run")
    for (found, stage, reason), (_, _, wanted_stage, wanted) in zip(rows, cells, strict=True):
        assert (found == "ok", stage) == (wanted_stage == "", wanted_stage), reason
        assert re.search(wanted, reason), reason


def endings(run: Path) -> list[tuple[str, str, str]]:
    """How each record ended, from the rows alone: opening datasets here would cache and be slow."""
    folder = RunFolder(run)
    last: dict[str, tuple[str, str, str]] = {}
    stages = ["source", *[entry.folder for entry in read_stages(folder)]]
    for shard in folder.shards():
        for stage in stages:
            for row in folder.read(stage, shard):
                ended = "" if row.status == "ok" else stage.partition("-")[0]
                last[row.record_id] = (row.status, ended, row.reason)
    return list(last.values())
