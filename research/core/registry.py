"""Components by name, checked against their own signature without importing them.

A component is a function or a class. In a config it is `name` plus keyword arguments, in one of three spellings:

    'flip'                              'pad_crop(padding=2)'                 {'name': 'pad_crop', 'padding': 2}

`name` is a key of the table of its kind (`tables.py`), or `package.module:Thing` for a user's own, so nobody edits this
repository to add a model. Arguments are checked against the component's own signature, which is read from its source without
importing it (a misspelt argument is answered before jax is loaded). What the program itself supplies is positional-only in a
function (before `/`) and listed in `tables.SUPPLIED` for classes; a config cannot set it.
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from research.core.errors import UsageError, nearest
from research.core.tables import SUPPLIED, TABLES

REQUIRED = object()  # the default of a parameter that has none
OPAQUE = object()  # a default that is not a literal


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One argument of a component: its annotation as written and its default (`REQUIRED`, `OPAQUE` or the literal)."""

    annotation: str
    default: Any


@dataclasses.dataclass(frozen=True)
class Component:
    """A component as a config names it. `build` imports it and calls it."""

    kind: str
    name: str
    arguments: dict[str, Any]

    def build(self, *supplied: Any, **supplied_by_name: Any) -> Any:
        """Imports the component and calls it with what the program supplies and the config's arguments."""
        return self.load()(*supplied, **supplied_by_name, **self.arguments)

    def bound(self) -> Callable[..., Any]:
        """Imports the component and binds the config's arguments: what `call` fills up."""
        return functools.partial(self.load(), **self.arguments)

    def load(self) -> Any:
        """Imports the component and returns the function or class itself."""
        module, thing = address(self.kind, self.name).split(':')
        return getattr(importlib.import_module(module), thing)

    def __str__(self) -> str:
        return f'{self.name}({", ".join(f"{k}={v!r}" for k, v in self.arguments.items())})' if self.arguments else self.name


def call(function: Callable[..., Any], **available: Any) -> Any:
    """Calls `function` (a class too) with those of `available` that it has parameters for."""
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}
    return function(**{name: value for name, value in available.items() if takes_all or name in names})


def component(kind: str, value: Any, where: str) -> Component:
    """The checked component that a config's `value` spells; `where` is the config path for error messages.

    Raises:
      UsageError: unknown name, unknown, missing or mistyped argument, each with the nearest valid name.
    """
    if isinstance(value, Component):
        return value
    if isinstance(value, str):
        value = parse(value, where)
    if not hasattr(value, 'items'):
        raise UsageError(f'{where} is {value!r}, not a component', f"write it as {where}='NAME' or 'NAME(argument=value)'")
    arguments = {k: plain(v) for k, v in value.items() if k != 'name'}
    if 'name' not in value:
        raise UsageError(f'{where} has no name', nearest('', TABLES[kind]))
    check_arguments(kind, value['name'], arguments, where)
    return Component(kind, value['name'], arguments)


def address(kind: str, name: str) -> str:
    """'module:Thing' for a table key or an address that already is one."""
    if ':' in str(name):
        return name
    if name not in TABLES[kind]:
        module, _, thing = str(name).rpartition('.')
        own = f'{module}:{thing}' if module else 'package.module:Thing'
        raise UsageError(f'{kind} {name!r} does not exist', nearest(str(name), TABLES[kind]) + f'; or your own, as {own}')
    return TABLES[kind][name]


def check_arguments(kind: str, name: str, arguments: dict[str, Any], where: str, also: Iterable[str] = ()) -> None:
    """Checks keyword arguments against the component's signature; `also`: other keys of the section, for the hint."""
    parameters = signature(kind, name)
    if parameters is None:  # it takes **kwargs: it checks its own arguments
        return
    for key, value in arguments.items():
        if key not in parameters:
            raise UsageError(
                f'{where}.{key} does not exist: {kind} {name!r} has no argument {key!r}', nearest(key, {*parameters, *also})
            )
        check_type(value, parameters[key].annotation, f'{where}.{key}')
    missing = [k for k, p in parameters.items() if p.default is REQUIRED and k not in arguments]
    if missing:
        raise UsageError(f'{where}.{missing[0]} must be given: {kind} {name!r} needs it', f'set {where}.{missing[0]}')


CHECKS = {
    'int': lambda v: isinstance(v, int) and not isinstance(v, bool),
    'float': lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    'bool': lambda v: isinstance(v, bool),
    'str': lambda v: isinstance(v, str),
    'None': lambda v: v is None,
    'tuple': lambda v: isinstance(v, (tuple, list)),
    'list': lambda v: isinstance(v, (tuple, list)),
    'Sequence': lambda v: isinstance(v, (tuple, list)),
    'dict': lambda v: isinstance(v, dict),
    'Mapping': lambda v: isinstance(v, dict),
}


def check_type(value: Any, annotation: str, where: str) -> None:
    """Checks a value against an annotation made of int, float, bool, str, None, sequences and dicts joined by `|`.

    Other annotations are accepted: the component checks them itself.
    """
    if not any(_fits(value, part.strip()) for part in alternatives(annotation)):
        raise UsageError(f'{where} is {value!r}, which is not {annotation}', f'give {where} a value of type {annotation}')


def _fits(value: Any, annotation: str) -> bool:
    """Whether `value` is of a type without `|`; the elements of 'tuple[X, ...]' are looked at too."""
    outer, _, inner = annotation.partition('[')
    outer = outer.split('.')[-1]
    if outer not in CHECKS:
        return True
    if not CHECKS[outer](value):
        return False
    element = inner.removesuffix(']').removesuffix(', ...')
    return not inner.endswith(', ...]') or all(any(_fits(v, part.strip()) for part in alternatives(element)) for v in value)


@functools.cache
def signature(kind: str, name: str) -> dict[str, Parameter] | None:
    """The arguments that a config may give, read from the component's source; None if it takes any (`**kwargs`).

    Raises:
      UsageError: there is no such module or no such thing in it.
    """
    path, _, thing = address(kind, name).partition(':')
    source = _source_of(path)
    if source is None or not thing:
        raise UsageError(f'{kind} {name!r}: there is no module {path!r}', 'write package.module:Thing, importable from here')
    definitions = _definitions(path)[0]
    if thing not in definitions:
        raise UsageError(f'{kind} {name!r}: module {path!r} has no {thing!r}', nearest(thing, definitions))
    node = definitions[thing]
    supplied = SUPPLIED.get(kind, set())
    if isinstance(node, ast.FunctionDef):
        found = _function_parameters(node)
    else:
        found = _class_parameters(node, path)
    if kind == 'model' and found is not None and 'num_outputs' not in found:
        raise UsageError(f'{kind} {name!r} has no field num_outputs', 'declare num_outputs: int, the size of its last layer')
    return None if found is None else {k: p for k, p in found.items() if k not in supplied}


def plain(value: Any) -> Any:
    """`value` with ConfigDicts as dicts and lists as tuples, all the way down: what a component gets."""
    if hasattr(value, 'items'):
        return {k: plain(v) for k, v in value.items()}
    return tuple(plain(v) for v in value) if isinstance(value, (list, tuple)) else value


def parse(text: str, where: str) -> dict[str, Any]:
    """'name' or 'name(key=literal, ...)' as a dict. Literals only; nothing is executed."""
    head, bracket, rest = text.partition('(')
    if not bracket:
        return {'name': text.strip()}
    return {'name': head.strip(), **_keywords(f'f({rest}', where, text)}


def parse_many(text: str, where: str) -> list[dict[str, Any]]:
    """'flip, pad_crop(padding=2)' as a list of dicts; 'none' is the empty list."""
    if text.strip().lower() in ('', 'none', '()', '[]'):
        return []
    depth, parts = 0, ['']
    for character in text:
        depth += {'(': 1, '[': 1, ')': -1, ']': -1}.get(character, 0)
        if character == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += character
    return [parse(part.strip(), where) for part in parts]


def _keywords(call: str, where: str, text: str) -> dict[str, Any]:
    try:
        node = ast.parse(call, mode='eval').body
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if isinstance(node, ast.Call) and is_call and not node.args and all(k.arg for k in node.keywords):
            return {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except (SyntaxError, ValueError):
        pass
    raise UsageError(f'{where}={text!r} cannot be read', "write 'name(key=value, ...)' with literal values")


def alternatives(annotation: str) -> list[str]:
    """The parts of 'a[x | y] | b' at the top level: ['a[x | y]', 'b']."""
    parts, depth = [''], 0
    for character in annotation:
        depth += {'[': 1, ']': -1}.get(character, 0)
        if character == '|' and depth == 0:
            parts.append('')
        else:
            parts[-1] += character
    return parts


def _source_of(module: str) -> pathlib.Path | None:
    """The file of a module, found without importing its parents when they lie on the path as plain folders."""
    top, *rest = module.split('.')
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    roots = [pathlib.Path(p) for p in spec.submodule_search_locations or ()]
    if not rest:
        return pathlib.Path(spec.origin) if spec.origin else None
    for root in roots:
        for candidate in (root.joinpath(*rest).with_suffix('.py'), root.joinpath(*rest, '__init__.py')):
            if candidate.is_file():
                return candidate
    return None


def _function_parameters(node: ast.FunctionDef) -> dict[str, Parameter] | None:
    if node.args.kwarg:
        return None
    positional = node.args.args
    padding: list[ast.expr | None] = [None] * len(positional)
    all_defaults = (padding + list(node.args.defaults))[-len(positional) :] if positional else []
    pairs = list(zip(positional, all_defaults, strict=True))
    pairs += list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
    return {a.arg: Parameter(_text(a.annotation), _default(d)) for a, d in pairs if a.arg != 'self'}


@functools.cache
def _definitions(module: str) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """The functions and classes of a module's source, and what it imports by `from`: name -> (module, name there).

    Raises:
      UsageError: the source is no Python.
    """
    source = _source_of(module)
    assert source is not None
    try:
        body = ast.parse(source.read_text(encoding='utf-8'), str(source)).body
    except SyntaxError as error:
        raise UsageError(f'{source}:{error.lineno}: {error.msg}', 'correct that line') from error
    imports = [n for n in body if isinstance(n, ast.ImportFrom) and n.module and not n.level]
    found = {alias.asname or alias.name: (str(n.module), alias.name) for n in imports for alias in n.names}
    return {n.name: n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}, found


def _base_parameters(base: str, module: str) -> dict[str, Parameter] | None:
    """The fields of a base class; of none for one that is written with a dot (nn.Module); None if it cannot be read."""
    definitions, imports = _definitions(module)
    if isinstance(definitions.get(base), ast.ClassDef):
        return _class_parameters(definitions[base], module)
    if base not in imports or _source_of(imports[base][0]) is None:
        return {} if '.' in base or base in ('object', 'Protocol') else None
    module, name = imports[base]
    node = _definitions(module)[0].get(name)
    return _class_parameters(node, module) if isinstance(node, ast.ClassDef) else {}


def _class_parameters(node: ast.ClassDef, module: str) -> dict[str, Parameter] | None:
    """Arguments of `__init__` if there is one, else the annotated fields, those of base classes first."""
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)
    if init is not None:
        return _function_parameters(init)
    found: dict[str, Parameter] = {}
    for base in node.bases:
        inherited = _base_parameters(_text(base), module)
        if inherited is None:
            return None
        found |= inherited
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    for field in fields:
        annotation = _text(field.annotation)
        if not annotation.startswith('ClassVar') and isinstance(field.target, ast.Name):
            found[field.target.id] = Parameter(annotation, _default(field.value))
    return found


def _text(node: ast.expr | None) -> str:
    return 'Any' if node is None else ast.unparse(node).strip("'")


def _default(node: ast.expr | None) -> Any:
    if node is None:
        return REQUIRED
    try:
        return ast.literal_eval(node)
    except ValueError:
        return OPAQUE
