"""Pictures from the web: what is fetched, from where, and what a row's reject says of what is not."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from overtone.jobs.prompts.web import WebError, fetch, is_public, shown

FILE = b"a picture" * 1000


class Site:
    """A server on this machine's two loopback addresses, and how often each path was asked for."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.closing = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                site.asked[path] += 1
                moved = {
                    "/moved": "/a.png?x=1",
                    "/inside": site.at("/a.png", "127.0.0.2"),
                    "/round": "/round",
                }
                busy = path == "/busy" and site.asked[path] < 3
                status = 302 if path in moved else 503 if busy else 404 if path == "/none" else 200
                self.send_response(status)
                if path in moved:
                    self.send_header("Location", moved[path])
                body = FILE if status == 200 else b""
                if path != "/slow":
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if path == "/breaks" and site.asked[path] < 3:
                    body = body[:100]
                while path == "/slow" and not site.closing.wait(0.05):
                    self.wfile.write(b"a")
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def at(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server.server_port}{path}"

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    one = Site()
    yield one
    one.close()


def get(url: str, most_bytes: int = 10**6) -> bytes:
    """From the first of the two addresses alone."""
    return fetch(url, most_bytes, allowed=lambda address: address == "127.0.0.1", pauses_s=(0.0, 0.0))


def test_a_file_is_fetched_through_redirects_and_from_a_server_that_is_busy_at_first(site):
    assert get(site.at("/a.png")) == FILE
    assert get(site.at("/moved")) == FILE
    assert get(site.at("/busy")) == FILE
    assert site.asked["/busy"] == 3
    assert get(site.at("/a b/ü.png?c d")) == FILE
    assert site.asked["/a%20b/%C3%BC.png"] == 1


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/none?token=s3cret", "/none answers 404"),
        ("/round", "more than 3 redirects"),
        ("/inside", "is not at a public address"),
    ],
)
def test_what_cannot_be_had_is_said_without_what_may_be_secret(site, path, why):
    with pytest.raises(WebError, match=why) as caught:
        get(site.at(path).replace("//", "//me:pw@"))
    assert "s3cret" not in str(caught.value)
    assert "pw" not in str(caught.value)
    assert site.asked["/a.png"] == 0


def test_a_file_that_is_too_large_is_not_read_to_its_end(site):
    with pytest.raises(WebError, match="has more than 100 bytes"):
        get(site.at("/a.png"), 100)


def test_a_file_that_breaks_off_is_asked_for_again_and_never_taken_for_a_whole_one(site):
    assert get(site.at("/breaks")) == FILE
    assert site.asked["/breaks"] == 3


def test_a_server_that_sends_a_byte_now_and_then_is_cut_off(site):
    with pytest.raises(WebError, match=r"/slow takes more than 0\.3 s"):
        fetch(site.at("/slow"), 10**6, allowed=lambda _: True, pauses_s=(), total_s=0.3)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/a",
        "http://localhost:1/a",
        "http://[::1]:1/a",
        "http://2130706433:1/a",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/a",
        "http://[::ffff:10.0.0.1]/a",
    ],
)
def test_no_private_address_is_asked(url):
    with pytest.raises(WebError, match="is not at a public address"):
        fetch(url, 100, pauses_s=())


@pytest.mark.parametrize("url", ["http:///a", "http://a:x/", "http://[::1/"])
def test_what_is_no_url_is_said_so(url):
    with pytest.raises(WebError, match=r"is no http or https URL|names no host"):
        fetch(url, 100, pauses_s=())


def test_addresses():
    public = ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"]
    private = [
        "192.168.1.1",
        "100.64.0.1",
        "0.0.0.0",
        "fe80::1%eth0",
        "fd00::1",
        "224.0.0.1",
        "::",
        "2002:a00:1::",
        "64:ff9b::a00:1",
        "64:ff9b:1::1",
        "::127.0.0.1",
        "::ffff:0:127.0.0.1",
        "fec0::1",
    ]
    assert [address for address in public + private if is_public(address)] == public
    assert shown("https://me:pw@example.org:8443/a/b.png?sig=1#x") == "https://example.org/a/b.png"
