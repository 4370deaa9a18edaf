"""What holds for all tests: no example of a property is timed, since a busy machine would fail it."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
