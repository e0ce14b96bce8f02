"""The key under which unfinished work is kept: a digest of everything that its result depends on."""

import hashlib
import json
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prefscan.common.io import sha256

PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU part")
LIBRARIES = ("accelerate", "bitsandbytes", "datasets", "peft", "torch", "transformers", "trl")


def result_key(parameters: dict[str, Any], inputs: Iterable[Path], code: Sequence[str]) -> str:
    """SHA-256 of parameters, input files, code, libraries and the kind of machine.

    `inputs` are files and folders of files; `code` names modules and packages of prefscan.
    """
    package = Path(__file__).parent
    everything = {
        "parameters": parameters,
        "inputs": {str(path): sha256(path) for path in files(inputs, "*")},
        "code": {str(path.relative_to(package)): sha256(path) for path in files((package / n for n in code), "*.py")},
        "libraries": {name: version(name) for name in LIBRARIES},
        # Another processor, or another number of threads, may add in another order.
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), *processor()],
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def processor() -> list[str]:
    """What the system calls its first processor: maker, family and model, where /proc/cpuinfo has them."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    return [line for line in first if line.split(":")[0].strip() in PROCESSOR]


def files(paths: Iterable[Path], pattern: str) -> list[Path]:
    """The paths that are files, and the files in those that are folders."""
    found = [inside for path in paths for inside in (path.rglob(pattern) if path.is_dir() else [path])]
    return [path for path in found if path.is_file()]
