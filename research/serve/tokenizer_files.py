"""A tokenizer as the files that the library transformers reads: tokenizer.json and what it says of special tokens.

Shape letters: V vocabulary.

    write(Bytes(), folder, Roles(encloses=False, max_length=1024, inputs=('input_ids', 'attention_mask')))

writes a byte-level BPE without merges whose ids 0 ... 255 are the bytes, as ours are. The ids of a text are then the same here
and there, with one difference that is meant: transformers reads the words '<eos>' in a text as the special token, we do not.
"""

import dataclasses
import json
import pathlib
from typing import Any

from research.core import files
from research.core.errors import UsageError
from research.data.source import Tokenizer
from research.data.tokenizers import ENTRIES, Bytes, Characters, HuggingFace

BYTE_NAMES = {'pad': '<pad>', 'bos': '<bos>', 'eos': '<eos>', 'mask': '<mask>', 'cls': '<cls>', 'sep': '<sep>'}


@dataclasses.dataclass(frozen=True)
class Roles:
    """How a model uses its tokenizer.

    Attributes:
      encloses: whether a text stands between `cls` and `sep`, where the tokenizer has them.
      max_length: most tokens of a text.
      inputs: what the model is called with, by the names of transformers.
      chat_template: Jinja text that makes a prompt of a conversation; None: the model holds none.
    """

    encloses: bool
    max_length: int
    inputs: tuple[str, ...]
    chat_template: str | None = None


def write(tokenizer: Tokenizer, folder: pathlib.Path, roles: Roles) -> list[str]:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`; returns their names.

    Raises:
      UsageError: there is no tokenizer.json for this kind of tokenizer.
    """
    library = to_library(tokenizer)
    special = {ENTRIES[role]: library.id_to_token(i) for role, i in special_ids(tokenizer).items()}
    if roles.encloses and library.post_processor is None and None not in (tokenizer.cls, tokenizer.sep):
        library.post_processor = enclosing(special['cls_token'], special['sep_token'], tokenizer)
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': roles.max_length,
        'model_input_names': list(roles.inputs),
        'clean_up_tokenization_spaces': False,
        **special,
    }
    if roles.chat_template is not None:
        config['chat_template'] = roles.chat_template
    files.write_atomically(folder / 'tokenizer.json', library.to_str())
    files.write_json(folder / 'tokenizer_config.json', config)
    files.write_json(folder / 'special_tokens_map.json', special)
    return ['tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json']


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of each special token that the tokenizer has, by role."""
    found = {role: getattr(tokenizer, role) for role in ENTRIES}
    return {role: i for role, i in found.items() if i is not None}


def to_library(tokenizer: Tokenizer) -> Any:
    """The same tokenizer in the library `tokenizers`.

    Raises:
      UsageError: it is of a kind that the library cannot be.
    """
    import tokenizers  # imported late: most exports of images need none

    if isinstance(tokenizer, HuggingFace):
        return tokenizers.Tokenizer.from_str(tokenizer.definition.decode())
    if isinstance(tokenizer, Bytes):
        return _bytes(tokenizer)
    if isinstance(tokenizer, Characters):
        return _characters(tokenizer)
    kind = getattr(tokenizer, 'kind', type(tokenizer).__name__)
    raise UsageError(
        f'a tokenizer of the kind {kind!r} cannot be written as tokenizer.json',
        "train with 'byte', 'characters', 'bpe', 'wordpiece' or 'huggingface'",
    )


def _bytes(tokenizer: Bytes) -> Any:
    """Byte-level BPE without a merge: every byte is a token, with the id of the byte."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {character: i for i, character in enumerate(_byte_characters())}
    names = {BYTE_NAMES[role]: i for role, i in special_ids(tokenizer).items()}
    spare = {f'<unused_{i}>': i for i in range(256, tokenizer.vocabulary_size) if i not in names.values()}
    library = Library(models.BPE(vocab={**vocabulary, **names, **spare}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(sorted([*names, *spare], key=lambda name: {**names, **spare}[name]))
    return library


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (Radford et al., 2019, their encoder.py).

    Printable bytes of Latin-1 stand for themselves; the others follow from U+0100 on, in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _characters(tokenizer: Characters) -> Any:
    """One token a character; what is not in the vocabulary is the unknown token."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Library

    names = {f'<{role}>': i for role, i in special_ids(tokenizer).items()}
    first = tokenizer.vocabulary_size - len(tokenizer.characters)
    vocabulary = {**names, **{character: first + i for i, character in enumerate(tokenizer.characters)}}
    library = Library(models.WordLevel(vocab=vocabulary, unk_token='<unknown>'))  # noqa: S106 - no password
    if tokenizer.lowercase:
        library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    library.decoder = decoders.Fuse()
    library.add_special_tokens(sorted(names, key=lambda name: names[name]))
    return library


def enclosing(cls: str, sep: str, tokenizer: Tokenizer) -> Any:
    """The post-processor that puts `cls` before and `sep` behind a text, as BERT does, and `sep` behind a second one."""
    from tokenizers.processors import TemplateProcessing

    special = [(cls, tokenizer.cls), (sep, tokenizer.sep)]
    return TemplateProcessing(single=f'{cls} $A {sep}', pair=f'{cls} $A {sep} $B:1 {sep}:1', special_tokens=special)


def chat_template(folder: pathlib.Path) -> str | None:
    """The chat template beside the tokenizer that a run was trained with; None without one."""
    if (folder / 'chat_template.jinja').is_file():
        return (folder / 'chat_template.jinja').read_text(encoding='utf-8')
    try:
        found = json.loads((folder / 'tokenizer_config.json').read_text(encoding='utf-8')).get('chat_template')
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None
