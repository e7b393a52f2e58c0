"""
Draws the validation losses of some runs, over iterations and over seconds of training, into curves.png. Prints the best
ones and the settings in which the runs differ.

    python assets/curves.py out-gpt2 out-modern
"""
import argparse
import json
import os
import warnings
from pathlib import Path

os.environ.pop('MPLBACKEND', None)  # a notebook's, for plots in its cells; this Python may lack it
import numpy as np
from matplotlib.figure import Figure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('runs', nargs='+', metavar='RUN', help='the out_dir of a run')


def read_log(out_dir):
    """The rows of log.csv as an array with a field for each column; damaged rows are left out."""
    path = Path(out_dir, 'log.csv')
    try:
        with open(path, encoding='utf-8', errors='replace') as f, warnings.catch_warnings(action='ignore'):
            log = np.genfromtxt(f, delimiter=',', names=True, ndmin=1, invalid_raise=False)
    except OSError as e:
        parser.error(f'{path}: {e.strerror}')
    except (IndexError, ValueError):  # it is empty, or anything
        log = np.array([])
    if not {'iter', 'loss', 'val_loss', 'time_ms'} <= set(log.dtype.names or ()):
        parser.error(f'{path} is not the log of a run')
    return log[np.isfinite(log['iter'])]


def read_settings(out_dir):
    """The settings of a run; none where config.json is missing or damaged."""
    try:
        saved = json.loads(Path(out_dir, 'config.json').read_text(encoding='utf-8'))
        return {'commit': saved.get('commit', '')} | saved['config']
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


args = parser.parse_args()
figure = Figure(figsize=(9, 4), layout='constrained')
left, right = figure.subplots(1, 2, sharey=True)
table = {'': args.runs, 'best val loss': [], 'at iteration': []}
for out_dir in args.runs:
    log = read_log(out_dir)
    steps = log[~np.isnan(log['loss'])]
    evaluations = log[~np.isnan(log['val_loss'])]
    # a logged step stands for all since the one logged before; evaluations are not in its time
    seconds = np.cumsum(np.diff(steps['iter'], prepend=-1) * steps['time_ms']) / 1000
    left.plot(evaluations['iter'], evaluations['val_loss'], marker='.', label=out_dir.replace('$', r'\$'))
    if len(steps):
        right.plot(np.interp(evaluations['iter'], steps['iter'], seconds), evaluations['val_loss'], marker='.')
    best = evaluations[np.argsort(evaluations['val_loss'])[:1]]
    table['best val loss'].append(f"{best['val_loss'][0]:.4f}" if len(best) else '-')
    table['at iteration'].append(f"{best['iter'][0]:.0f}" if len(best) else '-')
left.set(xlabel='iterations', ylabel='validation loss')
right.set(xlabel='seconds of training')
left.legend()
for axes in (left, right):
    axes.grid(alpha=0.3)
try:
    figure.savefig('curves.png', dpi=100)
except OSError as e:
    parser.error(f'curves.png: {e.strerror}')

settings = [read_settings(out_dir) for out_dir in args.runs]
for key in dict.fromkeys(key for run in settings for key in run):
    if key != 'out_dir' and len({str(run[key]) for run in settings if key in run}) > 1:
        table[key] = [str(run.get(key, '-')) for run in settings]
widths = [max(len(row[i]) for row in table.values()) for i in range(len(args.runs))]
for key, row in table.items():
    cells = [value.ljust(width) for value, width in zip(row, widths)]
    print(f'{key:30}', *cells, sep='  ')
