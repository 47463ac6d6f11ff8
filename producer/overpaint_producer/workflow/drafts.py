"""Workflow files among job files: recognised by their shape, and turned into the drafts of their jobs."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from overpaint_producer.headers import size_of
from overpaint_producer.jobfiles import Draft
from overpaint_producer.workflow import graph
from overpaint_producer.workflow.conversion import Conversion, convert
from overpaint_producer.workflow.names import Names
from overpaint_shared.offers import Catalogue

_MARKS = (b'"class_type"', b'"nodes"')


def workflow_in(draft: Draft) -> Mapping[str, Any] | None:
    """The draft's JSON if it is a ComfyUI workflow, in whichever format; None for anything else."""
    data: Any = draft.data
    if isinstance(data, bytes):
        if not any(mark in data for mark in _MARKS):  # spares thousands of jobs a second parse
            return None
        try:
            data = json.loads(data)
        except (ValueError, RecursionError):
            return None  # the spec's own parser says what is wrong
    return data if graph.looks_like(data) else None


class Importer:
    """Makes drafts of workflows. What is not a workflow passes as it is."""

    def __init__(
        self,
        *,
        mapped: Mapping[str, str],
        input_dir: Path | None = None,
        catalogue: Callable[[], Catalogue | None] = lambda: None,
        tell: Callable[[str], None] = lambda _: None,
        may_guess: bool = True,
    ) -> None:
        """`catalogue` is asked once, when the first workflow comes; `tell` gets each note once.

        `may_guess`: without live workers, name models after their files; else that is refused.
        """
        self._mapped = mapped
        self._input_dir = input_dir
        self._catalogue = catalogue
        self._tell = cache(tell)
        self._may_guess = may_guess

    @cached_property
    def names(self) -> Names:
        """How files get the names of the registry."""
        return Names(self._catalogue(), self._mapped, may_guess=self._may_guess)

    def expand(self, draft: Draft) -> Iterator[Draft]:
        """The drafts of a workflow's jobs; of anything else, itself. Raises SpecError."""
        workflow = workflow_in(draft)
        if workflow is None:
            yield draft
            return
        found = self.convert(draft, workflow)
        for note in (*found.notes, *(note for job in found.jobs for note in job.notes)):
            self._tell(note)
        for job in found.jobs:
            where = draft.where if len(found.jobs) == 1 else f"{draft.where}, node {job.nodes[0]}"
            yield replace(draft, data=dict(job.spec), where=where)

    def convert(self, draft: Draft, workflow: Mapping[str, Any] | None = None) -> Conversion:
        """What becomes of a workflow's file. Raises SpecError."""
        data = draft.data if workflow is None else workflow
        folder = self._input_dir or draft.folder
        return convert(
            data,
            where=draft.where,
            names=self.names,
            size_of=cache(lambda file: size_of(folder / file)),
            reference=self._reference,
        )

    def _reference(self, file: str) -> str:
        """Job files name pictures from their own folder; those of the input folder get their whole path."""
        return file if self._input_dir is None else str(self._input_dir.absolute() / file)
