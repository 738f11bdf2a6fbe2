from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reasonpix.core.files.tar_index import TarIndex, index_tar


def tar(path: Path, *members: tuple[str, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def contents(path: Path, index: TarIndex) -> list[tuple[str, dict[str, bytes]]]:
    data = path.read_bytes()
    return [
        (
            str(sample),
            {kind: data[m.offset : m.offset + m.size] for kind, m in sample.members.items()},
        )
        for sample in index.samples
    ]


def test_a_key_that_comes_again_is_another_sample(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "a.tar",
        ("a.input.png", b"1"), ("a.json", b"2"), ("b.json", b"3"), ("a.input.png", b"4"),
        ("a.json", b"5"),
    )  # fmt: skip
    index = index_tar(path)
    assert contents(path, index) == [
        ("a", {"input": b"1", "json": b"2"}),
        ("b", {"json": b"3"}),
        ("a (2)", {"input": b"4", "json": b"5"}),
    ]
    assert index.repeated == {"a"}


def test_members_of_a_key_belong_together_wherever_they_are(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "a.tar",
        ("x/b.input.png", b"1"), ("a.input.png", b"2"), ("./x/b.json", b"3"), ("a.json", b"4"),
    )  # fmt: skip
    index = index_tar(path)
    assert contents(path, index) == [
        ("x/b", {"input": b"1", "json": b"3"}),
        ("a", {"input": b"2", "json": b"4"}),
    ]
    assert not index.repeated and not index.ignored


JUNK = [
    "._a.input.png", "x/._b.json", "__MACOSX/a.json", "__MACOSX/x/._b.json", ".DS_Store",
    "PaxHeaders.11/a.json", "./PaxHeaders/a.json", "x/Thumbs.db", "README", ".hidden/a.json",
]  # fmt: skip


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_what_systems_add_is_ignored_and_named(tmp_path: Path, format: int) -> None:
    long = "é" * 40 + ".json"
    junk = [(name, b"junk") for name in JUNK]
    path = tar(tmp_path / "a.tar", *junk, ("a.json", b"1"), (long, b"2"), format=format)
    index = index_tar(path)
    assert contents(path, index) == [("a", {"json": b"1"}), ("é" * 40, {"json": b"2"})]
    assert [item.name for item in index.ignored] == [name.removeprefix("./") for name in JUNK]


def test_links_are_followed_or_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for name, kind, target in (
            ("a.input.png", tarfile.REGTYPE, ""),
            ("a.edited.png", tarfile.LNKTYPE, "a.input.png"),
            ("a.json", tarfile.LNKTYPE, "gone.json"),
            ("b.json", tarfile.SYMTYPE, "a.json"),
            ("pipe.json", tarfile.FIFOTYPE, ""),
            ("x", tarfile.DIRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, 1 if not target else 0
            file.addfile(member, io.BytesIO(b"1") if kind == tarfile.REGTYPE else None)
    index = index_tar(path)
    assert contents(path, index) == [("a", {"input": b"1", "edited": b"1"})]
    assert {item.name: item.reason for item in index.ignored} == {
        "a.json": "a link to a member that is not there",
        "b.json": "a member that is not a plain file",
        "pipe.json": "a member that is not a plain file",
    }


def test_several_tars_in_one_file_are_read_to_the_end(tmp_path: Path) -> None:
    parts = [tar(tmp_path / f"{i}.tar", (f"{i}.json", b"%d" % i)) for i in range(3)]
    path = tmp_path / "all.tar"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert contents(path, index_tar(path)) == [(str(i), {"json": b"%d" % i}) for i in range(3)]


@pytest.mark.parametrize("at", [512, 1024, 1536])
@pytest.mark.parametrize("damage", [b"damage", b"\xff" * 512])
def test_damage_does_not_end_the_listing_silently(tmp_path: Path, at: int, damage: bytes) -> None:
    path = tar(tmp_path / "a.tar", *((f"{i}.json", b"") for i in range(9)))
    data = bytearray(path.read_bytes())
    data[at : at + len(damage)] = damage
    path.write_bytes(data)
    with pytest.raises(tarfile.ReadError, match=f"damaged after byte {at}"):
        index_tar(path)


NAMES = st.tuples(st.sampled_from("ab"), st.sampled_from(["input.png", "edited.png", "json"])).map(
    ".".join
) | st.sampled_from(JUNK)


@given(st.lists(NAMES, max_size=14))
@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
def test_every_member_of_any_tar_is_in_a_sample_or_named(tmp_path: Path, names: list[str]) -> None:
    members = [(name, b"%d" % number) for number, name in enumerate(names)]
    path = tar(tmp_path / "any.tar", *members)
    index = index_tar(path)
    found = [data for _, sample in contents(path, index) for data in sample.values()]
    kept = Counter(data for name, data in members if name not in JUNK)
    assert Counter(found) == kept
    assert [item.name for item in index.ignored] == [
        name.removeprefix("./") for name in names if name in JUNK
    ]
    labels = [str(sample) for sample in index.samples]
    assert len(labels) == len(set(labels)), "rows with one name"
