"""`python -m zoo`, and the command `zoo`."""

from __future__ import annotations

import os
import sys


def _leave_out_working_directory() -> None:
    """Take what `python -m` puts first off `sys.path`, unless zoo itself is there: `zoo` does not have it either.

    A `random.py` or `yaml.py` that happens to lie where somebody types a command is no module of zoo's.
    """
    if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):
        del sys.path[0]


if __name__ == "__main__":
    _leave_out_working_directory()

# Below that, for these import most of the standard library.
import faulthandler  # noqa: E402
import signal  # noqa: E402

from zoo.core.launch import signals  # noqa: E402
from zoo.core.launch.lasting_output import open_closed_streams, outlive_readers  # noqa: E402
from zoo.core.launch.watchdog import DEFAULT_TIMEOUT_S  # noqa: E402
from zoo.core.machine.launcher_env import said_rank  # noqa: E402


def main() -> int:
    """Run this process's command line and return its exit status. A run hears signals before anything is imported."""
    open_closed_streams()
    if "finetune" in sys.argv[1:]:
        _prepare_for_a_run()
    try:
        from zoo.cli.main import main as run  # noqa: PLC0415  (what takes long comes last)
    except KeyboardInterrupt:
        signals.say("Interrupted")
        return 130
    return run()


def _prepare_for_a_run() -> None:
    signals.hear_from_the_start(signals.end_at_once)
    outlive_readers()
    if said_rank():
        # Under another launcher nobody else watches the imports.
        faulthandler.dump_traceback_later(DEFAULT_TIMEOUT_S, exit=True)
    if os.path.exists(os.environ.get(signals.STOP_FILE, "")):
        signals.end_at_once(signal.SIGUSR1)


if __name__ == "__main__":
    sys.exit(main())
