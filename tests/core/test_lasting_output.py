"""Output whose reader has gone."""

import os
import subprocess
import sys

SCRIPT = """
import sys
from zoo.core.lasting_output import outlive_readers
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
