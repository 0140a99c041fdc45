"""What stops an execution: programs that this machine does not know, and those whose result a GPU leaves open."""

from __future__ import annotations


class Fault(Exception):
    """A kernel did what has no defined result, or its text has what this machine does not know."""


class UnknownInstructionError(Fault):
    """An opcode, or a modifier of one, that no rule of this machine covers."""


class Deadlock(Fault):
    """Every thread that has not ended waits, and nothing under way can wake one."""
