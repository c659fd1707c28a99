"""Contrastive learning of images and texts: an image and its caption belong together, all other pairs of the batch do not.

Shape letters: B batch, b rows of one device (under pmap; else B), E dimensions, T tokens, K classes.

    task = Contrastive(model=CLIP, data=spec, loss_function='clip', embedding=64)
    task.predict(variables, batch)            # {'image': (B, E), 'text': (B, E), 'scale': (), 'bias': ()}

The logit of image i and text j is scale * image_i . text_j + bias. Two pairs with the logits ((2, 0), (0, 2)) cost
log(1 + e^-2) = 0.127 each by 'clip'; with the logits ((2, -2), (-2, 2)), by 'siglip', 2 log(1 + e^-2) = 0.254 each.

An example's loss depends on the others of its batch. So microbatches (config.train.accumulate) do not add up to the whole batch
here, and a run with them is refused; and the loss of an evaluation depends on config.data.evaluation_batch_size. The metrics do
not: they compare each image with all texts of the split.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import UsageError, nearest
from research.core.terms import Terms, weighted
from research.data.sequences import Padded
from research.data.source import ArraySource
from research.parallel.mesh import DATA_AXIS
from research.tasks.base import EXTRAS, Batch, Keys, ModuleTask, Variables, cast, check_keys
from research.tasks.losses import unmasked
from research.tasks.metrics import make
from research.tasks.retrieval import retrieval_metrics
from research.tasks.states import Metric

FAR = -1e30  # the logit of a pair that is not there; finite, so that no gradient is 0 times infinity


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Contrastive(ModuleTask):
    """Tells an image's caption from all other captions of the batch, and a caption's image from all other images.

    The batch is the global one, over all devices, under jit and under pmap. The terms 'loss', 'accuracy' (the share of images
    whose most similar text is a caption of theirs) and 'scale' weigh every example alike.

    Attributes:
      inputs: the key of the batch that holds the images.
      texts: the key of the batch that holds the tokens, (B, T) int32; 'segment' (B, T) is 0 at padding.
      labels: the key of the batch that holds the classes; only the metric 'zero_shot' reads it.
      loss_function: 'clip' (see `softmax_loss`) or 'siglip' (see `sigmoid_loss`; the model needs a bias).
      embedding: E, dimensions of the space in which images and texts are compared.
      same_caption: whether examples whose captions are equal, token by token, belong together too.
      prompt: what stands for a class in 'zero_shot', with its name in place of {}; tokenised as by the transform `pad`.
      metrics: names of metrics, 'retrieval' and 'zero_shot', see `retrieval`.

    Raises:
      UsageError: the data have not these keys or (for 'zero_shot') no classes or tokenizer, or a value is out of range.
    """

    whole_batch: ClassVar[bool] = True  # the loss is no sum over microbatches

    inputs: str = 'image'
    texts: str = 'tokens'
    labels: str = 'label'
    loss_function: str = 'clip'
    embedding: int = 128
    same_caption: bool = True
    prompt: str = 'A picture of {}.'
    metrics: tuple[str, ...] | dict[str, Metric] = ('retrieval',)

    def __post_init__(self):
        check_keys(self.data, (self.inputs, self.texts))
        if self.loss_function not in LOSSES:
            raise UsageError(f'loss_function {self.loss_function!r} does not exist', nearest(self.loss_function, LOSSES))
        if self.embedding < 1:
            raise UsageError(f'embedding is {self.embedding}, below 1', 'try embedding=128')
        if self.loss_function == 'siglip' and getattr(self.module, 'initial_bias', 0.0) is None:
            raise UsageError("loss_function='siglip' needs a bias, and this model has none", "set config.model='siglip'")
        object.__setattr__(self, 'metrics', make(self.metrics, retrieval_metrics(self.texts), self.embedding, self.labels))
        _ = self.prompts  # raises on classes and prompts that do not fit

    @property
    def num_outputs(self) -> int:
        """E."""
        return self.embedding

    @functools.cached_property
    def prompts(self) -> dict[str, np.ndarray] | None:
        """The prompts of the classes as rows like those of the data, 'tokens' and 'segment' (K, T) int32; None: unused."""
        if 'zero_shot' not in self.metrics:
            return None
        if not self.data.class_names or self.data.tokenizer is None:
            raise UsageError("metric 'zero_shot' needs class names and a tokenizer", "use metrics=('retrieval',)")
        check_keys(self.data, (self.labels,))
        if '{}' not in self.prompt:
            raise UsageError(f'prompt={self.prompt!r} has no place for the name of a class', "write {} there: 'A {}.'")
        texts = np.array([self.prompt.replace('{}', name) for name in self.data.class_names], object)
        source, length = ArraySource({'text': texts}), self.data.examples[self.texts][0][0]
        rows, longer = (
            Padded(source, self.data.tokenizer, size, 'text', special=True)[np.arange(len(texts))]
            for size in (length, length + 1)
        )
        cut = np.flatnonzero(longer['segment'][:, -1])
        if len(cut):
            raise UsageError(f'{texts[cut[0]]!r} has more than the {length} tokens of a row', 'shorten prompt, or raise length')
        return rows

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """The images, the tokens of the texts, and their segments."""
        extras = {EXTRAS['segment']: batch['segment']} if 'segment' in batch else {}
        return self.ready({'inputs': batch[self.inputs], 'texts': batch[self.texts], **extras}, batch)

    def loss(self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool) -> tuple[Terms, dict[str, Any]]:
        """The terms of one batch and the new model state."""
        outputs, state = self.apply(variables, batch, rngs, train)
        return self.terms(outputs, batch), state

    def predict(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        """'image' and 'text' (B, E), 'scale' and 'bias'; for 'zero_shot' also 'classes' (K, E)."""
        outputs = self.apply(variables, batch, None, train=False)[0]
        if self.prompts is None:
            return outputs
        tokens, segments = (jnp.asarray(self.prompts[name]) for name in ('tokens', 'segment'))
        classes = self.module.apply(self.ready_variables(variables), tokens, segments=segments, method='encode_text')
        return {**outputs, 'classes': cast(classes, jnp.float32)}

    def terms(self, outputs: Mapping[str, jax.Array], batch: Batch) -> Terms:
        """The terms of float32 `outputs`: 'image' and 'text' (b, E), 'scale' and 'bias' ()."""
        mask = jnp.asarray(batch['mask'], jnp.float32)
        image, text = (unmasked(outputs[name], mask) for name in ('image', 'text'))  # (b, E)
        every_image, every_text, present = everywhere((image, text, mask > 0))  # (B, E), (B, E), (B,)
        by_image = outputs['scale'] * image @ every_text.T + outputs['bias']  # (b, B)
        by_text = outputs['scale'] * text @ every_image.T + outputs['bias']  # (b, B)
        together = self._together(batch, mask)
        loss = LOSSES[self.loss_function](by_image, by_text, together, present)  # (b,)
        nearest_text = jnp.argmax(jnp.where(present, by_image, FAR), axis=1)[:, None]  # (b, 1)
        right = jnp.take_along_axis(together, nearest_text, axis=1)[:, 0]  # (b,)
        scale = jnp.broadcast_to(outputs['scale'], mask.shape)
        return {'loss': weighted(loss, mask), 'accuracy': weighted(right, mask), 'scale': weighted(scale, mask)}

    def _together(self, batch: Batch, mask: jax.Array) -> jax.Array:
        """Which examples of the global batch belong together with those of this device, (b, B) bool."""
        present, ids, tokens = mask > 0, batch['id'], jnp.asarray(batch[self.texts])
        if 'segment' in batch:
            tokens = jnp.where(batch['segment'] > 0, tokens, -1)
        every_present, every_id, every_row = everywhere((present, ids, tokens))
        together = ids[:, None] == every_id  # (b, B)
        if self.same_caption:
            together |= (tokens[:, None] == every_row).all(-1)
        return together & present[:, None] & every_present


def softmax_loss(by_image: jax.Array, by_text: jax.Array, together: jax.Array, present: jax.Array) -> jax.Array:
    """The mean of two cross-entropies: of the texts for each image, and of the images for each text; (b,) nats.

    Radford et al. 2021 (arXiv:2103.00020), figure 3. An example with several partners has them as targets to equal shares, as
    in Khosla et al. 2020 (arXiv:2004.11362), equation 2.

    Args:
      by_image: logits of image i and every text, (b, B).
      by_text: logits of text i and every image, (b, B).
      together: which pairs belong together, (b, B) bool.
      present: which examples there are, (B,) bool.
    """

    def cross_entropy(logits: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(jnp.where(present, logits, FAR))  # (b, B)
        return -jnp.sum(jnp.where(together, log_p, 0.0), 1) / jnp.maximum(together.sum(1), 1)

    return (cross_entropy(by_image) + cross_entropy(by_text)) / 2


def sigmoid_loss(by_image: jax.Array, by_text: jax.Array, together: jax.Array, present: jax.Array) -> jax.Array:
    """For each image the sum over all texts of -log sigmoid(+-logit), + where they belong together; (b,) nats.

    Zhai et al. 2023 (arXiv:2303.15343), equation 1: every pair is a decision of its own, and the mean over a batch divides by
    B, not B^2. The arguments are those of `softmax_loss`; `by_text` holds the same pairs again.
    """
    del by_text
    signs = jnp.where(together, 1.0, -1.0)
    return -jnp.sum(jnp.where(present, jax.nn.log_sigmoid(signs * by_image), 0.0), 1)


LOSSES = {'clip': softmax_loss, 'siglip': sigmoid_loss}


def everywhere(tree: Any) -> Any:
    """The rows of all devices, in their order, of arrays (b, ...): (B, ...). Under jit arrays are global as they are.

    The gradient of a row adds up what it is in all devices' losses, so the sum of their gradients is that of the global loss.
    """
    try:
        return jax.lax.all_gather(tree, DATA_AXIS, tiled=True)
    except NameError:  # there is no such axis: this is not under pmap
        return tree
