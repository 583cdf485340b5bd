"""Errors a user can act on: what is wrong, where (the site), and what to do."""

from __future__ import annotations

from typing import Self


class KdlsqError(Exception):
    """Base of every error raised for something a user handed in.

    The text reads ``what [at site]: do this``. Nothing is written or changed before one of these is raised.
    """

    def __init__(self, what: str, *, where: str = "", do: str = "") -> None:
        self.what, self.where, self.do = what, where, do
        super().__init__(what + (f" [at {where}]" if where else "") + (f"\n  -> {do}" if do else ""))

    def at(self, where: str) -> Self:
        """The same error, said of a place that only the caller knows."""
        return type(self)(self.what, where=where, do=self.do)


class CaptureError(KdlsqError):
    """The model could not be turned into a graph of declared ops."""


class ConfigError(KdlsqError, ValueError):
    """A qconfig, rule, preset or option makes no sense."""


class CalibrationError(KdlsqError):
    """A scale is needed that no data has set yet, or the data cannot set it."""


class InputError(KdlsqError, ValueError):
    """A batch does not fit the captured model."""


class VerifyError(KdlsqError):
    """A graph breaks a promise of its stage; the pass that ran last is at fault."""


class PassError(KdlsqError):
    """A user's pass raised an exception (its ``__cause__``) or left a graph that cannot be compiled."""


class LoweringError(KdlsqError):
    """An integer form would overflow or cannot be built."""


class CheckpointError(KdlsqError):
    """A folder cannot be read or written as a checkpoint."""


class TrainingError(KdlsqError):
    """A training run cannot go on: its loss is not finite, or it does not fit the run it should resume."""
