"""Output whose reader has gone."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from zoo.core.launch.lasting_output import outlive_readers
outlive_readers()
print("begins", flush=True)
sys.stdin.read()
for stream in (sys.stdout, sys.stderr):
    stream.write("nobody reads this\\n" * 10000)
    stream.flush()
    print("nor this", file=stream)
"""


def test_a_process_goes_on_when_nobody_reads_what_it_writes():
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=write, stderr=write)
    os.close(write)
    assert os.read(read, 1) == b"b"
    os.close(read)
    process.stdin.close()
    assert process.wait() == 0


STARTED_CLOSED = """
import os, subprocess, sys
from zoo.core.launch.lasting_output import open_closed_streams
open_closed_streams()
print("nobody reads this", flush=True)
print("nor this", file=sys.stderr, flush=True)
later = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
assert later > 2, later
assert sys.stdin.read() == ""
inherited = "import os; [os.fstat(number) for number in range(3)]"
sys.exit(subprocess.run([sys.executable, "-c", inherited]).returncode)
"""


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "<&-", "</dev/null >&-", "</dev/null 2>&-", "</dev/null >&- 2>&-"])
def test_streams_that_were_closed_before_the_start_are_the_null_device(closed, tmp_path):
    shell = f'exec "$0" -c "$1" "$2" {closed}'
    command = ["sh", "-c", shell, sys.executable, STARTED_CLOSED, str(tmp_path / "later")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert (tmp_path / "later").read_bytes() == b""


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-"])
def test_a_command_works_with_closed_streams(closed):
    shell = f'exec "$0" -m zoo models {closed}'
    ended = subprocess.run(["sh", "-c", shell, sys.executable], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
