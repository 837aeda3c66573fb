"""Both stores keep the same promises, through every failure that a network or a killed process can cause."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import SEEK_END
from pathlib import Path

import pytest
from s3_server import KEYS, LOSE, LOSE_500, NO_CONDITION, REFUSE, S3Server

from overtone.jobs.errors import StoreError, StoreRefused, StoreUnsafe, UserError
from overtone.jobs.store import NoSuchObject, Store, StoreConfig, open_store, probed
from overtone.jobs.store.base import StoreGuarantees
from overtone.jobs.store.open import open_config

FAST = {"backoff_s": 0.001, "retries": 5}
PARTS_ONLY = StoreGuarantees(single=False, multipart=True, max_single_bytes=5 * 1024**3)
MIB = 1024**2


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        with S3Server() as server:
            yield server


@pytest.fixture(scope="module")
def shared(server) -> dict[str, Store]:
    """Making a boto3 client takes longer than most tests."""
    store = open_store(f"s3://{server.bucket()}/run/7", endpoint_url=server.endpoint_url, region="us-east-1")
    whole = replace(store.config, **FAST)
    return {
        "s3": open_config(whole),
        "s3 in parts": open_config(replace(whole, guarantees=PARTS_ONLY)),
    }


@pytest.fixture
def s3(server, shared) -> Store:
    server.fault = lambda method, path, query: None
    server.empty(shared["s3"].url.split("/")[2])
    return shared["s3"]


@pytest.fixture(params=["local", "s3", "s3 in parts"])
def store(request, tmp_path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "out"))
    request.getfixturevalue("s3")
    return request.getfixturevalue("shared")[request.param]


# What both promise


def test_the_first_create_wins_and_the_same_attempt_may_ask_again(store):
    assert store.create("data/x", b"first", attempt="a")
    assert not store.create("data/x", b"second", attempt="b")
    assert store.create("data/x", b"first", attempt="a")
    assert store.read("data/x") == b"first"
    found = store.head("data/x")
    assert (found.size_bytes, found.attempt) == (5, "a")
    assert found.modified_s == pytest.approx(time.time(), abs=60)


def test_of_many_writers_at_once_one_gets_true(store):
    barrier = threading.Barrier(8)

    def write(n: int) -> bool:
        barrier.wait()
        return store.create("data/x", b"%d" % n * 1000, attempt=f"a{n}")

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    assert store.read("data/x") == b"%d" % won.index(True) * 1000


def test_reads_are_ranges(store):
    store.put("x", b"0123456789")
    assert store.read("x", 2, 3) == b"234"
    assert store.read("x", -3) == b"789"
    assert store.read("x", -3, 2) == b"78"
    assert store.read("x", 8, 100) == b"89"
    assert store.read("x", 100) == store.read("x", 5, 0) == b""
    with store.open("x") as file:
        assert file.seek(-4, SEEK_END) == 6
        assert file.read(2) == b"67"
        assert file.seek(0) == 0
        assert file.read() == b"0123456789"


def test_what_is_not_there(store):
    assert store.head("nothing") is None
    assert list(store.list("nothing/")) == []
    store.delete("nothing")
    with pytest.raises(NoSuchObject, match="nothing does not exist"):
        store.read("nothing")
    with pytest.raises(NoSuchObject):
        store.open("nothing")


def test_put_replaces_and_delete_removes(store):
    store.put("x", b"one")
    etag = store.head("x").etag
    store.put("x", b"other")
    assert store.read("x") == b"other"
    assert store.head("x").etag != etag
    store.delete("x")
    assert store.head("x") is None


def test_listing_is_by_prefix_and_in_key_order(store):
    keys = ["a-b", "a/b", "a/c/d", "ab", "b", "a/ü"]
    for key in keys:
        store.create(key, key.encode(), attempt="1")
    assert [info.key for info in store.list()] == sorted(keys)
    assert [info.key for info in store.list("a/")] == ["a/b", "a/c/d", "a/ü"]
    assert [info.key for info in store.list("a")] == ["a-b", "a/b", "a/c/d", "a/ü", "ab"]
    assert [info.key for info in store.list("a", after="a/b")] == ["a/c/d", "a/ü", "ab"]
    assert [info.key for info in store.list("a/", after="a/c")] == ["a/c/d", "a/ü"]
    assert next(iter(store.list("a/c"))).size_bytes == 5


def test_bytes_may_come_from_a_file(store, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"from a file")
    assert store.create("x", source, attempt="1")
    store.put("y", source)
    assert store.read("x") == store.read("y") == b"from a file"
    with pytest.raises(StoreError, match="gone"):
        store.put("z", tmp_path / "gone")
    assert store.head("z") is None


@pytest.mark.parametrize("key", ["", "/x", "x/", "a//b", "../x", "a/../b", ".", "a/./b", "a\0b"])
def test_keys_cannot_leave_the_store(store, key):
    for call in (store.read, store.head, store.open, store.delete, lambda key: store.put(key, b"")):
        with pytest.raises(ValueError, match="not an object key"):
            call(key)
    with pytest.raises(ValueError, match="not an object key"):
        store.create(key, b"", attempt="1")


def test_a_probed_store_travels_in_a_pickle_without_secrets(store):
    safe = probed(store)
    assert safe.config.guarantees == StoreGuarantees(True, True, safe.config.guarantees.max_single_bytes)
    assert list(store.list("_job/probe/")) == []
    safe.put("x", b"1")
    pickled = pickle.dumps(safe)
    assert not any(secret.encode() in pickled for secret in KEYS.values())
    assert pickle.loads(pickled).read("x") == b"1"


# The local one


def test_a_local_store_hides_its_temporary_files_and_sweeps_only_dead_ones(tmp_path):
    store = open_store(str(tmp_path))
    store.create("data/x", b"x", attempt="1")
    left = tmp_path / "_job/.tmp/left"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    assert [info.key for info in store.list()] == ["data/x"]
    with store.hidden(b"alive", None) as alive:
        os.utime(alive, (0, 0))
        assert store.sweep() == 1
        assert alive.exists()
    assert not left.exists()
    with pytest.raises(ValueError, match="being written"):
        store.read("_job/.tmp/left")


def test_local_objects_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        open_store(str(tmp_path)).put("x", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_local_errors_name_the_object_and_say_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    store = open_store(str(tmp_path / "file" / "out"))
    with pytest.raises(StoreError, match=r"file/out/x: .*; a file stands where a folder is needed"):
        store.put("x", b"")
    store = open_store(str(tmp_path))
    with pytest.raises(StoreError, match="choose a shorter name"):
        store.put("x" * 300, b"")


def test_a_writer_killed_at_any_moment_leaves_whole_objects_or_none(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        from overtone.jobs.store import open_store
        store = open_store(sys.argv[1])
        store.create("data/first", b"first" * 400_000, attempt="a")
        print("go", flush=True)
        for i in range(10_000):
            store.create(f"data/{i:05d}", b"%05d" % i * 400_000, attempt="a")
        """
    )
    for round_ in range(3):
        folder = tmp_path / str(round_)
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
        )
        assert writer.stdout.readline() == b"go\n"
        time.sleep(0.05 + 0.037 * round_)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        store = open_store(str(folder))
        for info in store.list("data/"):
            assert store.read(info.key) == info.key.removeprefix("data/").encode() * 400_000
        store.sweep(older_than_s=0)
        assert list((folder / "_job/.tmp").iterdir()) == []


# The one on S3


@pytest.mark.parametrize("multipart", [False, True])
@pytest.mark.parametrize("fault", [REFUSE, LOSE, LOSE_500])
@pytest.mark.parametrize("failures", [1, 3])
def test_whatever_is_lost_on_the_way_a_create_is_settled_once(server, s3, multipart, fault, failures):
    left = [failures]

    def failing(method: str, path: str, query: str) -> str | None:
        if method in ("PUT", "POST") and "uploads" not in query and left[0]:
            left[0] -= 1
            return fault
        return None

    server.fault = failing
    assert s3.create_as("x", b"ours", attempt="a", multipart=multipart)
    left[0] = failures
    assert not s3.create_as("x", b"theirs", attempt="b", multipart=multipart)
    assert s3.read("x") == b"ours"
    assert "Uploads" not in server.client.list_multipart_uploads(Bucket=s3.url.split("/")[2])


@pytest.mark.parametrize("multipart", [False, True])
def test_an_object_made_by_the_last_try_is_ours(server, s3, multipart):
    server.fault = lambda method, path, query: (
        LOSE_500
        if method in ("PUT", "POST") and "uploads" not in query and "partNumber" not in query
        else None
    )
    assert s3.create_as("x", b"ours", attempt="a", multipart=multipart)


def test_a_server_that_is_down_is_named_after_all_tries(server, s3):
    server.fault = lambda method, path, query: REFUSE
    before = len(server.requests)
    with pytest.raises(StoreError, match=r"s3://.*/run/7/x: 6 tries failed.*503.*can be reached") as caught:
        s3.create("x", b"", attempt="a")
    assert len(server.requests) - before >= 6
    assert not any(secret in str(caught.value) for secret in KEYS.values())
    gone = open_config(replace(s3.config, endpoint_url="http://127.0.0.1:1", retries=1))
    with pytest.raises(StoreError, match=r"http://127.0.0.1:1 can be reached"):
        gone.read("x")


def test_large_objects_go_in_pieces_and_read_back_by_ranges(server, s3):
    large = open_config(replace(s3.config, part_bytes=5 * MIB))
    data = os.urandom(11 * MIB)
    before = len(server.requests)
    assert large.create("x", data, attempt="a")
    pieces = [query for method, _, query in server.requests[before:] if method == "PUT"]
    assert sorted(query.split("&")[1] for query in pieces) == ["partNumber=1", "partNumber=2", "partNumber=3"]
    assert large.head("x").attempt == "a"
    with large.open("x") as file:
        file.seek(5 * MIB - 3)
        assert file.read(6) == data[5 * MIB - 3 :][:6]
    assert large.read("x") == data
    large.put("x", data[::-1])
    assert large.read("x", -5) == data[:5][::-1]


def test_an_interrupted_upload_is_aborted(server, s3):
    server.fault = lambda method, path, query: REFUSE if "partNumber" in query else None
    with pytest.raises(StoreError):
        s3.create_as("x", b"ours", attempt="a", multipart=True)
    assert "Uploads" not in server.client.list_multipart_uploads(Bucket=s3.url.split("/")[2])
    assert s3.head("x") is None


def test_sweep_aborts_uploads_that_dead_writers_left(server, s3):
    bucket = s3.url.split("/")[2]
    server.client.create_multipart_upload(Bucket=bucket, Key="run/7/data/x")
    server.client.create_multipart_upload(Bucket=bucket, Key="other/y")
    assert s3.sweep(older_than_s=1e12) == 0  # it may be a live writer's
    assert s3.sweep(older_than_s=0) == 1
    left = server.client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert [upload["Key"] for upload in left] == ["other/y"]


def test_a_server_that_ignores_the_condition_is_refused(server, s3):
    server.fault = lambda method, path, query: NO_CONDITION
    assert s3.probe() == StoreGuarantees(False, False, 5 * 1024**3)
    with pytest.raises(StoreUnsafe, match=r"unsafe_overwrite: true"):
        probed(s3)
    willing = probed(open_config(replace(s3.config, unsafe_overwrite=True)))
    assert willing.create("x", b"first", attempt="a")
    assert not willing.create("x", b"second", attempt="b")


@pytest.mark.parametrize(("ignored", "used"), [("POST", "single"), ("PUT", "multipart")])
def test_where_one_way_to_create_is_unsafe_only_the_other_is_used(server, s3, ignored, used):
    server.fault = lambda method, path, query: NO_CONDITION if method == ignored else None
    store = probed(open_config(replace(s3.config, part_bytes=5 * MIB)))
    found = store.config.guarantees
    assert (found.single, found.multipart) == (used == "single", used == "multipart")
    data = bytes(11 * MIB) if used == "single" else b"small"
    assert store.create("x", data, attempt="a")
    assert not store.create("x", b"second" * 2 * MIB if used == "single" else b"second", attempt="b")
    assert store.read("x") == data
    assert store.head("x").attempt == "a"
    tight = open_config(replace(store.config, guarantees=replace(found, max_single_bytes=1000)))
    if used == "single":
        with pytest.raises(StoreError, match="make fewer rows a shard"):
            tight.create("y", data, attempt="a")


def test_an_object_replaced_while_it_is_read_is_noticed(s3):
    s3.put("x", b"a" * 300_000)
    with s3.open("x") as file:
        file.read(10)
        s3.put("x", b"b" * 300_000)
        with pytest.raises(StoreError, match="was replaced while it was being read"):
            file.read()


def test_refusals_of_the_server_come_at_once_and_say_what_to_do(server, s3, monkeypatch):
    store = open_store("s3://no-such-bucket-here/x", endpoint_url=server.endpoint_url, region="us-east-1")
    before = len(server.requests)
    with pytest.raises(StoreError, match="create the bucket"):
        store.create("x", b"", attempt="a")
    assert len(server.requests) - before == 1
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(StoreError, match="set AWS_ACCESS_KEY_ID"):
        open_config(s3.config).read("x")


# Names of places


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("file:///tmp/a%20b", "/tmp/a b"),
        ("/tmp/x/", "/tmp/x"),
        ("out", str(Path.cwd() / "out")),
    ],
)
def test_places(url, wanted):
    assert open_store(url).url == wanted


@pytest.mark.parametrize(
    "url", ["", "s3://", "s3:///x", "s3://b/../x", "s3://key:secret@bucket/x", "gs://b/x", "file://host/x"]
)
def test_places_that_are_none(url):
    with pytest.raises(UserError) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_an_endpoint_with_a_password_is_refused_without_repeating_it():
    with pytest.raises(UserError, match="must not carry credentials") as caught:
        open_store("s3://bucket/x", endpoint_url="http://key:hunter2@host")
    assert "hunter2" not in str(caught.value)
    assert open_config(StoreConfig("s3://bucket/x")).url == "s3://bucket/x"


# Keys that are renewed, servers that are silent, mistakes.


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """Write the shared credentials file, where boto3 then finds its keys."""
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def write(key: str) -> None:
        text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\naws_session_token = t\n"
        (tmp_path / "credentials").write_text(text)

    return write


def test_keys_that_are_renewed_while_a_store_is_open_are_read_anew(server, keys):
    keys("old-key")
    server.fault = lambda method, path, query: None
    url, retries = f"s3://{server.bucket()}/run", FAST["retries"]
    store = open_store(url, endpoint_url=server.endpoint_url, region="us-east-1", retries=retries)
    assert store.create("data/a", b"a", attempt="one")
    server.expired = {"old-key"}
    try:
        keys("new-key")
        assert store.create("data/b", b"b", attempt="one")
        assert store.read("data/a") == b"a"

        server.expired = {"old-key", "new-key"}  # and this time they are renewed a little late
        later = threading.Timer(0.5, keys, ("newest-key",))
        later.start()
        assert store.head("data/b").attempt == "one"
        later.join()

        server.expired.add("newest-key")  # a store that is opened with bad keys does not wait for better ones
        fresh = open_store(url, endpoint_url=server.endpoint_url, region="us-east-1")
        began = time.monotonic()
        with pytest.raises(StoreRefused, match=r"ExpiredToken.*renew the session's credentials"):
            fresh.read("data/a")
        assert time.monotonic() - began < 5
    finally:
        server.expired = set()


def test_a_store_that_says_nothing_is_named_after_seconds(caplog):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections into its queue
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        config = open_store("s3://bucket/run", endpoint_url=endpoint, region="us-east-1").config
        store = open_config(replace(config, read_timeout_s=8.0, retries=0))
        with pytest.raises(StoreError):
            store.head("data/x")
    [told] = [record.getMessage() for record in caplog.records if "waiting for" in record.getMessage()]
    assert told == f"waiting for {endpoint}: s3://bucket/run/data/x has taken 5 s so far"


def test_a_mistake_about_the_store_is_one_and_a_fault_that_passes_is_not(server, tmp_path, keys):
    (tmp_path / "file").touch()
    with pytest.raises(StoreRefused) as caught:
        open_store(str(tmp_path / "file" / "out")).put("x", b"")
    assert caught.value.exit_code == 2
    with pytest.raises(StoreRefused, match="AWS_ACCESS_KEY_ID") as caught:
        open_store("s3://bucket/run", endpoint_url=server.endpoint_url, region="us-east-1").put("x", b"")
    assert caught.value.exit_code == 2
    keys("a-key")
    with pytest.raises(StoreRefused, match="create the bucket"):
        open_store("s3://no-such-bucket/run", endpoint_url=server.endpoint_url, region="us-east-1").put(
            "x", b""
        )
    nowhere = open_store("s3://bucket/run", endpoint_url="http://127.0.0.1:1", region="us-east-1", retries=0)
    with pytest.raises(StoreError) as caught:
        nowhere.put("x", b"")
    assert caught.value.exit_code == 3
