"""One cell in several processes: `accelerate launch` starts them, and they see the data that one process would see.

`train.gradient_accumulation_steps` micro-batches make an update, whatever the number of processes. They are dealt round
robin, each whole, so that a loss which depends on its micro-batch, as kto_pair's does, stays what it is. The result
differs by rounding alone. With dropout on, each number of processes has random masks of its own. DDP is tested on CPUs
with gloo, both layouts under FSDP2's hooks; **NCCL, FSDP on GPUs and DeepSpeed are not yet run.**
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import broadcast_object_list, reduce
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.utils.data import BatchSampler, Sampler

from prefscan.common.config import Accelerate
from prefscan.common.errors import UserError
from prefscan.common.io import write_json

T = TypeVar("T")


def launch(configuration: Accelerate, module: str, *arguments: str) -> None:
    """Run a module of this package under `accelerate launch`; exits with status 1 where one of its processes fails.

    SIGTERM goes on to the processes, which are killed where they have not ended 30 seconds later. Raises UserError for
    a configuration that accelerate refuses, and without DeepSpeed where it asks for it.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "accelerate.json"
        write_json(path, configuration.model_dump())
        try:
            load_config_from_file(str(path))
        except (TypeError, ValueError) as error:
            raise UserError(f"train.accelerate: accelerate refuses it: {' '.join(str(error).split())}") from None
        # train.dtype is the precision, and transformers would take the configuration's first.
        command = ["--config_file", str(path), "--mixed_precision", "no", "--module", module, *arguments]
        try:
            launch_command(launch_command_parser().parse_args(command))
        except ImportError as error:  # DeepSpeed is no dependency
            raise UserError(f"train.accelerate: {error}") from None
        except (ChildFailedError, SignalException):
            sys.exit(1)  # the process that failed has said why


def world() -> PartialState:
    """The processes of this cell, of which this is one; alone where none was launched."""
    return PartialState(cpu=not torch.cuda.is_available())


def from_main(compute: Callable[[], T]) -> T:
    """The result of `compute` in the main process, in every process."""
    box: list[Any] = [compute() if world().is_main_process else None]
    result: T = broadcast_object_list(box)[0]
    return result


def in_any(*flags: bool) -> list[bool]:
    """Which flags are set in at least one process; all processes have to ask."""
    counts: torch.Tensor = reduce(torch.tensor(flags, dtype=torch.int32, device=world().device), "sum")
    return (counts > 0).tolist()


class WholeRounds(Sampler[list[int]]):
    """The micro-batches of an epoch as one process has them, and empty ones up to a multiple of the processes.

    accelerate deals them round robin. Left to itself it would fill up the epoch's last round with pairs from its first.
    """

    def __init__(self, sampler: Sampler[int], size: int) -> None:
        self.sampler = sampler  # accelerate puts its seeded one in its place
        self.size = size

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(BatchSampler(self.sampler, self.size, drop_last=False))
        return iter(batches + [[]] * (len(self) - len(batches)))

    def __len__(self) -> int:
        processes = world().num_processes
        batches = -(-len(self.sampler) // self.size)  # type: ignore[arg-type]
        return -(-batches // processes) * processes
