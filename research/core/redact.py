"""Takes secrets out of what is written down: the command line, the config, the difference of the code.

    redact('https://me:pass@host/x --token=abc')   # 'https://[redacted]@host/x --token=[redacted]'

What counts: values of names that speak of secrets (token, secret, password, api_key, ...), user and password in addresses, and
the published forms of common tokens. It is a net, not a proof: do not put secrets into configs.
"""

import re
from typing import Any

HIDDEN = '[redacted]'
_NAMES = r'(?:api[_-]?key|access[_-]?key|secret|passwd|password|token|credentials?|private[_-]?key|secret[_-]?key)'
NAME = re.compile(rf'(?:^|[._-]){_NAMES}$', re.IGNORECASE)
# A bare value needs a digit and eight characters: in this field most lines that say `token = ...` are no secrets.
ASSIGNED = re.compile(
    rf"""((?:^|[\s"'.,({{_-]){_NAMES}["']?\s*[=:]\s*)(?:"[^"\s]+"|'[^'\s]+'|(?=[^\s"',)]*[0-9])[\w+/=-]{{8,}})""",
    re.IGNORECASE | re.MULTILINE,
)
FLAG = re.compile(rf'(--[\w.-]*{_NAMES}=)\S+', re.IGNORECASE)
ADDRESS = re.compile(r'(\b[a-z][a-z0-9+.-]*://)[^/\s@:]+:[^/\s@]+@', re.IGNORECASE)
FORMS = re.compile(
    r'\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|'
    r'(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30,}|xox[abprs]-[A-Za-z0-9-]{10,}|glpat-[A-Za-z0-9_-]{18,}|'
    r'eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})'
)
PRIVATE = re.compile(r'-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)', re.DOTALL)


def redact(value: Any) -> Any:
    """`value` (text, dicts, lists, tuples of such) with every secret replaced by '[redacted]'; other values as they are."""
    if isinstance(value, dict):
        return {k: HIDDEN if isinstance(v, str) and v and _is_secret(k) else redact(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(redact(v) for v in value)
    return _redact_text(value) if isinstance(value, str) else value


def _is_secret(name: Any) -> bool:
    return isinstance(name, str) and NAME.search(name) is not None


def _redact_text(text: str) -> str:
    text = PRIVATE.sub(HIDDEN, text)
    text = ADDRESS.sub(rf'\1{HIDDEN}@', text)
    text = FORMS.sub(HIDDEN, text)
    text = FLAG.sub(rf'\1{HIDDEN}', text)
    return ASSIGNED.sub(rf'\1{HIDDEN}', text)
