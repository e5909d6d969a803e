"""Property tests here draw the same examples in every run."""

from hypothesis import settings

settings.register_profile("clkit", derandomize=True, deadline=None, database=None)
settings.load_profile("clkit")
