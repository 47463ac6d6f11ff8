"""Fixtures that all tests share; each module says what it offers."""

from importlib.util import find_spec

pytest_plugins = ["tests.device", "tests.weights"]
if find_spec("celery"):  # without the farm's clients, as on a borrowed GPU, what needs no farm still runs
    pytest_plugins += ["tests.servers", "tests.workers", "tests.shipped"]
