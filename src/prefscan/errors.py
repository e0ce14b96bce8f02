"""The one exception whose text is meant for the user, and how a stage ends with it."""

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake or a fault outside prefscan; its text names the key or file, the value found and the way out."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's `main`; end with one sentence on standard error and exit status 1 where the user can mend it."""
    try:
        main()
    except UserError as error:
        sys.exit(f"prefscan: {error}")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            where = f" at {error.filename}" if error.filename else ""
            sys.exit(f"prefscan: cannot write{where}: {error.strerror}; make room or access and run `dvc repro` again")
        raise
