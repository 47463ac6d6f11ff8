"""Deletions that are signed before they are sent, and that S3 refuses after a while.

So whoever signed one knows when it can no longer take effect, even where a server that hangs has not read it
yet, or where its sender was stopped in between.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

EVENT: Final = "before-send.s3.DeleteObject"
_signed: ContextVar[str | None] = ContextVar("signed_deletion", default=None)


@contextmanager
def sent_as(client: Any, url: str | None) -> Iterator[None]:
    """Within it `client.delete_object` sends the signed `url`, also when it repeats. None: it signs anew."""
    client.meta.events.register(EVENT, _send_signed, unique_id=EVENT)
    before = _signed.set(url)
    try:
        yield
    finally:
        _signed.reset(before)


def _send_signed(request: Any, **_: Any) -> None:
    if url := _signed.get():
        request.url = url
        for name in list(request.headers):  # of another signature; S3 wants each of these to be signed
            if name.lower() == "authorization" or name.lower().startswith(("x-amz-", "amz-sdk-")):
                del request.headers[name]
