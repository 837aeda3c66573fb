"""What is done about an exception, by its type, in one table. Knows no Ray, no torch: it matches names.

A type that is not listed inherits the action of its nearest listed ancestor, so `FileNotFoundError` is
treated as listed here and `BlockingIOError` as an `OSError`. Names instead of classes, because neither
torch nor botocore need be importable where a verdict is asked for.
"""

from __future__ import annotations

import enum
import traceback
from dataclasses import dataclass


class Action(enum.StrEnum):
    """What happens after a failure."""

    REJECT_ROW = "reject_row"
    """The row cannot be made: it becomes a reject. In a batch, the batch is halved until it is alone."""

    RETRY = "retry"
    """It may pass: try again, elsewhere if possible, after a pause; attempts are counted."""

    HALVE_BATCH = "halve_batch"
    """Out of memory: run the rows in smaller batches and remember what fits; at one row, a reject."""

    FAIL_JOB = "fail_job"
    """A mistake in the program or its settings that every row would meet: stop with the traceback."""

    REPLACE_WORKER = "replace_worker"
    """The process cannot be trusted any more: kill it, treat its rows as if it had died."""


TABLE: dict[str, Action] = {
    # Mistakes of the user or of ours: the same everywhere, however often it is tried.
    "overtone.jobs.errors.UserError": Action.FAIL_JOB,
    "overtone.jobs.errors.JobError": Action.FAIL_JOB,
    "overtone.jobs.errors.VerifyError": Action.FAIL_JOB,
    "builtins.TypeError": Action.FAIL_JOB,
    "builtins.AttributeError": Action.FAIL_JOB,
    "builtins.NameError": Action.FAIL_JOB,
    "builtins.ImportError": Action.FAIL_JOB,
    "builtins.SyntaxError": Action.FAIL_JOB,
    "builtins.AssertionError": Action.FAIL_JOB,
    "builtins.NotImplementedError": Action.FAIL_JOB,
    "builtins.FileNotFoundError": Action.FAIL_JOB,
    "builtins.PermissionError": Action.FAIL_JOB,
    "safetensors._safetensors_rust.SafetensorError": Action.FAIL_JOB,
    "huggingface_hub.errors.RepositoryNotFoundError": Action.FAIL_JOB,
    "huggingface_hub.errors.EntryNotFoundError": Action.FAIL_JOB,
    "huggingface_hub.errors.RevisionNotFoundError": Action.FAIL_JOB,
    "torch._dynamo.exc.TorchDynamoException": Action.FAIL_JOB,
    "overtone.progressive.errors.Recompiled": Action.FAIL_JOB,
    # A row's own fault.
    "overtone.jobs.errors.RowError": Action.REJECT_ROW,
    "overtone.jobs.errors.SizeError": Action.REJECT_ROW,
    "overtone.progressive.errors.NonFiniteLatents": Action.REJECT_ROW,
    "builtins.Exception": Action.REJECT_ROW,
    # The network, the store, the disk: passes, or will somewhere else.
    "overtone.jobs.errors.StoreError": Action.RETRY,
    "builtins.OSError": Action.RETRY,
    "builtins.EOFError": Action.RETRY,
    "botocore.exceptions.BotoCoreError": Action.RETRY,
    "botocore.exceptions.ClientError": Action.RETRY,
    "urllib3.exceptions.HTTPError": Action.RETRY,
    "httpx.TransportError": Action.RETRY,
    # Memory.
    "torch.OutOfMemoryError": Action.HALVE_BATCH,
    "builtins.MemoryError": Action.HALVE_BATCH,
    # The device or the process is broken: nothing that runs on it afterwards means anything.
    "torch.AcceleratorError": Action.REPLACE_WORKER,
    "torch.cuda.CudaError": Action.REPLACE_WORKER,
    "torch.cuda.DeferredCudaCallError": Action.REPLACE_WORKER,
    "ray.exceptions.RayError": Action.REPLACE_WORKER,
    # Ray's own task wrapper: nothing of ours raises through it (runners report failures as data).
    "ray.exceptions.RayTaskError": Action.FAIL_JOB,
    "builtins.BaseException": Action.REPLACE_WORKER,
}

STARTING: dict[str, Action] = {
    # While a worker loads its model there is no row to blame: a wrong value is in the spec or the model's
    # files and the same for all, anything else may be this machine's.
    "builtins.ValueError": Action.FAIL_JOB,
    "builtins.LookupError": Action.FAIL_JOB,
    "builtins.Exception": Action.REPLACE_WORKER,
    "builtins.OSError": Action.REPLACE_WORKER,
    "overtone.jobs.errors.StoreError": Action.REPLACE_WORKER,
    "torch.OutOfMemoryError": Action.REPLACE_WORKER,
    "builtins.MemoryError": Action.REPLACE_WORKER,
}
"""Comes before `TABLE` while a worker starts."""


def action_for(error: BaseException | type[BaseException], *, starting: bool = False) -> Action:
    """The action for an exception or its type: that of the first listed class in method resolution order."""
    cls = error if isinstance(error, type) else type(error)
    table = TABLE | STARTING if starting else TABLE
    for base in cls.__mro__:
        action = table.get(f"{base.__module__}.{base.__qualname__}")
        if action is not None:
            return action
    return Action.REPLACE_WORKER


@dataclass(frozen=True)
class Failure:
    """An exception as data: what crosses from a worker to the driver, so that nothing need be unpickled."""

    action: Action
    error_class: str
    message: str
    stage: str
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException, stage: str, *, starting: bool = False) -> Failure:
        """Describe `error`, which happened in `stage`, and what the table says about it."""
        return cls(
            action=action_for(error, starting=starting),
            error_class=type(error).__name__,
            message=first_line(error),
            stage=stage,
            traceback="".join(traceback.format_exception(error)),
        )


def first_line(error: BaseException, limit: int = 1000) -> str:
    """The error's message on one line, at most `limit` characters; its type's name when it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
