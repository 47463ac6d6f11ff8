"""Pictures in S3-compatible storage: inputs by their SHA-256, results by job and fencing token.

    inputs/<owner>/<sha256>             uploaded once, read back with its hash checked
    results/<job>/<token>/<name>        written once by the attempt that holds the token
    named/<owner>/<key>                 pictures under names that jobs gave them; the last one stays

Every method raises a typed `StoreError` (see `store_errors`), never one of boto3's.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

import boto3
import botocore.exceptions as boto
from botocore.config import Config

from overpaint_shared.errors import InputError, StoreError, StoreNoBucket
from overpaint_shared.setting_views import StoreSettings
from overpaint_shared.store_errors import NO_ANSWER, explained, is_code
from overpaint_shared.store_keys import (
    INPUTS,
    RESULTS,
    attempt_of,
    external_address,
    input_key,
    input_of,
    named_key,
    result_key,
    segment,
)
from overpaint_shared.store_signed import sent_as

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MAX_LINK_S = 604_800  # the longest a version 4 signature may live
TRIES = 3  # of one request, within `timeout_s` together
CONNECT_S = 3.0
SILENT_S = 3.0  # after which a call is told as waiting, and how often
TELL_AGAIN_S = 10.0
READS = 3  # whole reads of one object; botocore retries a request, but not a body cut in the middle
CHUNK_BYTES = 1 << 20
CHANGED = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey", "404")
WRITES = 4  # conditional writes that S3 answers with 409 (two at once) are to be sent again

# Garbage collection removes inputs that no record names once they are a day old. An input that is about to be
# named again is therefore written anew when it is half that old, so that no submit races the collector.
REFRESH_AFTER = timedelta(hours=12)
KNOWN_FOR = timedelta(hours=1)
KNOWN_MAX = 100_000

_client_lock = threading.Lock()


@dataclass(frozen=True)
class StoredInput:
    """One uploaded picture, as listed for garbage collection."""

    owner: str
    sha256: str
    size: int
    modified: datetime


@dataclass(frozen=True)
class StoredAttempt:
    """All objects of one attempt at a job: `size` in bytes together, `modified` of the newest."""

    job_id: str
    token: int
    size: int
    modified: datetime


class Store:
    """The farm's bucket. Thread safe; stores with the same settings share one boto3 client in a process."""

    def __init__(self, settings: StoreSettings) -> None:
        self.settings = settings
        self.on_wait: Callable[[str], None] | None = None
        """Told in words, from a thread of its own, while the server does not answer."""
        self._told_at = 0.0
        self._known: dict[str, datetime] = {}
        self._known_lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """The server's address, for messages."""
        return self.settings.endpoint_url or f"AWS, region {self.settings.region}"

    @property
    def remembers_s(self) -> float:
        """For how long `put_input` knows without asking that an input is stored."""
        return KNOWN_FOR.total_seconds()

    @property
    def _s3(self) -> S3Client:
        with _client_lock:  # making clients is not thread safe, using one is
            return _client(self.settings)

    @property
    def client(self) -> S3Client:
        """The boto3 client, for questions that no method here asks. It raises boto3's errors."""
        return self._s3

    @property
    def _signer(self) -> S3Client:
        """The client that signs links: a signature covers the host, so it must be the one browsers use."""
        with _client_lock:
            public = self.settings.public_url
            return _client(replace(self.settings, endpoint_url=public) if public else self.settings)

    # Inputs

    def put_input(self, owner: str, data: bytes) -> str:
        """Store an input under its owner and hash unless it is there; the SHA-256 in hex."""
        sha256 = hashlib.sha256(data).hexdigest()
        key = input_key(owner, sha256)
        if not self._is_known(key):
            with self._explained("write an input", key):
                self._write_input(key, data)
            self._remember(key)
        return sha256

    def get_input(self, owner: str, sha256: str, max_bytes: int) -> bytes:
        """An input, hash checked. InputError over `max_bytes`, StoreMissing, StoreError if damaged."""
        key = input_key(owner, sha256)
        data = self._read("read an input", self.settings.bucket, key, max_bytes)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StoreError(
                f"the stored input {key!r} is damaged: its bytes do not have the SHA-256 it is named by",
                value=sha256,
                fix="delete the object and submit the picture again",
            )
        return data

    def has_input(self, owner: str, sha256: str) -> bool:
        """Whether an input is stored."""
        key = input_key(owner, sha256)
        with self._explained("look for an input", key):
            return self._head(key) is not None

    def read_external(self, url: str, max_bytes: int) -> bytes:
        """The bytes of `s3://bucket/key`; InputError unless the bucket is one of `s3_read_buckets`."""
        bucket, key = external_address(url, self.settings.read_buckets)
        return self._read(f"read {url}", bucket, key, max_bytes)

    # Results

    def put_result(self, job_id: str, token: int, name: str, data: bytes, content_type: str) -> str:
        """Write one file of an attempt and return its key. Writing the same bytes again is no error."""
        key = result_key(job_id, token, name)
        with self._explained("write a result", key):
            if not self._put_if_absent(key, data, content_type) and not self._same(key, data):
                raise StoreError(f"cannot write a result: {key!r} is there with other bytes", value=key)
        return key

    def put_named(
        self, owner: str, name: str, data: bytes, content_type: str, *, allowed: Callable[[], bool]
    ) -> bool:
        """Write a picture under the name that its job gave it, over what was there, while that is `allowed`.

        Another's write between the question and our own makes S3 refuse ours, and the question is asked anew:
        so a writer that slept in between changes nothing. False: no longer allowed. (A server that knows no
        conditions on a PUT just writes: ask once more afterwards.)
        """
        key = named_key(owner, name)
        with self._explained("write a named result", key):
            for _ in range(WRITES):
                found = self._head(key)
                if not allowed():
                    return False
                if self._put_over(key, data, content_type, found):
                    return True
        raise StoreError(f"cannot write a named result: {key!r} is written by others all the time", value=key)

    def get(self, key: str, max_bytes: int) -> bytes:
        """An object's bytes; InputError when it is larger than `max_bytes`, told before reading it."""
        return self._read("read an object", self.settings.bucket, key, max_bytes)

    def link(self, key: str, expires_s: int = 3600) -> str:
        """A signed address that anyone may GET for `expires_s` seconds (1 to a week). Asks no server."""
        if not 1 <= expires_s <= MAX_LINK_S:
            raise ValueError(f"expires_s is {expires_s}; a link lives 1 to {MAX_LINK_S} seconds")
        with self._explained("sign a link", key):
            params = {"Bucket": self.settings.bucket, "Key": key}
            return self._signer.generate_presigned_url("get_object", Params=params, ExpiresIn=expires_s)

    # Garbage

    def delete_attempt(self, job_id: str, token: int) -> int:
        """Delete all objects of an attempt; how many there were."""
        prefix = f"{RESULTS}{segment('job', job_id)}/{int(token)}/"
        count = 0
        for found in list(self._list(prefix)):
            self._delete(found["Key"])
            count += 1
        return count

    def sign_deletion(self, owner: str, sha256: str, expires_s: int) -> str:
        """What `delete_input` sends, signed now: S3 refuses it after `expires_s` seconds. Asks no server."""
        key = input_key(owner, sha256)
        with self._explained("sign a deletion", key):
            params = {"Bucket": self.settings.bucket, "Key": key}
            return self._s3.generate_presigned_url("delete_object", Params=params, ExpiresIn=expires_s)

    def delete_attempts(self, job_id: str) -> int:
        """Delete the objects of all attempts at a job; how many there were."""
        found = list(self._list(f"{RESULTS}{segment('job', job_id)}/"))
        for each in found:
            self._delete(each["Key"])
        return len(found)

    def delete_input(
        self,
        owner: str,
        sha256: str,
        *,
        unmodified_since: datetime | None = None,
        signed: str | None = None,
    ) -> bool:
        """Delete an input; whether that was done. One written after `unmodified_since` is spared.

        `signed`: what `sign_deletion` gave.
        """
        key = input_key(owner, sha256)
        with self._explained("delete an input", key):
            found = self._head(key)
        if found is None or (unmodified_since is not None and found["LastModified"] > unmodified_since):
            return False
        self.forget(owner, sha256)
        with sent_as(self._s3, signed):
            self._delete(key)
        return True

    def forget(self, owner: str, sha256: str) -> None:
        """Forget that an input is stored: `put_input` looks for it again."""
        with self._known_lock:
            self._known.pop(input_key(owner, sha256), None)

    def attempts(self) -> Iterator[StoredAttempt]:
        """Every attempt that has written something, listed page by page. Foreign objects are passed over."""
        parsed = ((parts, found) for found in self._list(RESULTS) if (parts := attempt_of(found["Key"])))
        for (job_id, token), group in groupby(parsed, key=lambda pair: pair[0]):
            objects = [found for _, found in group]
            newest = max(found["LastModified"] for found in objects)
            yield StoredAttempt(job_id, token, sum(found["Size"] for found in objects), newest)

    def inputs(self) -> Iterator[StoredInput]:
        """Every stored input, listed page by page. Foreign objects are passed over."""
        for found in self._list(INPUTS):
            if parts := input_of(found["Key"]):
                yield StoredInput(*parts, found["Size"], found["LastModified"])

    # The bucket

    def ping(self) -> None:
        """Ask the server for one key of the bucket: proves address, key, bucket and permission to list."""
        # Not HeadBucket: its answers have no body to tell a wrong key from a missing permission.
        with self._explained("look into the bucket"):
            self._s3.list_objects_v2(Bucket=self.settings.bucket, MaxKeys=1)

    def ensure_bucket(self) -> bool:
        """Create the bucket unless it is there; whether it was created."""
        try:
            self.ping()
        except StoreNoBucket:
            with self._explained("create the bucket"):
                return self._create_bucket()
        return False

    def _create_bucket(self) -> bool:
        where: dict[str, Any] = {}
        if self.settings.endpoint_url is None and self.settings.region != "us-east-1":  # AWS insists on both
            where = {"CreateBucketConfiguration": {"LocationConstraint": self.settings.region}}
        try:
            self._s3.create_bucket(Bucket=self.settings.bucket, **where)
        except boto.ClientError as error:
            if is_code(
                error, "BucketAlreadyOwnedByYou", "BucketAlreadyExists"
            ):  # another process was quicker
                return False
            raise
        return True

    # Writing

    def _write_input(self, key: str, data: bytes) -> None:
        found = self._head(key)
        if found is not None and found["ContentLength"] == len(data):
            if datetime.now(UTC) - found["LastModified"] > REFRESH_AFTER:
                self._s3.put_object(Bucket=self.settings.bucket, Key=key, Body=data)
            return
        if found is None and self._put_if_absent(key, data, "application/octet-stream"):
            return
        if not self._same(key, data):  # a torn or foreign object has the name of our bytes: put it right
            self._s3.put_object(Bucket=self.settings.bucket, Key=key, Body=data)

    def _put_if_absent(self, key: str, data: bytes, content_type: str) -> bool:
        """One conditional PUT. False: the key was taken, perhaps by our own first try (answer lost)."""
        for attempt in range(WRITES):
            try:
                self._s3.put_object(
                    Bucket=self.settings.bucket, Key=key, Body=data, ContentType=content_type, IfNoneMatch="*"
                )
            except boto.ClientError as error:
                if is_code(error, "PreconditionFailed", "412"):
                    return False
                if not is_code(error, "ConditionalRequestConflict", "409") or attempt == WRITES - 1:
                    raise
            else:
                return True
        raise AssertionError("the last attempt returns or raises")

    def _put_over(self, key: str, data: bytes, content_type: str, found: dict[str, Any] | None) -> bool:
        """One PUT over the object that was found there, or over none; False if it is another by now."""
        client: Any = self._s3  # its types want each argument by itself
        what = {"Bucket": self.settings.bucket, "Key": key, "Body": data, "ContentType": content_type}
        try:
            client.put_object(**what, **({"IfMatch": found["ETag"]} if found else {"IfNoneMatch": "*"}))
        except boto.ClientError as error:
            if is_code(error, *CHANGED):
                return False
            if not is_code(error, "NotImplemented", "501"):
                raise
            client.put_object(**what)
        return True

    def _same(self, key: str, data: bytes) -> bool:
        """Whether the stored object has these bytes: by its ETag, which need not be an MD5, or by reading."""
        found = self._head(key)
        if found is None or found["ContentLength"] != len(data):
            return False
        etag = found["ETag"].strip('"').lower()
        if etag == hashlib.md5(data, usedforsecurity=False).hexdigest():
            return True
        return _body(self._s3.get_object(Bucket=self.settings.bucket, Key=key), key, len(data)) == data

    def _head(self, key: str) -> dict[str, Any] | None:
        """What is known of an object; None: it is not there.

        The answer to a HEAD has no body that could tell a wrong key from a missing permission, so what is
        refused is asked once more by a GET, whose error says why.
        """
        try:
            return dict(self._s3.head_object(Bucket=self.settings.bucket, Key=key))
        except boto.ClientError as error:
            if is_code(error, "404", "NoSuchKey", "NotFound"):
                return None
            if is_code(error, "400", "403"):
                self._s3.get_object(Bucket=self.settings.bucket, Key=key)["Body"].close()
            raise

    def _is_known(self, key: str) -> bool:
        with self._known_lock:
            seen = self._known.get(key)
        return seen is not None and datetime.now(UTC) - seen < KNOWN_FOR

    def _remember(self, key: str) -> None:
        with self._known_lock:
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            self._known[key] = datetime.now(UTC)

    # Reading

    def _read(self, action: str, bucket: str, key: str, max_bytes: int) -> bytes:
        with self._explained(action, key, bucket):
            for _ in range(READS - 1):
                answer = self._s3.get_object(Bucket=bucket, Key=key)
                try:
                    return _body(answer, key, max_bytes)
                except NO_ANSWER:
                    continue
            return _body(self._s3.get_object(Bucket=bucket, Key=key), key, max_bytes)

    # Small things

    def _list(self, prefix: str) -> Iterator[Any]:
        with self._explained("list the bucket"):
            pages = self._s3.get_paginator("list_objects_v2").paginate(
                Bucket=self.settings.bucket, Prefix=prefix
            )
            for page in pages:
                yield from page.get("Contents", [])

    def _delete(self, key: str) -> None:
        with self._explained("delete an object", key):
            self._s3.delete_object(Bucket=self.settings.bucket, Key=key)

    @contextmanager
    def _explained(self, action: str, key: str | None = None, bucket: str | None = None) -> Iterator[None]:
        bucket = bucket or self.settings.bucket
        with self._watched(), explained(action, bucket=bucket, endpoint=self.endpoint, key=key):
            yield

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Tell `on_wait` while the block takes longer than a server that answers ever does."""
        if self.on_wait is None:
            yield
            return
        ended = threading.Event()
        threading.Thread(target=self._tell, args=(ended,), daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _tell(self, ended: threading.Event) -> None:
        began = time.monotonic()
        while not ended.wait(SILENT_S if self._told_at < began else TELL_AGAIN_S):
            now = time.monotonic()
            if self.on_wait is None or now - self._told_at < SILENT_S:  # of many calls one is told
                continue
            self._told_at = now
            self.on_wait(
                f"the S3 server at {self.endpoint} has not answered for {now - began:.0f} s; "
                f"it is tried again, for {self.settings.timeout_s:g} s at most"
            )


@lru_cache(maxsize=8)
def _client(settings: StoreSettings) -> S3Client:
    config = Config(
        signature_version="s3v4",
        retries={"mode": "standard", "total_max_attempts": TRIES},
        connect_timeout=min(CONNECT_S, settings.timeout_s / TRIES),
        # What a server takes to begin its answer, or the next part of it.
        read_timeout=max(1.0, settings.timeout_s / TRIES - 1.0),
        max_pool_connections=32,
        request_checksum_calculation=settings.checksums,
        response_checksum_validation=settings.checksums,
        # Servers other than AWS seldom answer at bucket.host.
        s3={"addressing_style": "path" if settings.endpoint_url else "auto"},
    )
    session = boto3.session.Session()
    with explained("reach the bucket", bucket=settings.bucket, endpoint=settings.endpoint_url or "AWS"):
        return session.client(
            "s3",
            endpoint_url=settings.endpoint_url,
            region_name=settings.region,
            aws_access_key_id=settings.access_key,
            aws_secret_access_key=settings.secret_key.get_secret_value() if settings.secret_key else None,
            config=config,
            verify=str(settings.ca_file) if settings.ca_file else None,
        )


def _body(answer: Any, key: str, max_bytes: int) -> bytes:
    length = answer.get("ContentLength", -1)
    with answer["Body"] as body:
        if length > max_bytes:
            raise _too_large(key, length, max_bytes)
        data = _capped(body.read, key, max_bytes)
    if len(data) != length:  # the head of the answer was cut off, too, so nobody else has noticed
        raise boto.IncompleteReadError(actual_bytes=len(data), expected_bytes=length)
    return data


def _capped(read: Callable[[int], bytes], key: str, max_bytes: int) -> bytes:
    """Read to the end, but never more than `max_bytes`, whatever length the server promised."""
    parts: list[bytes] = []
    size = 0
    while part := read(CHUNK_BYTES):
        size += len(part)
        if size > max_bytes:
            raise _too_large(key, size, max_bytes)
        parts.append(part)
    return b"".join(parts)


def _too_large(key: str, size: int, max_bytes: int) -> InputError:
    return InputError(
        f"the object {key!r} has {size} bytes or more; at most {max_bytes} are read",
        value=size,
        fix="use a smaller picture, or let an operator raise OVERPAINT_MAX_INPUT_BYTES",
    )
