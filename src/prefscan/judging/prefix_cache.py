"""Keys and values of what a local judge's prompts begin with, kept for the next stage that judges.

The prompts of all models to one question open with the same instructions, question and reference answer, most of a
prompt's tokens where answers are short. A beginning is read by itself, after the shorter one that it starts with, so
its keys and values follow from its tokens alone: a verdict has the same bits whether they were there or not.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefscan.common.fingerprint import result_key
from prefscan.common.paths import BEGINNINGS

CODE = ("judges/beginnings.py", "judges/local.py", "models.py")
MOST = 4 * 2**30  # bytes of all files: those of MT-Bench's 80 questions, read by the laptop default's judge in fp32
SPARE = 5 * 2**30  # bytes of the disk that are left free
UNUSED = 24 * 3600.0  # seconds after which a file that nothing has read makes room

Layers = list[tuple[Tensor, Tensor]]  # keys and values, each [1, heads, tokens, size]


def beginnings_key(judge: Path, dtype: str) -> str:
    """Of everything but the tokens that keys and values depend on."""
    return result_key({"dtype": dtype}, [judge], CODE)


class Beginnings:
    """Caches of prompts' beginnings; in files under a key, unless that is None, and of the last prompt in memory.

    What cannot be read or written is computed, and not kept.
    """

    def __init__(self, model: PreTrainedModel, key: str | None) -> None:
        self.model = model
        self.folder = BEGINNINGS / key if key else None
        self.held: dict[str, Layers] = {}

    @torch.no_grad()
    def cache(self, ids: Sequence[int], ends: Sequence[int]) -> DynamicCache:
        """A cache of `ids[: ends[-1]]`, a proper prefix, which is read up to each of the ascending `ends` in turn."""
        names = [_name(ids, ends[: i + 1]) for i in range(len(ends))]
        cache = DynamicCache()  # without the model's config, as local.py crops it
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
        with suppress(OSError):
            seal, content = _parted((self.folder / name).read_bytes())
            if seal == _seal(content):
                os.utime(self.folder / name)
                tensors = load(content)
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
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            content = save(tensors)
            if not _room(len(content)):
                return
            with TemporaryDirectory(dir=self.folder) as own:  # other processes may be writing the same
                Path(own, name).write_bytes(_seal(content) + content)
                os.replace(Path(own, name), self.folder / name)


def _room(needed: int) -> bool:
    """Whether so many bytes may be written; what nothing has used for long, leftovers of the killed too, is removed."""
    used = 0
    for file in BEGINNINGS.rglob("*"):
        with suppress(FileNotFoundError):  # by another process
            status = file.stat()
            if file.is_dir():
                continue
            if time.time() - status.st_mtime > UNUSED:
                file.unlink()
            else:
                used += status.st_size
    return used + needed <= MOST and shutil.disk_usage(BEGINNINGS).free - needed >= SPARE


def _seal(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _parted(file: bytes) -> tuple[bytes, bytes]:
    size = hashlib.sha256().digest_size
    return file[:size], file[size:]


def _name(ids: Sequence[int], ends: Sequence[int]) -> str:
    """Of a beginning: by its tokens, and by where its reading paused."""
    digest = hashlib.sha256(json.dumps([list(ids[: ends[-1]]), list(ends)]).encode())
    return digest.hexdigest()
