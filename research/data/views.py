"""Two views of each image, weak and strong, for training that asks both for the same answer (FixMatch).

Shape letters: B batch, H height, W width, C channels.

    config.data.augment = ["views(strong=('flip', 'pad_crop', 'randaugment', 'cutout(size=8)'))", 'flip', 'pad_crop']

What stands before `views` in the list is common to both views; what stands behind it changes the weak view only, as here, where
both views are cropped, each by its own draw. With B = 2 images of 28 x 28 the batch that had 'image' (2, 28, 28, 1) uint8 has
'strong' (2, 28, 28, 1) uint8 besides.
"""

import jax

from research.core import registry
from research.core.errors import UsageError
from research.data.augment import STRONG, Augmentation, Batch, chain, images_of

NOT_INSIDE = {
    'mixup': 'it mixes labels, and a strong view has none',
    'cutmix': 'it mixes labels, and a strong view has none',
    'normalise': 'config.data.preprocess treats both views',
    'views': 'there is one strong view',
}


def views(*, strong: tuple[str | dict, ...] = ('randaugment', 'cutout(size=8)')) -> Augmentation:
    """Adds 'strong' (B, H, W, C): 'image' after the augmentations `strong` in order; 'image' itself stays as it is.

    An example's keys in the strong view differ from those of the other components, so nothing is drawn twice. The default is
    FixMatch's RandAugment and cutout (Sohn et al. 2020, arXiv:2001.07685, section 2.3), at fixed strength.

    Args:
      strong: augmentations, each spelt as in `config.data.augment`.

    Raises:
      UsageError: none is named, or one that does not exist, or one that makes no sense inside a view.
    """
    if not strong:
        raise UsageError('views.strong names no augmentation', "for example strong=('randaugment', 'cutout(size=8)')")
    components = [registry.component('augmentation', value, f'views.strong[{i}]') for i, value in enumerate(strong)]
    for component in components:
        if component.name in NOT_INSIDE:
            raise UsageError(f'views.strong names {component.name!r}', f'leave it out: {NOT_INSIDE[component.name]}')
    apply_strong = chain([component.build() for component in components])

    def apply(keys: jax.Array, batch: Batch) -> Batch:
        return batch | {STRONG: apply_strong(keys, batch | {'image': images_of(batch)})['image']}

    return apply
