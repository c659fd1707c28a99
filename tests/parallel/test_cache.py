"""The compilation cache runs what it finds, so nobody else may write it: who may be let in, who is kept out."""

import grp
import os
import pwd

import jax
import pytest

from research.parallel import cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the cache would be; jax's settings are as before afterwards."""
    names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv('FULCRUM_CACHE', str(tmp_path / 'cache'))
    yield tmp_path / 'cache'
    for name, value in before.items():
        jax.config.update(name, value)


def mode(path):
    return path.stat().st_mode & 0o7777


def test_a_new_folder_is_private_whatever_the_umask(folder):
    before = os.umask(0)
    try:
        assert cache.enable() is None
    finally:
        os.umask(before)
    assert mode(folder) == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder)


@pytest.mark.parametrize('open_mode', [0o755, 0o750, 0o711, 0o744])
def test_an_own_folder_that_others_can_read_is_closed_to_them(folder, open_mode):
    folder.mkdir()
    folder.chmod(open_mode)
    assert cache.enable() is None
    assert mode(folder) == 0o700


@pytest.mark.parametrize('open_mode', [0o770, 0o775, 0o777, 0o1777, 0o702])
def test_a_folder_that_others_can_write_is_refused_and_left_as_it_is(folder, open_mode):
    before = jax.config.jax_compilation_cache_dir
    folder.mkdir()
    folder.chmod(open_mode)
    assert cache.enable() == f'no compilation cache: {folder} can be written by others; run: chmod 700 {folder}'
    assert mode(folder) == open_mode
    assert jax.config.jax_compilation_cache_dir == before != str(folder)


def test_a_refused_folder_is_not_used_by_jax_on_its_own_either(folder):
    folder.mkdir()
    folder.chmod(0o777)
    jax.config.update('jax_compilation_cache_dir', str(folder))  # as JAX_COMPILATION_CACHE_DIR does
    assert cache.enable() is not None
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize(('open_mode', 'stays'), [(0o700, True), (0o777, False)])
def test_a_folder_that_jax_was_given_is_judged_too(folder, tmp_path, open_mode, stays):
    other = tmp_path / 'other'
    for path, mode in ((folder, 0o777), (other, open_mode)):
        path.mkdir()
        path.chmod(mode)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update('jax_compilation_cache_dir', str(other))
        assert cache.enable() is not None
        assert jax.config.jax_compilation_cache_dir == (str(other) if stays else None)
    finally:
        jax.config.update('jax_compilation_cache_dir', before)


def test_the_folder_of_another_user_is_refused(folder, monkeypatch):
    folder.mkdir(mode=0o700)
    other = os.getuid() + 1
    monkeypatch.setattr(os, 'getuid', lambda: other)
    assert cache.enable().startswith('no compilation cache: ')
    assert mode(folder) == 0o700


OTHER_GROUP = 54321


@pytest.mark.parametrize(
    ('above_mode', 'group', 'refused'),
    [
        (0o755, None, False),
        (0o777, None, True),
        (0o1777, None, False),  # as /tmp: nobody but the owner can exchange what is in it
        (0o775, None, False),  # the group is this user's alone
        (0o775, OTHER_GROUP, True),
        (0o1775, OTHER_GROUP, False),
        (0o755, OTHER_GROUP, False),
    ],
)
def test_who_can_write_the_folder_above_can_exchange_the_cache(folder, tmp_path, monkeypatch, above_mode, group, refused):
    above = tmp_path / 'above'
    above.mkdir()
    above.chmod(above_mode)
    monkeypatch.setattr(cache, '_is_private', lambda gid: group is None)
    for path in (above / 'cache', above / 'deep' / 'cache'):
        monkeypatch.setenv('FULCRUM_CACHE', str(path))
        told = cache.enable()
        wanted = f'no compilation cache: others can exchange {path}, for they can write {above}; set FULCRUM_CACHE to a folder'
        assert (told or '').startswith(wanted) if refused else told is None
    folder.symlink_to(above / 'cache')  # the link is in a folder of our own, what it points to is not
    monkeypatch.setenv('FULCRUM_CACHE', str(folder))
    assert (cache.enable() is not None) == refused


def test_a_folder_above_that_another_user_owns_is_refused(folder, tmp_path, monkeypatch):
    folder.mkdir(mode=0o700)
    stat = type(folder).stat
    other = list(tmp_path.stat())
    other[4] = os.getuid() + 1
    monkeypatch.setattr(
        type(folder), 'stat', lambda path, **more: os.stat_result(other) if path == tmp_path else stat(path, **more)
    )
    assert f'they can write {tmp_path}' in cache.enable()


def test_folders_that_are_made_on_the_way_are_nobody_elses(tmp_path, folder, monkeypatch):
    monkeypatch.setenv('FULCRUM_CACHE', str(tmp_path / 'a' / 'b' / 'cache'))
    before = os.umask(0)
    try:
        assert cache.enable() is None
    finally:
        os.umask(before)
    assert [mode(tmp_path / name) for name in ('a', 'a/b', 'a/b/cache')] == [0o755, 0o755, 0o700]


@pytest.mark.parametrize(
    ('name', 'members', 'private'), [('me', [], True), ('me', ['me'], True), ('me', ['me', 'you'], False), ('we', [], False)]
)
def test_a_private_group(monkeypatch, name, members, private):
    monkeypatch.setattr(cache.pwd, 'getpwuid', lambda _: pwd.struct_passwd(('me', 'x', 5, 5, '', '/', '/bin/sh')))
    monkeypatch.setattr(cache.grp, 'getgrgid', lambda _: grp.struct_group((name, 'x', 5, members)))
    assert cache._is_private(5) is private


def test_an_unknown_group_is_not_private():
    assert not cache._is_private(OTHER_GROUP)


def test_a_link_of_another_user_is_refused_and_an_own_one_is_not(folder, tmp_path, monkeypatch):
    (tmp_path / 'target').mkdir(mode=0o700)
    folder.symlink_to(tmp_path / 'target')
    assert cache.enable() is None
    lstat = type(folder).lstat
    other = list(folder.lstat())
    other[4] = os.getuid() + 1
    monkeypatch.setattr(type(folder), 'lstat', lambda path: os.stat_result(other) if path == folder else lstat(path))
    assert 'belongs to another user' in cache.enable()


def test_a_folder_whose_mode_cannot_be_changed_is_used_as_long_as_others_only_read(folder, monkeypatch):
    folder.mkdir()
    folder.chmod(0o755)

    def refuse(*_, **__):
        raise PermissionError(1, 'Operation not permitted')

    monkeypatch.setattr(type(folder), 'chmod', refuse)
    assert cache.enable() is None


def test_what_cannot_be_made_is_told_of(folder):
    folder.write_text('')
    assert cache.enable() == f'no compilation cache: {folder} cannot be made: File exists'


def test_a_program_that_is_compiled_comes_out_of_it(folder):
    from jax.experimental.compilation_cache import compilation_cache

    assert cache.enable() is None
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    compilation_cache.reset_cache()
    try:
        jax.jit(lambda x: x * 7 + 12345)(1.0).block_until_ready()
        assert [path.name for path in folder.iterdir() if path.name.startswith('jit')]
    finally:
        compilation_cache.reset_cache()
