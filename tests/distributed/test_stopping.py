"""A wish to stop is heard whenever it comes, and a run on one machine asks for no name.

Moments are made by plugins: one that is being imported blocks for good, or a hook sends the signal.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import textwrap
from pathlib import Path

import pytest

from tests.distributed.test_survival import children, wait_until
from tests.harness.command import start
from zoo.cli.main import main
from zoo.core.launch.signals import NOTHING_YET
from zoo.core.run.checkpoint import Checkpoints
from zoo.core.run.metrics import read_metrics

JOB = ("finetune", "llama3", "--seq", "256", "--save-every", "1")


@pytest.fixture(autouse=True)
def hears_sighup():
    """Whoever starts the tests under nohup has them, and all that they start, ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def plugin(tmp_path):
    """A function from Python lines to a plugin file of them."""

    def write(code):
        file = tmp_path / "moment.py"
        file.write_text("import os, signal, time\nfrom zoo import hookimpl\n" + textwrap.dedent(code))
        return file

    return write


def saved(run):
    return max(Checkpoints(run, keep=1).steps(), default=0)


def signals_of(pid, word):
    """`ignored` or `caught` signals of a process, by the kernel's word."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = int(next(line for line in lines if line.startswith(f"Sig{word}:")).split()[1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("number", "environment"),
    [
        (signal.SIGHUP, {}),
        (signal.SIGUSR1, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}),
    ],
    ids=["one process", "a rank of another launcher"],
)
def test_a_signal_while_modules_are_imported_ends_the_start(plugin, tmp_path, number, environment):
    """As a cluster has it, a launcher that cannot return 75 finds it in a file."""
    run, status = tmp_path / "run", tmp_path / "status"
    blocked = plugin("open(os.environ['BLOCKED'], 'w').close()\ntime.sleep(600)")
    words = [sys.executable, "-m", "zoo", *JOB, "--out", run, "--plugin", blocked]
    more = {"BLOCKED": str(tmp_path / "blocked"), "ZOO_STATUS_FILE": str(status)} | environment
    process = subprocess.Popen(words, env=os.environ | more, stderr=subprocess.PIPE, text=True)
    wait_until((tmp_path / "blocked").exists, process)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == (0 if environment else 75)
    assert status.exists() == bool(environment)
    assert err == f"{number.name}: {NOTHING_YET}\n"


@pytest.mark.dist
def test_a_start_after_a_stop_was_asked_for_does_not_begin(tmp_path):
    """A warning that came while a launcher had no ranks, or was about to start them again."""
    (tmp_path / "stop").touch()
    process = start(*JOB, "--out", tmp_path / "run", ZOO_STOP_FILE=str(tmp_path / "stop"))
    _, err = process.communicate()
    assert (process.returncode, NOTHING_YET in err) == (75, True)


@pytest.mark.dist
def test_ranks_that_wait_for_each_other_end_at_once_and_none_is_started_again(plugin, tmp_path):
    """Rank 0 waits in C++, where Python runs no handler, for rank 1, which imports."""
    run, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    blocks = plugin(
        """
        @hookimpl
        def zoo_run_start(run):
            pass
        os.environ.get("RANK") == "1" and time.sleep(600)
        """
    )
    job = (*JOB, "--cp", "2", "--max-restarts", "1", "--out", run, "--plugin", blocks)
    process = start(*job, TMPDIR=str(temporary))
    joining = "joining the other ranks"
    wait_until(lambda: [beat for beat in temporary.glob("zoo-launch-*/0.beat") if beat.read_text() == joining], process)
    ranks = children(process.pid)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 75, err
    assert err.splitlines()[-2:] == ["SIGTERM: ending the start.", NOTHING_YET]
    assert "Restart" not in err
    assert len(ranks) == 2
    assert not [pid for pid in ranks if os.path.exists(f"/proc/{pid}")]
    assert list(temporary.glob("zoo-*")) == []


@pytest.mark.dist
def test_a_terminal_that_suspends_a_run_and_then_goes_away(tmp_path):
    """Ctrl-Z stops ranks too; a closed terminal is a wish to stop, and what is written to it must not end the save."""
    run = tmp_path / "run"
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "zoo", *JOB, "--cp", "2", "--steps", "100000", "--out", run]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        words,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    wait_until(lambda: saved(run) >= 1 or not os.read(ours, 10000))
    ranks = [int(pid) for pid in children(process.pid)]
    os.kill(process.pid, signal.SIGTSTP)  # the shell of a terminal would, and this group has none
    wait_until(lambda: [state(pid) for pid in (process.pid, *ranks)] == ["T"] * 3)
    os.kill(process.pid, signal.SIGCONT)
    before = saved(run)
    wait_until(lambda: saved(run) > before or not os.read(ours, 10000))
    os.close(ours)
    assert process.wait() == 75
    assert saved(run) == len(read_metrics(run / "metrics.jsonl")) > before


def state(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


@pytest.mark.dist
def test_under_nohup_a_terminal_that_goes_away_is_no_wish(tmp_path):
    run, said = tmp_path / "run", (tmp_path / "said").open("w+")
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it to what it starts
    try:
        process = start(*JOB, "--cp", "2", "--steps", "100000", "--out", run, output=said, cold=True)
    finally:
        signal.signal(signal.SIGHUP, old)
    wait_until(lambda: saved(run) >= 1, process)
    everyone = [process.pid, *children(process.pid)]
    assert len(everyone) == 3
    for pid in everyone:
        assert signal.SIGHUP in signals_of(pid, "Ign")
        os.kill(int(pid), signal.SIGHUP)
    before = saved(run)
    wait_until(lambda: saved(run) > before, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75


@pytest.mark.parametrize(
    ("moment", "status", "last"),
    [("run_start(run)", 75, 1), ("step_end(run, step)", 75, 2), ("run_end(run, status)", 0, 4)],
)
def test_a_signal_at_every_moment_of_a_run_saves_or_finds_it_done(plugin, tmp_path, capsys, moment, status, last):
    """At the start of the first step, in the first step's report, after the last save."""
    file = plugin(f"@hookimpl\ndef zoo_{moment}:\n    os.kill(os.getpid(), signal.SIGHUP)")
    run = tmp_path / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)]
    assert main([*JOB, "--steps", "4", "--out", str(run), "--plugin", str(file)]) == status
    assert [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)] == handlers
    assert saved(run) == len(read_metrics(run / "metrics.jsonl")) == last
    assert ("the same command goes on" in capsys.readouterr().err) == (status == 75)


SINK = """
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
with open(sys.argv[1], "w", buffering=1) as file:
    while True:
        file.write(f"{server.recvfrom(2000)[0]}\\n")
"""
ALONE = """
ip link set lo up && mount --bind "$1/resolv.conf" /etc/resolv.conf && mount --bind "$1/hosts" /etc/hosts || exit 99
hostname nowhere || exit 99
"$2" "$1/sink.py" "$1/asked" & sink=$!
while [ ! -e "$1/asked" ]; do sleep 0.1; done
shift 1; "$@"; status=$?; kill $sink; exit $status
"""


@pytest.mark.dist
def test_ranks_of_one_machine_ask_for_no_name(tmp_path):
    """On a machine with a name that nobody knows, and a name server that notes what it is asked and never answers."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    (tmp_path / "sink.py").write_text(SINK)
    run = tmp_path / "run"
    inside = ["unshare", "--net", "--uts", "--mount", "sh", "-c", ALONE, "sh", tmp_path, sys.executable]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME")}
    try:
        done = subprocess.run(
            [*inside, "-m", "zoo", *JOB, "--cp", "2", "--steps", "1", "--out", run],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        pytest.skip(f"no namespaces here: {error}")
    if done.returncode in (1, 99) and "not permitted" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert saved(run) == 1
    assert (tmp_path / "asked").read_text() == ""
