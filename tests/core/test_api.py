"""`zoo.finetune` as a function of somebody's program: from any thread, again and again, one run at a time."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

import zoo
from zoo.core import api
from zoo.core.errors import DataError, UsageError
from zoo.core.registry.loading import Plugins
from zoo.core.run.metrics import read_metrics

FLAGS = {"seq": 64, "steps": 2}
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def left_as_found():
    """Whatever a call does, the process is afterwards as it was."""
    before = state()
    yield
    assert state() == before
    assert not dist.is_initialized()


def state():
    variables = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return variables, [signal.getsignal(number) for number in ASKING], list(sys.path)


def losses(run):
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


def in_a_thread(out):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(zoo.finetune, "llama3", out=out, deterministic=True, **FLAGS).result()


def in_a_coroutine(out):
    """As a cell of a notebook is: the event loop of the main thread waits meanwhile."""

    async def cell():
        zoo.finetune("llama3", out=out, **FLAGS)

    asyncio.run(cell())


def beside_an_event_loop(out):
    asyncio.run(asyncio.to_thread(zoo.finetune, "llama3", out=out, **FLAGS))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Losses of the same job on the main thread."""
    out = tmp_path_factory.mktemp("plain") / "run"
    zoo.finetune("llama3", out=out, **FLAGS)
    return losses(out)


@pytest.mark.parametrize("call", [in_a_thread, in_a_coroutine, beside_an_event_loop])
def test_any_caller_gets_the_same_run(tmp_path, plain, call):
    call(tmp_path)
    assert losses(tmp_path) == plain


PLUGIN = """
import zoo
from tests.core import test_api

@zoo.hookimpl
def zoo_step_end(run, step, metrics):
    test_api.AT_STEP_END[0]()
"""
AT_STEP_END = [lambda: None]


def watched(tmp_path, out, at_step_end, **flags):
    """A run that calls a function after each step."""
    AT_STEP_END[0] = at_step_end
    (tmp_path / "watcher.py").write_text(PLUGIN)
    return api.run(Plugins.load(files=[tmp_path / "watcher.py"]), "llama3", {"out": out, **FLAGS, **flags})


def test_a_second_run_beside_the_first_is_refused_and_does_not_disturb_it(tmp_path, plain):
    reached, go_on = threading.Event(), threading.Event()

    def wait():
        reached.set()
        assert go_on.wait(120)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(watched, tmp_path, tmp_path / "first", wait)
        try:
            assert reached.wait(120)
            with pytest.raises(UsageError, match=r"zoo\.finetune is training in this process already"):
                zoo.finetune("llama3", out=tmp_path / "second", **FLAGS)
        finally:
            go_on.set()
        first.result()
    assert losses(tmp_path / "first") == plain
    assert not (tmp_path / "second").exists()


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("flags", "error"),
    [({"size": "9b"}, UsageError), ({"data": "/nowhere"}, DataError), ({}, KeyboardInterrupt)],
)
def test_a_call_after_one_that_failed_is_as_the_first(tmp_path, plain, flags, error):
    with pytest.raises(error):
        watched(tmp_path, tmp_path / "run", interrupt, **flags)
    zoo.finetune("llama3", out=tmp_path / "run", **FLAGS)
    assert losses(tmp_path / "run") == plain


def test_a_process_that_has_a_process_group_is_told_so(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UsageError, match=r"destroy_process_group\(\) before zoo\.finetune"):
            zoo.finetune("llama3", out=tmp_path, **FLAGS)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("variables", "says"),
    [({"RANK": "abc", "WORLD_SIZE": "1"}, "RANK is 'abc'"), ({"RANK": "0"}, "WORLD_SIZE is not set")],
)
def test_variables_that_make_no_sense_are_an_error_before_anything_is_made(tmp_path, monkeypatch, variables, says):
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with pytest.raises(UsageError, match=says):
            zoo.finetune("llama3", out=tmp_path / "run", **FLAGS)
    assert not (tmp_path / "run").exists()
