"""Requests to S3, sent again while they fail for a passing reason. Knows which failures pass and what to
advise about the others, and nothing of what a request is for.

    s3 = S3Client(config)
    s3.retried("data/x", lambda client: client.delete_object(Bucket=s3.bucket, Key=s3.name("data/x")))

boto3's own retries are off, because what may be sent again depends on what is being done: `s3_upload` has the
creates, after which a lost answer leaves open whose object exists.

Keys that expire are looked for anew where boto3 found them, since whoever renews them for a job that runs
rewrites its credentials file. A store that takes long to answer is named in one line of the log.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import quote

import boto3
from botocore import exceptions as boto
from botocore.config import Config

from overtone.jobs.errors import StoreError, StoreRefused, UserError
from overtone.jobs.store.base import NoSuchObject, ObjectInfo, StoreConfig, check_key

ATTEMPT_METADATA = "overtone-attempt"
"""The header, after `x-amz-meta-`, under which an object says which attempt made it."""
SILENT_S = 5.0
"""How long a request may take before somebody is told what is waited for."""
_SLOWEST_BYTES_PER_S = 1e6  # a longer upload is no silence
_TELL_EVERY_S = 60.0
_MAX_KEY_BYTES = 1024
_MAX_WAIT_S = 10.0

_PASSING_STATUS = {408, 429, 500, 502, 503, 504}

_PASSING_CODES = {
    "SlowDown",
    "RequestTimeout",  # a 400: the server waited too long for our bytes
    "RequestLimitExceeded",
    "Throttling",
    "ThrottlingException",
    "InternalError",
    "ServiceUnavailable",
    "OperationAborted",
    "ConditionalRequestConflict",
    "BadDigest",  # the bytes changed on the way
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}

_KEY_CODES = {
    "ExpiredToken",
    "ExpiredTokenException",
    "RequestExpired",
    "TokenRefreshRequired",
    "InvalidToken",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "SignatureDoesNotMatch",
    "400",  # HEAD has no body to say why
}
"""What is answered to keys that were good once, or will be."""

_PASSING_ERRORS = (
    boto.ConnectionError,  # refused, unresolved, timed out while connecting
    boto.HTTPClientError,  # timed out, cut, a stream that breaks
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    boto.CredentialRetrievalError,  # the machine's role could not be asked
)

CAUGHT = (boto.ClientError, boto.BotoCoreError)

_ADVICE = {
    "NoSuchBucket": "create the bucket, or correct the URL",
    "AccessDenied": "give these credentials s3:GetObject, s3:PutObject and s3:ListBucket there",
    "403": "give these credentials s3:GetObject, s3:PutObject and s3:ListBucket there",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID, or the profile, and the endpoint",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY, or the profile, and the clock",
    "ExpiredToken": "renew the session's credentials, then run again: the job resumes",
    "RequestTimeTooSkewed": "set this machine's clock",
    "PermanentRedirect": "set `region` to the bucket's region",
    "AuthorizationHeaderMalformed": "set `region` to the bucket's region",
    "IllegalLocationConstraintException": "set `region` to the bucket's region",
    "EntityTooLarge": "make fewer rows a shard",
    "QuotaExceeded": "make room in the bucket, then run again: the job resumes",
}

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class UploadGone(StoreError):
    """The multipart upload was completed or aborted, by us or by somebody who cleaned up."""


class S3Client:
    """A bucket, or a prefix in one, as requests see it. Threads share one boto3 client, which is made on
    first use, once a process."""

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        rest = config.url.removeprefix("s3://")
        # An access point's ARN has one "/" of its own.
        match = re.fullmatch(r"(arn:[^/]*:accesspoint/[^/]+|[^/]+)(?:/(.*))?", rest)
        assert match, config.url
        self.bucket, self.prefix = match[1], f"{match[2]}/" if match[2] else ""
        self._lock = threading.Lock()
        self._made: tuple[int, Any, Any] | None = None  # (process id, session, client)
        self._worked = False  # some request was answered as it should be
        self._told = -_TELL_EVERY_S
        self._timers = threading.local()

    def name(self, key: str) -> str:
        """The object's key in the bucket; ValueError where it can be none."""
        name = self.prefix + check_key(key, foreign=self.config.foreign_keys)
        try:
            size_bytes = len(name.encode())
        except UnicodeEncodeError:
            raise ValueError(f"an S3 key is valid Unicode, not {key[:200]!r}") from None
        if size_bytes > _MAX_KEY_BYTES:
            raise ValueError(
                f"an S3 key has at most {_MAX_KEY_BYTES} bytes, not {size_bytes}: {key[:200]!r}..."
            )
        return name

    def head(self, key: str) -> ObjectInfo | None:
        """The object without its bytes, with the attempt that made it; None where there is none."""
        name = self.name(key)

        def ask(client: Any) -> ObjectInfo | None:
            try:
                answer = client.head_object(Bucket=self.bucket, Key=name)
            except boto.ClientError as error:
                if http_status(error) == 404:
                    return None
                raise
            # Some servers change the case of metadata names.
            metadata = {name.lower(): value for name, value in answer.get("Metadata", {}).items()}
            attempt = metadata.get(ATTEMPT_METADATA)
            return ObjectInfo(key, answer["ContentLength"], etag_of(answer), attempt, modified_s(answer))

        return self.retried(key, ask)

    def retried(self, key: str, ask: Callable[[Any], _T], *, size_bytes: int = 0) -> _T:
        """What `ask(client)` returns, asked again while it fails for a passing reason."""
        problem: Exception | None = None
        with self.watched(key, size_bytes):
            for wait_s in self.waits():
                try:
                    return self.sent(ask)
                except CAUGHT as error:
                    problem = error
                if wait_s is None or not self.may_pass(problem):
                    break
                time.sleep(wait_s)
        raise self.refusal(key, problem)  # outside `except`: no secret of boto's may hang on as context

    def sent(self, ask: Callable[[Any], _T]) -> _T:
        """What `ask(client)` returns, asked once."""
        answer = ask(self.client())
        self._worked = True
        return answer

    def may_pass(self, problem: Exception | None) -> bool:
        """Whether the same request may succeed later. Where the answer is that the keys are not good, they
        are read anew; the same keys are waited for only where they were good before."""
        if passing(problem):
            return True
        code = error_code(problem)
        if code not in _KEY_CODES | {"403"}:
            return False
        before = self._secrets()
        with self._lock:
            self._made = None
        self.client()
        return self._secrets() != before or (self._worked and code != "403")

    @contextmanager
    def watched(self, key: str, size_bytes: int = 0) -> Iterator[None]:
        """While it takes long, say once what is waited for; sending `size_bytes` may take its time."""
        allowed_s = SILENT_S + size_bytes / _SLOWEST_BYTES_PER_S
        timer = self._timers.now = threading.Timer(allowed_s, self._tell, (key, allowed_s))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def answered(self) -> None:
        """The answer to this thread's request has begun; what is left is to receive it."""
        self._timers.now.cancel()

    def _tell(self, key: str, after_s: float) -> None:
        if time.monotonic() - self._told >= _TELL_EVERY_S:
            self._told = time.monotonic()
            server, where = self.config.endpoint_url or "S3", self.config.where(key)
            _log.warning("waiting for %s: %s has taken %.0f s so far", server, where, after_s)

    def client(self) -> Any:
        """The boto3 client, which threads may share but processes may not."""
        made = self._made
        if made is not None and made[0] == os.getpid():
            return made[2]
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = (os.getpid(), *self._connect())
            return self._made[2]

    def _connect(self) -> tuple[Any, Any]:
        config = self.config
        settings = Config(
            connect_timeout=config.connect_timeout_s,
            read_timeout=config.read_timeout_s,
            max_pool_connections=32,
            retries={"mode": "standard", "total_max_attempts": 1},  # trying again is our business
            user_agent_extra="overtone",
        )
        session = boto3.session.Session(region_name=config.region)
        try:
            return session, session.client("s3", endpoint_url=config.endpoint_url, config=settings)
        except ValueError as error:  # an endpoint or region that is none
            raise UserError(f"{config.url} cannot be reached: {error}") from None

    def waits(self) -> Iterator[float | None]:
        """How long to wait after each try; None after the last."""
        for n in range(self.config.retries):
            yield random.uniform(0, min(_MAX_WAIT_S, self.config.backoff_s * 2**n))
        yield None

    def refusal(self, key: str, problem: Exception | None) -> StoreError:
        """The error for a request that is not sent again: it names the object and says what to do."""
        where, text, code = self.config.where(key), self.text(problem), error_code(problem)
        if http_status(problem) == 404 and code != "NoSuchBucket":
            if code == "NoSuchUpload":
                return UploadGone(f"{where}: the upload was aborted")
            return NoSuchObject(f"{where} does not exist")
        if isinstance(problem, (boto.NoCredentialsError, boto.PartialCredentialsError)):
            advice = (
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role"
            )
        elif passing(problem):
            text = f"{self.config.retries + 1} tries failed, the last with: {text}"
            advice = (
                f"see that {self.config.endpoint_url or 'S3'} can be reached, then run again: the job resumes"
            )
        else:
            advice = _ADVICE.get(code, "see that the URL, endpoint, region and credentials belong together")
        refused = not passing(problem) and code != "QuotaExceeded"
        return (StoreRefused if refused else StoreError)(f"{where}: {text}; {advice}")

    def text(self, problem: Exception | None) -> str:
        """The problem in one line, without secrets that a server, a proxy or boto may have put there."""
        if isinstance(problem, boto.ClientError):
            message = problem.response.get("Error", {}).get("Message", "")
            text = f"{problem.operation_name} answered {http_status(problem)} {error_code(problem)} {message}"
        else:
            text = str(problem)
        for secret in self._secrets():
            for written in (secret, quote(secret), quote(secret, safe="")):
                text = text.replace(written, "***")
        text = re.sub(r"//[^/@\s]+@", "//***@", text)
        return " ".join(text.split())[:500]

    def _secrets(self) -> Sequence[str]:
        if self._made is None:
            return []
        try:
            credentials = self._made[1].get_credentials()
            frozen = credentials and credentials.get_frozen_credentials()
        except boto.BotoCoreError:  # they could not be found or renewed; then there are none to hide
            return []
        return [secret for secret in frozen or () if isinstance(secret, str) and secret]


def passing(problem: Exception | None) -> bool:
    """Whether the same request may succeed later."""
    return (
        isinstance(problem, _PASSING_ERRORS)
        or http_status(problem) in _PASSING_STATUS
        or error_code(problem) in _PASSING_CODES
    )


def http_status(problem: Exception | None) -> int:
    """HTTP status of an answer; 0 where there was none."""
    if not isinstance(problem, boto.ClientError):
        return 0
    return problem.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def error_code(problem: Exception | None) -> str:
    """S3's own name of a failure, such as `NoSuchBucket`; "" where the answer has none."""
    return problem.response.get("Error", {}).get("Code", "") if isinstance(problem, boto.ClientError) else ""


def etag_of(answer: dict[str, Any]) -> str:
    """The ETag of an answer or of an entry in a listing, without its quotes."""
    return answer.get("ETag", "").strip('"')


def modified_s(answer: dict[str, Any]) -> float | None:
    """When the object of an answer was made, in seconds since 1970; None where the answer does not say."""
    modified = answer.get("LastModified")
    return None if modified is None else modified.timestamp()
