"""The benchmark of judging, at small size."""

import judging


def test_both_sides_judge_every_turn_through_the_real_client() -> None:
    result = judging.measure(turns=6, latency=0.1)
    assert result["concurrency"] == 16  # conf/judge/gpt4.yaml
    assert result["ratio"] == result["seconds_one_at_a_time"] / result["seconds"]
    # Six replies one after the other, each held back so long: none came from a store of the other side's.
    assert result["seconds_one_at_a_time"] >= 0.6
