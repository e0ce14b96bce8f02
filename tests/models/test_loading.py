import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prefscan.common.errors import UserError
from prefscan.common.io import write_json
from prefscan.models.loading import (
    DTYPES,
    MANIFEST,
    clean_adapter_config,
    load_cell,
    load_model,
    load_tokenizer,
    manifest,
    set_evaluation,
)
from tiny import make_tiny_model, random_adapter

BASE = Path("models/base")
ADAPTER = Path("models/adapters/cell")
CELL = Path("models/merged/cell")
IDS = torch.tensor([[5, 60, 7, 120, 33]])


@pytest.fixture
def cell(in_tmp: Path, tiny_model: Path) -> Any:
    """The working directory with a base, an adapter and a cell that is a manifest of the two; the policy itself."""
    shutil.copytree(tiny_model, BASE)
    policy = random_adapter(load_model(BASE, "fp32"))
    policy.save_pretrained(ADAPTER)
    CELL.mkdir(parents=True)
    write_json(CELL / MANIFEST, manifest(BASE, ADAPTER))
    return policy


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_loads_in_the_dtype_and_to_the_place_asked_for(tiny_model: Path, dtype: str) -> None:
    assert load_model(tiny_model, dtype, place=torch.device("meta")).device.type == "meta"
    assert {parameter.dtype for parameter in load_model(tiny_model, dtype).parameters()} == {DTYPES[dtype]}


@pytest.mark.parametrize("content", [None, "pytorch_model.bin"])
def test_a_folder_without_safetensors_is_refused(tmp_path: Path, tiny_model: Path, content: str | None) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    if content:  # a pickle, which could run code
        torch.save({}, folder / content)
    with pytest.raises(UserError) as error:
        load_model(folder, "fp32")
    assert str(error.value) == (
        f"{folder} has no safetensors file; run `dvc repro` to make the folder, or `dvc pull` to fetch it"
    )


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_a_4_bit_base_loads_as_asked(wide_model: Path, quantization: str, double: bool) -> None:
    model = load_model(wide_model, "bf16", quantization, double)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, Linear4bit)
    assert (layer.weight.quant_type, layer.weight.compress_statistics) == (quantization, double)
    assert layer.compute_dtype == torch.bfloat16
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_evaluation_leaves_4_bit_layers_in_training_mode(wide_model: Path) -> None:
    for model in (load_model(wide_model, "fp32"), load_model(wide_model, "fp32", "nf4")):
        for policy in (model, random_adapter(model)):
            policy.train()
            set_evaluation(policy)
            assert all(module.training == isinstance(module, Linear4bit) for module in policy.modules())


def test_a_model_with_code_of_its_own_runs_none_of_it(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert type(load_model(folder, "fp32")).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_with_code_of_its_own_is_refused_and_nobody_is_asked(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a person at the terminal might answer
    with pytest.raises(UserError, match=r"base has no tokenizer \(.*contains custom code"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_loads_as_saved(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    assert tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer("Straße 7")["input_ids"]) == "Straße 7"


def test_a_tokenizer_without_chat_template_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "base", chat_template=None)
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    assert str(error.value) == (
        f"{folder}: the tokenizer has no chat template, and prefscan never guesses one; use a chat model"
    )


def test_a_tokenizer_without_pad_token_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no pad token; set model\.pad_token, for instance to its end token$"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert re.fullmatch(rf"{re.escape(str(tmp_path))} has no tokenizer \(.+\); fetch the model again", str(error.value))


def test_a_missing_folder_is_not_looked_for_on_the_hub(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`models/base` has the form of a repository's name, and anyone could own that one."""
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: asked.append(args[0]) or [])
    for load, options in ((load_tokenizer, {}), (load_model, {"dtype": "fp32"}), (load_cell, {"dtype": "fp32"})):
        with pytest.raises(UserError, match=r"^models/base .*run `dvc repro` to make"):
            load(BASE, **options)
    assert asked == []


def test_a_cell_with_a_manifest_is_base_plus_adapter(cell: Any) -> None:
    with torch.no_grad():
        expected = cell(IDS).logits
        with cell.disable_adapter():
            assert (cell(IDS).logits - expected).abs().max() > 0.1
        torch.testing.assert_close(load_cell(CELL, "fp32")(IDS).logits, expected, atol=1e-5, rtol=0)


def test_a_cell_without_a_manifest_is_a_model(cell: Any, tiny_model: Path) -> None:
    merged = cell.merge_and_unload()
    shutil.rmtree(CELL)
    merged.save_pretrained(CELL)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(CELL)(IDS).logits
        torch.testing.assert_close(load_cell(CELL, "fp32")(IDS).logits, expected)


def test_a_manifest_names_folders_and_the_hash_of_every_weight_file(cell: Any) -> None:
    wanted = json.loads((CELL / MANIFEST).read_text())
    assert {name: entry["folder"] for name, entry in wanted.items()} == {
        "base": "models/base",
        "adapter": "models/adapters/cell",
    }
    assert {name: list(entry["sha256"]) for name, entry in wanted.items()} == {
        "base": ["model.safetensors"],
        "adapter": ["adapter_model.safetensors"],
    }


@pytest.mark.parametrize("path", [BASE / "model.safetensors", ADAPTER / "adapter_model.safetensors"])
@pytest.mark.parametrize("change", ["value", "gone"])
def test_a_base_or_adapter_that_changed_since_the_merge_is_refused(cell: Any, path: Path, change: str) -> None:
    if change == "gone":
        path.unlink()
    else:
        weights = load_file(path)
        first = next(iter(weights))
        weights[first] = weights[first] * 1.001
        save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        load_cell(CELL, "fp32")
    assert str(error.value) == (
        f"{CELL}/manifest.json: {BASE} or {ADAPTER} has changed since the merge; run `dvc repro` again"
    )


def test_a_clean_adapter_config_is_the_same_bytes_wherever_it_was_made(tmp_path: Path, tiny_model: Path) -> None:
    for name in ("here", "there"):
        shutil.copytree(tiny_model, tmp_path / name / "base")
        random_adapter(load_model(tmp_path / name / "base", "fp32")).save_pretrained(tmp_path / name / "adapter")
    configs = [tmp_path / name / "adapter" / "adapter_config.json" for name in ("here", "there")]
    assert all(str(tmp_path) in config.read_text() for config in configs)
    for config in configs:
        clean_adapter_config(config.parent)
    here, there = (config.read_bytes() for config in configs)
    assert here == there
    assert json.loads(here)["base_model_name_or_path"] == "models/base"
    assert json.loads(here)["r"] == 4
