"""The experiment: every key a config may hold, with its type, default, unit and meaning. The only source of keys.

A config file starts from `default_config()` (a locked ConfigDict), edits it and returns it; `resolve` turns it into a frozen
`Experiment` and is the only way in: unknown, misspelt, mistyped and out-of-range keys are refused with the nearest valid
name. Reading this module imports neither jax nor any component.

    config = default_config()
    config.model = 'cnn(features=(32, 64))'
    config.train.duration = '10 epochs'
    experiment = resolve(config)        # experiment.train.duration == Duration(10.0, 'epochs')

An *open* section is a component: `name` plus the component's own keyword arguments (`core/registry.py`). A field marked
`resumable` does not change what is trained: a run may be resumed with another value of it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from research.core import durations, fields, files
from research.core.durations import Duration
from research.core.errors import UsageError, nearest
from research.core.fields import value
from research.core.registry import Component


@dataclasses.dataclass(frozen=True)
class Data:
    """What is learned from."""

    source: Component = value('digits', 'where the examples come from', kind='source')
    validation: float = value(
        0.1, 'share of the training split held out for validation where the data set has no such split', low=0.0, high=0.9
    )
    test: float = value(0.2, 'share held out for the test where the data set has no such split', low=0.0, high=0.9)
    budget: str | None = value(
        None, "data budget: train on a nested, class-stratified subset, '5%' or '1000 examples'; None: all"
    )
    subset_seed: int = value(0, 'which nested family of subsets a budget draws from', low=0)
    tokenizer: Component | None = value(
        None, "between text and token ids; made from the training texts, e.g. 'bpe(vocabulary_size=8192)'", kind='tokenizer'
    )
    transforms: tuple[Component, ...] = value(
        (),
        'what all splits go through before training, in order; it learns from the training split alone',
        kind='transform',
        many=True,
    )
    batch_size: int = value(128, 'examples in one step, over all devices and hosts', unit='examples', low=1)
    evaluation_batch_size: int = value(
        512, 'examples in one evaluation batch, over all devices', unit='examples', low=1, resumable=True
    )
    augment: tuple[Component, ...] = value(
        (), 'augmentations of training batches, in order, on the 0..255 image', kind='augmentation', many=True
    )
    preprocess: tuple[Component, ...] = value(
        ('normalise',), 'what every batch goes through, in training and evaluation', kind='augmentation', many=True
    )
    placement: str = value(
        'host', 'where the examples wait: host memory, or whole on every device', choices=('host', 'device'), resumable=True
    )
    prefetch: int = value(
        2,
        'batches prepared ahead by a background thread, or as many as short steps on a CPU take at once; 0: none',
        unit='batches',
        low=0,
        resumable=True,
    )
    on_bad_record: str = value(
        'stop',
        "a record that cannot be read: 'stop' names it, 'skip' leaves it out under mask 0 and counts it",
        choices=('stop', 'skip'),
        resumable=True,
    )
    max_bad_share: float = value(
        0.01, 'share of the records of a split that may be skipped; one more ends the run', low=0.0, high=1.0, resumable=True
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the learning rate moves (open: the shape's own arguments)."""

    name: str = value('constant', 'shape of the learning rate after warm-up', component='schedule')
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    warmup: Duration = value('0 steps', "linear warm-up from near zero; '5%' counts against the run", unit='duration')

    @property
    def component(self) -> Component:
        """The shape with its arguments."""
        return Component('schedule', self.name, self.arguments)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How the parameters move (open: the algorithm's own arguments)."""

    name: str = value('adam', 'the algorithm', component='optimizer')
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    learning_rate: float = value(1e-3, 'peak learning rate', above=0.0)
    schedule: Schedule = value(None, 'learning-rate schedule', section=Schedule)
    weight_decay: float | None = value(
        None, "decoupled decay is multiplied by the learning rate; None: the algorithm's own (adamw 1e-4, others 0)", low=0.0
    )
    decay: str = value('decoupled', "'decoupled' from the gradient (AdamW) or 'l2' added to it", choices=('decoupled', 'l2'))
    decay_rules: tuple[tuple[str, float], ...] | None = value(
        None, 'named-leaf rules: multiplier of the decay; None: kernels and embeddings only', rules=True
    )
    rate_rules: tuple[tuple[str, float | None], ...] = value(
        (('.*', 1.0),), 'named-leaf rules: multiplier of the learning rate; None freezes the leaf', rules=True
    )
    layer_decay: float = value(
        1.0, 'factor on the learning rate from each layer to the one below it; 1: the same for all', above=0.0, high=1.0
    )
    clip: Component | None = value(None, 'gradient clipping', kind='clip')

    @property
    def component(self) -> Component:
        """The algorithm with its arguments."""
        return Component('optimizer', self.name, self.arguments)


@dataclasses.dataclass(frozen=True)
class EarlyStop:
    """When to stop before the end."""

    metric: str | None = value(None, "stop when this stops improving, e.g. 'validation/loss'; None: never")
    mode: str | None = value(
        None, "whether less ('min') or more ('max') is better; None: as the metric's name says", choices=('min', 'max')
    )
    patience: int = value(5, 'evaluations without improvement that are borne', unit='evaluations', low=1)
    margin: float = value(0.0, 'improvement that counts as one', low=0.0)


@dataclasses.dataclass(frozen=True)
class Train:
    """How long and how one step is taken."""

    duration: Duration = value(
        '10 epochs', "compute budget: '10 epochs', '2000 steps', '50000 examples', '1e9 tokens' or '1e15 flops'"
    )
    accumulate: int | None = value(
        None,
        'microbatches whose gradients are added up to one step; None: 1, or what keeps a convolutional network, whose results '
        "it does not change, in a CPU's cache",
        low=1,
    )
    precision: str = value('float32', 'dtype of the computation; parameters stay float32', choices=('float32', 'bfloat16'))
    ema: float = value(0.0, 'decay of the parameter average that is evaluated; 0: none', low=0.0, high=1.0)
    skip_nonfinite: bool = value(True, 'leave the state as it is where a gradient is not finite, and count it')
    max_skips: int = value(
        20,
        'skipped steps in a row, seen at a log step, after which the run goes back to its last good checkpoint',
        low=1,
        resumable=True,
    )
    spike_sigmas: float | None = value(
        30.0,
        'deviations by which the loss must jump for the run to go back to its last good checkpoint; None: never',
        above=0.0,
        resumable=True,
    )
    max_rollbacks: int = value(
        3, 'times that a run goes back and leaves the batches between out; then it ends with code 76', low=0, resumable=True
    )
    grace_seconds: float = value(
        25.0, 'time from the first signal to the end of the process, saved or not', unit='seconds', above=0.0, resumable=True
    )
    audit_every: Duration = value(
        '0 steps', 'period of the replay audit: a step is taken twice and must give the same bits; 0: never', resumable=True
    )
    early_stop: EarlyStop = value(None, 'early stopping', section=EarlyStop)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """When and on what the model is evaluated."""

    every: Duration = value('10%', "period of the evaluations; '0 steps': only at the end")
    splits: tuple[str, ...] = value(('validation',), 'splits of the periodic evaluations')
    limit: int | None = value(
        None, 'periodic evaluations see about so many examples of a split, in evenly spaced batches; None: all', low=1
    )
    final: tuple[str, ...] = value(('validation', 'test'), 'splits evaluated at the end', resumable=True)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is kept of a run."""

    every: Duration = value('10%', "period of the checkpoints; '0 steps': only at the end", resumable=True)
    keep: int = value(2, 'newest checkpoints kept', low=1, resumable=True)
    temporary_minutes: float | None = value(
        10.0,
        'a temporary checkpoint is saved when the last one of any kind is so old; None: never',
        unit='minutes',
        above=0.0,
        resumable=True,
    )
    retry_minutes: float = value(
        10.0,
        'how long a save that fails is tried again before the run ends with code 74',
        unit='minutes',
        low=0.0,
        resumable=True,
    )
    best: str | None = value(None, "keep the best state too, judged by this, e.g. 'validation/accuracy'", resumable=True)
    best_mode: str | None = value(
        None, "whether more ('max') or less ('min') is better; None: as its name says", choices=('min', 'max'), resumable=True
    )


@dataclasses.dataclass(frozen=True)
class Log:
    """What is told, and how often."""

    every: Duration = value('50 steps', 'period of the training records', resumable=True)
    plain_every: float = value(5.0, 'period of lines where there is no terminal', unit='seconds', above=0.0, resumable=True)
    tensorboard: bool = value(True, 'write TensorBoard event files', resumable=True)
    model_table: bool = value(True, 'print the table of layers, parameters and FLOPs at the start', resumable=True)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How the step is laid over devices."""

    compile: str = value('jit', 'jit with NamedSharding, or pmap over the data axis', choices=('jit', 'pmap'))
    distributed: str = value(
        'auto',
        "several processes: 'on', 'off', or where the environment says so (JAX_COORDINATOR_ADDRESS, Slurm, TPU, ...)",
        choices=('auto', 'on', 'off'),
        resumable=True,
    )
    devices: int | None = value(None, 'how many of the visible devices to use; None: all', low=1, resumable=True)
    model_axis: int = value(
        1, 'devices that share each layer (tensor parallelism); a batch is cut over the groups', low=1, resumable=True
    )
    fsdp: bool = value(False, 'cut large parameters and their optimiser state over the data axis too', resumable=True)
    rules: tuple[tuple[str, tuple], ...] | None = value(
        None,
        "named-leaf rules: partition spec of each leaf of the state; None: the model's own where model_axis > 1",
        rules=True,
        resumable=True,
    )


@dataclasses.dataclass(frozen=True)
class Watchdog:
    """How long a phase may go on without progress; then every stack is written down and the process ends with code 124."""

    start: float = value(1800.0, 'imports, data, model, until the first state', unit='seconds', above=0.0, resumable=True)
    restore: float = value(3600.0, 'reading a checkpoint', unit='seconds', above=0.0, resumable=True)
    compile: float = value(3600.0, 'compiling the step', unit='seconds', above=0.0, resumable=True)
    data: float = value(1800.0, 'waiting for one batch', unit='seconds', above=0.0, resumable=True)
    train: float = value(1800.0, 'one step', unit='seconds', above=0.0, resumable=True)
    evaluate: float = value(1800.0, 'one batch of an evaluation', unit='seconds', above=0.0, resumable=True)
    save: float = value(3600.0, 'one save', unit='seconds', above=0.0, resumable=True)


@dataclasses.dataclass(frozen=True)
class Export:
    """What `--mode=export` writes."""

    format: str = value('hf', "'hf': a Hugging Face folder with safetensors", choices=('hf',), resumable=True)
    directory: str | None = value(None, 'where to; None: export/FORMAT in the run directory', resumable=True)
    state: str = value('newest', 'which checkpoint of the run', choices=('newest', 'best'), resumable=True)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run, whole and typed."""

    name: str = value('', 'name of the experiment; empty: that of the config file', resumable=True)
    seed: int = value(42, 'seed of initialisation, order and augmentation', low=0, high=2**31 - 1)
    data: Data = value(None, 'the data', section=Data)
    model: Component = value('cnn', 'the network', kind='model')
    task: Component = value('classify', 'what is learned: loss and metrics', kind='task')
    adapter: Component | None = value(
        None, "parameter-efficient training of a model that is loaded by init_from, e.g. 'lora(rank=8)'", kind='adapter'
    )
    optimizer: Optimizer = value(None, 'the optimiser', section=Optimizer)
    train: Train = value(None, 'the training', section=Train)
    evaluate: Evaluate = value(None, 'the evaluation', section=Evaluate)
    checkpoint: Checkpoint = value(None, 'the checkpoints', section=Checkpoint)
    log: Log = value(None, 'the log', section=Log)
    parallel: Parallel = value(None, 'the devices', section=Parallel)
    watchdog: Watchdog = value(None, 'bounds of the phases', section=Watchdog)
    export: Export = value(None, 'the export of a trained run', section=Export)
    init_from: str | None = value(
        None, 'run directory (newest parameters, averaged if kept) or Hugging Face folder that this run starts from'
    )
    init_rules: tuple[tuple[str, bool], ...] = value(
        (('.*', True),), 'named-leaf rules: which leaves init_from must give (True), which start fresh (False)', rules=True
    )
    price_per_device_hour: float | None = value(
        None, 'what one device costs; None: unknown, and so is the money spent', unit='USD', low=0.0, resumable=True
    )


def default_config() -> Any:
    """A locked `ml_collections.ConfigDict` with every key and its default, in the form that a config file edits."""
    config: Any = ConfigDict(fields.defaults(Experiment), type_safe=False)
    config.lock()
    for section in (config.data.source, config.model, config.task, config.optimizer, config.optimizer.schedule):
        section.unlock()  # open: it takes its component's arguments
    return config


def fetched(path: str) -> str:
    """Where `python -m bench.data` puts what it fetches: `path` in $FULCRUM_DATA or its default."""
    return str(files.data_folder() / path)


def choose(argument: str, value: str, choices: Mapping[str, Any]) -> Any:
    """What `choices` have for an argument of a config file; refuses other values with the nearest one."""
    if value not in choices:
        raise UsageError(f"the config's argument {argument}={value!r} is unknown", nearest(value, choices))
    return choices[value]


def resolve(config: Any) -> Experiment:
    """The checked experiment that a config (ConfigDict or nested dict) describes.

    Raises:
      UsageError: an unknown, misspelt, mistyped or out-of-range key, with the nearest valid name.
    """
    experiment = fields.build(Experiment, Experiment, config, 'config')
    _check_together(experiment)
    return experiment


@dataclasses.dataclass(frozen=True)
class Change:
    """One difference between two experiments; `resumable` if a run may go on with it."""

    path: str
    old: Any
    new: Any
    resumable: bool

    def __str__(self) -> str:
        return f'{self.path}: {self.old!r} -> {self.new!r}'


def differences(old: Experiment, new: Experiment) -> list[Change]:
    """Every field in which two experiments differ, by path."""
    olds, news = fields.flat(fields.to_plain(old)), fields.flat(fields.to_plain(new))
    free = [path for path, field in fields.walk(Experiment) if 'resumable' in field.metadata]
    changed = [p for p in sorted(olds | news) if olds.get(p) != news.get(p)]
    return [Change(p, olds.get(p), news.get(p), any(p == f or p.startswith(f + '.') for f in free)) for p in changed]


def parse_budget(text: str) -> Duration:
    """A data budget, '5%' or '1000 examples', as an amount with its unit."""
    fix = "write a share such as '5%' or a count such as '1000 examples'"
    try:
        budget = durations.parse(text)
    except UsageError as error:
        raise UsageError(f'config.data.budget is {text!r}', fix) from error
    is_share = budget.unit == '%' and 0 < budget.amount <= 100
    if not is_share and not (budget.unit == 'examples' and budget.amount >= 1):
        raise UsageError(f'config.data.budget is {text!r}', fix)
    return budget


def _check_together(experiment: Experiment) -> None:
    """Rules that bind several fields."""
    data, train = experiment.data, experiment.train
    if data.batch_size % (train.accumulate or 1):
        raise UsageError(
            f'config.train.accumulate={train.accumulate} does not divide config.data.batch_size={data.batch_size}',
            'choose a batch size that is a multiple of it',
        )
    if train.duration.unit == '%' or train.duration.amount <= 0:
        raise UsageError(f"config.train.duration is '{train.duration}'", "write '10 epochs', '2000 steps' or '1e15 flops'")
    if data.validation + data.test >= 1:
        raise UsageError(
            f'config.data.validation={data.validation} and config.data.test={data.test} leave nothing to train on',
            'make their sum less than 1',
        )
    if experiment.parallel.compile == 'pmap' and (experiment.parallel.model_axis > 1 or experiment.parallel.fsdp):
        raise UsageError(
            'config.parallel.compile=pmap keeps the whole state on every device, model_axis and fsdp cut it',
            'use config.parallel.compile=jit',
        )
    if experiment.init_from is None and any(value is not True for _, value in experiment.init_rules):
        raise UsageError('config.init_rules leave leaves fresh, but nothing is loaded', 'set config.init_from')
    watched = [m for m in (train.early_stop.metric, experiment.checkpoint.best) if m is not None]
    if watched and experiment.evaluate.every.amount == 0:
        raise UsageError(f'{watched[0]!r} is watched, but nothing is evaluated before the end', 'set config.evaluate.every')
    if data.budget is not None:
        parse_budget(data.budget)
