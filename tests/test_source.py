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


FORBIDDEN_IMPORTS = {'pickle', 'dill', 'cloudpickle', 'tensorflow', 'torch', 'marshal', 'shelve'}
FORBIDDEN_CALLS = {'eval', 'exec', 'compile'}


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_dangerous(path):
    for module, line in imports(path):
        assert module.split('.')[0] not in FORBIDDEN_IMPORTS, f'{path}:{line} imports {module}'
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else None
            assert name not in FORBIDDEN_CALLS, f'{path}:{node.lineno} calls {name}'
            for keyword in node.keywords:
                unsafe = keyword.arg == 'allow_pickle' and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                )
                assert not unsafe, f'{path}:{node.lineno}: allow_pickle'


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
