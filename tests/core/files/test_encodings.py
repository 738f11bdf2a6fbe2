from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonpix.core.files.encodings import (
    decode_text,
    parse_json,
    parse_json_lines,
    read_front_matter,
)

WITH_MARK = [
    lambda text: text.encode(),
    lambda text: text.encode("utf-8-sig"),
    lambda text: text.encode("utf-16"),
    lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    lambda text: text.encode("utf-32"),
]
"""As editors on Windows, Excel and PowerShell save a text."""

WITHOUT_MARK = [
    lambda text: text.encode("utf-16-le"),
    lambda text: text.encode("utf-16-be"),
    lambda text: text.encode("utf-32-le"),
]

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0\ufeff"))


@given(TEXT, st.sampled_from(WITH_MARK))
def test_a_text_is_the_same_in_every_encoding(text: str, encode: object) -> None:
    assert decode_text(encode(text)) == text  # type: ignore[operator]


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50)
@given(st.dictionaries(TEXT, VALUE), st.sampled_from(WITH_MARK + WITHOUT_MARK), st.booleans())
def test_json_is_the_same_in_every_encoding(value: object, encode: object, escaped: bool) -> None:
    data = encode(json.dumps(value, ensure_ascii=escaped))  # type: ignore[operator]
    assert parse_json(data) == value


@settings(max_examples=50)
@given(st.lists(VALUE), st.sampled_from(WITH_MARK), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_json_lines_end_only_where_lines_end(
    values: list[object], encode: object, end: str
) -> None:
    # U+2028, U+0085 and others end a line for str.splitlines, but not in JSON.
    text = "".join(json.dumps(value, ensure_ascii=False) + end for value in values)
    rows = list(parse_json_lines(encode(text)))  # type: ignore[operator]
    assert [value for _, value in rows] == values
    step = 2 if end == "\n\n" else 1
    assert [line for line, _ in rows] == [1 + step * i for i in range(len(values))]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"one\ntwo\ncaf\xe9\n", "line 3 is not UTF-8: .*; save it as UTF-8"),
        ("one\ntwo".encode("utf-16") + b"\0", "line 2 is not UTF-16: "),
        (b"\xef\xbb\xbfa\r\n\xff", "line 2 is not UTF-8-SIG: "),
    ],
)
def test_the_line_of_a_bad_byte_is_named(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        decode_text(data)


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 1}', '[{"b": {"a": 1, "c": 2, "a": 3}}]', '{"a": {}, "b": 1, "\\u0061": 2}'],
)
def test_a_key_that_comes_again_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="the key 'a' is given twice"):
        parse_json(text.encode())


def test_the_line_of_broken_json_is_named() -> None:
    rows = parse_json_lines(b'{"a": 1}\n\n{"a": \n')
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(ValueError, match="line 3: Expecting value"):
        next(rows)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# Title\n", {"license": "mit", "tags": ["a"]}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("# Title\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\n- mit\n---\n", {}),
        ("---\n{\n---\n", {}),
        ("", {}),
    ],
)
def test_the_front_matter_of_a_card_is_read(
    text: str, values: dict[str, object], tmp_path: Path
) -> None:
    card = tmp_path / "README.md"
    card.write_bytes(text.encode())
    assert read_front_matter(card) == values
    assert read_front_matter(tmp_path / "none.md") == {}
