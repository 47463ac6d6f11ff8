"""What is done to the farm: each kind of fault, and how it is undone."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any, Final

import redis

from overpaint_shared.errors import ServiceError
from overpaint_shared.queues import list_name
from tests.chaos.farm import Hurt, Life, children_of
from tests.chaos.plan import MODELS, Fault
from tests.chaos.producers import Producers
from tests.shipped import Server
from tests.unit.test_transport import HOSTILE

PATIENCE_S: Final = 15.0
REAL_EVERY: Final = 6
"""One of so many faults may hit a worker with the real engine, whose start takes this machine's cores."""
ITEMS: Final = [
    *(json.dumps(item).encode() for item in HOSTILE.values()),
    b"", b"\xff\xfe\x00", b"{", b"[" * 100_000, b'{"body": 1e999}', b"null",
    json.dumps({"body": "bnVsbA==", "headers": {"op_ts": 0}}).replace("0}", "9" * 400 + "}").encode(),
    b'{"body": "' + b"A" * 2_000_000 + b'"}',
]  # fmt: skip
ODD: Final = "odd-"
"""How the names of what is put into the ledger begin."""

Undo = Callable[[], None]


@dataclass
class Hit:
    """A fault that happened. Times are the clock's, so that they can be held against the logs."""

    fault: Fault
    began: float
    ended: float | None = None
    target: str = ""
    life: Life | None = None
    said: str = ""
    missed: bool = False

    def to_json(self) -> dict[str, Any]:
        """For a person who looks into it."""
        names = ("began", "ended", "target", "said", "missed")
        return {"kind": self.fault.kind} | {name: getattr(self, name) for name in names}


class Faults:
    """Does them. `begin` and `end` are called in one thread, which lives until all is over."""

    def __init__(self, hurt: Hurt, producers: Producers) -> None:
        self.hurt = hurt
        self.producers = producers
        self.hits: list[Hit] = []
        self.redis, self.s3 = hurt.on.redis, hurt.on.s3
        self.pool = ThreadPoolExecutor(24, thread_name_prefix="fault")
        self._undo: dict[int, Undo] = {}
        self._over = threading.Event()
        self._running: list[Future[None]] = []

    def begin(self, fault: Fault) -> Hit:
        """Let it happen."""
        hit = Hit(fault, time.time())
        self.hits.append(hit)
        do = getattr(self, "_" + fault.kind.replace(".", "_"))
        if fault.seconds or fault.kind.split(".")[0] in {"host", "worker", "engine"}:
            undo = do(hit)
            if undo is not None:
                self._undo[fault.number] = undo
        else:
            self._running.append(self.pool.submit(self._at_once, hit, do))
        return hit

    def end(self, hit: Hit) -> None:
        """Undo it."""
        undo = self._undo.pop(hit.fault.number, None)
        if undo is not None:
            undo()
            hit.ended = hit.ended or time.time()

    @property
    def pending(self) -> bool:
        """Whether one still tries to happen."""
        return any(not running.done() for running in self._running)

    def close(self) -> None:
        """Wait for what runs."""
        self._over.set()
        self.pool.shutdown(wait=True)

    def _at_once(self, hit: Hit, do: Callable[[Hit], str]) -> None:
        """Try until the servers let it happen."""
        last = time.monotonic() + PATIENCE_S
        while True:
            try:
                hit.said = do(hit)
                if hit.said:
                    break
            except (redis.RedisError, ServiceError) as error:
                hit.said = repr(error)[:200]
            except Exception as error:
                hit.said, hit.missed = f"UNEXPECTED {error!r}", True
                break
            if time.monotonic() > last or self._over.wait(0.2):
                hit.missed = True
                break
        hit.ended = time.time()

    # Workers and engines

    def _worker(self, hit: Hit) -> Life | None:
        """Who is hit: the plan's pick among those that are up."""
        up = [slot for slot in self.hurt.workers.slots if slot.open]
        slots = [slot for slot in up if slot.real] if hit.fault.number % REAL_EVERY == 0 else []
        slots = slots or [slot for slot in up if not slot.real]
        if not slots:
            hit.missed = True
            return None
        slot = slots[int(hit.fault.pick * len(slots))]
        hit.life, hit.target = slot.life, f"slot{slot.number}"
        return slot.life

    def _host_kill(self, hit: Hit) -> None:
        if life := self._worker(hit):
            life.hurt = hit.fault.kind
            hit.began = time.time()
            life.signal(signal.SIGKILL)

    def _worker_kill(self, hit: Hit) -> None:
        if life := self._worker(hit):
            life.hurt = hit.fault.kind
            hit.began = time.time()
            os.kill(life.pid, signal.SIGKILL)

    def _worker_freeze(self, hit: Hit) -> Undo | None:
        if not (life := self._worker(hit)):
            return None
        life.held = True
        life.signal(signal.SIGSTOP)

        def thaw() -> None:
            life.signal(signal.SIGCONT)
            life.held = False

        return thaw

    _worker_sleep = _worker_freeze

    def _worker_stop(self, hit: Hit) -> None:
        if life := self._worker(hit):
            life.hurt = hit.fault.kind
            os.kill(life.pid, signal.SIGTERM)

    def _engine_kill(self, hit: Hit) -> None:
        self._to_engine(hit, signal.SIGKILL)

    def _engine_hang(self, hit: Hit) -> None:
        self._to_engine(hit, signal.SIGSTOP)

    def _to_engine(self, hit: Hit, number: signal.Signals) -> None:
        if life := self._worker(hit):
            hit.began = time.time()
            try:
                os.kill(life.process.engine_pid, number)
            except ProcessLookupError:  # another fault was first
                hit.missed = True

    def _engine_spare(self, hit: Hit) -> None:
        """End every process of a worker but its engine."""
        if life := self._worker(hit):
            engine = life.process.engine_pid
            spares = [pid for pid in children_of(life.pid) if pid != engine]
            hit.said, hit.missed = f"{len(spares)} spares", not spares
            for pid in spares:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    # Redis

    def _away(self, hit: Hit, server: Server, back: Undo) -> Undo:
        """Undo by `back`, and note when it serves again."""

        def serve() -> None:
            while not server.answers() and not self._over.wait(0.05):
                pass
            hit.ended = time.time()

        def undo() -> None:
            back()
            hit.ended = time.time() + 3600  # until it serves
            self.pool.submit(serve)

        return undo

    def _again(self, server: Server) -> Undo:
        def start() -> None:
            assert server.child is not None
            server.child.process.wait(30)
            server.child = server.launch()

        return start

    def _redis_kill(self, hit: Hit) -> Undo:
        self.redis.kill()
        return self._away(hit, self.redis, self._again(self.redis))

    def _redis_stop(self, hit: Hit) -> Undo:
        assert self.redis.child is not None
        self.redis.child.process.terminate()
        return self._away(hit, self.redis, self._again(self.redis))

    def _redis_freeze(self, hit: Hit) -> Undo:
        self.redis.freeze()
        return self._away(hit, self.redis, self.redis.thaw)

    def _redis_rewrite_kill(self, hit: Hit) -> Undo:
        self._said("BGREWRITEAOF")
        return self._redis_kill(hit)

    def _redis_readonly(self, hit: Hit) -> Undo:
        self._said("REPLICAOF", "127.0.0.1", "1")  # nobody is there
        return self._away(hit, self.redis, lambda: self._said("REPLICAOF", "NO", "ONE"))

    def _redis_noreplicas(self, hit: Hit) -> Undo:
        return self._configured(hit, "min-replicas-to-write", "1")

    def _redis_full(self, hit: Hit) -> Undo:
        used = self._asked(lambda client: int(client.info("memory")["used_memory"]))
        return self._configured(hit, "maxmemory", str(used * 9 // 10))

    def _configured(self, hit: Hit, name: str, value: str) -> Undo:
        before = self._asked(lambda client: client.config_get(name)[name])
        self._said("CONFIG", "SET", name, value)
        return self._away(hit, self.redis, lambda: self._said("CONFIG", "SET", name, before))

    def _said(self, *words: str) -> None:
        self._asked(lambda client: client.execute_command(*words))

    def _asked(self, call: Callable[["redis.Redis"], Any]) -> Any:
        """What must go through: the server may still load its data."""
        last = time.monotonic() + PATIENCE_S
        while True:
            with suppress(redis.RedisError), self.redis.client() as client:
                return call(client)
            assert time.monotonic() < last, "Redis does not come back"
            time.sleep(0.05)

    def _redis_rewrite(self, _hit: Hit) -> str:
        with self.redis.client() as client:
            return str(client.bgrewriteaof())

    def _redis_forget(self, _hit: Hit) -> str:
        with self.redis.client() as client:
            return f"scripts: {client.script_flush()}"

    def _redis_cut(self, _hit: Hit) -> str:
        with self.redis.client() as client:
            count = sum(
                int(client.client_kill_filter(_type=kind, skipme=True)) for kind in ("normal", "pubsub")
            )
        return f"{count} connections"

    # S3

    def _s3_kill(self, hit: Hit) -> Undo:
        self.s3.kill()
        return self._away(hit, self.s3, self._again(self.s3))

    def _s3_stop(self, hit: Hit) -> Undo:
        assert self.s3.child is not None
        self.s3.child.process.terminate()
        return self._away(hit, self.s3, self._again(self.s3))

    def _s3_freeze(self, hit: Hit) -> Undo:
        self.s3.freeze()
        return self._away(hit, self.s3, self.s3.thaw)

    # Messages

    def _lists(self, client: "redis.Redis") -> list[str]:
        """The lists of messages that hold some, as soon as there are such."""
        last = time.monotonic() + PATIENCE_S / 2
        while True:
            found = sorted(key for key in client.scan_iter("m.*", count=1000) if client.type(key) == "list")
            if found or time.monotonic() > last or self._over.wait(0.003):
                return found

    def _message_drop(self, hit: Hit) -> str:
        with self.redis.client() as client:
            gone = [client.rpop(key, 2) for key in self._lists(client)]
        count = sum(len(items) for items in gone if items)
        return f"{count} messages" if count else ""

    def _message_double(self, hit: Hit) -> str:
        with self.redis.client() as client:
            for key in self._lists(client):
                if item := client.lindex(key, 0):
                    client.lpush(key, item, item)
                    return f"one of {key} twice more"
        return ""

    def _message_hostile(self, hit: Hit) -> str:
        dice = Random(hit.fault.pick)
        key = list_name(dice.choice(MODELS), dice.choice((0, 5, 9)))
        with self.redis.client() as client:
            client.lpush(key, *dice.sample(ITEMS, 4))
        return f"4 into {key}"

    # The ledger

    def _ledger_odd(self, hit: Hit) -> str:
        name = f"{ODD}{hit.fault.number}"
        with self.redis.client() as client:
            said = [
                put(client, name)
                for put in (self._ended_lease, self._no_hash, self._no_lane, self._no_worker)
            ]
        return ", ".join(said) if all(said) else ""

    @staticmethod
    def _ended_lease(client: "redis.Redis", _name: str) -> str:
        done = client.zrange("op:state:done", 0, 0)
        for job in done:
            client.zadd("op:leases", {job: 1.0})
        return f"the lease of {done[0]}, which is done" if done else ""

    @staticmethod
    def _no_hash(client: "redis.Redis", name: str) -> str:
        client.set(f"op:job:{name}", "text")
        lane = f"3:{MODELS[0]}:ann"
        for key in ("op:leases", f"op:queued:{MODELS[0]}", f"op:sent:{lane}", "op:expiry"):
            client.zadd(key, {name: 1.0})
        client.zadd("op:lanes", {lane: 0.0}, nx=True)  # so that a reaper comes by
        return f"op:job:{name} is text"

    @staticmethod
    def _no_lane(client: "redis.Redis", name: str) -> str:
        client.zadd("op:lanes", {name: 0.0, f"x:{name}": 0.0, "": 0.0})
        return "lanes that are none"

    @staticmethod
    def _no_worker(client: "redis.Redis", name: str) -> str:
        client.hset(f"op:worker:{name}", mapping={"name": name, "record": "{}"})
        client.sadd("op:workers", name)
        return f"op:worker:{name} is empty"

    # Producers

    def _submit_cut(self, hit: Hit) -> str:
        return self.producers.cut(self.producers.plan.jobs[hit.fault.jobs[0]]) if hit.fault.jobs else ""

    def _job_cancel(self, hit: Hit) -> str:
        return self.producers.cancel(self.producers.plan.jobs[hit.fault.jobs[0]]) if hit.fault.jobs else ""

    def _job_replay(self, hit: Hit) -> str:
        return self.producers.replay(hit.fault.pick)

    def _gc(self, hit: Hit) -> str:
        """Collect while jobs are submitted that name what is about to be collected."""
        for number in hit.fault.jobs:
            self.pool.submit(self.producers.submit, self.producers.plan.jobs[number])
        return self.producers.collect()
