"""The English text that ships with Python: help topics, the licence and the docstrings of the standard library.

    python_docs().splits['all']         # 654 documents, 2.47 million characters in Python 3.11.7

One document is one help topic (`help('yield')`), the licence, or one module with the docstrings of its classes and functions
under their names. Files are read and parsed, no module is imported; test folders are left out, whether they are there or not.
The text is that of the running Python: another version is another data set (and another fingerprint), which a config's result
must say. Parsing takes a few seconds, so the documents are kept in the cache folder, under the sizes and times of the files.
"""

import ast
import contextlib
import json
import os
import pathlib
import sys
import sysconfig
from collections.abc import Iterator

from research.core import files
from research.core.errors import UsageError
from research.data.source import ArraySource, DataSet
from research.data.sources.text_files import as_column

LEFT_OUT = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__', 'lib2to3'}
TOPICS = 'pydoc_data/topics.py'


def python_docs() -> DataSet:
    """The documents in one split 'all': 'text' object (str).

    Raises:
      UsageError: this Python came without its help topics.
    """
    root = pathlib.Path(sysconfig.get_paths()['stdlib'])
    if not (root / TOPICS).is_file():
        raise UsageError(f'this Python has no {root / TOPICS}', 'install its documentation strings (Debian: libpython3-stdlib)')
    return DataSet('python_docs', {'all': ArraySource({'text': as_column(_kept_or_read(root))})})


def _kept_or_read(root: pathlib.Path) -> list[str]:
    """The documents of the library at `root`, from the cache where it has not changed since."""
    paths = sorted(_modules(root))
    stamps = [f'{path} {path.stat().st_size} {path.stat().st_mtime_ns}' for path in paths]
    folder = files.cache_folder('python_docs')
    kept = folder / f'{files.digest([sys.version, *stamps])}.json'
    is_private = files.problem_of_folder(folder) is None
    if is_private and kept.is_file():
        with contextlib.suppress(ValueError):  # it is damaged: it is made again
            return files.read_json(kept)
    documents = list(read(root, paths))
    if is_private:
        files.write_atomically(kept, json.dumps(documents))
    return documents


def _modules(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files of all modules below `root` that are part of the library."""
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT]
        yield from (pathlib.Path(folder, name) for name in names if name.endswith('.py'))


def read(root: pathlib.Path, paths: list[pathlib.Path]) -> Iterator[str]:
    """The licence, the help topics, and of each of `paths` the docstrings; what does not parse has none."""
    if (root / 'LICENSE.txt').is_file():
        yield (root / 'LICENSE.txt').read_text(encoding='utf-8')
    for path in paths:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates of code that are called .py
            continue
        if path == root / TOPICS:
            yield from _topics(tree)
            continue
        name = '.'.join(path.relative_to(root).with_suffix('').parts).removesuffix('.__init__')
        document = '\n\n'.join(_docstrings(tree, name))
        if document:
            yield document


def _topics(tree: ast.Module) -> Iterator[str]:
    """The values of the one dictionary that pydoc_data/topics.py assigns, which are literals."""
    for node in tree.body:
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if isinstance(value, ast.Dict):
            yield from (text for text in ast.literal_eval(value).values() if text.strip())


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[str]:
    """The docstrings of a definition and of what it defines, each under its dotted name."""
    text = ast.get_docstring(node)
    if text:
        yield f'{name}\n\n{text}'
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, f'{name}.{child.name}')
