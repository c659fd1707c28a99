"""Learning from few labels by consistency: FixMatch (Sohn et al. 2020, arXiv:2001.07685).

Shape letters: B batch, K classes.

A batch holds labelled and unlabelled examples ('labelled', 1 or 0; the data transform `few_labels` makes it), each as a weakly
augmented 'image' and a 'strong' one (the augmentation `views`). The model's own answer on the weak view, where it is sure,
is the label that the strong view is trained on:

    loss = mean over labelled examples of CE(weak, label)
         + unlabelled_weight * mean over all examples of 1[max p >= threshold] CE(strong, argmax p),   p = softmax(weak)

In one (sum, weight) pair: where a share s = 1 / (1 + unlabelled) of all examples is labelled, the mean over them is their sum
divided by s B. So every example adds (1 + unlabelled) * labelled * CE + unlabelled_weight * 1[...] CE to the sum, and 1 to the
weight. The share is a constant of the mixture, not counted in the batch: microbatches and devices add up to the same loss
however the labelled examples fall among them. With 2 of 16 examples labelled, CE 0.5 and 0.7, and three sure ones with CE 0.4,
0.8 and 2.0: (8 * 1.2 + 3.2) / 16 = 0.8 = 0.6 + 0.2.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research.core.errors import UsageError
from research.core.terms import Terms, weighted
from research.tasks.base import Batch, Keys, Variables
from research.tasks.classify import Classify
from research.tasks.losses import cross_entropy, in_range, unmasked


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FixMatch(Classify):
    """Classification from few labels; outputs are logits (B, K). Evaluation, and the metrics, are those of `Classify`.

    In training one call of the module sees both views of all examples, so batch statistics do too. `label_smoothing`,
    `focal_gamma` and `class_weights` apply to the labelled part, whose sum is divided by the number of labelled examples, not
    by their weights. The labels of unlabelled examples may be anything: neither loss nor accuracy looks at them.

    Terms beside 'loss': 'accuracy' of the weak view on labelled examples; 'labelled_share', which must come to
    1 / (1 + unlabelled); 'pseudo_share', of the examples whose pseudo-label counts; 'pseudo_accuracy', of those among them
    whose label is a class (after `few_labels`, which hides the others, only the labelled ones: an optimistic number).

    Attributes:
      labels: the key of the batch that holds the classes, (B,) int.
      unlabelled: unlabelled examples for each labelled one, as in `few_labels`.
      threshold: least probability at which a pseudo-label counts, in [0, 1].
      unlabelled_weight: weight of the consistency part (lambda_u of the paper), >= 0.
      temperature: logits of the weak view are divided by it before the probability is compared, > 0.

    Raises:
      UsageError: as `Classify`; the data do not say what is labelled, or have another share of it, or a value is out of range;
        in training, batches without the strong view, or with mixed labels.
    """

    unlabelled: int = 7
    threshold: float = 0.95
    unlabelled_weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if 'labelled' not in self.data.examples:
            raise UsageError(
                "task fixmatch needs 'labelled', which these examples have not",
                "set config.data.transforms, e.g. to few_labels(labels='400 examples')",
            )
        for name, rule, is_right in (
            ('unlabelled', 'at least 0', self.unlabelled >= 0),
            ('threshold', 'in [0, 1]', 0 <= self.threshold <= 1),
            ('unlabelled_weight', 'at least 0 and finite', 0 <= self.unlabelled_weight < float('inf')),
            ('temperature', 'above 0 and finite', 0 < self.temperature < float('inf')),
        ):
            if not is_right:
                raise UsageError(f'{name} is {getattr(self, name)}, but must be {rule}', f'set config.task.{name} so')
        if self.data.unlabelled not in (None, self.unlabelled):
            raise UsageError(
                f'task fixmatch has unlabelled={self.unlabelled}, the transform few_labels {self.data.unlabelled}',
                f'set config.task.unlabelled to {self.data.unlabelled}',
            )

    def loss(self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool) -> tuple[Terms, dict[str, Any]]:
        """The terms of one batch and the new model state; in evaluation those of `Classify`."""
        if not train:
            return super().loss(variables, batch, rngs, train)
        outputs, state = self.apply(variables, self._both_views(batch), rngs, train)  # (2 B, K)
        pairs = outputs.reshape(-1, 2, outputs.shape[-1])  # (B, 2, K)
        return self._terms_of_views(pairs[:, 0], pairs[:, 1], batch), state

    def _both_views(self, batch: Batch) -> Batch:
        """A batch of 2 B images: weak and strong view of each example side by side, so that devices keep their own examples."""
        if 'strong' not in batch:
            raise UsageError("task fixmatch needs the batch's 'strong' view", "add 'views' to config.data.augment")
        if 'mix_label' in batch:
            raise UsageError('task fixmatch cannot use mixed images', 'take mixup and cutmix out of config.data.augment')
        weak, strong = jnp.asarray(batch[self.inputs]), jnp.asarray(batch['strong'])
        if (weak.shape, weak.dtype) != (strong.shape, strong.dtype):
            raise UsageError(
                f'the weak view is {weak.dtype}{weak.shape}, the strong one {strong.dtype}{strong.shape}',
                'let config.data.preprocess treat both alike, as normalise does',
            )
        pairs = jnp.stack([weak, strong], axis=1)  # (B, 2, H, W, C)
        return {self.inputs: pairs.reshape(-1, *pairs.shape[2:]), 'mask': jnp.repeat(batch['mask'], 2)}  # (2 B, ...)

    def _terms_of_views(self, weak: jax.Array, strong: jax.Array, batch: Batch) -> Terms:
        """The terms of float32 logits (B, K) of both views."""
        mask = jnp.asarray(batch['mask'], jnp.float32)
        weak, strong = unmasked(weak, mask), unmasked(strong, mask)
        known = mask * unmasked(batch['labelled'], mask)  # (B,)
        given, _, correct = self._against(unmasked(batch[self.labels], known), weak)
        probabilities = jax.lax.stop_gradient(jax.nn.softmax(weak / self.temperature))  # (B, K)
        sure = mask * (probabilities.max(-1) >= self.threshold)  # (B,)
        pseudo = jnp.argmax(probabilities, -1)  # (B,)
        supervised, num_known = weighted(given, known)
        consistency, num_sure = weighted(cross_entropy(strong, pseudo), sure)
        labels, count = unmasked(batch[self.labels], mask), jnp.sum(mask)
        return {
            'loss': ((1 + self.unlabelled) * supervised + self.unlabelled_weight * consistency, count),
            'accuracy': weighted(correct, known),
            'labelled_share': (num_known, count),
            'pseudo_share': (num_sure, count),
            'pseudo_accuracy': weighted(pseudo == labels, sure * in_range(labels, self.num_outputs)),
        }
