r"""Takes secrets out of what is written down: the command line, the config, the difference of the code.

    redact('https://me:pass@host/x --token=abc')   # 'https://[redacted]@host/x --token=[redacted]'
    redact({'hf_token': 'abc', 'pad_token': '_'})  # {'hf_token': '[redacted]', 'pad_token': '_'}
    redact(['--password', 'abc', '--steps', '10'])  # ['--password', '[redacted]', '--steps', '10']

What has the form of a secret goes (`FORMS`), and so does the value of a name that speaks of one (`NAME`). In this field 'token'
is mostly a word of the model, so in code a token must also look random. It is a net, no proof: do not put secrets into configs.
"""

import re
from typing import Any

HIDDEN = '[redacted]'
NAME = (
    r'(?:token|pass(?:word|wd|phrase)|[_.-]p(?:ass|wd)|secret|credentials?|authorization|shared_?access_?signature|'
    r'(?:api|access|secret|private|sign|signing|encryption|account|master|auth|ssh|client|storage|wandb|stripe)[_-]?key)[_-]?\d{0,2}'
)
SECRET_NAME = re.compile(rf'-{{0,2}}[\w.-]*?{NAME}', re.IGNORECASE)
OF_A_MODEL = re.compile(  # such as pad_token
    r'(?:pad|[be]os|unk|unknown|mask|cls|sep|start|end|stop|begin|special|next|last|first|prev|previous|per|image|text|audio|new|'
    r'current|this|that|each|one|prompt|blank|byte|word|sub|target|source|input|output|max|min|num|is)[_-]?token$',
    re.IGNORECASE,
)
FORMS = [  # each with what stays before it; every repeat is bounded or cannot start anywhere, so the time is linear in the text
    # A private key, also one that is cut off, and one in a text of JSON, where its lines end by \n.
    r'()-----BEGIN [A-Z ]*PRIVATE KEY[A-Z ]*-----(?:[\w+/=\s:,-]|\\+[nr])*?(?:-----END [A-Z ]*-----|(?![\w+/=\s:,-]|\\+[nr]))',
    # user:password@host, long-token@host, and links that let anybody in
    r'(://)(?:[^\s/@:"\'<>{}[]{0,99}:(?!\d+/)[^\s"\'<>{}]{1,300}|[^\s/@:"\'<>{}[]{16,300})(?=@)',
    r'(hooks\.slack\.com/services/|discord\.com/api/webhooks/)[\w/-]+',
    r'(?i)([?&][\w-]*(?:sig|signature|credential|key|token|auth)=)[^\s&"\'#[]+',
    # headers, and commands
    r'(?i)(\bauthorization["\']?[ \t]*[:=,][ \t]*["\']?)\w[^"\'\n\\]*',
    r'(?i)(\bcookie: *)\w[^"\'\n]*',
    r'(?i)(\b(?:bearer|basic)[ \t]+)(?=\S{0,99}\d)[\w.~+/=-]{12,}',
    r'(\s(?:-u|--user)[ =][\w.@-]+:)(?!\d+\b)[^\s"\']+',
    r'(\blogin\s+\S+\s+password\s+)\S+',
    # tokens: GitHub, Hugging Face, npm, Replicate, Databricks; GitLab, OpenAI, Anthropic, W&B, PyPI, Docker, Stripe, Google
    r'()\b(?:gh[pousr]_|hf_|npm_|r8_|dapi)(?=\S{0,99}\d)[A-Za-z0-9]{20,}',
    r'()\b(?:github_pat_|glpat-|sk-|wandb_v1_|pypi-|dckr_pat_|sk_live_|AIza|ya29\.|GOCSPX-|hvs\.|SG\.|xox[a-z]-)(?=\S{0,99}\d)[\w.-]{20,}',
    r'()\bA[KS]IA[A-Z0-9]{16}\b',  # Amazon
    r'()\beyJ[\w-]{10,}\.[\w-]{10,}[\w.-]*',  # a JSON web token
]
ASSIGNED = re.compile(  # on one line
    rf"""(?<![\w.-]) (?P<name> [\w.-]{{0,80}}? {NAME})
    (?P<sign> \\*["']?\]? (?:[ \t]*:[ \t]*[\w.\[\] |]{{1,40}}?(?==))? [ \t]* (?:=>|:=|==?|:) [ \t]*  # x['name'] =, name: str =
      | \\*["'],[ \t]*(?=["'])                                                                      # ('name', 'value')
      | [ ](?=\w))                                                                                  # --name value
    [bfru]{{0,2}} (?: (?P<quote> \\*["']) (?P<quoted> (?:(?!(?P=quote))[^\n])+)
      | (?P<bare> [^\s"'`,;&)\]}}]+) (?P<rest> [^\s"']*))""",
    re.IGNORECASE | re.VERBOSE,
)
RANDOM = re.compile(r'(?=.*\d)(?=.*[a-z])[\w+/=.~:@!#%^*-]{8,}$', re.IGNORECASE)
CODE = re.compile(  # a variable of the shell, a call, an index, an attribute, a type, a constant
    r'[$<%|*/=]|.*[(\[{]|[a-z_]+(\.[a-z_]+)+$|(none|true|false|null|str|bytes|int|float|bool|any|optional|not|lambda|self|\.+)$',
    re.IGNORECASE,
)


def redact(value: Any) -> Any:
    """`value` (text, dicts, lists, tuples of such) with every secret replaced by '[redacted]'; other values as they are."""
    if isinstance(value, str):
        return _redact_text(value)
    if isinstance(value, dict):
        return {redact(k): _hide(v) if _is_secret(k) else redact(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        flags = [False, *(isinstance(v, str) and v.startswith('-') and _is_secret(v) for v in value)]  # '--password', 'abc'
        pairs = zip(value, flags, strict=False)
        items = [_hide(v) if after and not str(v).startswith('--') else redact(v) for v, after in pairs]
        return items if isinstance(value, list) else tuple(items)
    return value


def _is_secret(name: Any) -> bool:
    return isinstance(name, str) and SECRET_NAME.fullmatch(name) is not None and not OF_A_MODEL.search(name)


def _hide(value: Any) -> Any:
    """The value of a secret name: every text in it is hidden."""
    if isinstance(value, dict):
        return {k: _hide(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hide(v) for v in value] if isinstance(value, list) else tuple(map(_hide, value))
    return HIDDEN if isinstance(value, str) and value else value


def _redact_text(text: str) -> str:
    for _ in range(9):  # what one rule leaves may show another secret
        before, (name, _, value) = text, text.partition('=')
        if value and '\n' not in text and value[0] != '$' and _is_secret(name):  # one argument, blanks and all
            return f'{name}={HIDDEN}'
        for form in FORMS:
            text = re.sub(form, rf'\1{HIDDEN}', text)
        is_argument = re.search(r'\s', text) is None
        text = ASSIGNED.sub(lambda match, is_argument=is_argument: _redact_assigned(match, is_argument), text)
        if text == before:
            break
    return text


def _redact_assigned(match: re.Match[str], is_argument: bool) -> str:
    name, sign, quoted, bare, rest = (match[group] for group in ('name', 'sign', 'quoted', 'bare', 'rest'))
    value = quoted or bare
    if OF_A_MODEL.search(name):
        return match[0]
    if bare and (CODE.match(bare) or (sign == ' ' and not name.startswith('--'))):
        return match[0]
    before = match.string[max(match.start() - 1, 0) : match.start()]
    # Of the command line or the environment, as --a.token=x, a.token=x, config.py:token=x, A_TOKEN=x: there any value is one.
    is_key = is_argument or name.isupper() or name.startswith('-') or '.' in name or before == ':'
    is_setting = sign == '=' and is_key
    is_vague = re.search(r'token[_-]?\d*$', name, re.IGNORECASE) is not None or ',' in sign or sign == ' '
    if is_vague and not is_setting and not RANDOM.match(value):
        return match[0]
    keeps_rest = bare and (is_argument or not is_setting)  # 'a=x,b=y' and f(a=x), but not A_TOKEN=x,y
    return match[0].removesuffix(value + (rest or '')) + HIDDEN + (rest if keeps_rest else '')
