"""What is done about an exception, by its type, in one table. Knows no Ray, no torch: it matches names.

A type that is not listed inherits the verdict of its nearest listed ancestor, so `FileNotFoundError` is
treated as listed here and `BlockingIOError` as an `OSError`. The table holds names instead of classes,
because neither torch nor botocore need be importable where a verdict is asked for.
"""

from __future__ import annotations

import enum
import traceback
from dataclasses import dataclass

from overtone.jobs.errors import UserError


class Verdict(enum.StrEnum):
    """What happens after a failure."""

    REJECT_ROW = "reject_row"
    """The row cannot be made and becomes a reject. A batch is halved until the row is alone."""

    RETRY = "retry"
    """The fault may pass: the shard is tried again after a pause, elsewhere if possible, a few times."""

    HALVE_BATCH = "halve_batch"
    """Memory was too small: rows run in smaller batches from then on; one that fails alone is a reject."""

    FAIL_JOB = "fail_job"
    """The program or its settings have a mistake that every row would meet: the job stops with it."""

    REPLACE_WORKER = "replace_worker"
    """The process cannot be trusted any more: it is killed, and its rows are treated as if it had died."""


TABLE: dict[str, Verdict] = {
    # Mistakes of the user or of ours are the same everywhere, however often a shard is tried.
    "overtone.jobs.errors.UserError": Verdict.FAIL_JOB,
    "overtone.jobs.errors.JobError": Verdict.FAIL_JOB,
    "overtone.jobs.errors.VerifyError": Verdict.FAIL_JOB,
    "builtins.TypeError": Verdict.FAIL_JOB,
    "builtins.AttributeError": Verdict.FAIL_JOB,
    "builtins.NameError": Verdict.FAIL_JOB,
    "builtins.ImportError": Verdict.FAIL_JOB,
    "builtins.SyntaxError": Verdict.FAIL_JOB,
    "builtins.AssertionError": Verdict.FAIL_JOB,
    "builtins.NotImplementedError": Verdict.FAIL_JOB,
    "builtins.FileNotFoundError": Verdict.FAIL_JOB,
    "builtins.PermissionError": Verdict.FAIL_JOB,
    "safetensors._safetensors_rust.SafetensorError": Verdict.FAIL_JOB,
    "huggingface_hub.errors.RepositoryNotFoundError": Verdict.FAIL_JOB,
    "huggingface_hub.errors.EntryNotFoundError": Verdict.FAIL_JOB,
    "huggingface_hub.errors.RevisionNotFoundError": Verdict.FAIL_JOB,
    "torch._dynamo.exc.TorchDynamoException": Verdict.FAIL_JOB,
    "overtone.progressive.errors.Recompiled": Verdict.FAIL_JOB,
    # These are a row's own fault.
    "overtone.jobs.errors.RowError": Verdict.REJECT_ROW,
    "overtone.jobs.errors.SizeError": Verdict.REJECT_ROW,
    "overtone.progressive.errors.NonFiniteLatents": Verdict.REJECT_ROW,
    "overtone.progressive.errors.NonFinitePixels": Verdict.REJECT_ROW,
    "builtins.Exception": Verdict.REJECT_ROW,
    # Faults of the network, the store or the disk pass, or are not met somewhere else.
    "overtone.jobs.errors.StoreError": Verdict.RETRY,
    "builtins.OSError": Verdict.RETRY,
    "builtins.EOFError": Verdict.RETRY,
    "botocore.exceptions.BotoCoreError": Verdict.RETRY,
    "botocore.exceptions.ClientError": Verdict.RETRY,
    "urllib3.exceptions.HTTPError": Verdict.RETRY,
    "httpx.TransportError": Verdict.RETRY,
    # Memory was too small.
    "torch.OutOfMemoryError": Verdict.HALVE_BATCH,
    "builtins.MemoryError": Verdict.HALVE_BATCH,
    # The device or the process is broken, and nothing that runs there afterwards can be believed.
    "torch.AcceleratorError": Verdict.REPLACE_WORKER,
    "torch.cuda.CudaError": Verdict.REPLACE_WORKER,
    "torch.cuda.DeferredCudaCallError": Verdict.REPLACE_WORKER,
    "ray.exceptions.RayError": Verdict.REPLACE_WORKER,
    # Ray wraps in this what a task raises; ours raise nothing, because runners report failures as data.
    "ray.exceptions.RayTaskError": Verdict.FAIL_JOB,
    "builtins.BaseException": Verdict.REPLACE_WORKER,
}

STARTING: dict[str, Verdict] = {
    # While a worker loads its model there is no row to blame: a wrong value is in the spec or the model's
    # files and the same for all, anything else may be this machine's.
    "builtins.ValueError": Verdict.FAIL_JOB,
    "builtins.LookupError": Verdict.FAIL_JOB,
    "builtins.Exception": Verdict.REPLACE_WORKER,
    "builtins.OSError": Verdict.REPLACE_WORKER,
    "overtone.jobs.errors.StoreError": Verdict.REPLACE_WORKER,
    "torch.OutOfMemoryError": Verdict.REPLACE_WORKER,
    "builtins.MemoryError": Verdict.REPLACE_WORKER,
}
"""While a worker starts, these entries stand before those of `TABLE`."""


def verdict_for(error: BaseException | type[BaseException], *, starting: bool = False) -> Verdict:
    """The verdict on an exception or its type: that of the first listed class in method resolution order."""
    cls = error if isinstance(error, type) else type(error)
    table = TABLE | STARTING if starting else TABLE
    for base in cls.__mro__:
        verdict = table.get(f"{base.__module__}.{base.__qualname__}")
        if verdict is not None:
            return verdict
    return Verdict.REPLACE_WORKER


@dataclass(frozen=True)
class Failure:
    """An exception as data: it crosses from a worker to the driver, where nothing need be unpickled."""

    verdict: Verdict
    error_class: str
    message: str
    phase: str
    """The phase in which it failed: `read`, `denoise`, `commit` or another."""
    traceback: str = ""
    mistake: bool = False
    """It is the user's to correct, and the message says how: nobody needs the traceback."""

    @classmethod
    def of(cls, error: BaseException, phase: str, *, starting: bool = False) -> Failure:
        """Describe `error`, which happened in `phase`, and what the table says about it."""
        return cls(
            verdict=verdict_for(error, starting=starting),
            error_class=type(error).__name__,
            message=first_line(error),
            phase=phase,
            traceback="".join(traceback.format_exception(error)),
            mistake=isinstance(error, UserError),
        )


def first_line(error: BaseException, limit: int = 1000) -> str:
    """The error's message on one line, at most `limit` characters; its type's name when it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
