"""A picture under the name that its job gave it (`output.key`), written once the job is committed.

Of jobs with one name the one that was submitted last keeps it; the ledger knows which (`Ledger.named`). Until
the picture has its name the job is committed but not done. Any worker can finish that: this one, or the one
whose reaper finds that this one is gone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeGuard

from overpaint_shared.errors import DamagedRecord, StoreError
from overpaint_shared.ledger import Done, Failed, Finished, JobRecord, Ledger, Outcome
from overpaint_shared.store import Store
from overpaint_shared.store_errors import is_final
from overpaint_shared.store_keys import name_of, named_key

CONTENT_TYPES: Final[Mapping[str, str]] = {
    "png": "image/png",
    "webp": "image/webp",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "json": "application/json",
}
PICTURE: Final = "image."
MAX_PICTURE_BYTES: Final = 1 << 30
MAX_REPAIRS: Final = 5


def content_type(name: str) -> str:
    """Of a file of a result."""
    return CONTENT_TYPES.get(name.rpartition(".")[2], "application/octet-stream")


@dataclass(frozen=True)
class Named:
    """A committed job's picture and its name."""

    job: str
    owner: str
    name: str
    content_type: str
    data: bytes

    def write(self, store: Store, ledger: Ledger) -> None:
        """Store it under its name, unless a later job has that. Raises ServiceError."""
        picture: Named | None = self
        for _ in range(MAX_REPAIRS):
            if picture is None or not picture._put(store, ledger):  # noqa: SLF001  # our own
                return
            holder = ledger.named(self.owner, self.name)
            if holder in {None, picture.job}:
                return
            # A later job took the name while we wrote, and S3 may not have noticed: write its picture again.
            record = ledger.job(str(holder))
            picture = read(store, record) if record else None

    def _put(self, store: Store, ledger: Ledger) -> bool:
        return store.put_named(
            self.owner,
            self.name,
            self.data,
            self.content_type,
            allowed=lambda: ledger.named(self.owner, self.name) in {None, self.job},
        )


def read(store: Store, record: JobRecord) -> Named | None:
    """The picture of a committed job, out of the store; None where its result names none."""
    files, key = record.files, (record.result or {}).get("key")
    picture = next((name for name in files if name.startswith(PICTURE)), None)
    if picture is None or not _is_name(key, record.owner):
        return None
    data = store.get(files[picture], MAX_PICTURE_BYTES)
    return Named(record.id, record.owner, name_of(key, record.owner), content_type(picture), data)


def complete(store: Store, ledger: Ledger, job_id: str) -> Finished | None:
    """Finish a committed job whose worker was lost; None if there is nothing left to do."""
    record = ledger.job(job_id)
    if record is None or not record.naming:
        return None
    return ledger.finish(job_id, record.token, _written(store, ledger, record))


def _written(store: Store, ledger: Ledger, record: JobRecord) -> Outcome:
    """How a committed job ends, its picture written."""
    try:
        picture = read(store, record)
        if picture is None:
            raise _unreadable(record)
        picture.write(store, ledger)
    except StoreError as error:
        if not is_final(error):
            raise
        return Failed(error.to_json())
    except DamagedRecord as error:
        return Failed(error.to_json())
    return Done(record.result or {})


def _unreadable(record: JobRecord) -> DamagedRecord:
    return DamagedRecord(
        f"the result of job {record.id} in its record names no picture",
        field="job",
        value=record.id,
        fix="replay the job",
    )


def _is_name(key: object, owner: str) -> TypeGuard[str]:
    """Whether a picture can be stored under the key."""
    try:
        return isinstance(key, str) and named_key(owner, name_of(key, owner)) == key
    except ValueError:
        return False
