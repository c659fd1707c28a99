"""The reference program: TensorFlow's CIFAR-10 tutorial in Keras, paced, to be measured against.

    python bench/peers/cnn_keras.py DATA.npz

    {"do": "steps", "batch": 32, "count": 40}    {"do": "accuracy", "batch": 32, "seed": 0, "every": 100, ...}

`model.compile(adam, sparse cross-entropy from logits, accuracy)` and `model.fit` as the tutorial has them, but without the
progress bar, on float arrays in memory. A callback answers after every `count` batches and waits for the next request within
the epoch. Imports neither jax nor Fulcrum.
"""

import contextlib
import json
import os
import sys
import time

import numpy as np

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('KERAS_BACKEND', 'tensorflow')
import tensorflow as tf
from tensorflow.keras import layers, models


def make_model():
    """The tutorial's network, compiled."""
    model = models.Sequential(
        [
            layers.Input((32, 32, 3)),
            layers.Conv2D(32, (3, 3), activation='relu'),
            layers.MaxPooling2D((2, 2)),
            layers.Conv2D(64, (3, 3), activation='relu'),
            layers.MaxPooling2D((2, 2)),
            layers.Conv2D(64, (3, 3), activation='relu'),
            layers.Flatten(),
            layers.Dense(64, activation='relu'),
            layers.Dense(10),
        ]
    )
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer='adam', loss=loss, metrics=['accuracy'])
    return model


class EnoughError(Exception):
    """Ends a training from within a callback."""


class Pace(tf.keras.callbacks.Callback):
    """Answers after every `count` batches and waits for the next request; ends the training at any other request."""

    def __init__(self, request, replies):
        super().__init__()
        self.request, self.replies, self.next = request, replies, None
        self.begin()

    def begin(self):
        """Starts the clock."""
        self.left, self.wall, self.cpu = self.request['count'], time.perf_counter(), time.process_time()

    def on_train_batch_end(self, batch, logs=None):
        """Counts a batch."""
        self.left -= 1
        if self.left:
            return
        answer = {'seconds': time.perf_counter() - self.wall, 'cpu': time.process_time() - self.cpu}
        self.next = exchange(answer, self.replies)
        if self.next == self.request:
            self.begin()
        else:
            self.model.stop_training = True
            raise EnoughError


class Until(tf.keras.callbacks.Callback):
    """Evaluates every `every` batches, off the clock, until the target is reached."""

    def __init__(self, request, test):
        super().__init__()
        self.request, self.test, self.seconds, self.cpu, self.steps, self.reached = request, test, 0.0, 0.0, 0, False
        self.begin()

    def begin(self):
        """Starts the clock."""
        self.wall, self.cpu_from = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, batch, logs=None):
        """Counts a batch; the clock begins after the first, in which the program is traced."""
        self.steps += 1
        if self.steps == 1:
            self.begin()
        if self.steps % self.request['every'] and self.steps < self.request['most']:
            return
        self.seconds += time.perf_counter() - self.wall
        self.cpu += time.process_time() - self.cpu_from
        # Not model.evaluate, which would change the epoch that is running.
        right = [(self.model(x, training=False).numpy().argmax(1) == y).mean() for x, y in self.test]
        self.reached = float(np.mean(right)) >= self.request['target']
        if self.reached or self.steps >= self.request['most']:
            self.model.stop_training = True
            raise EnoughError
        self.begin()


def exchange(answer, replies):
    """Sends an answer; the next request, or None at the end of input."""
    replies.write(json.dumps(answer) + '\n')
    replies.flush()
    line = sys.stdin.readline()
    return json.loads(line) if line else None


def fit(data, batch, callback):
    """Trains until the callback has had enough."""
    with contextlib.suppress(EnoughError):
        make_model().fit(data['x_train'], data['y_train'], batch_size=batch, epochs=1000, verbose=0, callbacks=[callback])


def main(path):
    """Answers requests line by line."""
    replies, sys.stdout = sys.stdout, open(os.devnull, 'w')  # noqa: SIM115 - what is printed goes there
    if os.environ.get('OMP_NUM_THREADS') == '1':
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    data = dict(np.load(path))
    data['x_train'], data['x_test'] = data['x_train'] / np.float32(255), data['x_test'] / np.float32(255)
    test = [(data['x_test'][i : i + 500], data['y_test'][i : i + 500]) for i in range(0, len(data['x_test']), 500)]
    request = json.loads(sys.stdin.readline())
    while request is not None:
        if request['do'] == 'versions':
            request = exchange({'tensorflow': tf.__version__, 'keras': tf.keras.__version__}, replies)
        elif request['do'] == 'steps':
            pace = Pace(request, replies)
            fit(data, request['batch'], pace)
            request = pace.next
        else:
            tf.keras.utils.set_random_seed(request['seed'])
            until = Until(request, test)
            fit(data, request['batch'], until)
            found = {'seconds': until.seconds, 'cpu': until.cpu, 'steps': until.steps, 'reached': until.reached}
            request = exchange(found, replies)


if __name__ == '__main__':
    main(sys.argv[1])
