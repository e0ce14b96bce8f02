"""models/base is plain weights: an adapter and a quantised checkpoint are refused at fetch."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefscan.common.config import HubSource, Model
from prefscan.common.errors import UserError
from prefscan.data import sources
from prefscan.models.loading import load_model
from tiny import random_adapter

COMMIT = "0" * 40


@pytest.fixture
def fetch(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`fetch_model` from a repository that is a changed copy of the tiny model."""

    def fetch(change: Any) -> Path:
        repo = tmp_path / "repo"
        shutil.copytree(tiny_model, repo)
        change(repo)

        def snapshot(source: Any, kind: str, patterns: list[str], folder: Path) -> None:
            for file in sources.matching_files(repo, patterns):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(repo / file, folder / file)

        monkeypatch.setattr(sources, "hub_snapshot", snapshot)
        source = HubSource(kind="hub", repo="someone/chat", revision=COMMIT)
        model = Model(name="Chat", source=source, pad_token=None, padding_side="left", bos="template")
        sources.fetch_model(model, tmp_path / "base")
        return tmp_path / "base"

    return fetch


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def adapter_alone(repo: Path) -> None:
    random_adapter(load_model(repo, "fp32")).save_pretrained(repo)
    (repo / "model.safetensors").unlink()


def adapter_beside_its_base(repo: Path) -> None:
    random_adapter(load_model(repo, "fp32")).save_pretrained(repo)


def adapter_without_its_config(repo: Path) -> None:
    adapter_alone(repo)
    (repo / "adapter_config.json").unlink()


def eight_bit(repo: Path) -> None:
    weights = load_file(repo / "model.safetensors")
    save_file({name: weight.to(torch.float8_e4m3fn) for name, weight in weights.items()}, repo / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (adapter_alone, "holds an adapter (adapter_config.json); name a repository of whole weights"),
        (adapter_beside_its_base, "holds an adapter (adapter_config.json); name a repository of whole weights"),
        (adapter_without_its_config, "holds an adapter (base_model.model.model.layers.0."),
        (
            lambda repo: edit_json(repo / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
            "is already quantised (quantization_config in config.json); name the repository that it was made from",
        ),
        (
            lambda repo: edit_json(repo / "config.json", text_config={"quantization_config": {"bits": 4}}),
            "is already quantised (quantization_config in config.json)",
        ),
        (
            lambda repo: edit_json(repo / "config.json", quantization={"group_size": 64, "bits": 4}),  # MLX's
            "is already quantised (quantization in config.json)",
        ),
        (eight_bit, "is already quantised (lm_head.weight is F8_E4M3)"),
    ],
)
def test_what_is_no_plain_model_is_refused_at_fetch(change: Any, message: str, fetch: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        fetch(change)
    assert str(caught.value).startswith(f"model.source: someone/chat {message}")
    assert not (tmp_path / "base").exists()


def test_a_plain_model_in_half_precision_is_fetched(fetch: Any) -> None:
    def halve(repo: Path) -> None:
        weights = load_file(repo / "model.safetensors")
        save_file({name: weight.bfloat16() for name, weight in weights.items()}, repo / "model.safetensors")

    assert load_model(fetch(halve), "fp32").lm_head.weight.dtype == torch.float32


# Tokenizers ---------------------------------------------------------------------------------------


def as_slow_files(repo: Path) -> None:
    """GPT-2's files: a vocabulary and merges in place of tokenizer.json."""
    vocabulary = json.loads((repo / "tokenizer.json").read_text())["model"]["vocab"]
    (repo / "tokenizer.json").unlink()
    (repo / "vocab.json").write_text(json.dumps(vocabulary))
    (repo / "merges.txt").write_text("#version: 0.2\n")
    edit_json(repo / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")


def test_merges_are_fetched(fetch: Any) -> None:
    base = fetch(as_slow_files)
    from prefscan.models.loading import load_tokenizer

    assert load_tokenizer(base).decode(load_tokenizer(base)("2 + 2?")["input_ids"]) == "2 + 2?"


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        (["merges.txt"], r"no tokenizer that loads \("),
        (["merges.txt", "vocab.json"], "the tokenizer gives a text no tok"),
    ],
)
def test_a_tokenizer_that_lacks_a_file_is_not_said_to_need_code(missing: list[str], reason: str, fetch: Any) -> None:
    def without(repo: Path) -> None:
        as_slow_files(repo)
        for name in missing:
            (repo / name).unlink()

    with pytest.raises(UserError, match=f"^model\\.source: {reason}") as caught:
        fetch(without)
    assert "code of its own" not in str(caught.value)


def test_a_generation_configuration_that_contradicts_itself_is_refused(fetch: Any) -> None:
    with pytest.raises(
        UserError, match=r"^model\.source: generation_config\.json contradicts itself \(.*num_return_seq"
    ):
        fetch(lambda repo: edit_json(repo / "generation_config.json", num_return_sequences=3))
