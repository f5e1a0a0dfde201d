"""Ranks as threads of this process, over a network in memory: the schemes' own code with 32 ranks, in seconds.

`wire` gets these calls for torch's. A message is copied at the moment when both sides have posted it, by whoever
came second, as NCCL does it: a buffer that is written too early or read too soon shows.
"""

import threading
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from tests.harness.patience import PATIENCE_S
from zoo.core.attention import wire


@dataclass(eq=False)
class Message:
    tensor: torch.Tensor
    done: threading.Event = field(default_factory=threading.Event)
    lost: bool = False

    def wait(self):
        if not self.done.wait(PATIENCE_S) or self.lost:
            raise TimeoutError("a message was posted and nobody answered")


class Network:
    """What ranks have posted and not yet matched, by sender, receiver and tag."""

    def __init__(self):
        self._lock = threading.Lock()
        self._posted = defaultdict(lambda: (deque(), deque()))
        self._failed = False

    def post(self, source, target, tag, tensor, *, sends):
        message = Message(tensor)
        with self._lock:
            if self._failed:
                raise TimeoutError("another rank failed")
            waiting = self._posted[source, target, tag]
            waiting[not sends].append(message)
            if waiting[0] and waiting[1]:
                self._deliver(waiting[0].popleft(), waiting[1].popleft())
        return message

    def unmatched(self):
        return sum(len(side) for waiting in self._posted.values() for side in waiting)

    def fail(self):
        """Nobody needs to wait any longer."""
        with self._lock:
            self._failed = True
            for message in [message for waiting in self._posted.values() for side in waiting for message in side]:
                message.lost = True
                message.done.set()

    def _deliver(self, sent, received):
        assert (sent.tensor.shape, sent.tensor.dtype) == (received.tensor.shape, received.tensor.dtype)
        received.tensor.copy_(sent.tensor)
        sent.done.set()
        received.done.set()


@dataclass(frozen=True)
class Port:
    """A rank's way into the network; stands where a process group does."""

    network: Network
    rank: int


def _post_all(operations):
    return [
        op.group.network.post(op.group.rank, op.peer, op.tag, op.tensor, sends=True)
        if op.op == "isend"
        else op.group.network.post(op.peer, op.group.rank, op.tag, op.tensor, sends=False)
        for op in operations
    ]


_CALLS = SimpleNamespace(
    isend="isend",
    irecv="irecv",
    P2POp=lambda op, tensor, *, group, tag, group_peer: SimpleNamespace(
        op=op, tensor=tensor, group=group, tag=tag, peer=group_peer
    ),
    batch_isend_irecv=_post_all,
)


def run(monkeypatch, degree, function, *, dtype=None):
    """`function(rank, link)` on every rank; their results in order. `dtype` is the link's."""
    monkeypatch.setattr(wire, "dist", _CALLS)
    network = Network()

    def on_a_rank(rank):
        torch.set_num_threads(1)
        try:
            return function(rank, wire.Link(Port(network, rank), dtype))
        except BaseException:
            network.fail()
            raise

    with ThreadPoolExecutor(degree) as pool:
        ranks = [pool.submit(on_a_rank, rank) for rank in range(degree)]
        failures = [error for error in (rank.exception() for rank in ranks) if error is not None]
    if failures:
        raise next((error for error in failures if not isinstance(error, TimeoutError)), failures[0])
    assert network.unmatched() == 0
    return [rank.result() for rank in ranks]


def attention(monkeypatch, scheme, backend, x, mask, layout, heads, *, dtype=None):
    """out, dq, dk, dv of the row as a scheme's ranks compute them: gradients before they are rounded to x's type."""

    def on_a_rank(rank, link):
        q, k, v, dout = (layout.take(t, rank, 2).clone() for t in (x.q, x.k, x.v, x.dout))
        plan = scheme.plan(mask, layout, rank, heads)
        out, saved = scheme.forward(backend, plan, link, q, k, v, x.scale)
        return out, *scheme.backward(backend, plan, link, dout, saved, x.scale)

    parts = run(monkeypatch, layout.degree, on_a_rank, dtype=dtype)
    return [layout.join(part, 2) for part in zip(*parts)]
