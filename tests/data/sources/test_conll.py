"""CoNLL files: columns, sentences, splits, and what is refused."""

import numpy as np
import pytest

from research.core.errors import UsageError
from research.data import splits
from research.data.sources.conll import conll

NEWS = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
# NN B-NP O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER


EU NNP B-NP B-ORG
"""

UNIVERSAL = (
    '# sent_id = 1\n# text = Vamos al 100 000\n1\tVamos\tir\tVERB\t_\n2-3\tal\t_\t_\t_\n2\ta\ta\tADP\t_\n3\tel\tel\tDET\t_\n'
    '3.1\tnada\tnada\tX\t_\n4\t100 000\t100000\tNUM\t_\n\n1\tSí\tsí\tINTJ\t_\n'
)


def rows_of(source, names):
    """(word, tag) of each sentence."""
    block = source[np.arange(len(source))]
    return [
        list(zip(words.split(' '), [names[i] for i in tags[tags >= 0]], strict=True))
        for words, tags in zip(block['words'], block['tags'], strict=True)
    ]


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f'{name}.txt').write_text(text, encoding='utf-8')
    return str(folder)


def test_sentences_of_conll_2003(tmp_path):
    data = conll(path=write(tmp_path, news=NEWS) + '/news.txt')
    assert data.class_names == ('B-ORG', 'B-PER', 'I-PER', 'O') and list(data.splits) == ['all'] and data.name == 'news'
    assert rows_of(data.splits['all'], data.class_names) == [
        [('EU', 'B-ORG'), ('rejects', 'O'), ('#', 'O')],
        [('Peter', 'B-PER'), ('Blackburn', 'I-PER')],
        [('EU', 'B-ORG')],
    ]
    block = data.splits['all'][np.array([2, 1])]
    assert block['words'].dtype == object and block['tags'].dtype == np.int32
    np.testing.assert_array_equal(block['tags'], [[0, -1, -1], [1, 2, -1]])


def test_another_column_can_be_the_tag(tmp_path):
    data = conll(path=write(tmp_path, train=NEWS), column=1)
    assert data.class_names == ('NN', 'NNP', 'VBZ')
    assert rows_of(data.splits['train'], data.class_names)[1] == [('Peter', 'NNP'), ('Blackburn', 'NNP')]
    swapped = conll(path=write(tmp_path, train='DT the\nNN end\n'), column=0, word_column=1)
    assert rows_of(swapped.splits['train'], swapped.class_names) == [[('the', 'DT'), ('end', 'NN')]]


def test_sentences_of_universal_dependencies(tmp_path):
    (tmp_path / 'es_x-ud-train.conllu').write_text(UNIVERSAL, encoding='utf-8')
    data = conll(path=str(tmp_path))
    assert rows_of(data.splits['train'], data.class_names) == [
        [('Vamos', 'VERB'), ('a', 'ADP'), ('el', 'DET'), ('100\u00a0000', 'NUM')],
        [('Sí', 'INTJ')],
    ]


def test_splits_are_known_by_the_files_names(tmp_path):
    for name, tag in (('eng.train', 'A'), ('eng.testa', 'B'), ('eng.testb', 'C'), ('README', 'X')):
        (tmp_path / name).write_text(f'word {tag}\n')
    data = conll(path=str(tmp_path))
    assert sorted(data.splits) == ['test', 'train', 'validation'] and data.class_names == ('A', 'B', 'C')
    assert rows_of(data.splits['validation'], data.class_names) == [[('word', 'B')]]


def test_a_sentence_has_its_key_whatever_the_others_are(tmp_path):
    """So a longer sentence that joins the file moves no other from split to split, and doubles stay together."""
    short = conll(path=write(tmp_path, train=NEWS)).splits['train']
    longer = conll(path=write(tmp_path, train=NEWS + '\n' + 'so O\n' * 30)).splits['train']
    np.testing.assert_array_equal(longer.keys()[:3], short.keys())
    assert len(set(short.keys())) == 3
    many = ''.join(f'word O\nn{i} O\n\n' for i in range(40))
    parts = splits.split(conll(path=write(tmp_path / 'twice', all=many + many) + '/all.txt'), 0.3, 0.3)
    keys = [part.keys().tolist() for part in parts.values()]
    assert sum(map(len, keys)) == 80 and sum(len(set(own)) for own in keys) == 40


REFUSED = [
    ({'train': 'one A\ntwo\n'}, r'train.txt:2 has 1 columns; the word is in column 0 and the tag in column -1'),
    ({'train': '\n-DOCSTART- O\n\n'}, "holds no sentences for split 'train'"),
    ({'train': 'a A\n', 'train-2': 'b B\n'}, "has both train-2.txt and train.txt for split 'train'"),
    ({'dev': 'a A\n'}, 'has no file with train in its name'),
]


@pytest.mark.parametrize(('files', 'message'), REFUSED)
def test_mistakes_are_refused(tmp_path, files, message):
    folder = write(tmp_path, **files)
    with pytest.raises(UsageError, match=message):
        conll(path=folder)


def test_a_file_that_is_missing_or_not_utf_8_is_refused(tmp_path):
    with pytest.raises(UsageError, match='there is no file or folder'):
        conll(path=str(tmp_path / 'nowhere'))
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9 O\n')
    with pytest.raises(UsageError, match='is not UTF-8'):
        conll(path=str(tmp_path / 'latin.txt'))
