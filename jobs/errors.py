"""Every error that a user of Overtone can meet. Knows nothing else of the project.

OvertoneError
├── UserError(ValueError)        a mistake to correct; the CLI prints one line and exits with 2
│   ├── SpecError                the job spec: which key, which line
│   ├── PromptsError             the prompt table: which file, column, row
│   ├── ModelError               the model cannot be loaded, on this machine or another
│   ├── SizeError                a size that the model cannot make; names the nearest that it can
│   ├── StoreUnsafe              the store would let two writers both win
│   └── FingerprintMismatch      the output folder belongs to another job; shows the difference
├── StoreError                   the store said no, or could not be reached after all retries
│   ├── StoreRefused             it would say no again: a right, a key or a place is to be corrected; exit 2
│   └── StoreConflict            somebody else's object is under that name
├── JobError                     the job ended early and can be resumed; the CLI exits with 3
│   ├── StaleDriver              a newer driver took the job over
│   ├── NoWorkersLeft            every worker was retired
│   └── TooManyRejects           more rejects than `max_reject_fraction` allows
├── VerifyError                  the output is not what the job promised; the CLI exits with 4
└── RowError                     one row cannot be made; becomes a reject, never ends a job
    └── PictureError             the picture that it starts from cannot be decoded
"""

from __future__ import annotations


class OvertoneError(Exception):
    """Base of all errors raised by `jobs` and `cluster` on purpose."""

    exit_code = 3
    """Of the command line."""


class UserError(OvertoneError, ValueError):
    """A mistake in what the user gave; the message says where it is and what to change."""

    exit_code = 2


class SpecError(UserError):
    """The job spec cannot be used."""


class PromptsError(UserError):
    """The prompt table cannot be used."""


class ModelError(UserError):
    """The model cannot be loaded."""


class SizeError(UserError):
    """A size that the model cannot make."""


class StoreUnsafe(UserError):
    """The store does not refuse a second create, so two writers could both win."""


class FingerprintMismatch(UserError):
    """The output folder holds another job."""


class StoreError(OvertoneError):
    """The store refused, or could not be reached after all retries."""


class StoreRefused(StoreError):
    """The store refused, and will until its rights, keys or name are corrected. While a job runs it counts as
    any other fault of the store, since keys are renewed and rights are given back."""

    exit_code = 2


class StoreConflict(StoreError):
    """Another writer's object is under the name."""


class JobError(OvertoneError):
    """The job ended before its last shard; what is committed stays and a later run resumes."""


class StaleDriver(JobError):
    """A newer driver took the job over."""


class NoWorkersLeft(JobError):
    """Every worker was retired."""


class TooManyRejects(JobError):
    """More rows were rejected than the spec allows."""


class VerifyError(OvertoneError):
    """The output is not what the job promised."""

    exit_code = 4


class RowError(OvertoneError):
    """One row cannot be made. Carries what the reject will say; `phase` is what failed, `denoise` say."""

    def __init__(self, message: str, *, row_id: str, phase: str) -> None:
        super().__init__(message)
        self.row_id = row_id
        self.phase = phase

    def __reduce__(self):  # keyword-only arguments do not survive the default pickling
        return (_row_error, (str(self), self.row_id, self.phase))


def _row_error(message: str, row_id: str, phase: str) -> RowError:
    return RowError(message, row_id=row_id, phase=phase)


class PictureError(RowError):
    """The picture that a row starts from cannot be decoded. `rows`: which it is of those it was read with."""

    def __init__(self, message: str, *, row_id: str, row: int) -> None:
        super().__init__(message, row_id=row_id, phase="image_read")
        self.rows = (row,)

    def __reduce__(self):
        return (_picture_error, (str(self), self.row_id, *self.rows))


def _picture_error(message: str, row_id: str, row: int) -> PictureError:
    return PictureError(message, row_id=row_id, row=row)
