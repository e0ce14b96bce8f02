"""Replies of the base at temperature 1, each with its reward.

    prefscan sample train    # data/samples/train.jsonl: what preference pairs are made of
    prefscan sample eval     # data/samples/eval.jsonl: what the cells' replies are compared with

One row a prompt: `id`, `prompt`, `prompt_ids`, and `replies`, each with its tokens, log-probability, length, utility
(what preferences are made of) and score (what the report shows). A stage that was killed goes on from its last batch.
"""

from prefscan.common.config import load
from prefscan.common.io import write_jsonl
from prefscan.common.paths import BASE, REWARD, SAMPLES
from prefscan.data.prompts import load_prompts
from prefscan.generation.replies import prompt_rows, reply_to_all, unfinished_file
from prefscan.models.loading import load_model, load_tokenizer
from prefscan.rewards.evaluation import rewarded
from prefscan.rewards.reward import load_reward


def main(split: str) -> None:
    params = load()
    sample, settings = params.known_reward
    prompts = load_prompts(sample, "train" if split == "train" else sample.eval_split)
    number = sample.train_replies if split == "train" else sample.base_replies
    unfinished = unfinished_file("sample", split, f"base-{split}")
    model, tokenizer = load_model(BASE, sample.dtype), load_tokenizer(BASE)
    replies = reply_to_all(model, tokenizer, prompts, number, sample, unfinished)
    rewards = rewarded(
        load_reward(settings, REWARD),
        [prompt["prompt"] for prompt in prompts],
        [[reply.text for reply in own] for own in replies],
        chat=sample.format == "chat",
    )
    rows = prompt_rows(prompts, replies, rewards)
    write_jsonl(SAMPLES / f"{split}.jsonl", rows)
    unfinished.unlink()
    scores = [reply["score"] for row in rows for reply in row["replies"]]
    print(f"{split}: {len(scores)} replies to {len(rows)} prompts, mean reward {sum(scores) / len(scores):.3f}")
