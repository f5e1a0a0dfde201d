"""Opens and converts broken checkpoints by the thousand: `python tools/fuzz_conversion.py --examples 20000 --seed 1`.

Each case must end in a converted checkpoint or in one line of a ZooError, within 2 seconds and 256 MiB, and touch no
file outside of its source and its target. Case I of seed S is repeated by `--seed S --only I`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from tools.fuzz_cases import Case, Files, bases, mutate
from tools.fuzz_extremes import extremes, large_models
from zoo.conversion.hf.converter import CONVERTER
from zoo.conversion.transfer import open_checked, transfer
from zoo.core.errors import ZooError
from zoo.core.model.rules import whole
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins

SECONDS = 2.0
BYTES = 256 << 20
KINDS = ("header", "header", "header", "config", "config", "index", "index", "file")
SECRET = b"what nobody may copy"
_FORBIDDEN = (
    "subprocess",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.",
    "pickle.find_class",
    "os.fork",
    "ctypes.",
)
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")


@dataclass
class Watch:
    """Sees every file that Python opens or changes while `on`; what lies elsewhere than it may is kept in `seen`."""

    work: Path
    on: bool = False
    seen: list[str] = field(default_factory=list)
    opened: int = 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event.startswith(_FORBIDDEN):
            self.seen.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[0], str | bytes):
            self.opened += 1
            mode, flags = args[1] or "", args[2] or 0
            written = any(c in mode for c in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            self._check(event, args[0], self._targets() if written else self._readable())
        elif event in _CHANGES:
            for path in [arg for arg in args[:2] if isinstance(arg, str | bytes)]:
                self._check(event, path, self._targets())

    def _check(self, event: str, path: str | bytes, roots: tuple[str, ...]) -> None:
        real = os.path.realpath(os.fsdecode(path))
        if not any(real == root or real.startswith(root + "/") for root in roots):
            self.seen.append(f"{event} {real}")

    def _targets(self) -> tuple[str, ...]:
        return (str(self.work / "target"),)

    def _readable(self) -> tuple[str, ...]:
        # Modules that are imported late, and the empty directory in which plain names of descriptors' entries end.
        return (str(self.work / "source"), str(self.work / "target"), sys.prefix, sys.base_prefix, *_code())


def _code() -> tuple[str, ...]:
    return tuple(
        str(Path(module.__file__).resolve().parents[1]) for module in (sys.modules["zoo"], sys.modules["torch"])
    )


class TooSlow(BaseException):
    """A case that did not end."""


def _too_slow(_signal: int, frame: FrameType | None) -> None:
    raise TooSlow("".join(traceback.format_stack(frame, limit=6)))


@dataclass
class Fuzz:
    """The run: where it works, and what came of the cases."""

    work: Path
    registry: Registry
    watch: Watch
    outcomes: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    slowest_label: str = ""
    failures: list[str] = field(default_factory=list)

    def run(self, case: Case, label: str, kind: str) -> None:
        seconds, problem = self._once(case, kind)
        for _ in range(2):  # a busy machine is no hang
            if not problem and seconds > SECONDS:
                seconds, problem = min((seconds, None), self._once(case, "again"))
        if seconds > self.slowest:
            self.slowest, self.slowest_label = seconds, label
        if not problem and seconds > SECONDS:
            problem = f"took {seconds:.1f} s"
        if problem:
            self.failures.append(f"{label}: {problem}")
            _say(f"FAILED {label}: {problem}")

    def _once(self, case: Case, kind: str) -> tuple[float, str | None]:
        source, target = self.work / "source", self.work / "target"
        for directory in (source, target):
            shutil.rmtree(directory, ignore_errors=True)
        case.write(source)
        target.mkdir()
        self.watch.seen.clear()
        before, start, busy = _peak(), time.monotonic(), time.process_time()
        problem: str | None
        signal.alarm(20)
        self.watch.on = True
        try:
            outcome, problem = self._convert(source, target / "out")
        except TooSlow as error:
            outcome, problem = "hang", f"did not end:\n{error}"
        finally:
            self.watch.on = False
            signal.alarm(0)
        seconds = _taken(time.monotonic() - start, time.process_time() - busy)
        self.outcomes[f"{kind} {outcome}"] += 1
        problem = problem or self._left(target / "out", outcome)
        if not problem and self.watch.seen:
            problem = f"touched {self.watch.seen[:3]}"
        if not problem and _peak() - before > BYTES:
            problem = f"took {(_peak() - before) >> 20} MiB"
        return seconds, problem

    def _convert(self, source: Path, out: Path) -> tuple[str, str | None]:
        try:
            opened = open_checked(str(source), self.registry)
            transfer(opened, CONVERTER, out, threads=2)
            again = open_checked(str(out), self.registry)
            for name in opened.tensors.names():
                index = whole(opened.tensors.shape(name))
                if not torch.equal(_bits(opened.tensors.read(name, index)), _bits(again.tensors.read(name, index))):
                    return "converted", f"{name} differs"
        except ZooError as error:
            self.rules[type(error).__name__] += 1
            return "refused", _bad_line(str(error))
        except Exception:
            return "traceback", traceback.format_exc(limit=-6)
        return "converted", None

    def _left(self, out: Path, outcome: str) -> str | None:
        if outcome != "converted":
            return f"left {os.listdir(out.parent)}" if os.listdir(out.parent) else None
        copied = [path for path in out.iterdir() if SECRET in path.read_bytes()]
        return f"copied a file from outside as {copied[0].name}" if copied else None


def _taken(wall: float, cpu: float) -> float:
    """Seconds by the clock, or of computing where others wait for the same processors; the alarm goes by the clock."""
    return wall if os.getloadavg()[0] < len(os.sched_getaffinity(0)) else cpu


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _bad_line(text: str) -> str | None:
    if not text.isprintable() or len(text) > 1000:
        return f"no single printable line: {text!r:.300}"
    return None


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _limit_memory() -> None:
    """Of address space, so that what is asked for and not touched counts too; room for the arenas of threads."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", type=int, default=None, metavar="I", help="run case I alone and keep its files")
    parser.add_argument("--no-extremes", action="store_true", help="leave out the few large cases that come first")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 31)
    _say(f"seed {seed}, {options.examples} cases")
    work = Path(os.path.realpath(tempfile.mkdtemp(prefix="fuzz-")))
    (work / "secret").write_bytes(SECRET)
    registry = Registry(Plugins.load())
    fuzz = Fuzz(work, registry, Watch(work))
    originals = bases(registry)
    for form in registry.converters.names():  # asked where a directory is no checkpoint
        registry.converters.load(form)
    sys.addaudithook(fuzz.watch)
    signal.signal(signal.SIGALRM, _too_slow)
    for name, files in originals:  # unbroken; everything that is imported late is imported after this
        fuzz.run(Case(dict(files)), name, "unbroken")
    _limit_memory()
    before = _peak()
    start = time.monotonic()
    if options.only is None and not options.no_extremes:
        for name, case in extremes(originals[0][1]):
            fuzz.run(case, name, "extreme")
        for base, files in originals:
            for name, case in large_models(files) if base.endswith("single") else ():
                fuzz.run(case, f"{base}: {name}", "extreme")
    for number in range(options.examples) if options.only is None else [options.only]:
        _case(fuzz, originals, seed, number)
        if number % 1000 == 999:
            _say(f"{number + 1} cases, {time.monotonic() - start:.0f} s, {len(fuzz.failures)} failures")
    report = {
        "seed": seed,
        "cases": sum(fuzz.outcomes.values()),
        "outcomes": dict(sorted(fuzz.outcomes.items())),
        "failures": len(fuzz.failures),
        "slowest_s": round(fuzz.slowest, 3),
        "slowest": fuzz.slowest_label,
        "peak_growth_mib": (_peak() - before) >> 20,
        "files_opened": fuzz.watch.opened,
        "seconds": round(time.monotonic() - start, 1),
    }
    _say(json.dumps(report))
    if options.only is None:
        shutil.rmtree(work, ignore_errors=True)
    else:
        _say(str(work))
    return 1 if fuzz.failures else 0


def _case(fuzz: Fuzz, originals: list[tuple[str, Files]], seed: int, number: int) -> None:
    draw = random.Random(f"{seed}-{number}")
    kind = KINDS[number % len(KINDS)]
    fitting = [(name, files) for name, files in originals if kind != "index" or "sharded" in name]
    name, files = draw.choice(fitting)
    fuzz.run(mutate(draw, files, kind), f"case {number} ({kind}, {name})", kind)


if __name__ == "__main__":
    sys.exit(main())
