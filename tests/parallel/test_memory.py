"""glibc keeps what is freed: a block that is asked for again costs no page faults and lies in huge pages."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='glibc is the allocator of Linux')

# Asks ten times for 48 MB as XLA does for its working memory, writes to all of it and frees it; prints page faults of the last
# nine, and kB of huge pages.
PROGRAM = """
import ctypes, resource, sys
from research.parallel.memory import keep_freed
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
told = sys.argv[1] == 'plain' or keep_freed()
for turn in range(10):
    block = libc.malloc(48 * 2**20)
    ctypes.memset(block, 1, 48 * 2**20)
    libc.free(block)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    first = faults if turn == 0 else first
huge = sum(int(line.split()[1]) for line in open('/proc/self/smaps') if line.startswith('AnonHugePages'))
print(told, faults - first, huge)
"""


# Frees every second of many blocks, closes the gaps and asks for one that would fit into any of them.
GAPS = """
import ctypes, sys
from research.parallel import memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
sys.argv[1] == 'plain' or memory.keep_freed()
blocks = [libc.malloc(5000) for _ in range(20000)]
for block in blocks[::2]:
    libc.free(block)
taken = memory.close_gaps()
print(taken, libc.malloc(4000) > max(blocks))
"""


def run(how, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(('MALLOC_', 'GLIBC_TUNABLES'))}
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM, how], env=clean | environment, capture_output=True, text=True, check=True
    )
    told, faults, huge = done.stdout.split()
    return told == 'True', int(faults), int(huge)


def test_kept_memory_costs_no_page_faults():
    told, faults, huge = run('kept')
    assert told
    assert faults < 200
    assert run('plain')[1] > 9 * 48 * 2**20 / 4096 * 0.9
    modes = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
    if modes.exists() and '[never]' not in modes.read_text():
        assert huge >= 40 * 1024


@pytest.mark.parametrize('name', ['MALLOC_ARENA_MAX', 'GLIBC_TUNABLES'])
def test_the_users_own_settings_stand(name):
    value = '4' if name.startswith('MALLOC') else 'glibc.malloc.arena_max=4'
    assert run('kept', **{name: value})[0] is False


def test_gaps_that_were_closed_are_not_looked_at():
    clean = {k: v for k, v in os.environ.items() if not k.startswith(('MALLOC_', 'GLIBC_TUNABLES'))}
    command = [sys.executable, '-c', GAPS]
    kept, plain = (subprocess.check_output([*command, how], env=clean, text=True).split() for how in ('kept', 'plain'))
    assert int(kept[0]) >= 10000 and kept[1] == 'True'
    assert plain == ['0', 'False']
