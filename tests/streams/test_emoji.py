import hashlib
import io
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mmcl.core.task import TaskStream
from mmcl.streams import emoji_table
from mmcl.streams.emoji import CARDS, augment, build, merge_years
from mmcl.streams.emoji_table import LANGUAGES, EmojiFont, choose, find_font, names_of, read_emoji
from mmcl.streams.registry import STREAMS, find_stream


@pytest.fixture(scope="module")
def font():
    try:
        return EmojiFont(find_font())
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cards(font, tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    return build(folder, font.path, per_group=4, train_per_class=2, test_per_class=1)


def read_samples(shards):
    samples = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


@pytest.mark.parametrize(
    ("character", "group", "version", "year"),
    [
        ("\U0001f98b", "animals", "3.0", 2016),  # butterfly
        ("\U0001fae0", "smileys", "14.0", 2021),  # melting face
        ("\U0001f34e", "food", "0.6", 2010),  # red apple
        ("\U0001f9a9", "animals", "12.0", 2019),  # flamingo
        ("\U0001fa77", "smileys", "15.0", 2022),  # pink heart
        ("\U0001f43f\ufe0f", "animals", "0.7", 2014),  # chipmunk
        ("\U0001f996", "animals", "5.0", 2017),  # T-Rex
        ("\U0001f3c1", "symbols", "0.6", 2010),  # chequered flag
    ],
)
def test_group_and_year_are_those_of_unicode(character, group, version, year):
    (one,) = (one for one in read_emoji() if one.text == character)
    assert (one.group, one.version, one.year) == (group, version, year)


def test_no_emoji_stands_twice_in_the_table():
    table = read_emoji()
    assert len(table) == len({one.text[0] for one in table}) == 1377


def test_every_emoji_of_the_table_has_a_clean_name_in_at_least_eight_languages():
    assert len(LANGUAGES) >= 8
    table = read_emoji()
    for one in table:
        names = names_of(one)
        assert set(names) == set(LANGUAGES)
        assert all(name and not {":", "_"} & {name[0], *name} for name in names.values()), names
    assert len({names_of(one)["en"] for one in table}) == len(table)


def test_a_red_apple_is_called_so():
    (apple,) = (one for one in read_emoji() if one.slug == "1f34e")
    names = names_of(apple)
    assert (names["en"], names["de"], names["fr"]) == ("red apple", "roter apfel", "pomme rouge")
    assert (names["ru"], names["zh"]) == ("красное яблоко", "红苹果")


def test_the_choice_takes_turns_over_years_and_subgroups():
    chosen = choose(read_emoji(), per_group=24)
    assert set(Counter(one.group for one in chosen).values()) == {24}
    years = Counter(one.year for one in chosen)
    assert min(years.values()) >= 8
    assert max(years.values()) <= 32
    assert len({one.subgroup for one in chosen}) > 60
    assert set(choose(read_emoji(), per_group=5)) <= set(chosen)


def test_a_choice_of_no_classes_is_refused():
    with pytest.raises(ValueError, match="per_group is 0: give 1 or more, or None"):
        choose(read_emoji(), per_group=0)


def test_small_years_join_the_next_and_a_small_last_one_the_one_before():
    years = [2010] * 10 + [2014] * 1 + [2015] * 10 + [2016] * 10 + [2017] * 1
    assert merge_years(years) == [[2010], [2014, 2015], [2016, 2017]]
    assert merge_years([2010]) == [[2010]]


def test_a_machine_without_a_font_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji_table, "FOLDERS", (str(tmp_path),))
    monkeypatch.setattr(emoji_table.shutil, "which", lambda _: None)
    with pytest.raises(FileNotFoundError, match="apt install fonts-noto-color-emoji.* --font"):
        find_font()
    with pytest.raises(FileNotFoundError, match="nothing.ttf is not a file: install one"):
        EmojiFont(tmp_path / "nothing.ttf")


def test_a_file_that_is_no_color_font_is_named(tmp_path):
    (tmp_path / "not.ttf").write_bytes(b"not a font")
    with pytest.raises(ValueError, match="not.ttf has no colored emoji that Pillow can draw"):
        EmojiFont(tmp_path / "not.ttf")


def test_the_font_gives_square_images_and_nothing_for_what_it_lacks(font):
    image = font.image("\U0001f98b")
    assert image.mode == "RGBA"
    assert image.width == image.height > 30
    red, _, blue, alpha = (np.asarray(channel, dtype=int) for channel in image.split())
    # Butterflies of all makers are colored; a grey one would be the outline of another font.
    assert np.abs(red - blue)[alpha > 200].mean() > 20
    assert font.image("\U0010ffff") is None
    assert font.image(" ") is None


def test_an_augmented_glyph_is_there_and_depends_on_its_generator_alone():
    glyph = Image.new("RGBA", (100, 100), (255, 0, 0, 255))
    images = [np.asarray(augment(glyph, np.random.default_rng(seed))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0] != images[2]).any()
    for seed in range(50):
        image = np.asarray(augment(glyph, np.random.default_rng(seed)))
        assert image.shape == (64, 64, 3)
        # A square of at least 0.55 of the side fills 30 % unless a turn puts corners outside.
        assert (image == (255, 0, 0)).all(axis=-1).mean() > 0.25


def test_three_cards_name_the_same_shards_in_three_orders(cards):
    assert tuple(card.name for card in cards) == CARDS
    groups, years, languages = (TaskStream.read(card) for card in cards)
    assert (groups.scenario, years.scenario, languages.scenario) == ("class", "class", "domain")
    shards = set(groups.hashes)
    for stream in (groups, years):
        listed = [shard for task in stream for shard in (*task.train, *task.test)]
        assert sorted(listed) == sorted(shards)
        assert stream.hashes == groups.hashes
    for task in languages:
        assert {*task.train, *task.test} == shards
        assert task.task_type == "captioning"
    assert [task.name for task in languages] == list(LANGUAGES)
    assert [task.text_field for task in languages][:2] == ["txt", "de.txt"]
    assert {path.name for path in cards[0].parent.iterdir()} == (
        {*shards, *CARDS, "emoji.build.json"}
    )


def test_counts_hashes_and_labels_on_the_cards_are_true(cards):
    facts = {names_of(one)["en"]: one for one in read_emoji()}
    for card in cards[:2]:
        stream = TaskStream.read(card)
        for task in stream:
            train = read_samples(stream.shard(name) for name in task.train)
            test = read_samples(stream.shard(name) for name in task.test)
            assert (len(train), len(test)) == (task.size, task.test_size)
            assert not train.keys() & test.keys()
            for sample in (*train.values(), *test.values()):
                name = sample["txt"].decode()
                column = task.label_to_class[int(sample["cls"])]
                assert stream.classes_seen(task.index)[column] == name
                assert name in task.classes
                assert str(getattr(facts[name], card.stem.removeprefix("emoji_").rstrip("s"))) in (
                    task.name
                )
        for shard, sha256 in stream.hashes.items():
            assert hashlib.sha256((card.parent / shard).read_bytes()).hexdigest() == sha256


def test_every_sample_has_an_image_of_its_own_and_a_name_in_every_language(cards):
    stream = TaskStream.read(cards[2])
    samples = read_samples(stream.shard(name) for name in (*stream[0].train, *stream[0].test))
    assert len(samples) == 8 * 4 * 3
    members = {"png", "cls", *(task.text_field for task in stream)}
    assert all(sample.keys() == members for sample in samples.values())
    assert all(all(sample.values()) for sample in samples.values())
    assert len({sample["png"] for sample in samples.values()}) == len(samples)
    assert Image.open(io.BytesIO(samples["1f347-train-000"]["png"])).size == (64, 64)
    assert samples["1f347-train-000"]["de.txt"].decode() == "trauben"


@pytest.mark.slow
def test_a_second_build_gives_the_same_bytes_and_another_seed_others(cards, font, tmp_path):
    sizes = {"per_group": 4, "train_per_class": 2, "test_per_class": 1}
    build(tmp_path / "again", font.path, **sizes)
    build(tmp_path / "other", font.path, seed=1, **sizes)
    for path in cards[0].parent.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
        if path.suffix == ".tar":
            assert (tmp_path / "other" / path.name).read_bytes() != path.read_bytes()


@pytest.mark.parametrize("part", ["train", "test"])
def test_no_images_for_a_class_is_refused(tmp_path, part):
    with pytest.raises(ValueError, match=f"{part}_per_class is 0: give 1 or more"):
        build(tmp_path, **{f"{part}_per_class": 0})


def test_a_card_finds_its_builder_and_an_unknown_name_lists_the_known_ones():
    assert find_stream("emoji_years") == (STREAMS["emoji"], "emoji_years.yaml")
    assert find_stream("emoji") == (STREAMS["emoji"], "emoji_groups.yaml")
    assert STREAMS["emoji"].builder() is build
    assert find_stream("digits") == (STREAMS["digits"], "digits.yaml")
    known = ", ".join((*STREAMS, "emoji_groups", "emoji_years", "emoji_languages"))
    with pytest.raises(ValueError, match=f"no stream 'emoij' can be built: choose one of {known}"):
        find_stream("emoij")


def test_the_table_names_the_cards_that_the_glyph_builder_writes(tmp_path):
    card = STREAMS["glyphs"].builder()(tmp_path, train=1, test=1)
    assert (card.name,) == STREAMS["glyphs"].cards
