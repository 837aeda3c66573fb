"""The table of faults: which verdict an exception's type asks for, and how a failure travels as data."""

from __future__ import annotations

import pickle

import pytest

from overtone.cluster.faults import STARTING, TABLE, Failure, Verdict, first_line, verdict_for
from overtone.cluster.fleet import held_most
from overtone.jobs.errors import RowError, SizeError, SpecError, StaleDriver, StoreConflict, StoreError


class OddError(ValueError):
    """A type that no table lists."""


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (RowError("bad", row_id="1", phase="text_encode"), Verdict.REJECT_ROW),
        (SizeError("100 px"), Verdict.REJECT_ROW),
        (SpecError("no such key"), Verdict.FAIL_JOB),
        (StaleDriver("epoch 4"), Verdict.FAIL_JOB),
        (StoreError("503"), Verdict.RETRY),
        (StoreConflict("taken"), Verdict.RETRY),
        (ConnectionResetError(), Verdict.RETRY),
        (TimeoutError(), Verdict.RETRY),
        (FileNotFoundError("gone"), Verdict.FAIL_JOB),
        (MemoryError(), Verdict.HALVE_BATCH),
        (RuntimeError("anything"), Verdict.REJECT_ROW),
        (OddError("anything"), Verdict.REJECT_ROW),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), Verdict.REJECT_ROW),
        (TypeError("got an unexpected keyword"), Verdict.FAIL_JOB),
        (ModuleNotFoundError("no module"), Verdict.FAIL_JOB),
        (SystemExit(1), Verdict.REPLACE_WORKER),
        (KeyboardInterrupt(), Verdict.REPLACE_WORKER),
    ],
)
def test_the_type_decides(error, verdict):
    assert verdict_for(error) is verdict
    assert verdict_for(type(error)) is verdict


def test_while_a_worker_starts_no_row_is_to_blame():
    assert verdict_for(ValueError("unknown scheduler"), starting=True) is Verdict.FAIL_JOB
    assert verdict_for(RuntimeError("no device"), starting=True) is Verdict.REPLACE_WORKER
    assert verdict_for(ConnectionError("hub"), starting=True) is Verdict.REPLACE_WORKER
    assert verdict_for(FileNotFoundError("model_index.json"), starting=True) is Verdict.FAIL_JOB
    assert not any(a is Verdict.REJECT_ROW for a in STARTING.values())


def test_torch_types_match_by_name():
    torch = pytest.importorskip("torch")
    assert verdict_for(torch.OutOfMemoryError("CUDA out of memory")) is Verdict.HALVE_BATCH
    assert verdict_for(torch.OutOfMemoryError("CUDA out of memory"), starting=True) is Verdict.REPLACE_WORKER
    assert verdict_for(torch.AcceleratorError) is Verdict.REPLACE_WORKER


def test_every_name_in_the_table_exists():
    """A name that no class has would silently never match."""
    import importlib

    for name in [*TABLE, *STARTING]:
        module, _, cls = name.rpartition(".")
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            assert not module.startswith(("overtone.", "builtins"))  # an optional package
            continue
        kind = getattr(found, cls)
        assert f"{kind.__module__}.{kind.__qualname__}" == name


def test_a_failure_is_plain_data():
    try:
        raise StoreError("PUT data/x\nfailed: 503")
    except StoreError as error:
        failure = Failure.of(error, "upload")
    again = pickle.loads(pickle.dumps(failure))
    assert again == failure
    assert (again.verdict, again.error_class, again.phase) == (Verdict.RETRY, "StoreError", "upload")
    assert again.message == "PUT data/x failed: 503"
    assert "raise StoreError" in again.traceback


def test_messages_are_one_line_and_bounded():
    assert first_line(RuntimeError()) == "RuntimeError"
    assert first_line(RuntimeError("a\n\tb")) == "a b"
    assert len(first_line(RuntimeError("x" * 5000), limit=100)) == 100


@pytest.mark.parametrize(
    ("own", "blamed"),
    [("pid=17, actual memory used=50.20GB", True), ("pid=17, actual memory used=5.20GB", False), ("", True)],
)
def test_who_dies_for_memory_that_others_hold_is_not_to_blame(own, blamed):
    """In the words in which Ray tells it; they may not say whose the memory was."""
    text = (
        "Memory on the node (IP: 10.0.0.1, ID: ab) was 61.03GB used / 64.00GB limit (0.953), which exceeds "
        f"the threshold. Workers killed: (Actor: {own or 'pid=18, actual memory used=1.0GB'}, worker ID=cd)"
    )
    assert held_most(text, 17) is blamed
