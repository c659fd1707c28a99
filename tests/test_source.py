"""The source as a whole: every file imports, the layers hold, nothing dangerous is called, no room has a junk drawer."""

import ast
import importlib
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted([*ROOT.glob('research/**/*.py'), *ROOT.glob('configs/*.py'), ROOT / 'launch.py'])
MODULES = ['.'.join(f.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__') for f in FILES]

# Each room may import itself and these (DESIGN: core <- data, models, optim, parallel <- tasks <- train <- ... <- launch).
MAY_IMPORT = {
    'core': set(),
    'data': {'core'},
    'models': {'core'},
    'optim': {'core'},
    'parallel': {'core'},
    'tasks': {'core', 'data', 'optim', 'parallel'},  # a model's call protocol, never a concrete model
    'train': {'core', 'data', 'models', 'optim', 'parallel', 'tasks'},
    'serve': {'core', 'data', 'models', 'optim', 'parallel', 'tasks', 'train'},
}


def imports(path):
    """(module, line) of every import of a file, functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}:{node.lineno}: relative import'
            yield from ((f'{node.module}.{alias.name}', node.lineno) for alias in node.names)


@pytest.mark.parametrize('module', MODULES)
def test_every_file_imports(module):
    importlib.import_module(module)


@pytest.mark.parametrize('path', [f for f in FILES if 'research' in f.parts], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_layers(path):
    parts = path.relative_to(ROOT / 'research').parts
    room = parts[0] if len(parts) > 1 else None
    for module, line in imports(path):
        top, _, rest = module.partition('.')
        assert top not in ('configs', 'launch', 'tests', 'bench'), f'{path}:{line} imports {module}'
        if top == 'research' and room is not None:
            other = rest.split('.')[0]
            assert other == room or other in MAY_IMPORT[room], f'{path}:{line}: {room} must not import {other}'
        assert not module.startswith('absl.flags') or 'FLAGS' not in module, f'{path}:{line} reads flags'


@pytest.mark.parametrize('path', sorted(ROOT.glob('configs/*.py')), ids=lambda p: p.name)
def test_configs_import_only_the_schema(path):
    for module, line in imports(path):
        allowed = module.startswith(('ml_collections', 'configs', 'research.core.schema'))
        assert allowed, f'{path}:{line} imports {module}'


# What can run code that is hidden in data, or write outside its folder. A name stands for all below it.
FORBIDDEN = {
    **dict.fromkeys(
        (
            'pickle',
            '_pickle',
            'cPickle',
            'dill',
            'cloudpickle',
            'jsonpickle',
            'marshal',
            'shelve',
            'joblib',
            'torch',
            'tensorflow',
        ),
        'reads pickles, or code, or is two gigabytes',
    ),
    **dict.fromkeys(
        ('jax.experimental.serialize_executable', 'pandas.read_pickle', 'numpy.lib.format.read_array', 'ray.cloudpickle'),
        'reads pickles',
    ),
    **dict.fromkeys(
        ('yaml.load', 'yaml.load_all', 'yaml.full_load', 'yaml.full_load_all', 'yaml.unsafe_load', 'yaml.unsafe_load_all'),
        'makes objects of any kind; yaml.safe_load does not',
    ),
    **dict.fromkeys(('yaml.Loader', 'yaml.UnsafeLoader', 'yaml.FullLoader', 'yaml.CLoader'), 'makes objects of any kind'),
    **dict.fromkeys(('eval', 'exec', 'compile', '__import__', 'builtins', '__builtins__'), 'runs text as code'),
    **dict.fromkeys(('runpy', 'code', 'imp', 'timeit', 'zipimport', 'importlib.machinery'), 'runs text as code'),
    **dict.fromkeys(('importlib.util.spec_from_file_location', 'importlib.util.module_from_spec'), 'runs a file as code'),
    **dict.fromkeys(('tarfile', 'zipfile', 'shutil.unpack_archive'), 'research.data.download.extract checks what it unpacks'),
    **dict.fromkeys(
        ('os.system', 'os.popen', 'subprocess.getoutput', 'subprocess.getstatusoutput', 'pty', 'commands'),
        'reads its command with a shell',
    ),
}
# Keywords that make a harmless function harmful; only these values of theirs are allowed.
KEYWORDS = {'allow_pickle': False, 'shell': False, 'trust_remote_code': False, 'enable_unsafe_deserialization': False}
PICKLE_POSITION = {'numpy.load': 2, 'numpy.memmap': None, 'numpy.save': 2}  # where `allow_pickle` stands without its name

# (file, what): why it may.
EXCEPTIONS = {
    ('research/data/download.py', 'tarfile'): 'it is the one safe extraction',
    ('research/data/download.py', 'zipfile'): 'it is the one safe extraction',
    ('research/data/sources/npz.py', 'zipfile'): 'tells a zip from a damaged file; numpy reads it, nothing is extracted',
    ('research/data/bad_records.py', 'zipfile'): 'names the error of a damaged zip; nothing is extracted',
    ('research/core/config_file.py', 'importlib.util.spec_from_file_location'): 'a config that the user names is Python',
    ('research/core/config_file.py', 'importlib.util.module_from_spec'): 'a config that the user names is Python',
    ('bench/peers/nano_gpt.py', 'torch'): 'the peer that Fulcrum is measured against, in a process of its own',
    ('bench/peers/cnn_keras.py', 'tensorflow'): 'a peer that Fulcrum is measured against, in a process of its own',
    ('bench/peers/cnn_torch.py', 'torch'): 'a peer that Fulcrum is measured against, in a process of its own',
    ('bench/peers/input_tf.py', 'tensorflow'): 'a peer that Fulcrum is measured against, in a process of its own',
    ('bench/peers/input_jpeg.py', 'torch'): 'a peer that Fulcrum is measured against, in a process of its own',
    ('bench/peers/input_torch.py', 'torch'): 'a peer that Fulcrum is measured against, in a process of its own',
    ('bench/minilm.py', 'torch'): 'makes the reference outputs with the library of the published model',
}
CHECKED = sorted({*FILES, *(f for folder in ('bench', 'deploy', 'docs') for f in ROOT.glob(f'{folder}/**/*.py'))})


def dangers(source):
    """(what, line) of everything forbidden that a source text imports, names, calls, or asks for by a keyword."""
    tree = ast.parse(source)
    names = bound_names(tree)
    for node in ast.walk(tree):
        line = getattr(node, 'lineno', 0)
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [f'{node.module}.{alias.name}' for alias in node.names]
            found += [f'{node.module}.{name}' for name in ('load', 'Loader') if node.names[0].name == '*']
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            found = [full_name(node, names)]
        elif isinstance(node, ast.Call):
            yield from ((what, line) for what in dangers_of_call(node, names))
            continue
        elif isinstance(node, ast.Constant) and node.value in KEYWORDS and node.value != 'shell':
            yield node.value, line  # a dict that becomes keywords
            continue
        else:
            continue
        yield from ((what, line) for what in map(forbidden, found) if what is not None)


def bound_names(tree):
    """What each name of the file stands for: modules and their things by their full names, everything else the file's own."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names[node.name] = f'<own>.{node.name}'
        elif isinstance(node, ast.arg):
            names[node.arg] = f'<own>.{node.arg}'
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = f'<own>.{node.id}'
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split('.')[0]
                names[name] = alias.name if alias.asname else name
        elif isinstance(node, ast.ImportFrom):
            names.update({alias.asname or alias.name: f'{node.module}.{alias.name}' for alias in node.names})
    for name in ('eval', 'exec', '__import__'):  # nobody has a reason to use these for something else
        names.pop(name, None)
    return names


def full_name(node, names):
    """`np.load` as 'numpy.load'; '' for what is no chain of names."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ''
    return '.'.join([names.get(node.id, node.id), *reversed(parts)])


def forbidden(name):
    """The entry of FORBIDDEN that forbids a full name, or None."""
    parts = name.split('.')
    return next((found for i in range(len(parts)) if (found := '.'.join(parts[: i + 1])) in FORBIDDEN), None)


def dangers_of_call(node, names):
    """What a call does by its arguments."""
    name = full_name(node.func, names)
    for keyword in node.keywords:
        if keyword.arg in KEYWORDS:
            is_safe = isinstance(keyword.value, ast.Constant) and keyword.value.value is KEYWORDS[keyword.arg]
            if not is_safe:
                yield keyword.arg
    position = PICKLE_POSITION.get(name)
    if position is not None and len(node.args) > position:
        yield 'allow_pickle'
    first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
    if name in ('importlib.import_module', '__import__', 'pytest.importorskip') and isinstance(first, str) and forbidden(first):
        yield forbidden(first)
    second = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else None
    if name == 'getattr' and second in ('eval', 'exec', '__import__', 'unpack_archive', 'system', 'popen', 'unsafe_load'):
        yield f'getattr {second}'


@pytest.mark.parametrize('path', CHECKED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_dangerous(path):
    name = path.relative_to(ROOT).as_posix()
    found = dict(dangers(path.read_text(encoding='utf-8')))
    bad = [
        f'{name}:{line}: {what} ({FORBIDDEN.get(what, "only False")})'
        for what, line in found.items()
        if (name, what) not in EXCEPTIONS
    ]
    assert not bad
    stale = [what for file, what in EXCEPTIONS if file == name and what not in found]
    assert not stale, f'{name} does not need its exception for {stale} any more'


def test_every_exception_is_of_a_file_that_exists():
    assert {file for file, _ in EXCEPTIONS} <= {path.relative_to(ROOT).as_posix() for path in CHECKED}


@pytest.mark.parametrize(
    ('source', 'what'),
    [
        ('import pickle', 'pickle'),
        ('def f():\n    from pickle import loads', 'pickle'),
        ('import _pickle as p', '_pickle'),
        ('import cloudpickle', 'cloudpickle'),
        ('import os, dill', 'dill'),
        ('import marshal', 'marshal'),
        ('import joblib\njoblib.load(f)', 'joblib'),
        ('from torch import load', 'torch'),
        ('import torch.nn as nn', 'torch'),
        ('import importlib\nimportlib.import_module("torch")', 'torch'),
        ('from importlib import import_module\nimport_module("pickle")', 'pickle'),
        ('import numpy as np\nnp.load(f, allow_pickle=True)', 'allow_pickle'),
        ('import numpy as np\nnp.load(f, allow_pickle=flag)', 'allow_pickle'),
        ('import numpy as np\nnp.load(f, None, True)', 'allow_pickle'),
        ('from numpy import load\nload(f, None, flag)', 'allow_pickle'),
        ('import numpy as np\nnp.load(f, **{"allow_pickle": True})', 'allow_pickle'),
        ('read = dict(allow_pickle=True)', 'allow_pickle'),
        ('import numpy as np\nnp.lib.format.read_array(f)', 'numpy.lib.format.read_array'),
        ('import pandas as pd\npd.read_pickle(f)', 'pandas.read_pickle'),
        ('from jax.experimental import serialize_executable', 'jax.experimental.serialize_executable'),
        ('import jax\njax.experimental.serialize_executable.serialize(c)', 'jax.experimental.serialize_executable'),
        ('import yaml\nyaml.load(f)', 'yaml.load'),
        ('import yaml\nyaml.load(f, Loader=yaml.SafeLoader)', 'yaml.load'),
        ('import yaml as y\ny.unsafe_load(f)', 'yaml.unsafe_load'),
        ('from yaml import full_load as read\nread(f)', 'yaml.full_load'),
        ('from yaml import *', 'yaml.load'),
        ('import yaml\nread = yaml.unsafe_load_all', 'yaml.unsafe_load_all'),
        ('import yaml\nyaml.Loader', 'yaml.Loader'),
        ('eval("1")', 'eval'),
        ('run = exec', 'exec'),
        ('list(map(eval, lines))', 'eval'),
        ('def eval(x):\n    pass\neval(x)', 'eval'),
        ('compile(text, "f", "exec")', 'compile'),
        ('__import__("os")', '__import__'),
        ('import builtins\nbuiltins.eval(x)', 'builtins'),
        ('from builtins import exec as run', 'builtins'),
        ('__builtins__["eval"](x)', '__builtins__'),
        ('getattr(thing, "eval")(x)', 'getattr eval'),
        ('import runpy', 'runpy'),
        ('from importlib import util\nutil.spec_from_file_location("a", f)', 'importlib.util.spec_from_file_location'),
        ('import importlib.machinery\nimportlib.machinery.SourceFileLoader("a", f)', 'importlib.machinery'),
        ('import tarfile', 'tarfile'),
        ('from zipfile import ZipFile', 'zipfile'),
        ('import shutil\nshutil.unpack_archive(f)', 'shutil.unpack_archive'),
        ('from shutil import unpack_archive', 'shutil.unpack_archive'),
        ('import os\nos.system("ls")', 'os.system'),
        ('import os as o\nrun = o.popen', 'os.popen'),
        ('from os import system', 'os.system'),
        ('import subprocess\nsubprocess.run("ls", shell=True)', 'shell'),
        ('from subprocess import Popen\nPopen("ls", shell=flag)', 'shell'),
        ('import subprocess\nsubprocess.getoutput("ls")', 'subprocess.getoutput'),
        ('from transformers import AutoModel\nAutoModel.from_pretrained("x", trust_remote_code=True)', 'trust_remote_code'),
    ],
)
def test_the_check_sees(source, what):
    assert what in {found for found, _ in dangers(source)}


@pytest.mark.parametrize(
    'source',
    [
        'import numpy as np\nnp.load(f)\nnp.load(f, allow_pickle=False)\nnp.load(f, "r")',
        'import yaml\nyaml.safe_load(f)\nyaml.dump(x, f, Dumper=yaml.SafeDumper)',
        'import re\nre.compile("a")\nlowered.compile()',
        'def compile(step):\n    return step\ncompile(step)',
        'from research.parallel import compile\ncompile.build(step)',
        'import subprocess\nsubprocess.run(["ls"], shell=False)',
        'task.eval\nmodel.exec()\nself.load(f)\nlayer.tarfile',
        'import shutil\nshutil.rmtree(f)',
        'import json\njson.load(f)',
        'import importlib\nimportlib.import_module(name)',
        '"eval the shell: pickle, yaml.load(x)"',
        'import tensorflow_datasets as tfds\nimport torchvision_like',
    ],
)
def test_the_check_leaves_alone(source):
    assert list(dangers(source)) == []


def test_no_room_is_a_junk_drawer():
    assert not [f for f in FILES if f.stem in ('utils', 'util', 'helpers', 'misc', 'common')]


def test_the_launcher_stays_small_and_is_the_only_reader_of_flags():
    assert len((ROOT / 'launch.py').read_text().splitlines()) <= 120
    for path in FILES:
        if path.name != 'launch.py':
            assert 'absl' not in {module.split('.')[0] for module, _ in imports(path)}, path


def test_the_repository_holds_no_large_or_generated_files():
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('not a git checkout')
    for name in listed.stdout.split():
        path = ROOT / name
        assert not path.is_file() or path.stat().st_size < 2_000_000, name
        assert path.name not in ('uv.lock', 'pylock.toml'), name
