"""One algebra of durations: '2000 steps', '10 epochs', '50000 examples', '1e9 tokens', '1e15 flops', '5%' (of
the whole run).

The train loop knows only steps; everything else is turned into steps here, once, from the facts of the run.
With batch size 32 and 1,000 training examples: '10 epochs' = 10,000 examples = 313 steps (the last one starts the eleventh
epoch; nothing is dropped), '1000 examples' = 32 steps; with 2e9 FLOPs a step '1e12 flops' = 500 steps.
"""

import dataclasses
import math
import re

from research.core.errors import UsageError

UNITS = ('steps', 'epochs', 'examples', 'tokens', 'flops', '%')
PATTERN = re.compile(r'\s*([0-9_]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z%]+)\s*')


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a run must know of itself to count in steps; None: not known yet (then that unit is refused)."""

    batch_size: int
    epoch_examples: int | None = None  # examples of one pass over the (budgeted) training data
    step_flops: float | None = None  # FLOPs of one step over the global batch, forward and backward
    total_steps: int | None = None  # the length of the run; '%' counts against it
    example_tokens: float | None = None  # tokens of an example, padding left out, on average; None: no text


@dataclasses.dataclass(frozen=True)
class Duration:
    """An amount with its unit. `str()` gives the text back; equality is by value."""

    amount: float
    unit: str

    def __str__(self) -> str:
        return f'{self.amount:g}%' if self.unit == '%' else f'{repr(self.amount).removesuffix(".0")} {self.unit}'

    def to_steps(self, facts: Facts) -> int:
        """The duration in steps: examples, tokens and epochs rounded up (all are seen), FLOPs rounded down (never overspent).

        A positive duration is at least one step; zero stays zero.

        Raises:
          UsageError: the unit needs a fact that this run does not have, or the FLOPs do not pay for one step.
        """
        if self.unit == 'steps':
            return int(self.amount)
        exact = self.amount * self._unit_steps(facts)
        if self.unit == 'flops' and 0 < exact < 1:
            raise UsageError(
                f"'{self}' is less than one step of {facts.step_flops:.3g} FLOPs", 'raise it, or make the batch smaller'
            )
        return math.floor(exact + 1e-9) if self.unit == 'flops' else math.ceil(exact - 1e-9)

    def _unit_steps(self, facts: Facts) -> float:
        """Steps in one unit."""
        if self.unit == 'examples':
            return 1 / facts.batch_size
        if self.unit == 'tokens' and facts.example_tokens:
            return 1 / (facts.batch_size * facts.example_tokens)
        if self.unit == 'epochs' and facts.epoch_examples:
            return facts.epoch_examples / facts.batch_size
        if self.unit == 'flops' and facts.step_flops:
            return 1 / facts.step_flops
        if self.unit == '%' and facts.total_steps is not None:
            return facts.total_steps / 100
        raise UsageError(f'{str(self)!r} cannot be turned into steps here', "write it in 'steps' or 'examples'")


def parse(text: str) -> Duration:
    """The duration that `text` spells.

    Raises:
      UsageError: not 'AMOUNT UNIT' with a known unit, or a fraction of a step.
    """
    found = PATTERN.fullmatch(text) if isinstance(text, str) else None
    examples = "'10 epochs', '2000 steps', '50000 examples', '1e9 tokens', '1e15 flops' or '5%'"
    if not found:
        raise UsageError(f'{text!r} is not a duration', f'write {examples}')
    amount, unit = float(found[1]), found[2].lower()
    unit = unit if unit in UNITS else unit + 's'
    if unit not in UNITS:
        raise UsageError(f'{found[2]!r} is not a unit of duration', f'write {examples}')
    if unit == 'steps' and amount != int(amount):
        raise UsageError(f'{text!r} is not a whole number of steps', f'write {examples}')
    return Duration(amount, unit)
