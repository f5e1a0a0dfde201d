"""Saves beside the steps: what is written is the state of its step, every rank hears how it ended, one at a time."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.harness import layouts
from tests.harness.patience import PATIENCE_S
from zoo.core.errors import DataError
from zoo.core.launch.process_group import host_group
from zoo.core.run import checkpoint
from zoo.core.run.checkpoint import Checkpoints
from zoo.core.run.saver import Saver
from zoo.core.storage import checksums, finished
from zoo.core.storage.checksums import Checksums
from zoo.testing import ranks

pytestmark = pytest.mark.dist

LAYOUTS = (
    ("mixtral", "dp_shard4 ep2"),
    ("llama", "dp_replicate2 dp_shard2 zero1"),
    ("llama", "dp_shard2 cp2 ddp"),
    ("llama-tied", "pp2 dp_shard2"),
    ("llama", "dp_shard2 tp2"),
)
"""Of four ranks."""


class Gated(Checkpoints):
    """Writes nothing before it is let."""

    def __init__(self, run):
        super().__init__(run, keep=2)
        self.gate = threading.Event()

    def write(self, *args):
        assert self.gate.wait(PATIENCE_S)
        return super().write(*args)


def local(value):
    return value.to_local() if isinstance(value, DTensor) else value


def tensors(run):
    return {k: local(v) for k, v in checkpoint.tensors_of(run.state).items() if isinstance(v, torch.Tensor)}


def saved_while_stepping(folder, chosen):
    """On a rank: under each layout, tensors, those that changed since the save, those saved wrong."""
    found, group = {}, host_group()
    for name, choice in enumerate(chosen):
        run = layouts.Run(choice)
        run.step()
        before = {k: v.clone() for k, v in tensors(run).items()}
        checkpoints = Gated(folder / str(name))
        saver = Saver(checkpoints, group)
        for again in range(2):
            saver.start(run.state, {"step": run.state.step}, dict)
            assert saver.ended() == []
            run.step()
            run.step()
            after = tensors(run)
            changed = [k for k in before if not torch.equal(before[k], after[k])]
            checkpoints.gate.set()
            (ended,) = saver.wait()
            assert ended.path == folder / str(name) / "checkpoints" / f"step-{ended.step}"
            # What ranks summed while they wrote is what is there, file by file.
            assert finished.damage(ended.path) is None
            assert set(Checksums.read(ended.path).sums) >= {f"state/__{rank}_0.distcp" for rank in range(4)}
            other = layouts.Run(choice)
            checkpoint.load(other.state, ended.path)
            read = tensors(other)
            assert read.keys() == before.keys()
            wrong = [k for k in before if not torch.equal(before[k], read[k])]
            found[name, again] = len(before), len(changed), wrong
            before = {k: v.clone() for k, v in after.items()}
            checkpoints.gate.clear()
        saver.close()
    dist.destroy_process_group(group)
    return found


def test_a_save_is_of_its_step_whatever_the_next_ones_change(tmp_path):
    chosen = [layouts.choose(*layout) for layout in LAYOUTS]
    for answer in ranks.run(4, saved_while_stepping, tmp_path, chosen):
        assert len(answer) == 2 * len(LAYOUTS)
        for where, (count, changed, wrong) in answer.items():
            assert wrong == [], (LAYOUTS[where[0]], where)
            assert changed == count > 0, (LAYOUTS[where[0]], where)


def saved_in_the_way(chosen, folder, blocked):
    """On a rank: how the saves of two steps end, the first of which finds a file where it would write."""
    run, group = layouts.Run(chosen), host_group()
    saver = Saver(Checkpoints(folder, keep=2), group)
    run.step()
    saver.start(run.state, {"step": run.state.step}, dict)
    # Twice at once: refused, whichever save it is.
    for another in (saver.start, saver.write):
        with pytest.raises(AssertionError):
            another(run.state, {"step": run.state.step}, dict)
    ended = saver.wait()
    dist.barrier()
    if dist.get_rank() == 0:
        blocked.unlink()
    run.step()
    ended.append(saver.write(run.state, {"step": run.state.step}, dict))
    saver.close()
    dist.destroy_process_group(group)
    return [(end.step, end.path, end.failure and end.failure.what) for end in ended]


def test_every_rank_hears_of_a_failure_and_saves_again(tmp_path):
    blocked = tmp_path / "checkpoints" / ".unfinished-step-1"
    blocked.parent.mkdir()
    blocked.touch()
    for first, second in ranks.run(2, saved_in_the_way, layouts.choose("mixtral", "dp_shard2"), tmp_path, blocked):
        assert first[:2] == (1, None)
        assert f"saving {tmp_path}/checkpoints/step-1 failed: File exists" in first[2]
        assert second == (2, tmp_path / "checkpoints" / "step-2", None)
    assert Checkpoints(tmp_path, keep=2).steps() == [2]
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step-2"


def checked(folder, changed):
    """On a rank: pieces that it reads while it loads an intact state, and what it hears of one with a changed byte."""
    run, read, crc = layouts.Run(layouts.choose("llama", "dp_shard2")), [], checksums._crc
    checksums._PIECE = 3000
    Checkpoints(folder, keep=1).save(run.state, {"step": run.state.step}, {})
    checksums._crc = lambda file, piece, buffer: read.append(piece) or crc(file, piece, buffer)
    try:
        checkpoint.load(run.state, folder / "checkpoints/step-0")
        pieces = list(read)
        if dist.get_rank() == 0:
            content = bytearray(changed.read_bytes())
            content[-1] ^= 1
            changed.write_bytes(content)
        dist.barrier()
        before = {k: v.clone() for k, v in tensors(run).items()}
        with pytest.raises(DataError) as error:
            checkpoint.load(run.state, folder / "checkpoints/step-0")
        assert all(torch.equal(before[k], v) for k, v in tensors(run).items())
    finally:
        checksums._crc, checksums._PIECE = crc, 32 << 20
    return pieces, str(error.value)


def test_ranks_read_every_byte_once_between_them_and_hear_the_same(tmp_path):
    changed = tmp_path / "checkpoints/step-0/state/__1_0.distcp"
    answers = ranks.run(2, checked, tmp_path, changed)
    sums = Checksums.read(tmp_path / "checkpoints/step-0").sums
    pieces = sorted(piece for mine, _ in answers for piece in mine)
    assert pieces == sorted(
        (name, start, min(3000, total.length - start))
        for name, total in sums.items()
        for start in range(0, total.length, 3000)
    )
    counts = [sum(piece.length for piece in mine) for mine, _ in answers]
    assert max(counts) - min(counts) <= 2 * 3000
    assert len({said for _, said in answers}) == 1
    assert f"{changed} has CRC-32" in answers[0][1]
