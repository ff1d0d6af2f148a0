"""The table and the figure of the alignment arms, on made-up results."""
import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import plot

ROOT = Path(__file__).parent.parent


def write(folder, arm, seed, curve, tokens_per_s=1e5):
    """The first two intervals compile: they say nothing about speed."""
    v = dict(bits_per_byte=curve[-1] + 0.01 * seed, estimator='upper bound, count')
    r = dict(tokens=6_000_000, steps=60, tokens_per_s=tokens_per_s, peak_gib=10.0, validation=v,
             curve=[dict(step=20 * i, val_bits_per_byte=b) for i, b in enumerate(curve)]
             + [dict(step=i, loss=3.0, tokens_per_s=rate) for i, rate in enumerate([1, 2] + [tokens_per_s] * 3)])
    (folder / f'alignment_{arm}_{seed}.json').write_text(json.dumps(r))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, 'HERE', tmp_path)
    (tmp_path / 'results').mkdir()
    return tmp_path / 'results'


def test_without_results_there_is_nothing_to_draw(folder):
    assert plot.alignment() == 'Measurements are to come.'
    plot.alignment_figure(folder / 'x.png')
    assert not (folder / 'x.png').exists()


def test_steps_and_minutes_to_a_loss(folder):
    write(folder, 'plain', 1, [4.0, 2.0, 1.5, 1.2])
    write(folder, 'plain', 2, [4.0, 2.2, 1.7, 1.4])                     # mean: 4, 2.1, 1.6, 1.3
    write(folder, 'align', 1, [4.0, 1.6, 1.0, 0.9], tokens_per_s=5e4)   # 1.3 is half-way from step 20 to 40
    write(folder, 'scratch', 1, [9.0, 5.0, 4.0, 3.0])
    found = plot.arms()
    assert found['plain']['bits'] == pytest.approx((4.0, 2.1, 1.6, 1.3))
    assert plot.race(found, 'plain', 'plain') == ['60 (1.0x)', '1.00 (1.0x)']           # 6M tokens at 100k/s
    assert plot.race(found, 'align', 'plain') == ['30 (2.0x)', '1.00 (1.0x)']           # half the steps, half the speed
    assert plot.race(found, 'scratch', 'plain') == ['> 60', '> 1.00']
    assert plot.race(found, 'plain', 'scratch')[0] == '<= 20 (>= 3.0x)'         # below at the first validation
    assert plot.race(found, 'own_align', 'own_plain') == ['', '']
    lines = plot.alignment().splitlines()
    assert lines[0].startswith('![') and len({line.count('|') for line in lines[2:]}) == 1
    assert '<= 1.210, <= 1.420' in lines[4] and len(lines) == 7
    plot.alignment_figure(folder / 'x.png')
    assert (folder / 'x.png').stat().st_size > 10_000 and not (folder / 'x_gradient.png').exists()
    write(folder, 'gradient_broken', 1, [4.0, 3.0, 2.0, 1.5])
    plot.alignment_figure(folder / 'x.png')
    assert (folder / 'x_gradient.png').stat().st_size > 10_000 and 'alignment_gradient.png' in plot.alignment()


def test_the_cost_of_alignment(folder):
    rows = [dict(peer='ours', agrees=True, median_ms=100.0, tokens_per_s=2e5, peak_gib=20.0),
            dict(peer='ours_align', agrees=True, median_ms=140.0, tokens_per_s=1.4e5, peak_gib=22.0),
            dict(peer='hf_stacked', agrees=False, median_ms=1.0, tokens_per_s=1e9, peak_gib=1.0)]
    config = dict(n_layer=2, n_embd=8, batch=4, seq_len=1024)
    (folder / 'bench_align.json').write_text(json.dumps(dict(results=rows, config=config, hardware='GPU')))
    text = plot.alignment()
    assert '1.40' in text and '140.0k' in text and 'transformers' not in text           # who disagrees has no speed


def test_an_arm_that_ran_out_of_time_is_no_result(folder, tmp_path, monkeypatch, capsys):
    """It saw fewer tokens than the others of its table."""
    def train(command, **kw):
        words = dict(str(word).removeprefix('--').split('=', 1) for word in command if '=' in str(word))
        facts = dict(config=dict(max_iters=240), steps=240 if words['seed'] == '1' else 200, tokens_per_s=1e5,
                     wall_minutes=3.0, validation=dict(bits_per_byte=2.0))
        Path(words['result']).write_text(json.dumps(facts))
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, 'run', train)
    monkeypatch.setattr(sys, 'argv', ['alignment.py', '--arms=plain', '--seeds=1,2', f'--results={folder}',
                                      f'--out_dir={tmp_path}/out', '--extra=--device=cpu'])
    with pytest.raises(SystemExit, match="failed.*plain', 2"):
        runpy.run_path(str(ROOT / 'experiments/alignment.py'), run_name='__main__')
    assert [f.name for f in folder.iterdir()] == ['alignment_plain_1.json']
    assert 'FAILED: 200 steps' in capsys.readouterr().out


@pytest.mark.parametrize('word, says', [('--seeds=one', "numbers, got 'one'"), ('--arms=plian', "unknown arm 'plian'"),
                                        ('--extra=--lr=1', 'without a GPU')])
def test_arms_that_cannot_run_end_in_one_line(tmp_path, monkeypatch, word, says):
    monkeypatch.setattr('torch.cuda.is_available', lambda: word == '--arms=plian')
    monkeypatch.setattr(sys, 'argv', ['alignment.py', f'--results={tmp_path}', f'--out_dir={tmp_path}/out', word])
    with pytest.raises(SystemExit, match=says):
        runpy.run_path(str(ROOT / 'experiments/alignment.py'), run_name='__main__')


def test_curves_of_two_runs_are_two_lines(tmp_path):
    files = [tmp_path / name for name in ('a/result.json', 'b/result.json', 'c.json')]
    for i, file in enumerate(files):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(dict(curve=[dict(step=1, loss=float(i))])))
    assert plot.training_curves(files, 'loss', 'step') == {x: ([1], [float(i)]) for i, x in enumerate('abc')}
    files[0].write_text('{')
    with pytest.raises(SystemExit, match='result.json: Expecting'): plot.training_curves(files, 'loss', 'step')


def test_the_arms_are_runs_of_train(monkeypatch):
    """Every word of every arm is a key of train.py, every arm has a place in the table, and groups have equal steps."""
    monkeypatch.syspath_prepend(ROOT / 'experiments')
    experiment = importlib.import_module('alignment')
    assert {*experiment.ARMS} == {*plot.ARMS, 'own_ar'}
    keys, n_steps = re.findall(r'(?m)^(\w+) = ', (ROOT / 'train.py').read_text()), {}
    for arm, words in experiment.ARMS.items():
        words = f'{experiment.ALL} {words}'.split()
        for word in words: assert (ROOT / word).is_file() or re.match(r'--(\w+)=.', word)[1] in keys
        n_steps[arm] = [w for w in words if w.startswith('--max_iters=')][-1]
    for arm, (_, goal) in plot.ARMS.items(): assert n_steps[arm] == n_steps[goal], arm
