"""A small Mixtral, its routers biased if wanted, and steps of it under any layout."""

from __future__ import annotations

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from zoo.core import order, weights
from zoo.core.batch import Row, collate
from zoo.core.contracts import IGNORE, ContextSetup, Setup
from zoo.core.job import OptimSection, ScheduleSection
from zoo.core.mesh import Degrees, Mesh
from zoo.core.optim import build_optimizer, build_schedule
from zoo.core.step import TrainState, train_step
from zoo.models.mixtral.model import SPEC
from zoo.plugins.attention.dense import Dense
from zoo.plugins.context.ring import Ring
from zoo.plugins.memory.policies import KeepAll, RecomputeBlocks
from zoo.plugins.parallel.context import ContextParallel
from zoo.plugins.parallel.ddp import ReplicatedData
from zoo.plugins.parallel.expert import ExpertParallel
from zoo.plugins.parallel.fsdp import FullyShardedData
from zoo.plugins.parallel.zero1 import ShardedOptimizer

VOCAB, WIDTH, INNER, EXPERTS, LAYERS, SEQ, ROWS = 23, 16, 24, 8, 2, 24, 8
IDLE = (6, 7)
"""Experts that no token goes to when the router is biased."""


def config(coefficient):
    """A small Mixtral, trained on `coefficient` times the auxiliary loss, or not if it is None."""
    return SPEC.parse(
        {
            "model_type": "mixtral",
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "output_router_logits": coefficient is not None,
            "router_aux_loss_coef": coefficient or 0.0,
        }
    )


def source(coefficient, *, biased):
    """The model in memory that every layout starts from, in fp64."""
    torch.manual_seed(5)
    model = SPEC.build(config(coefficient)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if biased and name.endswith("gate.weight"):
                # Of a direction and its opposite one always attracts, so two of the first four do for every token,
                # and an expert with a row of zeros never has its turn.
                parameter[1], parameter[3] = -parameter[0], -parameter[2]
                parameter[:4] *= 60
                parameter[list(IDLE)] = 0
    return model


def rows():
    """Rows of packed documents, the last with padding."""
    draw = np.random.default_rng(3)
    cuts = [((0, SEQ),), ((0, 5), (5, 6), (6, SEQ)), ((0, 13), (13, SEQ)), ((2, 20),)] * (ROWS // 4)
    result = []
    for documents in cuts:
        tokens, labels = draw.integers(0, VOCAB, (2, SEQ))
        labels[draw.random(SEQ) < 0.3] = IGNORE
        labels[[stop - 1 for _, stop in documents]] = IGNORE
        result.append(Row(tokens=tokens, labels=labels, documents=documents))
    return result


def setup(degrees, dtype="float64", **choices):
    context = ContextSetup(schemes={None: Ring()}, windows={None: LAYERS}) if degrees.cp > 1 else None
    master = "float32" if dtype == "bfloat16" else dtype
    return Setup(seq=SEQ, context=context, dtype=dtype, master_dtype=master, **choices)


class Run:
    """A model under a layout on this rank, ready to step. `choices` are fields of Setup: data_parallel, reshard.

    It is the Mixtral of above, or another if `spec`, its config and a module with its weights are given.
    """

    def __init__(
        self,
        degrees,
        coefficient=None,
        *,
        biased=False,
        memory="none",
        dtype="float64",
        model=None,
        clip=0.1,
        **choices,
    ):
        self.degrees, self.setup = Degrees(**degrees), setup(Degrees(**degrees), dtype, **choices)
        every = (ContextParallel(), ExpertParallel(), FullyShardedData(), ReplicatedData(), ShardedOptimizer())
        spec, model_config, start = model or (SPEC, config(coefficient), source(coefficient, biased=biased))
        self.adapters = [a for a in every if a.applies(self.degrees.mapping(), self.setup)]
        self.mesh = Mesh(self.degrees, "cpu") if self.adapters else None
        self.model = order.build(
            spec,
            model_config,
            mesh=self.mesh,
            setup=self.setup,
            backend=Dense(),
            adapters=self.adapters,
            policy=RecomputeBlocks() if memory == "full" else KeepAll(),
            device=torch.device("cpu"),
        )
        weights.load_into(self.model, weights.ModuleSource(start), ())
        optimizer = build_optimizer(self.model, OptimSection(lr=3e-3))
        stepped = order.forward_backward(
            self.model, spec.plan(model_config), mesh=self.mesh, setup=self.setup, adapters=self.adapters
        )
        schedule = build_schedule(ScheduleSection(steps=10))
        self.state = TrainState(self.model, optimizer, schedule, lr=3e-3, clip=clip, forward_backward=stepped)
        self.gradients = {}
        optimizer.register_step_pre_hook(lambda *_: self.gradients.update(whole(self.model, gradients=True)))

    def batches(self, micro_batch=1):
        """This rank's microbatches of so many rows each."""
        mesh, every = self.mesh, rows()
        first = mesh.rank("dp_replicate") * self.degrees.dp_shard + mesh.rank("dp_shard") if mesh else 0
        each = ROWS // self.degrees.dp
        mine = every[first * each : (first + 1) * each]
        result = []
        for start in range(0, each, micro_batch):
            batch = collate(mine[start : start + micro_batch])
            for adapter in self.adapters:
                batch = adapter.shard_batch(batch, mesh, self.setup)
            result.append(batch)
        return result

    def update(self, micro_batch=1):
        """One step: what this rank knows of it."""
        trained = sum(row.trained_tokens for row in rows())
        return train_step(self.state, self.batches(micro_batch), trained, ROWS)

    def step(self, micro_batch=1):
        """One step: loss, gradient norm and report of all ranks together."""
        result = self.update(micro_batch)
        parts = {"loss": result.loss, **result.report}
        if self.mesh:
            for part in parts.values():
                torch.distributed.all_reduce(part)
        return {**parts, "grad_norm": result.grad_norm}


def whole(model, *, gradients=False):
    """Parameters (or their gradients) as plain whole tensors."""
    values = {name: p.grad if gradients else p.detach() for name, p in model.named_parameters()}
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for name, v in values.items()}


def moments(run):
    """Both moments of every parameter by name, as the optimizer of this rank has them."""
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    return {
        f"{slot}.{names[parameter]}": state[slot]
        for parameter, state in run.state.optimizer.state.items()
        for slot in ("exp_avg", "exp_avg_sq")
    }


def two_steps(degrees, coefficient, biased, memory="none", **choices):
    """Everything that two steps leave: numbers of each, gradients of each, parameters."""
    run = Run(degrees, coefficient, biased=biased, memory=memory, **choices)
    result = {}
    for step in (1, 2):
        result |= {f"{step}.{name}": value for name, value in run.step().items()}
        result |= {f"{step}.gradient.{name}": value for name, value in run.gradients.items()}
    return result | {f"parameter.{name}": value for name, value in whole(run.model).items()}
