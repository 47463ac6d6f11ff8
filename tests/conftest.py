"""Fixtures that all tests share; each module says what it offers."""

import os
from importlib.util import find_spec

# Before torch is imported. Some bits depend on the number of threads, and on few cores several threads wait
# for each other longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["tests.device", "tests.weights"]
if find_spec("celery"):  # without the farm's clients, as on a borrowed GPU, what needs no farm still runs
    pytest_plugins += ["tests.servers", "tests.workers", "tests.shipped"]
