"""The known reward, ready to score replies, and how well it agrees with labels that people gave.

    prefscan reward      # models/reward, metrics/reward.json

Of kind `sentiment` it is fitted here, of kind `model` loaded once and checked on pairs with known order where
`reward.pairs` names some, of kind `checkable` its instructions are read and tried.
"""

from pathlib import Path
from typing import Any

from prefscan.common.config import CheckableReward, ModelReward, RewardSettings, SentimentReward, load
from prefscan.common.errors import UserError
from prefscan.common.io import new_folder, write_json, write_jsonl
from prefscan.common.paths import RAW_REWARD, REWARD, REWARD_METRICS
from prefscan.data.reviews import review_prompts, reviews_of
from prefscan.data.sources import MODEL_FILES, PROMPTS_FILE, link_folder


def make_reward(settings: RewardSettings, raw: Path, folder: Path) -> dict[str, Any]:
    """Write the reward to the folder; returns its figures. Raises UserError as its module does."""
    match settings:
        case SentimentReward():
            from prefscan.rewards.sentiment import fit_and_check

            split = reviews_of(settings, raw)
            classifier, figures = fit_and_check(split, settings.excerpt_words, settings.name)
            classifier.save(folder)
            prompts, counts = review_prompts(split.prompts, settings.prompt_words)
            write_jsonl(folder / PROMPTS_FILE, [row for rows in prompts.values() for row in rows])
            figures["prompts"] = counts
            return {"score": classifier.score_name, **figures}
        case ModelReward():
            from prefscan.rewards.model import RewardModel, check_pairs, read_known_pairs

            link_folder(raw, folder, MODEL_FILES)
            model = RewardModel.load(folder, settings)
            pairs = read_known_pairs(Path(settings.pairs)) if settings.pairs else None
            return {
                "score": model.score_name,
                "parameters": sum(weights.numel() for weights in model.model.parameters()),
                "check": check_pairs(model, pairs) if pairs else None,
            }
        case CheckableReward():
            from prefscan.rewards.checkable import InstructionChecks, describe, read_prompts

            rows, left_out = read_prompts(raw / PROMPTS_FILE, settings.unusable)
            checks = InstructionChecks(rows, settings.name)
            checks.save(folder)
            return {"score": checks.score_name, **describe(rows, left_out)}


def sentence(settings: RewardSettings, figures: dict[str, Any]) -> str:
    """The one line that the stage prints."""
    match settings:
        case SentimentReward():
            checks = "; ".join(
                f"AUC {of['auc']['value']:.3f} [{of['auc']['low']:.3f}, {of['auc']['high']:.3f}] on {of['texts']} "
                f"held-out {kind}"
                for kind, of in figures["check"].items()
            )
            return f"reward {settings.name}: {checks}"
        case ModelReward():
            check = figures["check"]
            if check is None:
                return f"reward {settings.name}: {figures['parameters']:,} parameters, not checked (reward.pairs: null)"
            accuracy = check["accuracy"]
            return (
                f"reward {settings.name}: accuracy {accuracy['value']:.3f} [{accuracy['low']:.3f}, "
                f"{accuracy['high']:.3f}] on {check['pairs']} pairs with known order"
            )
        case CheckableReward():
            kinds, left_out = figures["instructions"], sum(figures["left_out"].values())
            return (
                f"reward {settings.name}: {figures['prompts']} prompts with {sum(kinds.values())} instructions of "
                f"{len(kinds)} kinds, {left_out} prompts left out"
            )


def main() -> None:
    settings = load().reward
    if settings is None:
        raise UserError("reward: null, so there is none to make; choose one of conf/reward, as in -S reward=sentiment")
    with new_folder(REWARD) as folder:
        figures = make_reward(settings, RAW_REWARD, folder)
    write_json(REWARD_METRICS, {"kind": settings.kind, "name": settings.name, **figures})
    print(sentence(settings, figures))
