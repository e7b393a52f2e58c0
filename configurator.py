# Every script execs this file right after its block of default values, so that
#
#     python train.py config/train_shakespeare_char.py config/laptop.py --batch_size=32
#
# runs train.py with the globals that the config files assign, from left to right, and then with batch_size = 32.
#
# A key is a global of the script that is an int, float, bool or str. Config files and options follow the same rules: an
# unknown key or a value of the wrong type is an error (exit code 2). A config file is Python: it sees the values so
# far, it may import, it may take in another config file by exec or import *, and it may have variables of its own if
# their names start with an underscore.
#
# The script gets some names from here:
#   config                  a dict of all keys and their values
#   given, typed            the keys that somebody set, and those of them that were options
#   replaced                what a key was before its last change
#   warn(message)           prints one line
#   fail(message)           prints one line and exits with code 2
#   refuse(*errors)         `with refuse(ValueError):` does that with errors that are raised inside
#   check(key=(low, high))  does that with numbers out of bounds
#   for_terminal(text)      the text, of which nothing can change a terminal's title, colors or clipboard
import atexit
import os
import re
import signal
import sys

_folder = os.path.dirname(os.path.abspath(__file__))  # of the script
if _folder not in sys.path:  # as with PYTHONSAFEPATH=1, `python -P` and `python -I`
    sys.path.insert(0, _folder)


def _interrupted(number, frame):
    """Ends the script at Ctrl-C, as long as there is nothing to save. Python's own exception can get lost in the middle
    of an import, and the script would go on."""
    os.write(2, f'{os.path.basename(__file__)}: interrupted\n'.encode())
    os._exit(130)


def _report(kind, error, traceback):
    """Shows an error that nobody caught. Ends without a word where nobody reads the output any more, as in `python
    sample.py | head`, and with one line where the disk is full, as in `python sample.py > samples.txt`."""
    if isinstance(error, BrokenPipeError):
        os._exit(141)
    if not isinstance(error, OSError):
        return sys.__excepthook__(kind, error, traceback)
    print(f'{os.path.basename(__file__)}: error: {_escape(str(error))}', file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that what is left to print does not fail again


def _flush():
    try:
        sys.stdout.flush()
    except OSError as e:
        _report(type(e), e, None)
        os._exit(1)


def _escape(text, keep=''):
    """Text with escapes for control characters, and for those that change the direction of writing."""
    return re.sub(r'[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]',
                  lambda m: m[0] if m[0] in keep else ascii(m[0])[1:-1], text)


def for_terminal(text):
    if sys.stdout.isatty():
        return _escape(text, keep='\n\t')
    return text.encode(errors='backslashreplace').decode()  # half of a surrogate pair has no UTF-8


# Whether Python was started for this script: `python train.py`, perhaps with options of one word, such as -u. A
# notebook's %run, a debugger, a profiler or runpy runs it in a process that somebody else started and goes on to use.
_is_ours = (__name__ == '__main__' and sys.orig_argv[-len(sys.argv):] == sys.argv
            and all(arg.startswith('-') and arg[:2] not in ('-c', '-m') for arg in sys.orig_argv[1:-len(sys.argv)]))

if _is_ours:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    if hasattr(signal, 'pthread_sigmask'):  # _keep_the_heap() blocks Ctrl-C while it restarts the script
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for _name, _mode in ('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w'):
        if getattr(sys, _name) is None:  # closed, as by `>&-`: else the next file would take its place
            setattr(sys, _name, open(os.devnull, _mode))
        if _mode == 'w' and getattr(sys, _name).encoding.lower() != 'utf-8':  # text is UTF-8 on every system
            getattr(sys, _name).reconfigure(encoding='utf-8', errors='backslashreplace')
    sys.excepthook = _report
    atexit.register(_flush)
    os.environ.pop('MPLBACKEND', None)  # a notebook's, for plots in its cells; this Python may lack it

import ast
import difflib
import gc
import traceback
import types
from contextlib import contextmanager


def warn(message, kind='warning'):
    """One line, whatever a file has put into the message."""
    message = _escape(str(message))
    message = message if len(message) < 1000 else f'{message[:1000]}...'
    print(f'{os.path.basename(__file__)}: {kind}: {message}', file=sys.stderr)


def fail(message, code=2):
    warn(message, 'error')
    sys.exit(code)


@contextmanager
def refuse(*errors, code=2):
    try:
        yield
    except errors as e:
        if isinstance(e, BrokenPipeError):  # nobody reads the message, either
            raise
        fail(f'{e.filename}: {e.strerror}' if isinstance(e, OSError) and e.filename else e, code)


def check(**bounds):
    """Numbers must be from the first to the last of a pair, strings one of several."""
    for key, allowed in bounds.items():
        value = config[key]
        if isinstance(value, str) and value not in allowed:
            fail(f'{key} = {value!r}: must be {" or ".join(map(repr, allowed))}')
        if not isinstance(value, str) and not allowed[0] <= value <= allowed[1]:
            fail(f'{key} = {value}: must be from {allowed[0]:,} to {allowed[1]:,}')


def _head_of(script):
    """The source of a script up to where it execs this file."""
    with open(os.path.join(_folder, script), encoding='utf-8') as f:
        return f.read().partition('\nexec(open(')[0]


def _keys_of(script):
    """The keys of another script and their defaults: bench.py takes all of train.py's."""
    keys = {node.targets[0].id: node.value for node in ast.parse(_head_of(script)).body if isinstance(node, ast.Assign)}
    return {key: ast.literal_eval(value) for key, value in keys.items() if key[0] != '_'}


def _set(key, value, where):
    """Checks one assignment and stores it in `config`. Where it is refused, the message begins with `where`."""
    if key in ('compile', 'backend') and key not in config:  # nanoGPT's
        reason = 'JAX always compiles' if key == 'compile' else 'JAX chooses how devices talk'
        return warn(f'{where}: {key} has no meaning here ({reason})')
    if key not in config:
        close = difflib.get_close_matches(key, config, n=1)
        advice = 'see --help' if where[0] == '-' else f'if it is a variable of its own, write _{key}'
        fail(f'{where}: unknown key {key}, ' + (f'did you mean {close[0]}?' if close else advice))
    want = type(config[key])
    is_number = type(value) in (int, float) and abs(value) < 1e300  # neither infinity nor NaN
    if is_number and want in (int, float) and value % 1 == 0:
        value = want(value)  # 1 is a float, too, and 2e3 an int
    if type(value) is not want or want is float and not is_number:
        kind = 'an int' if want is int else f'a {want.__name__}'
        fail(f'{where}: {key} is {kind}, such as {config[key]!r}, not {value!r}')
    if key in ('out_dir', 'init_from', 'hf_dir', 'dataset', 'data_dir'):
        value = os.path.expanduser(value)  # a shell leaves the ~ of --out_dir=~/run as it is
    if value != config[key]:
        replaced[key] = config[key]
    config[key] = value
    given.add(key)


def _run_file(path):
    """Runs a config file, of this folder or of the script's, and takes over what it assigns."""
    if not os.path.exists(path) and os.path.exists(os.path.join(_folder, path)):
        path = os.path.join(_folder, path)
    try:
        with open(path, encoding='utf-8-sig') as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as e:
        fail(f'config file {path}: {e.strerror if isinstance(e, OSError) else "not UTF-8 text"}')
    before = _defaults | config | {'__file__': path}
    names = dict(before)
    sys.path.append(os.path.dirname(os.path.abspath(path)))  # it can import its neighbors
    try:
        tree = ast.parse(text, path)
        exec(compile(tree, path, 'exec'), names)
    except SyntaxError as e:
        fail(f'{e.filename or path}:{e.lineno or 1}: {e.msg}')
    except (Exception, SystemExit) as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        fail(f'{path}:{lines[-1] if lines else 1}: {type(e).__name__}: {e}')
    finally:
        sys.path.pop()
    # what the file itself assigns has a line; what exec and import * assign differs from what was there
    line_of = {node.id: node.lineno for node in ast.walk(tree)
               if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assigned = {name: value for name, value in names.items()
                if name[0] != '_' and (name in line_of or value is not before.get(name))}
    if assigned.keys() & _left_alone:  # a recipe for train.py, and this is sample.py
        takes = {'out_dir', 'device', 'dtype', 'seed'} | ({'init_from'} if names['eval_only'] else set())
        assigned = {k: v for k, v in assigned.items() if k in takes or k not in _left_alone | config.keys()}
    for name, value in assigned.items():
        if name in config or not (callable(value) or isinstance(value, types.ModuleType)):
            _set(name, value, f'{path}:{line_of[name]}' if name in line_of else path)


def _set_option(arg):
    """Takes over one --key=value. A str key takes the text as it is, or the contents of a quoted literal. A bool key
    alone means True."""
    key, equals, text = arg[2:].partition('=')
    want = type(config.get(key))
    if arg.startswith('--') and not equals and want is bool:
        equals, text = '=', 'True'
    if not (arg.startswith('--') and equals):
        fail(f'{arg}: options are written --key=value')
    try:
        value = ast.literal_eval(text.capitalize() if want is bool else text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        value = text
    if want is str and type(value) is not str:
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


def _keep_the_heap():
    """Starts the script once more, in its own place, with other settings of glibc, which reads them when a process
    starts. XLA's CPU client frees its scratch memory after each step, so that the next one pays for page faults again.
    With huge pages and a heap that is kept, a step takes 0.6 of the time. Other systems ignore the settings."""
    if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
        settings = 'hugetlb=1', 'mmap_max=0', 'trim_threshold=2147483647'
        os.environ['GLIBC_TUNABLES'] = ':'.join(f'glibc.malloc.{setting}' for setting in settings)
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the script has started again
        os.execv(sys.executable, sys.orig_argv)


if __name__ == '__main__' and not _is_ours:  # the files may have changed since the last %run
    for _name, _module in list(sys.modules.items()):
        if _name != '__main__' and os.path.dirname(getattr(_module, '__file__', None) or '') == _folder:
            del sys.modules[_name]
if _is_ours:
    _keep_the_heap()
    gc.set_threshold(100_000, 50, 50)  # imports and tracing make a million objects that stay; a search takes 0.2 s
_more_keys = globals().get('_more_keys')
_defaults = _keys_of(_recipes_of) if '_recipes_of' in globals() else {}  # of the script whose recipes this one takes
config = _keys_of(_more_keys) if _more_keys else {}
config |= {k: v for k, v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))}
_left_alone = _defaults.keys() - config.keys()
given, typed, replaced = set(), set(), {}
if {'-h', '--help'} & set(sys.argv[1:]):
    print(_help(), flush=True)
    sys.exit(0)
for _arg, _next in zip(sys.argv[1:], sys.argv[2:]):
    if _arg[:2] == '--' and '=' not in _arg and _next[:1] != '-' and not _next.endswith('.py'):
        fail(f'{_arg} {_next}: options are written --key=value, so {_arg}={_next}')
for _arg in [a for a in sys.argv[1:] if not a.startswith('-')]:
    _run_file(_arg)
for _arg in [a for a in sys.argv[1:] if a.startswith('-')]:
    _set_option(_arg)
globals().update(config)
