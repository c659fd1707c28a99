"""From `configs/NAME.py[:argument=value,...]` and `--config.key=value` overrides to a plain nested dict.

A config file is a Python module with `get_config(**arguments)`, whose arguments are typed by their defaults:

    load('configs/digits_cnn.py:epochs=3')         # calls get_config(epochs=3)
    override(config, 'train.duration', '2 epochs')

An override's text is read by the type of its field ('1e3' is a good int, 'true' a bool, 'none' None); names of components
replace the whole component, so that no argument of the old one stays behind. Nothing is executed but the config file itself.
"""

import ast
import importlib.util
import inspect
import pathlib
import re
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from research.core import fields, files, registry, schema
from research.core.errors import FulcrumError, UsageError, nearest
from research.core.schema import Experiment

BOOLEANS = {'true': True, 'false': False}


def load(text: str) -> dict[str, Any]:
    """The config, as nested plain dicts, of 'FILE.py' or 'FILE.py:argument=value,...'.

    Raises:
      UsageError: no such file, no `get_config` in it, an argument it does not take, or an error inside it.
    """
    path, _, arguments = text.partition('.py:')
    path = pathlib.Path(path if path.endswith('.py') else path + '.py')
    if not path.is_file():
        folders = [folder for folder in (path.parent, pathlib.Path('configs')) if folder.is_dir()]
        known = [str(p) for folder in folders for p in folder.glob('*.py') if p.stem != '__init__' and 'configs' in p.parts]
        known = [p for p in known if pathlib.Path(p).stem == path.stem] or known
        fix = nearest(str(path), known) if known else f'there are no configs in {pathlib.Path.cwd()}; go to where they are'
        raise UsageError(f'there is no config file {str(path)!r}', fix)
    get_config = _import(path)
    config = registry.plain(_call(path, get_config, _arguments(get_config, arguments)))
    config['name'] = config.get('name') or path.stem
    return config


def known_configs() -> str:
    """'known: configs/a.py, configs/b.py', for messages."""
    return 'known: ' + ', '.join(str(p) for p in sorted(pathlib.Path('configs').glob('*.py')) if p.stem != '__init__')


def flag_hint(arguments: Sequence[str], flags: Iterable[str], modes: Iterable[str]) -> str:
    """What the first unknown flag among the arguments may have meant: a config key of that name, or a flag that is near."""
    words = [argument.lstrip('-').split('=')[0] for argument in arguments if argument.startswith('--')]
    known = [flag for flag in flags if flag != '?']
    word = next((w for w in words if w not in known and not w.startswith('config.')), None)
    if word is None:
        return f'--mode is one of {", ".join(modes)}'
    keys = [path for path, _ in fields.walk(Experiment) if path.split('.')[-1] == word]
    return f'did you mean --config.{keys[0]}?' if keys else nearest(word, known)


def resolve(text: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of 'FILE.py[:argument=value,...]' with overrides 'key=value'; the last of equal keys counts."""
    config = load(text)
    for path, _, value in (one.partition('=') for one in overrides):
        override(config, path, value)
    return schema.resolve(config)


def default_workdir(text: str, experiment: Experiment) -> pathlib.Path:
    """runs/NAME; runs/NAME-HASH where the experiment is another than its file's own, so that two never mix.

    What a resumed run may change (the period of the log, say) is not in the hash.
    """
    own = resolve(text.partition('.py:')[0].removesuffix('.py') + '.py')
    changes = [str(change) for change in schema.differences(own, experiment) if not change.resumable]
    suffix = '-' + files.digest(changes, 4) if changes else ''
    return pathlib.Path('runs') / (pathlib.Path(experiment.name).name + suffix)


def override(config: dict[str, Any], path: str, text: str) -> None:
    """Sets one key of a plain config from the text of a `--config.PATH=TEXT` flag, in place.

    Raises:
      UsageError: there is no such key, or the text cannot be read as its type.
    """
    field, where, rest = fields.find(Experiment, path)
    *parents, last = where.split('.')
    section = config
    for word in parents:
        section[word] = _as_dict(section[word])
        section = section[word]
    if field is None:
        section[last] = _as_dict(section[last])
        _set_argument(section[last], _kind(where), rest, text, f'config.{path}')
    elif 'component' in field.metadata:
        _rename(config, where.removesuffix('.name'), text)
    elif 'many' in field.metadata:
        section[last] = _set_many(section[last], field.metadata['kind'], rest, text, f'config.{path}')
    elif 'kind' in field.metadata:
        section[last] = _set_component(section[last], field.metadata['kind'], rest, text, f'config.{path}')
    elif rest:
        raise UsageError(f'config.{path} does not exist: config.{where} is a value', f'set config.{where}')
    else:
        section[last] = read(text, fields.type_name(field), f'config.{path}')


def read(text: str, annotation: str, where: str) -> Any:
    """The value that `text` spells for a field of type `annotation` such as 'int', 'str | None', 'tuple[str, ...]'."""
    choices = {part.split('[')[0].strip() for part in registry.alternatives(annotation)}
    if 'None' in choices and text.lower() in ('none', 'null'):
        return None
    if 'bool' in choices and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    number = _number(text)
    if number is not None and choices & {'int', 'float'}:
        whole = 'int' in choices and number == int(number)
        if whole or 'float' in choices:
            return int(number) if whole else number
    if choices & {'str', 'Duration'} and not choices & {'tuple', 'list'}:
        return text
    literal = _literal(text)
    if choices == {'bool'}:
        raise UsageError(f'{where}={text} is not a bool', 'use true or false')
    if choices <= {'int', 'float', 'None'}:
        raise UsageError(f'{where}={text} is not {annotation}', f'give a number, for example {where}=1')
    if 'str' in choices and isinstance(literal, str):
        return literal
    if choices & {'tuple', 'list'} and isinstance(literal, str):
        return tuple(part.strip() for part in literal.split(','))
    return (literal,) if choices & {'tuple', 'list'} and isinstance(literal, (int, float)) else literal


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < float('inf') else None


def _literal(text: str) -> Any:
    """A Python literal; a bare word, or what is no literal, is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return BOOLEANS.get(text.lower(), text)


def _as_dict(value: Any) -> dict[str, Any]:
    return registry.parse(value, 'config') if isinstance(value, str) else dict(value)


def _kind(where: str) -> str:
    """The kind of component of an open section."""
    return fields.find(Experiment, where)[0].metadata['component']  # type: ignore[union-attr]


def _rename(config: dict[str, Any], where: str, text: str) -> None:
    """Gives an open section another component: its declared keys stay, the arguments of the old component go."""
    *parents, last = where.split('.')
    section: Any = config
    for word in parents:
        section = section[word]
    schema: Any = Experiment
    for word in where.split('.'):
        schema = fields.declared(schema)[word].metadata['section']
    kept = {k: v for k, v in _as_dict(section[last]).items() if k in fields.declared(schema)}
    section[last] = kept | registry.parse(text, f'config.{where}')


def _set_component(value: Any, kind: str, rest: str, text: str, where: str) -> Any:
    """A component field: replaced whole (`model=mlp`, `model.name=mlp`), or one argument of it set (`model.width=3`)."""
    if rest in ('', 'name'):
        return None if text.lower() in ('none', 'null') else registry.parse(text, where)
    if value is None:
        raise UsageError(f'{where} does not exist: there is no component', f'set {where.rsplit(".", 1)[0]}=NAME first')
    value = _as_dict(value)
    _set_argument(value, kind, rest, text, where)
    return value


def _set_argument(component: dict[str, Any], kind: str, argument: str, text: str, where: str) -> None:
    parameters = registry.signature(kind, component['name']) or {}
    annotation = parameters[argument].annotation if argument in parameters else 'Any'
    component[argument] = _literal(text) if annotation == 'Any' else read(text, annotation, where)


def _set_many(values: Any, kind: str, rest: str, text: str, where: str) -> list[Any]:
    """A list of components: replaced whole ('flip, pad_crop(padding=2)' or 'none'), or one of them by index."""
    if not rest:
        return registry.parse_many(text, where)
    values = registry.parse_many(values, where) if isinstance(values, str) else list(values)
    index, _, argument = rest.partition('.')
    if not index.isdigit() or int(index) >= len(values):
        raise UsageError(f'{where}: there is no component {index!r}', f'there are {len(values)}, counted from 0')
    values[int(index)] = _set_component(values[int(index)], kind, argument, text, where)
    return values


def _import(path: pathlib.Path) -> Any:
    """The `get_config` of a config file."""
    spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _guarded(path, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    if not hasattr(module, 'get_config'):
        raise UsageError(f'{path} has no function get_config', 'define get_config() that edits and returns default_config()')
    return module.get_config


def _arguments(get_config: Any, text: str) -> dict[str, Any]:
    """'a=1,b=x' as keyword arguments of `get_config`, typed by its defaults."""
    parameters = inspect.signature(get_config).parameters
    result = {}
    for part in filter(None, text.split(',')):
        key, equals, value = part.partition('=')
        if key not in parameters or not equals:
            known = ', '.join(f'{k}={p.default!r}' for k, p in parameters.items()) or 'it takes none'
            raise UsageError(f'the config file takes no argument {part!r}', f'write NAME.py:argument=value; known: {known}')
        default = parameters[key].default
        result[key] = _literal(value) if default is None else read(value, type(default).__name__, key)
    return result


def _call(path: pathlib.Path, get_config: Any, arguments: dict[str, Any]) -> Any:
    config = _guarded(path, lambda: get_config(**arguments))
    if not hasattr(config, 'items'):
        raise UsageError(f'get_config of {path} returned {config!r}', 'return the edited default_config()')
    return config


def _guarded(path: pathlib.Path, function: Any) -> Any:
    """Runs code of the user's config file; an error in it is told with the file's own line, not with ours."""
    try:
        return function()
    except FulcrumError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if pathlib.Path(f.filename) == path.resolve()]
        frames = frames or [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = f':{frames[-1].lineno}' if frames else f':{error.lineno}' if isinstance(error, SyntaxError) else ''
        unknown = re.search(r'Key "(\w+)" does not exist|^\W*(\w+)\W+nDid you mean', repr(str(error)))
        if unknown and isinstance(error, (AttributeError, KeyError)):
            key = unknown[1] or unknown[2]
            known = {word for key, _ in fields.walk(Experiment) for word in key.split('.')}
            raise UsageError(f'{path}{line}: the config has no key {key!r}', nearest(key, known)) from error
        reason = str(error).split('\n')[0][:120]
        raise UsageError(f'{path}{line}: {type(error).__name__}: {reason}', 'correct that line') from error
