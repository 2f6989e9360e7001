"""Captions, against torchmetrics, against loops over the formula, and by hand."""

import math
import random
import sys
from collections import Counter

import pytest
import torch

from mmcl.evaluation import find_scorer
from mmcl.evaluation.scorers.captions import (
    Cider,
    common_length,
    corpus_bleu,
    rouge_l,
    sentence_bleu,
)

VOCABULARY = ("a", "the", "red", "dog", "cat", "runs", "on", "in", "park", "bus", "street")


def sentences(count, seed, shortest=4, longest=12):
    draw = random.Random(seed)
    return [
        tuple(draw.choices(VOCABULARY, k=draw.randint(shortest, longest))) for _ in range(count)
    ]


def a_test_set(rows=12, seed=0):
    """Answers that share words with their references, of which rows have different numbers."""
    draw = random.Random(seed)
    references = [sentences(1 + row % 3, seed + row, 8, 8) for row in range(rows)]
    predictions = []
    for right in references:
        words = list(right[0])
        words[draw.randrange(len(words))] = "blue"
        predictions.append(tuple(words[: draw.randint(6, 8)]))
    return predictions, references


def grams(text, order):
    return Counter(text[at : at + order] for at in range(len(text) - order + 1))


def cider_by_loops(prediction, references, row):
    """CIDEr-D of one row, written from the formula of the paper and the constants of COCO."""
    total = 0.0
    for order in range(1, 5):
        for right in references[row]:

            def weight(gram, order=order):
                rows_with = sum(
                    any(gram in grams(text, order) for text in texts) for texts in references
                )
                return math.log(len(references) / max(1, rows_with))

            mine, theirs = grams(prediction, order), grams(right, order)
            top = sum(
                min(mine[g], theirs[g]) * theirs[g] * weight(g) ** 2 for g in mine if g in theirs
            )
            norms = [
                math.sqrt(sum((c * weight(g)) ** 2 for g, c in each.items()))
                for each in (mine, theirs)
            ]
            if top:
                gap = len(prediction) - len(right)
                total += top / norms[0] / norms[1] * math.exp(-gap * gap / 72)
    return 10 * total / 4 / len(references[row])


def test_cider_is_the_formula():
    predictions, references = a_test_set()
    cider = Cider(references)
    for row, text in enumerate(predictions):
        expected = cider_by_loops(text, references, row)
        assert cider.score(row, text) == pytest.approx(expected, abs=1e-12)
        assert expected > 0


def test_cider_by_hand():
    cider = Cider([[("a", "b", "c", "d")], [("e", "f", "g", "h")]])
    assert cider.score(0, ("a", "b", "c", "d")) == pytest.approx(10)
    assert cider.score(0, ("e", "f", "g", "h")) == 0
    # Two of four words, one of three pairs, two words too few.
    expected = 10 / 4 * math.exp(-4 / 72) * (1 / math.sqrt(2) + 1 / math.sqrt(3))
    assert cider.score(0, ("a", "b")) == pytest.approx(expected)


def test_words_of_every_row_weigh_nothing():
    cider = Cider([[("a", "b", "c", "d")], [("a", "f", "g", "h")]])
    assert cider.score(0, ("a",)) == 0


def test_saying_a_word_again_does_not_raise_cider():
    cider = Cider([[("a", "b", "c", "d")], [("e", "f", "g", "h")]])
    assert cider.score(0, ("a", "a", "a", "a")) < cider.score(0, ("a",))


def test_a_test_set_of_one_row_still_tells_right_from_wrong():
    cider = Cider([[("a", "b", "c", "d")]])
    assert cider.score(0, ("a", "b", "c", "d")) == pytest.approx(10)
    assert cider.score(0, ("x",)) == 0


def test_the_longest_common_subsequence_by_recursion():
    def length(one, other):
        if not one or not other:
            return 0
        if one[0] == other[0]:
            return 1 + length(one[1:], other[1:])
        return max(length(one[1:], other), length(one, other[1:]))

    pairs = zip(sentences(20, 1, 1, 6), sentences(20, 2, 1, 6), strict=True)
    for one, other in pairs:
        assert common_length(one, other) == length(one, other)


def test_rouge_l_by_hand():
    right = ("police", "killed", "the", "gunman")
    assert rouge_l(("police", "kill", "the", "gunman"), [right]) == pytest.approx(3 / 4)
    # Precision 1 and recall 1/2 with beta 1.2.
    assert rouge_l(("the", "gunman"), [right]) == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))
    # The best precision and the best recall may come from different references.
    both = rouge_l(("a", "b"), [("a", "b", "c", "d"), ("a",)])
    assert both == pytest.approx(2.44 * 1 * 1 / (1 + 1.44))
    assert rouge_l((), [right]) == rouge_l(("x",), [right]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_corpus_bleu_is_that_of_torchmetrics(seed):
    from torchmetrics.functional.text import bleu_score

    predictions, references = a_test_set(seed=seed)
    texts = [" ".join(text) for text in predictions]
    right = [[" ".join(text) for text in row] for row in references]
    for order, value in enumerate(corpus_bleu(predictions, references), 1):
        expected = bleu_score(texts, right, n_gram=order)
        torch.testing.assert_close(torch.tensor(value, dtype=torch.float32), expected)
        assert value > 0


@pytest.mark.slow
def test_sentence_bleu_is_the_smoothed_one_of_torchmetrics():
    from torchmetrics.functional.text import bleu_score

    compared = 0
    for text, right in zip(*a_test_set(), strict=True):
        joined = [" ".join(each) for each in right]
        for order, value in enumerate(sentence_bleu(text, right), 1):
            expected = bleu_score([" ".join(text)], [joined], n_gram=order, smooth=True)
            if expected > 0:  # torchmetrics gives 0 where an order has no match, smoothed or not
                torch.testing.assert_close(torch.tensor(value, dtype=torch.float32), expected)
                compared += 1
    assert compared > 20


def test_bleu_by_hand():
    # 4 of 5 words, 2 of 4 pairs, 1 of 3 triples, no quadruple; one word shorter than the reference.
    prediction, right = ("a", "b", "c", "x", "e"), ("a", "b", "c", "d", "e", "f")
    short = math.exp(1 - 6 / 5)
    expected = [4 / 5, math.sqrt(4 / 5 * 2 / 4), (4 / 5 * 2 / 4 * 1 / 3) ** (1 / 3), 0]
    assert corpus_bleu([prediction], [[right]]) == pytest.approx(
        [short * each for each in expected]
    )
    smoothed = (4 / 5 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
    assert sentence_bleu(prediction, [right])[-1] == pytest.approx(short * smoothed)


def test_smoothing_lifts_no_order_that_an_answer_is_too_short_for():
    found = sentence_bleu(("a", "cat"), [("a", "red", "dog", "runs")])
    short = math.exp(1 - 4 / 2)
    assert found == pytest.approx([short / 2, short * math.sqrt(1 / 2 * 1 / 2), 0, 0])
    assert sentence_bleu(("a", "dog"), [("a", "dog")]) == pytest.approx([1, 1, 1, 1])


def test_orders_that_no_reference_reaches_are_left_out():
    assert corpus_bleu([("a", "dog")], [[("a", "dog")]]) == pytest.approx([1, 1, 1, 1])
    assert find_scorer("bleu").score(["A dog!"], [("a dog",)]).strict == pytest.approx(1)


def test_the_score_of_the_whole_is_not_the_mean_of_the_rows_in_bleu():
    references = [("a red bus stands at the stop",), ("two dogs play in the park",)]
    found = find_scorer("bleu").score(["a red bus stands", "a cat sleeps"], references)
    assert found.strict != pytest.approx(sum(found.strict_scores) / 2)
    assert found.extras["bleu-4"] == found.strict


def test_cider_is_a_tenth_of_the_formula_and_the_mean_of_its_rows():
    predictions, references = a_test_set()
    answers, right = (
        [" ".join(text) for text in predictions],
        [tuple(map(" ".join, row)) for row in references],
    )
    found = find_scorer("cider").score(answers, right)
    expected = [cider_by_loops(text, references, row) / 10 for row, text in enumerate(predictions)]
    assert found.strict_scores == pytest.approx(expected)
    assert found.strict == pytest.approx(sum(expected) / len(expected))
    assert found.extras["cider-d"] == pytest.approx(10 * found.strict)


def test_caption_is_the_mean_of_its_six_with_cider_cut_at_one():
    predictions, references = a_test_set()
    answers, right = (
        [" ".join(text) for text in predictions],
        [tuple(map(" ".join, row)) for row in references],
    )
    found = find_scorer("caption").score(answers, right)
    parts = dict(found.extras)
    assert list(parts) == ["bleu-1", "bleu-2", "bleu-3", "bleu-4", "rouge-l", "cider-d"]
    assert parts["cider-d"] > 1
    assert found.strict == pytest.approx((sum(parts.values()) - parts["cider-d"] + 1) / 6)


@pytest.mark.parametrize("name", ["bleu", "cider", "caption"])
def test_talk_around_a_caption_is_form_and_not_knowledge(name):
    references = [("a red bus stands at the stop",), ("two dogs play in the park",)]
    answers = ["Sure! Here it is: A red bus stands at the stop. Anything else?", references[1][0]]
    found = find_scorer(name).score(answers, references)
    assert found.lenient == pytest.approx(1)
    assert found.strict_scores[0] < 0.8
    assert found.strict < 0.9


@pytest.mark.parametrize("name", ["bleu", "cider", "caption"])
def test_punctuation_alone_says_nothing(name):
    found = find_scorer(name).score([".", "x"], [("!", "a dog runs"), ("...",)])
    assert (found.strict, found.lenient) == (0, 0)


def test_a_missing_sacrebleu_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(ImportError, match=r"not installed: pip install mmcl\[captions\]"):
        sentence_bleu(("a",), [("a",)])
