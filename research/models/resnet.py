"""Residual networks: ResNet v1.5 and v2, with CIFAR or ImageNet stem, batch or group normalisation; wide ones (WRN).

Shape letters: B batch, H height, W width, C channels, K outputs.

    preset            parameters (K)                 source
    resnet18           11,689,512 (1000)             He et al. 2016a (arXiv:1512.03385), table 1
    resnet34           21,797,672 (1000)             the same
    resnet50           25,557,032 (1000)             the same
    resnet101          44,549,160 (1000)             the same
    resnet20              272,474 (10)               the same, section 4.2 and table 6 (0.27M)
    resnet56              855,770 (10)               the same (0.85M)
    wrn_28_2            1,467,610 (10)               Zagoruyko & Komodakis 2016 (arXiv:1605.07146); FixMatch's network
    wrn_16_4            2,748,890 (10)               the same
    wrn_28_10          36,479,194 (10)               the same, table 4 (36.5M)

Version '1.5' adds after the last normalisation and has its stride in the 3x3 convolution (version 1 of the paper, which has it
in the first 1x1; the same for basic blocks). Version '2' normalises before every convolution (He et al. 2016b,
arXiv:1603.05027). Shortcuts that change shape are 1x1 convolutions; resnet20 and resnet56 in the paper pad with zeros instead,
which saves 2,752 parameters. Padding is symmetric, as in PyTorch, so that weights from there give the same outputs.

ResNet18() on (B, 224, 224, 3): stem (B, 112, 112, 64), pool (B, 56, 56, 64), stages (B, 56, 56, 64), (B, 28, 28, 128),
(B, 14, 14, 256), (B, 7, 7, 512), mean (B, 512), head (B, K). With stem='cifar' (B, 32, 32, 3) stays 32 x 32 until stage 1.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.models import layers

# Tensor parallelism over output channels; the head is split over its inputs, as the number of classes is seldom a multiple.
PARTITION_RULES = (
    ('.*(stem|conv_[0-9]|projection)/kernel', (None, None, None, 'model')),
    ('.*head/kernel', ('model', None)),
    ('.*', ()),
)

Convolutions = tuple[tuple[int, int, int], ...]  # (features, side of the kernel, stride) of each


class ResNet(nn.Module):
    """Stem, stages of residual blocks that halve the image and double the channels, mean over the image, dense layer.

    Attributes:
      num_outputs: K, size of the last layer.
      stages: blocks in each stage.
      block: 'basic' (two 3x3 convolutions) or 'bottleneck' (1x1, 3x3, 1x1 with four times the channels).
      version: '1.5' or '2'.
      stem: 'imagenet' (7x7 convolution with stride 2 and max pooling) or 'cifar' (3x3 convolution).
      norm: 'batch' or 'group'.
      width: channels of the stem and, times `widen`, of the first stage.
      widen: factor on the channels of all stages.
      dropout: rate before the last convolution of every block.
      zero_init: every block starts as its shortcut (Goyal et al. 2017, arXiv:1706.02677, section 5.1): the scale of its last
        normalisation is 0 or, in version 2, which has none there, the kernel of its last convolution.
    """

    num_outputs: int
    stages: tuple[int, ...] = (2, 2, 2, 2)
    block: str = 'basic'
    version: str = '1.5'
    stem: str = 'imagenet'
    norm: str = 'batch'
    width: int = 64
    widen: int = 1
    dropout: float = 0.0
    zero_init: bool = True

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (B, H, W, C) to outputs (B, K)."""
        layers.check_images(inputs, 'resnet')
        for what, choices in (('block', BLOCKS), ('version', VERSIONS), ('stem', STEMS), ('norm', ('batch', 'group'))):
            layers.check_choice(what, getattr(self, what), choices)
        kernel, stride = STEMS[self.stem]
        x = convolution(self.width, kernel, stride, 'stem')(inputs)
        if self.version == '1.5':
            x = nn.relu(layers.norm(self.norm, x, train, name='stem_norm'))
        if self.stem == 'imagenet':
            x = pool(x)  # (B, H / 4, W / 4, C)
        for stage, count in enumerate(self.stages):
            for index in range(count):
                x = self._block(stage, index)(x, train)
        if self.version == '2':
            x = nn.relu(layers.norm(self.norm, x, train, name='final_norm'))
        return nn.Dense(self.num_outputs, name='head')(jnp.mean(x, axis=(1, 2)))  # (B, K)

    def _block(self, stage: int, index: int) -> nn.Module:
        """Block `index` of `stage`; the first of every stage but the first halves the image."""
        convolutions = BLOCKS[self.block](self.width * self.widen * 2**stage, 2 if stage and not index else 1)
        block = VERSIONS[self.version]
        return block(convolutions, self.norm, self.dropout, self.zero_init, name=f'stage_{stage}_block_{index}')


class PostActivation(nn.Module):
    """The block of version 1.5: convolution, normalisation, ReLU; the last ReLU after the addition."""

    convolutions: Convolutions
    norm: str = 'batch'
    dropout: float = 0.0
    zero_init: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, features)."""
        y, last = x, len(self.convolutions)
        for number, (features, kernel, stride) in enumerate(self.convolutions, start=1):
            y = layers.dropout(self.dropout, y, train) if number == last else y
            y = convolution(features, kernel, stride, f'conv_{number}')(y)
            scale = 0.0 if number == last and self.zero_init else 1.0
            y = layers.norm(self.norm, y, train, name=f'norm_{number}', scale=scale)
            y = nn.relu(y) if number < last else y
        if x.shape != y.shape:
            x = convolution(y.shape[-1], 1, stride_of(self.convolutions), 'projection')(x)
            x = layers.norm(self.norm, x, train, name='projection_norm')
        return nn.relu(x + y)


class PreActivation(nn.Module):
    """The block of version 2: normalisation, ReLU, convolution; nothing after the addition."""

    convolutions: Convolutions
    norm: str = 'batch'
    dropout: float = 0.0
    zero_init: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, features)."""
        first = y = nn.relu(layers.norm(self.norm, x, train, name='norm_1'))
        last = len(self.convolutions)
        for number, (features, kernel, stride) in enumerate(self.convolutions, start=1):
            y = nn.relu(layers.norm(self.norm, y, train, name=f'norm_{number}')) if number > 1 else y
            y = layers.dropout(self.dropout, y, train) if number == last else y
            y = convolution(features, kernel, stride, f'conv_{number}', zero=number == last and self.zero_init)(y)
        if x.shape != y.shape:
            x = convolution(y.shape[-1], 1, stride_of(self.convolutions), 'projection')(first)
        return x + y


def convolution(features: int, kernel: int, stride: int, name: str, zero: bool = False) -> nn.Conv:
    """A square convolution without bias, padded evenly by (kernel - 1) / 2; He et al. 2015 initialisation by fan-out."""
    init = nn.initializers.zeros if zero else nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
    padding = (kernel - 1) // 2
    both = ((padding, padding), (padding, padding))
    return layers.conv(features, (kernel, kernel), (stride, stride), both, use_bias=False, kernel_init=init, name=name)


def pool(x: jax.Array) -> jax.Array:
    """Max pooling over 3 x 3 pixels with stride 2; what lies outside the image is never the largest."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)  # (B, H + 2, W + 2, C)
    return nn.max_pool(padded, (3, 3), (2, 2))  # (B, H / 2, W / 2, C)


def basic(features: int, stride: int) -> Convolutions:
    """Two 3x3 convolutions, the stride in the first."""
    return (features, 3, stride), (features, 3, 1)


def bottleneck(features: int, stride: int) -> Convolutions:
    """1x1, 3x3 with the stride, 1x1 with four times the channels."""
    return (features, 1, 1), (features, 3, stride), (4 * features, 1, 1)


def stride_of(convolutions: Convolutions) -> int:
    """The stride of all of them together."""
    return math.prod(stride for _, _, stride in convolutions)


BLOCKS = {'basic': basic, 'bottleneck': bottleneck}
VERSIONS = {'1.5': PostActivation, '2': PreActivation}
STEMS = {'imagenet': (7, 2), 'cifar': (3, 1)}  # side of the kernel, stride


class ResNet18(ResNet):
    """He et al. 2016a, table 1: 18 layers."""


class ResNet34(ResNet):
    """He et al. 2016a, table 1: 34 layers."""

    stages: tuple[int, ...] = (3, 4, 6, 3)


class ResNet50(ResNet):
    """He et al. 2016a, table 1: 50 layers."""

    stages: tuple[int, ...] = (3, 4, 6, 3)
    block: str = 'bottleneck'


class ResNet101(ResNet50):
    """He et al. 2016a, table 1: 101 layers."""

    stages: tuple[int, ...] = (3, 4, 23, 3)


class ResNet20(ResNet):
    """He et al. 2016a, section 4.2, n = 3: 20 layers for CIFAR."""

    stages: tuple[int, ...] = (3, 3, 3)
    stem: str = 'cifar'
    width: int = 16


class ResNet56(ResNet20):
    """He et al. 2016a, section 4.2, n = 9: 56 layers for CIFAR."""

    stages: tuple[int, ...] = (9, 9, 9)


class WideResNet(ResNet20):
    """Zagoruyko & Komodakis 2016, table 1: depth 6 n + 4 for n blocks in each of three stages; here WRN-28-2."""

    stages: tuple[int, ...] = (4, 4, 4)
    version: str = '2'
    widen: int = 2
    zero_init: bool = False


class WideResNet16x4(WideResNet):
    """WRN-16-4."""

    stages: tuple[int, ...] = (2, 2, 2)
    widen: int = 4


class WideResNet28x10(WideResNet):
    """WRN-28-10; the paper's dropout is 0.3."""

    widen: int = 10
