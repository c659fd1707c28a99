"""`--mode=show`: the resolved config, every field with its type, unit and meaning."""

from collections.abc import Iterator
from typing import Any

from research.core import fields, registry
from research.core.schema import Experiment


def report(experiment: Experiment) -> None:
    """Prints the lines of `describe`."""
    print('\n'.join(describe(experiment)))


def describe(experiment: Experiment) -> Iterator[str]:
    """'config.path = value' with the field's meaning, for every field and every argument of a component."""
    values = fields.flat(fields.to_plain(experiment))
    declared = dict(fields.walk(Experiment))
    for path, field in declared.items():
        own = {p: v for p, v in values.items() if p == path or p.startswith(path + '.')}
        for p, value in own.items():
            yield f'config.{p} = {value!r}'
        yield f'    {explain(field)}'
        if 'kind' in field.metadata and 'many' not in field.metadata and f'{path}.name' in own:
            yield from _defaults(path, field.metadata['kind'], own)
        if 'component' in field.metadata:
            yield from _defaults(path.removesuffix('.name'), field.metadata['component'], values)
    others = [p for p in values if not any(p == d or p.startswith(d + '.') for d in declared)]
    for p in others:
        yield f'config.{p} = {values[p]!r}'
        yield '    argument of the component'


def _defaults(path: str, kind: str, values: dict[str, Any]) -> Iterator[str]:
    """The arguments of a component that the config leaves as they are."""
    parameters = registry.signature(kind, values[f'{path}.name']) or {}
    for name, parameter in parameters.items():
        if f'{path}.{name}' not in values and not any(key.startswith(f'{path}.{name}.') for key in values):
            default = '...' if parameter.default is registry.OPAQUE else repr(parameter.default)
            yield f'config.{path}.{name} = {default}'
            yield f'    {parameter.annotation}; default of the {kind}'


def explain(field: fields.Field) -> str:
    """'int, examples, at least 1; examples in one step': type, unit, bounds and meaning of a field."""
    rules = field.metadata
    bounds = {'low': 'at least', 'above': 'greater than', 'high': 'at most'}
    parts = [fields.type_name(field).replace('Component', 'component')]
    parts += [rules['unit']] if 'unit' in rules and rules['unit'] != 'duration' else []
    parts += [f'{word} {rules[name]}' for name, word in bounds.items() if name in rules]
    parts += [f'one of {", ".join(rules["choices"])}'] if 'choices' in rules else []
    return f'{", ".join(parts)}; {rules["meaning"]}'
