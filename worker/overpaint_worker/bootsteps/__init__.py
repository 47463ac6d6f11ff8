"""Where the worker's parts are hooked into Celery's start and stop."""

import types

from celery import Celery
from celery.bootsteps import StartStopStep

from overpaint_worker.bootsteps.drain import DrainStep
from overpaint_worker.bootsteps.engine import EngineStep
from overpaint_worker.bootsteps.reaper import ReaperStep
from overpaint_worker.node import Node


def install(app: Celery, node: Node) -> None:
    """Add the steps of one worker to its app. Celery makes the steps itself, so each gets a class with its
    node.
    """
    app.steps["worker"].add(_with_node(EngineStep, node))
    app.steps["worker"].add(_with_node(ReaperStep, node))
    app.steps["consumer"].add(_with_node(DrainStep, node))


def _with_node(step: type[StartStopStep], node: Node) -> type[StartStopStep]:
    # Not `class ... (step)`: Celery tells steps apart by module and name.
    named = {"node": node, "__module__": step.__module__, "__qualname__": step.__qualname__}
    return types.new_class(step.__name__, (step,), exec_body=lambda body: body.update(named))


__all__ = ["DrainStep", "EngineStep", "ReaperStep", "install"]
