"""Settings of a script: its scalar defaults are the schema, the help text and a config file at once.

    defaults  <  config files, in the order given  <  --key=value

    n_embd = 768                    # width of the residual stream (these comments are the help text)
    dropout = 0.1
    start = ''                      # prompt
    # -----
    from configurator import configure
    config = configure(globals())   # the names above hold their final values now; config is a dict of them

    python train.py config/x.py --n_embd=384 --dropout=0 --start=a=b
    python train.py --help
    python train.py out/x/config.py         # the text of dump(config), saved there, reruns the run

A key has the type of its default; a value is cast only where nothing is lost (0 -> 0.0, 1e4 -> 10000).
A config file is Python in a namespace of its own. Imports, functions, arithmetic and `_helpers` are welcome;
any other name must be a key: a typo is an error, not a run that quietly used the default.
"""
import os
import shlex
import sys
import tokenize
import traceback
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from types import ModuleType

SCALARS = bool, int, float, str
BOOLS = dict(true=True, yes=True, on=True, false=False, no=False, off=False) | {'1': True, '0': False}


def configure(namespace, argv=None, quiet=False):
    """Resolve the settings of the script whose globals() these are; argv=None means sys.argv[1:].

    Updates the names in place and returns them as a plain dict in the script's order. Prints them on rank 0,
    with the origin of each override, unless `quiet`. A user's mistake is a SystemExit with a line of advice.
    """
    argv, script = sys.argv[1:] if argv is None else argv, Path(namespace['__file__'])
    defaults = {k: v for k, v in namespace.items() if type(v) in SCALARS and not (k.startswith('_') or k.isupper())}
    if '-h' in argv or '--help' in argv:
        doc = (namespace.get('__doc__') or '').strip()
        print(doc, dump(defaults, _trailing_comments(script)), sep='\n\n', end='')
        raise SystemExit(0)

    files, flags = _read_argv(argv, defaults)
    layers = [(file, _run_file(file, script.parent, defaults)) for file in files] + [('command line', flags)]
    config, origin = dict(defaults), {}
    for source, values in layers:
        config.update(values)
        origin.update(dict.fromkeys(values, source))
    namespace.update(config)
    if not quiet and os.environ.get('RANK', '0') == '0': print(dump(config, origin), end='')
    return config


def dump(config, comments=()):
    """-> text of a config file (write it as UTF-8) that gives exactly these values; comments: {key: str}."""
    comments = dict(comments)
    literal = lambda v: f"float('{v}')" if repr(v) in ('inf', '-inf', 'nan') else repr(v)
    lines = {key: f'{key} = {literal(value)}' for key, value in config.items()}
    width = min(32, max(map(len, lines.values()), default=0))
    return ''.join((f'{line:{width}}  # {comments[key]}' if comments.get(key) else line) + '\n'
                   for key, line in lines.items())


def _read_argv(argv, defaults):
    """-> config files in order, {key: value} of the --key=value. Of two equal keys the last wins."""
    files, values = [], {}
    for arg, after in zip(argv, [*argv[1:], '--']):
        key, equals, text = arg.removeprefix('--').partition('=')
        if not arg.startswith('-') and key not in defaults:
            files.append(arg)
            continue
        if not arg.startswith('--'): raise SystemExit(f'{arg}: settings are written --key=value')
        if key not in defaults: raise SystemExit(f'--{key}: unknown key{_did_you_mean(key, defaults)}')
        kind, detached = type(defaults[key]), not after.startswith('--') and not after.endswith('.py')
        if not equals and (detached or kind is not bool):       # --n_embd 384, --compile false, --n_embd
            value = shlex.quote(after) if detached else 'value'
            raise SystemExit(f'--{key} and its value are one argument: --{key}={value}')
        values[key] = _cast(key, _parse(text, kind) if equals else True, defaults[key])
    return files, values


def _run_file(file, script_dir, defaults):
    """-> {key: value} of a config file, looked up from the current directory, then beside the script."""
    path = next((p for p in (Path(file), script_dir / file) if p.is_file()), None)
    if path is None:
        known = {p.stem for root in (Path(), script_dir) for p in root.glob('config/*.py')}
        hint = _did_you_mean(Path(file).stem, known, "'config/{}.py'", f' here or in {script_dir}')
        raise SystemExit(f'no config file {file!r}{hint}')
    names, values = {'__file__': str(path)}, {}
    try:
        exec(compile(path.read_bytes(), file, 'exec'), names)
    except Exception as e:                                      # whatever it was, say in which line
        inside = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == file]
        line, what = (inside[-1], e) if inside else (getattr(e, 'lineno', None) or '?', getattr(e, 'msg', e))
        raise SystemExit(f'{file}, line {line}: {type(e).__name__}: {what}') from None
    for key, value in names.items():
        if key in defaults:
            values[key] = _cast(f'{file}: {key}', value, defaults[key])
        elif not (key.startswith('_') or callable(value) or isinstance(value, ModuleType)):
            hint = _did_you_mean(key, defaults, otherwise="; --help lists the keys, helpers start with '_'")
            if type(value) not in SCALARS:
                hint = f" is a {type(value).__name__}: keys are bool, int, float, str; helpers start with '_'"
            raise SystemExit(f'{file}: unknown key {key!r}{hint}')
    return values


def _parse(text, kind):
    """Text of the command line read as `kind`; what cannot be so read stays text, and _cast rejects it."""
    if kind is bool: return BOOLS.get(text.lower(), text)
    for number in {int: (int, float), float: (float,), str: ()}[kind]:
        try: return number(text)
        except ValueError: pass
    return text


def _cast(name, value, default):
    """`value` in the type of `default`, if that loses nothing: floats below 2^53 hold every integer."""
    kind = type(default)
    if type(value) is kind: return value
    if {type(value), kind} == {int, float} and abs(value) < 2**53 and kind(value) == value: return kind(value)
    raise SystemExit(f'{name} must be {kind.__name__} (default {default!r}), got {value!r}')


def _did_you_mean(word, known, form="'{}'", otherwise='; --help lists the keys'):
    close = [form.format(match) for match in get_close_matches(word, known)]
    return f", did you mean {' or '.join(close)}?" if close else otherwise


def _trailing_comments(script):
    """-> {name: comment} of `name = value  # comment` above configure(...), continued if indented deeper."""
    name, column, comments = '', 0, {'': ''}
    with tokenize.open(script) as f:
        for before, token in pairwise(tokenize.generate_tokens(f.readline)):
            if (before.string, token.string) == ('configure', '('): break
            if token.string == '=' and not token.line[:before.start[1]].strip():     # the last one counts
                name, column = before.string, before.start[1]
                comments[name] = ''
            elif token.type == tokenize.COMMENT and token.start[1] > column:
                comments[name] = f"{comments[name]} {token.string.lstrip('# ')}".strip()
    return comments
