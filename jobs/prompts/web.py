"""Pictures by http and https, from public addresses alone. Knows no tables.

    data = fetch("https://example.org/a.jpg")       # WebError, which never shows a password or a query

A table may come from anybody, and the machine that reads it may reach what its author cannot: the cloud's
metadata server, a database without a password. So a name is looked up once, every address that it has must be
public, and the connection goes to that address, after a redirect too.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import quote, urljoin, urlsplit

TIMEOUT_S = 20.0
"""Of each answer of a server."""
TOTAL_S = 60.0
"""Of one try at a file, however slowly it comes."""
_PAUSES_S = (1.0, 3.0)
_REDIRECTS = 3
_PASSING = {408, 429, 500, 502, 503, 504}
_CHUNK = 256 * 1024
_UNICAST = ipaddress.ip_network("2000::/3")
"""All of IPv6 that is given to anybody in the world."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""Where a network without IPv4 finds it: an IPv4 address in the last four bytes (RFC 6052)."""
_IN_URLS = "%/:?@!$&'()*+,;=~-._"
"""Characters that stay as they are; a table may have spaces and any letters in its URLs."""


class WebError(ValueError):
    """Why a file cannot be had."""


def is_public(address: str) -> bool:
    """Whether an address is one that all the world may ask; so are those that IPv6 writes for IPv4."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            inner = ipaddress.IPv4Address(found.packed[-4:])
        if inner is not None:
            return is_public(str(inner))
        if found not in _UNICAST:
            return False
    return found.is_global and not found.is_multicast


def fetch(
    url: str,
    most_bytes: int,
    *,
    allowed: Callable[[str], bool] = is_public,
    pauses_s: tuple[float, ...] = _PAUSES_S,
    total_s: float = TOTAL_S,
) -> bytes:
    """The file, of at most `most_bytes`. What may pass (no answer, a busy server, a file that breaks off) is
    tried three times, each for at most `total_s`. `allowed`: of an address, whether it may be asked."""
    for pause_s in (*pauses_s, None):
        try:
            return _followed(url, most_bytes, allowed, total_s)
        except _MayPassError as error:
            if pause_s is None:
                raise WebError(str(error)) from error
            time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")


def shown(url: str) -> str:
    """A URL without what may be secret in it: user, password, query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "what it names"
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"[:200]


class _MayPassError(Exception):
    """Another try may do."""


def _followed(url: str, most_bytes: int, allowed: Callable[[str], bool], total_s: float) -> bytes:
    until = time.monotonic() + total_s
    for _ in range(_REDIRECTS + 1):
        try:
            found = _asked(url, most_bytes, allowed, until)
        except ssl.SSLCertVerificationError as error:
            raise WebError(f"{shown(url)}: {error.verify_message}") from error
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() > until:
                raise WebError(f"{shown(url)} takes more than {total_s:g} s") from None
            raise _MayPassError(f"{shown(url)} does not answer: {type(error).__name__}") from error
        if isinstance(found, bytes):
            return found
        try:
            url = urljoin(url, found)
        except ValueError:
            raise WebError(f"{shown(url)} redirects to what is no URL") from None
    raise WebError(f"{shown(url)}: more than {_REDIRECTS} redirects")


def _asked(url: str, most_bytes: int, allowed: Callable[[str], bool], until: float) -> bytes | str:
    """The file, or the URL that the server sends us on to."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        raise WebError(f"{shown(url)} is no http or https URL") from None
    if not parts.hostname:
        raise WebError(f"{shown(url)} names no host")
    connection = _Connection(parts.hostname, port, _address(url, parts.hostname, port, allowed))
    if parts.scheme == "https":
        connection.context = ssl.create_default_context()
    try:
        query = f"?{quote(parts.query, safe=_IN_URLS)}" if parts.query else ""
        target = quote(parts.path or "/", safe=_IN_URLS) + query
        with connection.until(until):
            try:
                headers = {"User-Agent": "overtone", "Accept": "image/*,*/*;q=0.5"}
                connection.request("GET", target, headers=headers)
            except (http.client.InvalidURL, UnicodeEncodeError):
                raise WebError(f"{shown(url)} has characters that no URL may have") from None
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308):
                return answer.getheader("Location") or ""
            if answer.status in _PASSING:
                raise _MayPassError(f"{shown(url)} answers {answer.status}")
            if answer.status != 200:
                raise WebError(f"{shown(url)} answers {answer.status}")
            data = bytearray()
            while chunk := answer.read1(_CHUNK):
                data += chunk
                if len(data) > most_bytes:
                    raise WebError(f"{shown(url)} has more than {most_bytes:,} bytes")
            if answer.length or time.monotonic() > until:
                raise http.client.IncompleteRead(bytes(data))
        return bytes(data)
    finally:
        connection.close()


def _address(url: str, host: str, port: int, allowed: Callable[[str], bool]) -> str:
    """One address of a host, all of whose addresses may be asked."""
    try:
        found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (socket.gaierror, UnicodeError) as error:
        raise _MayPassError(f"{shown(url)}: there is no host {host!r}") from error
    addresses = [str(address) for address in found]
    if not addresses or not all(map(allowed, addresses)):
        raise WebError(f"{shown(url)} is not at a public address")
    return addresses[0]


class _Connection(http.client.HTTPConnection):
    """To one address, whatever the host's name means a moment later."""

    context: ssl.SSLContext | None = None

    def __init__(self, host: str, port: int, address: str) -> None:
        super().__init__(host, port, timeout=TIMEOUT_S)
        self._address = address

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), TIMEOUT_S)
        if self.context is not None:
            self.sock = self.context.wrap_socket(self.sock, server_hostname=self.host)

    @contextmanager
    def until(self, end: float) -> Iterator[None]:
        """Connected, and cut off at a time of the monotonic clock, even from a server that sends a byte now
        and then: then whatever reads fails, or finds that the file has ended."""
        self.connect()
        timer = threading.Timer(max(0.0, end - time.monotonic()), _cut, [self.sock])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _cut(sock: socket.socket) -> None:
    """End a connection from another thread, beneath TLS."""
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
