import errno
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefscan.common.errors import UserError, run
from prefscan.common.io import new_folder, write_json


def raise_(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def message_of(main: Callable[[], None], stage: str = "prepare") -> str:
    """What the interpreter prints on standard error as it ends with status 1."""
    with pytest.raises(SystemExit) as caught:
        run(stage, main)
    assert isinstance(caught.value.code, str)
    return caught.value.code


def test_a_stage_that_ends_well_runs_once() -> None:
    runs: list[int] = []
    run("prepare", lambda: runs.append(1))
    assert runs == [1]


def test_a_users_mistake_ends_the_stage_with_its_text() -> None:
    assert message_of(raise_(UserError("beta: 0 is refused"))) == "prefscan: beta: 0 is refused"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize(("filename", "where"), [(None, ""), ("data/pairs", " at data/pairs")])
def test_what_cannot_be_written_ends_the_stage_with_one_sentence(code: int, filename: Any, where: str) -> None:
    text = message_of(raise_(OSError(code, "the system's reason", filename)))
    assert text.startswith(f"prefscan: cannot write{where}: ")
    assert text.endswith("; make room or access and run `dvc repro` again")


@pytest.mark.parametrize(
    "error",
    [ValueError("a bug"), OSError("no number"), FileNotFoundError(errno.ENOENT, "missing"), KeyboardInterrupt()],
)
def test_every_other_error_keeps_its_traceback(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        run("prepare", raise_(error))
    assert caught.value is error


def save_tokenizer(folder: Path, model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"token {i} that makes the file large" for i in range(2000)])
    tokenizer.save_pretrained(folder)


def save_model(folder: Path, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder)


@pytest.mark.parametrize(
    "save",
    [
        lambda folder, model: write_json(folder / "rows.json", ["row"] * 20_000),
        lambda folder, model: shutil.copyfile(model / "model.safetensors", folder / "model.safetensors"),
        save_tokenizer,
        save_model,
    ],
)
def test_a_full_disk_ends_the_stage_with_one_sentence_and_leaves_nothing(
    save: Callable[[Path, Path], None], small_disk: Path, tiny_model: Path
) -> None:
    assert (tiny_model / "model.safetensors").stat().st_size > 64 * 1024

    def main() -> None:
        with new_folder(small_disk / "base") as folder:
            save(folder, tiny_model)

    text = message_of(main)
    assert text.startswith("prefscan: cannot write")
    assert text.endswith("; make room or access and run `dvc repro` again")
    assert "\n" not in text
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize(
    ("stage", "way_out"),
    [
        (
            "train",
            r"set runtime\.gradient_checkpointing: true, .* or lower train\.per_device_train_batch_size and raise "
            r"train\.gradient_accumul",
        ),
        (
            "reference",
            r"lower train\.per_device_train_batch_size and raise train\.gradient_accumulation_steps as much, by which "
            r"every cell trains a",
        ),
        ("mtbench", r"lower judge\.batch_size, or choose a smaller judge$"),
        ("merge", r"this stage needs a GPU with more$"),
    ],
)
def test_a_full_gpu_names_the_keys_that_need_less(stage: str, way_out: str) -> None:
    def main() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 23.5 GiB.")

    assert re.match(f"prefscan: CUDA out of memory; {way_out}", message_of(main, stage))


def test_a_stage_starts_without_walking_what_it_imports() -> None:
    code = """
import gc
import prefscan.stages.prepare
from prefscan.common.errors import run
walks = sum(generation["collections"] for generation in gc.get_stats())
run("prepare", lambda: print(walks, gc.get_freeze_count()))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    walks, frozen = map(int, done.stdout.split())
    assert walks < 50  # hundreds with Python's own threshold
    assert frozen > 100_000
