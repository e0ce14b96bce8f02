"""Keys and values of what a local judge's prompts begin with, kept for the next stage that judges.

The prompts of all models to one question open with the same instructions, question and reference answer, most of a
prompt's tokens where answers are short. A beginning is read by itself, after the shorter one that it starts with, so
its keys and values follow from its tokens alone: a verdict has the same bits whether they were there or not.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefscan.keys import result_key
from prefscan.paths import BEGINNINGS

CODE = ("judges/beginnings.py", "judges/local.py", "models.py")
SPARE = 5 * 2**30  # bytes of the disk that are left free

Layers = list[tuple[Tensor, Tensor]]  # keys and values, each [1, heads, tokens, size]


def beginnings_key(judge: Path, dtype: str) -> str:
    """Of everything but the tokens that keys and values depend on."""
    return result_key({"dtype": dtype}, [judge], CODE)


class Beginnings:
    """Caches of prompts' beginnings; in files under a key, unless that is None, and of the last prompt in memory.

    What cannot be read or written is computed, and not kept. The first file of a key removes those of others.
    """

    def __init__(self, model: PreTrainedModel, key: str | None) -> None:
        self.model = model
        self.folder = BEGINNINGS / key if key else None
        self.held: dict[str, Layers] = {}

    @torch.no_grad()
    def cache(self, ids: Sequence[int], ends: Sequence[int]) -> DynamicCache:
        """A cache of `ids[: ends[-1]]`, a proper prefix, which is read up to each of the ascending `ends` in turn."""
        names = [_name(ids, ends[: i + 1]) for i in range(len(ends))]
        cache = DynamicCache()  # without the model's config: every layer keeps all positions, and so can be cropped
        there, layers = len(names), None
        while there and not (layers := self.held.get(names[there - 1]) or self._read(names[there - 1])):
            there -= 1
        for i, (keys, values) in enumerate(layers or ()):
            cache.update(keys, values, i)
        chain = {names[there - 1]: layers} if layers else {}
        for name, end in zip(names[there:], ends[there:], strict=True):
            rest = torch.tensor([ids[cache.get_seq_length() : end]], device=self.model.device)
            self.model(input_ids=rest, past_key_values=cache, use_cache=True, logits_to_keep=1)
            chain[name] = [(layer.keys, layer.values) for layer in cache.layers]
            self._write(name, chain[name])
        self.held = {name: kept for name, kept in (self.held | chain).items() if name in names}
        return cache

    def _read(self, name: str) -> Layers | None:
        if not self.folder:
            return None
        with suppress(OSError, SafetensorError):
            tensors = load_file(self.folder / name)
            return [(tensors[f"{i}.keys"], tensors[f"{i}.values"]) for i in range(len(tensors) // 2)]
        return None

    def _write(self, name: str, layers: Layers) -> None:
        if not self.folder:
            return
        tensors = {
            f"{i}.{kind}": states.contiguous()
            for i, layer in enumerate(layers)
            for kind, states in zip(("keys", "values"), layer, strict=True)
        }
        with suppress(OSError, SafetensorError):
            if not self.folder.exists():
                shutil.rmtree(BEGINNINGS, ignore_errors=True)
                self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < SPARE:
                return
            with TemporaryDirectory(dir=self.folder) as own:  # other processes may be writing the same
                save_file(tensors, Path(own, name))
                os.replace(Path(own, name), self.folder / name)


def _name(ids: Sequence[int], ends: Sequence[int]) -> str:
    """Of a beginning: by its tokens, and by where its reading paused."""
    digest = hashlib.sha256(json.dumps([list(ids[: ends[-1]]), list(ends)]).encode())
    return f"{digest.hexdigest()}.safetensors"
