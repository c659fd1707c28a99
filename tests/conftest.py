"""Eight simulated devices for the whole suite, a compilation cache of its own, and no network but loopback."""

import os
import signal
import socket
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
# The suite compiles much and computes little: less optimisation makes compiling several times faster.
os.environ['XLA_FLAGS'] = (
    '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true'
)
os.environ.setdefault('FULCRUM_CACHE', os.path.join(tempfile.gettempdir(), f'fulcrum-test-cache-{os.getuid()}'))
# Many tests compile the same small programs: one cache serves the suite and the processes that it starts.
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.environ['FULCRUM_CACHE']
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'

if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup; processes that the suite starts would inherit that
    signal.signal(signal.SIGHUP, lambda *_: None)

import pytest

LOOPBACK = ('127.0.0.1', '::1', 'localhost', '0.0.0.0')
_connect = socket.socket.connect


def _connect_to_loopback(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
        raise RuntimeError(f'the test suite uses no network, but something wants to connect to {address}')
    return _connect(self, address)


@pytest.fixture(autouse=True, scope='session')
def no_network():
    """Refuses connections to anything but loopback, in this process."""
    socket.socket.connect = _connect_to_loopback
    yield
    socket.socket.connect = _connect


@pytest.fixture
def mesh():
    """All eight devices."""
    from research.parallel.mesh import make_mesh

    return make_mesh()
