"""A number that people write has one meaning and one form, in conf/, in overrides, in params.yaml and to DVC."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from git_data import git
from mtbench_data import default_params
from prefscan.common.config import Cell, load
from prefscan.common.errors import UserError
from prefscan.common.numbers import axis, number, read_yaml
from prefscan.repo.pipeline import compose

ROOT = Path(__file__).parents[2]
NO_NUMBERS = ["8:16", "0100", "1:10", "0x10", "1_000", "0o17", "--1", "1e", "e5", ".", "", "1 0", "١"]


@pytest.mark.parametrize(
    ("token", "value"),
    [
        ("16", 16),
        ("0", 0),
        ("+2", 2),
        ("-3", -3),
        ("0.10", 0.1),
        (".5", 0.5),
        ("5.", 5.0),
        ("1e-3", 1e-3),
        ("1E2", 100),
    ],
)
def test_a_decimal_token_is_that_number(token: str, value: float) -> None:
    assert number(token) == value


@pytest.mark.parametrize("token", NO_NUMBERS)
def test_another_token_is_no_number(token: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(repr(token))} is no decimal number; write it like"):
        number(token)


def test_a_number_beyond_every_float_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^'1e400' is beyond every float"):
        number("1e400")


def test_equal_numbers_stand_once_in_an_axis_and_in_one_form() -> None:
    assert axis(1, "1.0, 1e0, 0.10, 0.1, 10e-2") == [1, 0.1]
    assert [repr(value) for value in axis(1.0, "16.0, 1e22")] == ["1", "16", "1e+22"]
    assert axis("epoch", "8, epoch") == ["epoch", 8]
    assert axis(0.1, "") == [0.1]
    assert axis("sigmoid", " ipo , kto_pair ") == ["sigmoid", "ipo", "kto_pair"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.1,,0.5", "has nothing between two commas"),
        ("0.1, 8:16", "'8:16' is no decimal number"),
        ([0.1, 0.5], "is neither number nor word"),
        (True, "True is neither number nor word"),
        (None, "None is neither number nor word"),
    ],
)
def test_what_is_no_text_of_values_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        axis(0.1, value)


@pytest.mark.parametrize("token", ["8:16", "0100", "1:10", "0x10", "1:30.5"])
def test_yaml_that_reads_another_number_than_it_shows_is_refused(token: str, tmp_path: Path) -> None:
    with pytest.raises(yaml.YAMLError, match=f"{token!r} is no decimal number"):
        read_yaml(f"steps: {token}")
    assert read_yaml(f"steps: '{token}'") == {"steps": token}
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(r"(?m)^seed: .*$", f"seed: {token}", yaml.safe_dump(default_params())))
    with pytest.raises(UserError, match=f"is not YAML: '{token}' is no decimal number; .* line"):
        load(path)


def test_yaml_reads_exponents_without_a_point_as_dvc_does() -> None:
    assert read_yaml("[1e-3, 1E5, 5.0e-06, 1, 1.0, -2]") == [1e-3, 1e5, 5e-6, 1, 1.0, -2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('sweep.steps="8:16"', "'8:16' is no decimal number"),
        ("sweep.steps=8:16", "'8:16' is no decimal number"),
        ('sweep.steps="0100"', "'0100' is no decimal number"),
        ('sweep.beta="1:10"', "'1:10' is no decimal number"),
        ("steps=0100", "'0100' is no decimal number"),
        ("beta=1:10", "'1:10' is no decimal number"),
        ("sweep.beta=[0.1,0.5]", "write text with commas"),
    ],
)
def test_an_override_that_is_no_number_is_refused(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=f"^{re.escape(override)}: .*{re.escape(message)}"):
        compose([override], tmp_path / "params.yaml")


def test_a_file_of_conf_that_has_no_decimal_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "conf/sweep/mine.yaml").write_text("loss: ''\nbeta: 1:10\nsteps: ''\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'1:10' is no decimal number"):
        compose(["sweep=mine"], tmp_path / "params.yaml")


def test_beta_1_and_1_0_are_one_cell() -> None:
    cells = [Cell(loss="ipo", beta=beta, steps=steps) for beta, steps in ((1, 8), (1.0, 8.0))]
    assert cells[0] == cells[1]
    assert {cell.key for cell in cells} == {"ipo-1-8"}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"beta": [0.1, 1.0]}, "grid.beta: .*1.0 is written 1"),
        ({"steps": [16, 16.0]}, "grid.steps: .*16.0 is written 16"),
        ({"beta": [0.1, 0.1]}, "grid.beta: .*0.1 stands twice"),
        ({"loss": ["sigmoid", "sigmoid"]}, "grid.loss: .*'sigmoid' stands twice"),
    ],
)
def test_a_grid_by_hand_that_dvc_would_name_otherwise_is_refused(
    grid: dict[str, Any], message: str, tmp_path: Path
) -> None:
    params = default_params()
    params["grid"] |= grid
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "params.yaml")


def test_dvc_composes_one_stage_a_number_and_refuses_others(in_tmp: Path) -> None:
    """Real `dvc exp run`, which reads conf/ by itself and names stages after what it wrote to params.yaml."""
    for name in ("conf", "hydra_plugins", "src"):
        shutil.copytree(ROOT / name, in_tmp / name, ignore=shutil.ignore_patterns("__pycache__"))
    matrix = {name: f"${{grid.{name}}}" for name in ("loss", "beta", "steps")}
    cell = {"matrix": matrix, "cmd": "mkdir -p out && echo ${key} > out/${key}", "outs": ["out/${key}"]}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"train": cell}}, sort_keys=False))
    Path("params.yaml").write_text(yaml.safe_dump(default_params()))
    git("init", "--quiet")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], check=True)
    (in_tmp / ".dvc/config").write_text("[core]\n    analytics = false\n[hydra]\n    enabled = true\n")
    git("add", "--all")
    git("commit", "--quiet", "--message", "Start")

    def run(*overrides: str) -> tuple[int, str]:
        options = [word for override in overrides for word in ("-S", override)]
        command = [sys.executable, "-m", "dvc", "exp", "run", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, output = run("beta=1", "steps=4", 'sweep.beta="1.0, 1e-7, 0.30"', "sweep.loss=ipo", 'sweep.steps="4.0"')
    assert code == 0, output
    expected = {f"{loss}-{beta}-4" for loss in ("sigmoid", "ipo") for beta in ("1", "1e-07", "0.3")}
    assert {path.name for path in Path("out").glob("*-*")} == expected
    assert {cell.key for cell in load().grid.cells} == expected
    for override in ('sweep.steps="8:16"', 'sweep.steps="0100"', 'sweep.beta="1:10"'):
        code, output = run(override)
        assert code != 0
        assert re.search(r"'\S+' is no decimal number; write it like", output)
