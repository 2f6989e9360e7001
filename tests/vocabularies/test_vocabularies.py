"""The shipped vocabularies are trained again, byte for byte."""

import gzip

import pytest

from tests.vocabularies import clip_vocabulary, llava_vocabulary
from tests.vocabularies.bpe import learn_merges, merge_pair, split_word


def split_words(weights):
    return {split_word(word, "</w>"): weight for word, weight in weights.items()}


def test_the_most_frequent_pair_is_merged_first():
    # "low" 5 times and "lot" 2 times: l-o 7, o-w 5, o-t 2; after the merge lo-w 5, lo-t 2.
    merges = learn_merges(split_words({"low": 5, "lot": 2}), 3)
    assert merges == [("l", "o"), ("lo", "w</w>"), ("lo", "t</w>")]


def test_equal_counts_go_in_alphabetical_order():
    merges = learn_merges(split_words({"cd": 1, "ab": 1}), 2)
    assert merges == [("a", "b</w>"), ("c", "d</w>")]


def test_without_a_count_merging_ends_when_every_word_is_one_token():
    # a-b 3 times, b-c twice, then ab-c twice.
    assert learn_merges({split_word("abc"): 2, split_word("ab"): 1}) == [("a", "b"), ("ab", "c")]


def test_a_pair_is_joined_from_left_to_right():
    assert merge_pair(("a", "a", "a", "b"), ("a", "a")) == ("aa", "a", "b")


def test_a_word_outside_ascii_is_split_into_bytes():
    assert len(split_word("ü")) == len("ü".encode())
    assert split_word("ab", "</w>") == ("a", "b</w>")


def test_no_two_merges_spell_the_same_string():
    merges = learn_merges(split_words(clip_vocabulary.count_words()), 120)
    assert len({first + second for first, second in merges}) == 120


def test_words_that_are_used_up_name_the_largest_number_of_merges():
    with pytest.raises(ValueError, match=r"give 2 merges, count is 9.*at most 2"):
        learn_merges(split_words({"abc": 1}), 9)


@pytest.mark.slow
def test_the_vocabulary_of_the_tiny_clip_is_trained_again(tmp_path):
    tokens = clip_vocabulary.write_vocabulary(tmp_path / "bpe.txt.gz")
    assert tokens == 512 + clip_vocabulary.MERGES + 2
    files = (tmp_path / "bpe.txt.gz", clip_vocabulary.FILE)
    trained, shipped = (gzip.decompress(file.read_bytes()) for file in files)
    assert trained == shipped


def test_the_tokenizer_of_the_tiny_llava_is_trained_again_byte_for_byte(tmp_path):
    llava_vocabulary.write_tokenizer(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == llava_vocabulary.FILE.read_bytes()
