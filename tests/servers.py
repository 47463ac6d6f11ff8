"""Real servers for tests: one Redis and one S3 server per test run, empty for each test that asks.

A machine without them fails these tests, here and in CI alike: `./test` installs both, and a farm that was
never tested against its real stores was not tested.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import boto3
import pytest
import redis

from overpaint_producer.services import RedisService, S3Service, start_redis, start_s3

if TYPE_CHECKING:
    from overpaint_shared.settings import Settings


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisService]:
    """A Redis of this test run's own. Its data stays from test to test: see `redis_url`."""
    service = start_redis(tmp_path_factory.mktemp("redis"))
    yield service
    service.stop()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Service]:
    """An S3 server of this test run's own. Its objects stay from test to test: see `s3_bucket`."""
    service = start_s3(tmp_path_factory.mktemp("s3"))
    yield service
    service.kill()  # nothing to keep, and SIGTERM takes it 3.5 s


@pytest.fixture
def redis_client(redis_server: RedisService) -> Iterator[redis.Redis]:
    """A client of an empty Redis."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def redis_url(redis_server: RedisService, redis_client: redis.Redis) -> str:
    """The address, password included, of an empty Redis."""
    return redis_server.url


@pytest.fixture(scope="session")
def s3_client(s3_server: S3Service) -> Iterator[Any]:
    """A plain boto3 client with the server's keys, to look past the farm's own store."""
    client = boto3.client(
        "s3",
        endpoint_url=s3_server.endpoint_url,
        aws_access_key_id=s3_server.access_key,
        aws_secret_access_key=s3_server.secret_key,
        region_name="us-east-1",
    )
    yield client
    client.close()


@pytest.fixture
def s3_bucket(s3_server: S3Service, s3_client: Any) -> str:
    """The name of an empty bucket. (One bucket for all tests: SeaweedFS sets volumes aside for each.)"""
    for page in s3_client.get_paginator("list_objects_v2").paginate(Bucket=s3_server.bucket):
        for found in page.get("Contents", []):
            s3_client.delete_object(Bucket=s3_server.bucket, Key=found["Key"])
    return s3_server.bucket


@pytest.fixture
def farm_settings(redis_url: str, s3_server: S3Service, s3_bucket: str) -> "Settings":
    """Settings of a farm on empty servers. For others: `farm_settings.model_copy(update={...})`."""
    from overpaint_shared.settings import Settings

    return Settings.load(
        redis_url=redis_url,
        s3_endpoint_url=s3_server.endpoint_url,
        s3_bucket=s3_bucket,
        s3_access_key=s3_server.access_key,
        s3_secret_key=s3_server.secret_key,
    )
