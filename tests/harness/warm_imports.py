"""What commands and ranks that share imports have imported, before anything is computed. Nobody else imports this."""

import gc
import importlib

for _name in (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "transformers.models.auto.tokenization_auto",
    "tests.harness.warm",
    "zoo.cli.main",
    "zoo.core.api",
    "zoo.core.launch.rank_start",
    "zoo.core.launch.serve",
    "zoo.core.run.worker",
):
    importlib.import_module(_name)

# What was imported stays, so looking through it again for garbage would find nothing.
gc.freeze()
