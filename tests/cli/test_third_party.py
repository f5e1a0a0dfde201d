"""Real packages, built and installed into an environment of their own, and the real command in it."""

import json
import os
import shutil
import site
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOOD = ROOT / "examples" / "zoo-pico"
BROKEN = {
    "exits": "SystemExit: this machine has no licence",
    "fails-import": "ModuleNotFoundError: No module named 'a_kernel_that_is_not_installed'",
    "garbage": "zoo_register_attention returned a list with an object of type str: it takes AttentionEntry only",
    "misspelled": "unknown hook 'zoo_register_model': did you mean 'zoo_register_models'?",
    "unknown-arg": "zoo_select_attention asks for an unknown argument 'model': it offers problem, candidates",
}


class Environment:
    """A virtual environment that sees this one's packages, and has some of its own."""

    def __init__(self, folder):
        venv.create(folder / "venv", with_pip=False)
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        (own,) = (folder / "venv" / "lib").glob("python*/site-packages")
        shared = [path for path in site.getsitepackages() if Path(path).is_dir()]
        lines = [f"import site; site.addsitedir({path!r})" for path in [str(ROOT), *shared]]
        (own / "shared.pth").write_text("\n".join(lines))

    def install(self, *sources):
        copies = [shutil.copytree(source, self.folder / source.name) for source in sources]
        pip = [self.python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
        subprocess.run([*pip, *copies], check=True, cwd=self.folder, capture_output=True)

    def zoo(self, *words, **environment):
        """Run the command outside the repository, so that nothing but what is installed can be found."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("ZOO_", "PYTHON", "RANK"))}
        return subprocess.run(
            [self.python, "-m", "zoo", *words],
            cwd=self.folder,
            env={**clean, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """An environment with the good package."""
    environment = Environment(tmp_path_factory.mktemp("good"))
    environment.install(GOOD)
    return environment


@pytest.fixture(scope="session")
def crowd(tmp_path_factory):
    """An environment with the good package, five broken ones and one that clashes."""
    environment = Environment(tmp_path_factory.mktemp("crowd"))
    environment.install(GOOD, *sorted((ROOT / "tests" / "packages").iterdir()))
    return environment


def test_every_package_is_listed_with_its_version_state_and_reason(crowd):
    done = crowd.zoo("plugins", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = {row["name"]: row for row in json.loads(done.stdout)["plugins"]}
    for name, reason in BROKEN.items():
        assert (found[name]["status"], found[name]["reason"]) == ("broken", reason)
        assert found[name]["dist"] == f"zoo-{name}"
    assert found["fails-import"]["version"] == "0.4.0"
    assert found["pico"]["status"] == "ok"
    assert [(e["kind"], e["name"]) for e in found["pico"]["provides"]] == [
        ("models", "pico"),
        ("attention", "fp64"),
        ("commands", "compare-attn"),
    ]
    assert found["clash"]["status"] == "ok"
    assert all(row["status"] == "ok" for row in found.values() if row["dist"] == "zoo")


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["models"],
        ["models", "--help"],
        ["plan", "--help"],
        ["finetune", "--help"],
        ["import", "--help"],
        ["export", "--help"],
    ],
    ids=" ".join,
)
def test_every_command_works_and_names_the_broken_in_one_line_each(crowd, words):
    done = crowd.zoo(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == len(BROKEN)
    for name, reason in BROKEN.items():
        assert any(line.startswith(f"plugin {name} (zoo-{name} ") and line.endswith(reason) for line in lines)


def test_doctor_and_plan_work_too(crowd):
    done = crowd.zoo("doctor")
    assert done.returncode == 0, done.stdout
    assert all(reason in done.stdout for reason in BROKEN.values())
    done = crowd.zoo("plan", "pico", "--cp", "2")
    assert done.returncode == 0, done.stderr


def test_the_models_of_the_good_one_are_there_among_the_broken(crowd):
    assert "zoo-pico" in crowd.zoo("models").stdout


def test_a_clash_between_strangers_is_an_error_only_when_the_name_is_used(crowd):
    assert crowd.zoo("plan", "pico", "--attn", "dense").returncode == 0
    done = crowd.zoo("plan", "pico", "--attn", "fp64")
    assert done.returncode == 4
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "'fp64' is given by two plugins, clash (zoo-clash 1.0) and pico (zoo-pico 0.1.0)" in line
    done = crowd.zoo("plan", "pico", "--attn", "fp64", "--no-plugin", "zoo-clash")
    assert done.returncode == 0, done.stderr


def test_asking_for_what_a_broken_one_would_give_is_an_error_with_its_reason(crowd):
    done = crowd.zoo("plan", "pico", "--attn", "misspelled")
    assert done.returncode == 4
    assert BROKEN["misspelled"] in done.stderr.splitlines()[-1]


def test_strict_refuses_the_crowd(crowd):
    done = crowd.zoo("models", ZOO_STRICT_PLUGINS="1")
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1


def test_zoo_plugins_leaves_only_those_it_names(crowd):
    done = crowd.zoo("models", ZOO_PLUGINS="pico")
    assert done.stderr == ""
    assert "zoo-pico" in done.stdout


def test_the_command_of_the_good_one_runs_and_its_kernel_agrees_with_ours(good):
    assert "compare-attn  Say how far two attention backends are apart." in good.zoo("--help").stdout
    done = good.zoo("compare-attn", "dense", "fp64")
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert set(found) == {"out", "lse", "dq", "dk", "dv"}
    assert all(float(difference) < 1e-4 for difference in found.values())


@pytest.mark.dist
def test_the_good_one_trains_its_model_with_its_kernel_on_two_ranks(good):
    words = ["--cp", "2", "--attn", "fp64", "--seq", "512", "--steps", "3", "--dtype", "float64", "--seed", "0"]
    losses = {}
    for name, flags in {"two": words, "one": ["--cp", "1", *words[2:]]}.items():
        done = good.zoo("finetune", "pico", "--out", name, *flags)
        assert done.returncode == 0, done.stderr
        steps = [json.loads(line) for line in (good.folder / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [step["loss"] for step in steps]
    assert len(losses["two"]) == 3
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-9)
