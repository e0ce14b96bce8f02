"""Parameters of the groups in conf/, for benchmarks that measure others than those of params.yaml."""

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[1] / "conf"


def group(name: str, choice: str) -> Any:
    """The section `name` as `-S NAME=CHOICE` composes it."""
    with initialize_config_dir(str(CONF), version_base=None):
        return OmegaConf.to_container(compose("config", overrides=[f"{name}={choice}"])[name])
