"""The command line: every command is listed, found and started with the arguments that its module takes."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mtbench_data import ROOT
from prefscan import __main__ as command_line
from prefscan.__main__ import COMMANDS, STAGES, TOOLS, main

HEAVY = ("torch", "transformers", "numpy", "pandas", "pydantic", "yaml", "dvc", "ray", "rich")


@pytest.fixture
def prefscan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command with these words."""

    def start(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["/somewhere/prefscan/__main__.py", *words])
        main()

    return start


def run(folder: Path, *words: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, *python, "-m", "prefscan", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]], ids=str)
def test_help_lists_every_command_with_what_it_does(
    words: list[str], prefscan: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    prefscan(*words)
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert dict(lines) == {name: each.summary for name, each in COMMANDS.items()}


def test_no_stage_is_a_tool() -> None:
    assert COMMANDS.keys() == STAGES.keys() | TOOLS.keys()
    assert len(COMMANDS) == len(STAGES) + len(TOOLS)


@pytest.mark.parametrize("name", ["trian", "prefscan.train", "", "--version"])
def test_an_unknown_command_ends_with_one_sentence(name: str, prefscan: Callable[..., None]) -> None:
    with pytest.raises(SystemExit) as caught:
        prefscan(name, "ipo-0.5-16")
    assert caught.value.code == f"prefscan: no command {name!r}; `prefscan --help` lists them"


def test_that_sentence_is_an_error_and_the_end(tmp_path: Path) -> None:
    done = run(tmp_path, "trian")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "prefscan: no command 'trian'; `prefscan --help` lists them\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_main_that_takes_its_arguments(name: str) -> None:
    """Of a stage the one that it names, or none; of a tool what `add_arguments` adds."""
    command = COMMANDS[name]
    module = import_module(f"prefscan.{command.module}")
    parser = command_line.argparse.ArgumentParser()
    assert not (command.argument and hasattr(module, "add_arguments"))
    if command.argument:
        parser.add_argument(command.argument[0])
    elif hasattr(module, "add_arguments"):
        assert name in TOOLS
        module.add_arguments(parser)
    given = {action.dest for action in parser._actions} - {"help"}
    assert list(inspect.signature(module.main).parameters.keys() - given) == []
    assert given <= inspect.signature(module.main).parameters.keys()
    assert module.__doc__


def test_a_stages_module_is_its_name() -> None:
    assert {name: command.module for name, command in STAGES.items()} == {
        name: f"stages.{name.replace('-', '_')}" for name in STAGES
    }
    modules = {path.stem for path in (ROOT / "src/prefscan/stages").glob("*.py")} - {"__init__"}
    assert modules == {name.replace("-", "_") for name in STAGES}


def test_help_of_a_stage_is_its_modules_own_text_and_runs_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "train", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: prefscan train [-h] key\n")
    assert "Tune a LoRA adapter with one loss, at one β, for a number of steps." in done.stdout
    assert "LOSS-BETA-STEPS, a cell of the grid" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_says_what_it_is(
    name: str, prefscan: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        import_module(f"prefscan.{COMMANDS[name].module}"), "main", lambda **_: pytest.fail("it was to run nothing")
    )
    with pytest.raises(SystemExit) as caught:
        prefscan(name, "--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: prefscan {name} [-h]")
    doc = import_module(f"prefscan.{COMMANDS[name].module}").__doc__ or ""
    assert doc.splitlines()[0] in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train"], "error: the following arguments are required: key"),
        (["train", "ipo-0.5-24", "more"], "error: unrecognized arguments: more"),
        (["prepare", "--force"], "error: unrecognized arguments: --force"),
        (["fetch"], "error: the following arguments are required: what"),
        (["fetch", "model", "pairs"], "error: unrecognized arguments: pairs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_takes_what_it_names_and_nothing_else(
    words: list[str],
    said: str,
    prefscan: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = import_module(f"prefscan.{COMMANDS[words[0]].module}")
    monkeypatch.setattr(module, "main", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as caught:
        prefscan(*words)
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"usage: prefscan {words[0]} [-h]")
    assert said in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "ipo-0.5-24"], {"key": "ipo-0.5-24"}),
        (["reference", "heldout"], {"split": "heldout"}),
        (["prepare"], {}),
        (["plan", "beta=0.7", "steps=8", "--workers", "2"], {"overrides": ["beta=0.7", "steps=8"], "workers": 2}),
        (["launch", "--dirty"], {"overrides": [], "address": None, "dirty": True}),
        (["serve"], {"port": 8000}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_gets_its_arguments_as_they_were_given(
    words: list[str], expected: dict[str, Any], prefscan: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[dict[str, Any]] = []
    module = import_module(f"prefscan.{COMMANDS[words[0]].module}")
    monkeypatch.setattr(module, "main", lambda **given: read.append(given))
    prefscan(*words)
    assert read == [expected]


def test_a_users_mistake_ends_a_command_with_its_text(tmp_path: Path) -> None:
    done = run(tmp_path, "prepare")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("prefscan: params.yaml is missing; ")
    assert done.stderr.count("\n") == 1


def imported(*words: str) -> set[str]:
    """The top-level modules that a command imports."""
    done = run(ROOT, *words, python=("-X", "importtime"))
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.split("|")[2].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize("words", [["--help"], ["trian"]], ids=str)
def test_the_command_line_itself_imports_nothing_heavy(words: list[str]) -> None:
    found = imported(*words)
    assert {"prefscan", "argparse"} <= found
    assert not found.intersection(HEAVY)


def test_a_stage_without_a_model_starts_without_what_loads_one() -> None:
    found = imported("fetch", "--help")
    assert "pydantic" in found
    assert not found.intersection({"torch", "transformers", "datasets", "peft", "trl"})
