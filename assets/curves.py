"""
Draws the validation losses of several runs, over iterations and over seconds of training.

    python assets/curves.py out-gpt2 out-modern       # writes curves.png
"""
import sys

import numpy as np
from matplotlib.figure import Figure

figure = Figure(figsize=(9, 4), layout='constrained')
left, right = figure.subplots(1, 2, sharey=True)
for out_dir in sys.argv[1:]:
    log = np.genfromtxt(f'{out_dir}/log.csv', delimiter=',', names=True)
    steps = log[~np.isnan(log['loss'])]
    evaluations = log[~np.isnan(log['val_loss'])]
    # a logged step stands for all since the one logged before; evaluations are not in its time
    seconds = np.cumsum(np.diff(steps['iter'], prepend=-1) * steps['time_ms']) / 1000
    left.plot(evaluations['iter'], evaluations['val_loss'], marker='.', label=out_dir)
    right.plot(np.interp(evaluations['iter'], steps['iter'], seconds), evaluations['val_loss'], marker='.')
left.set(xlabel='iterations', ylabel='validation loss')
right.set(xlabel='seconds of training')
left.legend()
for axes in (left, right):
    axes.grid(alpha=0.3)
figure.savefig('curves.png', dpi=100)
