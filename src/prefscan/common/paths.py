"""Where the stages read and write, relative to the repository's root; dvc.yaml names the same files."""

from pathlib import Path

CHECKED = Path("data/params-checked.txt")
BASE = Path("models/base")
RAW_PAIRS = Path("data/raw")
QUESTIONS = Path("data/questions")
RAW_REWARD = Path("data/reward")  # as fetched: reviews, prompts with instructions, or a reward model

SAMPLES = Path(
    "data/samples"
)  # the base's replies: train.jsonl makes pairs, eval.jsonl is what cells are compared with

TRAIN_PAIRS = Path("data/pairs/train.jsonl")
HELDOUT_PAIRS = Path("data/pairs/heldout.jsonl")
PREPARE_METRICS = Path("metrics/prepare.json")
TRAIN_REFERENCE = Path("data/reference/train.jsonl")
HELDOUT_REFERENCE = Path("data/reference/heldout.jsonl")
SPLITS = {"train": (TRAIN_PAIRS, TRAIN_REFERENCE), "heldout": (HELDOUT_PAIRS, HELDOUT_REFERENCE)}

# One file or folder a cell, named by its key.
ADAPTERS = Path("models/adapters")
HELDOUT_POLICY = Path("data/policy")
CURVES = Path("metrics/curves")
TRAIN_METRICS = Path("metrics/train")
TRAIN_COST = Path("metrics/cost/train")
MERGED = Path("models/merged")
MERGE_METRICS = Path("metrics/merge")
REPLIES = Path("data/replies")
EVALUATE_METRICS = Path("metrics/evaluate")
EVALUATE_COST = Path("metrics/cost/evaluate")
# As FastChat lays them out: data/mt_bench/model_answer, data/mt_bench/model_judgment.
ANSWERS = Path("data/mt_bench/model_answer")
ANSWER_METRICS = Path("metrics/answer")
ANSWER_COST = Path("metrics/cost/answer")
JUDGEMENTS = Path("data/mt_bench/model_judgment")
CELL_JUDGEMENTS = JUDGEMENTS / "cells"
MTBENCH_METRICS = Path("metrics/mtbench")
JUDGE_METRICS = Path("metrics/judge.json")

REWARD = Path("models/reward")
REWARD_METRICS = Path("metrics/reward.json")

REPORTS = Path("reports")
SUMMARY = Path("metrics/summary.json")
TRAINING_CURVES = REPORTS / "curves.csv"
RECIPE_CURVE = REPORTS / "recipe-curve.csv"

# Not stage outputs: live logs, checkpoints of cells in training, answers of unfinished stages.
RUNS = Path("runs")
CHECKPOINTS = Path(".prefscan/checkpoints")
UNFINISHED_ANSWERS = Path(".prefscan/answers")
UNFINISHED_REPLIES = Path(".prefscan/replies")


def judge_store() -> Path:
    """Where a paid judge's replies are kept: of the repository, also where DVC runs a queued experiment in a copy."""
    here = Path.cwd()
    root = next((folder.parent for folder in here.parents if folder.name == ".dvc"), Path())
    return root / ".prefscan/judgements"
