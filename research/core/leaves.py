"""Named leaves: one matcher from rules to the leaves of a tree, for decay, rates, freezing, sharding and partial loading.

A leaf's name is its path joined by '/': `{'Conv_0': {'kernel': x}}` has the leaf `Conv_0/kernel`. A rule is a pair
(regular expression, value); it applies to a leaf whose *whole* name matches; the first match wins; every leaf must be
covered; a rule that decides no leaf is an error, because it is nearly always a misspelt name.

    match([('.*/bias', 0.0), ('.*', 1.0)], params)      # a tree like params: 0.0 at biases, 1.0 elsewhere
"""

import re
from collections.abc import Sequence
from typing import Any

import jax

from research.core.errors import UsageError

Rules = Sequence[tuple[str, Any]]
CATCH_ALL = '.*'


def name(path: tuple) -> str:
    """The name 'a/b/c' of one path as `jax.tree_util` gives it."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def names(tree: Any) -> list[str]:
    """The names of all leaves, in the order of `jax.tree.leaves`."""
    return [name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def flat(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name; `nested` is its inverse for dicts of dicts."""
    return dict(zip(names(tree), jax.tree.leaves(tree), strict=True))


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{'a/b': x, 'a/c': y} as {'a': {'b': x, 'c': y}}."""
    result: dict[str, Any] = {}
    for leaf, value in flat.items():
        *folders, last = leaf.split('/')
        inner = result
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = value
    return result


def is_stacked(leaf: str) -> bool:
    """Whether the leading axis of this leaf counts layers: `nn.scan` keeps all layers of a stack under the name 'layers'."""
    return 'layers' in leaf.split('/')[:-1]


def match(rules: Rules, tree: Any, what: str = 'rules', allow_unused: bool = False) -> Any:
    """A tree like `tree` whose leaves are the values of the first rule that matches each leaf's name.

    Args:
      rules: (regular expression, value) pairs in order of priority.
      tree: any pytree; its leaves are not read.
      what: how error messages call these rules, e.g. 'optimizer.decay_rules'.
      allow_unused: accept rules that decide no leaf (built-in defaults that must serve every model). A final
        '.*' is always accepted.

    Raises:
      UsageError: a leaf is not covered, a rule decides nothing, or an expression does not compile.
    """
    compiled = [(_compile(pattern, what), value) for pattern, value in rules]
    all_names = names(tree)
    chosen = [_first(compiled, leaf) for leaf in all_names]
    uncovered = [leaf for leaf, index in zip(all_names, chosen, strict=True) if index is None]
    if uncovered:
        raise UsageError(f'{what}: no rule covers {_listed(uncovered)}', "end the rules with ('.*', VALUE)")
    unused = [rules[i][0] for i in range(len(rules)) if i not in chosen and rules[i][0] != CATCH_ALL]
    if unused and not allow_unused:
        raise UsageError(f'{what}: {_listed(unused)} decides no leaf', f'the leaves are {_listed(all_names)}')
    return jax.tree.unflatten(jax.tree.structure(tree), [rules[i][1] for i in chosen if i is not None])


def _compile(pattern: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f'{what}: {pattern!r} is not a regular expression: {error}', "for example '.*/kernel'") from error


def _first(compiled: list[tuple[re.Pattern[str], Any]], leaf: str) -> int | None:
    return next((i for i, (pattern, _) in enumerate(compiled) if pattern.fullmatch(leaf)), None)


def _listed(words: Sequence[str], limit: int = 8) -> str:
    more = f', ... ({len(words)} in all)' if len(words) > limit else ''
    return ', '.join(repr(word) for word in words[:limit]) + more
