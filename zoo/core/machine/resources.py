"""The ranks that a layout is for, how they share machines, and what memory each has."""

from __future__ import annotations

from dataclasses import dataclass

from zoo.core.errors import LayoutError
from zoo.core.machine.device import accelerator_type, memory_bytes, num_accelerators
from zoo.core.machine.launcher_env import OuterRank


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is to lay a job out on."""

    ranks: int | None = None
    """As many must run; None: as many as the layout asks for."""
    said: str = "this launcher started"
    """Who fixed `ranks`, in words that its number follows."""
    most: int | None = None
    """Accelerators here, which the layout fills where it does not say how many ranks it wants."""
    per_node: int | None = None
    """Ranks that share a machine; None: all of them do."""
    memory: int | None = None
    """Bytes of one accelerator, or of the machine where ranks share its memory; None: not known here."""
    shared: bool = False

    @classmethod
    def here(cls, *, world_size: int | None = None, nproc: int | None = None) -> Machine:
        """This machine, inside a launcher that started `world_size` ranks or with `nproc` of them wanted.

        Raises LayoutError if there are fewer accelerators than are wanted.
        """
        found, shared = num_accelerators() or None, accelerator_type() is None
        if world_size is not None:
            outer = OuterRank.from_environment()
            local = outer.local_world_size if outer else None
            return cls(ranks=world_size, per_node=local or world_size, memory=memory_bytes(), shared=shared)
        if nproc is not None and nproc > (found or nproc):
            raise LayoutError(f"--nproc {nproc} and this machine has {found} accelerators", f"type --nproc {found}")
        return cls(ranks=nproc, said="--nproc says", most=found, memory=memory_bytes(), shared=shared)

    def rank_memory(self, ranks: int) -> int | None:
        """Bytes that each of so many ranks has."""
        if self.memory is None or not self.shared:
            return self.memory
        return self.memory // min(ranks, self.per_node or ranks)
