"""Every reader of a commit asks whether its results are those of its parameters, on both sides."""

from pathlib import Path

import pytest

from git_data import branch, git, make_repository
from prefscan.common.errors import UserError
from prefscan.review import compare
from prefscan.review.pull_request import base_section, difference_section
from prefscan.review.revisions import read_revision

pytestmark = pytest.mark.usefixtures("repository")


@pytest.fixture
def repository(in_tmp: Path, reported: Path) -> Path:
    make_repository(reported)
    return in_tmp


def test_seeds_that_have_not_run_are_no_seeds() -> None:
    """`git switch -c seed1 main`, the seed edited in params.yaml and committed."""
    for seed in (1, 2):
        branch(f"seed{seed}", lambda params, seed=seed: params.update(seed=seed), ran=False)
    with pytest.raises(UserError, match=r"^seed1: .*: seed is 1 in params\.yaml and was 0 \(report\)"):
        compare.main(["main", "seed1", "seed2"])
    assert not Path("comparison").exists()


def test_a_stale_base_has_no_difference_and_the_review_says_so() -> None:
    branch("stale", lambda params: params.update(seed=1), ran=False)
    git("checkout", "--quiet", "-b", "next", "main")
    with pytest.raises(UserError, match=r"^stale: its results are not"):
        difference_section(read_revision("stale"), read_revision(None))
    said = base_section("stale")
    assert "**stale: its results are not those of its parameters and code" in said
    assert "seed is 1 in params.yaml and was 0" in said
    assert base_section("main") == ""


def test_a_score_edited_in_git_is_no_result() -> None:
    text = Path("reports/questions.csv").read_text()
    branch("edited", files={"reports/questions.csv": text.replace(",", ",", 1) + "\n"}, ran=False)
    with pytest.raises(UserError, match=r"^edited: .*reports/questions\.csv is another than it wrote \(report\)"):
        read_revision("edited")
