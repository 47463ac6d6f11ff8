"""`overpaint up`, as typed: what it starts, what it says, and that it leaves nothing behind."""

import json
import os
import random
import signal
import stat
import subprocess
import sysconfig
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from urllib.error import HTTPError

import boto3
import psutil
import pytest
import redis
from PIL import Image, ImageChops, ImageStat

from overpaint_producer.children import guarded
from overpaint_producer.demo import MASK, SCENE
from overpaint_producer.local import GRACE_S
from overpaint_producer.services import S3Service, start_s3
from tests.waiting import wait_until

OVERPAINT = str(Path(sysconfig.get_path("scripts")) / "overpaint")
LEAVE_S = 60
Environment = dict[str, str]


@pytest.fixture
def nothing_set() -> Environment:
    """An environment that names no farm."""
    return {k: v for k, v in os.environ.items() if not k.startswith("OVERPAINT_")} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def servers_given(
    nothing_set: Environment, redis_url: str, s3_server: S3Service, s3_bucket: str
) -> Environment:
    """An environment that names the tests' own Redis and S3."""
    return nothing_set | {
        "OVERPAINT_REDIS_URL": redis_url,
        "OVERPAINT_S3_ENDPOINT_URL": s3_server.endpoint_url,
        "OVERPAINT_S3_BUCKET": s3_bucket,
        "OVERPAINT_S3_ACCESS_KEY": s3_server.access_key,
        "OVERPAINT_S3_SECRET_KEY": s3_server.secret_key,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory."""
    return tmp_path


class Up:
    """A running `overpaint up --json`."""

    def __init__(self, process: "subprocess.Popen[str]", errors: Path) -> None:
        self.process = process
        self._errors = errors
        self.ready = self.event()
        assert self.ready["event"] == "ready", self.ready
        self.family = psutil.Process(process.pid).children(recursive=True)

    def event(self) -> dict:
        """The next line of JSON."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.said
        return json.loads(line)

    @property
    def said(self) -> str:
        """What it wrote for people."""
        return self._errors.read_text()

    def part(self, word: str) -> psutil.Process:
        """The one child whose command line holds `word`."""
        (found,) = [each for each in self.family if word in " ".join(each.cmdline())]
        return found

    def left(self) -> list[psutil.Process]:
        """Those of its processes that have not ended within a while."""
        return psutil.wait_procs(self.family, timeout=LEAVE_S)[1]


@contextmanager
def started(folder: Path, environment: Environment, *options: str) -> Iterator[Up]:
    errors = folder / "errors.txt"
    with errors.open("w") as err:
        process = subprocess.Popen(
            guarded([OVERPAINT, "up", "--json", *options]),  # a test run that is killed leaves none, either
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=err, text=True,
        )  # fmt: skip
    try:
        yield Up(process, errors)
    finally:
        process.kill()  # its children end with it
        process.communicate()


def typed(folder: Path, environment: Environment, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [OVERPAINT, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def moment(line: str) -> datetime:
    """When a line was logged."""
    return datetime.fromisoformat(line.split(maxsplit=1)[0])


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two RGB pictures, 8-bit levels."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


def test_up_once_renders_the_demo_into_s3_and_onto_disk_and_leaves_nothing(
    tmp_path: Path, nothing_set: Environment
) -> None:
    with started(tmp_path, nothing_set, "--once") as up:
        demo = up.event()
        assert up.process.wait(LEAVE_S) == 0, up.said
        assert up.left() == []

    scene, outside = Image.open(SCENE).convert("RGB"), Image.open(MASK).point(lambda level: 255 - level)
    pictures = {Path(path).stem: Image.open(path) for path in demo["pictures"]}
    assert list(pictures) == [
        "img2img-0.3", "img2img-0.6", "vae-encode-inpaint", "latent-noise-mask", "controlnet-inpaint",
        "inpaint-model", "clipseg",
    ]  # fmt: skip
    assert {(picture.size, picture.mode) for picture in pictures.values()} == {(scene.size, "RGB")}
    assert difference(pictures["img2img-0.3"], scene) < difference(pictures["img2img-0.6"], scene)
    for name, picture in pictures.items():
        assert difference(picture, scene) > 2, f"{name}: the cat must change"
        if "img2img" not in name and name != "clipseg":
            kept = [Image.composite(each, Image.new("RGB", each.size), outside) for each in (picture, scene)]
            assert difference(*kept) == 0, f"{name}: outside the mask nothing may change"
    with Image.open(demo["sheet"]) as sheet:
        assert sheet.width > 5 * 320
        assert sheet.height > 2 * 320

    s3 = start_s3(tmp_path / "overpaint-data" / "s3")  # what was stored must outlive the farm
    try:
        keys = {"aws_access_key_id": s3.access_key, "aws_secret_access_key": s3.secret_key}
        client = boto3.client("s3", endpoint_url=s3.endpoint_url, region_name="us-east-1", **keys)
        for key, path in zip(demo["keys"], demo["pictures"], strict=True):
            assert client.get_object(Bucket=s3.bucket, Key=key)["Body"].read() == Path(path).read_bytes()
    finally:
        s3.kill()


def test_a_running_farm_is_found_by_other_commands_and_refuses_a_second_one(
    folder: Path, nothing_set: Environment
) -> None:
    with started(folder, nothing_set, "--no-demo") as up:
        config = folder / "overpaint-data" / "farm.toml"
        assert stat.S_IMODE(config.stat().st_mode) == 0o600
        assert (
            len([each for each in up.family if each.name() in ("redis-server", "valkey-server", "weed")]) == 2
        )

        workers = typed(folder, nothing_set, "workers", "--json")
        assert workers.returncode == 0, workers.stderr
        assert json.loads(workers.stdout.splitlines()[0])["models"] == ["mini", "mini-inpaint"]

        second = typed(folder, nothing_set, "up", "--once")
        assert second.returncode == 2
        assert f"process {up.process.pid}" in second.stderr

        url, _, password = up.ready["parts"]["Flower"].partition(", user operator, password ")
        with pytest.raises(HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/", timeout=10)  # noqa: S310 - the farm's own
        manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        manager.add_password(None, url, "operator", password)
        known = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(manager))
        assert known.open(f"{url}/", timeout=10).status == 200

        for each in up.family:
            assert password not in " ".join(each.cmdline())

        up.process.send_signal(signal.SIGTERM)
        assert up.process.wait(LEAVE_S) == 0, up.said
        assert up.left() == []
        assert not config.exists()
        stops = [
            line.removeprefix("stopping ") for line in up.said.splitlines() if line.startswith("stopping")
        ]
        assert stops == ["Flower", "worker", "S3", "Redis"]


def test_stopping_says_what_it_waits_for_and_a_second_ctrl_c_gives_it_back(
    folder: Path, servers_given: Environment
) -> None:
    Image.new("RGB", (256, 256), "teal").save(folder / "photo.png")
    long = {"version": 1, "model": "mini", "source": {"image": "photo.png"}, "method": {"kind": "img2img"}}
    (folder / "job.json").write_text(json.dumps(long | {"sampling": {"steps": 1000, "seed": 1}}))

    def shown(*words: str) -> dict:
        return json.loads(typed(folder, servers_given, *words, "--json").stdout)

    with started(folder, servers_given, "--no-demo") as up:
        submitted = shown("submit", "job.json")["id"]
        wait_until(lambda: shown("status", submitted)["step"], 60)
        up.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping worker" in up.said, 30)
        assert "10 s to finish 1 job, and gives back" in up.said
        assert "Ctrl-C again" in up.said
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(LEAVE_S) == 0, up.said
        assert up.left() == []
    record = shown("status", submitted)
    assert (record["state"], record["crashes"], record["lost_hosts"]) == ("queued", 0, 0)
    log = (folder / "overpaint-data" / "logs" / "worker.log").read_text()
    drained = [moment(line) for line in log.splitlines() if "draining" in line or "releasing" in line]
    assert drained[1] - drained[0] < timedelta(seconds=GRACE_S)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--registry", "models.toml"), "models.sd15.path: sd15: there is no such file or folder"),
        (("--device", "cuda:99"), "there is no device"),
    ],
)
def test_a_worker_that_cannot_render_is_told_at_the_start_in_a_few_lines(
    options: tuple[str, ...], said: str, folder: Path, servers_given: Environment
) -> None:
    (folder / "models.toml").write_text('[models.sd15]\nfamily = "sd"\npath = "nope.safetensors"\n')
    ended = typed(folder, servers_given, "up", *options)
    assert ended.returncode == 3, ended.stderr
    assert ended.stderr.count(said) == 1
    assert len(ended.stderr.splitlines()) < 10


def test_servers_that_are_given_are_used_and_left_running(
    folder: Path, servers_given: Environment, redis_client: redis.Redis
) -> None:
    with started(folder, servers_given, "--no-demo") as up:
        assert not [each for each in up.family if each.name() in ("redis-server", "valkey-server", "weed")]
        assert redis_client.keys("op:*"), "the worker announces itself in the Redis that was given"
        assert "yours" in up.ready["parts"]["Redis"]

        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(LEAVE_S) == 0, up.said
        assert up.left() == []
    assert redis_client.ping()


def test_parts_that_end_by_themselves_are_started_again_and_the_farm_goes_on(
    folder: Path, nothing_set: Environment
) -> None:
    Image.new("RGB", (64, 64), "teal").save(folder / "photo.png")
    spec = {"version": 1, "model": "mini", "source": {"image": "photo.png"}, "method": {"kind": "img2img"}}
    (folder / "job.json").write_text(json.dumps(spec | {"sampling": {"steps": 2, "seed": 1}}))
    names = {"valkey-server": "Redis", "weed": "S3", "overpaint-worker": "worker", "flower": "Flower"}
    with started(folder, nothing_set, "--no-demo") as up:
        for doomed in [up.part(word) for word in names]:
            doomed.kill()
        for name in names.values():
            wait_until(
                lambda n=name: f"{n} ended by itself (status -9)" in up.said.replace("S3 (SeaweedFS)", "S3")
            )
            wait_until(lambda n=name: f"{n} was started again" in up.said.replace("S3 (SeaweedFS)", "S3"))
        waited = typed(folder, nothing_set, "submit", "job.json", "--wait")
        assert waited.returncode == 0, waited.stderr
        up.family = psutil.Process(up.process.pid).children(recursive=True)
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(LEAVE_S) == 0, up.said
        assert up.left() == []


def test_no_process_outlives_an_up_that_is_killed(folder: Path, nothing_set: Environment) -> None:
    with started(folder, nothing_set, "--no-demo") as up:
        assert len(up.family) >= 5, "Redis, S3, the worker, its engine, Flower"
        up.process.kill()
        assert up.left() == []


def living_in(folder: Path) -> list[str]:
    """The command lines of all processes that work in the folder, or name it."""
    found = []
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            words = " ".join(each.cmdline())  # Redis writes its own, without folders
            if each.status() != psutil.STATUS_ZOMBIE and str(folder) in f"{words} {each.cwd()}":
                found.append(words)
    return found


def kill_while_it_starts(folder: Path, environment: Environment, so_many: int, later_s: float) -> None:
    """Start `up` and SIGKILL it when so many of its processes have begun, and a little later."""
    with (folder / "errors.txt").open("w") as err:
        up = subprocess.Popen(
            guarded([OVERPAINT, "up", "--no-demo"]), cwd=folder, env=environment, stdout=err, stderr=err
        )
    try:
        wait_until(lambda: len(psutil.Process(up.pid).children(recursive=True)) >= so_many, 60)
        with suppress(subprocess.TimeoutExpired):
            up.wait(later_s)
    finally:
        up.kill()
        up.wait()


def test_no_process_outlives_an_up_that_is_killed_while_it_starts(
    folder: Path, nothing_set: Environment
) -> None:
    seed = random.randrange(1 << 32)
    moments = random.Random(seed)
    for so_many in (1, 2, 3, 4, 5) * 2:  # Redis, S3, worker, engine, Flower
        kill_while_it_starts(folder, nothing_set, so_many, moments.random() ** 2 * 0.3)
        wait_until(lambda: not living_in(folder), LEAVE_S, f"seed {seed}: all have ended of {so_many}")


def test_the_folder_of_a_killed_farm_can_be_used_again(folder: Path, nothing_set: Environment) -> None:
    data = folder / "overpaint-data"
    data.mkdir()
    (data / "farm.toml").write_text('redis_url = "redis://127.0.0.1:1/0"\n')  # as it was left behind
    (data / "up.lock").write_text("1\n")
    with started(folder, nothing_set, "--no-demo") as up:
        assert "yours" not in up.ready["parts"]["Redis"]
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(LEAVE_S) == 0, up.said


def test_up_says_what_a_wrong_option_should_be(tmp_path: Path, nothing_set: Environment) -> None:
    refused = typed(tmp_path, nothing_set, "up", "--registry", "none.toml")
    assert refused.returncode == 2
    assert "none.toml" in refused.stderr
    assert not (tmp_path / "overpaint-data").exists()
