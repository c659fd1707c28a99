"""Is this machine ready? One line a check, with the command that mends what is wrong.

jax is started in a process of its own: a wrong XLA flag ends the process that meets it, and a chip that another process holds
can make it wait for ever. Facts are gathered first (`gather`); what they mean is decided by pure functions.

    ok       devices: 1 x cpu (cpu)
    problem  accelerator: an NVIDIA GPU is here, but this jax runs on the CPU alone; fix: pip install -r requirements.txt
"""

import dataclasses
import glob
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, Literal

from research.core.errors import FulcrumError, StorageError, UsageError
from research.parallel.hardware import cpu_cores

ROOT = pathlib.Path(__file__).parents[2]
SUPPORTED = ((3, 11), (3, 13))  # the first and the last Python version that are tested
VARIABLES = ('JAX_PLATFORMS', 'XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'CUDA_VISIBLE_DEVICES')
CUDA_PLUGINS = ('jax-cuda12-plugin', 'jax-cuda13-plugin')
NVIDIA_FILES = ('/proc/driver/nvidia/gpus/*', '/dev/nvidia[0-9]*')
ACCEL_FILES, VFIO_FILES = '/dev/accel[0-9]*', '/dev/vfio/[0-9]*'
PCI_VENDORS = '/sys/bus/pci/devices/*/vendor'
GOOGLE = '0x1ae0'  # its PCI vendor id
PROBE = 'from research.train import doctor; doctor.probe()'
PROBE_SECONDS = 90
SMI_SECONDS = 20
LOW_DISK = 5e9  # bytes

Status = Literal['ok', 'warning', 'problem']


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report; a `problem` ends the command with `error`."""

    name: str
    status: Status
    text: str
    fix: str = ''
    error: type[FulcrumError] = UsageError

    def __str__(self) -> str:
        return f'{self.status:8} {self.name}: {self.text}' + (f'; fix: {self.fix}' if self.fix else '')


@dataclasses.dataclass(frozen=True)
class Facts:
    """What was found here.

    Attributes:
      python: version of the interpreter.
      versions: of the distributions that requirements.txt names, jaxlib and the plugins; None: missing.
      environment: the variables that steer jax.
      nvidia: an NVIDIA GPU is to be seen.
      tpu: a TPU is to be seen.
      devices: what jax sees.
      error: why it sees none, in one line.
      jax_imports: jax can be imported.
    """

    python: tuple[int, int]
    versions: Mapping[str, str | None]
    environment: Mapping[str, str]
    nvidia: bool
    tpu: bool
    devices: tuple[Mapping[str, Any], ...] = ()
    error: str = ''
    jax_imports: bool = True


def report(workdir: pathlib.Path) -> None:
    """Prints one line a check.

    Raises:
      UsageError: something must be mended before a run.
      StorageError: all else is well, but the run directory cannot be written.
    """
    facts = gather()
    checks = [python(facts), packages(facts), environment(facts), devices(facts), accelerator(facts)]
    checks += [compilation_cache()] if facts.jax_imports else []
    checks += [machine(), disk(workdir), writable(workdir)]
    print('\n'.join(map(str, checks)))
    problems = [check for check in checks if check.status == 'problem']
    if problems:
        names = ', '.join(check.name for check in problems)
        raise problems[0].error(f'this machine is not ready: {names}', 'do what the lines marked "problem" say')


def gather() -> Facts:
    """Looks at the interpreter, the packages, the hardware, and starts jax once in another process."""
    names = [*required(), 'jaxlib', *CUDA_PLUGINS, 'libtpu']
    return Facts(
        python=sys.version_info[:2],
        versions={name: version(name) for name in names},
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        nvidia=nvidia_present(),
        tpu=tpu_present(),
        **start_jax(),
    )


def required() -> list[str]:
    """The distributions that requirements.txt names."""
    lines = (ROOT / 'requirements.txt').read_text(encoding='utf-8').splitlines()
    return [match[0] for line in lines if (match := re.match(r'[A-Za-z0-9][\w.-]*', line))]


def version(distribution: str) -> str | None:
    """Its installed version; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_present() -> bool:
    """Whether an NVIDIA GPU is to be seen here, by its files or by nvidia-smi."""
    if any(glob.glob(pattern) for pattern in NVIDIA_FILES):
        return True
    try:
        listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, timeout=SMI_SECONDS)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and 'GPU ' in listed.stdout


def tpu_present() -> bool:
    """Whether a TPU is to be seen here. A numbered vfio group alone may be any card, so its maker is asked for too."""
    vendors = (pathlib.Path(path) for path in glob.glob(PCI_VENDORS))
    google = any(path.read_text(encoding='ascii').strip() == GOOGLE for path in vendors)
    return bool(glob.glob(ACCEL_FILES)) or (google and bool(glob.glob(VFIO_FILES)))


def probe() -> None:
    """In the other process: prints one line when jax is imported and one with the devices, or why there are none."""
    import jax

    print('imported', flush=True)
    try:
        found = [
            {'platform': d.platform, 'kind': d.device_kind, 'memory': (d.memory_stats() or {}).get('bytes_limit')}
            for d in jax.local_devices()
        ]
    except (RuntimeError, AssertionError) as error:
        sys.exit(f'{type(error).__name__}: {error}'.split('\n')[0].removesuffix(': '))
    print(json.dumps(found))


def start_jax() -> dict[str, Any]:
    """`devices`, `error` and `jax_imports` of the facts."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    variables = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', **os.environ, 'PYTHONPATH': path}
    command = [sys.executable, '-c', PROBE]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=PROBE_SECONDS)  # noqa: S603
    except subprocess.TimeoutExpired:
        return {'error': f'no answer in {PROBE_SECONDS} seconds; does another process hold the chips?'}
    lines = done.stdout.splitlines()
    imports = 'imported' in lines
    if done.returncode == 0:
        return {'devices': tuple(json.loads(lines[-1])), 'jax_imports': imports}
    return {'error': last_line(done.stderr) or f'exit status {done.returncode}', 'jax_imports': imports}


def last_line(text: str) -> str:
    """The last line that is not empty, without the prefix of a C++ log, cut to 200 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r'^[FE]\d{4} \S+ +\d+ \S+\] ', '', lines[-1])[:200] if lines else ''


def python(facts: Facts) -> Check:
    """The interpreter's version."""
    first, last = ('.'.join(map(str, supported)) for supported in SUPPORTED)
    if SUPPORTED[0] <= facts.python <= SUPPORTED[1]:
        return Check('python', 'ok', f'{platform.python_version()} at {sys.executable}')
    text = f'{".".join(map(str, facts.python))} is not supported: {first} to {last} are'
    return Check('python', 'problem', text, f'python{last} -m venv .venv')


def packages(facts: Facts) -> Check:
    """Everything in requirements.txt is installed, and jax and jaxlib have one version."""
    missing = [name for name in (*required(), 'jaxlib') if facts.versions[name] is None]
    if missing:
        return Check('packages', 'problem', f'{", ".join(missing)} not installed', install(facts))
    jax, jaxlib = facts.versions['jax'], facts.versions['jaxlib']
    if jax != jaxlib:
        return Check('packages', 'warning', f'jax {jax} and jaxlib {jaxlib} are not one version', install(facts))
    return Check(
        'packages', 'ok', ', '.join(f'{name} {facts.versions[name]}' for name in dict.fromkeys(('jax', 'jaxlib', *required())))
    )


def install(facts: Facts) -> str:
    """The command that installs what this machine's hardware needs."""
    return 'pip install -r ' + (
        'requirements.txt' if facts.nvidia else 'requirements/tpu.txt' if facts.tpu else 'requirements/cpu.txt'
    )


def environment(facts: Facts) -> Check:
    """What the environment tells jax and XLA."""
    settings = [f'{name}={facts.environment[name]!r}' for name in VARIABLES if name in facts.environment]
    unset = [name for name in VARIABLES[:2] if name not in facts.environment]
    return Check('environment', 'ok', ', '.join(settings + [f'{name} not set' for name in unset]))


def devices(facts: Facts) -> Check:
    """What jax sees: how many of which kind, with how much memory."""
    if facts.error:
        return Check('devices', 'problem', f'jax does not start: {facts.error}', start_fix(facts))
    described = sorted(describe(device) for device in facts.devices)
    return Check('devices', 'ok', ', '.join(f'{len(list(same))} x {text}' for text, same in itertools.groupby(described)))


def describe(device: Mapping[str, Any]) -> str:
    """For example 'NVIDIA L4 (gpu, 17.7 GB for jax)'."""
    memory = f', {device["memory"] / 1e9:.1f} GB for jax' if device['memory'] else ''
    return f'{device["kind"]} ({device["platform"]}{memory})'


def start_fix(facts: Facts) -> str:
    """What to do when jax has no devices."""
    if 'XLA_FLAGS' in facts.error:
        return 'take that flag out of XLA_FLAGS'
    wanted = facts.environment.get('JAX_PLATFORMS', '')
    if not facts.jax_imports or (facts.nvidia and 'cuda' in wanted) or (facts.tpu and 'tpu' in wanted):
        return install(facts)
    if wanted not in ('', 'cpu'):
        return f'unset JAX_PLATFORMS (it is {wanted!r}, and no such device is to be seen here)'
    return f'end the processes that use the chips, or {install(facts)}'


def accelerator(facts: Facts) -> Check:
    """Whether jax uses the GPU or TPU that is here."""
    here = 'an NVIDIA GPU' if facts.nvidia else 'a TPU' if facts.tpu else ''
    used = {device['platform'] for device in facts.devices} - {'cpu'}
    if used:
        return Check('accelerator', 'ok', f'jax uses it: {", ".join(sorted(used))}')
    if not here:
        return Check('accelerator', 'ok', 'neither an NVIDIA GPU nor a TPU is here')
    if facts.environment.get('JAX_PLATFORMS', '').startswith('cpu'):
        return Check('accelerator', 'warning', f'{here} is here, but JAX_PLATFORMS keeps jax on the CPU', 'unset JAX_PLATFORMS')
    if facts.nvidia and facts.environment.get('CUDA_VISIBLE_DEVICES') in ('', '-1'):
        return Check('accelerator', 'warning', f'{here} is here, but hidden', 'unset CUDA_VISIBLE_DEVICES')
    plugins = CUDA_PLUGINS if facts.nvidia else ('libtpu',)
    if not any(facts.versions[name] for name in plugins):
        return Check('accelerator', 'problem', f'{here} is here, but this jax runs on the CPU alone', install(facts))
    text = f'{here} is here and its jax is installed, but jax does not use it'
    fix = 'nvidia-smi must list it (driver; `--gpus all` for a container)' if facts.nvidia else 'end the process that holds it'
    return Check('accelerator', 'problem', text, fix)


def compilation_cache() -> Check:
    """Whether compiled programs can be kept; a run goes on without."""
    from research.parallel import cache  # it imports jax, which may be what is broken

    reason = cache.problem(cache.folder())
    if reason is None:
        return Check('compilation cache', 'ok', str(cache.folder()))
    return Check('compilation cache', 'warning', f'off: {reason}', 'mend it, or set FULCRUM_CACHE to a folder of your own')


def machine() -> Check:
    """Memory in GB (of the container, where it has less than the machine) and the cores this process may use."""
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    limit = pathlib.Path('/sys/fs/cgroup/memory.max')
    if limit.is_file() and (text := limit.read_text(encoding='ascii').strip()) != 'max':
        memory = min(memory, int(text))
    return Check('machine', 'ok', f'{memory / 1e9:.1f} GB of memory, {cpu_cores()} cores')


def disk(workdir: pathlib.Path) -> Check:
    """Free space where the run directory lies or will lie."""
    folder = existing(workdir)
    free = shutil.disk_usage(folder).free
    text = f'{free / 1e9:.1f} GB free at {folder}'
    if free < LOW_DISK:
        return Check('disk', 'warning', text, 'make room, or give --workdir on another disk')
    return Check('disk', 'ok', text)


def writable(workdir: pathlib.Path) -> Check:
    """Whether the run directory can be written, or made: a file is made and removed in the nearest folder that exists."""
    folder = existing(workdir)
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Check('workdir', 'ok', f'{workdir} can be written')
    except OSError as error:
        text = f'{workdir} cannot be written: {folder}: {error.strerror}'
        return Check('workdir', 'problem', text, 'give another --workdir, or mend its rights', StorageError)


def existing(path: pathlib.Path) -> pathlib.Path:
    """The nearest of `path` and the folders above it that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())
