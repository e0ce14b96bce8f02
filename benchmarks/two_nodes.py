"""The sweep of params.yaml on a Ray cluster of two nodes, and by `dvc repro`: same hashes? And what took how long?

    PYTHONPATH=src python benchmarks/two_nodes.py FOLDER

Each starts in a fresh clone of HEAD, in FOLDER/nodes and FOLDER/repro, which stay there; neither has a dvc.lock, nor
anything in its cache. The nodes are two of `ray.cluster_utils.Cluster`, of one CPU each, both on this machine; what
they make travels by a DVC remote, as between machines. Compared are the hashes of every output in dvc.lock, but for the
files that hold seconds and the report's pages, which show them. Ends with status 1 where a hash differs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from prefscan.common.errors import UserError, run
from prefscan.common.io import write_json

ROOT = Path(__file__).parents[1]
# Files with seconds, and pages that show them.
TIMED = ("metrics/cost/", "reports/report.")


def fresh_clone(folder: Path) -> dict[str, str]:
    """Clones HEAD without its lock; returns the environment for commands in the clone."""
    author = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost"]
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)  # noqa: S607
    for arguments in (["rm", "--quiet", "dvc.lock"], [*author, "commit", "--quiet", "--message", "Start from nothing"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)  # noqa: S607
    # The clone's own code, not the one that is installed.
    return os.environ | {"PYTHONPATH": "src"}


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Seconds of a command in the folder; its output goes to FOLDER.log. Raises UserError where it fails."""
    log = folder.with_suffix(".log")
    started = time.perf_counter()
    with log.open("w") as file:
        done = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=environment, stdout=file, stderr=file)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with {done.returncode}; its output is in {log}")
    return time.perf_counter() - started


def by_repro(folder: Path) -> float:
    environment = fresh_clone(folder)
    return timed(["dvc", "repro"], folder, environment)


def by_nodes(folder: Path) -> float:
    # As `prefscan launch` sets them: a Ray on loopback alone, that reports to nobody.
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    environment = fresh_clone(folder)
    add = [sys.executable, "-m", "dvc", "remote", "add", "--quiet", "--default", "team", str(folder.parent / "remote")]
    subprocess.run(add, cwd=folder, env=environment, check=True)
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"node_ip_address": "127.0.0.1"})
    try:
        cluster.add_node(**node, node_ip_address="127.0.0.1")
        return timed(["prefscan", "launch", "--dirty", "--address", cluster.address], folder, environment)
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


def hashes(folder: Path) -> dict[str, str]:
    """Of every output in dvc.lock but those of `TIMED`, by path."""
    stages: dict[str, Any] = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    outs = (out for stage in stages.values() for out in stage.get("outs", ()))
    return {out["path"]: out["md5"] for out in outs if not out["path"].startswith(TIMED)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Two nodes against `dvc repro`; the module's text says how.")
    parser.add_argument("folder", type=Path, help="of the two clones; must not exist")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True)
    seconds = {}
    for name, sweep in (("nodes", by_nodes), ("repro", by_repro)):
        seconds[name] = round(sweep(folder / name), 1)
        print(f"{name}: {seconds[name]} s", flush=True)
    nodes, repro = hashes(folder / "nodes"), hashes(folder / "repro")
    differing = sorted(path for path in nodes | repro if nodes.get(path) != repro.get(path))
    result = {
        "seconds": seconds,
        "ratio": round(seconds["repro"] / seconds["nodes"], 2),
        "outputs": len(repro),
        "differing": differing,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result)
    sys.exit(bool(differing))


if __name__ == "__main__":
    run("two_nodes", main)
