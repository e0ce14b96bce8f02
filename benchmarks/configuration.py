"""Parameters of the groups in conf/, for benchmarks that measure others than those of params.yaml."""

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from prefscan.repo.composing import teach_omegaconf

CONF = Path(__file__).resolve().parents[1] / "conf"


def composed(*overrides: str) -> DictConfig:
    """What `-S` composes of these overrides."""
    teach_omegaconf()
    with initialize_config_dir(str(CONF), version_base=None):
        params: DictConfig = compose("config", overrides=list(overrides))
    return params


def group(name: str, choice: str) -> Any:
    """The section `name` as `-S NAME=CHOICE` composes it."""
    return OmegaConf.to_container(composed(f"{name}={choice}")[name])
