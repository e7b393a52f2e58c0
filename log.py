"""
What a run says: on the terminal, in log.csv, in loss.png, and to wandb.
"""
import contextlib
import io
import math
import os
import sys
import time
import warnings

import jax
import numpy as np
from tqdm import tqdm

from checkpoints import RunError, write
from dataset import as_path, in_cloud


@contextlib.contextmanager
def import_wandb():
    """Yields the module. Its errors, of whatever type, become a ValueError that says what to do."""
    try:
        import wandb
        yield wandb
    except Exception as e:  # not installed, not logged in, no network
        reason = str(e).partition('\n')[0]
        raise ValueError(f'wandb_log = True: {type(e).__name__}: {reason} (wandb login, WANDB_MODE=offline or '
                         '--wandb_log=False may help)') from None


def log_in_to_wandb():
    """Raises ValueError where nobody can, before a run changes anything."""
    with import_wandb() as wandb:
        if os.environ.get('WANDB_MODE', 'online') == 'online':
            wandb.login()


def start_wandb(project, name, config, run_id):
    """wandb's run, a new one or the one that goes on. Raises ValueError."""
    with import_wandb() as wandb:
        return wandb.init(project=project, name=name, config=config, id=run_id, resume='allow')


class Log:
    """log.csv goes on where the run does, at first_iter: rows that the run is about to make again are dropped, and so
    are cut-off ones."""
    columns = ['iter', 'loss', 'train_loss', 'val_loss', 'lr', 'grad_norm', 'skipped', 'time_ms', 'tokens_per_s',
               'tokens']  # that the run has seen; version 2 had no such column

    def __init__(self, out_dir, first_iter, max_iters, log_interval, tokens_per_iter, mfu, max_skipped, stop,
                 wandb_run=None, writes=True, tokens_seen=0):
        self.title = out_dir
        self.path = as_path(out_dir) / 'log.csv'
        self.first_iter = first_iter
        self.log_interval = log_interval
        self.tokens_per_iter = tokens_per_iter
        # before first_iter; version 2 did not note it
        self.tokens_seen = first_iter * tokens_per_iter if tokens_seen is None else tokens_seen
        self.bytes_per_token = None  # of the text in evaluations of val, if somebody knows
        self.mfu = mfu
        self.max_skipped = max_skipped
        self.stop = stop
        self.wandb_run = wandb_run
        self.warned = set()
        self.file = self.running_mfu = self.pending = None
        if writes and jax.process_index() == 0:
            lines = [','.join(self.columns) + '\n']
            if first_iter > 0 and self.path.exists():
                text = self.path.read_bytes().decode(errors='replace')
                lines += [line.rstrip('\n') + ',' * (len(self.columns) - 1 - line.count(',')) + '\n'
                          for line in text.splitlines(keepends=True) if self.iter_of(line) < first_iter]
            write(self.path, ''.join(lines))
            if in_cloud(out_dir):  # where nothing can be appended to a file: upload() writes it whole
                self.file = io.StringIO()
                self.file.write(''.join(lines))
            else:
                self.file = open(self.path, 'a', buffering=1, encoding='utf-8')
        self.start_time = self.last_time = self.last_plot = time.perf_counter()
        self.bar = tqdm(total=max_iters + 1, initial=first_iter, unit='it', disable=None, dynamic_ncols=True)

    def iter_of(self, line):
        """The iteration of a row of the file; infinity if the row is damaged."""
        try:
            cells = [float(cell.strip() or 'inf') for cell in line.split(',')]
        except ValueError:
            return math.inf
        whole = line.endswith('\n') and len(cells) in (len(self.columns) - 1, len(self.columns))
        return cells[0] if whole else math.inf

    def tokens_before(self, n):
        """The tokens that the run has seen before iteration n."""
        return self.tokens_seen + (n - self.first_iter) * self.tokens_per_iter

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Leaves nothing open: a notebook's process goes on."""
        with self.harmless('the progress bar'):
            self.bar.close()
        with self.harmless('wandb'):
            if self.wandb_run:
                self.wandb_run.finish(exit_code=int(error[0] is not None))
        with self.harmless('log.csv'):
            if self.file:
                self.upload()
                self.file.close()

    @contextlib.contextmanager
    def harmless(self, what):
        """No number, line or picture may end a run: what goes wrong inside is said, once."""
        try:
            yield
        except Exception as e:
            if what not in self.warned:
                self.warned.add(what)
                self.say(f'warning: {what}: {type(e).__name__}: {e}'.partition('\n')[0])

    def say(self, text):
        """Prints without tearing the progress bar."""
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError as e:  # save and stop
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(e, BrokenPipeError):  # as when Ctrl-C also ends the `tee` behind train.py
                self.stop.output_closed()
            elif not self.stop.number:  # as in `python train.py > log.txt` on a full disk, but not on a closed terminal
                self.stop.because(f'the output cannot be written: {e.strerror}')

    def progress(self, text):
        """Adds a text to the progress bar."""
        with self.harmless('the progress bar'):
            self.bar.set_postfix_str(text)

    def iteration(self, n, lr, metrics):
        """Reports iteration n - 1, whose results are ready; n is still running, so no device waits."""
        self.flush()
        self.pending = n, lr, metrics

    def flush(self):
        """Reports the last iteration and waits for it."""
        if not self.pending:
            return
        n, lr, metrics = self.pending
        self.pending = None
        metrics = {k: float(v) for k, v in metrics.items()}
        now = time.perf_counter()
        dt = max(now - self.last_time, 1e-9)  # a clock may not have moved
        self.last_time = now
        tokens_per_s = self.tokens_per_iter / dt
        mfu = self.mfu(tokens_per_s)
        if mfu and n - self.first_iter >= 5:  # let the training loop settle a bit
            self.running_mfu = 0.9 * self.running_mfu + 0.1 * mfu if self.running_mfu else mfu
        with self.harmless('the progress bar'):
            self.bar.update(1)
        if n % self.log_interval == 0:
            mfu = f'{100 * self.running_mfu:.2f}%' if self.running_mfu else 'n/a'
            skipped = f", skipped {metrics['skipped']:.0f}" if metrics['skipped'] else ''
            self.say(f"iter {n}: loss {metrics['loss']:.4f}, time {dt * 1000:.2f}ms, mfu {mfu}, "
                     f"tok/s {tokens_per_s:,.0f}{skipped}")
            row = {k: v for k, v in metrics.items() if k in self.columns}
            self.row(iter=n, lr=lr, time_ms=dt * 1000, tokens_per_s=tokens_per_s, tokens=self.tokens_before(n + 1),
                     **row)
            self.to_wandb({'iter': n, 'batch/loss': metrics['loss'], 'grad_norm': metrics['grad_norm']})
        if metrics['skipped_in_a_row'] >= self.max_skipped:
            raise RunError(
                f'the gradients of {self.max_skipped} iterations in a row, up to {n}, were not finite, and their '
                'updates were skipped. What was saved before is good. Try a lower learning_rate, more warmup_iters, '
                '--dtype=float32, or --debug_nans=True to see where')

    def upload(self):
        if self.file and in_cloud(self.path):
            write(self.path, self.file.getvalue())

    def store(self):
        """Makes sure that log.csv has all rows up to here, as it must before a checkpoint is saved."""
        self.flush()
        with self.harmless('log.csv'):
            self.upload()

    @contextlib.contextmanager
    def paused(self):
        """What happens inside is not part of an iteration's time."""
        self.store()
        yield
        self.last_time = time.perf_counter()

    def evaluation(self, n, losses, lr):
        text = f"step {n}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"
        values = {'iter': n, 'train/loss': losses['train'], 'val/loss': losses['val'], 'lr': lr,
                  'mfu': 100 * (self.running_mfu or 0)}
        if self.bytes_per_token:  # nats per token become bits per byte, which compare between tokenizers
            values['val/bits_per_byte'] = bits = losses['val'] / math.log(2) / self.bytes_per_token
            text += f', {bits:.3f} bits/byte'
        self.say(text)
        self.to_wandb(values)
        self.row(iter=n, train_loss=losses['train'], val_loss=losses['val'], lr=lr, tokens=self.tokens_before(n))
        if time.perf_counter() - self.last_plot > 30:  # a picture takes as long as some iterations
            self.plot()
            self.last_plot = time.perf_counter()

    def to_wandb(self, values):
        with self.harmless('wandb'):
            if self.wandb_run:
                self.wandb_run.log(values, step=values['iter'])

    def row(self, **row):
        with self.harmless('log.csv'):
            if self.file:
                text = lambda x: f'{x:.7g}' if isinstance(x, float) else str(x)
                self.file.write(','.join(text(row.get(column, '')) for column in self.columns) + '\n')

    def plot(self):
        with self.harmless('loss.png'):
            if self.file:
                self.draw()

    def draw(self):
        """Draws loss.png."""
        from matplotlib.figure import Figure  # without pyplot there is no window system to look for
        log = np.genfromtxt(io.StringIO(self.path.read_text(encoding='utf-8')), delimiter=',', names=True, ndmin=1)
        figure = Figure(figsize=(8, 5))
        figure.subplots_adjust(left=0.11, right=0.98, bottom=0.1, top=0.93, hspace=0.15)
        top, bottom = figure.subplots(2, sharex=True, height_ratios=[4, 1])
        for name, style in (('loss', dict(color='tab:blue', alpha=0.3, label='batch')),
                            ('train_loss', dict(color='tab:blue', marker='.', label='train')),
                            ('val_loss', dict(color='tab:orange', marker='.', label='val'))):
            has_value = ~np.isnan(log[name])
            top.plot(log['iter'][has_value], log[name][has_value], **style)
        bottom.plot(log['iter'], log['lr'], color='tab:gray')
        top.set(ylabel='loss')
        top.set_title(self.title, parse_math=False)
        top.legend()
        top.grid(alpha=0.3)
        bottom.set(xlabel='iteration', ylabel='learning rate')
        picture = io.BytesIO()
        with warnings.catch_warnings(action='ignore'):  # the font may lack characters of the title
            figure.savefig(picture, format='png', dpi=100)
        write(self.path.with_name('loss.png'), picture.getvalue())

    def summary(self, iter_num):
        seconds = max(time.perf_counter() - self.start_time, 1e-9)
        n = iter_num - self.first_iter
        tokens = n * self.tokens_per_iter
        self.say(f'{n:,} iterations in {seconds:.1f}s, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s')
        if n == 0 and self.file and not self.stop.number:
            self.say('the run was finished: a higher --max_iters makes it longer, and with decay_lr also a higher '
                     '--lr_decay_iters')
