"""What an outer launcher (torchrun, srun with a wrapper, a cluster's operator) says in the environment of a rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from zoo.core.errors import UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STORE_FILE = "ZOO_STORE_FILE"
"""Environment variable of a rank of zoo's own launcher: the file through which ranks of one machine find each other."""
_ALONE = "to train on this machine alone, unset RANK and WORLD_SIZE"


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterRank:
    """This process as one rank of an outer launcher. An empty variable is as good as none."""

    rank: int
    world_size: int
    local_rank: int | None
    """Number among the ranks of this machine, if said."""
    local_world_size: int | None
    """How many ranks this machine has, if said."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self | None:
        """Return what the variables say, None if no launcher set any. Raise UsageError if they make no sense."""
        environment = os.environ if environment is None else environment
        said = {name: environment.get(name, "").strip() for name in VARIABLES}
        if not said["RANK"] and not said["WORLD_SIZE"]:
            return None
        _both_or_none(said)
        world_size = _number(said, "WORLD_SIZE", least=1)
        rank = _number(said, "RANK", below=world_size, of="WORLD_SIZE")
        local_world_size = _optional(said, "LOCAL_WORLD_SIZE", least=1)
        local_rank = _optional(said, "LOCAL_RANK", below=local_world_size, of="LOCAL_WORLD_SIZE")
        if world_size > 1 and not environment.get(STORE_FILE):
            _check_meeting_place(said, world_size)
        return cls(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size)

    def device_index(self, count: int) -> int:
        """Return which of `count` accelerators that this process sees is its own. Raise UsageError if nobody says."""
        if count == 1:  # some launchers show each rank its own one only
            return 0
        if self.local_rank is None:
            raise UsageError(
                f"LOCAL_RANK is not set and rank {self.rank} sees {count} accelerators; set it to the number of the "
                "rank on its machine (under Slurm: LOCAL_RANK=$SLURM_LOCALID), or start ranks with torchrun"
            )
        if self.local_rank >= count:
            raise UsageError(
                f"LOCAL_RANK is {self.local_rank} and this machine shows {count} accelerators; start at most {count} "
                "ranks on it"
            )
        return self.local_rank


def own_rank() -> int:
    """Return the number of this rank; 0 without a launcher. Raise UsageError if its variables make no sense."""
    outer = OuterRank.from_environment()
    return outer.rank if outer else 0


def said_rank() -> str:
    """Return RANK as it stands there, for those who have to go on whatever it is."""
    return os.environ.get("RANK", "").strip()


def speaks() -> bool:
    """Return whether this process prints for all: it is no launcher's rank, or the first."""
    return said_rank() in ("", "0")


def _both_or_none(said: Mapping[str, str]) -> None:
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if not said[name]:
            raise UsageError(f"{other} is {said[other]} and {name} is not set: a launcher sets both; {_ALONE}")


def _number(said: Mapping[str, str], name: str, *, least: int = 0, below: int | None = None, of: str = "") -> int:
    text = said[name]
    # int() would also take signs, underscores and digits of other scripts.
    value = int(text) if text.isascii() and text.isdecimal() else -1
    if value < least:
        raise UsageError(f"{name} is '{text}': a launcher sets it to a number from {least} up; {_ALONE}")
    if below is not None and value >= below:
        raise UsageError(f"{name} is {value} and {of} is {below}: it must be less; {_ALONE}")
    return value


def _optional(
    said: Mapping[str, str], name: str, *, least: int = 0, below: int | None = None, of: str = ""
) -> int | None:
    return _number(said, name, least=least, below=below, of=of) if said[name] else None


def _check_meeting_place(said: Mapping[str, str], world_size: int) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not said[name]:
            raise UsageError(
                f"WORLD_SIZE is {world_size} and {name} is not set, so ranks cannot find each other; start them with "
                f"torchrun, or set it to the same on all of them; {_ALONE}"
            )
    port = said["MASTER_PORT"]
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise UsageError(f"MASTER_PORT is '{port}': it must be a number from 1 to 65535, the same on all ranks")
