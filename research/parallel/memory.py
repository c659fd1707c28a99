"""How the process keeps the memory that it frees, and in which pages.

XLA's CPU runtime asks for all working memory of a step at once and frees it at its end. glibc maps a block of over 32 MB afresh
each time and gives it back, so every step pays for thousands of page faults; kept memory costs none, and in huge pages (2 MB)
it needs few entries of the processor's table of translations. `python -m bench.step_profile --without memory` tells what it is
worth for a small GPT; the figures are in BENCHMARKS.md.

The compiler leaves the heap in tens of thousands of pieces, among which glibc then looks for one that fits, thousands of times
in a step of a convolutional network. `close_gaps` takes the pieces out of its sight.
"""

import ctypes
import os
import sys

# Parameters of mallopt(3), from malloc.h, and of madvise(2), from mman.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
KEPT = ((TRIM_THRESHOLD, 2**31 - 1), (MMAP_MAX, 0), (ARENA_MAX, 1))
HUGEPAGE, PAGE = 14, 2**21
DONTNEED, SMALL_PAGE = 4, 2**12
GAPS = tuple(2**20 * 3**n // 4**n for n in range(25))  # bytes, down to 1 kB; smaller pieces lie in lists of one size each
HEAP = 3 * 2**29  # bytes of address space, not of memory; glibc would give back more than 2**31 at once

_is_kept = False


class _Heap(ctypes.Structure):
    """`struct mallinfo2` of malloc.h; keepcost: bytes that are free at the end of the heap."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ('arena', 'ordblks', 'smblks', 'hblks', 'hblkhd')),
        *((name, ctypes.c_size_t) for name in ('usmblks', 'fsmblks', 'uordblks', 'fordblks', 'keepcost')),
    ]


def keep_freed() -> bool:
    """Tells glibc to keep what is freed for the next request; whether it was told. Call it before jax starts its threads.

    The process then never shrinks below what it once used. Elsewhere than under glibc, and where the user has set one of its
    variables MALLOC_*_ or GLIBC_TUNABLES, nothing is changed.
    """
    if not sys.platform.startswith('linux') or any(name.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, 'mallopt', None)
    if mallopt is None or not all(mallopt(parameter, value) == 1 for parameter, value in KEPT):
        return False
    _advise_huge(libc)
    global _is_kept
    _is_kept = True
    return True


def close_gaps() -> int:
    """Takes all that is free in the heap, but for its end, for good, and gives its pages back; how many pieces that were.

    Call it when something was compiled that runs often on a CPU. Where freed memory is not kept, and under a glibc before
    2.33, nothing is done.
    """
    libc = ctypes.CDLL(None)
    if not _is_kept or not hasattr(libc, 'mallinfo2'):
        return 0
    _declare(libc)
    libc.mallinfo2.restype, libc.sbrk.restype, libc.sbrk.argtypes = _Heap, ctypes.c_void_p, (ctypes.c_ssize_t,)
    end, taken = libc.sbrk(0) - libc.mallinfo2().keepcost, 0
    for size in GAPS:
        while (block := libc.malloc(size)) is not None and block < end:
            first = -(-block // SMALL_PAGE) * SMALL_PAGE
            if (whole := (block + size - first) // SMALL_PAGE * SMALL_PAGE) > 0:
                libc.madvise(first, whole, DONTNEED)
            taken += 1
        libc.free(block)
    return taken


def _advise_huge(libc: ctypes.CDLL) -> None:
    """Asks for huge pages where the heap will grow: a block is taken from its end, marked, and given back untouched."""
    _declare(libc)
    block = libc.malloc(HEAP)
    if block is None:  # less address space than that may be used (ulimit -v)
        return
    first = -(-block // PAGE) * PAGE
    libc.madvise(first, (block + HEAP - first) // PAGE * PAGE, HUGEPAGE)  # a kernel without huge pages refuses: nothing is lost
    libc.free(block)


def _declare(libc: ctypes.CDLL) -> None:
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
