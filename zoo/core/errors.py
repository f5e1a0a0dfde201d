"""The errors a user can meet, each with the exit code of the command it ends; and the names that would have worked."""

from __future__ import annotations

import re
from collections.abc import Iterable


class ZooError(Exception):
    """Something a user can act on: the message says what, where, why and what to type next.

    `exit_code` is the status the command ends with; commands print the message without a traceback.
    """

    exit_code = 1


class UsageError(ZooError):
    """A flag, key or combination that cannot work."""

    exit_code = 2


class LayoutError(UsageError):
    """Degrees that cannot be. `reason` says why, `hint` what to type instead, as far as whoever raises it knows."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(f"{reason}; {hint}" if hint else reason)
        self.reason = reason
        self.hint = hint


class FitError(ZooError):
    """A job that needs more memory than the machine has."""

    exit_code = 3


class PluginError(ZooError):
    """A plugin is missing, broken, or clashes with another."""

    exit_code = 4


class PluginFailed(PluginError):
    """Code of a plugin raised what it should not have, in the middle of a run."""


class DataError(ZooError):
    """A file that was read is not what it must be: data, tokenizer, checkpoint."""

    exit_code = 5


class NumericsError(ZooError):
    """A loss or a gradient stopped being a number, at `step` if that is known."""

    exit_code = 6

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


class SavedOnSignal(ZooError):
    """The run was asked to stop, saved, and can be resumed by the same command."""

    exit_code = 75


_KINDS = (UsageError, LayoutError, FitError, PluginError, PluginFailed, DataError, NumericsError, SavedOnSignal)
_BY_NAME: dict[str, type[ZooError]] = {kind.__name__: kind for kind in _KINDS}
# Of several kinds with one exit code the first, which is the most general.
_BY_EXIT_CODE: dict[int, type[ZooError]] = {kind.exit_code: kind for kind in reversed(_KINDS)}


def error_of(kind: str, exit_code: int, message: str) -> ZooError:
    """Return the error that another process raised, from what can be sent of it.

    `kind` is the name of its class. One that is not defined here, as a plugin's own, becomes the kind of its exit code.
    """
    error = (_BY_NAME.get(kind) or _BY_EXIT_CODE.get(exit_code, ZooError))(message)
    if error.exit_code != exit_code:
        error.exit_code = exit_code
    return error


def one_line(error: BaseException) -> str:
    """`ImportError: No module named 'x'`: any exception as the first line of what it says."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a stranger's __str__ may itself be broken
        lines = []
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# Names that are nearly right ----------------------------------------------------------------------


def normalised(name: str) -> str:
    """A name as it is compared: lower case, with `-`, `_` and `.` alike."""
    return re.sub(r"[-_.]+", "-", name).lower()


def near(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """Known names that a typing error or another spelling turns into `name`, best first; else those it is a part of."""
    from difflib import SequenceMatcher  # noqa: PLC0415  (only a message about a wrong name needs it)

    wanted = normalised(name)
    ratios = {one: SequenceMatcher(a=wanted, b=normalised(one)).ratio() for one in sorted(known)}
    least = max(0.6, max(ratios.values(), default=0.0) - 0.1)
    close = sorted((one for one in ratios if ratios[one] >= least), key=lambda one: -ratios[one])
    parts = [one for one in ratios if len(wanted) > 2 and wanted in normalised(one)]
    return (close or parts)[:limit]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or nothing when no known name is near."""
    found = near(name, known)
    return f"did you mean {' or '.join(repr(one) for one in found)}?" if found else ""
