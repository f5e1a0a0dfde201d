"""`zoo launch`: the script or manifest that runs a job on the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import yaml

from zoo.cli.finetune import finetune
from zoo.core.errors import UsageError
from zoo.core.launch.cluster_scripts import ClusterJob, pytorch_job, slurm_script
from zoo.core.registry.loading import Plugins


@click.group()
def launch() -> None:
    """Write what a cluster needs to run a job on many nodes."""


def _cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What both clusters are told; the job's own command line follows `--`."""
    command = click.option("--name", default=None, metavar="NAME", help="name of the job in the queue")(command)
    command = click.option("--gpus-per-node", default=8, type=click.IntRange(1), help="ranks of a node", metavar="G")(
        command
    )
    command = click.option("--nodes", default=1, type=click.IntRange(1), help="machines", metavar="N")(command)
    command = click.option("--print", "print_", is_flag=True, help="print it; submitting is one pipe away")(command)
    return click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="-- finetune MODEL ...")(command)


@launch.command()
@_cluster_options
@click.option("--time", default="24:00:00", metavar="TIME", help="limit of one run of the job; it requeues itself")
@click.option("--partition", default=None, metavar="NAME", help="queue")
@click.option("--sbatch", multiple=True, metavar="KEY=VALUE", help="any other #SBATCH option; repeatable")
@click.pass_context
def slurm(
    ctx: click.Context,
    /,
    print_: bool,
    time: str,
    partition: str | None,
    sbatch: tuple[str, ...],
    **cluster: Any,
) -> None:
    """A readable sbatch script: torchrun on every node, saved and requeued when Slurm warns.

    zoo launch slurm --print --nodes 2 -- finetune llama3 --cp 16 | sbatch
    """
    more = {key: value for key, _, value in (text.partition("=") for text in sbatch)}
    script = slurm_script(_job(ctx, print_, **cluster), {"time": time, "partition": partition, **more})
    click.echo(script, nl=False)


@launch.command()
@_cluster_options
@click.option("--image", required=True, metavar="IMAGE", help="container image that has zoo")
@click.option("--namespace", default=None, metavar="NAME", help="namespace")
@click.option("--volume", multiple=True, metavar="CLAIM:PATH", help="volume claim and its mount path; repeatable")
@click.pass_context
def k8s(
    ctx: click.Context,
    /,
    print_: bool,
    image: str,
    namespace: str | None,
    volume: tuple[str, ...],
    **cluster: Any,
) -> None:
    """A PyTorchJob (kubeflow.org/v1) as YAML.

    zoo launch k8s --print --nodes 2 --image IMAGE -- finetune llama3 --cp 16 | kubectl apply -f -
    """
    volumes = {}
    for text in volume:
        claim, colon, path = text.partition(":")
        if not (claim and colon and path.startswith("/")):
            raise UsageError(f"--volume {text}: write CLAIM:PATH, as --volume runs:/runs")
        volumes[claim] = path
    manifest = pytorch_job(_job(ctx, print_, **cluster), image=image, namespace=namespace, volumes=volumes)
    click.echo(yaml.safe_dump(manifest, sort_keys=False), nl=False)


def _job(
    ctx: click.Context, print_: bool, *, words: tuple[str, ...], name: str | None, nodes: int, gpus_per_node: int
) -> ClusterJob:
    """The job, checked as if for this machine with as many ranks. Raises UsageError."""
    from zoo.core.plan.nodes import check_for_nodes  # noqa: PLC0415  (torch, which `--help` does without)

    cluster_name = ctx.info_name
    if not print_:
        raise UsageError(f"zoo launch {cluster_name} only prints so far; give --print, and pipe it to your cluster")
    if not words or words[0] != "finetune":
        raise UsageError(
            f"which job? Its command line follows --, as: zoo launch {cluster_name} --print -- finetune llama3"
        )
    plugins: Plugins = ctx.obj
    model, flags = _parsed(ctx, list(words[1:]))
    job, unchecked = check_for_nodes(plugins, model, flags, nodes=nodes, gpus_per_node=gpus_per_node)
    if unchecked:
        click.echo(f"warning: {unchecked}", err=True)
    return ClusterJob(
        words=words,
        name=name or f"zoo-{job.model.name}",
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        max_restarts=job.launch.max_restarts,
    )


def _parsed(ctx: click.Context, words: list[str]) -> tuple[str | None, dict[str, Any]]:
    """MODEL and flags, by the parser of the command that will run."""
    # `parent` would say `zoo launch slurm finetune` in messages; the words are those of `zoo finetune`.
    inner = finetune.make_context("zoo finetune", list(words))
    flags = dict(inner.params)
    return flags.pop("model"), flags
