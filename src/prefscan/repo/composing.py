"""What conf/ is composed with, by DVC through hydra_plugins/grid.py and by `compose`: the one parser of numbers."""

from typing import Any

from omegaconf import OmegaConf, _utils

from prefscan.common.numbers import axis, construct_number


def teach_omegaconf() -> None:
    """Let conf/ have `${axis:…}`, and its files decimal numbers alone; called again, it changes nothing."""
    OmegaConf.register_new_resolver("axis", lambda *values: OmegaConf.create(axis(*values)), replace=True)
    given = _utils.get_yaml_loader
    if given.__name__ == "decimal_loader":
        return

    def decimal_loader() -> Any:
        loader = given()
        for kind in ("int", "float"):
            loader.add_constructor(f"tag:yaml.org,2002:{kind}", construct_number)
        return loader

    _utils.get_yaml_loader = decimal_loader
