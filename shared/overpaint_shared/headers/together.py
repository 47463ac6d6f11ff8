"""What all pictures of a job may come to together, before any of them is uploaded, fetched or decoded."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Literal

from overpaint_shared.errors import InputError

if TYPE_CHECKING:
    from overpaint_shared.job import JobSpec

Sum = Literal["max_job_bytes", "max_decoded_bytes"]
_WORDS: Final[dict[Sum, str]] = {"max_job_bytes": "of files", "max_decoded_bytes": "when decoded"}


def check_together(spec: "JobSpec", costs: Mapping[str, int], most: int, setting: Sum) -> None:
    """Raise InputError at the first picture with which a job's pictures cost more than `most` bytes.

    `costs`: by reference, of the pictures that are known; one that the job names twice counts once.
    `setting` is the limit's name.
    """
    total, counted = 0, set[str]()
    for field, reference in spec.image_refs():
        if reference in counted:
            continue
        counted.add(reference)
        total += costs.get(reference, 0)
        if total > most:
            raise InputError(
                f"with it the job's pictures come to {total} bytes {_WORDS[setting]}; {most} are allowed",
                field=field, value=total,
                fix=f"use smaller or fewer pictures, or let an operator raise OVERPAINT_{setting.upper()}",
            )  # fmt: skip
