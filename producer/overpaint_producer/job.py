"""A job on a farm: followed, waited for, cancelled, replayed, and its files fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from overpaint_shared.errors import JobError, OverpaintError, ServiceError, SettingsError, UnknownJob
from overpaint_shared.ledger import Event, History, JobRecord
from overpaint_shared.ledger.states import LIVE, JobState, next_step

if TYPE_CHECKING:
    from PIL.Image import Image

    from overpaint_producer.client import Farm
    from overpaint_shared.catalogue import SpecWarning

MAX_RESULT_BYTES: Final = 1 << 30


class Job:
    """A job on a farm. Holds only its id: every call asks the ledger, which is the truth."""

    def __init__(
        self, farm: Farm, job_id: str, *, created: bool = False, warnings: tuple[SpecWarning, ...] = ()
    ) -> None:
        self._farm = farm
        self.id = job_id
        self.created = created
        """Whether this submit made it; False for a token that was known, and for `Farm.job`."""
        self.warnings = warnings
        """What the submit had to say about it."""

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    def status(self) -> JobRecord:
        """Its record: state, stage, step, times, result or error. Raises UnknownJob."""
        record = self._farm.ledger.job(self.id)
        if record is None:
            raise UnknownJob(
                f"there is no job {self.id}",
                field="job",
                value=self.id,
                fix="check the id with `overpaint jobs`; records of ended jobs are kept a day to a week",
            )
        return record

    def progress(self, timeout: float | None = None) -> Iterator[Event]:
        """Its states, stages and steps as they happen, until it has ended. Raises TimeoutError."""
        return self._farm.follow([self.id], timeout)

    def wait(self, timeout: float | None = None) -> JobRecord:
        """Its record once it has ended, however that was. Raises TimeoutError after `timeout` seconds."""
        for _ in self.progress(timeout):
            pass
        return self.status()

    def cancel(self) -> JobState:
        """Ask it to stop: `cancelled` at once if it waits, else `cancelling` until its worker has stopped.

        `running` where its result is committed already: it will be done.
        """
        released = self._farm.ledger.cancel(self.id)
        if released.state is None:
            return self.status().state  # raises UnknownJob
        self._publish(released.wakeups)
        return released.state

    def history(self) -> History:
        """How attempts at it ended that did not finish it, and what the engine said last."""
        return self._farm.ledger.history(self.id)

    def discard(self) -> None:
        """Remove the record of a failed or dead job, then the files that its attempts stored.

        Raises UnknownJob, and OverpaintError for a job that has not failed.
        """
        self._farm.ledger.discard(self.id)
        self._farm.store.delete_attempts(self.id)

    def replay(self) -> None:
        """Queue it again after it failed; raises OverpaintError in any other state."""
        self._publish(self._farm.ledger.replay(self.id))

    def image(self, timeout: float | None = None) -> Image:
        """Its picture, decoded, waiting for the job to end. Raises the job's own error if it failed."""
        from PIL import Image

        keys = self._keys(timeout)
        picture = Image.open(BytesIO(self._read(keys[picture_name(keys)])))
        picture.load()
        return picture

    def files(self, timeout: float | None = None) -> dict[str, bytes]:
        """Its files by name: `image.png`, `receipt.json`, previews if any. Waits and raises as `image`
        does.
        """
        return {name: self._read(key) for name, key in self._keys(timeout).items()}

    def links(self, expires_s: int = 3600, timeout: float | None = None) -> dict[str, str]:
        """An address for each file that anyone can GET for `expires_s` seconds. Waits and raises as `image`
        does.
        """
        keys = self._keys(timeout, "links")
        return {name: self._farm.store.link(key, expires_s) for name, key in keys.items()}

    def save(self, folder: str | Path, timeout: float | None = None) -> list[Path]:
        """Write its files into a folder, made if need be; their paths. Waits and raises as `image` does, and
        SettingsError where the folder cannot be written.
        """
        keys = self._keys(timeout)
        return [_written(Path(folder), name, self._read(key)) for name, key in keys.items()]

    def _keys(self, timeout: float | None, action: str = "get") -> dict[str, str]:
        """The keys of its files, by name. The audit trail is told, of a refusal too."""
        note = self._farm.ledger.note_fetch
        try:
            record = self._done(timeout)
        except ServiceError:
            raise
        except OverpaintError as error:
            note(action, self.id, None, error.code)
            raise
        note(action, self.id, record)
        return record.files

    def _done(self, timeout: float | None) -> JobRecord:
        record = self.status()
        return done(self.wait(timeout) if record.state in LIVE else record)

    def _read(self, key: str) -> bytes:
        return self._farm.store.get(key, MAX_RESULT_BYTES)

    def _publish(self, wakeups: Sequence[Any]) -> None:
        from overpaint_producer.submitting import wake

        if wakeups:
            wake(self._farm.app, wakeups)


def _written(folder: Path, name: str, data: bytes) -> Path:
    """Write one file, never partly. A name is a file's, never a way out of the folder."""
    path = folder / Path(name).name
    partial = path.with_name(path.name + ".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise SettingsError(
            f"cannot write {path}: {error.strerror}",
            field="folder",
            value=str(folder),
            fix="choose another folder, or make room",
        ) from error
    return path


def done(record: JobRecord) -> JobRecord:
    """The record of a job that ended `done`; for any other end, raises what it failed with."""
    if record.state is JobState.DONE:
        return record
    if record.error is not None:
        raise OverpaintError.from_json(record.error)
    why = f" ({record.fault})" if record.fault else ""
    raise JobError(
        f"job {record.id} is {record.state}{why}",
        field="job",
        value=record.id,
        fix=next_step(record.state, record.id),
    )


def picture_name(files: Mapping[str, str]) -> str:
    """The name of the picture among a result's files, whatever its format. Raises JobError where there is
    none.
    """
    for name in files:
        if name.rpartition(".")[0] == "image":
            return name
    raise JobError("the job's result holds no picture")
