"""Whether the results that a commit holds are those of its parameters: what dvc.lock recorded, against what is there.

Git takes any params.yaml beside any results. dvc.lock has, of each stage, the parameters it ran with and the hashes of
what it read and wrote; a commit whose files are others shows results of other parameters or code.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml
from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import PipelineStage
from dvc.utils.flatten import flatten
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta
from dvc_data.hashfile.tree import Tree

from prefscan.common.errors import UserError
from prefscan.repo.pipeline import hash_of
from prefscan.repo.workspace import open_dvc, words

SHOWN = 3  # stages, and differences, that a sentence names
LOCK = "dvc.lock"
UNTOLD = {"check"}  # its output is the same for all parameters


@cache
def differences(commit: str) -> dict[str, list[str]]:
    """What is not as dvc.lock recorded it in a commit, in words, and the stages that it makes stale.

    Files that only DVC's cache holds are compared as recorded, where one stage wrote and another read them. Raises
    UserError for a commit without dvc.lock, and for a pipeline that DVC cannot read.
    """
    found: dict[str, list[str]] = {}
    try:
        with open_dvc(commit) as repo:
            if not repo.fs.exists(LOCK):
                raise UserError("has no dvc.lock, which says what parameters its results are of")
            recorded = yaml.load(repo.fs.read_text(LOCK), yaml.CSafeLoader) or {}
            ran = recorded.get("stages", {}).keys()
            pipeline = [stage for stage in repo.index.stages if isinstance(stage, PipelineStage)]
            stages = [stage for stage in pipeline if stage.name not in UNTOLD]
            written = {out.fs_path: out.hash_info.value for stage in stages for out in stage.outs}
            for stage in stages:
                for what in of_stage(stage, repo, written) if stage.name in ran else ["it has not run"]:
                    found.setdefault(what, []).append(stage.name)
    except (DvcException, OSError, yaml.YAMLError) as error:
        raise UserError(f"its pipeline cannot be read ({words(error)})") from None
    return found


def of_stage(stage: PipelineStage, repo: Repo, written: dict[str, str]) -> Iterator[str]:
    if stage.cmd_changed:
        yield "its command is another in dvc.yaml"
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency):
            yield from of_parameters(dep)
        elif (hash_of(repo, dep.fs_path) or hash_of_written(dep.fs_path, written)) not in (None, dep.hash_info.value):
            yield f"{dep.def_path} is another than it read"
    for out in stage.outs:
        if hash_of(repo, out.fs_path) not in (None, out.hash_info.value):
            yield f"{out.def_path} is another than it wrote"


def hash_of_written(path: str, written: dict[str, str]) -> str | None:
    """The hash of a file or folder, by what the stages that write it, or into it, recorded; None where none does."""
    inside = {name.removeprefix(f"{path}/"): value for name, value in written.items() if name.startswith(f"{path}/")}
    if not inside or any(value is None or value.endswith(".dir") for value in inside.values()):
        return written.get(path)
    tree = Tree()
    for name, value in inside.items():
        tree.add(tuple(name.split("/")), Meta(), HashInfo("md5", value))
    tree.digest()
    return str(tree.hash_info.value)


def of_parameters(dep: ParamsDependency) -> Iterator[str]:
    recorded, now = (flatten(values or {}) for values in (dep.hash_info.value, dep.read_params(flatten=True)))
    for name in dict.fromkeys([*recorded, *now]):
        before, after = recorded.get(name), now.get(name)
        if plain(before) != plain(after):
            yield f"{name} is {after} in {dep.def_path} and was {before}"


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def refuse_stale(name: str, commit: str) -> None:
    """Raises UserError, which calls it `name`, for a commit whose results are not those of its parameters and code."""
    try:
        found = differences(commit)
    except UserError as error:
        raise UserError(f"{name}: {error}; run `dvc repro` there and commit dvc.lock, metrics/ and reports/") from None
    if found:
        more = [f"and {len(found) - SHOWN} differences more"] if len(found) > SHOWN else []
        listed = [f"{what} ({shortened(stages)})" for what, stages in list(found.items())[:SHOWN]]
        raise UserError(
            f"{name}: its results are not those of its parameters and code, by its dvc.lock: "
            f"{'; '.join(listed + more)}; run `dvc repro` there and commit dvc.lock, metrics/ and reports/"
        )


def shortened(stages: list[str]) -> str:
    return ", ".join(stages[:SHOWN]) + (f" and {len(stages) - SHOWN} more" if len(stages) > SHOWN else "")
