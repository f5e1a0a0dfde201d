"""What a cluster is given to run a job on many nodes: an sbatch script for Slurm, a PyTorchJob for Kubernetes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.core.errors import SavedOnSignal, UsageError

_JOIN_LATER = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""With 1, torchrun says where ranks meet each time it starts them. Without, a host that joins later never learns it."""
_WARNING_S = 120
"""How long before its end Slurm warns a job; Kubernetes waits as long after SIGTERM."""
_DIRECTIVE = re.compile(r"[a-z][a-z0-9-]*(=[\w:.,/%@+*\[\]()|&-]+)?")
_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterJob:
    """A command line of `zoo`, and the nodes it gets."""

    words: Sequence[str]
    """What follows `zoo`, as `finetune llama3 --cp 8`."""
    name: str
    nodes: int
    gpus_per_node: int
    max_restarts: int = 0
    """Times that torchrun starts ranks again after one of them died."""


def slurm_script(job: ClusterJob, directives: Mapping[str, str | None]) -> str:
    """An sbatch script; `directives` are more `#SBATCH --KEY=VALUE`, those that are None left out.

    Requeued by Slurm if a node fails, and by itself when the run saved after Slurm's warning. Raises UsageError for a
    directive that is none.
    """
    lines = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(job.gpus_per_node),
        **{key: value for key, value in directives.items() if value is not None},
        "requeue": "",
        "open-mode": "append",
        "signal": f"B:USR1@{_WARNING_S}",
        "output": "%x-%j.out",
    }
    head = "\n".join(f"#SBATCH --{_directive(f'{key}={value}' if value else key)}" for key, value in lines.items())
    return _SLURM.format(
        head=head,
        words=shlex.join(job.words),
        nodes=job.nodes,
        ranks=job.gpus_per_node,
        restarts=job.max_restarts,
        saved=SavedOnSignal.exit_code,
        warning=_WARNING_S,
        join_later=_JOIN_LATER,
    )


def pytorch_job(
    job: ClusterJob, *, image: str, namespace: str | None = None, volumes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A PyTorchJob (kubeflow.org/v1) as plain values; `volumes` maps claims to the paths where pods mount them.

    The operator tells torchrun by its PET_ variables where ranks meet, how many nodes and ranks there are. Raises
    UsageError for a name that Kubernetes would refuse.
    """
    if not _LABEL.fullmatch(job.name):
        raise UsageError(f"--name '{job.name}': Kubernetes takes up to 63 of a-z, 0-9 and '-', first a letter")
    claims = dict(volumes or {})
    mounts = [{"name": f"volume-{i}", "mountPath": path} for i, path in enumerate(claims.values())]
    sources = [{"name": f"volume-{i}", "persistentVolumeClaim": {"claimName": c}} for i, c in enumerate(claims)]
    container = {
        # The operator looks for a container of this name.
        "name": "pytorch",
        "image": image,
        "command": ["torchrun"],
        "args": [_unexpanded(word) for word in ("-m", "zoo", *job.words)],
        "env": [
            {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(_WARNING_S - 10)},
            {"name": _JOIN_LATER, "value": "1"},
        ],
        "resources": {"limits": {"nvidia.com/gpu": job.gpus_per_node}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, *mounts],
    }
    pod = {
        "terminationGracePeriodSeconds": _WARNING_S,
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}, *sources],
    }
    worker = {"replicas": job.nodes, "restartPolicy": "OnFailure", "template": {"spec": pod}}
    elastic = {
        "rdzvBackend": "c10d",
        "minReplicas": job.nodes,
        "maxReplicas": job.nodes,
        "maxRestarts": job.max_restarts,
    }
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": job.name} | ({"namespace": namespace} if namespace else {}),
        "spec": {
            "nprocPerNode": str(job.gpus_per_node),
            "elasticPolicy": elastic,
            "runPolicy": {"cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": {"Worker": worker},
        },
    }


def _directive(text: str) -> str:
    if not _DIRECTIVE.fullmatch(text):
        raise UsageError(f"'{text}' is no option of sbatch; write KEY=VALUE without blanks, as --sbatch account=abc")
    return text


def _unexpanded(word: str) -> str:
    """A word that Kubernetes, which replaces `$(NAME)` and `$$` in commands, passes on as it is."""
    return word.replace("$", "$$")


_SLURM = """\
#!/bin/bash
{head}

job=({words})

# What runs once on each node. torchrun keeps USR1 from its ranks and cannot return their {saved}: this shell does both.
run_node() {{
    export {join_later}=1
    export ZOO_STATUS_FILE="${{TMPDIR:-/tmp}}/zoo-$SLURM_JOB_ID-$SLURM_NODEID.status"
    export ZOO_STOP_FILE="$ZOO_STATUS_FILE.stop"
    rm -f "$ZOO_STATUS_FILE" "$ZOO_STOP_FILE"
    (trap '' USR1 && exec torchrun --nnodes={nodes} --nproc-per-node={ranks} --max-restarts={restarts} \\
        --rdzv-backend=c10d --rdzv-endpoint="$ZOO_MEET_AT" --rdzv-id="$SLURM_JOB_ID" -m zoo "$@") &
    agent=$!
    # The file is for ranks that start just now, or are started again.
    trap 'touch "$ZOO_STOP_FILE"; kill -USR1 $(cat /proc/$agent/task/*/children) 2>/dev/null' USR1
    trap 'kill -TERM $agent' TERM
    wait $agent
    status=$?
    if [ $status -gt 128 ]; then wait $agent; status=$?; fi # a trapped signal ends the first wait
    if [ "$(cat "$ZOO_STATUS_FILE" 2>/dev/null)" = {saved} ]; then status={saved}; fi
    rm -f "$ZOO_STATUS_FILE" "$ZOO_STOP_FILE"
    return $status
}}

# Ranks meet at the first node, on a port that two jobs of a node hardly share.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export ZOO_MEET_AT="$first:$((20000 + SLURM_JOB_ID % 20000))"

srun --kill-on-bad-exit=1 bash -c "$(declare -f run_node); run_node \\"\\$@\\"" zoo "${{job[@]}}" &
step=$!
trap 'kill -USR1 $step' USR1 # Slurm's warning, {warning} s before the end: ranks finish the step and save
wait $step
status=$?
if [ $status -gt 128 ]; then wait $step; status=$?; fi
if [ $status -eq {saved} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $status
"""
