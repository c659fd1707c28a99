"""The pictures of the README, from a real run. Needs matplotlib (pip install matplotlib) and, for the terminal, tmux.

tmux new-session -d -x 132 -y 24 'python launch.py --config=configs/digits_cnn.py --workdir=/tmp/quick_start; sleep 60'
tmux capture-pane -e -p > /tmp/bar.ansi          # while it trains: the screen with its colours
python -m bench.pictures --terminal=/tmp/bar.ansi --run=/tmp/quick_start --output=docs/images
"""

import argparse
import io
import pathlib
import re
import sys

from rich.console import Console
from rich.text import Text

from research.train.run_directory import RunDirectory


def terminal(capture: pathlib.Path, output: pathlib.Path) -> None:
    """Draws a captured screen as SVG, without the web fonts that rich would refer to."""
    screen = capture.read_text(encoding='utf-8').rstrip('\n').split('\n')
    console = Console(record=True, width=132, file=io.StringIO())
    for line in screen:
        console.print(Text.from_ansi(line), no_wrap=True, crop=True)
    drawn = console.export_svg(title='python launch.py --config=configs/digits_cnn.py')
    output.write_text(re.sub(r'@font-face \{.*?\}\s*', '', drawn, flags=re.DOTALL), encoding='utf-8')


def learning_curve(run: pathlib.Path, output: pathlib.Path) -> None:
    """Draws the loss of training and validation and the validation accuracy of a run against the step."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout='constrained')
    records = RunDirectory(run).read_metrics()
    for axis, name, splits in ((left, 'loss', ('train', 'validation')), (right, 'accuracy', ('train', 'validation'))):
        for split in splits:
            points = [(r['step'], r[name]) for r in records if r['split'] == split]
            axis.plot(*zip(*points, strict=True), label=split)
        axis.set(xlabel='step', ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend()
    left.set_yscale('log')
    right.set_ylim(0.9, 1.0)
    figure.savefig(output, dpi=110)


def main(argv: list[str]) -> None:
    """Draws what it is given the material for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--terminal', type=pathlib.Path)
    parser.add_argument('--run', type=pathlib.Path)
    parser.add_argument('--output', type=pathlib.Path, required=True)
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.terminal:
        terminal(options.terminal, options.output / 'terminal.svg')
    if options.run:
        learning_curve(options.run, options.output / 'learning_curve.png')


if __name__ == '__main__':
    main(sys.argv[1:])
