"""Checkpoint forms that zoo reads: Hugging Face directories, both ways, and its own runs."""

from __future__ import annotations

from collections.abc import Sequence

from zoo import ConverterEntry, hookimpl

ZOO_PLUGIN_API = 1


@hookimpl
def zoo_register_converters() -> Sequence[ConverterEntry]:
    return [
        ConverterEntry(
            name="hf",
            target="zoo.conversion.hf.converter:CONVERTER",
            help="Hugging Face directory or hub id: config.json, safetensors, tokenizer files",
        ),
        ConverterEntry(
            name="run",
            target="zoo.conversion.run.converter:CONVERTER",
            help="a run of zoo, or one of its checkpoints; read only",
        ),
    ]
