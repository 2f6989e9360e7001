"""The same examples in every run, no time limits that a busy machine would break, no files left."""

import tempfile

import hypothesis
from hypothesis.configuration import set_hypothesis_home_dir

set_hypothesis_home_dir(tempfile.gettempdir())
hypothesis.settings.register_profile(
    "bounded",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("bounded")
