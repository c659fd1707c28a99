"""Fulcrum's one command.

python launch.py --config=configs/NAME.py[:argument=value,...] [--config.section.key=value ...] [--workdir=DIR] [--mode=MODE]

Modes: train (default); of the run in --workdir: evaluate, export, verify (its checkpoints), replay (a step whose numbers went
wrong), report (where its time went); show (the config with the meaning of every field), doctor (this machine). The same command
resumes. Exit: 0 done, 2 usage, 74 storage, 75 stopped, 76 numbers, 77 permission, 124 watchdog, 134 another process is lost.
"""

import importlib
import pathlib
import sys
import traceback

try:
    from absl import flags
except ImportError:
    sys.exit('error: this Python has no absl\n  fix: pip install -r requirements/cpu.txt, or activate its environment')

from research.core import config_file, files, guardian, schema
from research.core.errors import ExitCode, FulcrumError, UsageError, explain

RUN_MODES = {'evaluate': 'train.evaluate_run', 'export': 'serve.export', 'verify': 'train.verify', 'replay': 'train.replay'}
RUN_MODES |= {'report': 'train.ledger'}  # all of them of the run in --workdir
MODES = ('train', *RUN_MODES, 'show', 'doctor')

FLAGS = flags.FlagValues()
flags.DEFINE_string('config', None, 'Config file, configs/NAME.py[:argument=value,...].', FLAGS)
flags.DEFINE_string('workdir', None, 'Run directory; default runs/NAME, with a hash where the config is overridden.', FLAGS)
flags.DEFINE_enum('mode', 'train', MODES, 'What to do.', FLAGS)
flags.DEFINE_bool('allow_config_change', False, 'Resume a run although its config changed in a way that matters.', FLAGS)
flags.DEFINE_bool('trust_run', False, 'Evaluate or export a run whose record names components of your own.', FLAGS)
flags.DEFINE_bool('debug', False, 'Show the whole traceback of an error.', FLAGS)
flags.DEFINE_bool('help', False, 'Show this help; --mode=show lists every config field.', FLAGS)


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; returns the overrides 'key=value' of --config.key=value."""
    overrides = [a.lstrip('-').removeprefix('config.') for a in argv[1:] if a.startswith(('--config.', '-config.'))]
    for override in overrides:
        if '=' not in override:
            raise UsageError(f'--config.{override} has no value', f'write --config.{override}=VALUE')
    try:
        rest = FLAGS([a for a in argv if not a.startswith(('--config.', '-config.'))])
    except flags.Error as error:
        raise UsageError(str(error).split('\n')[0], config_file.flag_hint(argv[1:], FLAGS, MODES)) from error
    if len(rest) > 1:
        dashed = f'did you mean --{rest[1]}?' if '=' in rest[1] else f'flags are --NAME=VALUE: {", ".join(sorted(FLAGS))}'
        raise UsageError(f'unexpected argument {rest[1]!r}', dashed)
    return overrides


def load(overrides: list[str]) -> schema.Experiment:
    """The experiment of --config and its overrides."""
    if FLAGS.config is None:
        raise UsageError('--config is missing', f'for example --config=configs/digits_cnn.py; {config_file.known_configs()}')
    paths = [override.partition('=')[0] for override in overrides]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        print(f'warning: --config.{path} is given twice; the last counts', file=sys.stderr)
    return config_file.resolve(FLAGS.config, overrides)


def dispatch(overrides: list[str]) -> None:
    """Runs the chosen mode. jax is imported only after the config was found to be right."""
    if FLAGS.help:
        return print(f'{__doc__}\nFlags:\n{FLAGS.get_help()}\n{config_file.known_configs()}')
    if FLAGS.mode == 'doctor':
        from research.train import doctor

        return doctor.report(pathlib.Path(FLAGS.workdir or 'runs'))
    if FLAGS.mode in RUN_MODES and FLAGS.workdir is None:
        raise UsageError('--workdir is missing', 'for example --workdir=runs/digits_cnn')
    if FLAGS.mode in RUN_MODES:
        run_mode = importlib.import_module(f'research.{RUN_MODES[FLAGS.mode]}')
        return run_mode.report(pathlib.Path(FLAGS.workdir), overrides, FLAGS.trust_run)
    experiment = load(overrides)
    if FLAGS.mode == 'show':
        from research.core import show

        return show.report(experiment)
    return train(experiment, pathlib.Path(FLAGS.workdir or config_file.default_workdir(FLAGS.config, experiment)), overrides)


def train(experiment: schema.Experiment, workdir: pathlib.Path, overrides: list[str]) -> None:
    """Trains, or says that the run is complete."""
    from research.train.run_directory import RunDirectory, finished

    summary = finished(experiment, RunDirectory(workdir), FLAGS.allow_config_change)
    if summary is not None:
        print(f'{workdir} is complete at step {summary["step"]}; its results are in {workdir / "summary.json"}')
        return
    from research.train import loop

    loop.train(experiment, workdir, overrides, FLAGS.allow_config_change)


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code. A failure that is expected is told in at most three lines."""
    try:
        with guardian.watching(guardian.process_start(), owned=True) as watch:
            parsed = parse(argv)
            if FLAGS.mode != 'train':
                watch.enter(guardian.TOOL)
            dispatch(parsed)
    except BrokenPipeError:  # the reader of our output (head, less) has enough
        return ExitCode.DONE
    except (FulcrumError, OSError, KeyboardInterrupt) as error:
        if FLAGS.is_parsed() and FLAGS.debug:
            traceback.print_exc()
        message, code = explain(error)
        files.tell(f'error: {message}\n')
        return code
    return ExitCode.DONE


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')  # type: ignore[union-attr] - a terminal without UTF-8 must not end a run
    guardian.run(main, sys.argv)
