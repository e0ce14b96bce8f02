import os
import subprocess
import sys
import tomllib
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import mtbench_data
from prefscan.common import config
from prefscan.common.config import check_logging
from prefscan.common.errors import UserError
from prefscan.stages.check import main
from prefscan.training.losses import LOSSES

REPOSITORY = Path(__file__).parents[2]
KNOWN = f"known are {', '.join(LOSSES)}"


def write_params(folder: Path, **changes: Any) -> None:
    grid = {"steps": [8]} | changes.pop("grid", {})
    mtbench_data.write_params(folder, steps=8, grid=grid, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"loss": ["sigmoid", "dpo"]}}, f"params.yaml: grid.loss: 'dpo' is no known loss; {KNOWN}"),
        ({"beta": 0}, "params.yaml: beta: 0 is refused: input should be greater than 0"),
    ],
)
def test_the_command_ends_with_status_1_and_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_params(tmp_path, **changes)
    done = subprocess.run(
        [sys.executable, "-m", "prefscan", "check"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"prefscan: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_a_recipe_with_an_unknown_loss_is_refused(in_tmp: Path) -> None:
    write_params(in_tmp, loss="dpo", grid={"loss": ["dpo"]})
    with pytest.raises(UserError, match=f"'dpo' is no known loss; {KNOWN}"):
        main()
    assert not (in_tmp / "data").exists()


def test_every_loss_that_is_defined_is_known_and_has_a_section(in_tmp: Path) -> None:
    write_params(in_tmp, grid={"loss": list(LOSSES)})
    main()
    sections = mtbench_data.default_params()["losses"]
    assert list(sections) == list(LOSSES)
    without = {loss: options for loss, options in sections.items() if loss != "orpo"}
    params = mtbench_data.default_params() | {"losses": without}
    params["grid"]["loss"] = ["sigmoid", "orpo"]
    (in_tmp / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(UserError, match=r"^params\.yaml: losses\.orpo: missing; `prefscan docs` writes it"):
        main()
    write_params(in_tmp, losses=sections | {"sigmoids": {}})
    with pytest.raises(UserError, match=rf"losses\.sigmoids: no known loss; {KNOWN}"):
        main()


def test_a_losses_hyperparameters_are_those_of_its_function(in_tmp: Path) -> None:
    sections = mtbench_data.default_params()["losses"]
    write_params(in_tmp, losses=sections | {"sigmoid": {"gamma": 0.5}})
    with pytest.raises(UserError, match=r"losses\.sigmoid\.gamma: unknown key \(value 0\.5\)"):
        main()
    write_params(in_tmp, losses=sections | {"cpo": {"alpha": -1.0}})
    with pytest.raises(UserError, match=r"losses\.cpo\.alpha: -1\.0 is refused: input should be greater than or equal"):
        main()


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_log_whose_package_is_not_installed_is_refused(
    package: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    monkeypatch.setattr(config, "find_spec", lambda name: None if name == package else find_spec(name))
    write_params(in_tmp, runtime={"report_to": package})
    with pytest.raises(UserError, match=f"runtime.report_to: {package} is not installed; .*'.\\[{package}\\]'"):
        main()
    assert extras[package] == [package]
    assert not (in_tmp / "data").exists()


def test_a_log_that_needs_no_package_of_its_own_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    check_logging("dvclive")
    check_logging("none")
    monkeypatch.setattr(config, "find_spec", find_spec)
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    sys.modules["wandb"].__spec__ = ModuleSpec("wandb", None)
    check_logging("wandb")


def test_the_output_is_the_same_for_all_valid_parameters(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for beta in (0.1, 0.7):
        write_params(in_tmp, beta=beta, grid={"beta": [beta]})
        main()
        assert f"recipe sigmoid-{beta}-8, 3 cells" in capsys.readouterr().out
        outputs.append((in_tmp / "data/params-checked.txt").read_bytes())
    assert outputs == [b"params.yaml was valid\n"] * 2
