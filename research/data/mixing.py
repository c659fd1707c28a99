"""Mixing pairs of examples: mixup and cutmix.

Shape letters: B batch (even), H height, W width, C channels.

The partner of example 2i is 2i + 1 and the other way round, so the result is the same on any number of devices, hosts and
microbatches as long as each holds an even number of examples. Both components add to the batch

    mix_label (B,)     the partner's label, of the label's dtype (classes or regression targets)
    mix_weight (B,)    float32, the weight of the own label; 1 where nothing was mixed

    a pixel of 200 with a partner's of 100 and weight 0.7 becomes 0.7 * 200 + 0.3 * 100 = 170

An example stays as it is when its partner is padding (mask 0) or when an earlier component has mixed it, so
`chain([mixup(probability=0.5), cutmix()])` gives half of each. A partner that an earlier component has mixed holds a share
of the example itself, which counts for the own label.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.core import rng
from research.core.errors import UsageError
from research.core.threefry import straight
from research.data.augment import Augmentation, Batch, check_range, draw_centres, draw_chosen, images_of, inside, square

SMALLEST_ALPHA = 1e-3

# (keys (B,), own shares lambda (B,), height, width) -> own share of each pixel, broadcastable to (B, H, W, 1)
Shares = Callable[[jax.Array, jax.Array, int, int], jax.Array]


def mixup(*, alpha: float = 0.2, probability: float = 1.0) -> Augmentation:
    """lambda * own image + (1 - lambda) * partner's, lambda ~ Beta(alpha, alpha) per example; images become float32, 0..255.

    Zhang et al. 2017 (arXiv:1710.09412), section 2.

    Raises:
      UsageError: (when called) the batch is odd.
    """
    return _mixing('mixup', alpha, probability, lambda keys, shares, height, width: shares[:, None, None, None])


def cutmix(*, alpha: float = 1.0, probability: float = 1.0) -> Augmentation:
    """Pastes a box of the partner's image over the own one; images become float32, 0..255.

    The box has sides sqrt(1 - lambda) * (H, W) in whole pixels, lambda ~ Beta(alpha, alpha), and its centre is uniform; the
    borders clip it, and the weight is the area that really remains. Yun et al. 2019 (arXiv:1905.04899), section 3.1.

    Raises:
      UsageError: (when called) the batch is odd.
    """
    return _mixing('cutmix', alpha, probability, _outside_box)


def _outside_box(keys: jax.Array, shares: jax.Array, height: int, width: int) -> jax.Array:
    """1 outside each example's box and 0 inside, (B, H, W, 1) float32."""
    boxes = square(draw_centres(keys, height, width), _box_sides(shares, height, width))
    return 1 - inside(boxes, height, width)[..., None].astype(jnp.float32)


def _box_sides(shares: jax.Array, height: int, width: int) -> jax.Array:
    """Height and width of the boxes that leave `shares` (B,) of the image, (B, 2) int32."""
    return (jnp.sqrt(1 - shares)[:, None] * jnp.array([height, width])).astype(jnp.int32)


def _mixing(name: str, alpha: float, probability: float, pixel_shares: Shares) -> Augmentation:
    check_range(f'{name}.alpha', alpha, SMALLEST_ALPHA)
    check_range(f'{name}.probability', probability, 0, 1)

    def apply(keys: jax.Array, batch: Batch) -> Batch:
        images = images_of(batch)
        if len(images) % 2:
            raise UsageError(
                f'{name} pairs neighbours, but the batch has {len(images)} examples', 'use an even batch per device'
            )
        share_keys, chosen_keys, place_keys = rng.split_each(keys, 3)  # (B,) each
        chosen = draw_chosen(chosen_keys, probability)
        shares = pixel_shares(place_keys, _draw_shares(share_keys, alpha), images.shape[1], images.shape[2])
        return _mix(batch, chosen, shares)

    return apply


def _draw_shares(keys: jax.Array, alpha: float) -> jax.Array:
    """lambda ~ Beta(alpha, alpha), (B,) float32.

    Exact and without the rejection loop of `jax.random.beta`, whose end all devices would have to agree on: with U, V
    uniform, T = sqrt(n (U**(-2 / n) - 1)) cos(2 pi V) is Student's t with n degrees of freedom (Bailey 1994, Mathematics of
    Computation 62), and 1/2 + T / (2 sqrt(n + T**2)) is Beta(n / 2, n / 2). Here ratio = T**2 / n and n = 2 alpha.
    """
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(straight(keys))  # (B, 2)
    cosine = jnp.cos(2 * jnp.pi * uniforms[:, 1])
    ratio = jnp.expm1(-jnp.log(uniforms[:, 0]) / alpha) * cosine**2  # may be infinite: the share is then 0 or 1
    return 0.5 + 0.5 * jnp.sign(cosine) / jnp.sqrt(1 + 1 / ratio)


def _mix(batch: Batch, chosen: jax.Array, pixel_shares: jax.Array) -> Batch:
    """Mixes the `chosen` (B,) examples that may be mixed, with the own share `pixel_shares` of each pixel."""
    own, weights = batch['image'].astype(jnp.float32), batch.get('mix_weight', jnp.ones(len(chosen), jnp.float32))
    mixed = chosen & (_partners(batch['mask']) > 0) & (weights == 1)
    images = pixel_shares * own + (1 - pixel_shares) * _partners(own)
    kept = jnp.mean(pixel_shares, axis=(1, 2, 3))  # (B,)
    return batch | {
        'image': jnp.where(mixed[:, None, None, None], images, own),
        'mix_label': _partners(batch['label']),
        'mix_weight': jnp.where(mixed, kept + (1 - kept) * (1 - _partners(weights)), weights),
    }


def _partners(values: jax.Array) -> jax.Array:
    """Each example's partner: (B, ...) with the neighbours of every pair exchanged."""
    return values.reshape(-1, 2, *values.shape[1:])[:, ::-1].reshape(values.shape)  # (B / 2, 2, ...) and back
