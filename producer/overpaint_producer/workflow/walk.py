"""The way back through a graph: what an output of a node is, found from what its inputs are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NoReturn, TypeVar

from overpaint_producer.workflow.graph import UI_ONLY, Graph, Link, Node, links
from overpaint_producer.workflow.values import (
    Encoded,
    Hint,
    Image,
    Latent,
    Picture,
    Rendered,
    Sampled,
    Shown,
    Value,
    said,
)
from overpaint_shared.spec.fields import nearest

V = TypeVar("V", bound=Value)

LONGEST_CHAIN: Final = 100
"""Nodes in a row: more than any person draws, and far from Python's own limit."""


@dataclass(frozen=True)
class NodeKind:
    """What is known of a class of nodes."""

    convert: Callable[[Walk, Node], tuple[Value, ...]]
    """The node's outputs, in order."""
    inputs: frozenset[str]
    """Every input that means something to it."""
    becomes: str
    """What it becomes in a job, for people."""


def kind(convert: Callable[[Walk, Node], tuple[Value, ...]], inputs: str, becomes: str) -> NodeKind:
    """A row of a table of classes; `inputs` are divided by spaces."""
    return NodeKind(convert=convert, inputs=frozenset(inputs.split()), becomes=becomes)


class Walk:
    """Evaluates outputs, each node once. Raises `Refused` for cycles, dead links and wrong types."""

    def __init__(self, graph: Graph, kinds: Mapping[str, NodeKind]) -> None:
        self._graph = graph
        self._kinds = kinds
        self._known: dict[str, tuple[Value, ...]] = {}
        self._path: list[str] = []

    def take(self, node: Node, name: str, kind: type[V]) -> V:
        """The value at a node's input, which must be of this type."""
        value = self._value(node, name)
        if not isinstance(value, kind):
            self._wrong(node, name, value, (kind,))
        return value

    def image(self, node: Node, name: str) -> Image:
        """The IMAGE at a node's input."""
        value = self._value(node, name)
        if not isinstance(value, Picture | Rendered | Hint | Shown):
            self._wrong(node, name, value, (Picture,))
        return value

    def latent(self, node: Node, name: str) -> Latent:
        """The LATENT at a node's input."""
        value = self._value(node, name)
        if not isinstance(value, Encoded | Sampled):
            self._wrong(node, name, value, (Encoded,))
        return value

    def _value(self, node: Node, name: str) -> Value:
        return self._output(node, name, node.link(name))

    def _wrong(self, node: Node, name: str, value: Value, kinds: tuple[type, ...]) -> NoReturn:
        link = node.link(name)
        node.refuse(
            name,
            f"takes {said(kinds)}, and output {link.slot} of {self._graph.nodes[link.node].said} is "
            f"{said([type(value)])}",
            given=_written(link),
        )

    def _output(self, node: Node, name: str, link: Link) -> Value:
        source = self._graph.nodes.get(link.node)
        if source is None:
            node.refuse(
                name,
                f"leads to node {link.node!r}, which is not there",
                given=_written(link),
            )
        outputs = self._outputs(source)
        if link.slot >= len(outputs):
            node.refuse(
                name,
                f"asks for output {link.slot} of {source.said}, which has {len(outputs)}",
                given=_written(link),
                allowed=f"0 to {len(outputs) - 1}" if outputs else "a node that has outputs",
            )
        return outputs[link.slot]

    def _outputs(self, node: Node) -> tuple[Value, ...]:
        if node.id in self._known:
            return self._known[node.id]
        if node.id in self._path:
            circle = [*self._path[self._path.index(node.id) :], node.id]
            node.refuse(
                None, f"depends on itself: {' <- '.join(circle[:12])}", allowed="links without a circle"
            )
        if len(self._path) >= LONGEST_CHAIN:
            node.refuse(None, "is at the end of too long a chain", allowed=f"{LONGEST_CHAIN} nodes in a row")
        known = self.kind(node)
        self._path.append(node.id)
        try:
            outputs = known.convert(self, node)
        finally:
            self._path.pop()
        self._known[node.id] = outputs
        return outputs

    def kind(self, node: Node) -> NodeKind:
        """What is known of the node's class; its inputs hold no others than are known."""
        known = self._kinds.get(node.class_type)
        if known is None:
            node.refuse(
                None,
                "is of a class that is not converted",
                given=f'"{node.class_type}"',
                allowed=", ".join(sorted(self._kinds)),
                suggestion=nearest(node.class_type, self._kinds),
            )
        for name in node.inputs:
            if name not in known.inputs and name not in UI_ONLY:
                node.refuse(
                    name[:64],
                    "is an input that is not known here, so what it changes is not either",
                    allowed=", ".join(sorted(known.inputs)),
                )
        return known


def _written(link: Link) -> str:
    return f'["{link.node}", {link.slot}]'


def unconsumed(graph: Graph) -> list[Node]:
    """The nodes that no other node takes anything from."""
    taken = {link.node for node in graph.nodes.values() for link in links(node)}
    return [node for node in graph.nodes.values() if node.id not in taken]
