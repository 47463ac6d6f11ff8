"""What an engine was at, read from memory that may hold anything."""

import json
import os
import random
import struct
import threading
import zlib

import pytest

from overpaint_worker.evidence import SLOT_BYTES, SLOTS, AtWork, Evidence, EvidenceMemory, at_work

HEAD = struct.Struct("=QII")


class Pair:
    """Both sides of one memory, in one process."""

    def __init__(self) -> None:
        self.memory = EvidenceMemory()
        self.evidence = Evidence(os.dup(self.memory.descriptor))

    def bytes(self) -> bytearray:
        return bytearray(os.pread(self.memory.descriptor, SLOTS * SLOT_BYTES, 0))


@pytest.fixture
def pair():
    made = Pair()
    yield made
    made.memory.close()


def slot(body: object, number: int = 2, crc: int | None = None, length: int | None = None) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    crc = zlib.crc32(data) if crc is None else crc
    head = HEAD.pack(number, len(data) if length is None else length, crc)
    return (head + data).ljust(SLOT_BYTES, b"\0")


def memory(*slots: bytes) -> bytes:
    return b"".join(slots).ljust(SLOTS * SLOT_BYTES, b"\0")


def test_an_engine_that_has_done_nothing_yet_is_at_nothing(pair):
    assert pair.memory.read() == AtWork()


def test_what_is_begun_is_read_and_what_is_over_is_not(pair):
    with pair.evidence.working("denoise", [("a", 1), ("b", 7)]):
        assert pair.memory.read() == AtWork(attempts=frozenset({("a", 1), ("b", 7)}))
    assert pair.memory.read() == AtWork()
    with pytest.raises(KeyError), pair.evidence.working("load", [("a", 1)]):
        raise KeyError
    assert pair.memory.read() == AtWork()


def test_an_engine_rests_only_while_no_thread_works(pair):
    pair.evidence.idle()
    assert pair.memory.read() == AtWork(rests=True)
    begun, over = threading.Event(), threading.Event()

    def prepare() -> None:
        with pair.evidence.working("prepare", [("a", 1)]):
            begun.set()
            over.wait(10)

    thread = threading.Thread(target=prepare)
    thread.start()
    assert begun.wait(10)
    assert pair.memory.read() == AtWork(attempts=frozenset({("a", 1)}))
    over.set()
    thread.join()
    assert pair.memory.read() == AtWork(rests=True)


def test_the_frame_in_hand_has_its_number(pair):
    for number in (1, 2):
        with pair.evidence.taking():
            found = pair.memory.read()
            assert found == AtWork(frames=frozenset({number}))
            assert found.has(("unknown", 0), number)
            assert not found.has(("unknown", 0), 0)


def test_the_jobs_of_the_largest_unit_fit_and_more_than_fit_are_not_told_wrongly(pair):
    many = [(f"{number:064}", 10**9) for number in range(16)]
    with pair.evidence.working("denoise", many):
        assert pair.memory.read() == AtWork(attempts=frozenset(many))
    with pair.evidence.working("denoise", [("x" * SLOT_BYTES, 1)]):
        assert pair.memory.read() is None
    assert pair.memory.read() == AtWork()


def test_a_slot_that_was_being_written_says_that_its_thread_was_at_nothing():
    torn = slot(["denoise", [["a", 1]], 0], number=3)
    other = slot(["prepare", [["b", 1]], 0])
    assert at_work(memory(torn, other)) == AtWork(attempts=frozenset({("b", 1)}))


def test_each_write_is_seen_as_torn_at_each_of_its_steps(pair, monkeypatch):
    seen = []
    real = zlib.crc32
    monkeypatch.setattr(
        "overpaint_worker.evidence.zlib.crc32", lambda body: seen.append(pair.bytes()) or real(body)
    )
    with pair.evidence.working("denoise", [("a", 1)]):
        pass
    monkeypatch.undo()
    assert [at_work(bytes(found)) for found in seen] == [AtWork(), AtWork()]
    assert all(HEAD.unpack_from(found)[0] % 2 for found in seen)


@pytest.mark.parametrize(
    "damaged",
    [
        slot(b"not JSON"),
        slot(b"[" * 10_000),
        slot(b"9" * 5_000),
        slot(b"\xff\xfe"),
        slot({"a": 1}),
        slot(["denoise"]),
        slot(["denoise", [["a", 1]], 0, 0]),
        slot(["denoise", ["a"], 0]),
        slot(["denoise", [["a", "1"]], 0]),
        slot(["denoise", [[["a"], 1]], 0]),
        slot(["denoise", [["a", True]], 0]),
        slot(["denoise", 5, 0]),
        slot([5, [], 0]),
        slot(["take", [], [1]]),
        slot(["denoise", [["a", 1]], 0], crc=1),
        slot(["denoise", [["a", 1]], 0], length=SLOT_BYTES),
        slot(["denoise", [["a", 1]], 0], length=2**32 - 1),
    ],
    ids=range(17),
)
def test_what_no_engine_writes_is_not_believed(damaged):
    assert at_work(memory(slot(["denoise", [["a", 1]], 0]), damaged)) is None


def test_random_bytes_raise_nothing():
    dice = random.Random(7)
    for _ in range(200):
        at_work(memory(*(dice.randbytes(SLOT_BYTES) for _ in range(2))))
        start = slot(["denoise", [["a", 1]], 0])[: dice.randrange(SLOT_BYTES)]
        at_work(memory(start + dice.randbytes(SLOT_BYTES - len(start))))


@pytest.mark.parametrize("size", [0, 100, SLOT_BYTES])
def test_memory_that_the_engine_has_cut_short_is_not_believed(pair, size):
    with pair.evidence.working("denoise", [("a", 1)]):
        os.ftruncate(pair.memory.descriptor, size)
        assert pair.memory.read() is None
        os.ftruncate(pair.memory.descriptor, SLOTS * SLOT_BYTES)


def test_it_costs_no_more_than_some_microseconds():
    import time

    evidence = Evidence()
    jobs = [(f"{number:032}", 1) for number in range(8)]
    began = time.thread_time()
    for _ in range(2_000):
        with evidence.working("denoise", jobs):
            pass
    assert time.thread_time() - began < 2_000 * 200e-6
