"""The sentiment classifier: fitted, checked, saved and loaded to the bit; the real reviews in a slow test."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from sklearn.metrics import roc_auc_score

from prefscan.common.config import SentimentReward
from prefscan.common.errors import UserError
from prefscan.data.reviews import Review, ReviewSplit, read_reviews, reviews_of, split_reviews
from prefscan.data.sources import REVIEWS_FILE, fetch_reward
from prefscan.rewards.sentiment import SentimentClassifier, check_sentiment, excerpts, fit_and_check, fit_sentiment
from review_data import review_rows, write_reviews

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> ReviewSplit:
    path = write_reviews(tmp_path_factory.mktemp("reviews") / "r.csv", review_rows(360))
    return split_reviews(read_reviews(path), 0.3, 0.2, least_words=40)


@pytest.fixture(scope="module")
def classifier(split: ReviewSplit) -> SentimentClassifier:
    return fit_sentiment(split.fit, 20)


HARD = ["", "wonderful", "awful film", "🎬🎬 moving", "no known term", "funny " * 200_000, "a\x00b", "ﬁne “quote”"]


def test_saved_and_loaded_it_gives_the_same_bits(classifier: SentimentClassifier, tmp_path: Path) -> None:
    classifier.save(tmp_path)
    loaded = SentimentClassifier.load(tmp_path, "sentiment")
    assert loaded.utilities(HARD, HARD) == classifier.utilities(HARD, HARD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier.safetensors", "vocabulary.json"]


def test_it_is_the_classifier_that_scikit_learn_fitted(split: ReviewSplit, classifier: SentimentClassifier) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    pattern = r"(?u)\b\w[\w']*\b"
    vectors = TfidfVectorizer(min_df=5, ngram_range=(1, 2), sublinear_tf=True, token_pattern=pattern)
    plain = make_pipeline(vectors, LogisticRegression(solver="liblinear", max_iter=200))
    pieces = [(text, review.positive) for review in split.fit for text in excerpts(review, 20)]
    plain.fit(*map(list, zip(*pieces, strict=True)))
    assert classifier.utilities(HARD, HARD) == pytest.approx(plain.decision_function(HARD).tolist(), abs=1e-9)
    assert classifier.scores(HARD, HARD) == pytest.approx(plain.predict_proba(HARD)[:, 1].tolist(), abs=1e-9)


def test_a_score_depends_on_its_reply_alone_and_orders_as_the_utility(classifier: SentimentClassifier) -> None:
    together = classifier.utilities(HARD, HARD)
    assert together == [classifier.utilities(["another prompt"], [text])[0] for text in HARD]
    scores = classifier.scores(HARD, HARD)
    assert all(0 < score < 1 for score in scores)
    assert sorted(HARD, key=dict(zip(HARD, scores, strict=True)).get) == sorted(
        HARD, key=dict(zip(HARD, together, strict=True)).get
    )
    assert scores[1] > 0.5 > scores[2]
    assert together[0] == together[4] == classifier.intercept
    assert classifier.utilities([], []) == []


def test_fitting_twice_gives_the_same_bytes(split: ReviewSplit, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        fit_sentiment(split.fit, 20).save(tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_its_check_is_on_held_out_labels(split: ReviewSplit) -> None:
    classifier, figures = fit_and_check(split, 20)
    assert set(figures["check"]) == {"excerpts", "snippets", "reviews"}
    long = [review for review in split.check if len(review.text.split()) >= 40]
    of = figures["check"]["reviews"]
    auc = roc_auc_score([r.positive for r in long], classifier.logits([r.text for r in long]))
    assert of["auc"]["value"] == pytest.approx(auc, abs=1e-4)
    assert (of["texts"], of["reviews"]) == (len(long), len(long))
    assert figures["check"]["excerpts"]["texts"] == 4 * len(long)
    for check in figures["check"].values():
        for figure in ("auc", "accuracy"):
            assert 0.5 < check[figure]["low"] <= check[figure]["value"] <= check[figure]["high"] <= 1
    flipped = [replace(review, positive=not review.positive) for review in split.check]
    reversed_check = check_sentiment(classifier, flipped, 20)["excerpts"]
    assert reversed_check["auc"]["value"] == pytest.approx(1 - figures["check"]["excerpts"]["auc"]["value"], abs=1e-4)


def test_excerpts_have_the_length_of_replies() -> None:
    review = Review(" ".join(map(str, range(49))), True, "x")
    assert [len(text.split()) for text in excerpts(review, 20)] == [20, 20]
    assert [len(text.split()) for text in excerpts(review, 13)] == [13, 13, 13, 10]
    assert excerpts(review, 30) == [review.text]


def test_too_few_reviews_one_class_and_overlap_are_refused(split: ReviewSplit) -> None:
    with pytest.raises(UserError, match="0 reviews of a class are left to fit the sentiment reward, 20 needed"):
        fit_sentiment([review for review in split.fit if review.positive], 20)
    with pytest.raises(UserError, match="reviews of a class are left to check the sentiment reward, 20 needed"):
        fit_and_check(ReviewSplit(split.fit, split.check[:12], split.prompts, {}), 20)
    with pytest.raises(UserError, match="is of both fit and prompts"):
        fit_and_check(ReviewSplit(split.fit, split.check, [*split.prompts, split.fit[0]], {}), 20)
    rare = [Review(f"only{i} here{i}", i % 2 == 0, str(i)) for i in range(60)]
    with pytest.raises(UserError, match="no term of 60 reviews is in 5 of their texts"):
        fit_sentiment(rare, 20)


def test_damaged_folders_are_refused(classifier: SentimentClassifier, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocabulary\.json is missing"):
        SentimentClassifier.load(tmp_path, "s")
    classifier.save(tmp_path)
    weights = (tmp_path / "classifier.safetensors").read_bytes()
    (tmp_path / "classifier.safetensors").write_bytes(weights[:-10])
    with pytest.raises(UserError, match="holds no classifier"):
        SentimentClassifier.load(tmp_path, "s")
    (tmp_path / "classifier.safetensors").write_bytes(weights)
    (tmp_path / "vocabulary.json").write_text('["one"]')
    with pytest.raises(UserError, match=r"1 terms in .* are not of one fit"):
        SentimentClassifier.load(tmp_path, "s")


@pytest.mark.slow
def test_the_shipped_reward_agrees_with_people(tmp_path: Path) -> None:
    settings = SentimentReward.model_validate(yaml.safe_load((REPOSITORY / "conf/reward/sentiment.yaml").read_text()))
    fetch_reward(settings, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [REVIEWS_FILE]
    split = reviews_of(settings, tmp_path)
    _, figures = fit_and_check(split, settings.excerpt_words)
    print(figures)
    assert figures["reviews"]["reviews"] == 33530
    assert figures["check"]["snippets"]["auc"]["low"] >= 0.80
    assert figures["check"]["excerpts"]["auc"]["low"] >= 0.80
    assert figures["check"]["reviews"]["auc"]["low"] >= 0.95
