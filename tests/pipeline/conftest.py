"""A tiny repository, and one in which its sweep has run."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub import serve_hub
from pipeline.workspace import COPIED, REVISION, ROOT, Workspace, shrink
from tiny import make_tiny_model


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """The repository with tiny inputs, committed; nothing has run in it."""
    root = tmp_path_factory.mktemp("pipeline")
    folder, packages = root / "work", root / "packages"
    packages.mkdir()
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, folder / name)
    shrink(folder, packages)
    with serve_hub({("tests/tiny", REVISION): make_tiny_model(root / "tiny")}) as endpoint:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(root / "hub"),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(packages),
            "OMP_NUM_THREADS": "1",
            "GIT_CONFIG_COUNT": "2",
            "GIT_CONFIG_KEY_0": "user.name",
            "GIT_CONFIG_VALUE_0": "tests",
            "GIT_CONFIG_KEY_1": "user.email",
            "GIT_CONFIG_VALUE_1": "tests@prefscan.invalid",
        }
        environment.pop("PYTHONPATH", None)
        workspace = Workspace(folder, environment)
        workspace.git("init", "--quiet", "--initial-branch", "main")
        compose = "from dvc.utils.hydra import compose_and_dump; import os; "
        compose += "compose_and_dump('params.yaml', os.path.abspath('conf'), None, 'config', '', [])"
        workspace.run(sys.executable, "-c", compose)
        workspace.commit("Start")
        yield workspace


@pytest.fixture(scope="session")
def sweep(fresh: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace in which `dvc repro` has run the sweep and the result is committed. Do not change it: copy it."""
    workspace = fresh.copy(tmp_path_factory.mktemp("sweep") / "work")
    workspace.dvc("repro")
    workspace.commit("Run the sweep")
    return workspace
