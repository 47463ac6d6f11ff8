"""Fixtures that all tests share; each module says what it offers."""

pytest_plugins = ["tests.servers", "tests.weights", "tests.workers"]
