"""Kinds of values in a spec: texts, places, endpoints, and what all its sections are. Knows no keys, and
refuses credentials in a URL."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_NAME_BYTES, _PATH_BYTES = 255, 4095
_SECRET = re.compile(r"(?i)signature|^sig$|token|secret|password|credential|access.?key")


def without_credentials(url: str) -> str:
    """The URL itself; ValueError, which does not repeat it, where it carries a password or signature."""
    if "://" not in url:
        return url
    split = urlsplit(url)
    if "@" in split.netloc or any(_SECRET.search(key) for key, _ in parse_qsl(split.query)):
        raise ValueError("the URL carries credentials; give them in the environment or a profile instead")
    return url


def is_url(path: str) -> bool:
    """Whether a path names a store or a server rather than a file of this machine."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path) is not None and "://" in path


def _plain(path: str) -> str:
    if not path:
        raise ValueError("is empty")
    if "\0" in path:
        raise ValueError("holds a NUL character")
    if not is_url(path):
        sizes = [len(name.encode(errors="surrogatepass")) for name in path.split("/")]
        if max(sizes) > _NAME_BYTES or sum(sizes) + len(sizes) > _PATH_BYTES:
            raise ValueError(f"is longer than disks take: {_NAME_BYTES} bytes a name, {_PATH_BYTES:,} in all")
    return without_credentials(path)


def _endpoint(url: str) -> str:
    split = urlsplit(without_credentials(url))
    if split.scheme not in ("http", "https") or not split.netloc:
        raise ValueError("is not a URL like https://host:9000")
    return url


def one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1)]
Place = Annotated[str, AfterValidator(_plain)]
Endpoint = Annotated[str, AfterValidator(_endpoint)]


Attention = Literal[
    "native",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
    "flex",
    "xformers",
    "flash",
    "flash_varlen",
    "_flash_3",
    "_flash_varlen_3",
    "flash_hub",
    "flash_varlen_hub",
    "_flash_3_hub",
    "_flash_3_varlen_hub",
    "flash_4_hub",
    "aiter_fa2_hub",
    "sage",
    "sage_varlen",
    "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90",
    "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
    "sage_hub",
    "sage_blackwell_hub",
]
"""The ways to compute attention that diffusers has on CPUs and GPUs, by its own names."""


class Section(BaseModel):
    """Keys that belong together. Frozen; a key that it does not have is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
