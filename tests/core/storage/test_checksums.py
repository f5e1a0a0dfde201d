"""Checksums of files: sums that combine, one text file, and what a stranger could write into it."""

from __future__ import annotations

import os
import tracemalloc
import zlib

import pytest
from hypothesis import given, strategies as st

from zoo.core.errors import DataError
from zoo.core.storage import checksums
from zoo.core.storage.checksums import EMPTY, NAME, Checksums, Sum, SummingStream, sum_of, sum_of_file


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_sums_of_parts_add_up_to_zlibs_sum_of_the_whole(parts):
    content = b"".join(parts)
    total = sum((sum_of(part) for part in parts), EMPTY)
    assert total == Sum(zlib.crc32(content), len(content))


@given(st.integers(0, 2**32 - 1), st.binary(min_size=1, max_size=50), st.integers(0, 2**40))
def test_a_long_part_is_added_as_zeros_and_its_sum_would_be(crc, tail, length):
    """Many bytes at once are the same as some of them, then the others."""
    half = length // 2
    zeros = Sum(0, half) + Sum(0, length - half)
    assert Sum(crc, 1) + zeros == Sum(crc, 1) + Sum(0, half) + Sum(0, length - half)
    assert (Sum(crc, 1) + sum_of(tail)).crc == zlib.crc32(tail, crc)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of several pieces each, and what they are to be."""
    monkeypatch.setattr(checksums, "_PIECE", 1000)
    for name, size in (("a", 2500), ("b/c", 1000), ("b/empty", 0), ("d", 1)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(os.urandom(size))
    made = Checksums(tmp_path, {name: sum_of_file(tmp_path / name) for name in ("a", "b/c", "b/empty", "d")})
    made.write()
    return made


def test_what_was_written_is_read(folder):
    assert Checksums.read(folder.root) == folder
    lines = (folder.root / NAME).read_text().splitlines()
    assert lines[0] == "zoo checksums 1"
    assert lines[1] == f"{zlib.crc32((folder.root / 'a').read_bytes()):08x} 2500 a"
    assert Checksums.read(folder.root / "b") is None


def test_files_are_compared_by_name_length_and_content(folder):
    everything = ["a", "b/c", "b/empty", "d", NAME]
    assert folder.misfit(everything) is folder.changed(threads=3) is None
    assert "/e was not there" in folder.misfit([*everything, "e"])
    content = bytearray((folder.root / "a").read_bytes())
    content[2400] ^= 1
    (folder.root / "a").write_bytes(content)
    assert "/a has CRC-32" in folder.changed(threads=3)
    assert folder.changed(["d", "b/c"]) is None
    (folder.root / "a").write_bytes(content[:1400])
    assert "/a has 1400 bytes and not 2500" in folder.misfit(everything)
    assert "/a cannot be read: it became shorter" in folder.changed()
    (folder.root / "a").unlink()
    assert "/a is missing" in folder.misfit(everything)
    os.mkfifo(folder.root / "a")
    assert "/a cannot be read: it is no regular file" in folder.changed()


def test_a_stream_sums_what_passes(tmp_path):
    content = os.urandom(5000)
    with (tmp_path / "file").open("wb") as file:
        stream = SummingStream(file)
        for start in range(0, 5000, 700):
            stream.write(memoryview(content)[start : start + 700])
        # A writer that syncs asks for this number; all is behind it.
        assert os.fstat(stream.fileno()).st_size == 5000
    assert stream.sum == sum_of(content) == sum_of_file(tmp_path / "file")


def signed(*lines, title="zoo checksums 1"):
    body = "".join(f"{line}\n" for line in (title, *lines)).encode("utf-8", "surrogatepass")
    return body + f"{zlib.crc32(body):08x} end\n".encode()


HOSTILE = {
    "a way out": signed("00000000 0 ../../etc/passwd"),
    "a root": signed("00000000 0 /etc/passwd"),
    "here": signed("00000000 0 ."),
    "empty part": signed("00000000 0 a//b"),
    "itself": signed(f"00000000 0 {NAME}"),
    "twice": signed("00000000 0 a", "00000000 0 a"),
    "a control character": signed("00000000 0 a\x1b[2J"),
    "half a character": signed("00000000 0 a\ud800"),
    "a line separator": signed("00000000 0 a\u2028b"),
    "no length": signed("00000000 a"),
    "a negative length": signed("00000000 -1 a"),
    "a length beyond 64 bits": signed(f"00000000 {'9' * 30} a"),
    "a long name": signed(f"00000000 0 {'a' * 2000}"),
    "another format": signed(title="zoo checksums 2"),
    "no end": b"zoo checksums 1\n",
    "an empty file": b"",
    "no text": os.urandom(100),
    "a large one": b"0" * (17 << 20),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_strangers_file_is_refused_in_one_short_line(tmp_path, what):
    (tmp_path / NAME).write_bytes(HOSTILE[what])
    with pytest.raises(DataError) as error:
        Checksums.read(tmp_path)
    assert NAME in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_a_length_that_no_file_has_takes_no_memory(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / NAME).write_bytes(signed(f"00000000 {10**17} a"))
    tracemalloc.start()
    assert "has 0 bytes and not 1" in Checksums.read(tmp_path).misfit([])
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


KINDS = {"pipe": os.mkfifo, "folder": os.mkdir, "link to nowhere": lambda path: path.symlink_to("gone")}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_does_not_hang_and_is_not_passed_over(tmp_path, kind):
    KINDS[kind](tmp_path / NAME)
    with pytest.raises(DataError, match="cannot be read"):
        Checksums.read(tmp_path)
