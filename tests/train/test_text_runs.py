"""Runs over text from the file to the summary: packed rows, buckets and mixtures resume exactly; the second quick start."""

import json
import pydoc_data.topics
import subprocess
import sys

import pytest

from tests.train.test_loop import assert_identical, by_split, saved

DECODER = 'model=decoder(depth=1, width=16, heads=2, positions="rotary")'
TEXT = (DECODER, 'task=language', 'data.tokenizer=byte', 'data.batch_size=8', 'data.evaluation_batch_size=8')
RUNS = {
    'packed': ('data.source=text_files(path="A", split="line")', 'data.transforms=pack(length=64)'),
    'buckets': (
        'data.source=text_files(path="A", split="line")',
        'data.transforms=pad(length=96), buckets(lengths=(32, 64, 96))',
    ),
    'mixture that one part leaves': (  # B gives 2 rows of every 8, half of its 31: it leaves in step 7
        "data.source=mixture(sources=(\"text_files(path='A', split='line')\", \"text_files(path='B', split='line')\"),"
        ' weights=(3, 1), max_epochs=(None, 0.5))',
        'data.transforms=windows(length=64)',
    ),
}


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Two folders, A and B, of what Python says of itself."""
    topics = list(pydoc_data.topics.topics.values())
    for folder, chosen in (('A', topics[:12]), ('B', topics[12:18])):
        (tmp_path / folder).mkdir()
        for number, text in enumerate(chosen):
            (tmp_path / folder / f'{number}.txt').write_text('\n'.join(line.strip()[:90] for line in text.split('\n'))[:1500])
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('name', RUNS)
def test_k_and_k_steps_equal_2k_bit_for_bit(run, dies_at, texts, name):
    overrides = (*TEXT, *RUNS[name])
    summary, records, whole = run(*overrides, folder='whole')
    assert summary['budget']['tokens'] > 0
    dies_at(5)
    with pytest.raises(RuntimeError, match='the machine is gone'):
        run(*overrides, folder='parts')
    again, records_again, parts = run(*overrides, folder='parts')
    events = [json.loads(line) for line in (parts / 'events.jsonl').read_text().splitlines()]
    assert [e['origin'] for e in events if e['event'] == 'start'] == ['started from scratch', 'resumed from step 4']
    assert_identical(saved(whole, 12), saved(parts, 12))
    for split in ('train', 'validation', 'test'):
        assert by_split(records, split) == by_split(records_again, split)
    assert summary['metrics'] == again['metrics']


@pytest.mark.slow
def test_the_second_quick_start_learns(tmp_path):
    """`configs/docs_gpt.py` itself from the command line, cut to five steps: the data that every Python has."""
    command = [sys.executable, 'launch.py', '--config=configs/docs_gpt.py:steps=5', f'--workdir={tmp_path}']
    done = subprocess.run([*command, '--config.evaluate.final=validation', '--config.evaluate.limit=128'], capture_output=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert summary['status'] == 'completed'
    assert summary['budget']['tokens'] == 5 * 16 * 128
    assert summary['metrics']['validation']['bits_per_byte'] < 8  # of a byte that nothing is known of
