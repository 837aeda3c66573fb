"""A real S3 server on a local port: moto's, behind a layer that can fail as networks and other servers do."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any
from uuid import uuid4

import boto3
from botocore.config import Config
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

KEYS = {"AWS_ACCESS_KEY_ID": "testing-id", "AWS_SECRET_ACCESS_KEY": "testing-secret/+key"}
"""For the environment of whoever talks to the server."""

REFUSE = "refuse"  # answer 503 and do nothing
LOSE_500 = "lose-500"  # do it, and answer 500
LOSE = "lose"  # do it, and cut the line
EXPIRED = "expired"  # answer that the token has expired, and do nothing
NO_CONDITION = "no-condition"  # do it as a server would that does not know If-None-Match


class S3Server:
    """Context manager. `fault(method, path, query)` says how a request fails; None: not at all."""

    def __init__(self) -> None:
        self.expired: set[str] = set()
        """Access keys that were good once."""
        self.fault: Callable[[str, str, str], str | None] = lambda method, path, query: None
        self.requests: list[tuple[str, str, str]] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        # moto looks whether an object is there and then writes it, with nothing to keep another writer out in
        # between; S3 does both at once.
        self._writing = threading.Lock()

    def __enter__(self) -> S3Server:
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def bucket(self) -> str:
        """A new, empty bucket; its name."""
        name = f"bucket-{uuid4().hex}"
        self.client.create_bucket(Bucket=name)
        return name

    def empty(self, bucket: str) -> None:
        """Remove all objects and unfinished uploads."""
        for found in self.client.list_objects_v2(Bucket=bucket).get("Contents", ()):
            self.client.delete_object(Bucket=bucket, Key=found["Key"])
        for found in self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()):
            self.client.abort_multipart_upload(Bucket=bucket, Key=found["Key"], UploadId=found["UploadId"])

    @cached_property
    def client(self) -> Any:
        """A plain boto3 client of this server."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            config=Config(s3={"addressing_style": "path"}),
        )

    def _serve(self, environ: dict[str, Any], start: Callable) -> Iterable[bytes]:
        request = (environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"])
        self.requests.append(request)
        fault = self.fault(*request)
        if any(f"Credential={key}/" in environ.get("HTTP_AUTHORIZATION", "") for key in self.expired):
            fault = EXPIRED
        if fault == EXPIRED:
            return _answer(start, "400 Bad Request", "ExpiredToken")
        if fault == REFUSE:
            return _answer(start, "503 Slow Down", "SlowDown")
        if fault == NO_CONDITION:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if fault in (LOSE, LOSE_500):
            list(self._app(environ, lambda *_: lambda data: None))
            if fault == LOSE_500:
                return _answer(start, "500 Internal Server Error", "InternalError")
            environ["werkzeug.socket"].close()
            return []
        if environ["REQUEST_METHOD"] in ("PUT", "POST"):
            with self._writing:
                return list(self._app(environ, start))
        return self._app(environ, start)


def _answer(start: Callable, status: str, code: str) -> list[bytes]:
    body = f"<Error><Code>{code}</Code><Message>by the test</Message></Error>".encode()
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]
