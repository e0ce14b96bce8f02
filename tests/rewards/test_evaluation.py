"""What replies earn against the base's, by hand and by scipy."""

from collections.abc import Sequence
from typing import Any

import pytest
from scipy import stats

from prefscan.common.errors import UserError
from prefscan.rewards.evaluation import cell_metrics, rewarded, won
from prefscan.rewards.reward import Prompt, Reward


def reply(utility: float, kl: float | None = None, **others: Any) -> dict[str, Any]:
    known = {"utility": utility, "score": utility / 10, "kl": kl, "length": 4, "truncated": False, "repetition": 0.0}
    return known | others


def row(identity: str, *replies: dict[str, Any]) -> dict[str, Any]:
    return {"id": identity, "prompt": "Go", "replies": list(replies)}


BASE = [row(f"p{i}", reply(i), reply(i + 2), reply(i + 4)) for i in range(4)]
OURS = [row(f"p{i}", reply(i + 1, kl=float(i), length=6), reply(i + 2, truncated=True)) for i in range(4)]


def test_gains_are_paired_by_prompt_with_students_interval() -> None:
    metrics = cell_metrics(OURS, BASE)
    gains = [(i + 1.5) / 10 - (i + 2) / 10 for i in range(4)]
    assert metrics["gain"] == pytest.approx(sum(gains) / 4)
    assert metrics["gain_low"] == pytest.approx(metrics["gain_high"])  # the same on every prompt
    found = stats.ttest_1samp([(i + 1.5) / 10 for i in range(4)], 0).confidence_interval()
    assert (metrics["reward_low"], metrics["reward_high"]) == pytest.approx((found.low, found.high))


def test_kl_is_over_the_replies_that_have_it_and_lengths_are_over_all() -> None:
    metrics = cell_metrics(OURS, BASE)
    assert (metrics["kl"], metrics["kl_prompts"], metrics["prompts"], metrics["replies"]) == (1.5, 4, 4, 8)
    assert (metrics["mean_tokens"], metrics["share_truncated"]) == (5, 0.5)


def test_a_win_is_against_the_reply_of_the_same_number_and_ties_count_half() -> None:
    assert won(OURS[0], BASE[0]) == 0.75  # 1 beats 0; 2 ties 2
    assert cell_metrics(OURS, BASE)["win_rate"] == 0.75


def test_the_order_of_the_bases_prompts_changes_nothing() -> None:
    assert cell_metrics(OURS, BASE[::-1]) == cell_metrics(OURS, BASE)


def test_prompts_that_the_base_lacks_are_refused() -> None:
    with pytest.raises(UserError, match=r"the base has no replies to 1 prompts, the first p3"):
        cell_metrics(OURS, BASE[:3])


class Length(Reward):
    name, utility_name, score_name = "length", "characters", "halved"

    def _utilities(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float]:
        self.prompts = prompts
        return [float(len(text)) for text in replies]

    def score(self, utility: float) -> float:
        return utility / 2


def test_every_reply_is_rewarded_beside_its_own_prompt() -> None:
    reward = Length()
    found = rewarded(reward, ["a", "b"], [["x", "xyz"], [""]], chat=False)
    assert found == [[(1.0, 0.5), (3.0, 1.5)], [(0.0, 0.0)]]
    assert reward.prompts == ["a", "a", "b"]
    rewarded(reward, ["a"], [["x"]], chat=True)
    assert reward.prompts == [[{"role": "user", "content": "a"}]]
