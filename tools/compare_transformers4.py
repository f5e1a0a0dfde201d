"""Do our exports mean the same to transformers 4? Logits in fp32 of small random models of every family, drawn configs.

    python -m venv /tmp/tf4
    /tmp/tf4/bin/pip install transformers==4.57.6 torch
    python -m tools.compare_transformers4 --python /tmp/tf4/bin/python

Each model is built and exported here; the other interpreter loads it, which must report nothing missing, unexpected or
mismatched, and its logits must be ours within 5e-6 * max(1, |logit|max). transformers 4 ignores RoPE scaling of
Nemotron, so that family is drawn without.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tools.reference import FAMILIES, draw_fields
from zoo.conversion.hf.converter import CONVERTER
from zoo.core.model.load import ModuleSource

TOLERANCE = 5e-6
THEIRS = """
import json, sys
import torch, transformers
from safetensors.torch import load_file
for folder in sys.argv[1:]:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    expected = load_file(folder + "/../" + folder.rsplit("/", 1)[1] + ".expected")
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    print(json.dumps({
        "difference": (logits - expected["logits"]).abs().max().item(),
        "largest": expected["logits"].abs().max().item(),
        "report": sorted(str(name) for names in report.values() for name in names),
        "version": transformers.__version__,
        "class": type(model).__name__,
    }))
"""


def perturb(model: nn.Module) -> None:
    """Norms and biases away from 1 and 0, so that leaving one out shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.3 * torch.randn_like(parameter)


def fields_of(family: str, seed: int) -> dict[str, Any]:
    fields = draw_fields(seed, family)
    if family == "nemotron":
        theta = fields["rope_parameters"]["rope_theta"]
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    return fields


def export(family: str, seed: int, folder: Path) -> None:
    """A random model and, beside it, what it makes of some tokens."""
    spec = FAMILIES[family].spec
    config = spec.parse(fields_of(family, seed))
    torch.manual_seed(seed)
    model = spec.build(config)
    perturb(model)
    CONVERTER.export(spec, config, ModuleSource(model), folder, files={}, dtype=None)
    tokens = torch.randint(0, config.vocab_size, (2, 80))
    with torch.no_grad():
        logits = model(tokens)
    save_file({"tokens": tokens, "logits": logits.contiguous()}, f"{folder}.expected")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="an interpreter that has transformers 4")
    parser.add_argument("--draws", type=int, default=20, help="configs a family")
    arguments = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as root:
        for family in FAMILIES:
            folders = [Path(root, f"{family}-{seed}") for seed in range(arguments.draws)]
            for seed, folder in enumerate(folders):
                export(family, seed, folder)
            command = [arguments.python, "-c", THEIRS, *map(str, folders)]
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
            results = [json.loads(line) for line in lines]
            bad = [r for r in results if r["report"] or r["difference"] > TOLERANCE * max(1.0, r["largest"])]
            wrong += len(bad) + (len(results) != arguments.draws)
            worst = max(r["difference"] / max(1.0, r["largest"]) for r in results)
            name, version = results[0]["class"], results[0]["version"]
            line = f"{family:<12}{name} of transformers {version}: {len(results)} configs, {len(bad)} wrong, "
            sys.stdout.write(f"{line}largest difference {worst:.1e} of max(1, |logit|max)\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
