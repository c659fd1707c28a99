"""One run as an object: what the loop and its hooks share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from research.core import files
from research.core.clock import Clock
from research.core.durations import Duration, Facts
from research.core.redact import redact
from research.core.schema import Experiment
from research.data.bad_records import BadRecords
from research.data.pipeline import Feed
from research.data.plan import unique_examples
from research.data.source import Source, Tokenizer
from research.parallel import hosts
from research.parallel.votes import Votes
from research.train.evaluate import Evaluator
from research.train.progress import Reporter
from research.train.run_directory import RunDirectory
from research.train.state import TrainState
from research.train.writer import Writer


@dataclasses.dataclass
class Run:
    """What a run is made of, and how far it has come.

    Attributes:
      facts: batch size, examples of an epoch, FLOPs of a step, total steps.
      evaluate: variables and split name -> results.
      record: what run.json will say.
      tokenizer: what made the token ids; it is kept in the run directory; None for data that are no text.
      bad_records: what could not be read; None where the first such record stops the run.
      earlier: what the checkpoint that the run goes on from says: seconds by phase, device-seconds, the open log record.
      results: the newest results of each split and their step.
      windows: the batches that are left out, see `rollback.py`.
      stop: why the run ends before its last step; None as long as it goes on.
      is_cut_short: the steps, or what belongs to the last of them, were left because of a signal.
    """

    experiment: Experiment
    directory: RunDirectory
    mesh: Mesh
    clock: Clock
    votes: Votes
    reporter: Reporter
    writer: Writer
    facts: Facts
    splits: dict[str, Source]
    evaluator: Evaluator
    evaluation_feeds: dict[str, tuple[Feed, int]]
    learning_rate: Callable[[Any], Any]
    record: dict[str, Any]
    tokenizer: Tokenizer | None = None
    bad_records: BadRecords | None = None
    earlier: dict[str, Any] = dataclasses.field(default_factory=dict)
    results: dict[str, tuple[int, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    windows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    stop: str | None = None
    is_cut_short: bool = False
    _evaluated: set[tuple[str, int, int | None]] = dataclasses.field(default_factory=set)

    def remember(self, step: int) -> None:
        """Takes the evaluations of exactly `step` from the record: they are not made, nor recorded, again."""
        self._evaluated, self.results = set(), {}
        for record in hosts.share([r for r in self.directory.read_metrics() if r['step'] == step]):
            if record['split'] != 'train':
                values = {name: _number_of(v) for name, v in record.items() if name not in ('step', 'split', 'time', 'limit')}
                self.results[record['split']] = step, values
                self._evaluated.add((record['split'], step, record.get('limit')))

    def write_record(self) -> None:
        """Writes run.json, and the tokenizer beside it: what a server or an export needs of the data."""
        if self.directory.is_silent:
            return
        files.write_json(self.directory.run, redact(self.record))
        if self.tokenizer is not None:
            self.tokenizer.save(self.directory.path / 'tokenizer')

    @property
    def total_steps(self) -> int:
        """The length of the run."""
        assert self.facts.total_steps is not None
        return self.facts.total_steps

    def is_due(self, every: Duration, step: int) -> bool:
        """Whether something with the period `every` falls on `step`; a period of zero never does."""
        period = self.steps_of(every)
        return period > 0 and step % period == 0

    def steps_of(self, duration: Duration) -> int:
        """A duration of this run in steps."""
        return duration.to_steps(self.facts)

    def differ(self, step: int, problems: list[str]) -> None:
        """Tells of a step that gave other bits when it was taken again."""
        told = '; '.join(problems[:4]) + (f'; and {len(problems) - 4} more' if len(problems) > 4 else '')
        self.reporter.say(f'ERROR: step {step} gave other bits when it was taken again: {told}: that device computes wrong')
        self.directory.event('audit', step=step, problems=problems)

    def is_evaluated(self, metric: str, step: int) -> bool:
        """Whether 'split/name' was measured after exactly `step` steps."""
        return self.results.get(metric.split('/')[0], (None,))[0] == step

    def evaluate(self, split: str, step: int, state: TrainState, whole: bool = True) -> dict[str, Any]:
        """The results of a split after `step` steps; computed and recorded once. Unless `whole`, `evaluate.limit` holds."""
        settings = self.experiment.evaluate
        limit = None if whole or settings.limit is None else -(-settings.limit // self.experiment.data.evaluation_batch_size)
        if (split, step, limit) not in self._evaluated:
            self.reporter.phase('evaluating')
            with self.clock.phase('evaluate'):
                feed, num_batches = self.evaluation_feeds[split]
                self.results[split] = (
                    step,
                    self.evaluator(state.evaluation_variables, feed, num_batches, limit, self.votes.leave_if_agreed),
                )
            limited = {} if limit is None else {'limit': limit}
            self._evaluated.add((split, step, limit))
            self.writer.write(step, split, self.clock.total(), {**limited, **self.results[split][1]})
            self.reporter.say(f'step {step}  {split}: {shown(self.results[split][1])}')
            self.reporter.phase('training')
        return self.results[split][1]

    def device_seconds(self) -> float:
        """Seconds times devices since the start of the run; an earlier part may have had another number of devices."""
        own = self.clock.total() - sum(self.earlier.get('seconds', {}).values())
        return self.earlier.get('device_seconds', 0.0) + own * self.mesh.size

    def spent(self, step: int) -> dict[str, Any]:
        """The budget used by `step` steps: examples, unique examples, FLOPs, device-seconds, money.

        What counts as one unique example says `plan.unique_examples`; 'epochs' are counted over all rows of the training split.
        """
        examples = step * self.facts.batch_size
        device_seconds = self.device_seconds()
        price = self.experiment.price_per_device_hour
        return {
            'examples': examples,
            'unique_examples': unique_examples(self.splits['train'], step, self.facts.batch_size, self.experiment.seed),
            'epochs': examples / len(self.splits['train']),
            'tokens': None if self.facts.example_tokens is None else round(examples * self.facts.example_tokens),
            'flops': None if self.facts.step_flops is None else step * self.facts.step_flops,
            'device_seconds': device_seconds,
            'devices': f'{self.mesh.size} x {jax.devices()[0].device_kind}',
            'seconds': self.clock.snapshot(),
            'money_usd': None if price is None else device_seconds / 3600 * price,
        }


def shown(values: dict[str, Any]) -> str:
    """The single numbers among `values` as a person reads them: 'loss 0.1234  accuracy 0.9810'."""
    return '  '.join(f'{name} {_number(value)}' for name, value in values.items() if isinstance(value, float))


def _number_of(value: Any) -> Any:
    """A recorded value as it was measured: JSON has no NaN."""
    if isinstance(value, list):
        return [_number_of(v) for v in value]
    return float('nan') if value is None else value


def _number(value: float) -> str:
    """Four decimals where they say something, else three significant digits."""
    return f'{value:.4f}' if value == 0 or 1e-3 <= abs(value) < 1e4 else f'{value:.3g}'
