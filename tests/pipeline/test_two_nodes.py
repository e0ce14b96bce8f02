"""The benchmark of two nodes against `dvc repro`, on the tiny sweep."""

import sys
from pathlib import Path

import pytest
import yaml

import two_nodes
from pipeline.workspace import Workspace
from prefscan.common.io import read_json


@pytest.mark.slow
@pytest.mark.timeout(3600)  # two sweeps, one after the other
def test_two_nodes_make_what_dvc_repro_makes(fresh: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = fresh.copy(tmp_path / "origin")
    (origin.folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0"}))
    origin.commit("Have a lock")
    for name, value in fresh.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(two_nodes, "ROOT", origin.folder)
    result = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["two_nodes", str(tmp_path / "clones"), "--json", str(result)])
    with pytest.raises(SystemExit) as ended:
        two_nodes.main()
    assert (ended.value.code, read_json(result)["differing"]) == (False, [])
    made = two_nodes.hashes(tmp_path / "clones/nodes")
    assert {"models/adapters/sigmoid-0.1-3", "metrics/summary.json", "reports/charts"} <= set(made)
    # A difference is one: of another base's bytes.
    lock = tmp_path / "clones/nodes/dvc.lock"
    lock.write_text(lock.read_text().replace(made["models/base"], "0" * 32))
    assert two_nodes.hashes(tmp_path / "clones/nodes")["models/base"] != made["models/base"]
