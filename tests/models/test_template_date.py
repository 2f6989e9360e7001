"""Chat templates with dates: a run keeps its day, and says so where it is another."""

import datetime

import pytest

from mmcl.core import Conversation, Turn
from mmcl.models import ImageTextToText
from mmcl.models.hf_vlm import loading
from tests.models.small_vlms import write_model

HI = Conversation((Turn("user", "hi"), Turn("assistant", "x")), ("x",))


@pytest.fixture
def today(monkeypatch):
    """Set the clock to a day."""

    def set_to(day):
        class Clock(datetime.date):
            @classmethod
            def today(cls):
                return datetime.date.fromisoformat(day)

        monkeypatch.setattr(loading, "date", Clock)

    return set_to


def dated(folder, architecture="qwen2_5_vl"):
    """A model whose chat template begins with the date."""
    write_model(folder, architecture)
    file = folder / "chat_template.jinja"
    file.write_text("Today: {{ strftime_now('%d %b %Y') }}\n" + file.read_text())
    return str(folder)


def prompt(model):
    tokens = model.transform(False)(None, HI, 0).input_ids
    return model.processor.tokenizer.decode(tokens).partition("\n")[0]


def test_a_day_that_is_given_is_written_on_every_day(tmp_path, today):
    folder = dated(tmp_path)
    today("2026-12-01")
    assert prompt(ImageTextToText(folder)) == "Today: 01 Dec 2026"
    for day in ("2026-12-01", "2027-01-05"):
        today(day)
        model = ImageTextToText(folder, template_date="2024-02-29")
        assert prompt(model) == "Today: 29 Feb 2024"
        assert model.template_date == "2024-02-29"


def test_a_checkpoint_brings_its_day_and_says_so(tmp_path, today):
    folder = dated(tmp_path)
    today("2026-12-01")
    first = ImageTextToText(folder)
    today("2026-12-02")
    second = ImageTextToText(folder)
    assert prompt(second) == "Today: 02 Dec 2026"
    with pytest.warns(
        UserWarning, match="now writes the date 2026-12-01, to which this checkpoint"
    ):
        second.load_state_dict(first.state_dict())
    assert prompt(second) == prompt(first)
    second.load_state_dict(first.state_dict())  # the same day needs no word


def test_a_saved_model_keeps_its_day_and_says_so(tmp_path, today):
    today("2026-12-01")
    model = ImageTextToText(dated(tmp_path / "chat"))
    loading.save_pretrained(model.lm, model.processor, tmp_path / "saved")
    today("2027-03-04")
    with pytest.warns(UserWarning, match="of this model writes the date 2026-12-01"):
        loaded = ImageTextToText(str(tmp_path / "saved"))
    assert prompt(loaded) == "Today: 01 Dec 2026"
    other = ImageTextToText(str(tmp_path / "saved"), template_date="2027-03-04")
    assert prompt(other) == "Today: 04 Mar 2027"


def test_a_day_for_a_template_without_dates_is_refused(tmp_path):
    folder = str(write_model(tmp_path, "qwen2_5_vl"))
    with pytest.raises(
        ValueError, match="template_date is '2026-12-01', and the chat template wri"
    ):
        ImageTextToText(folder, template_date="2026-12-01")
    plain = ImageTextToText(folder)
    assert plain.template_date is None
    assert not any("template_date" in name for name in plain.state_dict())
