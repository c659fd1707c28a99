"""The journal under all that can befall a file: a full disk, a kill, a signal in the middle of a write, other writers."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from research.core import files, journal
from research.core.journal import Journal, cut

ROOT = pathlib.Path(__file__).parents[2]


def records(path):
    return list(files.read_json_lines(path))


def process(code, *arguments, **options):
    """Runs code in a Python of its own."""
    options = {'capture_output': True, 'text': True, 'timeout': 60, **options}
    return subprocess.run([sys.executable, '-c', code, *map(str, arguments)], cwd=ROOT, **options)


def test_records_come_back_in_order(tmp_path):
    path = tmp_path / 'a.jsonl'
    first, second = Journal(path), Journal(path)
    wanted = []
    for i in range(20):  # two journals of one file, as two objects of one process may have
        wanted.append({'i': i, 'text': 'é\n' * i, 'nan': None})
        (first if i % 3 else second).append({'i': i, 'text': 'é\n' * i, 'nan': float('nan')})
    assert records(path) == wanted
    assert first.flush() is None
    assert first.flush(sync=True) is None
    assert records(path) == wanted


def test_nothing_is_written_before_the_first_record(tmp_path):
    assert Journal(tmp_path / 'a.jsonl').flush() is None
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_told_of_and_the_lines_wait(tmp_path):
    one = Journal(tmp_path / 'sub' / 'a.jsonl')
    one.append({'i': 1})
    assert one.flush() == f'{tmp_path}/sub/a.jsonl: No such file or directory'
    (tmp_path / 'sub').mkdir()
    one.append({'i': 2})
    assert records(one.path) == [{'i': 1}, {'i': 2}]


FULL = """
import json, resource, sys
from research.core.journal import Journal
path, rounds = sys.argv[1], []
one = Journal(path)
one.append({'i': 0, 'text': 'x' * 30})
line = len(open(path, 'rb').read())

def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

for extra in (0, 1, line - 1, line, 2 * line + 5):      # from here the file may grow by so many bytes
    size = len(open(path, 'rb').read())
    room(size + extra)
    for _ in range(3):
        one.append({'i': len(rounds) + 1, 'text': 'x' * 30})
        rounds.append(one.flush())
    content = open(path, 'rb').read()
    assert content.endswith(b'\\n') and len(content) == size + extra // line * line, (extra, len(content), size)
room(resource.RLIM_INFINITY)
print(json.dumps([rounds, one.flush(sync=True)]))
"""


def test_a_full_disk_leaves_whole_lines_and_takes_the_others_later(tmp_path):
    path = tmp_path / 'a.jsonl'
    done = process(FULL, path)
    assert done.returncode == 0, done.stderr
    rounds, last = json.loads(done.stdout)
    assert set(rounds) == {f'{path}: File too large'}
    assert last is None
    assert records(path) == [{'i': i, 'text': 'x' * 30} for i in range(16)]


def test_a_disk_that_stays_full_takes_no_more_memory_than_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, 'MAX_WAITING', 5)
    one = Journal(tmp_path / 'sub' / 'a.jsonl')
    for i in range(50):
        one.append({'i': i})
    (tmp_path / 'sub').mkdir()
    assert one.flush() is None
    assert records(one.path) == [{'i': i} for i in (0, 1, 2, 3, 49)]


@pytest.mark.parametrize(
    'torn', [b'{"i": 1', b'{"i": 1}\n{"i"', b'\0' * 200_000, b'x' * 70_000, b'{"i": 1}\n' + b'\0' * 70_000]
)
def test_a_torn_end_of_an_earlier_process_does_not_spoil_the_next_line(tmp_path, torn):
    path = tmp_path / 'a.jsonl'
    path.write_bytes(torn)
    whole = records(path)
    Journal(path).append({'i': 2})
    assert records(path) == [*whole, {'i': 2}]
    assert path.read_bytes().count(b'\n') == len(whole) + 1
    assert b'\0' not in path.read_bytes()


def test_a_try_that_was_left_in_the_middle_writes_no_line_twice(tmp_path, monkeypatch):
    """A signal's exception may come right behind the call of the system, or between its two halves."""
    write = os.write
    for take in (0, 1, 7, 10_000):
        one = Journal(tmp_path / f'{take}.jsonl')
        one.append({'i': 0})

        def interrupted(file, data, take=take):
            write(file, data[:take])
            raise KeyboardInterrupt

        monkeypatch.setattr(journal.os, 'write', interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.append({'i': 1})
        monkeypatch.setattr(journal.os, 'write', write)
        one.append({'i': 2})
        assert records(one.path) == [{'i': 0}, {'i': 1}, {'i': 2}]
        assert one.path.read_bytes().count(b'\n') == 3


def test_a_short_write_goes_on(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(journal.os, 'write', lambda file, data: write(file, data[:3]))
    one = Journal(tmp_path / 'a.jsonl')
    one.append({'i': 1})
    one.append({'i': 2})
    assert records(one.path) == [{'i': 1}, {'i': 2}]


def test_where_nothing_can_be_taken_back_the_next_try_goes_on(tmp_path, monkeypatch):
    write, truncate = os.write, os.ftruncate
    one = Journal(tmp_path / 'a.jsonl')
    one.append({'i': 0})
    parts = [5, None]

    def full(file, data):
        part = parts.pop(0)
        if part is None:
            raise OSError(errno.EIO, 'Input/output error')
        return write(file, data[:part])

    def broken(file, size):
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(journal.os, 'write', full)
    monkeypatch.setattr(journal.os, 'ftruncate', broken)
    one.append({'i': 1})
    monkeypatch.setattr(journal.os, 'write', write)
    monkeypatch.setattr(journal.os, 'ftruncate', truncate)
    one.append({'i': 2})
    assert one.path.read_bytes() == b'{"i": 0}\n{"i": 1}\n{"i": 2}\n'


def test_a_file_that_was_cut_meanwhile_is_gone_on_with_at_its_end(tmp_path):
    one = Journal(tmp_path / 'a.jsonl')
    for step in range(5):
        one.append({'step': step})
    cut(one.path, lambda record: record['step'] <= 2)
    one.append({'step': 3})
    assert [r['step'] for r in records(one.path)] == [0, 1, 2, 3]


def test_threads_write_every_line_once(tmp_path):
    one = Journal(tmp_path / 'a.jsonl')
    threads = [threading.Thread(target=lambda t=t: [one.append({'t': t, 'i': i}) for i in range(200)]) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = [(r['t'], r['i']) for r in records(one.path)]
    assert sorted(found) == [(t, i) for t in range(4) for i in range(200)]
    assert one.path.read_bytes().count(b'\n') == 800


KILLED = """
import sys
from research.core.journal import Journal
one = Journal(sys.argv[1])
for i in range(10 ** 9):
    one.append({'i': i, 'text': 'x' * 2000})
    if i == 50:
        print(flush=True)
"""


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    path = tmp_path / 'a.jsonl'
    with subprocess.Popen([sys.executable, '-c', KILLED, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        writer.wait(20)
    found = records(path)
    assert [r['i'] for r in found] == list(range(len(found)))
    assert len(found) > 50
    Journal(path).append({'i': len(found)})
    assert len(records(path)) == len(found) + 1


@pytest.mark.parametrize(
    ('content', 'wanted'),
    [
        ('', ''),
        ('{"step": 1}\n{"step": 2}\n', '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 1}\n{"step": 3}\n{"step": 2}\n', '{"step": 1}\n'),
        ('{"step": 3}\n', ''),
        ('{"step": 1}\n{"step": 2', '{"step": 1}\n'),
        ('{"step": 1}\nbroken\n[1]\n', '{"step": 1}\n'),
        ('{"step": 1}\nbroken\n{"step": 2}\n{"step": 3}\n', '{"step": 1}\nbroken\n{"step": 2}\n'),
    ],
)
def test_cut(tmp_path, content, wanted):
    path = tmp_path / 'a.jsonl'
    path.write_text(content)
    before = path.stat().st_mtime_ns
    cut(path, lambda record: record['step'] <= 2)
    assert path.read_text() == wanted
    if content == wanted:
        assert path.stat().st_mtime_ns == before
