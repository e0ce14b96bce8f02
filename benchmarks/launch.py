"""What the launcher itself costs, on cells that only sleep.

    PYTHONPATH=src python benchmarks/launch.py
    PYTHONPATH=src python benchmarks/launch.py --cells 12 --seconds 20 --workers 1,2,4

The pipeline has this repository's stages, in real DVC and with real files, but each stage sleeps and writes a line; a
cell's four stages sleep `--seconds` together. Efficiency is cells × seconds / (workers × the time that the cells took),
from the end of what they share to the end of the last; overhead is what a chain takes beyond its sleep, the median.
Start-up is Ray, the list of stale stages and the shared chains before, and the restoring of all after.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from prefscan.common.config import load
from prefscan.common.errors import UserError, run
from prefscan.common.io import write_json
from prefscan.common.paths import SPLITS
from prefscan.launch.schedule import FETCHED

ROOT = Path(__file__).parents[1]
SHARE = {"train": 0.7, "merge": 0.1, "answer": 0.1, "mtbench": 0.1}  # of a cell's seconds


def sleeping_stages(seconds: float, judge_against: str) -> dict[str, Any]:
    """dvc.yaml's stages by the names and dependencies of the real ones."""

    def stage(out: str, deps: list[str], sleep: float = 0, params: tuple[str, ...] = ()) -> dict[str, Any]:
        command = (
            f"sleep {sleep:g} && mkdir -p {Path(out).parent} && cat {' '.join(deps)} > {out} && echo {out} >> {out}"
        )
        return {"cmd": command, "deps": deps, "outs": [out]} | ({"params": list(params)} if params else {})

    cells = {"matrix": {name: f"${{grid.{name}}}" for name in ("loss", "beta", "steps")}}
    asked = ["data/questions.txt", "conf/start.txt"]
    inputs = ["model", "pairs", "questions"]
    judged = [f"data/answers/{judge_against}.txt"]
    judge = stage("metrics/judge.txt", ["data/model.txt", "data/questions.txt"])
    references = [f"data/reference/{split}.txt" for split in SPLITS]
    nap = {name: share * seconds for name, share in SHARE.items()}
    return {
        "check": stage("data/checked.txt", ["conf/start.txt"], params=("grid",)),
        "fetch": {"foreach": inputs, "do": stage("data/${item}.txt", ["data/checked.txt"])},
        "prepare": stage("data/prepared.txt", ["data/model.txt", "data/pairs.txt"]),
        "reference": {"foreach": list(SPLITS), "do": stage("data/reference/${item}.txt", ["data/prepared.txt"])},
        "train": cells | stage("models/adapters/${key}.txt", references, nap["train"]),
        "merge": cells | stage("models/merged/${key}.txt", ["models/adapters/${key}.txt"], nap["merge"]),
        "answer-base": stage("data/answers/base.txt", ["data/model.txt", *asked]),
        "answer": cells | stage("data/answers/${key}.txt", ["models/merged/${key}.txt", *asked], nap["answer"]),
        "mtbench-base": stage("data/judged/base.txt", ["data/answers/base.txt"]),
        "mtbench": cells | stage("data/judged/${key}.txt", ["data/answers/${key}.txt", *judged], nap["mtbench"]),
        "judge-check": judge | {"outs": [], "metrics": [{"metrics/judge.txt": {"cache": False}}]},
        "report": {
            "cmd": "cat data/judged/* metrics/judge.txt > report.txt",
            "deps": ["data/judged", "metrics/judge.txt"],
            "outs": ["report.txt"],
        },
    }


def make_sleeping(folder: Path, count: int, seconds: float, **launch: Any) -> Path:
    """A committed repository with this one's parameters, but for those of `launch`, and `count` cells that sleep."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    betas = [round(0.1 + i / 100, 2) for i in range(count)]
    grid = {"loss": ["sigmoid"], "beta": betas, "steps": [24]}
    params |= {"loss": "sigmoid", "beta": betas[0], "steps": 24, "grid": grid}
    params["launch"] |= launch
    for name in (".dvc", "conf"):
        (folder / name).mkdir(parents=True)
    (folder / "conf/start.txt").write_text("start\n")
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    stages = {"stages": sleeping_stages(seconds, params["judge"]["against"])}
    (folder / "dvc.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
    shutil.copy(ROOT / ".dvcignore", folder)
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc")
    shutil.copy(ROOT / ".dvc/.gitignore", folder / ".dvc")
    (folder / ".gitignore").write_text("/data/\n/models/\n/report.txt\n/.prefscan/\n/runs/\n")
    author = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost"]
    for arguments in (["init", "--quiet"], ["add", "--all"], [*author, "commit", "--quiet", "--message", "Start"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)  # noqa: S607
    return folder


def measure(workers: int, cells: int, seconds: float) -> dict[str, float]:
    with TemporaryDirectory(prefix="prefscan-") as temporary:
        folder = make_sleeping(Path(temporary, "work"), cells, seconds, cells=workers, num_cpus=1)
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "prefscan", "launch"], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        ends, taken = {}, []
        for line in process.stdout:
            if found := re.match(r"(\S+): done in (\d+) s", line):
                ends[found[1]] = time.perf_counter() - started
                if found[1].startswith("sigmoid-"):
                    taken.append(float(found[2]))
        whole = time.perf_counter() - started
        if process.wait() or len(taken) != cells:
            raise UserError(f"the launch ended with {process.returncode} and {len(taken)} of {cells} cells")
    # The judge check runs beside the cells.
    waited_for = ("check", *FETCHED, "prepare", *(f"reference-{split}" for split in SPLITS), "base")
    shared = max(ends[name] for name in waited_for)
    together = round(max(ends.values()) - shared, 1)
    return {
        "workers": workers,
        "cells_seconds": together,
        "efficiency": round(cells * seconds / (workers * together), 3),
        "overhead_a_cell": round(median(taken) - seconds, 1),
        "before_the_cells": round(shared, 1),
        "after_the_cells": round(whole - max(ends.values()), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The launcher's own cost; the module's text says how.")
    parser.add_argument("--cells", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=30, help="that a cell sleeps")
    parser.add_argument("--workers", default="1,2,4", help="numbers of cells at once")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    load(ROOT / "params.yaml")
    results = []
    for workers in map(int, options.workers.split(",")):
        results.append(measure(workers, options.cells, options.seconds))
        print(json.dumps(results[-1]), flush=True)
    if options.json:
        write_json(options.json, {"cells": options.cells, "seconds": options.seconds, "results": results})


if __name__ == "__main__":
    run("launch", main)
