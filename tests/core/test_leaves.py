import jax.numpy as jnp
import pytest

from research.core import leaves
from research.core.errors import UsageError

TREE = {'Conv_0': {'kernel': jnp.ones((3, 3)), 'bias': jnp.ones(3)}, 'Dense_0': [jnp.ones(2), jnp.ones(1)]}


def test_names_are_paths():
    assert leaves.names(TREE) == ['Conv_0/bias', 'Conv_0/kernel', 'Dense_0/0', 'Dense_0/1']


def test_first_match_wins_and_the_structure_stays():
    found = leaves.match([('.*/kernel', 'a'), ('Conv_0/.*', 'b'), ('.*', None)], TREE)
    assert found == {'Conv_0': {'kernel': 'a', 'bias': 'b'}, 'Dense_0': [None, None]}


def test_a_rule_matches_the_whole_name():
    found = leaves.match([('kernel', 1), ('.*', 0)], TREE, allow_unused=True)
    assert found['Conv_0']['kernel'] == 0


def test_an_uncovered_leaf_is_named():
    with pytest.raises(UsageError, match=r"rates: no rule covers 'Dense_0/0', 'Dense_0/1'"):
        leaves.match([('Conv_0/.*', 1)], TREE, 'rates')


@pytest.mark.parametrize('rules', [[('Konv_0/.*', 1), ('.*', 0)], [('.*', 0), ('.*/kernel', 1)]])
def test_a_rule_that_decides_nothing_is_named(rules):
    with pytest.raises(UsageError, match='decides no leaf'):
        leaves.match(rules, TREE)


def test_a_final_catch_all_may_be_idle():
    leaves.match([('(Conv|Dense)_0/.*', 1), ('.*', 0)], TREE)


def test_a_broken_expression_is_told():
    with pytest.raises(UsageError, match='not a regular expression'):
        leaves.match([('*/kernel', 1)], TREE)
