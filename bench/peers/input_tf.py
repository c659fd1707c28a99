"""Shuffled, augmented batches of images in memory by tf.data, to be measured against.

    python bench/peers/input_tf.py DATA.npz      # 'image' uint8 (n, H, W, C), 'label'; answers JSON lines, see `input_peer.py`

Crops at a random place of the image padded by 4 pixels, and mirrors half of them. The images are padded once, before the clock
starts. Variants: 'record' maps one example at a time and batches then, 'batched' batches and maps whole batches (tf.image's
random crop has no batched form: here it is one gather), 'blocks' shuffles and batches indices alone and gathers the images by
them. Imports neither jax nor Fulcrum.
"""

import sys

import tensorflow as tf
from input_peer import PADDING, serve_arrays

VARIANTS = ('record', 'batched', 'blocks')
AHEAD = 2  # batches


def augment_one(image, label, shape):
    """One padded image (H + 8, W + 8, C) -> (H, W, C)."""
    return tf.image.random_flip_left_right(tf.image.random_crop(image, shape)), label


def augment_many(images, labels, shape):
    """Padded images (B, H + 8, W + 8, C) -> (B, H, W, C), by one gather of pixels."""
    height, width, channels = shape
    count, wide = tf.shape(images)[0], width + 2 * PADDING
    corners = tf.random.uniform((2, count, 1), 0, 2 * PADDING + 1, tf.int32)
    columns = tf.where(tf.random.uniform((count, 1)) < 0.5, tf.range(width - 1, -1, -1), tf.range(width)) + corners[1]  # (B, W)
    rows = tf.range(height) + corners[0]  # (B, H)
    places = rows[:, :, None] * wide + columns[:, None, :]  # (B, H, W)
    pixels = tf.reshape(images, (count, -1, channels))
    return tf.gather(pixels, places, batch_dims=1), labels


def pipeline(variant, images, labels, size):
    """The endless data set of batches."""
    count, shape = len(images), (images.shape[1] - 2 * PADDING, images.shape[2] - 2 * PADDING, images.shape[3])
    if variant == 'blocks':
        held = tf.constant(images), tf.constant(labels)
        found = tf.data.Dataset.range(count).shuffle(count).repeat().batch(size)
        found = found.map(lambda at: augment_many(tf.gather(held[0], at), tf.gather(held[1], at), shape))
    else:
        found = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(count).repeat()
        if variant == 'record':
            found = found.map(lambda image, label: augment_one(image, label, shape), num_parallel_calls=tf.data.AUTOTUNE)
            found = found.batch(size)
        else:
            found = found.batch(size).map(lambda image, label: augment_many(image, label, shape))
    return found.prefetch(AHEAD).as_numpy_iterator()


if __name__ == '__main__':
    serve_arrays(sys.argv[1], VARIANTS, {'tensorflow': tf.__version__}, pipeline)
