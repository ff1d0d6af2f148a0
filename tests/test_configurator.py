"""Lessons on settings: what a value may be, who wins, and what a mistake is told.

Every case runs `configure` on the defaults of one small script. The last section runs that script for real.
"""
import os
import subprocess
import sys
from math import inf, nan
from pathlib import Path

import pytest

from configurator import configure, dump

SCRIPT = '''"""Trains nothing.

    python train.py config/x.py

The end.
"""
import math
_private = 1
betas = (0.9, 0.95)             # not a scalar: not a key
out_dir = 'out'                 # where checkpoints go
dropout = 0.1                   # 0 when there is more data than compute
lr = 1e-3
max_iters = 1000                # optimizer steps
                                # (not epochs)
n_embd = 768
compile = True
start = '# no comment'          # prompt text
# -----
from configurator import configure
config = configure(globals())
n_head = n_embd // 64           # not a key: below the call
lr = lr * n_head                # no help text either
print(f'{n_head=} {len(config)=}')
'''
DEFAULTS = dict(out_dir='out', dropout=0.1, lr=1e-3, max_iters=1000, n_embd=768, compile=True,
                start='# no comment')


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run('--key=value', 'x.py', x='text of config/x.py') -> config, in a directory that holds train.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('RANK', raising=False)
    (tmp_path / 'config').mkdir()
    (tmp_path / 'train.py').write_text(SCRIPT)

    def run(*argv, quiet=True, **files):
        for name, text in files.items():
            (tmp_path / 'config' / f'{name}.py').write_text(text, encoding='utf-8')
        run.namespace = dict(__file__=str(tmp_path / 'train.py'), _private=1, betas=(0.9, 0.95)) | DEFAULTS
        return configure(run.namespace, argv=argv, quiet=quiet)
    return run


def overrides(config):
    assert list(config) == list(DEFAULTS), 'the keys and their order are those of the script'
    return {k: v for k, v in config.items() if repr(v) != repr(DEFAULTS[k])}


def the_error(function, *args, **kwargs):
    with pytest.raises(SystemExit) as e: function(*args, **kwargs)
    assert isinstance(e.value.code, str), 'a string: Python prints it to stderr and exits with 1'
    return e.value.code


# ---- the command line ----

@pytest.mark.parametrize('arg, key, value', [
    ('--n_embd=384', 'n_embd', 384),
    ('--n_embd=-1', 'n_embd', -1),
    ('--max_iters=1e4', 'max_iters', 10000),                # nothing is lost, so an int may look like a float
    ('--max_iters=9007199254740993', 'max_iters', 2**53 + 1),
    ('--dropout=0', 'dropout', 0.0),                        # and a float like an int
    ('--lr=-6E-4', 'lr', -6e-4),
    ('--lr=inf', 'lr', inf),
    ('--compile=false', 'compile', False), ('--compile=No', 'compile', False),
    ('--compile=OFF', 'compile', False), ('--compile=0', 'compile', False),
    ('--start=a=b', 'start', 'a=b'),                        # strings verbatim, nothing evaluated
    ('--start=123', 'start', '123'),
    ('--start=True', 'start', 'True'),
    ("--start='q'", 'start', "'q'"),
    ('--start= two\nlines ', 'start', ' two\nlines '),
    ('--start=--help', 'start', '--help'),
    ('--start=', 'start', ''),
])
def test_command_line(run, arg, key, value):
    config = run(arg)
    assert overrides(config) == {key: value} and type(config[key]) is type(value)
    assert run.namespace[key] == value, 'the name in the script changes too'


@pytest.mark.parametrize('text', ['1', 'true', 'TRUE', 'yes', 'on', None])
def test_true_and_the_bare_flag(run, text):
    arg = '--compile' if text is None else f'--compile={text}'
    assert run(arg, 'config/x.py', x='compile = False')['compile'] is True


def test_nothing_given(run):
    config = run()
    assert config == DEFAULTS and type(config) is dict
    assert run.namespace['betas'] == (0.9, 0.95), 'a tuple is no key and stays alone'


def test_the_last_wins(run):
    """defaults < files in the order given < command line, wherever that stands."""
    files = dict(a='n_embd = 1; max_iters = 1', b='n_embd = 2; lr = 2')
    assert overrides(run('config/a.py', 'config/b.py', **files)) == dict(n_embd=2, max_iters=1, lr=2.0)
    assert overrides(run('config/b.py', 'config/a.py', **files)) == dict(n_embd=1, max_iters=1, lr=2.0)
    assert run('--n_embd=3', 'config/a.py', '--n_embd=4', 'config/b.py')['n_embd'] == 4


@pytest.mark.parametrize('argv, message', [
    (['--n_embed=384'], "--n_embed: unknown key, did you mean 'n_embd'?"),
    (['--n-embd=384'], "--n-embd: unknown key, did you mean 'n_embd'?"),
    (['--zzz'], '--zzz: unknown key; --help lists the keys'),
    (['--betas=1'], '--betas: unknown key; --help lists the keys'),
    (['--_private=2'], '--_private: unknown key; --help lists the keys'),
    (['--n_embd=0.5'], 'n_embd must be int (default 768), got 0.5'),
    (['--n_embd=nan'], 'n_embd must be int (default 768), got nan'),
    (['--n_embd=1e30'], 'n_embd must be int (default 768), got 1e+30'),     # which of the ints near it?
    (['--n_embd=big'], "n_embd must be int (default 768), got 'big'"),
    (['--n_embd=true'], "n_embd must be int (default 768), got 'true'"),
    (['--n_embd='], "n_embd must be int (default 768), got ''"),
    (['--dropout=1,5'], "dropout must be float (default 0.1), got '1,5'"),
    (['--compile=2'], "compile must be bool (default True), got '2'"),
    (['--n_embd', '384'], '--n_embd and its value are one argument: --n_embd=384'),
    (['--n_embd', '-1'], '--n_embd and its value are one argument: --n_embd=-1'),
    (['--n_embd', '--lr=1'], '--n_embd and its value are one argument: --n_embd=value'),
    (['--compile', 'false'], '--compile and its value are one argument: --compile=false'),
    (['--start', 'Once upon'], "--start and its value are one argument: --start='Once upon'"),
    (['n_embd=384'], 'n_embd=384: settings are written --key=value'),
    (['-n_embd=384'], '-n_embd=384: settings are written --key=value'),
])
def test_mistakes_on_the_command_line(run, argv, message):
    assert the_error(run, *argv) == message


# ---- config files ----

@pytest.mark.parametrize('text, expected', [
    ('n_embd = 384', dict(n_embd=384)),
    ('n_embd = 384.0; dropout = 0', dict(n_embd=384, dropout=0.0)),
    ("start = 'ünïcode'", dict(start='ünïcode')),
    ('_heads = 6\nn_embd = _heads * 64', dict(n_embd=384)),
    ('import math\nfrom os.path import join\nn_embd = 2 ** int(math.log2(512))', dict(n_embd=512)),
    ('def double(x): return 2 * x\nclass C: pass\nn_embd = double(192)', dict(n_embd=384)),
    ("import os\nout_dir = os.path.basename(__file__)", dict(out_dir='x.py')),
    ('', {}),
])
def test_config_file(run, text, expected):
    config = run('config/x.py', x=text)
    assert overrides(config) == expected
    assert [type(v) for v in config.values()] == [type(v) for v in DEFAULTS.values()]


@pytest.mark.parametrize('text, message', [
    ('n_embed = 384', "config/x.py: unknown key 'n_embed', did you mean 'n_embd'?"),
    ('zzz = 1', "config/x.py: unknown key 'zzz'; --help lists the keys, helpers start with '_'"),
    ('zzz = [1]', "config/x.py: unknown key 'zzz' is a list: keys are bool, int, float, str; "
                  "helpers start with '_'"),
    ('n_embd = [384]', 'config/x.py: n_embd must be int (default 768), got [384]'),
    ('n_embd = 0.5', 'config/x.py: n_embd must be int (default 768), got 0.5'),
    ("n_embd = '384'", "config/x.py: n_embd must be int (default 768), got '384'"),
    ('n_embd = True', 'config/x.py: n_embd must be int (default 768), got True'),
    ('dropout = False', 'config/x.py: dropout must be float (default 0.1), got False'),
    ('dropout = None', 'config/x.py: dropout must be float (default 0.1), got None'),
    ('compile = 1', 'config/x.py: compile must be bool (default True), got 1'),
    ('start = 1', "config/x.py: start must be str (default '# no comment'), got 1"),
    ('n_embd = abs', 'config/x.py: n_embd must be int (default 768), got <built-in function abs>'),
    ('lr = 1\nn_embd =', 'config/x.py, line 2: SyntaxError: invalid syntax'),
    ('lr = 1\n\n_x = 1 / 0', 'config/x.py, line 3: ZeroDivisionError: division by zero'),
    ('def f():\n    return 1 / 0\n_x = f()', 'config/x.py, line 2: ZeroDivisionError: division by zero'),
    ('n_embd = 2 * n_head', "config/x.py, line 1: NameError: name 'n_head' is not defined"),
    ("import json\njson.loads('')",
     'config/x.py, line 2: JSONDecodeError: Expecting value: line 1 column 1 (char 0)'),
])
def test_mistakes_in_a_config_file(run, text, message):
    assert the_error(run, 'config/x.py', x=text) == message


@pytest.mark.parametrize('file, message', [
    ('config/quickstrat.py', "no config file 'config/quickstrat.py', did you mean 'config/quickstart.py'?"),
    ('quickstart', "no config file 'quickstart', did you mean 'config/quickstart.py'?"),
    ('config', "no config file 'config' here or in "),
])
def test_missing_file(run, file, message):
    assert the_error(run, file, quickstart='', gsm='').startswith(message)


def test_files_are_found_here_first_and_then_beside_the_script(run, tmp_path, monkeypatch):
    run(x='n_embd = 1')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert run('config/x.py')['n_embd'] == 1
    Path('config').mkdir()
    Path('config/x.py').write_text('n_embd = 2')
    assert run('config/x.py')['n_embd'] == 2


# ---- what is printed reruns the run ----

def test_printed_config_names_the_origin_of_each_override(run, capsys):
    run('config/x.py', '--start=é "\n', quiet=False, x='n_embd = 384; lr = 1e4; start = "not this"')
    printed = capsys.readouterr().out
    assert printed.splitlines() == [
        "out_dir = 'out'",
        'dropout = 0.1',
        'lr = 10000.0      # config/x.py',
        'max_iters = 1000',
        'n_embd = 384      # config/x.py',
        'compile = True',
        r"""start = 'é "\n'   # command line""",
    ]
    assert overrides(run('config/printed.py', printed=printed)) == dict(n_embd=384, lr=1e4, start='é "\n')


@pytest.mark.parametrize('rank, quiet, prints', [('0', False, True), ('1', False, False), ('0', True, False)])
def test_one_rank_prints_unless_quiet(run, monkeypatch, capsys, rank, quiet, prints):
    monkeypatch.setenv('RANK', rank)
    run(quiet=quiet)
    assert bool(capsys.readouterr().out) is prints


@pytest.mark.parametrize('key, value', [
    *[('lr', x) for x in (1e-3, 0.1 + 0.2, 5e-324, -0.0, inf, -inf, nan)],
    *[('n_embd', x) for x in (0, -5, 2**63, 10**40)],
    *[('start', x) for x in ('', 'inf', '# x', '{x}', '\'"\\', 'a\nb\r\0', '日本🙂\ufeff\u2028', '\udc80')],
])
def test_dump_round_trips(run, key, value):
    config = run('config/saved.py', saved=dump(DEFAULTS | {key: value}))
    assert repr(config) == repr(DEFAULTS | {key: value})           # repr: nan != nan, but -0.0 == 0.0


# ---- the script itself ----

def python(*argv, cwd):
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), PYTHONIOENCODING='utf-8')
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=env, capture_output=True, text=True)


def test_script_runs_from_another_directory(run, tmp_path):
    run(x='n_embd = 128')
    done = python(str(tmp_path / 'train.py'), 'config/x.py', '--dropout=0', cwd='/')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.endswith('n_head=2 len(config)=7\n')


def test_script_fails_without_a_traceback(run, tmp_path):
    done = python('train.py', '--n_embed=384', cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr == "--n_embed: unknown key, did you mean 'n_embd'?\n"


def test_help_is_the_docstring_and_the_settings_with_their_comments(run, tmp_path):
    done = python('train.py', '--n_embd=1', '-h', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout == '''Trains nothing.

    python train.py config/x.py

The end.

out_dir = 'out'         # where checkpoints go
dropout = 0.1           # 0 when there is more data than compute
lr = 0.001
max_iters = 1000        # optimizer steps (not epochs)
n_embd = 768
compile = True
start = '# no comment'  # prompt text
'''


def test_help_of_settings_below_main(run, tmp_path):
    """A module that is also a script: indented settings, locals of the same names above."""
    (tmp_path / 'data.py').write_text('''
def shuffle(rows,
            seed=0):            # of the permutation
    split = rows                # a local
    return split

if __name__ == '__main__':
    split = 'train'             # part of the corpus
    # numbers
    seed = 0
    from configurator import configure
    config = configure(globals())
''')
    assert python('data.py', '--help', cwd=tmp_path).stdout.strip().splitlines() == [
        "split = 'train'  # part of the corpus",
        'seed = 0',
    ]
