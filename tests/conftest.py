"""For all tests: hypothesis sets no time limit, since a busy machine is no error of ours."""

from hypothesis import settings

settings.register_profile("polystill", deadline=None)
settings.load_profile("polystill")
