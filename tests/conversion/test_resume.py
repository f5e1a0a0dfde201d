"""Killed, out of room, or beside another: the same command ends with the same bytes, and nothing half looks whole."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import mmap
import os
import random
import shutil
import signal
import subprocess
import threading
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion.test_run import run  # noqa: F401
from zoo.conversion.compare import compare
from zoo.conversion.disk import stream, unfinished, writer
from zoo.conversion.disk.hub_source import HubSource
from zoo.conversion.hf.converter import CONVERTER
from zoo.conversion.transfer import open_checked, transfer
from zoo.core.errors import DataError
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins

REGISTRY = Registry(Plugins.load())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A conversion of many blocks and runs; the types are the same, so a buffer of bytes is enough."""
    monkeypatch.setattr(writer, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(stream, "_RUN_BYTES", 8192)


def convert(source, out, **options):
    options = {"shard_size": "40KB", "threads": 2} | options
    return transfer(open_checked(str(source), REGISTRY), CONVERTER, out, **options)


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def hidden(out) -> Path:
    return out.with_name(f".{out.name}.unfinished")


def kill_in_write(number, source, out) -> bool:
    """Convert in a process that is killed half way through that write; whether it was done before."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            stop_in_write(number, writes)
            convert(source, out)
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.close(writes)
    with open(reads, "rb") as pipe:
        pipe.read(1)  # nothing comes of a process that ended
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def stop_in_write(number, pipe):
    """Of all threads that write, the one with that write says so and stays in it."""
    write_all, left, lock = stream._write_all, itertools.count(1), threading.Lock()

    def write(descriptor, data, offset):
        with lock:
            last = next(left) == number
        if last:
            write_all(descriptor, data[: len(data) // 2], offset)
            os.write(pipe, b"!")
            threading.Event().wait()
        write_all(descriptor, data, offset)

    stream._write_all = write


@pytest.mark.parametrize("kind", ["import", "export"])
def test_kill_at_any_moment_and_again(kind, checkpoint, request, tmp_path):
    source = checkpoint if kind == "import" else request.getfixturevalue("run")
    convert(source, tmp_path / "undisturbed")
    draw, kills, counts = random.Random(kind), 0, []
    while kills < 6 and not kill_in_write(draw.randint(1, 30), source, tmp_path / "out"):
        kills += 1
        journal = hidden(tmp_path / "out") / unfinished.JOURNAL
        counts.append(journal.read_bytes().count(b"\n") if journal.exists() else 0)
    assert kills >= 2
    assert counts == sorted(counts), "a later attempt began anew"
    if not (tmp_path / "out").exists():
        convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert not hidden(tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("kind", ["import", "export"])
def test_a_full_disk(kind, checkpoint, request, small_disk, tmp_path, monkeypatch):
    """Something else fills the disk while a conversion writes there."""
    source = checkpoint if kind == "import" else request.getfixturevalue("run")
    convert(source, tmp_path / "undisturbed", shard_size="5GB")
    out, other, writes = small_disk / "out", small_disk / "other", []

    def write(descriptor, data, offset, write_all=stream._write_all):
        writes.append(offset)
        if len(writes) == 60:
            fill(other)
        write_all(descriptor, data, offset)

    monkeypatch.setattr(stream, "_write_all", write)
    with pytest.raises(DataError, match="No space left.*kept in .*type the same command again") as error:
        convert(source, out, shard_size="5GB")
    assert "\n" not in str(error.value)
    assert not out.exists()
    other.unlink()
    convert(source, out, shard_size="5GB")
    header, *again = writes[writes.index(0, 1) :]
    assert header == 0
    assert min(again) > 40_000, "what was there was written again"
    assert contents(out) == contents(tmp_path / "undisturbed")


def fill(file):
    """Write until the disk takes no more."""
    with pytest.raises(OSError, match="No space left"):
        file.write_bytes(bytes(8 << 20))


def test_no_room_is_said_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(DataError, match=r"needed and 1e-06 GB free.*nothing was left behind"):
        convert(checkpoint, tmp_path / "out")
    assert not hidden(tmp_path / "out").exists()


@pytest.fixture
def half(checkpoint, tmp_path, monkeypatch):
    """Source and OUT of a conversion that broke off in its middle."""
    with monkeypatch.context() as patch:
        write_all, calls = stream._write_all, []

        def fails(*arguments):
            calls.append(arguments)
            if len(calls) > 60:
                raise OSError(28, "No space left on device")
            write_all(*arguments)

        patch.setattr(stream, "_write_all", fails)
        with pytest.raises(DataError, match="No space left on device"):
            convert(checkpoint, tmp_path / "out")
    return checkpoint, tmp_path / "out"


def test_another_conversion_does_not_go_on_with_it(half, tmp_path):
    source, out = half
    for number, options in enumerate([{"dtype": "bfloat16", "shard_size": "20KB"}, {"shard_size": "60KB"}]):
        convert(source, tmp_path / f"undisturbed-{number}", **options)
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(hidden(out), hidden(copy))
        convert(source, copy, **options)
        assert contents(copy) == contents(tmp_path / f"undisturbed-{number}")


def test_another_source_does_not_go_on_with_it(half, tmp_path):
    source, out = half
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    convert(source, tmp_path / "undisturbed")
    convert(source, out)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_bytes_that_a_crash_lost_are_written_again(half, tmp_path):
    """A machine that goes down may keep a journal's line and lose the block, or half of the line."""
    source, out = half
    shard = next(hidden(out).glob("model-00001*"))
    with shard.open("r+b") as file:
        file.seek(20_000)
        file.write(bytes(3000))
    with (hidden(out) / unfinished.JOURNAL).open("ab") as journal:
        journal.write(b"123 model-000")
    convert(source, tmp_path / "undisturbed")
    convert(source, out)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_one_process_at_a_time(half):
    source, out = half
    before = contents(hidden(out))
    with (hidden(out) / unfinished.JOURNAL).open("rb") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing"):
            convert(source, out)
    assert contents(hidden(out)) == before
    convert(source, out)


def test_verify_compares_both_sides_and_writes_nothing(checkpoint, tmp_path):
    out = tmp_path / "out"
    convert(checkpoint, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    source = open_checked(str(checkpoint), REGISTRY)
    assert "21 tensors and 4 files" in compare(source, open_checked(str(out), REGISTRY))
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before

    with pytest.raises(DataError, match="float32 and not bfloat16"):
        compare(source, open_checked(str(out), REGISTRY), dtype="bfloat16")
    shard = sorted(out.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"no copy of .*model\.layers\.\S+: CRC-32 \w{8} and not \w{8}"):
        compare(source, open_checked(str(out), REGISTRY))


def test_verify_compares_files_too(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "out")
    (tmp_path / "out" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "out" / "zoo-checksums.txt").unlink()  # else these find it first
    with pytest.raises(DataError, match="tokenizer_config.json differs"):
        compare(open_checked(str(checkpoint), REGISTRY), open_checked(str(tmp_path / "out"), REGISTRY))


def test_what_is_on_the_disk_leaves_the_page_cache(tmp_path, monkeypatch):
    """All but pages that a run shares with its neighbours; else a large checkpoint fills all memory with its copy."""
    monkeypatch.setattr(writer, "BLOCK_BYTES", 64 << 10)
    monkeypatch.setattr(stream, "_RUN_BYTES", 1 << 20)
    save_file({"w": torch.arange(4 << 20, dtype=torch.int32).view(torch.float32)}, tmp_path / "model.safetensors")
    if not can_leave(tmp_path / "model.safetensors"):
        pytest.skip("files of this file system are its page cache, as in tmpfs")
    shard = writer.Shard("copy.safetensors", [writer.Outgoing("w", (4 << 20,), "float32")])
    with unfinished.unfinished(tmp_path / "out", "one") as (directory, journal):
        source = HubSource.single(tmp_path / "model.safetensors")
        stream.Stream(directory, source, journal, threads=2, tick=lambda _bytes: None).write([shard])
        left = resident_share(directory / shard.name)
        content = (directory / shard.name).read_bytes()
    assert left < 0.2
    assert content[-16 << 20 :] == (tmp_path / "model.safetensors").read_bytes()[-16 << 20 :]


def can_leave(file: Path) -> bool:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident_share(file) < 0.1


def resident_share(file: Path) -> float:
    """How much of a file is in the page cache, by mincore(2)."""
    pages = -(-file.stat().st_size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        start = (ctypes.c_char * len(memory)).from_buffer(memory)
        assert ctypes.CDLL(None, use_errno=True).mincore(start, ctypes.c_size_t(len(memory)), found) == 0
        del start
    return sum(byte & 1 for byte in found) / pages


def test_checksums_are_those_of_the_bytes(checkpoint):
    source = open_checked(str(checkpoint), REGISTRY).checkpoint.tensors
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        outgoing = writer.Outgoing(name, tuple(tensor.shape), "float32")
        assert stream.checksum(source, outgoing) == zlib.crc32(tensor.view(torch.uint8).numpy().tobytes())
