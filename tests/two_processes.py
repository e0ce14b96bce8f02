"""What tests run in the two processes of one launch, since starting them takes longer than what they do.

The process that launches them does not import what they do: that would take seconds more.

python -m two_processes train=FOLDER… shard=FOLDER…
"""

import os
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch.distributed import is_torchelastic_launched

from prefscan.common.config import Accelerate
from prefscan.training.multi_gpu import launch, world
from tiny import random_adapter, random_pairs

CONFIGURATIONS = Path(__file__).parents[1] / "conf/train/accelerate"
# As `accelerate config` may write it; the cells are of train.dtype fp32.
DDP = yaml.safe_load((CONFIGURATIONS / "ddp.yaml").read_text()) | {"mixed_precision": "bf16"}


def run_train(folder: str) -> None:
    """The train stage for the recipe of the folder."""
    from prefscan.stages import train

    os.chdir(folder)
    train.main(train.load().recipe.key)


def run_save(folder: str) -> None:
    """The same with a checkpoint after every update."""
    from prefscan.training import checkpoints

    checkpoints.FIRST = checkpoints.WAIT = 0
    run_train(folder)


def run_shard(folder: str) -> None:
    """Each layout's log-probabilities and gradients on the folder's model, sharded, into LAYOUT-PRECISION.pt.

    accelerate shards it as the shipped configuration says, through the function that its `prepare` calls on GPUs.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    from prefscan.models.loading import load_model
    from prefscan.training.trainer import keep_whole_nats

    main = world().is_main_process  # and the processes are connected
    shipped = yaml.safe_load((CONFIGURATIONS / "fsdp.yaml").read_text())["fsdp_config"]
    options = {name.removeprefix("fsdp_"): value for name, value in shipped.items() if name != "fsdp_version"}
    for layout, precision in product(("packed", "padded"), ("no", "bf16")):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=shipped["fsdp_version"], **options)
        if precision != "no":
            plugin.set_mixed_precision(precision)
            keep_whole_nats(plugin)
        accelerator: Any = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision=precision,
            device=world().device,
            is_main_process=main,
            torch_device_mesh=None,
        )
        policy = fsdp2_prepare_model(accelerator, random_adapter(load_model(Path(folder), "fp32")))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
            logps, gradients = logps_and_gradients(policy, layout)
        whole = {name: gradient.full_tensor() for name, gradient in gradients.items()}
        if main:
            torch.save((logps, whole), Path(folder) / f"{layout}-{precision}.pt")


def logps_and_gradients(policy: Any, layout: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """As PairTrainer computes them."""
    from trl.models.utils import _ForwardRedirection

    from prefscan.logprobs.layouts import load_layout
    from prefscan.training.trainer import PairTrainer

    module = load_layout(layout)
    trainer: Any = SimpleNamespace(accelerator=Accelerator(cpu=True), redirect=_ForwardRedirection(), layout=module)
    batch = module.collate(random_pairs([(5, 7, 3), (9, 2, 6)]), 0)
    chosen, rejected = PairTrainer.pair_logps(trainer, policy, batch)
    (chosen - 2 * rejected).sum().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
    return torch.stack([chosen, rejected]).detach(), gradients


if __name__ == "__main__":
    if is_torchelastic_launched():
        Accelerator.end_training = lambda self: None  # it would end the connection, which the next one uses
        for argument in sys.argv[1:]:
            name, folder = argument.split("=")
            globals()[f"run_{name}"](folder)
    else:
        launch(Accelerate(**DDP), "two_processes", *sys.argv[1:])
