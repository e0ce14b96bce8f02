"""A repository like this one, whose model, pairs and questions are tiny."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from mtbench_data import TEMPLATES, make_questions, make_references
from prefscan.common.io import sha256
from prefscan.repo.pipeline import CELL_STAGES
from tiny import sharegpt_rows

ROOT = Path(__file__).parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"
COPIED = [
    "conf",
    "constraints.txt",
    "dvc.yaml",
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvc/plots",
    "data/.gitignore",
    ".dvcignore",
    ".gitignore",
    "hydra_plugins",
    "src",
]


class Workspace:
    """A DVC repository on disk and the environment to run commands in it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def run(self, *command: str, fails: bool = False) -> str:
        """Standard output and error of a command; asserts that it ends as expected."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert (done.returncode != 0) == fails, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def dvc(self, *arguments: str, fails: bool = False) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments, fails=fails)

    def git(self, *arguments: str) -> str:
        return self.run("git", *arguments)

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)

    def clone(self, folder: Path) -> "Workspace":
        self.git("clone", "--quiet", ".", str(folder))
        return Workspace(folder, self.environment)

    def copy(self, folder: Path) -> "Workspace":
        """The workspace with its cache, as if the user went on in it."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Workspace(folder, self.environment)

    def json(self, path: str) -> Any:
        return json.loads((self.folder / path).read_text())


def stages_run(output: str) -> list[str]:
    """The stages that a `dvc repro` or `dvc exp run` ran or would run."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")]


def of_cells(*keys: str) -> set[str]:
    return {f"{stage}@{key}" for stage in CELL_STAGES for key in keys}


def make_wheel(folder: Path, name: str, files: dict[str, str]) -> dict[str, str]:
    """A wheel that pip finds in the folder; returns its `package` source for conf/."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    information = f"{name}-1.0.dist-info"
    metadata = {
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{information}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in {**files, **metadata}.items():
            wheel.writestr(member, text)
    return {"kind": "package", "requirement": f"{name}==1.0", "archive": "wheel", "sha256": sha256(path)}


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def shrink(folder: Path, packages: Path) -> None:
    """Point the repository's default configuration to tiny inputs; the groups stay as they are."""
    conf = folder / "conf"

    def write(name: str, value: Any) -> None:
        (conf / name).write_text(json.dumps(value))  # JSON is YAML

    hub = {"kind": "hub", "repo": "tests/tiny", "revision": REVISION}
    tokens = {"pad_token": None, "padding_side": "left", "bos": "template"}
    write("model/tiny.yaml", {"name": "tiny", "source": hub, **tokens})
    source = make_wheel(packages, "tinypairs", {"tinypairs/pairs.json": json.dumps(sharegpt_rows(32))})
    limits = {"max_prompt_length": 256, "max_length": 256, "heldout_share": 0.4, "heldout_max": None}
    write(
        "data/tiny.yaml",
        {
            "name": "tiny",
            "folder": "data/raw",
            "source": source | {"train": "tinypairs/pairs.json", "heldout": None},
            **limits,
        },
    )
    engine = {"engine": "transformers", "server": None}
    write("answer/tiny.yaml", engine | {"questions": 8, "max_new_tokens": 6, "batch_size": 8, "dtype": "fp32"})
    write("sweep/tiny.yaml", {"loss": "sigmoid, kto_pair", "beta": "", "steps": ""})
    questions = make_questions(each=2)  # judge-check swaps answers within a category
    references = make_references(questions, "GPT-4")
    bench = {
        "bench/question.jsonl": questions,
        "bench/judge_prompts.jsonl": list(TEMPLATES.values()),
        "bench/reference_answer/gpt-4.jsonl": references,
    }
    mt_bench = make_wheel(packages, "tinybench", {name: jsonl(rows) for name, rows in bench.items()})
    corrected = make_wheel(packages, "tinycorrected", {"corrected/reference.jsonl": jsonl(references)})
    config = (conf / "config.yaml").read_text()
    tiny = dict.fromkeys(("model", "data", "sweep", "answer"), "tiny")
    for group, name in (tiny | {"reward": "none", "sample": "none", "mtbench": "all"}).items():
        config, replaced = re.subn(rf"- {group}: \w+\n", f"- {group}: {name}\n", config)
        assert replaced == 1
    config = config[: config.index("\nquestions:") + 1]
    config = config.replace("steps: 32 ", "steps: 3 ")
    local = (conf / "judge/local.yaml").read_text()
    (conf / "judge/local.yaml").write_text(local.replace("least_mass: 0.1 ", "least_mass: 0.0 "))  # of random weights
    questions = {
        "source": "mt_bench",
        "folder": "conf/questions",
        "mt_bench": mt_bench | {"folder": "bench"},
        "corrected": corrected | {"file": "corrected/reference.jsonl"},
    }
    (conf / "config.yaml").write_text(f"{config}questions: {json.dumps(questions)}\n")
