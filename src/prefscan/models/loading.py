"""Loading models and tokenizers from local folders: safetensors only, no remote code."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from prefscan.common.errors import UserError
from prefscan.common.io import read_json, sha256
from prefscan.models.chat import freeze_date

if TYPE_CHECKING:  # it takes seconds to import, and the prepare stage loads no model
    from transformers import PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MANIFEST = "manifest.json"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises UserError for a folder that holds no tokenizer, or one without chat template or pad token."""
    if not folder.is_dir():  # transformers would take the path for a repository of the hub, and ask for it
        raise UserError(f"{folder} is missing; run `dvc repro` to make it, or `dvc pull` to fetch it")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} has no tokenizer ({' '.join(str(error).split())[:150]}); fetch the model again"
        ) from None
    if not tokenizer.chat_template:
        raise UserError(
            f"{folder}: the tokenizer has no chat template, and prefscan never guesses one; use a chat model"
        )
    if tokenizer.pad_token is None:
        raise UserError(f"{folder}: the tokenizer has no pad token; set model.pad_token, for instance to its end token")
    freeze_date(tokenizer)  # of a judge's template; the fetch stage has settled that of the base
    return tokenizer


def positions(folder: Path) -> int | None:
    """How many tokens the model was made for, by its configuration; None where that says nothing."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} has no configuration that loads ({' '.join(str(error).split())[:150]}); fetch the model again"
        ) from None
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def load_model(
    folder: Path,
    dtype: str,
    quantization: str = "none",
    bnb_4bit_use_double_quant: bool = False,
    place: torch.device | None = None,
) -> "PreTrainedModel":
    """A causal language model in evaluation mode, on this machine's device, or on `place` if it is not quantised.

    Raises UserError for a folder without safetensors.
    """
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no safetensors file; run `dvc repro` to make the folder, or `dvc pull` to fetch it"
        )
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=DTYPES[dtype],
        )
        options["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, use_safetensors=True, **options
    )
    if quantization == "none":
        model.to(place or device())  # type: ignore[arg-type]
    set_evaluation(model)
    return model


def set_evaluation(model: torch.nn.Module) -> None:
    """`model.eval()`, except for 4-bit layers: what acts in training alone, as dropout does, is off.

    On a CPU, bitsandbytes' layer repacks its weights at its first forward in evaluation mode, for good, and every later
    gradient is wrong without a word. It computes the same in training mode, and there it does not.
    """
    model.eval()
    if getattr(model, "is_loaded_in_4bit", False):
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.train()


def manifest(base: Path, adapter: Path) -> dict[str, Any]:
    """What `merge.format: adapter` writes instead of a merged model: both folders and the SHA-256 of their weights."""
    return {
        name: {
            "folder": str(folder),
            "sha256": {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))},
        }
        for name, folder in (("base", base), ("adapter", adapter))
    }


def parts_of_cell(folder: Path) -> tuple[Path, Path | None]:
    """The folder of a merged model, or those of base and adapter where `merge` wrote a manifest.

    Raises UserError when the base or the adapter is no longer the one in the manifest.
    """
    if not (folder / MANIFEST).exists():
        return folder, None
    wanted = read_json(folder / MANIFEST)
    base, adapter = Path(wanted["base"]["folder"]), Path(wanted["adapter"]["folder"])
    if manifest(base, adapter) != wanted:
        raise UserError(f"{folder}/{MANIFEST}: {base} or {adapter} has changed since the merge; run `dvc repro` again")
    return base, adapter


def load_cell(folder: Path, dtype: str) -> "PreTrainedModel":
    """A merged model, or the base with its adapter applied; raises UserError as `parts_of_cell` does."""
    base, adapter = parts_of_cell(folder)
    if adapter is None:
        return load_model(base, dtype)
    from peft import PeftModel

    model: PreTrainedModel = PeftModel.from_pretrained(load_model(base, dtype), adapter)  # type: ignore[assignment]
    return model


def clean_adapter_config(folder: Path) -> None:
    """Make an adapter the same bytes in every clone: the base by its path in the repository, the targets in order."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "models/base"
    for key in ("target_modules", "exclude_modules"):  # PEFT writes a set: in another order in each process
        config[key] = sorted(config[key]) if config[key] else None
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
