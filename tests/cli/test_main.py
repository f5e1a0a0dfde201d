"""The shell of the command line: help, errors in one line, exit statuses, and plugins that are asked for or refused."""

import errno
import os
import subprocess
import sys

import click
import pytest

from zoo.cli import main as shell
from zoo.core.errors import SavedOnSignal, UsageError
from zoo.version import __version__

HEAD = "from zoo import *\n"

COMMANDS = """
import click
from zoo import hookimpl
from zoo import CommandEntry

@hookimpl
def zoo_register_commands():
    return [CommandEntry(name="{name}", target="zoo_hello:hello", help="Say hello.")]

@click.command()
@click.option("--loud", is_flag=True)
@click.pass_obj
def hello(plugins, loud):
    click.echo(f"hello from {{len(plugins.statuses)}} plugins")
"""


@pytest.fixture
def zoo(distributions, capsys):
    """A function from words to (status, stdout, stderr), run in this process."""

    def run(*words):
        status = shell.main(list(words))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def failing(monkeypatch):
    """A function that makes the command `models` raise an error."""

    def fail(error):
        @click.command()
        def broken():
            raise error

        monkeypatch.setitem(shell.CORE_COMMANDS, "models", (f"{__name__}:broken", "Break."))
        monkeypatch.setattr(sys.modules[__name__], "broken", broken, raising=False)

    return fail


def test_help_lists_every_core_command(zoo):
    status, out, _ = zoo("--help")
    assert status == 0
    for name in ("models", "plan", "finetune", "data", "import", "export", "bench", "plugins", "doctor"):
        assert f"\n  {name} " in out


def test_no_command_is_a_wish_for_help(zoo):
    assert zoo() == zoo("--help")


def test_version(zoo):
    assert zoo("--version")[1] == f"zoo, version {__version__}\n"


def test_every_core_command_exists_and_says_what_it_is(zoo):
    for name in shell.CORE_COMMANDS:
        status, out, _ = zoo(name, "--help")
        assert status == 0
        assert out.startswith(f"Usage: zoo {name} ")


def test_a_misspelled_command_gets_the_nearest_in_one_line(zoo):
    status, out, err = zoo("finetun")
    assert (status, out) == (2, "")
    (line,) = [line for line in err.splitlines() if not line.startswith("plugin ")]
    assert line.startswith("Error: unknown command 'finetun': did you mean 'finetune'?")


def test_a_misspelled_option_gets_the_nearest_in_one_line(zoo):
    status, _, err = zoo("models", "--jsn")
    assert status == 2
    assert err.splitlines()[-1] == "Error: No such option '--jsn'. Did you mean '--json'? See zoo models --help"


def test_a_missing_value_is_a_usage_error(zoo):
    assert zoo("models", "--plugin")[0] == 2


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UsageError("--seq 7: too odd"), 2, "Error: --seq 7: too odd\n"),
        (SavedOnSignal("saved step 3"), 75, "saved step 3\n"),
        (click.UsageError("no"), 2, "Error: no. See zoo models --help\n"),
        (KeyboardInterrupt(), 130, "Interrupted\n"),
        (
            KeyError("x"),
            1,
            "Error: KeyError: 'x'. This is a fault of zoo or of a plugin; ZOO_DEBUG=1 shows the traceback\n",
        ),
    ],
)
def test_every_error_is_one_line_and_a_status(zoo, failing, error, status, said):
    failing(error)
    found, out, err = zoo("models")
    assert (found, out) == (status, "")
    assert err.endswith(said)
    assert "Traceback" not in err


def test_zoo_debug_shows_the_traceback(zoo, failing, monkeypatch):
    failing(UsageError("no"))
    monkeypatch.setenv("ZOO_DEBUG", "1")
    status, _, err = zoo("models")
    assert status == 2
    assert "Traceback" in err
    assert err.endswith("Error: no\n")


def test_a_pipe_that_is_not_stdout_is_an_error_like_any_other(zoo, failing):
    failing(BrokenPipeError(errno.EPIPE, "a rank is gone"))
    status, _, err = zoo("models")
    assert status == 1
    assert "a rank is gone" in err


@pytest.mark.parametrize("word", ["plugins", "--help"])
def test_a_reader_that_leaves_early_is_no_error(word):
    script = f"import sys; from zoo.cli.main import main; sys.exit(main(['{word}']))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.returncode == 141
    assert b"Pipe" not in done.stderr


def test_a_command_of_a_plugin_is_listed_and_run(zoo, distributions):
    distributions.add("zoo-hello", COMMANDS.format(name="hello"))
    assert "Commands of plugins:\n  hello  Say hello." in zoo("--help")[1]
    status, out, _ = zoo("hello")
    assert status == 0
    assert out.startswith("hello from ")
    assert zoo("hello", "--lod")[0] == 2


def test_a_core_command_cannot_be_taken(zoo, distributions):
    distributions.add("zoo-hello", COMMANDS.format(name="models"))
    assert "hello from" not in zoo("models")[1]
    assert "command 'models' is zoo's own; the one of hello (zoo-hello 1.0) is passed over" in zoo("plugins")[1]


def test_a_command_that_is_none_names_its_plugin(zoo, distributions):
    distributions.add("zoo-hello", COMMANDS.format(name="hello").replace("@click.command()", "@click.pass_context"))
    status, _, err = zoo("hello")
    assert status == 4
    assert "command 'hello' of plugin hello (zoo-hello 1.0) cannot be imported" in err
    assert "the target is a function and no click.Command" in err


def test_a_command_of_a_broken_plugin_says_why_it_is_missing(zoo, distributions):
    distributions.add("zoo-hello", "import no_such_module")
    status, _, err = zoo("hello")
    assert status == 4
    assert "command 'hello' would come from plugin hello (zoo-hello 1.0), which is broken: ModuleNotFoundError" in err


@pytest.mark.parametrize("command", [["--help"], ["models"], ["models", "--help"]])
def test_every_command_says_in_one_line_which_plugins_are_broken(zoo, distributions, command):
    distributions.add("zoo-bad", "import no_such_module")
    distributions.add("zoo-old", "ZOO_PLUGIN_API = 0")
    status, out, err = zoo(*command)
    assert status == 0
    assert out
    lines = err.splitlines()
    assert "plugin bad (zoo-bad 1.0) is broken: ModuleNotFoundError: No module named 'no_such_module'" in lines
    assert any(line.startswith("plugin old (zoo-old 1.0) is skipped: needs plugin API 0") for line in lines)


def test_only_rank_0_complains(zoo, distributions, monkeypatch):
    distributions.add("zoo-bad", "import no_such_module")
    monkeypatch.setenv("RANK", "1")
    assert "zoo-bad" not in zoo("models")[2]


@pytest.mark.parametrize(
    "words", [["--no-plugin", "bad", "models"], ["models", "--no-plugin", "bad"], ["models", "--no-plugin=zoo-bad"]]
)
def test_no_plugin_works_before_and_after_the_command(zoo, distributions, words):
    distributions.add("zoo-bad", "import no_such_module")
    assert "zoo-bad" not in zoo(*words)[2]


def test_words_after_two_dashes_are_left_alone():
    front, rest = shell._global_options(["run", "--plugin", "a.py", "--", "--plugin", "b.py"])
    assert front == [("--plugin", "a.py")]
    assert rest == ["run", "--", "--plugin", "b.py"]


def test_a_plugin_file_adds_its_commands(zoo, tmp_path):
    place = tmp_path / "mine.py"
    place.write_text(COMMANDS.format(name="hi").replace('"zoo_hello:hello"', 'f"{__name__}:hello"'))
    assert zoo("--plugin", str(place), "hi")[1].startswith("hello from ")


def test_a_plugin_file_that_fails_stops_the_command_but_not_its_inspection(zoo, tmp_path):
    place = tmp_path / "mine.py"
    place.write_text("import no_such_module")
    status, out, err = zoo("--plugin", str(place), "models")
    assert (status, out) == (4, "")
    assert "No module named 'no_such_module'" in err
    status, out, _ = zoo("--plugin", str(place), "plugins")
    assert status == 0
    assert str(place) in out


def test_strict_plugins_stop_commands_but_not_their_inspection(zoo, distributions, monkeypatch):
    distributions.add("zoo-bad", "import no_such_module")
    monkeypatch.setenv("ZOO_STRICT_PLUGINS", "1")
    assert zoo("models")[0] == 4
    assert zoo("plugins")[0] == 0


def test_python_m_zoo_is_zoo():
    done = subprocess.run([sys.executable, "-m", "zoo", "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == f"zoo, version {__version__}\n"


def test_a_layout_is_drawn_without_model_data_or_adapter(zoo, tmp_path):
    status, out, _ = zoo("plan", "--layout-only", "--tp", "2", "--cp", "2", "--svg", str(tmp_path / "mesh.svg"))
    assert status == 0
    assert "tp              A  A  B  B\ncp              A  B  A  B" in out
    assert (tmp_path / "mesh.svg").read_text().startswith("<svg ")
    status, out, _ = zoo("plan", "llama3", "--layout-only", "--pp", "4", "--nodes", "32")
    assert "256 ranks on 32 nodes of 8: pp 4 x dp_shard 64" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--layout-only", "--cp", "3", "--nodes", "1"], "nearest: --nodes 3 or --cp 2 or --cp 4"),
        (["--layout-only", "--cp", "2", "--ep", "3", "--dp-shard", "2"], "nearest: --ep 2 or --ep 4"),
        (["--layout-only", "--cp", "2", "--svg", "/nowhere/x.svg"], "--svg /nowhere/x.svg: No such file"),
        (["llama3", "--svg", "x.svg"], "give --layout-only"),
    ],
)
def test_a_layout_that_cannot_be_drawn_is_refused(zoo, words, says):
    status, out, err = zoo("plan", *words)
    assert (status, out) == (2, "")
    assert says in err


@pytest.mark.parametrize("name", ["random.py", "yaml.py", "numpy/__init__.py", "torch.py", "click.py"])
def test_modules_of_the_working_directory_are_not_zoos(name, tmp_path):
    """`python -m` looks for modules there first; `zoo`, and the ranks that either starts, do not."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("raise RuntimeError('not the library')\n")
    command = [sys.executable, "-m", "zoo", "plan", "--layout-only", "--cp", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=_with_zoo(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _with_zoo():
    """The environment in which Python finds this zoo from any directory."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
