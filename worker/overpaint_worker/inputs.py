"""The pictures of a job, read from the store: its owner's inputs, and objects of buckets that may be read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from overpaint_shared.errors import InputError, StoreDenied, StoreMissing, StoreNoBucket
from overpaint_shared.headers.together import check_together
from overpaint_shared.job import JobSpec
from overpaint_shared.store import Store

IS_THERE: Final = "submit the job again with a picture that is there"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one owner's job may read."""

    store: Store
    owner: str
    max_bytes: int
    """Of one picture."""
    max_job_bytes: int
    """Of all pictures of a job."""
    again: Callable[[Callable[[], bytes]], bytes]
    """Calls, and calls again while the store is away."""

    def fetch(self, spec: JobSpec) -> dict[str, bytes]:
        """Each picture once, by its reference in the spec.

        Raises:
            InputError: one is not there, may not be read, or is too large, or all together are; by the field
                that names it.
            StoreError: the farm's own store fails, which is no fault of the job's.

        """
        found: dict[str, bytes] = {}
        for path, reference in spec.image_refs():
            if reference not in found:
                found[reference] = self._one(path, reference)
                costs = {name: len(data) for name, data in found.items()}
                check_together(spec, costs, self.max_job_bytes, "max_job_bytes")
        return found

    def _one(self, path: str, reference: str) -> bytes:
        kind, _, sha256 = reference.partition(":")
        try:
            if kind == "sha256":
                return self.again(lambda: self.store.get_input(self.owner, sha256, self.max_bytes))
            if reference.startswith("s3://"):
                return self.again(lambda: self._external(reference))
        except InputError as error:
            raise InputError(error.message, field=path, value=reference, fix=error.fix) from error
        except StoreMissing as error:
            raise InputError(
                f"the picture cannot be read: {error.message}", field=path, value=reference, fix=IS_THERE
            ) from error
        raise InputError(
            "a worker reads stored pictures only",
            field=path,
            value=reference,
            fix="submit with `overpaint submit`, which uploads files",
        )

    def _external(self, reference: str) -> bytes:
        """A picture of another bucket. Where that refuses, no other try helps, and S3 may be fine."""
        try:
            return self.store.read_external(reference, self.max_bytes)
        except (StoreDenied, StoreNoBucket) as error:
            self.store.ping()  # raises where S3 refuses this worker's key or clock
            raise InputError(f"the picture cannot be read: {error.message}", fix=IS_THERE) from error
