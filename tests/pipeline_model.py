"""Small models of every family, and steps of them under any layout."""

from __future__ import annotations

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from zoo.core import order, weights
from zoo.core.batch import Row, collate
from zoo.core.contracts import IGNORE, ContextSetup, PipelineSetup, Setup
from zoo.core.job import OptimSection, ScheduleSection
from zoo.core.mesh import Degrees, Mesh
from zoo.core.optim import build_optimizer, build_schedule
from zoo.core.step import TrainState, train_step
from zoo.models.llama3.model import SPEC as LLAMA
from zoo.models.mixtral.model import SPEC as MIXTRAL
from zoo.models.nemotron.model import SPEC as NEMOTRON
from zoo.models.nemotron_nas.model import SPEC as NAS
from zoo.plugins.attention.dense import Dense
from zoo.plugins.context.ring import Ring
from zoo.plugins.memory.policies import KeepAll, RecomputeBlocks
from zoo.plugins.parallel.context import ContextParallel
from zoo.plugins.parallel.ddp import ReplicatedData
from zoo.plugins.parallel.expert import ExpertParallel
from zoo.plugins.parallel.fsdp import FullyShardedData
from zoo.plugins.parallel.pipeline import PipelineParallel
from zoo.plugins.parallel.tensor import TensorParallel
from zoo.plugins.parallel.zero1 import ShardedOptimizer

VOCAB, SEQ, LAYERS, ROWS = 24, 16, 4, 8

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_ABSENT, _LINEAR = ({"no_op": kind == 0, "replace_with_linear": kind == 1} for kind in (0, 1))
_HEADS, _INNER = {"n_heads_in_group": 2}, {"intermediate_size": 24}
_EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "llama": (LLAMA, {"model_type": "llama", "tie_word_embeddings": False}),
    "llama-tied": (LLAMA, {"model_type": "llama", "tie_word_embeddings": True}),
    "nemotron": (NEMOTRON, {"model_type": "nemotron"}),
    "nemotron-nas": (
        NAS,
        {
            "model_type": "nemotron-nas",
            "num_key_value_heads": None,
            "intermediate_size": None,
            "tie_word_embeddings": True,
            "block_configs": [
                {"attention": _HEADS, "ffn": _INNER},
                {"attention": _ABSENT, "ffn": _INNER},
                {"attention": _LINEAR, "ffn": _ABSENT},
                {"attention": _HEADS, "ffn": _LINEAR},
            ],
        },
    ),
    "mixtral": (MIXTRAL, _EXPERTS),
    "mixtral-aux": (MIXTRAL, _EXPERTS | {"output_router_logits": True, "router_aux_loss_coef": 0.05}),
}


def config(model):
    spec, fields = MODELS[model]
    return spec.parse({**_SIZES, **fields})


def source(model):
    """The model in memory that every layout starts from, in fp64."""
    torch.manual_seed(5)
    return MODELS[model][0].build(config(model)).double()


def rows(number=ROWS):
    """Rows of packed documents, one with padding."""
    draw = np.random.default_rng(3)
    cuts = [((0, SEQ),), ((0, 5), (5, 6), (6, SEQ)), ((0, 9), (9, SEQ)), ((2, 13),)] * 2
    result = []
    for documents in cuts[:number]:
        tokens, labels = draw.integers(0, VOCAB, (2, SEQ))
        labels[draw.random(SEQ) < 0.3] = IGNORE
        labels[[stop - 1 for _, stop in documents]] = IGNORE
        result.append(Row(tokens=tokens, labels=labels, documents=documents))
    return result


class Run:
    """A model under a layout on this rank, ready to step. `choices` are fields of Setup."""

    def __init__(
        self,
        model,
        degrees=None,
        *,
        schedule="1f1b",
        virtual=None,
        memory="none",
        number=ROWS,
        dtype="float64",
        **choices,
    ):
        self.number, self.degrees = number, Degrees(**(degrees or {}))
        context = ContextSetup(schemes={None: Ring()}, windows={None: LAYERS}) if self.degrees.cp > 1 else None
        pipeline = PipelineSetup(schedule=schedule, virtual=virtual)
        master = "float32" if dtype == "bfloat16" else dtype
        self.setup = Setup(seq=SEQ, context=context, dtype=dtype, master_dtype=master, pipeline=pipeline, **choices)
        data = (FullyShardedData(), ReplicatedData(), ShardedOptimizer())
        every = (PipelineParallel(), TensorParallel(), ContextParallel(), ExpertParallel(), *data)
        self.adapters = [a for a in every if a.applies(self.degrees.mapping(), self.setup)]
        self.mesh = Mesh(self.degrees, "cpu") if self.adapters else None
        spec = MODELS[model][0]
        self.model = order.build(
            spec,
            config(model),
            mesh=self.mesh,
            setup=self.setup,
            backend=Dense(),
            adapters=self.adapters,
            policy=RecomputeBlocks() if memory == "full" else KeepAll(),
            device=torch.device("cpu"),
        )
        whole = source(model)
        weights.load_into(self.model, weights.ModuleSource(whole), (), whole_model=whole)
        optimizer = build_optimizer(self.model, OptimSection(lr=3e-3))
        self.state = TrainState(
            self.model,
            optimizer,
            build_schedule(ScheduleSection(steps=10)),
            lr=3e-3,
            clip=0.1,
            forward_backward=order.forward_backward(
                self.model, spec.plan(config(model)), mesh=self.mesh, setup=self.setup, adapters=self.adapters
            ),
        )

    def batches(self):
        """This rank's microbatches of one row each."""
        each = self.number // self.degrees.dp
        axes = [self.mesh.rank(axis) for axis in ("dp_replicate", "dp_shard")] if self.mesh else (0, 0)
        first = (axes[0] * self.degrees.dp_shard + axes[1]) * each
        result = []
        for row in rows(self.number)[first : first + each]:
            batch = collate([row])
            for adapter in self.adapters:
                batch = adapter.shard_batch(batch, self.mesh, self.setup)
            result.append(batch)
        return result

    def step(self):
        """One step: loss, gradient norm and report of all ranks together."""
        trained = sum(row.trained_tokens for row in rows(self.number))
        result = train_step(self.state, self.batches(), trained, self.number)
        parts = {"loss": result.loss, **result.report}
        if self.mesh:
            for part in parts.values():
                torch.distributed.all_reduce(part)
        return {**parts, "grad_norm": result.grad_norm}

    def parameters(self):
        """This rank's parameters, whole."""
        values = {name: p.detach() for name, p in self.model.named_parameters()}
        return {name: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for name, v in values.items()}


def two_steps(model, degrees=None, **options):
    """Everything that two steps leave on a rank: numbers of each, parameters."""
    run = Run(model, degrees, **options)
    result = {f"{step}.{name}": value for step in (1, 2) for name, value in run.step().items()}
    return result | {f"parameter.{name}": value for name, value in run.parameters().items()}


def two_steps_of(model, degrees, options):
    """`two_steps`, as the pool of ranks calls it."""
    return two_steps(model, degrees, **options)
