"""Sources of text: files of every kind and their mistakes, the text of this Python, the fetched data, and their fetching."""

import gzip
import hashlib
import io
import json
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from bench import data as fetching
from research.core import files
from research.core.errors import UsageError
from research.data import splits
from research.data.sources import python_docs as docs
from research.data.sources.gcide import gcide
from research.data.sources.help_en_de import help_en_de
from research.data.sources.poetry_zh import poetry_zh
from research.data.sources.text_files import text_files


def column(data, split='all', key='text'):
    source = data.splits[split]
    return source[np.arange(len(source))][key].tolist()


# Text files.


def test_files_of_every_kind(tmp_path):
    (tmp_path / 'b').mkdir()
    (tmp_path / 'a.txt').write_text('första\nraden\n', encoding='utf-8')
    (tmp_path / 'b' / 'c.txt').write_text('second')
    (tmp_path / 'blank.txt').write_text(' \n\n')
    assert column(text_files(path=str(tmp_path))) == ['första\nraden\n', 'second']
    assert column(text_files(path=str(tmp_path), split='line')) == ['första', 'raden', 'second']
    with gzip.open(tmp_path / 'd.txt.gz', 'wt') as file:
        file.write('packed')
    assert column(text_files(path=str(tmp_path / 'd.txt.gz'))) == ['packed']
    records = [{'body': 'one\ntwo', 'n': 1}, {'body': ''}, {'body': 'three'}]
    lines = ''.join(json.dumps(record) + '\n\n' for record in records)
    (tmp_path / 'e.jsonl').write_text(lines)
    with gzip.open(tmp_path / 'f.jsonl.gz', 'wt') as file:
        file.write(lines)
    assert column(text_files(path=str(tmp_path), pattern='*.jsonl', field='body')) == ['one\ntwo', 'three']
    assert column(text_files(path=str(tmp_path / 'f.jsonl.gz'), field='body', split='line')) == ['one', 'two', 'three']


def test_files_named_after_splits_are_splits(tmp_path):
    for name in ('train.txt', 'val.txt', 'test.txt'):
        (tmp_path / name).write_text(f'{name}\nx')
    data = text_files(path=str(tmp_path), split='line')
    assert {split: column(data, split) for split in data.splits} == {
        'train': ['train.txt', 'x'],
        'validation': ['val.txt', 'x'],
        'test': ['test.txt', 'x'],
    }
    assert data.name == tmp_path.name


FILES = [
    ({}, {}, "holds no file '\\*\\*/\\*.txt'"),
    ({}, {'path': 'nowhere'}, 'there is no file or folder nowhere'),
    ({}, {'split': 'word'}, "split='word'"),
    ({'a.txt': b'caf\xe9'}, {}, 'a.txt is not UTF-8: .* at byte 3'),
    ({'a.txt.gz': b'nothing'}, {'pattern': '*.gz'}, 'cannot be unpacked'),
    ({'a.jsonl': b'{"text": "x"}\n{'}, {'pattern': '*.jsonl'}, 'a.jsonl:2 is not JSON'),
    ({'a.jsonl': b'{"body": "x"}'}, {'pattern': '*.jsonl'}, "a.jsonl:1 has no text 'text'\n  fix: .*known: body"),
    ({'a.jsonl': b'[1]'}, {'pattern': '*.jsonl'}, "a.jsonl:1 has no text 'text'"),
    ({'a.txt': b' '}, {}, "the files of split 'all' in .* hold no text"),
]


@pytest.mark.parametrize(('written', 'arguments', 'message'), FILES)
def test_wrong_files_are_named(tmp_path, written, arguments, message):
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        text_files(**{'path': str(tmp_path), **arguments})


# The text of this Python.


def test_pythons_documents_are_there_without_its_tests():
    texts = column(docs.python_docs())
    assert len(texts) > 500
    assert sum(map(len, texts)) > 1.5e6
    assert any('yield' in text and 'generator' in text for text in texts)  # a help topic
    assert any(text.startswith('difflib\n\nModule difflib -- helpers for computing deltas') for text in texts)
    assert any('difflib.SequenceMatcher.ratio\n\nReturn a measure of the sequences' in text for text in texts)
    assert not any(text.startswith(('test.', 'lib2to3.', 'site-packages.')) for text in texts)
    assert files.digest(texts) == files.digest(column(docs.python_docs()))
    parts = splits.split(docs.python_docs(), 0.1, 0.1)
    assert not set(column_of(parts['train'])) & set(column_of(parts['test']))


def column_of(source):
    return source[np.arange(len(source))]['text'].tolist()


def test_docstrings_are_read_without_importing(monkeypatch, tmp_path):
    (tmp_path / 'pydoc_data').mkdir()
    (tmp_path / 'pydoc_data' / 'topics.py').write_text("# made\ntopics = {'a': 'topic a', 'b': ''}\n")
    (tmp_path / 'LICENSE.txt').write_text('licence')
    (tmp_path / 'm').mkdir()
    (tmp_path / 'm' / '__init__.py').write_text('"""Doc."""\nraise SystemExit\nclass C:\n  def f(self):\n    """Of f."""\n')
    (tmp_path / 'm' / 'bad.py').write_text('def (:')
    (tmp_path / 'm' / 'silent.py').write_text('x = 1')
    (tmp_path / 'test').mkdir()
    (tmp_path / 'test' / 't.py').write_text('"""Of a test."""')
    monkeypatch.setattr(docs.sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path)})
    monkeypatch.setenv('FULCRUM_CACHE', str(tmp_path / 'cache'))
    expected = ['licence', 'm\n\nDoc.\n\nm.C.f\n\nOf f.', 'topic a']
    assert column(docs.python_docs()) == expected
    monkeypatch.setattr(docs, 'read', lambda *_: pytest.fail('read again'))
    assert column(docs.python_docs()) == expected
    monkeypatch.undo()
    monkeypatch.setattr(docs.sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path / 'm')})
    with pytest.raises(UsageError, match='this Python has no'):
        docs.python_docs()


# The fetched data: small ones of the same form, and the real ones where they were fetched.


@pytest.mark.parametrize(('source', 'name'), [(gcide, 'gcide'), (poetry_zh, 'poetry_zh'), (help_en_de, 'help_en_de')])
def test_missing_data_name_the_command_that_fetches_them(monkeypatch, tmp_path, source, name):
    monkeypatch.setenv('FULCRUM_DATA', str(tmp_path))
    with pytest.raises(UsageError, match=f'fix: python -m bench.data fetch {name}'):
        source()
    assert name in fetching.DATA


def test_the_data_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv('FULCRUM_DATA', str(tmp_path))
    assert files.data_folder() == tmp_path
    monkeypatch.delenv('FULCRUM_DATA')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert files.data_folder() == tmp_path / '.cache' / 'fulcrum' / 'data'


def test_dictionary_entries_are_cut_by_the_index(tmp_path):
    text = '00-info\nabout\n' + 'x' * 60 + 'Cat\n  a pet.\nDög\n  another.\n'
    with gzip.open(tmp_path / 'gcide.dict.dz', 'wb') as file:
        file.write(text.encode())
    # 'BK' is 64 + 10 = 74, 'N' is 13; 'BX' is 87, 'Q' is 16 (ö has two bytes).
    (tmp_path / 'gcide.index').write_text('00-info\tA\tO\nCat\tBK\tN\nDög\tBX\tQ\nhound\tBX\tQ\n', encoding='utf-8')
    assert column(gcide(dir=str(tmp_path))) == ['Cat\n  a pet.\n', 'Dög\n  another.\n']


def test_poems_are_titles_and_lines(tmp_path):
    poems = {
        'poet.tang.0.json': [
            {'title': '靜夜思', 'paragraphs': ['牀前明月光', '疑是地上霜'], 'author': '李白'},
            {'title': 'x', 'paragraphs': []},
        ],
        'poet.song.0.json': [{'title': '水調歌頭', 'paragraphs': ['明月幾時有']}],
        'authors.song.json': [{'name': '蘇軾'}],
    }
    for name, content in poems.items():
        (tmp_path / name).write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')
    tang, song = '靜夜思\n牀前明月光\n疑是地上霜\n', '水調歌頭\n明月幾時有\n'
    assert column(poetry_zh(dir=str(tmp_path))) == [tang, song]
    assert column(poetry_zh(dir=str(tmp_path), dynasty='song')) == [song]
    with pytest.raises(UsageError, match="dynasty='ming'"):
        poetry_zh(dir=str(tmp_path), dynasty='ming')


def test_paragraphs_are_paired_by_file_and_id(tmp_path):
    pages = {
        'en-US': '<script>x</script><h1 id="a">Open &amp; <b>save</b></h1><p class="q" id="b">Click  OK.</p><p id="c">SUM</p>'
        '<p id="d">click ok</p><p id="e">Only here.</p>',
        'de': '<h1 id="a">Öffnen &amp; Speichern</h1><p id="b">OK klicken.</p><p id="c">SUM</p>'
        '<p id="d">ok anklicken</p><p id="e"></p>',
    }
    for language, page in pages.items():
        (tmp_path / language / 'text' / 'x').mkdir(parents=True)
        (tmp_path / language / 'text' / 'x' / '1.html').write_text(page, encoding='utf-8')
    data = help_en_de(dir=str(tmp_path))
    pairs = list(zip(column(data, key='source'), column(data, key='target'), strict=True))
    assert pairs == [('Click OK.', 'OK klicken.'), ('Open & save', 'Öffnen & Speichern'), ('click ok', 'ok anklicken')]
    keys = data.splits['all'].keys()
    assert keys[0] == keys[2] != keys[1]  # case and punctuation do not count
    assert column(help_en_de(dir=str(tmp_path), min_words=3), key='source') == ['Open & save']


def fetched(name):
    return pytest.mark.skipif(
        not (files.data_folder() / 'fetched' / f'{name}.json').is_file(), reason=f'needs: python -m bench.data fetch {name}'
    )


@fetched('gcide')
@pytest.mark.slow  # reads 40 MB
def test_the_dictionary_is_whole():
    texts = column(gcide())
    assert len(texts) == 126_236
    assert sum(map(len, texts)) == 39_811_749


@fetched('help_en_de')
@pytest.mark.slow  # reads 4,000 pages
def test_the_help_is_whole_and_its_splits_share_no_sentence():
    data = help_en_de()
    assert abs(len(data.splits['all']) - 35_916) < 400  # it moves with Debian's point releases
    parts = splits.split(data, 0.05, 0.05)
    sentences = {name: set(part[np.arange(len(part))]['source'].tolist()) for name, part in parts.items()}
    assert not sentences['train'] & (sentences['test'] | sentences['validation'])


@fetched('poetry_zh')
@pytest.mark.slow  # reads 58,000 poems
def test_the_tang_poems_are_whole():
    assert len(column(poetry_zh(dynasty='tang'))) > 57_000


# Fetching, with tools that stand in for npm and pip.


@pytest.fixture
def root(monkeypatch, tmp_path):
    monkeypatch.setenv('FULCRUM_DATA', str(tmp_path / 'data'))
    return tmp_path / 'data'


def offer(monkeypatch, tmp_path, tool, archive, content, **more):
    """One data set 'small' whose archive a stand-in for `tool` writes; returns the bytes' digest."""
    (tmp_path / 'archive').write_bytes(content)
    script = f'import shutil; shutil.copy({str(tmp_path / "archive")!r}, {archive!r})'
    digest = hashlib.sha256(content).hexdigest()
    package = fetching.Package(tool, 'small', '1', **({'sha256': digest} | more))
    monkeypatch.setitem(fetching.DATA, 'small', fetching.Entry((package,), 1, 'none', 'a test'))
    monkeypatch.setitem(fetching.COMMANDS, tool, (sys.executable, '-c', script))
    return digest


def tgz(name, content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def wheel(names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as file:
        for name, content in names.items():
            file.writestr(name, content)
    return buffer.getvalue()


def test_a_package_is_fetched_checked_and_unpacked_once(monkeypatch, tmp_path, root, capsys):
    digest = offer(monkeypatch, tmp_path, 'npm', 'small-1.tgz', tgz('package/x.json', b'[1]'), folder='s')
    assert '| small | 1 | no | none | a test |' in fetching.describe(root)
    assert fetching.main(['fetch', 'small']) == 0
    assert (root / 'npm/s/package/x.json').read_bytes() == b'[1]'
    assert files.read_json(root / 'fetched/small.json') == {'small-1.tgz': digest}
    monkeypatch.setitem(fetching.COMMANDS, 'npm', ('false',))
    assert fetching.main(['fetch', 'small']) == 0
    assert 'small: there already' in capsys.readouterr().out
    assert '| small | 1 | yes | none | a test |' in fetching.describe(root)


def test_another_content_is_refused_unless_asked_for(monkeypatch, tmp_path, root, capsys):
    digest = offer(monkeypatch, tmp_path, 'npm', 'small-2.tgz', tgz('package/x', b'2'), folder='s', sha256='0' * 64)
    assert fetching.main(['fetch', 'small']) == 2
    found = capsys.readouterr().err
    assert f'small-2.tgz has SHA-256 {digest}, expected {"0" * 64} (version 1)' in found
    assert '--any-version' in found
    assert not (root / 'npm/s').exists()
    assert not (root / 'fetched').exists()
    assert fetching.main(['fetch', 'small', '--any-version']) == 0
    assert 'not the pinned version 1' in capsys.readouterr().out
    assert (root / 'npm/s/package/x').read_bytes() == b'2'


def test_of_a_wheel_only_the_packages_folder_is_kept_and_one_file_may_be_checked(monkeypatch, tmp_path, root, capsys):
    content = wheel({'small/d.csv': 'data', 'small/__init__.py': '', 'small-1.dist-info/METADATA': 'x'})
    right = hashlib.sha256(b'data').hexdigest()
    offer(monkeypatch, tmp_path, 'pip', 'small-1.whl', content, folder='small', member='d.csv', sha256=right)
    assert fetching.main(['fetch', 'small']) == 0
    assert sorted(p.name for p in (root / 'pip').iterdir()) == ['small']
    (root / 'fetched/small.json').unlink()
    offer(monkeypatch, tmp_path, 'pip', 'small-1.whl', content, folder='small', member='d.csv', sha256='1' * 64)
    assert fetching.main(['fetch', 'small']) == 2
    assert 'd.csv has SHA-256' in capsys.readouterr().err


def test_tools_that_fail_and_names_that_are_wrong(monkeypatch, tmp_path, root, capsys):
    offer(monkeypatch, tmp_path, 'npm', 'small-1.tgz', b'', folder='s')
    monkeypatch.setitem(fetching.COMMANDS, 'npm', (sys.executable, '-c', 'import sys; sys.exit("no such package")'))
    assert fetching.main(['fetch', 'small', 'smal', 'gcide_']) == 2
    found = capsys.readouterr().err
    assert 'small cannot be downloaded: no such package' in found
    assert "data set 'smal' is not among those that can be fetched\n  fix: did you mean 'small'?" in found
    monkeypatch.setitem(fetching.COMMANDS, 'npm', ('there-is-no-such-tool', '{name}'))
    assert fetching.main(['fetch', 'small']) == 2
    assert 'there-is-no-such-tool is not on this machine' in capsys.readouterr().err


def test_every_fetched_package_is_pinned():
    for entry in fetching.DATA.values():
        for package in entry.packages:
            assert package.tool in fetching.COMMANDS
            assert len(bytes.fromhex(package.sha256)) == 32
            assert package.version
            assert bool(package.folder) == (package.tool != 'apt-get')
