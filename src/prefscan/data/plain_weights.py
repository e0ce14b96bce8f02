"""models/base is plain weights: neither an adapter nor a checkpoint that is already quantised."""

from pathlib import Path

from safetensors import safe_open

from prefscan.common.errors import UserError
from prefscan.common.io import read_json

PLAIN = {"F64", "F32", "F16", "BF16"}  # safetensors' names


def refuse_other_weights(folder: Path, repo: str) -> None:
    """Raises UserError for a fetched repository whose weights are not those of a whole model in floating point.

    transformers would load an adapter's base from elsewhere with the adapter on it, and quantised weights as such.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"model.source: {repo} holds an adapter (adapter_config.json); name a repository of whole weights, such as "
            "the adapter's base or the two merged"
        )
    way_out = "name the repository that it was made from"
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    parts = [config, *(part for part in config.values() if isinstance(part, dict))] if isinstance(config, dict) else []
    for part in parts:
        for key in ("quantization_config", "compression_config", "quantization"):
            if part.get(key):
                raise UserError(f"model.source: {repo} is already quantised ({key} in config.json); {way_out}")
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if ".lora_A." in name or ".lora_B." in name:
                    raise UserError(f"model.source: {repo} holds an adapter ({name}); name one of whole weights")
                dtype = file.get_slice(name).get_dtype()
                if name.endswith(("weight", "bias")) and dtype not in PLAIN:
                    raise UserError(f"model.source: {repo} is already quantised ({name} is {dtype}); {way_out}")
