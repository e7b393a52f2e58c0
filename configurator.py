# Every script execs this file right after its block of default values, so that
#
#     python train.py config/train_shakespeare_char.py config/laptop.py --batch_size=32
#
# runs train.py with the globals that the config files assign, from left to right, and then with
# batch_size = 32.
#
# A key is a global of the script that is an int, float, bool or str. Config files and options
# follow the same rules: an unknown key or a value of the wrong type is an error (exit code 2). A
# config file is Python: it sees the values so far, it may import, and it may have names of its own
# that start with an underscore.
#
# The script gets some names from here:
#   config                  a dict of all keys and their values
#   given, typed            the keys that somebody set, and those of them that were options
#   fail(message)           prints one line and exits with code 2
#   refuse(*errors)         `with refuse(ValueError):` does that with errors that are raised inside
#   check(key=(low, high))  does that with numbers out of bounds
import ast
import difflib
import gc
import os
import re
import sys
from contextlib import contextmanager


def fail(message, code=2):
    print(f'{os.path.basename(__file__)}: error: {message}', file=sys.stderr)
    sys.exit(code)


@contextmanager
def refuse(*errors, code=2):
    try:
        yield
    except errors as e:
        fail(f'{e.filename}: {e.strerror}' if isinstance(e, OSError) and e.filename else e, code)


def check(**bounds):
    for key, (low, high) in bounds.items():
        if not low <= config[key] <= high:
            fail(f'{key} = {config[key]}: must be from {low:,} to {high:,}')


def _head_of(script):
    """The source of a script up to where it execs this file."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), script), encoding='utf-8') as f:
        return f.read().partition('\nexec(open(')[0]


def _keys_of(script):
    """The keys of another script and their defaults: bench.py takes all of train.py's."""
    keys = {}
    for node in ast.parse(_head_of(script)).body:
        if isinstance(node, ast.Assign) and node.targets[0].id[0] != '_':
            keys[node.targets[0].id] = ast.literal_eval(node.value)
    return keys


def _set(key, value, where):
    """Checks one assignment and stores it in `config`. Where it is refused, the message begins with
    `where`."""
    if key not in config:
        moved = {'compile': 'JAX always compiles', 'backend': 'JAX chooses how devices talk to each other'}
        if key in moved:
            fail(f"{where}: nanoGPT's {key} has no meaning here ({moved[key]}): leave it out")
        close = difflib.get_close_matches(key, config, n=1)
        fail(f'{where}: unknown key {key}, ' + (f'did you mean {close[0]}?' if close else 'see --help'))
    want = type(config[key])
    if want is float and type(value) is int:
        value = float(value)
    if type(value) is not want or value in (float('inf'), -float('inf')) or value != value:
        article = 'an' if want is int else 'a'
        fail(f'{where}: {key} is {article} {want.__name__}, such as {config[key]!r}, not {value!r}')
    config[key] = value
    given.add(key)


def _run_file(path):
    """Runs a config file and takes over what it assigns."""
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
    """Takes over one --key=value. A str key takes the text as it is, or the contents of a quoted
    literal."""
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
    """The script's docstring and its keys, with default and comment as they stand in the script."""
    text = [__doc__.strip(), '\nKeys, to be set as --key=value or in a config file:']
    for script in filter(None, [__file__, _more_keys]):
        for line in _head_of(script).splitlines():
            if (m := re.match(r'(\w+) = (.+?)(?:\s+# (.*))?$', line)) and m[1] in config:
                text.append(f'  --{m[1]}={m[2]}'.ljust(40) + f' {m[3] or ""}')
            elif m := re.match(r'# (\w.*)$', line):
                text.append(f'\n{m[1]}')
    return '\n'.join(text)


def _collect_garbage_less():
    """Imports and tracing create a million objects that stay. Looking for garbage among them after
    every 700 new ones, as Python does, takes 0.2 s of a start."""
    gc.set_threshold(100_000, 50, 50)


def _keep_the_heap():
    """XLA's CPU client allocates its scratch memory anew in every step and frees it, and then page
    faults cost as much as the maths. Huge pages and a heap that is kept take a step at the sizes of
    config/laptop.py from 30 to 18 ms, and one of train_shakespeare_char.py without dropout from 7.3
    to 4.2 s (two cores). glibc reads these settings when a process starts, so the script starts
    once more, in its own place. Other systems ignore them."""
    if __name__ == '__main__' and sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
        settings = 'hugetlb=1', 'mmap_max=0', 'trim_threshold=2147483647'
        os.environ['GLIBC_TUNABLES'] = ':'.join(f'glibc.malloc.{setting}' for setting in settings)
        sys.stdout.flush()
        os.execv(sys.executable, sys.orig_argv)


_more_keys = globals().get('_more_keys')
config = _keys_of(_more_keys) if _more_keys else {}
config |= {k: v for k, v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))}
given, typed = set(), set()
if {'-h', '--help'} & set(sys.argv[1:]):
    try:
        print(_help(), flush=True)
    except BrokenPipeError:  # as in `python train.py --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
for _arg in [a for a in sys.argv[1:] if not a.startswith('-')]:
    _run_file(_arg)
for _arg in [a for a in sys.argv[1:] if a.startswith('-')]:
    _set_option(_arg)
globals().update(config)
_collect_garbage_less()
_keep_the_heap()
