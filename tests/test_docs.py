"""The documentation is true: its code runs, its commands and keys resolve, its messages are those of the code, it builds."""

import ast
import importlib
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import jax
import pytest

import launch
from research.core import config_file, fields, registry, schema
from research.core.errors import UsageError
from research.core.schema import Experiment

ROOT = pathlib.Path(__file__).parents[1]
GENERATED = ROOT / 'docs' / 'reference' / 'configuration.md'
USERS = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'SECURITY.md') if (ROOT / name).exists()]
PAGES = USERS + [p for p in sorted(ROOT.glob('docs/**/*.md')) if p != GENERATED and '_build' not in p.parts]
SOURCES = [ROOT / 'launch.py', *sorted((ROOT / 'research').rglob('*.py'))]
EXECUTED = ['add_a_model', 'add_a_data_set', 'add_a_task', 'configuration']
ERRORS = ('UsageError', 'StorageError', 'NumericalError', 'StoppedError', 'AccessError')
FEW = {
    'train.duration': '3 steps', 'evaluate.every': '2 steps', 'checkpoint.every': '0 steps', 'log.model_table': 'false',
    'log.tensorboard': 'false', 'parallel.devices': '1',
}  # fmt: skip


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, *languages):
    """The fenced blocks of these languages, in order."""
    found = re.findall(r'^```([^\n]*)\n(.*?)^```$', page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for language, block in found if language in languages]


def commands(page):
    """Every `python ...` command of the shell blocks and of the text, without placeholders such as configs/NAME.py."""
    shell = '\n'.join(blocks(page, 'bash', '')).replace('\\\n', ' ').split('\n')
    inline = re.findall(r'`(python launch\.py [^`]*)`', page.read_text())
    found = [re.search(r'python (?!-m|-c|3).*?(?=;|$)', line) for line in shell if not line.startswith(('#', '$'))]
    texts = [match[0] for match in found if match] + inline
    words = [shlex.split(text, comments=True)[1:] for text in texts]
    return [argv for argv in words if not any(re.search(r'\b(NAME|DIR|MODE|KEY|VALUE|FILE)\b', word) for word in argv)]


def first_uses(page):
    """The first command that uses each of the page's own files or components."""
    seen, chosen = set(), []
    for argv in commands(page):
        own = set(re.findall(r'my_project[/.][\w./]+(?::[A-Za-z]\w*)?(?!\w*=)', ' '.join(argv)))
        if own - seen:
            chosen.append(argv)
        seen |= own
    assert chosen
    return chosen


def write_files(page, folder):
    """Writes each Python block whose first line is a path to that file."""
    for block in blocks(page, 'python'):
        if first := re.match(r'# ([\w/]+\.py)\n', block):
            path = folder / first[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the configs of the repository, where files of a page can be written and imported."""
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.signature.cache_clear()
    yield tmp_path
    for module in [m for m in sys.modules if m.split('.')[0] == 'my_project']:
        del sys.modules[module]
    registry.signature.cache_clear()


def parse(argv):
    """The overrides of a command, once launch.py has accepted its flags."""
    for flag in launch.FLAGS:
        launch.FLAGS[flag].unparse()
    return launch.parse(argv)


@pytest.mark.parametrize('page', EXECUTED)
def test_the_code_of_a_page_runs(page, workplace, capsys):
    page = ROOT / 'docs' / f'{page}.md'
    write_files(page, workplace)
    for number, argv in enumerate(first_uses(page)):
        if argv[0] != 'launch.py':
            runpy.run_path(argv[0], run_name='__main__')
            continue
        few = [f'--config.{key}={value}' for key, value in FEW.items() if f'--config.{key}' not in ' '.join(argv)]
        if '--config=configs/digits_cnn.py' in argv and '--config.model' not in ' '.join(argv):
            few.append('--config.model=mlp')  # it compiles in a third of the time
        parse(argv)
        assert launch.main([*argv, *few, f'--workdir=runs/{number}']) == 0, capsys.readouterr().err
        assert (workplace / 'runs' / str(number) / 'summary.json').exists()
        printed = {kind(line) for line in capsys.readouterr().out.splitlines()}
        assert {'model', 'step', 'summary:'} <= printed
        assert printed <= {kind(line) for line in documented('log_lines.md')}


def kind(line):
    """What tells one printed line from another: its first word, or that it shows the progress."""
    return 'ETA' if 'ETA' in line else line.split()[0]


def test_training_from_python_runs(workplace, capsys):
    page = ROOT / 'docs' / 'quickstart.md'
    write_files(page, workplace)
    (script,) = [argv[0] for argv in commands(page) if argv[0] != 'launch.py']
    runpy.run_path(script, run_name='__main__')
    assert 'accuracy' in capsys.readouterr().out


def test_the_error_that_a_page_shows_is_the_one_that_comes(workplace, capsys):
    page = ROOT / 'docs' / 'add_a_model.md'
    write_files(page, workplace)
    shown = next(block for block in blocks(page, 'text') if block.startswith('error:'))
    parse(['launch.py'])
    assert launch.main(['launch.py', '--config=my_project/digits_net.py', '--config.model.dept=3']) == 2
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_every_command_resolves(page, workplace):
    write_files(page, workplace)
    for argv in commands(page):
        if argv[0] != 'launch.py':
            assert (workplace / argv[0]).is_file()
            continue
        overrides = parse(argv)
        if launch.FLAGS.mode == 'doctor':
            continue
        evaluates = launch.FLAGS.mode in launch.RUN_MODES
        config = config_file.load('configs/digits_cnn.py' if evaluates else launch.FLAGS.config)
        for override in overrides:
            path, _, text = override.partition('=')
            config_file.override(config, path, text)
        schema.resolve(config)


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_every_key_that_is_named_exists(page, workplace):
    write_files(page, workplace)
    own = set(re.findall(r'my_project(?:\.\w+)+:\w+', page.read_text()))
    keys = set(re.findall(r'(?<![\w./])config\.([a-z_]+(?:\.\w+)*)', page.read_text()))
    unknown = [key for key in keys - {'json'} if not exists(key, own)]  # config.json is a file
    assert [key for key in unknown if f'config.{key} does not exist' not in page.read_text()] == []


def exists(key, own):
    """Whether a dotted path is a section, a key, or an argument of some component, of the tables or of the page's own."""
    if any(path.startswith(f'{key}.') for path, _ in fields.walk(Experiment)):
        return True  # a section
    try:
        field, where, rest = fields.find(Experiment, key)
    except UsageError:
        return False
    argument = rest.split('.')[-1]
    if not rest or argument == 'name' or argument.isdigit():
        return True
    field = field or fields.find(Experiment, where)[0]
    assert field is not None
    kind = field.metadata.get('kind') or field.metadata['component']
    return any(argument in readable(kind, name) for name in (*registry.TABLES[kind], *own))


def readable(kind, name):
    """The arguments of a component; none for one that is of another kind."""
    try:
        return registry.signature(kind, name) or {}
    except UsageError:
        return {}


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_every_name_of_the_code_exists(page):
    for address in set(re.findall(r'(?<![\w./])research(?:\.\w+)+', page.read_text())):
        words = address.split('.')
        for i in range(len(words), 0, -1):
            try:
                thing = importlib.import_module('.'.join(words[:i]))
            except ModuleNotFoundError:
                continue
            for word in words[i:]:
                thing = getattr(thing, word)
            break


def test_the_map_of_modules_is_whole():
    text = (ROOT / 'docs' / 'reference' / 'api.md').read_text()
    modules = [p.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.') for p in SOURCES if p.stem != '__init__']
    assert [m for m in modules if m != 'launch' and f'`{m}`' not in text] == []


def test_the_rules_of_the_configuration_page_fit_the_digits_cnn(mesh):
    from research.data.build import build_splits
    from research.train import build

    found = re.findall(
        r'^config\.(\w+\.(?:\w+_)?rules) = (.*)$', (ROOT / 'docs' / 'configuration.md').read_text(), re.MULTILINE
    )
    assert {key for key, _ in found} == {'optimizer.rate_rules', 'optimizer.decay_rules', 'parallel.rules'}
    for key, text in found:
        overrides = [f'{key}={text}', 'optimizer=adamw', 'optimizer.weight_decay=0.05']
        experiment = config_file.resolve('configs/digits_cnn.py', overrides)
        _, spec = build_splits(experiment.data)
        parts = build.make_parts(experiment, build.make_task(experiment, spec), spec, mesh, lambda step: jax.numpy.ones(()))
        split = [leaf for leaf in jax.tree.leaves(parts.abstract) if not leaf.sharding.is_fully_replicated]
        assert len(split) == (3 if key == 'parallel.rules' else 0)  # the kernel and Adam's two moments of it


def templates():
    """For each error that the code raises, its message as a list of literal parts with None where a value stands."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                message = node.args[0]
                if isinstance(message, ast.Constant):
                    yield path, [str(message.value)]
                elif isinstance(message, ast.JoinedStr):
                    yield path, [str(v.value) if isinstance(v, ast.Constant) else None for v in message.values]


def documented(page='errors.md'):
    """The terms of a page's definition lists."""
    return re.findall(r'^`([^`]+)`\n: ', (ROOT / 'docs' / page).read_text(), re.MULTILINE)


def test_every_message_is_explained():
    """What is new in the code belongs into docs/errors.md."""
    known, missing = documented(), []
    for path, parts in templates():
        pattern = re.compile(''.join('.+' if part is None else re.escape(part) for part in parts))
        if not any(pattern.fullmatch(message) for message in known):
            missing.append((path.name, ''.join('<...>' if part is None else part for part in parts)))
    assert missing == []


def test_every_message_that_is_explained_exists():
    """The literal words of a message, between the <...>, stand in the code."""
    constants = [n.value for p in SOURCES for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.Constant)]
    literals = '\n'.join(value for value in constants if isinstance(value, str))
    theirs = ('Unknown command line flag', 'flag --mode=')  # absl's words
    invented = []
    for message in documented():
        fragments = [fragment.strip(' \'":') for fragment in re.split('<[^>]*>', message)]
        invented += [(message, f) for f in fragments if f not in literals and not message.startswith(theirs)]
    assert invented == []


def test_the_documented_exit_codes_are_those_of_the_code():
    from research.core.errors import ExitCode

    for page in ('errors.md', 'path_of_a_run.md'):
        text = (ROOT / 'docs' / page).read_text()
        codes = {int(code) for code in re.findall(r'^\|? ?(\d+)(?: \||\n: )', text, re.MULTILINE)}
        assert codes - {1} <= set(map(int, ExitCode))
        assert {0, 2, 74, 75, 76} <= codes


def test_the_generated_page_names_every_field_and_component(tmp_path):
    sphinx_config = runpy.run_path(str(ROOT / 'docs' / 'conf.py'))
    sphinx_config['write_reference'](tmp_path / 'page.md')
    text = (tmp_path / 'page.md').read_text()
    committed = (ROOT / 'docs' / 'reference' / 'configuration.md').read_text()
    assert committed == text, 'build the documentation and commit docs/reference/configuration.md'
    for path, field in fields.walk(Experiment):
        assert f'`config.{path} = ' in text
        assert sphinx_config['escaped'](field.metadata['meaning']) in text
    for table in registry.TABLES.values():
        for name, address in table.items():
            assert f'`{name}(' in text
            assert f'(`{address}`)' in text


def test_the_pages_build_without_warnings(tmp_path):
    command = [
        sys.executable,
        '-m',
        'sphinx',
        '-W',
        '--keep-going',
        '-q',
        '-d',
        str(tmp_path / 'trees'),
        'docs',
        str(tmp_path / 'html'),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for page in ('index', 'errors', 'reference/configuration'):
        assert (tmp_path / 'html' / f'{page}.html').stat().st_size > 1000
