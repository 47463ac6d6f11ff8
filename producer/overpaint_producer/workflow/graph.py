"""A ComfyUI workflow in API format as a checked graph: nodes by id, and typed ways to read their inputs.

Nothing here knows what a node means. A graph comes from anywhere, so its size is bounded, and whatever is
wrong with it is a `Problem` whose path names the node: `node 12 (KSampler).sampler_name`.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from overpaint_shared.errors import Problem, SpecError, shorten
from overpaint_shared.spec.fields import nearest

LARGEST_WORKFLOW_BYTES: Final = 4 << 20
MOST_NODES: Final = 1000
MOST_INPUTS: Final = 100
LONGEST_ID: Final = 64

UI_ONLY: Final = frozenset({"upload", "choose file to upload", "control_after_generate"})
"""Inputs that the editor writes for itself and no node reads."""

EXPORT: Final = (
    "in ComfyUI, export it with Workflow > Export (API); in older versions switch on the developer options "
    "in the settings, then use Save (API Format)"
)


class Refused(Exception):
    """A graph, or one output of it, cannot be a job."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True)
class Link:
    """One output of another node."""

    node: str
    slot: int


@dataclass(frozen=True, eq=False)
class Node:
    """One node. Readers of its inputs raise `Refused` for what is missing, of the wrong type or beyond."""

    id: str
    class_type: str
    inputs: Mapping[str, Any]

    @property
    def said(self) -> str:
        """How messages name it."""
        return f"node {self.id} ({self.class_type})"

    def refuse(
        self,
        name: str | None,
        message: str,
        *,
        given: str | None = None,
        allowed: str | None = None,
        suggestion: str | None = None,
    ) -> NoReturn:
        """Raise `Refused` at this node, or at one of its inputs."""
        path = self.said if name is None else f"{self.said}.{name}"
        raise Refused(
            Problem(path=path, message=message, given=given, allowed=allowed, suggestion=suggestion)
        )

    def has(self, name: str) -> bool:
        """Whether the input is there."""
        return name in self.inputs

    def link(self, name: str) -> Link:
        """The output that the input takes."""
        value = self._there(name, "a link to another node's output")
        found = as_link(value)
        if found is None:
            self.refuse(
                name,
                "is no link",
                given=shorten(value, 80),
                allowed='a link to another node\'s output, ["4", 0]',
            )
        return found

    def text(self, name: str) -> str:
        """A text."""
        value = self._value(name, "a text")
        if not isinstance(value, str):
            self._wrong_type(name, value, "a text")
        return value

    def file(self, name: str) -> str:
        """The name of a file, its parts divided by `/`."""
        text = self.text(name).replace("\\", "/").strip()
        if not text:
            self.refuse(name, "is empty", given='""', allowed="the name of a file")
        return text

    def choice(self, name: str, options: Sequence[str], default: str | None = None) -> str:
        """One of several words."""
        if default is not None and name not in self.inputs:
            return default
        value = self.text(name)
        if value not in options:
            self.refuse(
                name,
                "is not known here",
                given=shorten(value, 80),
                allowed=", ".join(options),
                suggestion=nearest(value, options),
            )
        return value

    def whole(self, name: str, least: int, most: int, default: int | None = None) -> int:
        """A whole number within bounds; `20.0` is one."""
        if default is not None and name not in self.inputs:
            return default
        value = self._value(name, "a whole number")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self._wrong_type(name, value, "a whole number")
        if not least <= value <= most:
            self._out_of_range(name, value, least, most)
        return value

    def number(self, name: str, least: float, most: float, default: float | None = None) -> float:
        """A finite number within bounds."""
        if default is not None and name not in self.inputs:
            return default
        value = self._value(name, "a number")
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._wrong_type(name, value, "a number")
        if isinstance(value, float) and not math.isfinite(value):
            self._wrong_type(name, value, "a finite number")
        if not least <= value <= most:
            self._out_of_range(name, value, least, most)
        return float(value)

    def flag(self, name: str, *, default: bool | None = None) -> bool:
        """True or false."""
        if default is not None and name not in self.inputs:
            return default
        value = self._value(name, "true or false")
        if not isinstance(value, bool):
            self._wrong_type(name, value, "true or false")
        return value

    def _there(self, name: str, allowed: str) -> Any:
        if name not in self.inputs:
            self.refuse(name, "is missing", allowed=allowed)
        return self.inputs[name]

    def _value(self, name: str, allowed: str) -> Any:
        """What stands at an input that holds a value, not a link."""
        value = self._there(name, allowed)
        if as_link(value) is not None:
            self.refuse(
                name,
                f"is computed by node {shorten(value[0], LONGEST_ID)}; only values are converted here",
                given=shorten(value, 80),
                allowed=f"{allowed}, written at the node itself",
            )
        return value

    def _wrong_type(self, name: str, value: object, allowed: str) -> NoReturn:
        self.refuse(name, "is of the wrong type", given=shorten(value, 80), allowed=allowed)

    def _out_of_range(self, name: str, value: float, least: float, most: float) -> NoReturn:
        self.refuse(name, "is out of range", given=shorten(value, 80), allowed=f"{least:.20g} to {most:.20g}")


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes by id, in the file's order."""

    nodes: Mapping[str, Node]

    def feeding(self, start: str) -> set[str]:
        """The ids of a node and of all that it needs, directly or not; links to nothing are left out."""
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            name = waiting.pop()
            if name in seen or name not in self.nodes:
                continue
            seen.add(name)
            waiting += [link.node for link in links(self.nodes[name])]
        return seen


def links(node: Node) -> Iterator[Link]:
    """Every link among a node's inputs."""
    for value in node.inputs.values():
        if (link := as_link(value)) is not None:
            yield link


def as_link(value: object) -> Link | None:
    """`["4", 0]` as a link; None for anything else."""
    if (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and type(value[1]) is int
        and 0 <= value[1] < 1000
    ):
        return Link(value[0], value[1])
    return None


def looks_like(data: object) -> bool:
    """Whether a decoded file is a ComfyUI workflow, in whichever of its formats."""
    return isinstance(data, dict) and (_is_ui(data) or _is_api(data) or _is_api(data.get("prompt")))


def _is_ui(data: Mapping[str, Any]) -> bool:
    return isinstance(data.get("nodes"), list) and "links" in data


def _is_api(data: object) -> bool:
    """Whether any of the values is a node: one wrong node leaves a workflow a workflow."""
    return (
        isinstance(data, dict)
        and "model" not in data
        and any(isinstance(node, dict) and "class_type" in node for node in data.values())
    )


def decode(data: bytes, where: str) -> Any:
    """The JSON value of a file. Raises SpecError."""
    if len(data) > LARGEST_WORKFLOW_BYTES:
        raise SpecError(
            f"{where} is too large: {len(data)} bytes",
            fix=f"a workflow has at most {LARGEST_WORKFLOW_BYTES} bytes",
        )
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SpecError(
            f"{where} is not JSON: {shorten(str(error), 120)}", fix="export the workflow again"
        ) from None


def build(data: Mapping[str, Any], where: str) -> Graph:
    """The graph of a decoded file. Raises SpecError, with every node that is no node."""
    if _is_ui(data):
        raise SpecError(
            f"{where} is a ComfyUI workflow in the editor's own format, which leaves out what the nodes' "
            "inputs are called",
            fix=EXPORT,
        )
    inner = data.get("prompt")
    nodes = inner if isinstance(inner, dict) and not _is_api(data) else data
    if len(nodes) > MOST_NODES:
        raise SpecError(f"{where} has {len(nodes)} nodes; at most {MOST_NODES} are converted")
    problems: list[Problem] = []
    graph = {}
    for name, node in nodes.items():
        try:
            graph[name] = _node(name, node)
        except Refused as error:
            problems.append(error.problem)
    if problems:
        raise SpecError(f"{where} is no workflow in API format:", problems, fix=EXPORT)
    return Graph(graph)


def _node(name: str, data: object) -> Node:
    path = f"node {shorten(name, LONGEST_ID)[1:-1]}"
    if len(name) > LONGEST_ID or not name.isprintable():
        raise Refused(
            Problem(path=path, message="has an id that is none", allowed=f"{LONGEST_ID} characters")
        )
    if not isinstance(data, dict):
        raise Refused(
            Problem(
                path=path, message="is no node", given=shorten(data, 80), allowed='{"class_type", "inputs"}'
            )
        )
    kind, inputs = data.get("class_type"), data.get("inputs", {})
    if not isinstance(kind, str) or not 0 < len(kind) <= 200 or not kind.isprintable():
        raise Refused(
            Problem(path=f"{path}.class_type", message="is no class of nodes", given=shorten(kind, 80))
        )
    if not isinstance(inputs, dict) or len(inputs) > MOST_INPUTS:
        raise Refused(
            Problem(
                path=f"{path}.inputs",
                message="is no object of inputs",
                given=shorten(inputs, 80),
                allowed=f"at most {MOST_INPUTS} inputs",
            )
        )
    return Node(name, kind, inputs)
