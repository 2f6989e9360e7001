"""SmolVLM's processor spells numbers of video frames by a package that images do not need."""

import pytest
from transformers.models.smolvlm import processing_smolvlm


@pytest.fixture(scope="session", autouse=True)
def _spelt_numbers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing_smolvlm, "num2words", str)
        yield
