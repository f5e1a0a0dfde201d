"""Small models of every family in fp64, and steps of them under any layout that words say, chosen by zoo itself.

    chosen = choose("llama-tied", "pp2 cp2 tp2 zbv")    # on the host: refused here, or a plan of the run
    run = Run(chosen)                                   # on each of `chosen.degrees.world_size` ranks
    run.step()

Words are a degree of an axis (`dp_shard2`), a kind of data parallelism (`zero1`), a pipeline schedule (`zbv`), a
context scheme (`ring` if not said), or one of `WORDS`. No words are one process, the oracle. `rows8` are the rows of a
step: if not said, two microbatches of a row on a rank, or as many as a pipeline has ranks. `layers8` are the blocks:
two, or four in a pipeline, or one a stage. Llama has biases, tied Llama none; gains and biases are drawn as weights
are.
"""

from __future__ import annotations

import atexit
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tests.harness import head_norms
from zoo.core.contracts.attention import AttentionBackend
from zoo.core.contracts.batch import IGNORE, Row
from zoo.core.contracts.layout import Layout
from zoo.core.contracts.parallel import Counts, MemoryPolicy, ParallelAdapter
from zoo.core.data.collate import collate
from zoo.core.errors import UsageError
from zoo.core.job.job import Job, OptimSection, ScheduleSection
from zoo.core.mesh.degrees import AXES
from zoo.core.mesh.mesh import Mesh
from zoo.core.model.load import ModuleSource, load_into
from zoo.core.plan.prepare import prepare
from zoo.core.plan.prepared import Prepared
from zoo.core.registry.decisions import Registry
from zoo.core.registry.loading import Plugins
from zoo.core.run import assemble
from zoo.core.run.optim import build_optimizer, build_schedule
from zoo.core.run.step import TrainState, train_step
from zoo.models.llama3.model import SPEC as LLAMA
from zoo.models.llama3.sizes import TINY
from zoo.models.mixtral.model import SPEC as MIXTRAL
from zoo.models.nemotron.model import SPEC as NEMOTRON
from zoo.models.nemotron_nas.model import SPEC as NAS
from zoo.testing import ranks

VOCAB, SEQ, EXPERTS = 24, 26, 8
"""26 tokens, and the 13 of a rank of cp 2, are no multiple of most tp here."""
IDLE = (6, 7)
"""Experts that no token goes to when the router is biased."""
TOLERANCE = 1e-9
"""Of a difference, as a share of the largest number in a tensor."""

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_BIASES = {"attention_bias": True, "mlp_bias": True}


def _block(attention, ffn):
    parts = {"no_op": False, "replace_with_linear": False}
    return {"attention": parts | attention, "ffn": parts | ffn}


_LINEAR = {"replace_with_linear": True}
_NAS = {
    "model_type": "nemotron-nas",
    "intermediate_size": None,
    "num_key_value_heads": None,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "block_configs": [
        _block({"n_heads_in_group": 2}, {"intermediate_size": 24}),
        _block(_LINEAR, {"intermediate_size": 8}),
        _block({"n_heads_in_group": 1}, _LINEAR),
        _block({"no_op": True}, {"intermediate_size": 16}),
    ],
}
_PLAIN = {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
_BALANCED = _PLAIN | {"output_router_logits": True, "router_aux_loss_coef": 0.05}
_NEMOTRON = {"model_type": "nemotron", "partial_rotary_factor": 0.5, "num_key_value_heads": 8}
_LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
MODELS = {
    "llama": (LLAMA, _SIZES | _BIASES | _LLAMA),
    "llama-tied": (LLAMA, _SIZES | {"model_type": "llama", "tie_word_embeddings": True}),
    "nemotron": (NEMOTRON, _SIZES | _BIASES | _NEMOTRON),
    "nemotron-nas": (NAS, _SIZES | _BIASES | _NAS),
    "mixtral": (MIXTRAL, _SIZES | _BALANCED),
    "mixtral-plain": (MIXTRAL, _SIZES | _PLAIN),
    "mixtral-biased": (MIXTRAL, _SIZES | _BALANCED),
    "mixtral-window": (MIXTRAL, _SIZES | _BALANCED | {"sliding_window": 7}),
    "dense-head-norms": (head_norms.DENSE, _SIZES | _LLAMA),
    "sparse-head-norms": (head_norms.SPARSE, _SIZES | _BALANCED),
}
"""Mixtral is trained on its auxiliary loss too, but for `mixtral-plain`."""

_SCHEMES = ("allgather", "halo", "hybrid", "ulysses")
_KINDS = ("fsdp", "zero1", "ddp")
_SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero-bubble", "zbv")
WORDS = {
    "keep": {"layout.reshard": False},
    "no-sp": {"layout.sequence_parallel": False},
    "recompute": {"memory.policy": "full"},
    "bf16": {"model.dtype": "bfloat16"},
    **{word: {"layout.cp_scheme": word} for word in _SCHEMES},
    **{word: {"layout.data_parallel": word} for word in _KINDS},
    **{word: {"layout.pp_schedule": word} for word in _SCHEDULES},
}
_NUMBERED = {
    **{axis: f"layout.{axis}" for axis in (*AXES, "ep")},
    "prefetch": "layout.prefetch",
    "virtual": "layout.pp_virtual",
    "layers": "layers",
    "rows": "data.global_batch",
    "seq": "data.seq",
}
_PER_RANK = {"interleaved": 2, "zbv": 2}
"""Stages that a schedule runs on a rank, where it is more than one."""
_JOB = {
    "model.dtype": "float64",
    "data.seq": SEQ,
    "layout.dp_shard": 1,
    "attention.backend": "dense",
    "memory.policy": "none",
}


def config(model, layers=2):
    """Layers found by search are as many as they are."""
    spec, fields = MODELS[model]
    return spec.parse(fields | {"num_hidden_layers": len(fields.get("block_configs", range(layers)))})


@cache
def source(model, layers=2):
    """The model in memory that every layout starts from, in fp64. Shared: not to be changed."""
    torch.manual_seed(7)
    built = MODELS[model][0].build(config(model, layers)).double()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim == 1 or "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
            if model == "mixtral-biased" and name.endswith("gate.weight"):
                # Of a direction and its opposite one always attracts, so two of the first four do for every token,
                # and an expert with a row of zeros never has its turn.
                parameter[1], parameter[3] = -parameter[0], -parameter[2]
                parameter[:4] *= 60
                parameter[list(IDLE)] = 0
    return built


def rows(number, seq=SEQ):
    """Rows of packed documents, every fourth with padding. The first are the same whatever the number."""
    draw = np.random.default_rng(3)
    cuts = [((0, seq),), ((0, 5), (5, 6), (6, seq)), ((0, 13), (13, seq)), ((2, 20),)]
    result = []
    for i in range(number):
        documents = cuts[i % len(cuts)]
        tokens, labels = draw.integers(0, VOCAB, (2, seq))
        labels[draw.random(seq) < 0.3] = IGNORE
        labels[[stop - 1 for _, stop in documents]] = IGNORE
        result.append(Row(tokens=tokens, labels=labels, documents=documents))
    return result


# On the host --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a rank must know of a run."""

    model: str
    config: Any
    layout: Layout
    backend: AttentionBackend
    adapters: list[ParallelAdapter]
    policy: MemoryPolicy
    rows: int

    @property
    def degrees(self):
        return self.layout.degrees


def settings(words):
    """Keys of a job to their values."""
    said = {}
    for word in words.split():
        if word in WORDS:
            said |= WORDS[word]
        else:
            name, number = re.fullmatch(r"(\D+)(\d+)", word).groups()
            said[_NUMBERED[name]] = int(number)
    pp = said.get("layout.pp", 1)
    per_rank = said.get("layout.pp_virtual") or _PER_RANK.get(said.get("layout.pp_schedule"), 1)
    dp = said.get("layout.dp_replicate", 1) * said.get("layout.dp_shard", 1)
    if said.get("layout.cp", 1) > 1:
        said.setdefault("layout.cp_scheme", "ring")
    return {"data.global_batch": dp * max(2, pp), "layers": 2 if pp == 1 else max(4, pp * per_rank)} | said


def prepared(model, words):
    """All that zoo decides of a run, by the door that every command goes through. Raises UsageError if it refuses."""
    said = settings(words)
    folder = checkpoint(model, said.pop("layers"))
    name = MODELS[model][0].name
    said = _JOB | {"model.name": name, "model.from": str(folder), "data.path": str(folder / "text.txt")} | said
    job = Job.from_settings({key: (value, "test") for key, value in said.items()})
    decided: Prepared = prepare(job, registry())
    return decided


@cache
def registry():
    return Registry(Plugins.load(files=[Path(head_norms.__file__).with_name("head_norms_plugin.py")]))


@cache
def checkpoint(model, layers):
    """A directory with the model's config, a tokenizer and a text. Its weights are those of `source`, in our names."""
    folder = Path(tempfile.mkdtemp(prefix=f"zoo-{model}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    spec, _ = MODELS[model]
    (folder / "config.json").write_text(json.dumps(spec.hub_config(config(model, layers))))
    (folder / "text.txt").write_text("A text.")
    save_file({name: p.detach() for name, p in source(model, layers).named_parameters()}, folder / "model.safetensors")
    for file in (*TINY.glob("tokenizer*"), *TINY.glob("special_tokens*")):
        shutil.copy(file, folder)
    return folder


@cache
def choose(model, words=""):
    """A run of a model under a layout, as `zoo plan` would have it. Raises UsageError if zoo refuses."""
    decided = prepared(model, words)
    return Chosen(
        model=model,
        config=decided.config,
        layout=decided.layout,
        backend=decided.backend,
        adapters=list(decided.adapters),
        policy=decided.policy,
        rows=decided.layout.global_batch,
    )


def refusal(model, words):
    """What zoo says of a layout before anything starts; None if it takes it."""
    try:
        choose(model, words)
    except UsageError as error:
        return str(error)
    return None


# On a rank ----------------------------------------------------------------------------------------


class Run:
    """A model under a layout on this rank, ready to step."""

    def __init__(self, chosen, *, start=None, clip=0.1):
        self.chosen, self.layout, self.adapters = chosen, chosen.layout, chosen.adapters
        self.mesh = mesh(chosen.degrees) if self.adapters else None
        spec, _ = MODELS[chosen.model]
        self.model = assemble.build(
            spec,
            chosen.config,
            mesh=self.mesh,
            layout=self.layout,
            backend=chosen.backend,
            adapters=self.adapters,
            policy=chosen.policy,
            device=torch.device("cpu"),
        )
        whole = start or source(chosen.model, chosen.config.num_hidden_layers)
        load_into(self.model, ModuleSource(whole), (), whole_model=whole)
        optimizer = build_optimizer(self.model, OptimSection(lr=3e-3))
        stepped = assemble.forward_backward(
            self.model, spec.plan(chosen.config), mesh=self.mesh, layout=self.layout, adapters=self.adapters
        )
        schedule = build_schedule(ScheduleSection(steps=10))
        self.state = TrainState(self.model, optimizer, schedule, lr=3e-3, clip=clip, forward_backward=stepped)

    def batches(self, micro_batch=1):
        """This rank's microbatches of so many rows each."""
        degrees, mesh = self.chosen.degrees, self.mesh
        first = mesh.rank("dp_replicate") * degrees.dp_shard + mesh.rank("dp_shard") if mesh else 0
        each = self.chosen.rows // degrees.dp
        mine = rows(self.chosen.rows, self.layout.seq)[first * each : (first + 1) * each]
        result = []
        for start in range(0, each, micro_batch):
            batch = collate(mine[start : start + micro_batch])
            for adapter in self.adapters:
                batch = adapter.shard_batch(batch, mesh, self.layout)
            result.append(batch)
        return result

    def update(self, micro_batch=1):
        """One step: what this rank knows of it."""
        every = rows(self.chosen.rows, self.layout.seq)
        trained, real = (sum(getattr(row, name) for row in every) for name in ("trained_tokens", "document_tokens"))
        return train_step(self.state, self.batches(micro_batch), Counts(trained, self.chosen.rows, real))

    def step(self, micro_batch=1):
        """One step: loss, gradient norm and report of all ranks together."""
        result = self.update(micro_batch)
        parts = {"loss": result.loss, **result.report}
        if self.mesh:
            for part in parts.values():
                dist.all_reduce(part)
        return {**parts, "grad_norm": result.grad_norm}

    def steps(self, number=3, *, micro_batch=1):
        """Numbers of some steps, then weights and moments as this rank holds them."""
        found = {}
        for step in range(self.state.step + 1, self.state.step + 1 + number):
            found |= {f"{step}.{name}": value for name, value in self.step(micro_batch).items()}
        return found | self.parts()

    def gradients(self):
        """A dict in which the next step leaves whole gradients, as the optimizer sees them."""
        found = {}

        def look(*_):
            for name, parameter in self.model.named_parameters():
                gradient = parameter.grad
                found[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
            handle.remove()

        handle = self.state.optimizer.register_step_pre_hook(look)
        return found

    def parts(self):
        """What this rank holds of parameters and of both moments, by name. Moments know every gradient's size."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        found = {f"parameter.{name}": parameter.detach() for parameter, name in names.items()}
        for parameter, state in self.state.optimizer.state.items():
            found |= {f"{slot}.{names[parameter]}": state[slot] for slot in ("exp_avg", "exp_avg_sq")}
        return found


def mesh(degrees):
    """One for all runs of a layout in the same world: process groups cost time and threads."""
    return _mesh(degrees, dist.group.WORLD)


@cache
def _mesh(degrees, _world):
    return Mesh(degrees, "cpu")


def wanted(chosen, number=3):
    """What the single process leaves after the same rows."""
    same = f"rows{chosen.rows} seq{chosen.layout.seq} layers{chosen.config.num_hidden_layers}"
    return single(chosen.model, same, number)


@cache
def single(model, words, number=3):
    """What the single process leaves."""
    return Run(choose(model, words)).steps(number)


def differences(found, expected):
    """What of this rank's numbers and parts of tensors is not the same, as sentences."""
    said = []
    for name, value in found.items():
        reference, scale = expected[name], expected[name].abs().max()
        if isinstance(value, DTensor):
            assert value.shape == reference.shape, name
            shape, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
            reference = reference[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
            value = value.to_local()
        assert value.shape == reference.shape, name
        gap = (value - reference).abs().max() if value.numel() else torch.zeros(())
        # Written so that what is no number differs.
        if not gap <= scale * TOLERANCE:
            said.append(f"{name} is off by {gap.item():.2e} where the largest number is {scale.item():.2e}")
    return said


def check(every, words):
    """Models under a layout that zoo takes against one process each; on every rank the same, together everything."""
    cases = [(chosen := choose(model, words), wanted(chosen)) for model in every]
    answers = ranks.run(cases[0][0].degrees.world_size, compared, cases)
    for model, (_, expected), *of_ranks in zip(every, cases, *answers, strict=True):
        for rank, (found, _) in enumerate(of_ranks):
            assert not found, (model, words, rank, found[:5])
        assert set().union(*(names for _, names in of_ranks)) == expected.keys(), (model, words)


def compared(cases, number=3):
    """On a rank: of each (chosen, wanted), what differs from the single process, and the names that were compared."""
    answers = []
    for chosen, expected in cases:
        found = Run(chosen).steps(number)
        answers.append((differences(found, expected), sorted(found)))
    return answers
