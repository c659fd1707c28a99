"""A way to end the process that needs no Python.

    timer = ExitTimer(124)
    timer.arm(30.0)         # after 30 s the process ends with code 124, whatever holds Python's lock
    timer.cancel()

Where the system has no `timer_create` (macOS), `exists` is False and nothing happens.
"""

import ctypes
import time

from research.core.errors import ExitCode


class ExitTimer:
    """A POSIX timer that calls `_exit(code)` in a thread of C: it needs no Python, so a held lock cannot stop it."""

    def __init__(self, code: int = ExitCode.WATCHDOG) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.exists = all(hasattr(libc, name) for name in ('timer_create', 'timer_settime', '_exit'))
        if not self.exists:
            return
        event = _Event(value=int(code), notify=2, function=ctypes.cast(libc._exit, ctypes.c_void_p).value)
        self._libc, self._id = libc, ctypes.c_void_p()
        self.exists = libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._id)) == 0

    def arm(self, seconds: float) -> None:
        """Goes off after `seconds`, unless it is armed anew before."""
        if self.exists:
            whole = int(seconds)
            when = (ctypes.c_long * 4)(0, 0, whole, int((seconds - whole) * 1e9))  # interval, then value: seconds, nanoseconds
            self._libc.timer_settime(self._id, 0, when, None)

    def cancel(self) -> None:
        """Never goes off."""
        if self.exists:
            self._libc.timer_settime(self._id, 0, (ctypes.c_long * 4)(), None)
            self._libc.timer_delete(self._id)
            self.exists = False


class _Event(ctypes.Structure):
    """`struct sigevent` of Linux with SIGEV_THREAD (2): 64 bytes."""

    _fields_ = (
        ('value', ctypes.c_void_p),
        ('signal', ctypes.c_int),
        ('notify', ctypes.c_int),
        ('function', ctypes.c_void_p),
        ('attributes', ctypes.c_void_p),
        ('rest', ctypes.c_char * 32),
    )
