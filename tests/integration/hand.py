"""A worker worked by hand: it announces itself, claims, tells steps and commits, through the real ledger and
store.

For tests of the producer, which must not need an engine.
"""

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from PIL import Image

from overpaint_producer.client import Farm
from overpaint_shared.catalogue import ModelTraits
from overpaint_shared.job import FEATURES, ModelDefaults
from overpaint_shared.ledger import Beat, Cancelled, Claim, Done, Failed, ReleaseReason, WorkerRecord

DEFAULTS = ModelDefaults(steps=4, cfg=7.0, sampler="euler", scheduler="normal", size=64)
TINY = ModelTraits(name="tiny", kind="model", family="sd", sha256="a" * 64, channels=4, defaults=DEFAULTS)


def png(size: tuple[int, int] = (64, 48), colour: str = "red") -> bytes:
    """A picture of one colour."""
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def job(**changes: Any) -> dict[str, Any]:
    """The JSON of a small job."""
    return {
        "version": 1,
        "model": "tiny",
        "source": {"image": "photo.png"},
        "method": {"kind": "img2img"},
        "sampling": {"seed": 7, "steps": 4},
    } | changes


@dataclass
class Hand:
    """One worker."""

    farm: Farm
    id: str = field(default_factory=lambda: str(uuid4()))

    def announce(self, *traits: ModelTraits) -> None:
        """Be alive, with these registry entries (default: the model `tiny`)."""
        offered = traits or (TINY,)
        self.farm.ledger.announce(
            WorkerRecord(
                id=self.id,
                name="hand@here",
                host="here",
                device="cpu",
                slots=2,
                version="0",
                features=frozenset(FEATURES),
                catalogue=tuple(each.to_json() for each in offered),
                models=tuple(each.name for each in offered if each.kind == "model"),
            ),
            ttl=600,
        )

    def claim(self, job_id: str) -> Claim:
        """Take a job."""
        claim = self.farm.ledger.claim(job_id, self.id)
        assert claim.verdict == "ok"
        return claim

    def step(self, job_id: str, token: int, step: int, of: int = 4, stage: str = "denoise") -> str:
        """Renew and tell a step; what the ledger says."""
        return self.farm.ledger.renew(self.id, [Beat(job_id, token, stage, step, of)])[job_id]

    def commit(self, job_id: str, token: int, files: Mapping[str, bytes] | None = None) -> None:
        """Store files, as the worker does, and finish."""
        store = self.farm.store
        files = {"image.png": png(), "receipt.json": b"{}"} if files is None else files
        keys = {
            name: store.put_result(job_id, token, name, data, "image/png") for name, data in files.items()
        }
        assert self.farm.ledger.finish(job_id, token, Done({"files": keys, "summary": {}})).accepted

    def render(self, job_id: str) -> int:
        """All of it; the token."""
        token = self.claim(job_id).token
        self.step(job_id, token, 2)
        self.commit(job_id, token)
        return token

    def fail(self, job_id: str, error: Mapping[str, Any]) -> None:
        """Claim and fail."""
        assert self.farm.ledger.finish(job_id, self.claim(job_id).token, Failed(error)).accepted

    def confirm_cancel(self, job_id: str, token: int) -> None:
        """The step loop has stopped."""
        assert self.farm.ledger.finish(job_id, token, Cancelled()).accepted

    def crash(self, job_id: str, token: int) -> None:
        """The engine died with the job in it."""
        self.farm.ledger.release(job_id, token, ReleaseReason.CRASHED, "signal 11")


def spec_of(farm: Farm, job_id: str) -> Any:
    """The spec as the ledger keeps it."""
    record = farm.ledger.job(job_id)
    assert record is not None
    assert record.spec_json is not None
    return json.loads(record.spec_json)


@contextmanager
def working(farm: Farm) -> Iterator[Hand]:
    """An announced worker."""
    hand = Hand(farm)
    hand.announce()
    yield hand
    farm.ledger.retire(hand.id)
