"""Asking DVC: what is stale, and what parameters overrides would make."""

import re
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from dvc.exceptions import DvcException, ReproductionError
from dvc.repo import Repo
from dvc.repo.graph import get_subgraph_of_nodes
from dvc.stage import Stage
from dvc.utils.serialize import modify_yaml
from dvc_data.hashfile.hash_info import HashInfo

from prefscan.common.config import Params, load
from prefscan.common.errors import UserError
from prefscan.common.io import read_text
from prefscan.repo.config import dvc_command

CELL_STAGES = ("train", "merge", "answer", "mtbench")  # of the matrix, each after the one before
CHOICE = ("loss", "beta", "steps", "grid", "sweep", "launch")  # parameters that choose and place cells and change none


def run_dvc(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(dvc_command(*arguments), capture_output=True, text=True)


def failed(done: subprocess.CompletedProcess[str]) -> UserError:
    return UserError(f"{' '.join(done.args[2:])}: {' '.join(done.stderr.split()[-60:])}")


def dvc(*arguments: str) -> str:
    """Standard output of a DVC command; raises UserError with its last words."""
    done = run_dvc(*arguments)
    if done.returncode:
        raise failed(done)
    return done.stdout


def compose(overrides: list[str], path: Path) -> Params:
    """Write params.yaml as `dvc exp run -S …` would compose it from conf/, and return what it says.

    Raises UserError for an override or a file of conf/ that is refused, and for a loss that check.py refuses.
    """
    from dvc.utils.hydra import compose_and_dump
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from prefscan.training.losses import (
        check_losses,  # torch: seconds, which a launch without overrides and its workers spare
    )

    given = " ".join(overrides)
    refused = DvcException, HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError
    try:
        compose_and_dump(path, str(Path("conf").resolve()), None, "config", "", overrides)
    except refused as error:
        raise UserError(
            f"{given}: {' '.join(str(error).split())}; correct the override, or the file of conf/ that it is about. A "
            """list goes in double quotes, as in 'sweep.beta="0.1, 0.5"'"""
        ) from None
    try:
        params = load(path)
        check_losses(params)
    except UserError as error:
        raise UserError(f"{given}: {str(error).removeprefix(f'{path}: ').removeprefix('params.yaml: ')}") from None
    return params


def stale_stages(*, missing_data_is_stale: bool) -> list[str]:
    """The stages that `dvc repro` may run, by dvc.lock and the files in the workspace: the stale ones and all after.

    Outputs that are in neither workspace nor cache are stale, or else, for a clone without data, as dvc.lock says.
    A stale stage whose data are missing fails even in a dry run (DVC 3.67 hashes them for its run-cache), and DVC then
    names it and the stages after it as not reproduced. A dry run of one whose data are there leaves its outputs as they
    were, and so what reads them is not stale to DVC until it has run. `check` alone, always of one output, passes none
    on.
    """
    options = [] if missing_data_is_stale else ["--allow-missing"]
    done = run_dvc("--wait-for-lock", "repro", "--dry", "--keep-going", *options)
    marks = ("Running stage ", "WARNING: Stage", "ERROR: failed to reproduce")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(marks)]
    stages = {stage for line in lines for stage in re.findall(r"'([^']+)'", line)}
    if done.returncode and not any(line.startswith(marks[-1]) for line in lines):
        raise failed(done)
    if stages <= {"check"}:
        return sorted(stages)
    with Repo() as repo:
        sources = [stage for stage in repo.index.stages if stage.addressing in stages - {"check"}]
        after = get_subgraph_of_nodes(repo.index.graph, sources, downstream=True)
        return sorted(stages.union(stage.addressing for stage in after))


def push_current(stale: Collection[str]) -> None:
    """Send the outputs of all other stages to the default remote: a clone elsewhere has no other way to them.

    Raises UserError with DVC's words where that fails.
    """
    with Repo() as repo:
        current = [stage.addressing for stage in repo.index.stages if stage.addressing not in stale]
    if current:
        dvc("push", "--run-cache", *current)


def lost_stages(stale: Collection[str], *, remote: bool) -> set[str]:
    """The stages whose entries in dvc.lock are of no use in a clone where the stale ones run, or that have none.

    Those that the pipeline no longer has, as of another grid: DVC would parse their entries again for every stage that
    it runs. And the stale ones whose outputs are not in the cache, or not in the default `remote`.
    Where dependencies and command are as in dvc.lock, DVC 3.67 looks for those outputs alone, and runs the stage again
    though its run-cache may have what it made here (`StageCache.restore`). So it is on another machine than the one
    that wrote dvc.lock, since another processor rounds otherwise. Raises UserError for a remote that cannot be asked.
    """
    try:
        with Repo() as repo:
            stages = {stage.addressing for stage in repo.index.stages}
            outputs = {
                stage.addressing: [out.hash_info.value for out in stage.outs if out.use_cache]
                for stage in repo.index.stages
                if stage.addressing in stale and (remote or not stage.outs_cached())
            }
            wanted = {value for values in outputs.values() for value in values if value}
            there = set(repo.cloud.get_remote_odb(command="launch").oids_exist(wanted)) if remote and wanted else set()
    except (DvcException, OSError) as error:
        raise UserError(f"the DVC remote cannot be asked: {' '.join(str(error).split())}") from None
    lock_file = Path("dvc.lock")
    lock = yaml.load(read_text(lock_file), yaml.CSafeLoader) if lock_file.exists() else {}
    lost = {name for name, values in outputs.items() if not values or not there.issuperset(values)}
    return lost | (lock.get("stages", {}).keys() - stages)  # DVC takes one without stages


def forget(lock: Path, stages: Collection[str]) -> None:
    """Take the entries of stages out of a dvc.lock, as if they had never run."""
    with modify_yaml(lock) as entries:
        for name in stages:
            entries.get("stages", {}).pop(name, None)


def forget_here(stages: Collection[str]) -> None:
    """The same in the workspace, beside another DVC that may run."""
    lock = Path("dvc.lock")
    if stages and lock.exists():
        with Repo(_wait_for_lock=True) as repo, repo.lock:
            forget(lock, stages)


def missing_results() -> dict[str, list[str]]:
    """The files that git is to hold (`cache: false`) and the workspace lacks, by stage.

    `dvc repro --dry --allow-missing` takes them for data that are elsewhere.
    """
    with Repo() as repo:
        results = {s.addressing: [out.def_path for out in s.outs if not out.use_cache] for s in repo.index.stages}
    missing = {stage: [path for path in paths if not Path(path).exists()] for stage, paths in results.items()}
    return {stage: paths for stage, paths in missing.items() if paths}


def take_over(stages: Collection[str], *, pull: bool) -> list[str]:
    """Take into the workspace what stale stages have made elsewhere, from the run-cache or, by `pull`, the remote.

    `dvc repro` would do the same, but run what it does not find there, which is left alone here with all after it, and
    write dvc.lock anew after each stage: with 200 cells, seconds a stage. Here it is written once, what is taken before
    an error included. Returns the stages taken; raises UserError with DVC's words where one ends it.
    """
    taken: list[Stage] = []
    left: set[str] = set()

    def take(stage: Stage, upstream: list[Stage], **_: Any) -> None:
        name = stage.addressing
        if name not in stages:
            return
        if not left.isdisjoint(other.addressing for other in upstream):
            left.add(name)
        elif stage.changed(upstream=upstream):
            for out in stage.outs:
                out.hash_info = HashInfo()  # or those of dvc.lock would be looked for alone: lost_stages
            try:
                stage.save_deps()
                stage.repo.stage_cache.restore(stage, pull=pull, dry=not pull)
            except DvcException:
                left.add(name)
            else:
                stage.run(pull=pull)
                taken.append(stage)

    with Repo(_wait_for_lock=True) as repo:
        try:
            repo.reproduce(pull=pull, repro_fn=take)
        except ReproductionError as error:
            raise UserError(f"what has finished cannot be taken over: {error}: {error.__cause__}") from None
        finally:
            if taken:
                with repo.lock:
                    taken[0].dvcfile.dump_stages(taken, update_pipeline=False)
    return [stage.addressing for stage in taken]


def cache_and_remote() -> tuple[Path, dict[str, Any] | None]:
    """The folder of the workspace's DVC cache, and the configuration of its default remote with an absolute URL."""
    with Repo() as repo:
        name = repo.config["core"].get("remote")
        remote = {"name": name, **repo.config["remote"][name]} if name else None
        return Path(repo.cache.legacy.path).resolve(), remote
