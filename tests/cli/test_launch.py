"""`zoo launch`: scripts that bash takes and that do what they say, manifests that the operator takes, and refusals."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.harness.patience import PATIENCE_S
from zoo.cli import main as shell
from zoo.core.launch.cluster_scripts import ClusterJob, pytorch_job, slurm_script

JOB = ("finetune", "llama3", "--data", "stdlib", "--cp", "8")
HOSTILE = [
    "it's",
    '"',
    "$HOME",
    "$(id)",
    "$$(id)",
    "`id`",
    "a\nexit 3\n",
    "* ?",
    "",
    "--",
    "\\",
    "#",
    "; rm x",
    "!!",
    "{a,b}",
]


@pytest.fixture
def zoo(capsys):
    """A function from words to (status, stdout, stderr), run in this process."""

    def run(*words):
        status = shell.main(list(words))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_script_passes_bash_and_says_what_it_was_asked_for(zoo):
    status, script, _ = zoo(
        *("launch", "slurm", "--print", "--nodes", "2", "--time", "01:30:00", "--partition", "long"),
        *("--sbatch", "account=abc", "--sbatch", "exclusive", "--", *JOB),
    )
    assert status == 0
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    directives = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {
        *("nodes=2", "gpus-per-node=8", "time=01:30:00", "partition=long", "account=abc", "exclusive"),
        *("requeue", "signal=B:USR1@120", "job-name=zoo-llama3", "ntasks-per-node=1"),
    } <= set(directives)
    assert "job=(finetune llama3 --data stdlib --cp 8)" in script
    assert "--nnodes=2 --nproc-per-node=8" in script
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in script


def pretend(folder, name, text, interpreter="/bin/bash"):
    """A program of that name which stands in for the cluster's."""
    path = folder / name
    path.write_text(f"#!{interpreter}\n{text}")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The environment of a Slurm job of one node, without Slurm: srun runs its words, scontrol writes them down."""
    pretend(tmp_path, "srun", 'shift; exec "$@"')
    pretend(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo node-0; else echo "$@" > "$TMPDIR/asked"; fi')
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    return env | {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node-[0-1]"}


def test_hostile_words_arrive_as_they_are(cluster, tmp_path):
    pretend(tmp_path, "torchrun", "import json, os, sys; json.dump(sys.argv, open('words', 'w'))", sys.executable)
    script = slurm_script(ClusterJob(words=HOSTILE, name="x", nodes=2, gpus_per_node=4), {})
    done = subprocess.run(["bash", "-c", script], env=cluster, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    words = json.loads((tmp_path / "words").read_text())
    assert words[words.index("zoo") + 1 :] == HOSTILE
    assert "--rdzv-endpoint=node-0:20007" in words
    assert not (tmp_path / "asked").exists()


RANK = """
import os, signal, sys, time
from zoo.cli import main as shell
from zoo.core.errors import SavedOnSignal

asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))

def train(*_, **__):
    open("ready", "w").close()
    while not asked:
        time.sleep(0.01)
    raise SavedOnSignal("saved")

shell.cli.main = train
os.environ["RANK"] = "0"
sys.exit(shell.main([]))
"""


def test_a_warning_reaches_the_ranks_and_what_they_saved_is_requeued(cluster, tmp_path):
    """The signal goes to the batch script only; what stands in for torchrun would never pass it on."""
    (tmp_path / "rank.py").write_text(RANK)
    code = (
        f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, {str(tmp_path / 'rank.py')!r}]).returncode)"
    )
    pretend(tmp_path, "torchrun", f"exec {sys.executable} -c {shlex.quote(code)}")
    (tmp_path / "job.sh").write_text(slurm_script(ClusterJob(words=JOB, name="x", nodes=1, gpus_per_node=1), {}))
    process = subprocess.Popen(["bash", "job.sh"], env=cluster, cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE_S) == 75
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def test_a_run_that_fails_is_not_requeued(cluster, tmp_path):
    pretend(tmp_path, "torchrun", "exit 6")
    script = slurm_script(ClusterJob(words=JOB, name="x", nodes=1, gpus_per_node=1), {})
    assert subprocess.run(["bash", "-c", script], env=cluster, check=False).returncode == 6
    assert not (tmp_path / "asked").exists()


# What the CRD and the operator's webhook require of a PyTorchJob: (path, kind). `*` is every item of a list.
REQUIRED = [
    ("apiVersion", str),
    ("kind", str),
    ("metadata.name", str),
    ("spec.nprocPerNode", str),
    ("spec.runPolicy", dict),
    ("spec.elasticPolicy.minReplicas", int),
    ("spec.elasticPolicy.maxReplicas", int),
    ("spec.elasticPolicy.maxRestarts", int),
    ("spec.pytorchReplicaSpecs.Worker.replicas", int),
    ("spec.pytorchReplicaSpecs.Worker.template.spec.containers.*.name", str),
    ("spec.pytorchReplicaSpecs.Worker.template.spec.containers.*.image", str),
    ("spec.pytorchReplicaSpecs.Worker.template.spec.containers.*.command.*", str),
    ("spec.pytorchReplicaSpecs.Worker.template.spec.containers.*.args.*", str),
    ("spec.pytorchReplicaSpecs.Worker.template.spec.containers.*.env.*.value", str),
    ("spec.pytorchReplicaSpecs.Worker.template.spec.containers.*.volumeMounts.*.mountPath", str),
    ("spec.pytorchReplicaSpecs.Worker.template.spec.volumes.*.name", str),
]
FIELDS = {
    "spec": {"runPolicy", "elasticPolicy", "pytorchReplicaSpecs", "nprocPerNode"},
    "spec.elasticPolicy": {
        *("minReplicas", "maxReplicas", "rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId", "rdzvConf", "standalone"),
        *("maxRestarts", "metrics"),
    },
    "spec.runPolicy": {
        *("cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "schedulingPolicy"),
        *("suspend", "managedBy"),
    },
    "spec.pytorchReplicaSpecs.Worker": {"replicas", "template", "restartPolicy"},
}
"""All that these may have; `elasticPolicy.nProcPerNode` beside `spec.nprocPerNode` is refused by the operator."""


def at(value, path):
    """All values at a path."""
    for part in path.split("."):
        value = [x for v in value for x in v] if part == "*" else [v[part] for v in value]
    return value


def check_schema(manifest):
    for path, kind in REQUIRED:
        found = at([manifest], path)
        assert {type(value) for value in found} == {kind}, path
    for path, fields in FIELDS.items():
        (value,) = at([manifest], path)
        assert set(value) <= fields, path
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    assert manifest["spec"]["elasticPolicy"]["rdzvBackend"] in ("c10d", "etcd", "etcd-v2")
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    volumes = {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_a_manifest_has_what_the_operator_requires(zoo):
    status, text, _ = zoo(
        *("launch", "k8s", "--print", "--nodes", "3", "--image", "registry/zoo:1", "--namespace", "ml"),
        *("--volume", "runs:/runs", "--", *JOB),
    )
    assert status == 0
    manifest = yaml.safe_load(text)
    check_schema(manifest)
    (container,) = at([manifest], "spec.pytorchReplicaSpecs.Worker.template.spec.containers.*")
    assert container["args"] == ["-m", "zoo", *JOB]
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["env"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert at([manifest], "spec.pytorchReplicaSpecs.Worker.replicas") == [3]
    assert at([manifest], "spec.pytorchReplicaSpecs.Worker.template.spec.volumes.*")[1] == {
        "name": "volume-0",
        "persistentVolumeClaim": {"claimName": "runs"},
    }


def expanded(word):
    """What Kubernetes makes of a word of a command where no variable is defined."""
    result, rest = "", word
    while rest:
        step = 2 if rest.startswith("$$") else 1
        assert not rest.startswith("$("), "a reference to a variable"
        result, rest = result + rest[0], rest[step:]
    return result


def test_hostile_words_survive_yaml_and_the_expansion_of_kubernetes():
    job = ClusterJob(words=HOSTILE, name="x", nodes=1, gpus_per_node=1)
    manifest = yaml.safe_load(yaml.safe_dump(pytorch_job(job, image="i"), sort_keys=False))
    (args,) = at([manifest], "spec.pytorchReplicaSpecs.Worker.template.spec.containers.*.args")
    assert [expanded(word) for word in args[2:]] == HOSTILE


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["slurm", "--", *JOB], ["give --print"]),
        (["slurm", "--print"], ["Its command line follows --"]),
        (["slurm", "--print", "--", "plan", "llama3"], ["Its command line follows --"]),
        (["slurm", "--print", "--", "finetune", "lama3"], ["did you mean 'llama3'"]),
        (["slurm", "--print", "--", "finetune", "llama3", "--cq", "2"], ["--cq", "--cp"]),
        (["slurm", "--print", "--", *JOB, "--set", "optim.rl=1"], ["optim.lr"]),
        (["slurm", "--print", "--", *JOB, "--size", "9b"], ["no size '9b'"]),
        (["slurm", "--print", "--", "finetune", "llama3"], ["--data"]),
        (["slurm", "--print", "--nodes", "2", "--", *JOB[:-1], "3"], ["are 16", "--nodes 3", "--cp 2 or --cp 4"]),
        (
            ["slurm", "--print", "--nodes", "2", "--", *JOB, "--dp-shard", "1"],
            ["needs 8 ranks", "--nodes 1 or --cp 16"],
        ),
        (["slurm", "--print", "--nodes", "0", "--", *JOB], ["--nodes"]),
        (["slurm", "--print", "--name", "a b", "--", *JOB], ["job-name=a b"]),
        (["slurm", "--print", "--time", "1\nid", "--", *JOB], ["is no option of sbatch"]),
        (["slurm", "--print", "--sbatch", "wrap=$(id)", "--", *JOB], ["is no option of sbatch"]),
        (["k8s", "--print", "--image", "i", "--name", "A_b", "--", *JOB], ["--name 'A_b'"]),
        (["k8s", "--print", "--image", "i", "--volume", "runs", "--", *JOB], ["CLAIM:PATH"]),
        (["k8s", "--print", "--", *JOB], ["--image"]),
    ],
)
def test_what_cannot_be_is_refused_before_it_is_queued(zoo, words, says):
    status, out, err = zoo("launch", *words)
    assert status == 2
    assert out == ""
    assert "Traceback" not in err
    for word in says:
        assert word in err


@pytest.mark.parametrize("more", [["--data", "/nowhere/x.jsonl"], ["--from", "somebody/their-model"]])
def test_what_only_the_nodes_have_is_a_warning(zoo, more):
    status, out, err = zoo("launch", "slurm", "--print", "--", *JOB, *more)
    assert status == 0
    assert out.startswith("#!/bin/bash\n")
    assert f"{more[1]} is not on this machine" in err
