"""The groups of conf/ as the benchmarks compose them."""

import yaml

from configuration import group
from mtbench_data import ROOT


def test_a_group_is_composed_as_params_yaml_was() -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert group("train", "laptop") == params["train"]
    assert group("judge", "local") == params["judge"]


def test_the_choice_counts() -> None:
    assert group("judge", "gpt4")["name"] == "gpt-4"
    assert group("train", "study")["bnb_4bit_quant_type"] == "fp4"
