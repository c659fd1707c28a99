"""Sphinx configuration; it also writes reference/configuration.md from the schema and the component tables.

Building needs no network:

    python -m sphinx -W --keep-going -b html docs docs/_build/html
"""

import inspect
import pathlib
import re
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from research.core import fields, registry, schema, show  # noqa: E402 - the path must be set first

project = 'Fulcrum'
author = 'the Fulcrum authors'
copyright = author  # noqa: A001 - Sphinx's word
release = version = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']['version']
extensions = ['myst_parser']
myst_enable_extensions = ['deflist']
myst_heading_anchors = 3
exclude_patterns = ['_build']
html_theme = 'furo'
smartquotes = False  # what is quoted here is typed by somebody
html_title = f'{project} {release}'

REFERENCE = DOCS / 'reference' / 'configuration.md'
SPECIAL = re.compile(r'([\\*_<>\[\]|$#])')


def reference() -> Iterator[str]:
    """The lines of reference/configuration.md."""
    yield '# Configuration reference\n'
    yield 'Written from the code when these pages are built; `--mode=show` prints the same for one config.'
    yield 'How to write a config: [](../configuration.md).\n'
    yield '## Fields\n'
    yield 'Each is given with its default. A field marked *resumable* may have another value when a run is resumed.\n'
    for section, members in sections().items():
        yield f'### `{section}`\n'
        for path, field in members:
            yield from described(path, field)
    yield '## Components\n'
    yield 'The names that a config may use, with the arguments that it may give. Each can also be written as `module:Thing`.\n'
    for kind in registry.TABLES:
        yield from table(kind)
    yield from metrics()


def sections() -> dict[str, list[tuple[str, fields.Field]]]:
    """The fields with their paths, by the section that they stand in."""
    found: dict[str, list[tuple[str, fields.Field]]] = {}
    for path, field in fields.walk(schema.Experiment):
        found.setdefault(f'config.{path}'.rpartition('.')[0], []).append((path, field))
    return found


def described(path: str, field: fields.Field) -> Iterator[str]:
    """One field as an item of a definition list."""
    resumable = ' *Resumable.*' if 'resumable' in field.metadata else ''
    yield f'`config.{path} = {plain_default(field)!r}`'
    yield f': {escaped(show.explain(field))}.{resumable}\n'


def plain_default(field: fields.Field) -> Any:
    """The default as a config file would write it."""
    value: Any = field.default
    return list(value) if 'many' in field.metadata else value


def table(kind: str) -> Iterator[str]:
    """One component table: for each name its signature, the first sentence of its docstring and its address."""
    yield f'### `{kind}`\n'
    for name, address in registry.TABLES[kind].items():
        thing = registry.Component(kind, name, {}).load()
        summary = ' '.join((inspect.getdoc(thing) or '').partition('\n\n')[0].split())
        yield f'`{signature(kind, name)}`'
        yield f': {escaped(summary)} (`{address}`)\n'


def signature(kind: str, name: str) -> str:
    """'flip(probability: float = 0.5)'."""
    parameters = registry.signature(kind, name)
    if parameters is None:
        return f'{name}(...)'
    shown = (f'{key}: {p.annotation}{default(p)}' for key, p in parameters.items())
    return f'{name}({", ".join(shown)})'


def default(parameter: registry.Parameter) -> str:
    """' = 0.5', or nothing for an argument that must be given."""
    if parameter.default is registry.REQUIRED:
        return ''
    return ' = ...' if parameter.default is registry.OPAQUE else f' = {parameter.default!r}'


def metrics() -> Iterator[str]:
    """The names for `config.task.metrics`."""
    from research.tasks import metrics as known  # it imports jax: only when the page is written

    yield '### Metrics\n'
    yield 'The names that `config.task.metrics` may hold, by task.\n'
    for task, names in (('classify', known.CLASS_METRICS), ('regress', known.VALUE_METRICS)):
        yield f'`{task}`'
        yield f': {", ".join(f"`{name}`" for name in names)}\n'


def escaped(text: str) -> str:
    """`text` with Markdown's characters escaped, apart from what is in backticks."""
    parts = text.split('`')
    return '`'.join(part if i % 2 else SPECIAL.sub(r'\\\1', part) for i, part in enumerate(parts))


def write_reference(path: pathlib.Path = REFERENCE) -> None:
    """Writes the page, if it is not there as it should be."""
    text = '\n'.join(reference())
    if not path.exists() or path.read_text(encoding='utf-8') != text:
        path.write_text(text, encoding='utf-8')


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this before it looks for pages."""
    app.connect('builder-inited', lambda _: write_reference())
    return {'parallel_read_safe': True}
