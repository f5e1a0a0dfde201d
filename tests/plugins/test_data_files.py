"""Corpora in files: what is taken, in which pieces, and the one line that says what is wrong."""

from __future__ import annotations

import gzip
import json
import logging
import os
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from zoo.core.data.documents import Document
from zoo.core.data.rows import RowStream
from zoo.core.errors import DataError
from zoo.plugins.data import files, lines, texts
from zoo.plugins.data.files import open_files
from zoo.plugins.data.stdlib import is_held_out, open_stdlib


def records(source):
    return [record for shard in source.shards() for record, _ in source.read(shard, 0)]


def texts_of(source):
    return [record.fields["text"] for record in records(source)]


def refused(function, *args):
    """The message of the one-line error that a call must end in."""
    with pytest.raises(DataError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# What is taken ------------------------------------------------------------------------------------


def test_a_file_of_lines_and_a_file_of_text(tmp_path):
    jsonl = write(tmp_path / "a.jsonl", '{"text": "one"}\n\n   \n{"text": "two"}\r\n{"text": "\u2603"}')
    assert texts_of(open_files(str(jsonl))) == ["one", "two", "\u2603"]
    assert [str(record.where) for record in records(open_files(str(jsonl)))] == [f"{jsonl}:{n}" for n in (1, 4, 5)]
    text = write(tmp_path / "a.md", "# one\r\n\ntwo")
    assert texts_of(open_files(str(text))) == ["# one\r\n\ntwo"]
    assert str(records(open_files(str(text)))[0].where) == str(text)


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert texts_of(open_files(str(write(tmp_path / "a.txt", b"\xef\xbb\xbfx")))) == ["x"]
    assert texts_of(open_files(str(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x"}')))) == ["x"]


def test_a_directory_is_taken_deep_and_sorted_without_hidden_files(tmp_path, caplog):
    for name in ("b.txt", "a/z.py", "a/a.txt", ".hidden", ".git/config", "a/__pycache__/x.py", "a/no.pyc"):
        write(tmp_path / name, b"\0" if name.endswith("pyc") else name)
    with caplog.at_level(logging.WARNING):
        assert texts_of(open_files(str(tmp_path))) == ["a/a.txt", "a/z.py", "b.txt"]
    assert "1 files are left out because they are not text" in caplog.text


def test_a_directory_with_lines_is_a_data_set_and_says_what_it_leaves_out(tmp_path, caplog):
    write(tmp_path / "train.jsonl", '{"text": "x"}')
    write(tmp_path / "README.md", "about")
    write(tmp_path / "dataset_infos.json", "{}")
    with caplog.at_level(logging.WARNING):
        assert texts_of(open_files(str(tmp_path))) == ["x"]
    assert "2 files are left out because they are not .jsonl" in caplog.text


def test_globs(tmp_path):
    for name in ("a.py", "b/c.py", "b/d.txt"):
        write(tmp_path / name, name)
    assert texts_of(open_files(f"{tmp_path}/**/*.py")) == ["a.py", "b/c.py"]
    assert texts_of(open_files(f"{tmp_path}/b/?.txt")) == ["b/d.txt"]
    assert "matches no file" in refused(open_files, f"{tmp_path}/*.rs")


def test_names_with_signs_of_a_glob_are_names_first(tmp_path):
    assert texts_of(open_files(str(write(tmp_path / "a[1]@7.txt", "x")))) == ["x"]


# Pieces -------------------------------------------------------------------------------------------

LINE = st.one_of(
    st.just(b""), st.just(b"  "), st.integers(0, 10**6).map(lambda n: json.dumps({"text": "y" * (n % 97)}).encode())
)


@settings(max_examples=150, deadline=None)
@given(st.lists(LINE, max_size=40), st.booleans(), st.integers(1, 300))
def test_every_line_is_in_one_chunk_and_can_be_read_from_its_offset(tmp_path_factory, content, ended, step):
    path = write(tmp_path_factory.mktemp("lines") / "a.jsonl", b"\n".join(content) + (b"\n" if ended else b""))
    size = path.stat().st_size
    expected = [json.loads(line) for line in content if line.strip()]
    read = []
    for start in range(0, size, step):
        at, found = 0, list(lines.read_lines(path, start, min(start + step, size), 0))
        for i, (record, after) in enumerate(found):
            again = list(lines.read_lines(path, start, min(start + step, size), at))
            assert [r.fields for r, _ in again] == [r.fields for r, _ in found[i:]]
            assert record.where.number == path.read_bytes()[: record.where.start].count(b"\n") + 1
            at = after
        read += [record.fields for record, _ in found]
    assert read == expected


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab\n\u00e9\u2603\U0001f600", max_size=200), st.integers(5, 60), st.integers(4, 40))
def test_pieces_of_a_text_are_the_text(tmp_path_factory, text, step, searched):
    path = write(tmp_path_factory.mktemp("texts") / "a.txt", text)
    size = path.stat().st_size
    before = texts._SEARCHED_BYTES
    texts._SEARCHED_BYTES = min(searched, step)
    try:
        read = [
            record.fields["text"]
            for start in range(0, size, step)
            for record, _ in texts.read_text(path, start, min(start + step, size), 0)
        ]
    finally:
        texts._SEARCHED_BYTES = before
    assert "".join(read) == text


def test_a_large_text_comes_in_pieces_cut_at_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 100)
    path = write(tmp_path / "a.txt", "\n".join(f"line {i:04}" for i in range(100)))
    pieces = texts_of(open_files(str(path)))
    assert "".join(pieces) == path.read_text()
    assert len(pieces) == 10
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert "bytes 110 to 210" in str(records(open_files(str(path)))[1].where)


def test_chunks_of_a_large_corpus_are_few(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 16)
    monkeypatch.setattr(files, "MAX_SHARDS", 10)
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", b'{"text": "x"}\n' * 50)
    source = open_files(str(tmp_path))
    assert len(source.shards()) <= 12
    assert len(records(source)) == 100


# Fingerprints -------------------------------------------------------------------------------------


def test_the_fingerprint_follows_names_sizes_and_content(tmp_path):
    folder = tmp_path / "a"
    write(folder / "x.txt", b"x" * 200_000)
    write(folder / "y.txt", b"y")
    first = open_files(str(folder)).fingerprint
    assert first.startswith("2 files of 200001 bytes")
    shutil.copytree(folder, tmp_path / "b")
    assert open_files(str(tmp_path / "b")).fingerprint == first
    found = {first}
    for change in (
        lambda: write(folder / "y.txt", b"z"),
        lambda: write(folder / "x.txt", b"x" * 199_999 + b"z"),
        lambda: write(folder / "x.txt", b"x" * 200_001),
        lambda: (folder / "y.txt").rename(folder / "z.txt"),
        lambda: write(folder / "new.txt", b""),
    ):
        change()
        found.add(open_files(str(folder)).fingerprint)
    assert len(found) == 6


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "a"', "not JSON at column 13"),
        (b"[1, 2]", 'a list, not an object; write it as {"text": ...}'),
        (b"3", "a number, not an object"),
        (b'{"text": "\xff"}', "byte 41 of the file is not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number has too many digits to be read; write it as a string"),
        (b'{"text": "a", "x": {"k": 1, "l": 2, "k": 1}}', "an object has the key 'k' twice; leave one of them"),
        (b"\0" * 100, "the line has NUL bytes: if the file is UTF-16, save it as UTF-8 (iconv"),
        ('{"text": "a"}'.encode("utf-16"), "the line has NUL bytes: if the file is UTF-16"),
        (gzip.compress(b'{"text": "a"}', mtime=0), "the file is compressed by gzip; unpack it"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line, says):
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n\n{"text": "x"}\n' + line + b"\n")
    message = refused(records, open_files(str(path)))
    assert message.startswith(f"{path}:4: ")
    assert says in message


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 20)
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n' + b"x" * (1 << 21))
    assert f"{path}:2: the line is longer than 1 MiB" in refused(records, open_files(str(path)))


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfabc\xe9")
    assert f"{path}: byte 6 is not UTF-8" in refused(records, open_files(str(path)))
    monkeypatch.setattr(files, "PIECE_BYTES", 100)
    path = write(tmp_path / "b.txt", b"line\n" * 50 + b"\xff\n")
    assert f"{path}: byte 250 is not UTF-8" in refused(records, open_files(str(path)))


def test_what_is_not_there_has_near_names(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    assert "did you mean 'train.jsonl'?" in refused(open_files, str(tmp_path / "trian.jsonl"))
    assert "there is no directory" in refused(open_files, str(tmp_path / "no" / "train.jsonl"))


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet", ".gz"])
def test_forms_that_are_not_read_say_which_are(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", "x")
    for uri in (path, tmp_path):
        message = refused(open_files, str(uri))
        assert f"{suffix} is not read, only .jsonl" in message


def test_nothing_to_read_is_an_error(tmp_path):
    assert "has no text in it" in refused(open_files, str(tmp_path))
    assert "is not text" in refused(open_files, str(write(tmp_path / "a.bin", b"\0\1")))


def test_a_file_that_disappears_is_an_error(tmp_path):
    path = write(tmp_path / "a.txt", "x")
    source = open_files(str(path))
    path.unlink()
    assert "cannot be read any more" in refused(records, source)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_an_error_at_once(tmp_path):
    path = write(tmp_path / "a.txt", "x")
    path.chmod(0)
    assert "Permission denied" in refused(open_files, str(path))


# The standard library -----------------------------------------------------------------------------


def test_the_standard_library_and_its_held_out_part_are_disjoint():
    kept, held_out = open_stdlib(held_out=False), open_stdlib(held_out=True)
    a, b = ({file.name for file in source.files} for source in (kept, held_out))
    assert not a & b
    assert {"os.py", "json/decoder.py"} <= a | b
    assert 0.01 < len(b) / len(a | b) < 0.12
    assert all(is_held_out(name) for name in b)
    assert not [name for name in a | b if "test" in name.split("/")[:-1] or "site-packages" in name]
    whole = Path(os.__file__).read_text(encoding="utf-8")
    assert whole in texts_of(kept if "os.py" in a else held_out)


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """200 MB of lines, every one read and packed."""
    block = b"".join(json.dumps({"text": "x" * (i * 37 % 4000 * 10)}).encode() + b"\n" for i in range(100))
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        for _ in range(200_000_000 // len(block)):
            file.write(block)

    def to_document(record):
        tokens = np.full(len(record.fields["text"]) // 4 + 2, 7, dtype=np.int32)
        return Document(tokens=tokens, trained=np.ones(len(tokens), bool), overlong="split", where=record.where)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    stream = RowStream(open_files(str(path)), to_document, seq=8192, seed=0)
    stream.take(40)
    before, most = resident(), 0
    while stream.epoch == 0:
        stream.take(16)
        most = max(most, resident())
    assert stream.stats.samples > 9_000
    assert most - before < 60e6, f"grew by {(most - before) / 1e6:.0f} MB"
    stream.close()
