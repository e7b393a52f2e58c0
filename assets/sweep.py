"""
Trains small models over a grid of settings, to find the learning rate that each width wants.

    python assets/sweep.py sweep.csv                                                  # the table and the picture alone
    python assets/sweep.py sweep.csv --n_embd=64,128 --learning_rate=3e-3,6e-3,12e-3 --seed=1337,1,2

Every option takes one value or several; each combination is a run. Its loss over all of the validation data (at
most 256 batches) becomes a line of the csv file. What is there already is not run again, so you can stop the script and
start it again. In the end it prints the best rates and draws sweep.png.
"""
import argparse
import csv
import functools
import itertools
import sys
import types
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
from dataset import eval_starts, open_dataset, padded, sequences, train_starts
from devices import best_dtype, choose_kernels
from model import GPTConfig
from optim import get_lr, make_optimizer
from step import Setup, eval_step, init_state, train_step

GRID = dict(  # what a run is, and what it is if you don't say
    dataset='shakespeare_char', max_iters=250, batch_size=12, block_size=64, arch='qwen3', n_layer=4, n_head=4,
    n_embd=128, tied=0, optimizer='muon', learning_rate=8e-3, embd_lr_scale=2.0, warmup_iters=30, beta1=0.85,
    beta2=0.99, weight_decay=0.1, seed=1337)


@functools.partial(jax.jit, static_argnames=('config', 'optimizer'), donate_argnames='state')
def step(state, tokens, lr, hyper, config, optimizer):
    """train_step(), whose optimizer's numbers are arguments: another rate needs no other program."""
    tx = make_optimizer(*hyper[:3], 1.0, optimizer, hyper[3])
    return train_step.__wrapped__(state, tokens, lr, jax.random.key(0), Setup(config, tx))


def val_loss_of(run):
    """Trains, with a straight line from the learning rate to 0. Returns the loss over all of the validation data."""
    data, meta = open_dataset(root / 'data' / run.dataset, run.block_size)
    config = GPTConfig(run.block_size, padded(meta['vocab_size']), run.n_layer, run.n_head, run.n_embd, run.arch,
                       tied=bool(run.tied), dtype=best_dtype(jax.devices(), ''))
    config, _ = choose_kernels(config, jax.devices(), False, '')
    hyper = run.beta1, run.beta2, run.weight_decay, run.embd_lr_scale
    state = init_state(config, make_optimizer(*hyper[:3], 1.0, run.optimizer, hyper[3]), run.seed)
    batch = lambda split, starts: sequences(data[split], starts, run.block_size)
    for it in range(run.max_iters):
        lr = get_lr(it, run.learning_rate, run.warmup_iters, run.max_iters, 0.0, 'linear')
        starts = train_starts(data['train'], (1, run.batch_size), run.block_size, run.seed, it)
        state, _ = step(state, batch('train', starts), lr, hyper, config, run.optimizer)
    n = min(max(len(data['val']) // (run.batch_size * run.block_size), 1), 256)
    starts = eval_starts(data['val'], (n, run.batch_size), run.block_size)
    return float(eval_step(state['params'], batch('val', starts), config))


def read(path):
    """The runs in a csv file and their losses, {a tuple of GRID's values: loss}."""
    if not path.exists():
        return {}
    with open(path, newline='') as f:
        return {tuple(type(GRID[key])(row[key]) for key in GRID): float(row['val_loss']) for row in csv.DictReader(f)}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('csv', type=Path, help='where the losses are kept')
for key, value in GRID.items():
    several = lambda text, kind=type(value): [kind(part) for part in text.split(',')]
    several.__name__ = type(value).__name__  # for messages
    parser.add_argument(f'--{key}', type=several, metavar='A,B,...', help=f'default: {value}')
args = parser.parse_args()
grid = {key: getattr(args, key) for key in GRID}
try:
    done = read(args.csv)
except (KeyError, TypeError, ValueError):
    parser.error(f'{args.csv} is not the table of a sweep')
if any(grid.values()):
    for run in itertools.product(*(values or [GRID[key]] for key, values in grid.items())):
        if run in done:
            continue
        try:
            done[run] = val_loss_of(types.SimpleNamespace(**dict(zip(GRID, run))))
        except ValueError as e:
            parser.error(e)
        with open(args.csv, 'a', newline='') as f:
            writer = csv.writer(f)
            if f.tell() == 0:
                writer.writerow([*GRID, 'val_loss'])
            writer.writerow([*run, f'{done[run]:.4f}'])
if not done:
    parser.error(f'{args.csv} holds no runs yet: give some options, such as --learning_rate=3e-3,6e-3')

# curves: the mean loss over seeds by learning rate, for all that else is the same
rate, seed = list(GRID).index('learning_rate'), list(GRID).index('seed')
losses = {}
for run, loss in done.items():
    curve = tuple(value for i, value in enumerate(run) if i not in (rate, seed))
    losses.setdefault(curve, {}).setdefault(run[rate], []).append(loss)
names = [name for name in GRID if name not in ('learning_rate', 'seed')]
varied = [i for i, name in enumerate(names) if len({curve[i] for curve in losses}) > 1]
axes = Figure(figsize=(7, 5), layout='constrained').subplots()
for curve, by_rate in sorted(losses.items()):
    means = {lr: float(np.mean(by_rate[lr])) for lr in sorted(by_rate)}
    label = ', '.join(f'{names[i]}={curve[i]}' for i in varied) or args.csv.stem
    best = min(means, key=means.get)
    print(f'{label}: {means[best]:.4f} at {best:g};', ', '.join(f'{lr:g}: {loss:.4f}' for lr, loss in means.items()))
    axes.semilogx(means.keys(), means.values(), marker='.', base=2, label=label)
axes.set(xlabel='learning rate', ylabel='validation loss')
axes.xaxis.set_major_formatter('{x:.1e}')
axes.legend()
axes.grid(alpha=0.3)
axes.figure.savefig('sweep.png', dpi=100)
