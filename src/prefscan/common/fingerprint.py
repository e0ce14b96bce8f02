"""The name under which unfinished work is kept: a digest of everything that its result depends on.

dvc.yaml says what that is, stage by stage: code, inputs and parameters. So one list serves DVC and this module.
"""

import hashlib
import json
import platform
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from prefscan.common.io import read_text, sha256
from prefscan.common.libraries import LIBRARIES

PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU part")


def stage_fingerprint(stage: str, key: str) -> str:
    """SHA-256 of a stage's dependencies and parameters in dvc.yaml for one cell, of the libraries and the machine.

    `key` is a cell's, LOSS-BETA-STEPS, the item of a `foreach`, or `base` for a stage that is neither. Raises KeyError
    for a stage that dvc.yaml has not, and for a parameter that params.yaml has not.
    """
    declared = yaml.load(read_text(Path("dvc.yaml")), yaml.CSafeLoader)["stages"][stage]
    item: Any = {"loss": key.split("-")[0]}
    if "foreach" in declared:
        declared, item = declared["do"], key
    values = yaml.load(read_text(Path("params.yaml")), yaml.CSafeLoader)
    known = values | {"key": key, "item": item}
    parameters = [resolve(name, known) for name in declared.get("params", ())]
    paths = [Path(resolve(path, known)) for path in declared["deps"]]
    everything = {
        "cell": key,
        "parameters": {name: look_up(name, values) for name in parameters},
        "inputs": {str(path): sha256(path) for path in files(paths)},
        "libraries": {name: version(name) for name in LIBRARIES},
        # Another processor, or another number of threads, may add in another order.
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), *processor()],
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def resolve(text: str, known: dict[str, Any]) -> str:
    """The text with each `${name}` replaced by its value, as DVC does."""
    return re.sub(r"\$\{([\w.]+)\}", lambda match: str(look_up(match[1], known)), text)


def look_up(name: str, values: dict[str, Any]) -> Any:
    found: Any = values
    for part in name.split("."):
        found = found[part]
    return found


def processor() -> list[str]:
    """What the system calls its first processor: maker, family and model, where /proc/cpuinfo has them."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    return [line for line in first if line.split(":")[0].strip() in PROCESSOR]


def files(paths: Iterable[Path]) -> list[Path]:
    """The paths that are files, and the files in those that are folders, without compiled code."""
    found = [inside for path in paths for inside in (path.rglob("*") if path.is_dir() else [path])]
    return [path for path in found if path.is_file() and path.suffix != ".pyc"]
