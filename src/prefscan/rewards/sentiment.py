"""The sentiment of a reply: TF-IDF and logistic regression, fitted to reviews with human labels.

The controlled experiment of the DPO paper (Rafailov et al., arXiv 2305.18290, section 6) has such a classifier as its
known reward. Here it reads the reply alone: what the prompt says is the same for all replies to it. The utility is the
classifier's logit, the score P(positive).

It is fitted to excerpts of the length of a reply, since the words of whole reviews would teach it lengths that no reply
has. The label of an excerpt is its review's. The classifier is saved as plain arrays and a list of terms: no pickle.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from prefscan.common.errors import UserError
from prefscan.common.io import read_json, write_json
from prefscan.data.reviews import Review, ReviewSplit, refuse_overlap
from prefscan.rewards.checks import accuracy_interval, auc_interval, rounded
from prefscan.rewards.reward import Prompt, Reward

TERMS: dict[str, Any] = {"ngram_range": (1, 2), "sublinear_tf": True, "token_pattern": r"(?u)\b\w[\w']*\b"}
LEAST_TEXTS = 5  # in which a term must occur; rarer ones are four in five and say nothing about held-out texts
LEAST_REVIEWS = 20  # of each class, to fit and to check; an AUC of fewer has an interval of a third
WEIGHTS, VOCABULARY = "classifier.safetensors", "vocabulary.json"


class SentimentClassifier(Reward):
    """A fitted classifier: the terms, and for each its inverse document frequency and its coefficient."""

    utility_name = "logit of P(positive)"
    score_name = "P(positive)"

    def __init__(
        self,
        name: str,
        terms: Sequence[str],
        idf: npt.NDArray[np.float64],
        coefficients: npt.NDArray[np.float64],
        intercept: float,
    ) -> None:
        self.name = name
        self.terms = list(terms)
        self.idf, self.coefficients, self.intercept = idf, coefficients, intercept
        self.vectors = TfidfVectorizer(vocabulary={term: i for i, term in enumerate(self.terms)}, **TERMS)
        self.vectors.idf_ = idf

    def logits(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Logit of P(positive), shape `[texts]`; the intercept alone for a text without a known term."""
        logits: npt.NDArray[np.float64] = self.vectors.transform(texts) @ self.coefficients + self.intercept
        return logits

    def _utilities(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float]:
        return list(map(float, self.logits(replies)))

    def score(self, utility: float) -> float:
        return float(expit(utility))

    def save(self, folder: Path) -> None:
        """The same bytes whenever the classifier is the same."""
        arrays = {"idf": self.idf, "coefficients": self.coefficients, "intercept": np.array([self.intercept])}
        save_file(arrays, folder / WEIGHTS)
        write_json(folder / VOCABULARY, self.terms)

    @classmethod
    def load(cls, folder: Path, name: str) -> "SentimentClassifier":
        """The classifier that `save` wrote, to the bit; raises UserError for a folder without one."""
        terms = read_json(folder / VOCABULARY)
        try:
            arrays = load_file(folder / WEIGHTS)
            idf, coefficients, intercept = (arrays[key] for key in ("idf", "coefficients", "intercept"))
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"{folder / WEIGHTS} holds no classifier ({' '.join(str(error).split()):.100}); run `dvc repro` to fit "
                "it, or `dvc pull` to fetch it"
            ) from None
        if not len(terms) == len(idf) == len(coefficients):
            raise UserError(
                f"{folder}: {len(terms)} terms in {VOCABULARY} and {len(coefficients)} coefficients in {WEIGHTS}; the "
                "files are not of one fit, run `dvc repro` again"
            )
        return cls(name, terms, idf, coefficients, float(intercept[0]))


def is_short(review: Review, excerpt_words: int) -> bool:
    """Whether the review is a snippet, as long as a reply, which is not cut."""
    return len(review.text.split()) < 2 * excerpt_words


def excerpts(review: Review, excerpt_words: int) -> list[str]:
    """The review in pieces of so many words, the last one of at least half; a snippet stays whole."""
    if is_short(review, excerpt_words):
        return [review.text]
    words = review.text.split()
    starts = range(0, len(words) - excerpt_words // 2, excerpt_words)
    return [" ".join(words[start : start + excerpt_words]) for start in starts]


def fit_sentiment(reviews: Sequence[Review], excerpt_words: int, name: str = "sentiment") -> SentimentClassifier:
    """Fit the classifier to excerpts of reviews; the same bits whenever the reviews are the same, in one order.

    L2-regularised logistic regression with C = 1, by liblinear's trust region Newton method on one thread. Raises
    UserError for fewer than 20 reviews of a class, and where no term is in 5 excerpts.
    """
    _refuse_few(reviews, "fit")
    pairs = [(text, review.positive) for review in reviews for text in excerpts(review, excerpt_words)]
    texts, labels = zip(*pairs, strict=True)
    vectors = TfidfVectorizer(min_df=LEAST_TEXTS, **TERMS)
    try:
        matrix = vectors.fit_transform(texts)
    except ValueError as error:
        raise UserError(
            f"reward.source: no term of {len(reviews)} reviews is in {LEAST_TEXTS} of their texts ({error}); name a "
            "file with more reviews"
        ) from None
    model = LogisticRegression(solver="liblinear", max_iter=200, random_state=0)
    model.fit(matrix, labels)
    terms = vectors.get_feature_names_out().tolist()
    return SentimentClassifier(name, terms, vectors.idf_, model.coef_[0], float(model.intercept_[0]))


def check_sentiment(classifier: SentimentClassifier, reviews: Sequence[Review], excerpt_words: int) -> dict[str, Any]:
    """AUC and accuracy on held-out human labels, with 95 % intervals, for each length of text.

    `excerpts` are pieces of long reviews, each with its review's label, which it need not express; `snippets` are short
    reviews, whole; `reviews` are long ones, whole. Reviews and their near-duplicates are the clusters.
    Raises UserError for fewer than 20 reviews of a class.
    """
    _refuse_few(reviews, "check")
    kinds: dict[str, list[tuple[str, Review]]] = defaultdict(list)
    for review in reviews:
        if is_short(review, excerpt_words):
            kinds["snippets"].append((review.text, review))
        else:
            kinds["excerpts"] += [(text, review) for text in excerpts(review, excerpt_words)]
            kinds["reviews"].append((review.text, review))
    check = {}
    for kind, rows in kinds.items():
        labels, groups = [review.positive for _, review in rows], [review.group for _, review in rows]
        sides = ({review.group for _, review in rows if review.positive is side} for side in (True, False))
        if min(map(len, sides)) < 2:
            continue  # two reviews of a class are the least for an interval
        logits = classifier.logits([text for text, _ in rows])
        check[kind] = {
            "texts": len(rows),
            "reviews": len(set(groups)),
            "auc": rounded(auc_interval(logits.tolist(), labels, groups)),
            "accuracy": rounded(accuracy_interval(((logits > 0) == np.array(labels)).tolist(), groups)),
        }
    return check


def fit_and_check(
    split: ReviewSplit, excerpt_words: int, name: str = "sentiment"
) -> tuple[SentimentClassifier, dict[str, Any]]:
    """The classifier and the figures of metrics/reward.json; raises UserError for parts that overlap or are too few."""
    refuse_overlap({"fit": split.fit, "check": split.check, "prompts": split.prompts})
    classifier = fit_sentiment(split.fit, excerpt_words, name)
    return classifier, {
        "reviews": split.counts,
        "terms": len(classifier.terms),
        "check": check_sentiment(classifier, split.check, excerpt_words),
    }


def _refuse_few(reviews: Sequence[Review], part: str) -> None:
    positive = sum(review.positive for review in reviews)
    fewest = min(positive, len(reviews) - positive)
    if fewest < LEAST_REVIEWS:
        raise UserError(
            f"{fewest} reviews of a class are left to {part} the sentiment reward, {LEAST_REVIEWS} needed; name a file "
            "with more reviews of both classes, or change reward.check_share"
        )
