"""A tiny repository, and one in which its sweep has run. Made once, by the first of pytest's workers that needs it."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from hub import serve_hub
from pipeline.workspace import COPIED, REVISION, ROOT, Workspace, shrink
from tiny import make_tiny_model


def make_repository(root: Path) -> None:
    """Under root: the tiny model, the packages with pairs and questions, and the repository's files, not yet in git."""
    folder, packages = root / "work", root / "packages"
    packages.mkdir(parents=True)
    make_tiny_model(root / "tiny")
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, folder / name)
    shrink(folder, packages)


def start_history(workspace: Workspace) -> None:
    """A repository of the files, with the parameters that its conf composes."""
    workspace.git("init", "--quiet", "--initial-branch", "main")
    compose = "from dvc.utils.hydra import compose_and_dump; import os; "
    compose += "compose_and_dump('params.yaml', os.path.abspath('conf'), None, 'config', '', [])"
    workspace.run(sys.executable, "-c", compose)
    workspace.commit("Start")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder that the workers of this run share; it is one worker's own where there is only one."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, which `make` fills unless another worker has."""
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}-unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def environment(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """For commands in the tiny repository: its packages, and a hub with its model."""
    made = made_once(shared / "made", make_repository)
    with serve_hub({("tests/tiny", REVISION): made / "tiny"}) as endpoint:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path_factory.mktemp("hub")),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(made / "packages"),
            "OMP_NUM_THREADS": "1",
            "GIT_CONFIG_COUNT": "2",
            "GIT_CONFIG_KEY_0": "user.name",
            "GIT_CONFIG_VALUE_0": "tests",
            "GIT_CONFIG_KEY_1": "user.email",
            "GIT_CONFIG_VALUE_1": "tests@prefscan.invalid",
        }
        environment.pop("PYTHONPATH", None)
        yield environment


@pytest.fixture(scope="session")
def fresh(shared: Path, environment: dict[str, str]) -> Workspace:
    """The repository with tiny inputs, committed; nothing has run in it. Do not change it: copy it."""

    def make(folder: Path) -> None:
        shutil.copytree(shared / "made/work", folder)
        start_history(Workspace(folder, environment))

    return Workspace(made_once(shared / "fresh", make), environment)


@pytest.fixture(scope="session")
def sweep(
    shared: Path, fresh: Workspace, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Workspace:
    """A workspace in which `dvc repro` has run the sweep and the result is committed; another worker has its own.

    Do not change it: copy it.
    """

    def make(folder: Path) -> None:
        workspace = fresh.copy(folder)
        workspace.dvc("repro")
        workspace.commit("Run the sweep")

    made = Workspace(made_once(shared / "sweep", make), environment)
    return made.copy(tmp_path_factory.mktemp("sweep") / "work")
