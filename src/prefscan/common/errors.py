"""The one exception whose text is meant for the user, and how a command ends with it."""

import errno
import gc
import os
import sys
from collections.abc import Callable

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
SMALLER_BATCH = (
    "lower train.per_device_train_batch_size and raise train.gradient_accumulation_steps as much, by which every cell "
    "trains anew"
)
NEEDS_LESS = {  # stages by what takes less of a GPU's memory
    "train": f"set runtime.gradient_checkpointing: true, which changes no result, or {SMALLER_BATCH}",
    "reference": SMALLER_BATCH,
    "mtbench": "lower judge.batch_size, or choose a smaller judge",
    "judge-check": "lower judge.batch_size, or choose a smaller judge",
}


class UserError(Exception):
    """A mistake or a fault outside prefscan; its text names the key or file, the value found and the way out."""


def run(name: str, command: Callable[[], None]) -> None:
    """Run a command of `prefscan`; end with one sentence and exit status 1 where the user can mend what is wrong."""
    gc.freeze()  # what was imported stays, and is walked neither by the collector nor at the interpreter's end
    try:
        command()
    except UserError as error:
        sys.exit(f"prefscan: {error}")
    except Exception as error:
        # Libraries written in Rust (tokenizers, safetensors) raise errors of their own, with the system's text in them.
        for code in CANNOT_WRITE:
            if getattr(error, "errno", None) == code or f"(os error {code})" in str(error):
                where = f" at {path}" if (path := getattr(error, "filename", None)) else ""
                reason = f"cannot write{where}: {os.strerror(code)}"
                sys.exit(f"prefscan: {reason}; make room or access and run `dvc repro` again")
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which the stages without a model need not import
            way_out = NEEDS_LESS.get(name, "this stage needs a GPU with more")
            sys.exit(f"prefscan: {str(error).partition('. ')[0]}; {way_out}")
        raise
