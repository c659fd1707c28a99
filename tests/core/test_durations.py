import math

import pytest

from research.core.durations import Duration, Facts, parse
from research.core.errors import UsageError

FACTS = Facts(batch_size=32, epoch_examples=1000, step_flops=2e9, total_steps=200)


@pytest.mark.parametrize(
    ('text', 'steps'),
    [
        ('2000 steps', 2000),
        ('1 step', 1),
        ('0 steps', 0),
        ('10 epochs', 313),  # 10,000 examples / 32 = 312.5, all are seen
        ('0.1 epochs', 4),
        ('64 examples', 2),
        ('65 examples', 3),
        ('1 example', 1),
        ('1e12 flops', 500),
        ('1.0019e12 flops', 500),  # never overspent
        ('5%', 10),
        ('100 %', 200),
    ],
)
def test_every_unit_in_steps(text, steps):
    assert parse(text).to_steps(FACTS) == steps


@pytest.mark.parametrize('epochs', [1, 3, 7, 10, 90])
@pytest.mark.parametrize('batch', [1, 7, 32, 1000])
def test_epochs_see_every_example_and_waste_less_than_a_batch(epochs, batch):
    steps = parse(f'{epochs} epochs').to_steps(Facts(batch, 1258))
    assert 0 <= steps * batch - epochs * 1258 < batch
    assert steps == math.ceil(epochs * 1258 / batch)


@pytest.mark.parametrize('text', ['10', 'epochs', '10 parsecs', '-1 steps', '1.5 steps', '', '10 epochs more', 10, None, '1e5'])
def test_what_is_no_duration_is_refused_with_examples(text):
    with pytest.raises(UsageError) as error:
        parse(text)
    assert '2000 steps' in error.value.fix


@pytest.mark.parametrize('text', ['1 epoch', '1 flop', '1%'])
def test_a_unit_without_its_fact_is_refused(text):
    with pytest.raises(UsageError, match='cannot be turned into steps'):
        parse(text).to_steps(Facts(batch_size=32))


@pytest.mark.parametrize('text', ['10 epochs', '1e+15 flops', '2000 steps', '5%', '0.5 epochs'])
def test_str_parses_back(text):
    assert parse(str(parse(text))) == parse(text)
    assert isinstance(parse(text), Duration)


@pytest.mark.parametrize('text', ['1.4 epochs', '2000 steps', '5%', '1000000000 tokens'])
def test_str_is_as_written(text):
    assert str(parse(text)) == text


def test_flops_that_do_not_pay_for_a_step_are_refused():
    with pytest.raises(UsageError, match='less than one step of 2e\\+09 FLOPs'):
        parse('1e9 flops').to_steps(FACTS)
