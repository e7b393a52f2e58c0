# exec'd by every script right after its block of default values, so that
#
#     python train.py config/train_shakespeare_char.py config/laptop.py --batch_size=32
#
# runs train.py with the globals that the config files assign, left to right, and then with batch_size = 32.
#
# A key is a global of the script that is an int, float, bool or str. Files and options are held to the same rules:
# an unknown key or a value of the wrong type is an error (exit code 2). A config file is Python: it sees the values so
# far, may import, and may have names of its own that start with an underscore.
#
# Leaves some names for the script: `config` (the value of every key), `given` (the keys that somebody set), `typed` (those
# of them that are options), `fail(message)`, which says in one line what is wrong and exits with code 2,
# `with refuse(errors):`, which does that with errors raised inside, and `check(key=(low, high), ...)`, which does it with
# numbers out of bounds.
import ast
import difflib
import gc
import os
import re
import sys
from contextlib import contextmanager

config = {k: v for k, v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))}
given, typed = set(), set()


def fail(message, code=2):
    print(f'{os.path.basename(__file__)}: error: {message}', file=sys.stderr)
    sys.exit(code)


@contextmanager
def refuse(*errors):
    try:
        yield
    except errors as e:
        fail(f'{e.filename}: {e.strerror}' if isinstance(e, OSError) and e.filename else e)


def check(**bounds):
    for key, (low, high) in bounds.items():
        if not low <= config[key] <= high:
            fail(f'{key} = {config[key]}: must be from {low:,} to {high:,}')


def _set(key, value, where):
    """Checks one assignment and stores it in `config`; where it is refused, `where` opens the message."""
    if key not in config:
        moved = {'compile': 'JAX always compiles', 'backend': 'JAX chooses how devices talk to each other'}
        close = difflib.get_close_matches(key, config, n=1)
        fail(f'{where}: ' + (f'nanoGPT\'s {key} has no meaning here ({moved[key]}): leave it out' if key in moved else
                             f'unknown key {key}, ' + (f'did you mean {close[0]}?' if close else 'see --help')))
    want = type(config[key])
    if want is float and type(value) is int:
        value = float(value)
    if type(value) is not want or value in (float('inf'), -float('inf')) or value != value:
        fail(f'{where}: {key} is a{"n" * (want is int)} {want.__name__}, such as {config[key]!r}, not {value!r}')
    config[key] = value
    given.add(key)


def _run_file(path):
    """Executes a config file and takes over what it assigned."""
    try:
        with open(path, encoding='utf-8') as f:
            tree = ast.parse(f.read(), path)
        names = dict(config)
        exec(compile(tree, path, 'exec'), names)
    except (OSError, UnicodeDecodeError) as e:
        fail(f'config file {path}: {e.strerror if isinstance(e, OSError) else "not UTF-8 text"}')
    except SyntaxError as e:
        fail(f'{path}:{e.lineno}: {e.msg}')
    except Exception as e:
        while e.__traceback__.tb_next:
            e.__traceback__ = e.__traceback__.tb_next
        fail(f'{path}:{e.__traceback__.tb_lineno}: {type(e).__name__}: {e}')
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in names and node.id[0] != '_':
            _set(node.id, names[node.id], f'{path}:{node.lineno}')


def _set_option(arg):
    """Takes over one --key=value. A str key takes the text as it stands, or what a quoted literal says."""
    key, equals, text = arg[2:].partition('=')
    if not (arg.startswith('--') and equals):
        fail(f'{arg}: options are written --key=value')
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    if type(config.get(key)) is str and type(value) is not str:
        value = text
    _set(key, value, arg)
    typed.add(key)


def _help():
    """Prints the script's docstring and its keys: default and comment as they stand in the script."""
    text = [__doc__.strip(), '\nKeys, to be set as --key=value or in a config file:']
    with open(__file__, encoding='utf-8') as f:
        lines = f.read().partition('configurator.py')[0].splitlines()
    for line in lines:
        if (m := re.match(r'(\w+) = (.+?)(?:\s+# (.*))?$', line)) and m[1] in config:
            text.append(f'  --{m[1]}={m[2]}'.ljust(40) + f' {m[3] or ""}')
        elif m := re.match(r'# (\w.*)$', line):
            text.append(f'\n{m[1]}')
    print('\n'.join(text))


if {'-h', '--help'} & set(sys.argv[1:]):
    _help()
    sys.exit(0)
for _arg in [a for a in sys.argv[1:] if not a.startswith('-')]:
    _run_file(_arg)
for _arg in [a for a in sys.argv[1:] if a.startswith('-')]:
    _set_option(_arg)
globals().update(config)

# Imports and tracing make a million objects that stay: to look for garbage after every 700 of them takes 0.2 s of a start.
gc.set_threshold(100_000, 50, 50)

# XLA's CPU client takes its scratch memory anew at every step and gives it back, and then page faults cost as much as
# the maths. Huge pages and a heap that is kept take a step at the sizes of config/laptop.py from 30 to 18 ms and one
# at those of train_shakespeare_char.py, without dropout, from 7.3 to 4.2 s (two cores). glibc reads these settings when
# a process starts, so the script starts once more, in its own place; elsewhere they mean nothing.
if __name__ == '__main__' and sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = ':'.join(f'glibc.malloc.{setting}' for setting in (
        'hugetlb=1', 'mmap_max=0', 'trim_threshold=2147483647'))
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)
