r"""Takes secrets out of what is written down: the command line, the config, the difference of the code.

    redact('https://me:pass@host/x --token=abc')   # 'https://[redacted]@host/x --token=[redacted]'
    redact({'hf_token': 'abc', 'pad_token': '_'})  # {'hf_token': '[redacted]', 'pad_token': '_'}
    redact(['--password', 'abc', '--steps', '10'])  # ['--password', '[redacted]', '--steps', '10']

What counts: values of names that speak of secrets, user and password in addresses, headers, signed links, private keys, and the
published forms of common tokens. In this field 'token' and 'key' are mostly words of the model, so in code a value of theirs
must also look random. It is a net, not a proof: do not put secrets into configs.

Every repeat is bounded or starts at a word, so that the time is linear in the text (0.2 s for 200,000 characters of code).
"""

import re
from typing import Any

HIDDEN = '[redacted]'

_KEYS = (  # noqa: SIM905 - words, to be read as such; `api_key` and so on
    'api access secret private signing encryption account master auth deploy subscription license ssh gpg admin client app '
    'webhook storage wandb openai anthropic huggingface hf comet neptune aws azure gcp google'
).split()
# Tokens of a model. Their names end like those of secrets.
_MODEL_TOKENS = (  # noqa: SIM905
    'pad bos eos unk unknown mask masked cls class sep separator start end stop begin special next last first prev previous '
    'per image text audio video max min num new current prompt sentinel blank byte word sub target source draft oov extra '
    'additional register distill time query input output label decoder encoder vocab predicted this that one each every'
).split()
_STRONG = (
    rf'(?:pass(?:word|wd|phrase)|[_-]pwd|secret|credentials?|authorization|connection[_-]?string|(?:set-)?cookie|'
    rf'(?:{"|".join(_KEYS)}|shared[_-]?access)[_-]?key|shared[_-]?access[_-]?signature)'
)
_NOT_OF_A_MODEL = ''.join(f'(?<!{word}[_-])(?<!{word})' for word in _MODEL_TOKENS)
_TOKEN = rf'(?:(?<![a-z]){_NOT_OF_A_MODEL}token|(?:access|auth|refresh|session|bearer|api|hub|bot|hf|security|sas)token)'
_NAME = rf'(?:{_STRONG}|{_TOKEN})'
_END = r'(?:[_-]?\d{1,3})?'  # password2, TOKEN_1

# `name =`, `"name": `, `['name'] = `, `name: str = `, `'name' => `; on one line.
_IS = (
    r'(?:[ \t]{0,9}:[ \t]{0,9}[\w.\[\], |]{1,40}?(?=[ \t]{0,9}=))?\\?["\']?\]?'
    r'[ \t]{0,99}(?:=>|:=|={1,2}|:(?!//|:))[ \t]{0,99}'
)
_RANDOM = r'(?=[^\s"\'`,;)]{0,99}\d|[^\s"\'`,;)A-Z]{0,99}[A-Z][^\s"\'`,;)]{15})'  # it has a digit, or is long and of both cases
# What a bare value of code looks like: a constant, a type, a call, an index, an attribute.
_NO_CODE = (
    r'(?!(?:none|true|false|null|nil|str|bytes|int|float|bool|object|any|string|not|lambda|await|self|\.{3})(?=[\s,;:)}\]|=]|$)|'
    r'[a-z_][\w.]{0,99}[(\[]|[a-z_]{1,40}(?:\.[a-z_]{1,40}){1,6}(?=[\s,;:)}\]]|$)|optional\b|f?["\'`]|[$%{(\[<*|])'
)
_QUOTED = r'([bfru]{0,2}\\?["\'`])'
_I, _IM = re.IGNORECASE, re.IGNORECASE | re.MULTILINE

NAME = re.compile(rf'(?:{_NAME}|(?:^|[._-])(?:pwd|pass|auth)){_END}$', _I)
FLAG = re.compile(rf'-{{1,2}}[\w.-]*{_NAME}{_END}', _I)
SETTING = re.compile(r'(-{0,2}[\w.\-\[\]]{1,200})=(?=[^$])[^\n]*\Z')  # one argument `name=value`, blanks and all
_ANYWHERE = [
    # a private key, also one that is cut off, in a JSON text, or in a difference
    (
        r'-----BEGIN [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----(?:[A-Za-z0-9+/=\s,:-]|\\{1,8}[nr])*?'
        r'(?:-----END [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----|(?![A-Za-z0-9+/=\s,:-]|\\{1,8}[nr]))',
        HIDDEN,
        0,
    ),
    # a line of such a key alone
    (
        r'^([ +-]?[ \t]{0,40})(?=[^\n]{0,99}[a-z])(?=[^\n]{0,99}[A-Z])(?=[^\n]{0,99}\d)[A-Za-z0-9+/]{60,80}={0,2}$',
        rf'\1{HIDDEN}',
        re.M,
    ),
    # scheme://user:password@, scheme://:password@, https://token@
    (r'(://)(?!\[redacted\]@)[^\s/@:"\'`<>]{0,200}:(?!\d{1,5}/)[^\s"\'`<>]{1,300}@', rf'\1{HIDDEN}@', 0),
    (r'(https?://)[\w.~%-]{16,300}@', rf'\1{HIDDEN}@', _I),
    # signed links
    (
        r'([?&](?:sig|signature|key|auth|pass|pwd|x-(?:amz|goog)-(?:signature|credential|security-token))=)[^&\s"\'`<>#]+',
        rf'\1{HIDDEN}',
        _I,
    ),
    # published forms
    (
        r'\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|'
        r'[sr]k_(?:live|test)_[A-Za-z0-9]{10,}|whsec_[A-Za-z0-9+/=]{20,}|sk-(?=[\w-]{0,60}\d)[\w-]{20,}|'
        r'(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b|AIza[\w-]{30,}|ya29\.[\w.-]{20,}|GOCSPX-[\w-]{20,}|1//0[\w-]{30,}|'
        r'xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{20,}|gl(?:pat|dt|rt|oas|ptt|cbt|agent|soat)-[\w.-]{18,}|'
        r'npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|dckr_pat_[\w-]{20,}|do[opr]_v1_[a-f0-9]{40,}|dapi[a-f0-9]{32}|'
        r'hv[sbr]\.[\w-]{20,}|SG\.[\w-]{16,}\.[\w-]{16,}|SK[a-f0-9]{32}\b|r8_[A-Za-z0-9]{30,}|tskey-[\w-]{16,}|'
        r'wandb_v1_[\w-]{20,}|lin_api_[A-Za-z0-9]{30,}|AGE-SECRET-KEY-1[A-Z0-9]{40,}|[\w~.]{3}[78]Q~[\w~.-]{31,34}|'
        r'eyJ[\w-]{10,}\.[\w-]{10,}(?:\.[\w-]*)?|(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{86}==)',
        HIDDEN,
        0,
    ),
    (r'(hooks\.slack\.com/(?:services|workflows)/|discord(?:app)?\.com/api/webhooks/)[\w/-]+', rf'\1{HIDDEN}', _I),
    (r'(\$(?:2[abxy]|[156]|apr1|y|argon2(?:id?|d))\$)[\w./$=,+-]{16,}', rf'\1{HIDDEN}', 0),  # hashed passwords
    # headers and commands
    (r'(\bauthorization\\?["\']?[ \t]{0,9}[:=,][ \t]{0,9}\\?["\']?)(?=[^\s"\'])[^"\'\n\\]+', rf'\1{HIDDEN}', _I),
    (r'(\b(?:set-)?cookie: ?)[^"\'\n]+', rf'\1{HIDDEN}', _I),
    (r'(\b(?:bearer|basic)[ \t]{1,9})(?=[^\s"\']{0,200}[\d=])[\w.~+/=-]{8,}', rf'\1{HIDDEN}', _I),
    (r'((?:^|\s)(?:-u|--user)[ \t=]["\']?[^\s:"\']{1,99}:)(?!\d+\b)[^\s"\']+', rf'\1{HIDDEN}', re.M),
    (r'(\blogin[ \t]{1,9}\S{1,99}\s{1,9}password[ \t]{1,9}|\bsshpass[ \t]{1,9}-p[ \t]{0,9})\S+', rf'\1{HIDDEN}', _I),
]
# These are slower, and apply to lines that have one of `WORDS`.
WORDS = ('token', 'secret', 'pass', 'pwd', 'key', 'credential', 'authorization', 'connection', 'cookie', 'signature')
_NAMED = [
    # flags: --a.token=x; with a blank in between the value must have a digit, or the next word of a sentence would be taken
    (
        rf'((?<![\w-])-{{1,2}}(?:[a-z][\w.-]{{0,99}}?)?(?<![a-z]){_NAME}{_END}=)(?:"[^"\n]+"|\'[^\'\n]+\'|[^\s"\']+)',
        rf'\1{HIDDEN}',
        _I,
    ),
    (rf'((?<![\w-])--[\w.-]{{0,99}}?(?<![a-z]){_NAME}{_END}[ \t])(?=\S{{0,99}}\d)[^\s"\'`-]\S{{5,}}', rf'\1{HIDDEN}', _I),
    (rf'((?<=[:,;?&.])[\w-]{{0,40}}?{_NAME}{_END}=){_NO_CODE}[^\s"\'`,;&)]+', rf'\1{HIDDEN}', _I),
    # variables of the environment: no blanks around the sign
    (
        rf'((?<![A-Za-z0-9_])(?!(?:\w{{0,40}}_)?(?:{"|".join(_MODEL_TOKENS).upper()})_TOKEN)[A-Z0-9_]{{0,60}}'
        r'(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|_PASS|_PWD|CREDENTIALS?)(?:_?\d)?=)(?![$%{(<=\s]|[a-z_]+\.)(?:"[^"\n]+"|\'[^\'\n]+\'|[^\s"\']+)',
        rf'\1{HIDDEN}',
        0,
    ),
    (r'((?<![A-Za-z0-9_])[A-Z0-9_]{1,60}_KEY=["\']?)(?=[^\s"\']{0,60}\d)[\w./+=~-]{16,}', rf'\1{HIDDEN}', 0),
    # name = 'value', ('name', 'value'), name = value, in code and in files of settings
    (rf'({_STRONG}{_END}{_IS}){_QUOTED}(?=\S)(?:(?!\2)[^\n])+?(?:\2|$)', rf'\1\2{HIDDEN}\2', _IM),
    (rf'({_TOKEN}{_END}{_IS}){_QUOTED}{_RANDOM}[\w.+/=~:!@#$%^&*-]{{8,}}(?:\2|$)', rf'\1\2{HIDDEN}\2', _IM),
    (rf'({_NAME}{_END}["\'],[ \t]{{0,9}}["\']){_RANDOM}[\w.+/=~:!@#$%^&*-]{{8,}}', rf'\1{HIDDEN}', _I),
    (rf'({_STRONG}{_END}{_IS}){_NO_CODE}(?:\S+(?=[ \t]*$)|[^\s"\'`,;&)\]}}]+)', rf'\1{HIDDEN}', _IM),
    (rf'({_TOKEN}{_END}{_IS})(?![\d_.]+(?=[\s,;)\]}}]|$)){_NO_CODE}{_RANDOM}[\w.+/=~-]{{8,}}', rf'\1{HIDDEN}', _I),
]
ANYWHERE = [(re.compile(pattern, flags), to) for pattern, to, flags in _ANYWHERE]
NAMED = [(re.compile(pattern, flags), to) for pattern, to, flags in _NAMED]


def redact(value: Any) -> Any:
    """`value` (text, dicts, lists, tuples of such) with every secret replaced by '[redacted]'; other values as they are."""
    if isinstance(value, str):
        return _redact_text(value)
    if isinstance(value, dict):
        return {redact(k): _hide(v) if _is_secret(k) else redact(v) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, '_fields'):
        pairs = zip(value._fields, value, strict=True)
        return value._make(_hide(v) if _is_secret(k) else redact(v) for k, v in pairs)
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(_redact_items(value))
    return value


def _is_secret(name: Any) -> bool:
    return isinstance(name, str) and NAME.search(name) is not None


def _hide(value: Any) -> Any:
    """The value of a secret name: every text in it is hidden."""
    if isinstance(value, str):
        return HIDDEN if value else value
    if isinstance(value, dict):
        return {k: _hide(v) for k, v in value.items()}
    return type(value)(map(_hide, value)) if type(value) in (list, tuple) else value


def _redact_items(items: Any) -> Any:
    """Each item; what follows a flag of a secret's name, as in a command line, is hidden."""
    flag = False
    for item in items:
        is_value = flag and isinstance(item, str) and not item.startswith('--')
        yield _hide(item) if is_value else redact(item)
        flag = isinstance(item, str) and FLAG.fullmatch(item) is not None


def _redact_text(text: str) -> str:
    while True:  # what one rule leaves may show another secret; every round that changes anything leaves less
        before = text
        setting = SETTING.match(text)
        if setting and _is_secret(setting[1]):
            text = f'{setting[1]}={HIDDEN}'
        text = _apply(ANYWHERE, text)
        text = '\n'.join(_apply(NAMED, line) if _may_name(line) else line for line in text.split('\n'))
        if text == before:
            return text


def _may_name(line: str) -> bool:
    lower = line.lower()
    return any(word in lower for word in WORDS)


def _apply(rules: list[tuple[re.Pattern[str], str]], text: str) -> str:
    for pattern, to in rules:
        text = pattern.sub(to, text)
    return text
