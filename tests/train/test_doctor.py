import dataclasses
import pathlib
import re
import sys
import tomllib

import pytest

import launch
from research.core.errors import ExitCode, StorageError, UsageError
from research.train import doctor

CPU = {'platform': 'cpu', 'kind': 'cpu', 'memory': None}
GPU = {'platform': 'gpu', 'kind': 'NVIDIA L4', 'memory': 17_700_000_000}
TPU = {'platform': 'tpu', 'kind': 'TPU v4', 'memory': 34_000_000_000}


@pytest.fixture
def facts():
    """A sound machine without an accelerator."""
    names = dict.fromkeys([*doctor.required(), 'jaxlib'], '1.0.0')
    versions = {**names, **dict.fromkeys([*doctor.CUDA_PLUGINS, 'libtpu'])}
    return doctor.Facts(python=(3, 12), versions=versions, environment={}, nvidia=False, tpu=False, devices=(CPU,))


def with_version(facts, name, version):
    return dataclasses.replace(facts, versions={**facts.versions, name: version})


@pytest.mark.parametrize(('version', 'status'), [((3, 10), 'problem'), ((3, 11), 'ok'), ((3, 13), 'ok'), ((3, 14), 'problem')])
def test_python(facts, version, status):
    assert doctor.python(dataclasses.replace(facts, python=version)).status == status


def test_supported_pythons_are_those_of_pyproject():
    requires = tomllib.loads((doctor.ROOT / 'pyproject.toml').read_text())['project']['requires-python']
    first, last = doctor.SUPPORTED
    assert requires == f'>={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}'


def test_packages(facts):
    assert doctor.packages(facts).status == 'ok'
    missing = doctor.packages(with_version(facts, 'optax', None))
    assert (missing.status, missing.text, missing.fix) == (
        'problem',
        'optax not installed',
        'pip install -r requirements/cpu.txt',
    )
    apart = doctor.packages(with_version(facts, 'jaxlib', '1.0.1'))
    assert apart.status == 'warning'
    assert '1.0.0 and jaxlib 1.0.1' in apart.text


@pytest.mark.parametrize('hardware', ['nvidia', 'tpu'])
def test_an_accelerator_that_jax_is_not_built_for_is_the_commonest_trap(facts, hardware):
    check = doctor.accelerator(dataclasses.replace(facts, **{hardware: True}))
    assert check.status == 'problem'
    assert check.fix == f'pip install -r requirements{"" if hardware == "nvidia" else "/tpu"}.txt'


@pytest.mark.parametrize(
    ('hardware', 'package'), [('nvidia', 'jax-cuda12-plugin'), ('nvidia', 'jax-cuda13-plugin'), ('tpu', 'libtpu')]
)
def test_an_accelerator_that_fails_with_the_right_jax_is_not_mended_by_pip(facts, hardware, package):
    check = doctor.accelerator(dataclasses.replace(with_version(facts, package, '1.0.0'), **{hardware: True}))
    assert check.status == 'problem'
    assert 'pip install' not in check.fix


@pytest.mark.parametrize(
    ('hardware', 'environment', 'fix'),
    [
        ('nvidia', {'JAX_PLATFORMS': 'cpu'}, 'unset JAX_PLATFORMS'),
        ('tpu', {'JAX_PLATFORMS': 'cpu'}, 'unset JAX_PLATFORMS'),
        ('nvidia', {'CUDA_VISIBLE_DEVICES': ''}, 'unset CUDA_VISIBLE_DEVICES'),
        ('nvidia', {'CUDA_VISIBLE_DEVICES': '-1'}, 'unset CUDA_VISIBLE_DEVICES'),
    ],
)
def test_an_accelerator_that_the_environment_hides_is_a_warning(facts, hardware, environment, fix):
    check = doctor.accelerator(dataclasses.replace(facts, environment=environment, **{hardware: True}))
    assert (check.status, check.fix) == ('warning', fix)


@pytest.mark.parametrize('device', [GPU, TPU])
def test_an_accelerator_in_use(facts, device):
    check = doctor.accelerator(dataclasses.replace(facts, nvidia=device is GPU, tpu=device is TPU, devices=(device,)))
    assert (check.status, check.text) == ('ok', f'jax uses it: {device["platform"]}')


def test_no_accelerator(facts):
    assert doctor.accelerator(facts).status == 'ok'


def test_devices_are_counted_by_kind(facts):
    check = doctor.devices(dataclasses.replace(facts, devices=(GPU, CPU, GPU)))
    assert (check.status, check.text) == ('ok', '2 x NVIDIA L4 (gpu, 17.7 GB for jax), 1 x cpu (cpu)')


@pytest.mark.parametrize(
    ('change', 'fix'),
    [
        ({'error': 'Unknown flag in XLA_FLAGS: --x'}, 'take that flag out of XLA_FLAGS'),
        ({'error': 'AssertionError', 'environment': {'JAX_PLATFORMS': 'cuda'}}, 'unset JAX_PLATFORMS'),
        (
            {'error': 'AssertionError', 'environment': {'JAX_PLATFORMS': 'cuda'}, 'nvidia': True},
            'pip install -r requirements.txt',
        ),
        (
            {'error': 'RuntimeError', 'environment': {'JAX_PLATFORMS': 'tpu'}, 'tpu': True},
            'pip install -r requirements/tpu.txt',
        ),
        ({'error': "ModuleNotFoundError: No module named 'jax'", 'jax_imports': False}, 'pip install -r requirements/cpu.txt'),
        ({'error': 'no answer', 'tpu': True}, 'end the processes that use the chips'),
    ],
)
def test_why_jax_does_not_start(facts, change, fix):
    check = doctor.devices(dataclasses.replace(facts, devices=(), **change))
    assert check.status == 'problem'
    assert change['error'] in check.text
    assert check.fix.startswith(fix)


def test_environment_shows_what_is_set_and_what_is_not(facts):
    assert doctor.environment(facts).text == 'JAX_PLATFORMS not set, XLA_FLAGS not set'
    text = doctor.environment(dataclasses.replace(facts, environment={'XLA_FLAGS': '--a --b'})).text
    assert text == "XLA_FLAGS='--a --b', JAX_PLATFORMS not set"


def test_jax_starts_with_the_eight_devices_of_the_suite():
    assert doctor.start_jax() == {'devices': (CPU,) * 8, 'jax_imports': True}


@pytest.mark.parametrize(
    ('name', 'value', 'told'),
    [
        ('XLA_FLAGS', '--no_such_flag=1', 'Unknown flag in XLA_FLAGS: --no_such_flag=1'),
        ('JAX_PLATFORMS', 'nonsense', "RuntimeError: Unable to initialize backend 'nonsense'"),
    ],
)
def test_what_jax_says_when_it_fails_is_one_line(monkeypatch, name, value, told):
    monkeypatch.setenv(name, value)
    started = doctor.start_jax()
    assert started['error'].startswith(told)
    assert '\n' not in started['error']
    assert started['jax_imports']


def test_jax_that_does_not_import(monkeypatch, tmp_path):
    (tmp_path / 'jax.py').write_text('raise RuntimeError("jaxlib is too old")')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    assert doctor.start_jax() == {'error': 'RuntimeError: jaxlib is too old', 'jax_imports': False}


def test_jax_that_hangs(monkeypatch):
    monkeypatch.setattr(doctor, 'PROBE', 'import time; time.sleep(60)')
    monkeypatch.setattr(doctor, 'PROBE_SECONDS', 0.1)
    assert 'no answer' in doctor.start_jax()['error']


@pytest.mark.parametrize(
    ('script', 'present'), [('echo "GPU 0: NVIDIA L4"', True), ('echo "GPU 0: gone"; exit 9', False), ('exec sleep 9', False)]
)
def test_nvidia_smi_is_believed_only_when_it_lists_a_gpu(monkeypatch, tmp_path, script, present):
    program = tmp_path / 'nvidia-smi'
    program.write_text(f'#!/bin/sh\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setattr(doctor, 'NVIDIA_FILES', ())
    monkeypatch.setattr(doctor, 'SMI_SECONDS', 0.2 if 'sleep' in script else 20)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=':')
    assert doctor.nvidia_present() is present


def test_nvidia_device_file(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', '')
    monkeypatch.setattr(doctor, 'NVIDIA_FILES', (f'{tmp_path}/nvidia[0-9]*',))
    (tmp_path / 'nvidiactl').touch()
    assert not doctor.nvidia_present()
    (tmp_path / 'nvidia3').touch()
    assert doctor.nvidia_present()


@pytest.mark.parametrize(
    ('files', 'vendor', 'present'),
    [(['accel0'], '0x8086', True), (['vfio/0'], '0x1ae0', True), (['vfio/0'], '0x10de', False), ([], '0x1ae0', False)],
)
def test_tpu_present(monkeypatch, tmp_path, files, vendor, present):
    (tmp_path / 'vfio').mkdir()
    for name in files:
        (tmp_path / name).touch()
    (tmp_path / 'vendor').write_text(f'{vendor}\n')
    monkeypatch.setattr(doctor, 'ACCEL_FILES', f'{tmp_path}/accel[0-9]*')
    monkeypatch.setattr(doctor, 'VFIO_FILES', f'{tmp_path}/vfio/[0-9]*')
    monkeypatch.setattr(doctor, 'PCI_VENDORS', f'{tmp_path}/vendor')
    assert doctor.tpu_present() is present


def test_compilation_cache(monkeypatch, tmp_path):
    monkeypatch.setenv('FULCRUM_CACHE', str(tmp_path / 'own'))
    assert doctor.compilation_cache().status == 'ok'
    (tmp_path / 'own').chmod(0o777)
    assert doctor.compilation_cache().status == 'warning'


@pytest.mark.parametrize(('free', 'status'), [(4.9e9, 'warning'), (5.1e9, 'ok')])
def test_disk(monkeypatch, tmp_path, free, status):
    usage = type('Usage', (), {'free': free})
    monkeypatch.setattr(doctor.shutil, 'disk_usage', lambda folder: usage if folder == tmp_path else None)
    assert doctor.disk(tmp_path / 'not' / 'yet').status == status


def test_writable_leaves_nothing_behind(tmp_path):
    assert doctor.writable(tmp_path / 'not' / 'yet').status == 'ok'
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_workdir(tmp_path):
    (tmp_path / 'file').touch()
    check = doctor.writable(tmp_path / 'file' / 'run')
    assert (check.status, check.error) == ('problem', StorageError)


def test_machine_has_memory_and_cores():
    memory, cores = re.fullmatch(r'([\d.]+) GB of memory, (\d+) cores', doctor.machine().text).groups()
    assert float(memory) > 0.5
    assert int(cores) >= 1


def test_report(monkeypatch, tmp_path, facts, capsys):
    monkeypatch.setattr(doctor, 'gather', lambda: facts)
    doctor.report(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert all(re.match('(ok|warning) +[a-z ]+: ', line) for line in lines)


def test_report_raises_for_a_problem(monkeypatch, tmp_path, facts, capsys):
    monkeypatch.setattr(doctor, 'gather', lambda: dataclasses.replace(facts, nvidia=True))
    with pytest.raises(UsageError, match='not ready: accelerator'):
        doctor.report(tmp_path)
    assert (
        'problem  accelerator: an NVIDIA GPU is here, but this jax runs on the CPU alone; fix: pip' in capsys.readouterr().out
    )


def test_report_leaves_the_cache_out_when_jax_cannot_be_imported(monkeypatch, tmp_path, facts, capsys):
    broken = dataclasses.replace(facts, devices=(), error='ImportError: no', jax_imports=False)
    monkeypatch.setattr(doctor, 'gather', lambda: broken)
    with pytest.raises(UsageError, match='not ready: devices'):
        doctor.report(tmp_path)
    assert 'compilation cache' not in capsys.readouterr().out


def test_launch_doctor(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, 'nvidia_present', lambda: False)
    monkeypatch.setattr(doctor, 'tpu_present', lambda: False)
    (tmp_path / 'file').touch()
    assert launch.main(['launch.py', '--mode=doctor', f'--workdir={tmp_path}']) == ExitCode.DONE
    assert f'python: {sys.version.split()[0]}' in capsys.readouterr().out
    assert launch.main(['launch.py', '--mode=doctor', f'--workdir={tmp_path}/file/run']) == ExitCode.STORAGE
    assert len(capsys.readouterr().err.splitlines()) <= 3
    assert pathlib.Path(tmp_path / 'file').is_file()
