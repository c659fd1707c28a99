"""The requirement lists agree with each other, with the imports of the code, and with the pinned versions."""

import ast
import importlib.metadata
import pathlib
import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
GPU = ROOT / 'requirements.txt'
CPU, TPU, EXTRAS, DEV, TYPES = (ROOT / f'requirements/{name}.txt' for name in ('cpu', 'tpu', 'extras', 'dev', 'types'))
CONSTRAINTS = ROOT / 'requirements' / 'constraints.txt'
PYTHONS = ('3.11', '3.12', '3.13')
NOT_IMPORTED = {
    'grain',  # users build their own input pipelines with it
    'importlib-resources',  # TFDS's builders import it and TFDS does not declare it
    *('sacrebleu', 'sentencepiece', 'soundfile'),  # extras: imported by name, with an error that says what to install
}


def lines(path):
    """Without comments and empty lines."""
    texts = (line.split('#')[0].strip() for line in path.read_text().splitlines())
    return [text for text in texts if text]


def requirements(path):
    return [Requirement(line) for line in lines(path) if not line.startswith('-')]


def names(*paths):
    return {canonicalize_name(requirement.name) for path in paths for requirement in requirements(path)}


def imported(*patterns):
    """The distributions (canonical names) whose modules the files of these patterns import, apart from the standard library."""
    distributions = importlib.metadata.packages_distributions()
    own = {'research', 'configs', 'launch', 'tests', 'bench'}
    modules = {module for pattern in patterns for path in ROOT.glob(pattern) for module in top_modules(path)}
    return {canonicalize_name(distributions.get(m, [m])[0]) for m in modules - own - set(sys.stdlib_module_names)}


def top_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split('.')[0]


def pinned(python):
    """name -> version for one Python version on Linux; fails where a name is pinned twice."""
    versions = {}
    for requirement in requirements(CONSTRAINTS):
        if requirement.marker is None or requirement.marker.evaluate({'python_version': python}):
            name = canonicalize_name(requirement.name)
            assert name not in versions, f'{name} is pinned twice for Python {python}'
            assert re.fullmatch(r'==[\w.]+', str(requirement.specifier)), requirement
            versions[name] = str(requirement.specifier).removeprefix('==')
    return versions


def closure(wanted):
    """`wanted` and what they need, by the metadata of what is installed here; what is not installed has no needs."""
    todo, seen = [(canonicalize_name(r.name), frozenset(r.extras)) for r in wanted], set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) not in seen:
            seen.add((name, extras))
            try:
                needs = map(Requirement, importlib.metadata.requires(name) or [])
            except importlib.metadata.PackageNotFoundError:
                continue
            apply = (r for r in needs if r.marker is None or any(r.marker.evaluate({'extra': e}) for e in {'', *extras}))
            todo += [(canonicalize_name(r.name), frozenset(r.extras)) for r in apply]
    return {name for name, _ in seen}


def test_the_lists_differ_in_the_jax_line_alone():
    gpu, cpu, tpu = ([line for line in lines(path) if not line.startswith('-c')] for path in (GPU, CPU, TPU))
    assert [gpu[0], cpu[0], tpu[0]] == ['jax[cuda12]', 'jax', 'jax[tpu]']
    assert gpu[1:] == cpu[1:] == tpu[1:]


@pytest.mark.parametrize('path', [GPU, CPU, TPU, EXTRAS, DEV, TYPES], ids=lambda path: path.name)
def test_every_list_is_constrained_and_names_no_index(path):
    options = [line for line in lines(path) if line.startswith('-')]
    assert [option.split()[0] for option in options] == ['-c']
    assert (path.parent / options[0].split()[1]).resolve() == CONSTRAINTS
    assert '://' not in path.read_text() + CONSTRAINTS.read_text()


def test_what_the_code_imports_is_declared_and_the_other_way_round():
    code = imported('research/**/*.py', 'configs/**/*.py', 'launch.py')
    assert code - names(CPU, EXTRAS) == set()
    assert names(CPU, EXTRAS) - code == NOT_IMPORTED


def test_what_the_tests_import_is_declared():
    declared = names(CPU, EXTRAS, DEV) | {'packaging'}  # pytest brings it
    assert imported('tests/**/*.py') - declared == set()


@pytest.mark.parametrize('python', PYTHONS)
def test_everything_that_is_named_is_pinned(python):
    versions = pinned(python)
    assert names(CPU, EXTRAS, DEV, TYPES) - set(versions) == set()
    assert versions['jax'] == versions['jaxlib']


def test_everything_that_is_brought_along_is_pinned():
    here = '.'.join(map(str, sys.version_info[:2]))
    assert (
        closure(requirements(CPU) + requirements(EXTRAS) + requirements(DEV) + requirements(TYPES)) - set(pinned(here)) == set()
    )


@pytest.mark.parametrize('python', PYTHONS)
def test_no_second_framework_is_brought_along(python):
    assert not {'tensorflow', 'tensorflow-cpu', 'torch', 'keras', 'tensorboard'} & set(pinned(python))
