"""
Chats: what was said, as the text that a model was trained to read, and a talk in the terminal.

A model's chat template says how it is written: a program in jinja2's language, by somebody else. It runs in jinja2's
sandbox, and this file, as a script, is a process for it that opens no files, with 1 GB of memory and ten seconds.
"""
import contextlib
import json
import os
import signal
import subprocess
import sys

# for a model without a template of its own
PLAIN = ("{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] }}"
         "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")

SECONDS = 10  # that a template may take, and 0.1 for each chat


def render(meta, chats):
    """The texts of chats by the template of a meta.json. A chat is a pair: messages, [{'role': ..., 'content': ...}],
    and a list of pairs (n, add_generation_prompt), each of which asks for the text of the first n messages, and whether
    it ends with the words that begin an answer. The result of a chat is a list of these texts, or a str that says why
    there is none. Raises ValueError if the template is no template, or takes too long."""
    from dataset import valid_text
    missing = '<|endoftext|>' if meta['tokenizer']['kind'] == 'tiktoken' else ''
    special = {f'{name}_token': meta['tokenizer'].get(name, missing) for name in ('bos', 'eos')}
    request = {'template': meta.get('chat_template', PLAIN), 'special': special, 'chats': chats}
    try:
        process = subprocess.run([sys.executable, __file__], input=json.dumps(request).encode(), capture_output=True,
                                 timeout=SECONDS + len(chats) / 10)
        results = json.loads(process.stdout)
    except subprocess.TimeoutExpired:
        raise ValueError('the chat template takes too long: it may be in an endless loop') from None
    except ValueError:
        why = process.stderr.decode(errors='replace').strip().splitlines() or ['it was killed']
        raise ValueError(f'the chat template fails: {why[-1]}') from None
    return [texts if isinstance(texts, str) else [valid_text(text) for text in texts] for texts in results]


def learned(meta, chats):
    """What of each chat, a list of messages, its model learns to write: a list of (text, spans), where the spans are
    pairs of positions in the text, from where the assistant begins to speak to where it ends; or a str that says why
    there is none. It is mostly one text. A template that leaves out earlier thoughts makes one for each answer."""
    turns = [[i for i, message in enumerate(messages) if message['role'] == 'assistant'] for messages in chats]
    cuts = [[cut for i in answers for cut in ((i, False), (i, True), (i + 1, False))] for answers in turns]
    result = []
    for texts in render(meta, [*zip(chats, cuts)]):
        parts = [('', [])]
        for said, asked, answered in zip(texts[::3], texts[1::3], texts[2::3]) if isinstance(texts, list) else ():
            begin = len(os.path.commonprefix([asked, answered]))
            if begin < len(os.path.commonprefix([said, asked])):  # then what follows may hold more than the answer
                texts = 'its template writes the question anew when an answer follows'
                break
            before, spans = parts[-1]
            if not answered.startswith(before):
                parts.append((before, spans := []))
            parts[-1] = answered, spans
            spans.append((begin, len(answered.rstrip())))
        result.append(texts if isinstance(texts, str) else parts)
    return result


def chat_tokenizer(meta):
    """The tokenizer of a meta.json, as a Hugging Face one. It adds no special tokens: the template writes them all.
    Raises ValueError where no token can end an answer."""
    from dataset import subword_tokenizer
    if meta['tokenizer']['kind'] == 'char':
        raise ValueError('a model of characters cannot chat: no token ends an answer')
    tokenizer = subword_tokenizer(meta['tokenizer'])
    tokenizer.post_processor = None  # which would also leave spaces out of the tokens' positions
    return tokenizer


def ends(meta, tokenizer):
    """The ids of the tokens that end an answer: the end of a text, and what the template writes after an answer."""
    chat = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'xyzzy'}]
    [texts] = render(meta, [(chat, [(2, False)])])
    after = texts[0].rpartition('xyzzy')[2] if isinstance(texts, list) else ''
    special = tokenizer.get_added_tokens_decoder()
    written = [id for id in tokenizer.encode(after).ids if id in special][:1]
    end = tokenizer.token_to_id(meta['tokenizer'].get('eos', '<|endoftext|>'))
    return written + [end] * (end is not None)


def talk(meta, write, say, room, system=''):
    """A talk in the terminal. What you type is the user's message. write(ids, ends) yields lists of tokens that go on
    from `ids` up to one of `ends`, and say(text) prints them. A chat may have `room` tokens: of a longer one, the
    oldest messages are forgotten. Ctrl-C ends an answer, and the next one the talk. Raises ValueError where the
    template refuses a message."""
    tokenizer = chat_tokenizer(meta)
    end = ends(meta, tokenizer)
    messages = [{'role': 'system', 'content': system}] if system else []
    writing = stopped = False

    def on_ctrl_c(*_):
        nonlocal stopped
        if stopped or not writing:
            raise KeyboardInterrupt
        stopped = True

    def prompt():
        [texts] = render(meta, [(messages, [(len(messages), True)])])
        if isinstance(texts, str):
            raise ValueError(texts)
        return tokenizer.encode(texts[0]).ids

    with contextlib.suppress(ImportError):
        import readline  # which lets you edit what you type
    signal.signal(signal.SIGINT, on_ctrl_c)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            messages.append({'role': 'user', 'content': input('> ' if sys.stdin.isatty() else '')})
            first = 1 if system else 0
            while len(ids := prompt()) > room and len(messages) > first + 2:
                del messages[first:first + 2]  # a question and its answer
            answer, new, writing, stopped = '', [], True, False
            for part in write(ids, end):
                new += part
                text = tokenizer.decode(new).lstrip()
                if not text.endswith('\ufffd'):  # half a character: the other half is in the next part
                    say(text[len(answer):])
                    answer = text
                if stopped:
                    break
            say('\n')
            writing = False
            messages.append({'role': 'assistant', 'content': answer.rstrip()})
    if sys.stdin.isatty():
        say('\n')


def limit(name, value):
    """Limits what this process may have of something, where the system can do that."""
    with contextlib.suppress(ImportError, ValueError):  # on Windows; macOS does not limit memory
        import resource
        resource.setrlimit(getattr(resource, name), (value, value))


def run_template():
    """What the process for a template does: it reads a request of render() and writes the result."""
    from datetime import datetime
    import jinja2.debug  # which jinja2 itself imports at an error, when no file can be opened any more
    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %} says that the assistant speaks, which learned() finds out itself."""
        tags = {'generation'}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message):
        raise TemplateError(message)

    request = json.load(sys.stdin)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, ext.loopcontrols])
    environment.filters['tojson'] = lambda x, **how: json.dumps(x, **{'ensure_ascii': False} | how)
    environment.globals |= {'raise_exception': refuse, 'strftime_now': lambda form: datetime.now().strftime(form)}
    limit('RLIMIT_AS', 2**30)
    template = environment.from_string(request['template'])
    limit('RLIMIT_NOFILE', 0)
    results = []
    for messages, cuts in request['chats']:
        try:
            results.append([template.render(messages=messages[:n], add_generation_prompt=prompt, tools=None,
                                            documents=None, **request['special']) for n, prompt in cuts])
        except Exception as e:  # a template may do anything
            results.append(f'its template says: {e}' if isinstance(e, TemplateError) else f'{type(e).__name__}: {e}')
    json.dump(results, sys.stdout)


if __name__ == '__main__':
    run_template()
