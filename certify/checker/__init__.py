"""The independent checker of certificates: it shares no code with what computes bounds."""

from .verdict import Verdict, verify

__all__ = ["Verdict", "verify"]
