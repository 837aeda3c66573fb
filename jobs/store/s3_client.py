"""TODO: jobs/store/s3_client.py."""

from __future__ import annotations

from botocore import exceptions as boto

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

_PASSING_ERRORS = (
    boto.ConnectionError,  # refused, unresolved, timed out while connecting
    boto.HTTPClientError,  # timed out, cut, a stream that breaks
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    boto.CredentialRetrievalError,  # the machine's role could not be asked
)

CONDITION_UNKNOWN = {"NotImplemented", "InvalidArgument", "InvalidRequest"}
CAUGHT = (boto.ClientError, boto.BotoCoreError)

ADVICE = {
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


def http_status(problem: Exception | None) -> int:
    """HTTP status of an answer; 0 where there was none."""
    if not isinstance(problem, boto.ClientError):
        return 0
    return problem.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def error_code(problem: Exception | None) -> str:
    return problem.response.get("Error", {}).get("Code", "") if isinstance(problem, boto.ClientError) else ""


def passing(problem: Exception | None) -> bool:
    """Whether the same request may succeed later."""
    return (
        isinstance(problem, _PASSING_ERRORS)
        or http_status(problem) in _PASSING_STATUS
        or error_code(problem) in _PASSING_CODES
    )
