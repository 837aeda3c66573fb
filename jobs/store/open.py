"""Opens the store that a URL means and holds it to what is safe. Knows how places are written, not how stores
work.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from overtone.jobs.errors import StoreUnsafe, UserError
from overtone.jobs.store.base import Store, StoreConfig, check_prefix
from overtone.jobs.store.local import LocalStore

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


def open_store(
    url: str,
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    retries: int = 8,
    unsafe_overwrite: bool = False,
    foreign_keys: bool = False,
) -> Store:
    """The store at `s3://bucket/prefix`, `file:///folder` or a plain path (relative to the current folder).

    Connects to nothing. `foreign_keys`: for reading what others wrote under keys that ours never have.
    UserError for a URL of another kind, or one with a secret in it (not repeated).
    """
    if endpoint_url is not None:
        _check_endpoint(endpoint_url)
    if url.startswith("s3://"):
        place = _s3_url(url)
    else:
        place, endpoint_url, region = _folder(url), None, None
    return open_config(
        StoreConfig(
            url=place,
            endpoint_url=endpoint_url,
            region=region,
            retries=retries,
            unsafe_overwrite=unsafe_overwrite,
            foreign_keys=foreign_keys,
        )
    )


def open_config(config: StoreConfig) -> Store:
    """The store of these settings; nothing is connected to or created yet."""
    if config.url.startswith("s3://"):
        from overtone.jobs.store.s3 import S3Store  # boto3 takes a while to import

        return S3Store(config)
    return LocalStore(config)


def probed(store: Store) -> Store:
    """The same store, held to what its probe found: it creates objects only in the way that is safe.

    StoreUnsafe where no way is, unless `unsafe_overwrite` accepts that. For a job's driver, once: pickles
    of the returned store carry the finding to the workers.
    """
    guarantees = store.probe()
    if not (guarantees.single or guarantees.multipart or store.config.unsafe_overwrite):
        raise StoreUnsafe(
            f"{store.url} does not refuse to create an object that exists, so two workers that finish the "
            "same shard could both write it: use a store that honours If-None-Match (AWS S3, MinIO, Ceph, "
            "R2) or a file system with hard links, or accept the risk with `output.unsafe_overwrite: true`"
        )
    return open_config(replace(store.config, guarantees=guarantees))


def _s3_url(url: str) -> str:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if "@" in bucket or (":" in bucket and not bucket.startswith("arn:")):
        raise UserError(
            "an s3:// URL must not carry credentials; give them in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, in a profile, or as the machine's role"
        )
    if not (bucket.startswith("arn:") or _BUCKET.fullmatch(bucket)):
        raise UserError(f"{bucket!r} in {url!r} is no name of a bucket; write s3://bucket/prefix")
    prefix = prefix.rstrip("/")
    try:
        check_prefix(prefix)
    except ValueError as error:
        raise UserError(f"{url!r} cannot be used: {error}") from None
    return f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"


def _folder(url: str) -> str:
    if url.startswith("file://"):
        split = urlsplit(url)
        if split.netloc not in ("", "localhost"):
            raise UserError(f"{url!r} names another machine; write file:///folder")
        url = unquote(split.path)
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url):
        scheme = url.partition("://")[0]
        raise UserError(
            f"{scheme}:// is not a place Overtone can write; use a folder, file:// or s3:// (with "
            "`endpoint_url` for stores that speak S3)"
        )
    if not url or "\0" in url:
        raise UserError("an output needs a path or an s3:// URL")
    return str(Path(url).expanduser().absolute())


def _check_endpoint(endpoint_url: str) -> None:
    split = urlsplit(endpoint_url)
    if "@" in split.netloc or split.query:
        raise UserError(
            "`endpoint_url` must not carry credentials; give them in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, in a profile, or as the machine's role"
        )
    if split.scheme not in ("http", "https") or not split.netloc:
        raise UserError(f"`endpoint_url` is a URL like https://host:9000, not {endpoint_url!r}")
