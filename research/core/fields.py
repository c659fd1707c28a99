"""Fields of a typed config: declared once on a dataclass, checked, defaulted, walked and written back from there.

A schema class is a frozen dataclass whose fields are made by `value`. A class with a field `arguments` is *open*: keys that
are not its fields are arguments of the component that its field `name` names.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from research.core import durations, registry
from research.core.durations import Duration
from research.core.errors import UsageError, nearest
from research.core.registry import Component

Field = dataclasses.Field


def value(default: Any, meaning: str, **rules: Any) -> Any:
    """Declares a field: its default as a config writes it, and one line of meaning.

    `rules`: unit; low, high (inclusive bounds), above (exclusive bound); choices; kind (it is a component of that kind), many
    (it is several); component (it names the section's component); section (a schema class); resumable.
    """
    return dataclasses.field(default=default, metadata={'meaning': meaning, **rules})


def declared(schema: Any) -> dict[str, Field]:
    """The fields of a schema class that a config may name."""
    return {f.name: f for f in dataclasses.fields(schema) if f.name != 'arguments'}


def is_open(schema: Any) -> bool:
    """Whether the class takes arguments of a component beside its own fields."""
    return any(f.name == 'arguments' for f in dataclasses.fields(schema))


def type_name(field: Field) -> str:
    """The type of a field as written: 'int', 'str | None', 'tuple[str, ...]'."""
    return field.type.__name__ if type(field.type) is type else str(field.type).replace('research.core.registry.', '')


def walk(schema: Any, path: str = '') -> Iterator[tuple[str, Field]]:
    """Every leaf field of a schema class with its dotted path."""
    for field in declared(schema).values():
        where = f'{path}.{field.name}'.lstrip('.')
        if 'section' in field.metadata:
            yield from walk(field.metadata['section'], where)
        else:
            yield where, field


def defaults(schema: Any) -> dict[str, Any]:
    """The defaults of a schema class in the form that a config file edits."""
    return {name: _default(field) for name, field in declared(schema).items()}


def _default(field: Field) -> Any:
    if 'section' in field.metadata:
        return defaults(field.metadata['section'])
    is_component = 'kind' in field.metadata and 'many' not in field.metadata and field.default is not None
    return {'name': field.default} if is_component else field.default


def build(root: Any, schema: Any, config: Any, where: str) -> Any:
    """Builds the dataclass `schema` from `config` (nested dicts), checking every key; `root` is the outermost schema."""
    own = declared(schema)
    config = registry.parse(config, where) if isinstance(config, str) and is_open(schema) else config
    if not hasattr(config, 'items'):
        raise UsageError(f'{where} is {config!r}, not a section', f'its keys are {", ".join(own)}')
    rest = {k: registry.plain(v) for k, v in config.items() if k not in own}
    if rest and not is_open(schema):
        raise unknown(root, f'{where}.{next(iter(rest))}', own)
    result = {k: _field(root, f, config.get(k, f.default), f'{where}.{k}') for k, f in own.items()}
    if is_open(schema):
        registry.check_arguments(own['name'].metadata['component'], result['name'], rest, where, own)
        result['arguments'] = rest
    return schema(**result)


def _field(root: Any, field: Field, given: Any, where: str) -> Any:
    """The checked value of one field."""
    rules = field.metadata
    if 'section' in rules:
        return build(root, rules['section'], {} if given is None else given, where)
    if 'many' in rules:
        given = registry.parse_many(given, where) if isinstance(given, str) else given or ()
        given = [given] if hasattr(given, 'items') else given
        return tuple(registry.component(rules['kind'], v, f'{where}.{i}') for i, v in enumerate(given))
    if 'kind' in rules:
        return None if given is None and 'None' in type_name(field) else registry.component(rules['kind'], given, where)
    if field.type is Duration:
        return given if isinstance(given, Duration) else duration(given, where)
    given = registry.plain(given)
    registry.check_type(given, type_name(field), where)
    if 'rules' in rules and given is not None:
        _check_rules(given, where)
    _check_range(rules, given, where)
    return float(given) if type_name(field) == 'float' else given  # type: ignore[arg-type] - checked above


def duration(given: Any, where: str) -> Duration:
    """The duration that a config spells; errors name the key."""
    try:
        return durations.parse(given)
    except UsageError as error:
        raise UsageError(f'{where}: {error.message}', error.fix) from error


def _check_rules(given: Any, where: str) -> None:
    """Named-leaf rules are pairs of a regular expression and a value that is a number, None or a tuple."""
    for rule in given:
        if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str) and not isinstance(rule[1], str)):
            raise UsageError(f'{where} has the rule {rule!r}', "write pairs: (('.*/bias', 0.0), ('.*', 1.0))")


def _check_range(rules: Any, given: Any, where: str) -> None:
    if given is None:
        return
    if given != given:
        raise UsageError(f'{where} is {given!r}', 'give a number')
    if 'choices' in rules and given not in rules['choices']:
        raise UsageError(f'{where} is {given!r}', nearest(str(given), rules['choices']))
    for bound, broken, says in (
        ('low', lambda limit: given < limit, 'at least'),
        ('above', lambda limit: given <= limit, 'greater than'),
        ('high', lambda limit: given > limit, 'at most'),
    ):
        if bound in rules and broken(rules[bound]):
            raise UsageError(f'{where} is {given!r}', f'it must be {says} {rules[bound]} {rules.get("unit", "")}'.rstrip())


def find(root: Any, path: str) -> tuple[Field | None, str, str]:
    """What a dotted path points at: (field, path of the field, what follows it).

    `model.features` gives (field of `model`, 'model', 'features'); an argument of an open section such as `optimizer.b1`
    gives (None, 'optimizer', 'b1').

    Raises:
      UsageError: there is no such key; names the nearest valid one.
    """
    schema, words = root, path.split('.')
    for i, word in enumerate(words):
        own, walked, rest = declared(schema), '.'.join(words[:i]), '.'.join(words[i:])
        if word not in own and is_open(schema):
            return None, walked, rest
        if word not in own:
            raise unknown(root, f'config.{walked}.{word}' if walked else f'config.{word}', own)
        if 'section' not in own[word].metadata:
            return own[word], '.'.join(words[: i + 1]), '.'.join(words[i + 1 :])
        schema = own[word].metadata['section']
    if is_open(schema):
        return declared(schema)['name'], path, ''
    raise UsageError(f'config.{path} is a section, not a value', f'set one of its keys: {", ".join(declared(schema))}')


def unknown(root: Any, path: str, siblings: Any) -> UsageError:
    """The error for a key that does not exist: points at the same word elsewhere, else at the nearest sibling."""
    word = path.split('.')[-1]
    elsewhere = [p for p, _ in walk(root) if p.split('.')[-1] == word]
    return UsageError(
        f'{path} does not exist', f'did you mean config.{elsewhere[0]}?' if elsewhere else nearest(word, siblings)
    )


def to_plain(given: Any) -> Any:
    """An experiment (or a part) as plain JSON values, in the form that `build` reads back to an equal one."""
    if isinstance(given, Component):
        return {'name': given.name, **to_plain(given.arguments)}
    if isinstance(given, Duration):
        return str(given)
    if dataclasses.is_dataclass(given):
        values = {f.name: to_plain(getattr(given, f.name)) for f in dataclasses.fields(given)}
        arguments = values.pop('arguments', {})
        return {**values, **arguments}
    if isinstance(given, dict):
        return {k: to_plain(v) for k, v in given.items()}
    return [to_plain(v) for v in given] if isinstance(given, (tuple, list)) else given


def flat(given: Any, path: str = '') -> dict[str, Any]:
    """Nested dicts as one dict of dotted paths."""
    if isinstance(given, dict) and given:
        return {k: v for key, item in given.items() for k, v in flat(item, f'{path}.{key}'.lstrip('.')).items()}
    return {path: given}
