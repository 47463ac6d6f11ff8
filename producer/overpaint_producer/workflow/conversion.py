"""A whole workflow: which of its outputs become jobs, and everything that stands in the way, told at once."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from overpaint_producer.workflow import graph as graphs
from overpaint_producer.workflow import latents, loaders, pictures
from overpaint_producer.workflow.assemble import Assembly, assemble
from overpaint_producer.workflow.graph import Graph, Node, Refused
from overpaint_producer.workflow.maskplace import SizeOf
from overpaint_producer.workflow.names import Names
from overpaint_producer.workflow.values import Rendered, Value
from overpaint_producer.workflow.walk import NodeKind, Walk, kind, unconsumed
from overpaint_shared.errors import Problem, SpecError
from overpaint_shared.job import JobSpec, parse_job
from overpaint_shared.spec.fields import nearest

MOST_OUTPUTS: Final = 64
MOST_PROBLEMS: Final = 20


def _nothing(_: Walk, __: Node) -> tuple[Value, ...]:
    """SaveImage and PreviewImage give nothing to other nodes."""
    return ()


OUTPUTS: Final[Mapping[str, NodeKind]] = {
    "SaveImage": kind(_nothing, "images filename_prefix", "a job"),
    "PreviewImage": kind(_nothing, "images", "a job"),
}
KINDS: Final[Mapping[str, NodeKind]] = {**loaders.KINDS, **pictures.KINDS, **latents.KINDS, **OUTPUTS}
"""Every class of nodes that is converted."""


@dataclass(frozen=True)
class WorkflowJob:
    """A job that a workflow became."""

    nodes: tuple[str, ...]
    """The ids of the SaveImage and PreviewImage nodes that show its picture."""
    spec: Mapping[str, Any]
    """JSON, in the order in which people write it."""
    mapped: tuple[Mapping[str, Any], ...]
    """For each node of the graph: `node`, `class_type`, and `becomes`, the paths in the spec."""
    notes: tuple[str, ...]
    """What people should know: names that were made up, where the job is stricter than the graph."""


@dataclass(frozen=True)
class Conversion:
    """What became of a workflow."""

    jobs: tuple[WorkflowJob, ...]
    notes: tuple[str, ...]
    """Of the workflow as a whole: previews that were left out."""


def convert(
    data: bytes | Mapping[str, Any],
    *,
    where: str = "workflow",
    names: Names | None = None,
    size_of: SizeOf = lambda _: None,
    reference: Callable[[str], str] = lambda file: file,
) -> Conversion:
    """The jobs of a ComfyUI workflow in API format, one for each picture that it saves or shows.

    `names` finds registry names for files, `size_of` tells the size of a picture that Load Image names, or
    None, and `reference` what a job calls that picture. Raises SpecError, its problems' paths as
    `node 12 (KSampler).sampler_name`: a file of another format, a class of nodes that is not converted, and
    whatever a job cannot say exactly.
    """
    graph = graphs.build(_object(data, where), where)
    shown, skipped = _outputs(graph, where)
    _require_known(graph, shown, where)
    found = _Conversion(graph, names or Names(), size_of, reference)
    jobs = [job for node in shown if (job := found.job(node)) is not None]
    if found.problems:
        unique = list(dict.fromkeys(found.problems))[:MOST_PROBLEMS]
        raise SpecError(f"{where} cannot be converted:", unique)
    notes = tuple(
        f"{node.said}: shows a picture that no sampler made; left out "
        "(a job's mask is stored with its result)"
        for node in skipped
    )
    return Conversion(tuple(_joined(jobs)), notes)


def _object(data: bytes | Mapping[str, Any], where: str) -> Mapping[str, Any]:
    value = graphs.decode(data, where) if isinstance(data, bytes) else data
    if not graphs.looks_like(value):
        raise SpecError(f"{where} is no ComfyUI workflow: no value in it has a class_type", fix=graphs.EXPORT)
    return value if isinstance(value, Mapping) else {}


def _outputs(graph: Graph, where: str) -> tuple[list[Node], list[Node]]:
    """The nodes that show what a sampler made, and the previews of anything else."""
    shown: list[Node] = []
    skipped: list[Node] = []
    for node in graph.nodes.values():
        if node.class_type not in OUTPUTS:
            continue
        sampled = any(
            graph.nodes[name].class_type in latents.SAMPLER_NODES for name in graph.feeding(node.id)
        )
        is_preview = node.class_type == "PreviewImage"
        (skipped if is_preview and not sampled else shown).append(node)
    if not shown:
        raise SpecError(
            f"{where} makes no picture: it has no {' or '.join(OUTPUTS)} after a sampler",
            fix="add a SaveImage after the VAEDecode",
        )
    if len(shown) > MOST_OUTPUTS:
        raise SpecError(f"{where} has {len(shown)} outputs; at most {MOST_OUTPUTS} are converted")
    return shown, skipped


def _require_known(graph: Graph, shown: Iterable[Node], where: str) -> None:
    """Refuse every node of an unknown class that a picture needs, or that may be an output of its own."""
    needed = {name for node in shown for name in graph.feeding(node.id)}
    ends = {node.id for node in unconsumed(graph)}
    problems = [
        Problem(
            path=node.said,
            message="is of a class that is not converted",
            given=f'"{node.class_type}"',
            suggestion=nearest(node.class_type, KINDS),
        )
        for node in graph.nodes.values()
        if node.class_type not in KINDS and node.id in needed | ends
    ]
    if problems:
        raise SpecError(
            f"{where} cannot be converted:",
            problems[:MOST_PROBLEMS],
            fix=f"converted are {', '.join(sorted(KINDS))}",
        )


class _Conversion:
    """One workflow on its way; collects what stands in the way of any output."""

    def __init__(self, graph: Graph, names: Names, size_of: SizeOf, reference: Callable[[str], str]) -> None:
        self.problems: list[Problem] = []
        self._graph = graph
        self._walk = Walk(graph, KINDS)
        self._names = names
        self._size_of = size_of
        self._reference = reference

    def job(self, node: Node) -> WorkflowJob | None:
        """The job of an output; None if there was a problem."""
        job = Assembly(self._names, self._size_of, self._reference)
        try:
            assemble(self._rendered(node), job)
            parse_job(job.spec, where=node.said)
        except Refused as error:
            self.problems.append(error.problem)
            return None
        except SpecError as error:
            self.problems += [_at_node(problem, job) for problem in error.problems]
            return None
        mapped = tuple(self._mapped(node, job))
        return WorkflowJob((node.id,), job.spec, mapped, tuple(dict.fromkeys(job.notes)))

    def _rendered(self, node: Node) -> Rendered:
        self._walk.kind(node)
        image = self._walk.image(node, "images")
        if not isinstance(image, Rendered):
            node.refuse("images", f"is made by {image.node.said}, not by a sampler", allowed="VAEDecode")
        return image

    def _mapped(self, output: Node, job: Assembly) -> Iterator[dict[str, Any]]:
        feeding = self._graph.feeding(output.id)
        paths: dict[str, list[str]] = {}
        for path, (node, _) in job.origins.items():
            paths.setdefault(node.id, []).append(path)
        for node in self._graph.nodes.values():
            if node.id in feeding:
                yield {"node": node.id, "class_type": node.class_type, "becomes": paths.get(node.id, [])}


def _at_node(problem: Problem, job: Assembly) -> Problem:
    """The same problem, told at the node that the value comes from."""
    fitting = [path for path in job.origins if _is_within(problem.path, path)]
    if not fitting:
        return problem
    node, name = job.origins[max(fitting, key=len)]
    return replace(problem, path=node.said if name is None else f"{node.said}.{name}")


def _is_within(path: str, part: str) -> bool:
    return path == part or path.startswith((f"{part}.", f"{part}["))


def _joined(jobs: Iterable[WorkflowJob]) -> Iterator[WorkflowJob]:
    """Each job once, with all the nodes that show it."""
    unique: dict[str, WorkflowJob] = {}
    for job in jobs:
        key = _canonical(job.spec)
        known = unique.get(key)
        unique[key] = job if known is None else replace(known, nodes=known.nodes + job.nodes)
    return iter(unique.values())


def _canonical(spec: Mapping[str, Any]) -> str:
    parsed: JobSpec = parse_job(spec)
    return parsed.to_json()
