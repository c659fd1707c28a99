"""Named sizes of the Transformer: subclasses with other defaults, so that `config.model = 'gpt2_124m(dropout=0.1)'`.

    name            layers  width  heads  kv  hidden  vocabulary     parameters  source
    gpt2_124m           12    768     12  12    3072       50257    124,439,808  Radford et al., 2019, table 2
    gpt2_355m           24   1024     16  16    4096       50257    354,823,168
    gpt2_774m           36   1280     20  20    5120       50257    774,030,080
    gpt2_1558m          48   1600     25  25    6400       50257  1,557,611,200
    llama_7b            32   4096     32  32   11008       32000  6,738,415,616  Touvron et al., 2023, table 2
    llama_1b            16   2048     32   8    8192      128256  1,235,814,400  Llama 3.2, model card
    llama_3b            28   3072     24   8    8192      128256  3,212,749,824  Llama 3.2, model card
    llama_8b            32   4096     32   8   14336      128256  8,030,261,248  Grattafiori et al., 2024, table 3 (3.1)
    bert_tiny            2    128      2   2     512       30522      4,385,920  Turc et al., 2019, table 1
    bert_mini            4    256      4   4    1024       30522     11,170,560
    bert_small           4    512      8   8    2048       30522     28,763,648
    bert_base           12    768     12  12    3072       30522    109,482,240  Devlin et al., 2019, section 3
    bert_large          24   1024     16  16    4096       30522    335,141,888
    vaswani_base       6+6    512      8   8    2048       37000     63,082,496  Vaswani et al., 2017, table 3 (65 million)
    t5_like_small      6+6    512      8   8    2048       32128     60,506,112  Raffel et al., 2020, section 3, and t5-small
    t5_like_base     12+12    768     12  12    3072       32128    222,902,784
    tiny_decoder         2     64      4   4     256         256        116,480  for tests and first steps
    tiny_encoder         2     64      4   4     256         256        116,740  with 'mean' pooling and 4 classes
    tiny_encoder_decoder 2+2   64      4   4     256         256        250,112

Parameters are those with the vocabulary of the table; the run's own tokenizer decides it. BERT's count has the pooler and no
head. T5's relative position bias is not here: `t5_like_*` have rotary positions, so 32 x heads x 2 parameters less than T5.
"""

from research.models.encoder_decoder import EncoderDecoder
from research.models.transformer import Decoder, Encoder
from research.models.transformer_base import PARTITION_RULES as PARTITION_RULES


class GPT2Small(Decoder):
    """GPT-2 with 124 million parameters."""

    depth: int = 12
    width: int = 768
    heads: int = 12


class GPT2Medium(Decoder):
    """GPT-2 with 355 million parameters."""

    depth: int = 24
    width: int = 1024
    heads: int = 16


class GPT2Large(Decoder):
    """GPT-2 with 774 million parameters."""

    depth: int = 36
    width: int = 1280
    heads: int = 20


class GPT2XL(Decoder):
    """GPT-2 with 1558 million parameters."""

    depth: int = 48
    width: int = 1600
    heads: int = 25


class Llama7B(Decoder):
    """The first Llama, 7 billion parameters: RMSNorm, SwiGLU, rotary positions, no biases."""

    depth: int = 32
    width: int = 4096
    heads: int = 32
    hidden: int | None = 11008
    activation: str = 'swiglu'
    norm: str = 'rms'
    norm_eps: float = 1e-6
    positions: str = 'rotary'
    max_length: int = 2048
    bias: bool = False
    tied: bool = False


class Llama8B(Llama7B):
    """Llama 3.1 with 8 billion parameters: grouped queries, and rotary positions stretched to 131,072 tokens."""

    kv_heads: int | None = 8
    hidden: int | None = 14336
    norm_eps: float = 1e-5
    max_length: int = 131072
    rotary_theta: float = 500000.0
    rotary_scaling: tuple[float, ...] | None = (8.0, 1.0, 4.0, 8192.0)


class Llama3B(Llama8B):
    """Llama 3.2 with 3 billion parameters."""

    depth: int = 28
    width: int = 3072
    heads: int = 24
    hidden: int | None = 8192
    rotary_scaling: tuple[float, ...] | None = (32.0, 1.0, 4.0, 8192.0)
    tied: bool = True


class Llama1B(Llama3B):
    """Llama 3.2 with 1 billion parameters."""

    depth: int = 16
    width: int = 2048
    heads: int = 32


class BertBase(Encoder):
    """BERT with 110 million parameters; for masked tokens add `pooling='none', mask_head=True`."""

    depth: int = 12
    width: int = 768
    heads: int = 12
    activation: str = 'gelu_exact'
    norm_eps: float = 1e-12
    norm_position: str = 'post'
    max_length: int = 512
    pooling: str = 'first'
    segment_types: int = 2
    embed_norm: bool = True


class BertLarge(BertBase):
    """BERT with 335 million parameters."""

    depth: int = 24
    width: int = 1024
    heads: int = 16


class BertSmall(BertBase):
    """BERT with 29 million parameters."""

    depth: int = 4
    width: int = 512
    heads: int = 8


class BertMini(BertBase):
    """BERT with 11 million parameters."""

    depth: int = 4
    width: int = 256
    heads: int = 4


class BertTiny(BertBase):
    """BERT with 4 million parameters."""

    depth: int = 2
    width: int = 128
    heads: int = 2


class VaswaniBase(EncoderDecoder):
    """The base model of 'Attention Is All You Need'."""

    depth: int = 6
    width: int = 512
    heads: int = 8
    activation: str = 'relu'
    norm_position: str = 'post'
    positions: str = 'sinusoidal'
    dropout: float = 0.1


class T5LikeSmall(EncoderDecoder):
    """T5 small, with rotary positions in place of its relative position bias."""

    depth: int = 6
    width: int = 512
    heads: int = 8
    hidden: int | None = 2048
    activation: str = 'relu'
    norm: str = 'rms'
    norm_eps: float = 1e-6
    positions: str = 'rotary'
    bias: bool = False


class T5LikeBase(T5LikeSmall):
    """T5 base, with rotary positions in place of its relative position bias."""

    depth: int = 12
    width: int = 768
    heads: int = 12
    hidden: int | None = 3072


class TinyDecoder(Decoder):
    """A decoder that trains in seconds on one core."""

    depth: int = 2
    width: int = 64
    heads: int = 4
    positions: str = 'rotary'


class TinyEncoder(Encoder):
    """An encoder that trains in seconds on one core."""

    depth: int = 2
    width: int = 64
    heads: int = 4
    positions: str = 'rotary'
    pooling: str = 'mean'


class TinyEncoderDecoder(EncoderDecoder):
    """An encoder-decoder that trains in seconds on one core."""

    depth: int = 2
    width: int = 64
    heads: int = 4
    positions: str = 'rotary'
