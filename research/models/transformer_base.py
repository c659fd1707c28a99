"""What the Transformers over tokens share: their fields, their embedding, and their partition rules.

Shape letters: B batch, T length, D model, P positions, V vocabulary, K outputs, L depth.

    class Decoder(Transformer): ...          Decoder(num_outputs=256, depth=2).layer_options(causal=True).num_kv_heads == 6
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core.errors import UsageError
from research.models import layers
from research.models.attention import sinusoidal
from research.models.stack import LayerOptions, Stack

POSITIONS = ('learned', 'sinusoidal', 'rotary', 'none')

# Tensor parallelism over the mesh axis 'model': heads, hidden units, vocabulary. The rules with `/layers/` are for `scan`.
PARTITION_RULES = (
    ('.*/layers/.*(query|key|value)/kernel', (None, None, 'model', None)),
    ('.*/layers/.*(query|key|value)/bias', (None, 'model', None)),
    ('.*/layers/.*out/kernel', (None, 'model', None, None)),
    ('.*/layers/.*(up|gate)/kernel', (None, None, 'model')),
    ('.*/layers/.*(up|gate)/bias', (None, 'model')),
    ('.*/layers/.*down/kernel', (None, 'model', None)),
    ('.*/layers/.*', ()),
    ('.*(query|key|value)/kernel', (None, 'model', None)),
    ('.*(query|key|value)/bias', ('model', None)),
    ('.*out/kernel', ('model', None, None)),
    ('.*(up|gate)/kernel', (None, 'model')),
    ('.*(up|gate)/bias', ('model',)),
    ('.*down/kernel', ('model', None)),
    ('.*embed/embedding', ('model', None)),
    ('.*head/kernel', (None, 'model')),
    ('.*head/bias', ('model',)),
    ('.*', ()),
)


class Transformer(nn.Module):
    """The fields and the embedding that decoder, encoder and encoder-decoder share.

    Attributes:
      num_outputs: V or K, size of the last layer.
      depth: L.
      width: D.
      heads: number of query heads.
      kv_heads: number of key and value heads; None: as many as `heads`; 1: multi-query attention.
      head_size: None: width / heads.
      hidden: width of the feed-forward layers; None: 4 * width.
      activation: 'gelu', 'gelu_exact', 'relu', 'relu2', 'silu', 'tanh', 'swiglu', 'geglu' or 'reglu'.
      norm: 'layer' or 'rms'.
      norm_eps: its epsilon.
      norm_position: 'pre' or 'post'.
      positions: 'learned', 'sinusoidal' (embeddings are then multiplied by sqrt(D), as in the paper), 'rotary' or 'none'.
      max_length: P, how many positions are learned.
      rotary_theta: base of the rotary frequencies.
      rotary_scaling: (factor, low, high, original length) of Llama 3.1, see `attention.rotation`.
      bias: whether projections and layer normalisations have biases.
      qk_norm: RMS normalisation of queries and keys.
      tied: whether the last layer is the transposed embedding.
      dropout: rate after the embedding and in every block.
      init_std: standard deviation of fresh embeddings and kernels.
      scan: loop over the layers in the compiled program.
      remat: 'none', 'full' or 'dots', see `Stack`.
      attention: 'auto', 'xla', 'cudnn' or 'flash', see `attention.choose`.
    """

    num_outputs: int
    depth: int = 6
    width: int = 384
    heads: int = 6
    kv_heads: int | None = None
    head_size: int | None = None
    hidden: int | None = None
    activation: str = 'gelu'
    norm: str = 'layer'
    norm_eps: float = 1e-5
    norm_position: str = 'pre'
    positions: str = 'learned'
    max_length: int = 1024
    rotary_theta: float = 10000.0
    rotary_scaling: tuple[float, ...] | None = None
    bias: bool = True
    qk_norm: bool = False
    tied: bool = True
    dropout: float = 0.0
    init_std: float = 0.02
    scan: bool = False
    remat: str = 'none'
    attention: str = 'auto'

    @nn.nowrap
    def layer_options(self, **changes: Any) -> LayerOptions:
        """The options of one block."""
        layers.check_choice('positions', self.positions, POSITIONS)
        if self.positions == 'sinusoidal' and self.width % 2:
            raise UsageError(f'sinusoidal positions come in pairs, and width={self.width}', 'give an even width')
        same = {name: getattr(self, name) for name in LayerOptions.__dataclass_fields__ if hasattr(self, name)}
        return LayerOptions(**{**same, 'rotary': self.positions == 'rotary', **changes})

    @nn.nowrap
    def make_stack(self, depth: int, **changes: Any) -> Stack:
        """`depth` blocks of `layer_options(**changes)`."""
        return Stack(self.layer_options(**changes), depth, self.scan, self.remat)

    @nn.nowrap
    def make_embed(self, size: int) -> nn.Embed:
        """A table of `size` vectors (D,)."""
        return nn.Embed(size, self.width, embedding_init=nn.initializers.normal(self.init_std))

    @nn.nowrap
    def check_length(self, length: int) -> None:
        """Raises a UsageError if there are no positions for `length` tokens."""
        if self.positions == 'learned' and length > self.max_length:
            raise UsageError(
                f'{length} tokens are more than the model has positions, max_length={self.max_length}',
                'raise model.max_length, or shorten the rows',
            )


def embedded(module: Any, tokens: jax.Array, positions: jax.Array | None = None, table: str = 'position') -> jax.Array:
    """Tokens (B, T) of a `Transformer` as vectors (B, T, D) that know their positions (B, T); None: 0..T-1.

    `table`: the name of the module that holds learned positions.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UsageError(
            f'a Transformer reads integers (B, T), not {tokens.dtype} {tokens.shape}', 'tokenise the text: set data.tokenizer'
        )
    module.check_length(tokens.shape[1])
    positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions
    x = module.embed(tokens)  # (B, T, D)
    if module.positions == 'learned':
        x = x + getattr(module, table)(positions)
    elif module.positions == 'sinusoidal':
        x = x * module.width**0.5 + sinusoidal(positions, module.width).astype(x.dtype)
    return x
