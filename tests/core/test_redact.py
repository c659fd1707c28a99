"""Redaction: what must go, what must stay, and what holds for every text. The secrets here are made up, and put together at run
time where a scanner of the repository would take them for real."""

import json
import pathlib
import random
import subprocess
import sys
import time

import jax
import pytest

from research.core.redact import HIDDEN, redact
from research.train import provenance

ROOT = pathlib.Path(__file__).parents[2]
X = 'S3cr3tV4lue9xYzS3cr3tV4lue9xYz'  # 30 letters and digits
HEX = '0123456789abcdef' * 3
PEM = '\n'.join(['-----BEGIN RSA ' + 'PRIVATE KEY-----', *['MIIEpAIBAAKCAQEAuXt9' + 'aB3/+' * 8 + 'XY/9'] * 5, 'c2hvcnQ='])
END = '\n-----END RSA ' + 'PRIVATE KEY-----'

# (text, what must not be left of it)
SECRETS = [
    # command lines
    ('--config.x.token=abc', 'abc'),
    ('-config.x.token=abc', 'abc'),
    ('--hf_token=abc --steps=3', 'abc'),
    ('--token="a b c"', 'a b c'),
    ("--db-password='hunter two'", 'hunter two'),
    ('--PASSWORD=x', '=x'),
    (f'python launch.py --config=configs/a.py --wandb-api-key {X}', X),
    ('--config=configs/a.py:token=abc,lr=1', 'abc'),
    ('config.data.source.token=abc', 'abc'),
    ('HF_TOKEN=abc', 'abc'),
    ('curl -u me:hunter2 https://host', 'hunter2'),
    (f'curl -H "PRIVATE-TOKEN: {X}"', X),
    (f"curl -H 'X-Api-Key: {X}'", X),
    # the environment, shells, Docker, compose files
    (f'export WANDB_API_KEY={HEX}', HEX),
    ('env HF_TOKEN=letters-only python launch.py', 'letters-only'),
    ("HF_TOKEN='letters only'", 'letters only'),
    ('ENV GITHUB_TOKEN=abc', 'abc'),
    ('MYSQL_PWD=abc', 'abc'),
    ('PGPASSWORD=p@ss,w;rd!', 'p@ss'),
    ('DB_PASS=abc', 'abc'),
    ('GOOGLE_CLIENT_SECRET=abc', 'abc'),
    (f'STRIPE_KEY={X}', X),
    ('password: hunter2', 'hunter2'),
    ('  db_password: correct-horse', 'correct-horse'),
    (f'token: {X}', X),
    ('"password": "with blank"', 'with blank'),
    ('{"auth": {"client_secret": "abc"}}', 'abc'),
    (json.dumps(json.dumps({'api_key': 'abc', 'n': 1})), 'abc'),
    (json.dumps(json.dumps({'token': X})), X),
    ('login me password hunter2', 'hunter2'),
    ('machine api.wandb.ai\n  login user\n  password ' + HEX, HEX),
    # addresses
    ('https://me:pass@host/x', 'pass'),
    ('postgresql+psycopg://me:p%40ss@host:5432/db', 'p%40ss'),
    ('redis://:hunter2@host', 'hunter2'),
    ('https://me:p@ss@host/x', 'p@ss'),
    ('https://me:p/s@host/x', 'p/s'),
    (f'git clone https://{X}@github.com/a/b', X),
    ('https://x-access-token:abc@github.com/a/b', ':abc'),
    (f'https://host/?a=1&token={X}&b=2', X),
    ('https://host/?access_token=abc&b=2', 'abc'),
    (f'https://maps/api?key={X}', X),
    (f'https://b.s3.amazonaws.com/k?X-Amz-Credential=a&X-Amz-Signature={HEX}', HEX),
    (f'https://storage.googleapis.com/b/k?X-Goog-Signature={HEX}', HEX),
    (f'https://x.blob.core.windows.net/c?sv=2022&sig={X}%3D', X),
    (f'https://hooks.slack.com/services/T0/B0/{X}', X),
    (f'https://discord.com/api/webhooks/1/{X}', X),
    (f'DefaultEndpointsProtocol=https;AccountName=a;AccountKey={X}==;EndpointSuffix=core', X),
    ('Server=h;Database=d;User=me;Password=abc;', 'abc'),
    (f'Endpoint=sb://h/;SharedAccessKey={X}=', X),
    # headers
    ('Authorization: Bearer abcdef', 'abcdef'),
    ('Authorization: Basic bWU6cGFzcw==', 'bWU6cGFzcw'),
    (f'"Authorization": "token {X}"', X),
    (f'authorization: AWS4-HMAC-SHA256 Credential=a, Signature={HEX}', HEX),
    (f'use bearer {X} here', X),
    ('Cookie: a=1; session=abcdefg; b=2', 'abcdefg'),
    # code and its differences
    (f'+token = "{X}"', X),
    (f'-    HF_TOKEN = "{X}"', X),
    (f"+os.environ['HF_TOKEN'] = '{X}'", X),
    (f'+    os.environ.setdefault("WANDB_API_KEY", "{HEX}")', HEX),
    ('+password: str = "abc"', 'abc'),
    ("+    api_key: str | None = 'abc',", "'abc'"),
    ("+    connect(user='me', password='abc')", "'abc'"),
    ("+if password == 'abc':", 'abc'),
    ("+apiKey: 'abc'", "'abc'"),
    (f"+accessToken: '{X}'", X),
    ("+clientSecret = 'abc'", "'abc'"),
    (f'+aws_secret_access_key = {X}/a+b', X),
    (f'+aws_session_token={X}', X),
    (f'+login(token="{X}")', X),
    (f"+login(token='{X}'", X),
    # forms without a name
    *((f'+x("{form}")', form) for form in (
        'gh' + 'p_' + X, 'github' + '_pat_' + X, 'h' + 'f_' + X, 's' + 'k-proj-' + X, 's' + 'k-ant-api03-' + X,
        'AKI' + 'A' + 'ABCDEFGHIJ012345',
        'AIz' + 'a' + X, 'ya' + '29.' + X, 'GOC' + 'SPX-' + X, 'xo' + 'xb-1234-' + X, 'gl' + 'pat-' + X, 's' + 'k_live_' + X,
        'np' + 'm_' + X,
        'py' + 'pi-' + X, 'dc' + 'kr_pat_' + X, 'da' + 'pi' + HEX[:32], 'hv' + 's.' + X,
        'S' + 'G.' + X + '.' + X, 'r' + '8_' + X,
        'ey' + 'J' + X + '.ey' + 'J' + X + '.' + X,
    )),
    # private keys: whole, cut off, in JSON, in a difference
    (PEM + END, 'MIIE'),
    (PEM, 'MIIE'),
    (PEM, 'c2hvcnQ'),
    (json.dumps({'private_key': PEM + END, 'n': 1}), 'MIIE'),
    (json.dumps(PEM), 'c2hvcnQ'),
    (json.dumps(json.dumps(PEM)), 'c2hvcnQ'),
    ('+' + (PEM + END).replace('\n', '\n+') + '\n+after', 'MIIE'),
]  # fmt: skip

# What a difference or a config of this field is full of.
HARMLESS = [
    'token = tokens[i]', 'key = rng.key(0)', 'key, sub = jax.random.split(key)', '--config.model.tokenizer=bpe',
    'max_tokens=512',    '--config.data.max_tokens=100000000', 'num_tokens=128', 'tokens_per_second=1234567.8',
    "tokenizer = 'bert-base-uncased-2018'",    "pad_token='<pad>'", 'pad_token=00000000', "unk_token = 'unknown12345678'",
    'self.eos_token: str = "endoftext12"', 'PAD_TOKEN=0',
    'token: int = 12345678', 'tokens: 8_000_000_000', 'dropout_key = rng.key(seed, "dropout", step)', 'key=12345678',
    'password = getpass.getpass()', 'token = os.environ["HF_TOKEN"]', 'secret: str', 'def login(token: str | None = None):',
    'if token is None or token == unknown:', 'export HF_TOKEN=$(cat ~/.token)', 'HF_TOKEN=${HF_TOKEN}', 'secrets.token_hex(8)',
    'https://host:8080/path@2x.png', 'git@github.com:a/b.git', 'ssh://git@github.com/a/b', 'docker run -u 1000:1000 image',
    'docker.io/org/image@sha256:' + HEX, 'index d43c1c0..1974d70 100644', 'sha256="' + HEX + HEX[:16] + '"', 'gs://bucket/key=1/a.npy',
    "batch['key'], batch['token'], 'tokens'", "('token', 'position')", 'per_token = {name: value12345 for name in names}',
    'key_padding_mask = mask0 & mask1', 'SORT_KEY=name', 'CACHE_KEY=short1', 'basic understanding of the bearer',
    'passes = 12345678',
    'attention_key: query0123456789', 'x = a.reshape(-1, 4)', 'lr=1e-3,steps=10', '', '--', '=', 'token', 'token=',
    'Bearer', '://', '@',
    "('secret', 'santa')", "'token', 'position'", 'the token transformer_v2_large', 'our password policy2024rules',
    'hf_config_of_the_model_version2 = x', 'sg.neighbours_of_every_node_2', 'layer.dapi_of_something_long_2',
    'https://user@host/x', 'the secret is to use a warm-up', '// token by token: the decoder', 'image_token: 123456789',
]  # fmt: skip


@pytest.mark.parametrize(('text', 'secret'), SECRETS)
def test_a_secret_goes_and_what_stands_around_it_stays(text, secret):
    assert secret in text
    found = redact(text)
    assert secret not in found
    assert HIDDEN in found
    assert redact(found) == found
    around = redact(f'+first = 1\n{text}\n+last = 2')
    assert secret not in around
    assert around.startswith('+first = 1\n')
    assert around.endswith('+last = 2') or text in (PEM, PEM + END)  # a key without an end takes what could be part of it


@pytest.mark.parametrize('text', HARMLESS)
def test_what_only_looks_like_a_secret_stays(text):
    assert redact(text) == text
    assert redact([text, {'text': text}]) == [text, {'text': text}]


def test_the_text_around_a_key_stays():
    text = f'before\n{PEM}{END}\nafter'
    assert redact(text) == f'before\n{HIDDEN}\nafter'
    assert redact(json.dumps({'a': PEM, 'b': 1})) == '{"a": "' + HIDDEN + '", "b": 1}'


def test_only_the_value_goes():
    assert redact('https://me:pass@host/x --token=abc') == f'https://{HIDDEN}@host/x --token={HIDDEN}'
    assert redact('a(password="x", n=3)') == f'a(password="{HIDDEN}", n=3)'
    assert redact("+    os.environ['HF_TOKEN'] = 'abcdefgh12'  # mine") == f"+    os.environ['HF_TOKEN'] = '{HIDDEN}'  # mine"
    assert redact('a=b,token=abc,c=d') == f'a=b,token={HIDDEN},c=d'
    assert redact('run A_TOKEN=x,y now') == f'run A_TOKEN={HIDDEN} now'
    assert redact('$ HF_TOKEN=abc python launch.py') == f'$ HF_TOKEN={HIDDEN} python launch.py'
    assert redact('--password=one argument, with blanks; and signs!') == f'--password={HIDDEN}'


def test_the_original_of_the_argument_stays():
    value = {'token': 'abc', 'list': ['--password=x']}
    redact(value)
    assert value == {'token': 'abc', 'list': ['--password=x']}


def test_structures():
    assert redact({'hf_token': 'abc', 'pad_token': '<pad>', 'max_tokens': 5, 'a': {'password': 'x'}}) == {
        'hf_token': HIDDEN,
        'pad_token': '<pad>',
        'max_tokens': 5,
        'a': {'password': HIDDEN},
    }
    assert redact({'credentials': {'user': 'me', 'n': 1, 'l': ['x', ('y', None)]}}) == {
        'credentials': {'user': HIDDEN, 'n': 1, 'l': [HIDDEN, (HIDDEN, None)]}
    }
    names = (
        'config.data.token',
        'clientSecret',
        'AWS_SECRET_ACCESS_KEY',
        'password2',
        'db-password',
        'Authorization',
        'apiKey',
    )
    assert all(redact({name: 'x'}) == {name: HIDDEN} for name in names)
    names = (
        'tokenizer',
        'max_tokens',
        'tokens',
        'key',
        'keys',
        'eos_token',
        'bypass',
        'author',
        'per_token',
        'path',
        'sort_key',
    )
    assert all(redact({name: 'x'}) == {name: 'x'} for name in names)
    assert redact({'token': '', 'secret': None, 'api_key': 3}) == {'token': '', 'secret': None, 'api_key': 3}
    assert redact(('a', ['--password=b'])) == ('a', [f'--password={HIDDEN}'])
    assert redact({'https://me:pass@host': 1}) == {f'https://{HIDDEN}@host': 1}


def test_a_flag_and_its_value_in_two_arguments():
    wanted = ['launch.py', '--password', HIDDEN, '--config.token', HIDDEN, '--steps', '10', '--token', '--debug']
    assert redact(['launch.py', '--password', 'abc', '--config.token', 'x', '--steps', '10', '--token', '--debug']) == wanted


@pytest.mark.parametrize(
    'value', [None, True, 3, 2.5, float('inf'), b'password=abc', object(), {1, 2}, pathlib.Path('a'), [], {}]
)
def test_what_is_no_text_stays_as_it_is(value):
    found = redact(value)
    assert found == value
    assert type(found) is type(value)


def test_it_never_raises_and_a_second_time_changes_nothing():
    """Random texts of the pieces that the rules are made of, glued in every way."""
    draw = random.Random(0)
    pieces = [
        'token', 'password', 'secret', 'api_key', '_KEY=', 'HF_TOKEN=', '--a.', 'Authorization:', 'Bearer', 'basic', 'cookie:',
        '-u', 'login', '://', '?', '&', 'sig=', '@', ':', '=', '==', ':=', '=>', '\ud800', 'é', '[', ']', '{', '(', ')', ',',
        ';',
        *[' ', '\n', '\t', '\r', '\0', '"', "'", '`', '\\', '\\"', '\\n', '+', '-', '--'],
        'redacted', HIDDEN,
        *[HIDDEN[:5], X, HEX, 'abc', 'abcdefgh1', '123', 'none', 'a.b', 'a(', 'https', PEM[:31], END],
        PEM[32:130],
    ]  # fmt: skip
    changed = 0
    for _ in range(4000):
        text = ''.join(draw.choices(pieces, k=draw.randrange(1, 14)))
        once = redact(text)
        assert redact(once) == once, text
        changed += once != text
    assert changed > 500


def test_the_code_of_this_repository_as_a_difference_stays_as_it_is():
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() or [str(p.relative_to(ROOT)) for p in ROOT.glob('research/**/*.py')]
    checked = 0
    for name in names:
        if (
            not name.endswith(('.py', '.md', '.txt', '.toml'))
            or name.startswith('tests/core/test_redact')
            or not (ROOT / name).is_file()
        ):
            continue
        lines = (ROOT / name).read_text(encoding='utf-8').splitlines()
        difference = '\n'.join('+-  '[i % 3] + line for i, line in enumerate(lines))
        found = redact(difference)
        if name != 'research/core/redact.py':  # its own docstring shows what goes
            changed = [pair for pair in zip(difference.split('\n'), found.split('\n'), strict=True) if pair[0] != pair[1]]
            assert not changed, (name, changed[:3])
        checked += len(lines)
    assert checked > 10_000


@pytest.mark.parametrize(
    'piece',
    [
        '-',
        'a',
        'a-',
        'a.',
        'A_',
        '://a:',
        'token',
        'token: ',
        'password="',
        ' ',
        '\n',
        '"',
        PEM[:40],
        'eyJabcdefghijk.',
        'aA1/',
        'sk-',
        'bearer ',
        'basic a',
        'authorization:',
        'login a password ',
        '&a-sig',
        ' -u a',
        '--token ',
        '[redacted]',
    ],
)
def test_the_time_is_linear(piece):
    start = time.process_time()
    redact(piece * (100_000 // len(piece)))
    assert time.process_time() - start < 5


def test_provenance_holds_no_secret(monkeypatch):
    jax.devices()  # while the suite's own flags are set: jax reads them once
    diff = f'+++ b/x.py\n+login(token="{X}")\n' + '+x = 1\n' * 100_000
    monkeypatch.setattr(provenance, '_git', lambda *arguments: diff if 'diff' in arguments else 'abc')
    monkeypatch.setattr(
        sys, 'argv', ['launch.py', '--config.tracker.token=hidden-from-you', '--password', 'and-me', '--seed=3']
    )
    monkeypatch.setenv('XLA_FLAGS', f'--xla_dump_to=https://me:{X}@host/x')
    found = provenance.provenance()
    text = json.dumps(found)
    assert not [secret for secret in (X, 'hidden-from-you', 'and-me') if secret in text]
    assert found['argv'] == ['launch.py', f'--config.tracker.token={HIDDEN}', '--password', HIDDEN, '--seed=3']
    assert found['git']['diff'].startswith('+++ b/x.py\n+login(token="[redacted]")\n+x = 1\n')
    assert provenance.MAX_DIFF - 100 < len(found['git']['diff']) <= provenance.MAX_DIFF + 100


def test_a_secret_at_the_cut_of_a_long_difference_goes(monkeypatch):
    """What is cut in the middle no longer has the form of a secret: whole lines are kept."""
    form = 'h' + 'f_' + X
    for end in range(1, len(form) + 2):
        diff = '+' + 'x' * (provenance.MAX_DIFF - end - 2) + '\n' + form + '\n+y\n'
        monkeypatch.setattr(provenance, '_git', lambda *_, diff=diff: diff)
        assert 'S3cr' not in provenance.provenance()['git']['diff']


def test_a_difference_that_is_not_utf8_and_a_git_with_colours_are_no_reason_to_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, 'ROOT', tmp_path)
    for variable in ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE'):
        monkeypatch.delenv(variable, raising=False)

    def git(*arguments):
        subprocess.run(
            ['git', '-C', tmp_path, '-c', 'user.name=a', '-c', 'user.email=a@b', *arguments], check=True, capture_output=True
        )

    git('init')
    git('config', 'color.ui', 'always')
    git('config', 'diff.external', 'false')
    (tmp_path / 'a.txt').write_text('a\n')
    git('add', '.')
    git('commit', '-m', 'a', '--no-gpg-sign')
    (tmp_path / 'a.txt').write_bytes(b'caf\xe9\nHF_TOKEN=abc\n')
    found = provenance.provenance()['git']
    assert len(found['commit']) == 40
    assert f'+caf\ufffd\n+HF_TOKEN={HIDDEN}' in found['diff']
    assert '\x1b' not in found['diff']
    json.dumps(found)
