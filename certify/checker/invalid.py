"""How the checker says that a claim failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..claims import CertificateError


class Invalid(Exception):
    """A claim that could not be proved: its name, and one line that says what was claimed and what is the case."""

    def __init__(self, claim: str, message: str) -> None:
        super().__init__(message)
        self.claim = claim


@contextmanager
def stage(claim: str) -> Iterator[None]:
    """Errors of the checker's own reading and arithmetic, inside, and of values of a wrong type, fail this claim."""
    try:
        yield
    except CertificateError:
        raise
    except (ValueError, ArithmeticError, TypeError, AttributeError) as error:
        line = str(error).strip().splitlines()
        raise Invalid(claim, line[0] if line else type(error).__name__) from error
