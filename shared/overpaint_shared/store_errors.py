"""What boto3 raises, said as the errors of this project: each names the object, the cause and the mend.

no answer, time-out             StoreUnreachable      wrong key, clock, no permission   StoreDenied
it says that it failed, 5xx     StoreFailing
no such bucket                  StoreNoBucket         disk or quota full                StoreFull
no such object                  StoreMissing          anything else                     StoreError
"""

from collections.abc import Iterator
from contextlib import contextmanager

import botocore.exceptions as boto
import urllib3.exceptions

from overpaint_shared.errors import (
    OverpaintError,
    StoreDenied,
    StoreError,
    StoreFailing,
    StoreFull,
    StoreMissing,
    StoreNoBucket,
    StoreUnreachable,
)

# Codes of S3 itself, MinIO, Ceph and SeaweedFS. A HEAD has no body: botocore then gives the status as code.
WRONG_KEY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthFailure", "InvalidToken", "ExpiredToken"}
NO_PERMISSION = {"AccessDenied", "403", "401", "AllAccessDisabled", "AccountProblem", "UnauthorizedAccess"}
FULL = {
    "507",
    "InsufficientStorage",
    "XMinioStorageFull",
    "QuotaExceeded",
    "InsufficientCapacity",
    "XAmzQuotaExceeded",
}
ARCHIVED = {"InvalidObjectState"}  # one object is in an archive; answered with status 403
MISSING = {"NoSuchKey", "404", "NotFound"}
FULL_WORDS = (
    "no space left",
    "disk full",
    "no writable volume",
    "no free volume",
    "not enough free space",
    "quota exceeded",
)

# What happens below HTTP: nothing listens, a time-out, a connection cut in the middle of a body.
NO_ANSWER = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    urllib3.exceptions.HTTPError,
    OSError,
)
NO_KEY = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)


@contextmanager
def explained(action: str, *, bucket: str, endpoint: str, key: str | None = None) -> Iterator[None]:
    """Run a block of boto3 calls; raise a `StoreError` of the right kind for whatever they raise.

    `action` is what was tried, in words ("write the input"), `key` the object's key, None for the bucket.
    """
    try:
        yield
    except boto.ClientError as error:
        raise _from_answer(error, action, bucket, endpoint, key) from error
    except NO_KEY as error:
        raise StoreDenied(
            f"cannot {action}: no S3 key is set",
            field="s3_access_key",
            fix="set OVERPAINT_S3_ACCESS_KEY and OVERPAINT_S3_SECRET_KEY",
        ) from error
    except NO_ANSWER as error:
        raise _unreachable(action, endpoint, str(error)) from error
    except (
        boto.BotoCoreError,
        ValueError,
    ) as error:  # an endpoint that is no URL, a bucket name that cannot be
        raise StoreError(
            f"cannot {action}: {error}",
            field="s3_endpoint_url",
            value=endpoint,
            fix="check OVERPAINT_S3_ENDPOINT_URL and OVERPAINT_S3_BUCKET",
        ) from error


def is_final(error: OverpaintError) -> bool:
    """Whether the store would answer the same again, to anybody: it is not away, full or refusing a key."""
    return type(error) is StoreError or isinstance(error, StoreMissing)


def is_code(error: boto.ClientError, *codes: str) -> bool:
    """Whether the server answered with one of these codes (or statuses, for an answer without a body)."""
    return error.response.get("Error", {}).get("Code", "") in codes


def _unreachable(action: str, endpoint: str, why: str) -> StoreUnreachable:
    if "CERTIFICATE_VERIFY_FAILED" in why or "doesn't match" in why:  # urllib3's word for another name
        return StoreUnreachable(
            f"cannot {action}: the certificate of the S3 server at {endpoint} is not trusted ({why})",
            field="s3_ca_file",
            value=endpoint,
            fix="name the authority's file in OVERPAINT_S3_CA_FILE, and the host as its certificate does",
        )
    return StoreUnreachable(
        f"cannot {action}: the S3 server at {endpoint} does not answer ({why})",
        field="s3_endpoint_url",
        value=endpoint,
        fix="start the server, or point OVERPAINT_S3_ENDPOINT_URL at the one that runs",
    )


def _from_answer(
    error: boto.ClientError, action: str, bucket: str, endpoint: str, key: str | None
) -> StoreError:
    code, said, status = _parts(error)
    if code == "NoSuchBucket" or (key is None and code in MISSING):
        return StoreNoBucket(
            f"cannot {action}: there is no bucket {bucket!r} at {endpoint}",
            field="s3_bucket",
            value=bucket,
            fix="create it, or name one that exists in OVERPAINT_S3_BUCKET",
        )
    if code in MISSING:
        return StoreMissing(
            str(key),
            message=f"cannot {action}: there is no object {key!r} in bucket {bucket!r}",
            fix="it was never written, or its time is over and it was removed; submit the job again",
        )
    if code in FULL or status == 507 or any(words in said.lower() for words in FULL_WORDS):
        return StoreFull(
            f"cannot {action}: the S3 server at {endpoint} is full ({said or code})",
            field="s3_endpoint_url",
            value=endpoint,
            fix="free space on its disk or raise the quota; `overpaint gc` removes what no job needs",
        )
    if status >= 500 or status == 429:
        why = f"status {status} {code}: {said}"
        return StoreFailing(
            f"cannot {action}: the S3 server at {endpoint} answers that it failed ({why})",
            field="s3_endpoint_url",
            value=endpoint,
            fix="see its log; its disk may be full (docs/operate.md)",
        )
    return _refused(error, action, bucket, endpoint)


def _refused(error: boto.ClientError, action: str, bucket: str, endpoint: str) -> StoreError:
    code, said, status = _parts(error)
    if code == "RequestTimeTooSkewed":
        return StoreDenied(
            f"cannot {action}: this machine's clock differs from the S3 server's", fix="set the clock"
        )
    if code in WRONG_KEY:
        return StoreDenied(
            f"cannot {action}: the S3 server at {endpoint} does not accept this key ({code})",
            field="s3_access_key",
            fix="check OVERPAINT_S3_ACCESS_KEY and OVERPAINT_S3_SECRET_KEY",
        )
    if code in NO_PERMISSION or (status in {401, 403} and code not in ARCHIVED):
        return StoreDenied(
            f"cannot {action}: this S3 key has no permission to do so in bucket {bucket!r} ({said or code})",
            field="s3_access_key",
            fix="grant the key read, write, list and delete on the bucket, or check the key",
        )
    return StoreError(f"cannot {action}: the S3 server answered {status} {code}: {said}", value=code)


def _parts(error: boto.ClientError) -> tuple[str, str, int]:
    """(code, message, HTTP status) of an answer; empty and 0 where it has none."""
    answer = error.response.get("Error", {})
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return answer.get("Code", ""), answer.get("Message", ""), status
