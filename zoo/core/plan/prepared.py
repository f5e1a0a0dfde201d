"""A job with nothing left open: what a run is built from, on every rank the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from zoo.core.contracts.attention import AttentionBackend
from zoo.core.contracts.checkpoints import HubCheckpoint
from zoo.core.contracts.layout import Layout
from zoo.core.contracts.models import ModelSpec
from zoo.core.contracts.parallel import MemoryPolicy, ParallelAdapter
from zoo.core.data.rows import RowStream, open_rows
from zoo.core.job.job import Job
from zoo.core.plan.origin import ModelSource
from zoo.core.registry.decisions import Registry
from zoo.core.storage.published import Trained, generation_ends, hub_files
from zoo.core.tokenizer.tokenizer import Tokenizer
from zoo.core.tokenizer.turn_end import TurnEnd, turn_end
from zoo.core.tokenizer.vocabulary import check_vocabulary


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A job with nothing left open."""

    job: Job
    origin: ModelSource
    config: Any
    hub_config: Mapping[str, Any]
    """config.json of the model as trained, for checkpoints and export."""
    layout: Layout
    backend: AttentionBackend
    adapters: Sequence[ParallelAdapter]
    policy: MemoryPolicy
    notes: Sequence[tuple[str, str]]
    """What was chosen and why, as (topic, sentence)."""

    @property
    def spec(self) -> ModelSpec:
        return self.origin.spec

    @property
    def source(self) -> HubCheckpoint | None:
        """Where weights come from; None for random ones."""
        return self.origin.checkpoint

    @property
    def out(self) -> Path:
        assert self.job.checkpoint.out is not None, "prepare() names every run"
        return Path(self.job.checkpoint.out)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What makes tokens of the data, with the template that was given; loaded when first asked for.

        Raises DataError if it cannot be loaded, UsageError if it has tokens that the model has not.
        """
        tokenizer = Tokenizer.from_directory(self.origin.tokenizer_path, chat_template=self.job.data.chat_template)
        check_vocabulary(tokenizer, self.config.vocab_size)
        return tokenizer

    @cached_property
    def turn_end(self) -> TurnEnd | None:
        """What ends a turn under the chat template; None if there is no template."""
        return turn_end(self.tokenizer)

    @property
    def ending(self) -> str:
        """What to say of where generation will stop: a token that the source does not stop at, or none; else ""."""
        turn = self.turn_end
        if turn is None:
            return ""
        if turn.id is None:
            return f"warning: at no token after a turn, so generation goes on there: {turn.why}"
        before = generation_ends(self.origin.tokenizer_path, self.hub_config)
        if turn.id in before:
            return ""
        named, instead = self.tokenizer.decode([turn.id]), ", ".join(map(str, before)) or "none"
        return f"at {named!r} ({turn.id}) too, which ends a turn; the model it comes from stops at {instead}"

    @cached_property
    def hub_files(self) -> Mapping[str, bytes]:
        """The files beside the weights of every checkpoint, as they are when first asked for."""
        checkpoint = self.origin.checkpoint
        turn = self.turn_end.id if self.turn_end else None
        trained = Trained(
            config=self.hub_config,
            length=self.job.data.seq,
            longest=self.config.max_position_embeddings,
            native=self.spec.parse(checkpoint.config).max_position_embeddings if checkpoint else None,
            ends=tuple(id for id in (self.tokenizer.eos_id, turn) if id is not None),
            template=self.job.data.chat_template,
        )
        return hub_files(self.origin.tokenizer_path, trained)

    def open_rows(self, registry: Registry) -> RowStream:
        """The rows that are trained on, from the first on. Raises DataError or UsageError."""
        data = self.job.data
        return open_rows(
            registry,
            data=str(data.path),
            data_format=data.format,
            tokenizer=self.tokenizer,
            seq=data.seq,
            seed=data.seed,
            overlong=data.overlong,
            loss_on=data.loss_on,
            vocab_size=self.config.vocab_size,
        )
