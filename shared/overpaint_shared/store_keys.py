"""Names of the objects in the farm's bucket, and of those outside it that jobs may read. Pure; no boto3.

inputs/<owner>/<sha256>             results/<job>/<token>/<name>             named/<owner>/<key>
"""

import re

from overpaint_shared.errors import InputError

INPUTS = "inputs/"
RESULTS = "results/"
NAMED = "named/"
SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+-]{0,127}")
TOKEN = re.compile(r"[1-9][0-9]{0,18}")
SHA256 = re.compile(r"[0-9a-f]{64}")


def input_key(owner: str, sha256: str) -> str:
    """`inputs/<owner>/<sha256>`; ValueError for names that could leave their folder."""
    if not SHA256.fullmatch(sha256):
        raise ValueError(f"{sha256!r} is no SHA-256 in lower-case hex")
    return f"{INPUTS}{segment('owner', owner)}/{sha256}"


def result_key(job_id: str, token: int, name: str) -> str:
    """`results/<job>/<token>/<name>`; ValueError for names that could leave their folder."""
    return f"{RESULTS}{segment('job', job_id)}/{int(token)}/{segment('name', name)}"


def named_key(owner: str, key: str) -> str:
    """`named/<owner>/<key>`; ValueError for keys that could leave their folder."""
    if any(part in {"", ".", ".."} for part in key.split("/")):
        raise ValueError(f"{key!r} is no relative key")
    return f"{NAMED}{segment('owner', owner)}/{key}"


def name_of(key: str, owner: str) -> str:
    """The name in a key that `named_key` made."""
    return key.removeprefix(f"{NAMED}{owner}/")


def external_address(url: str, allowed: tuple[str, ...]) -> tuple[str, str]:
    """(bucket, key) of an `s3://` address; InputError unless it is whole and its bucket is allowed."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition(
        "/"
    )  # by hand: a key may hold ? and #, which a URL parser takes for its own
    if scheme != "s3" or not bucket or not key:
        raise InputError(f"{url!r} is no S3 address", value=url, fix="write s3://bucket/key")
    if bucket not in allowed:
        names = ", ".join(allowed) or "none"
        raise InputError(
            f"jobs may not read from bucket {bucket!r}; allowed: {names}",
            value=url,
            fix="name a local file, or let an operator add the bucket to OVERPAINT_S3_READ_BUCKETS",
        )
    return bucket, key


def segment(what: str, text: str) -> str:
    """`text` if it is safe as one folder or file name of a key, else ValueError naming `what` it is."""
    if not SEGMENT.fullmatch(text):
        raise ValueError(f"{what} {text!r} cannot be part of a key: letters, digits and . _ @ + - only")
    return text


def input_of(key: str) -> tuple[str, str] | None:
    """(owner, SHA-256) of an input's key, None for any other key."""
    owner, _, sha256 = key.removeprefix(INPUTS).partition("/")
    return (owner, sha256) if SEGMENT.fullmatch(owner) and SHA256.fullmatch(sha256) else None


def attempt_of(key: str) -> tuple[str, int] | None:
    """(job, token) of a result's key, None for any other key."""
    job_id, *rest = key.removeprefix(RESULTS).split("/")
    if len(rest) < 2 or not SEGMENT.fullmatch(job_id) or not TOKEN.fullmatch(rest[0]):
        return None
    return job_id, int(rest[0])
