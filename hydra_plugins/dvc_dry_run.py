"""Lets `dvc exp run --dry` list the stages of an experiment that has not run.

DVC 3.67 runs a dry experiment in an empty clone and looks each stage up in its run-cache, which means hashing the
stage's dependencies; it ends with FileNotFoundError at the first stage whose input another stage would make (DVC issue
9818). A stage whose inputs do not exist cannot be in the run-cache: that is all this says. DVC imports the module when
it composes params.yaml, since it offers Hydra the folder `hydra_plugins` of the repository.
"""

from dvc.stage import Stage, cache

_can_hash = cache._can_hash


def can_hash(stage: Stage) -> bool:
    try:
        return bool(_can_hash(stage))
    except FileNotFoundError:
        return False


cache._can_hash = can_hash
