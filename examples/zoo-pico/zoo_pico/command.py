"""`zoo compare-attn A B`: how far two attention backends are apart."""

import click
import torch

from zoo import AttentionSlice, Plugins, Registry, SliceRule


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--tokens", default=256, show_default=True, help="Length of the row.")
@click.pass_obj
def compare_attn(plugins: Plugins, first: str, second: str, tokens: int) -> None:
    """Print the largest difference of two attention backends on random float32 input, forward and backward."""
    registry = Registry(plugins)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, heads, tokens, 16, generator=generator) for heads in (4, 2, 2, 4))
    slices = [AttentionSlice(0, tokens, 0, tokens, SliceRule.CAUSAL)]
    results = []
    for name in (first, second):
        backend = registry.attention.load(name)()
        out, lse = backend.forward(q, k, v, slices, 0.25)
        results.append((out, lse, *backend.backward(dout.to(out.dtype), q, k, v, out, lse, slices, 0.25)))
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        click.echo(f"{name:<4}{(a.double() - b.double()).abs().max().item():.2e}")
