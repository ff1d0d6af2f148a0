"""What the README says: its snippet runs, its numbers are in results/, its files exist."""
import json
import re
from pathlib import Path

import pytest

import plot

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def test_snippet_runs_as_printed(capsys, monkeypatch):
    snippet = re.search(r'```python\n(.*?)```', README, re.S)[1]
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(ROOT)
    exec(snippet, {})
    printed = capsys.readouterr().out
    assert printed.startswith('import ') and re.search(r'\(\d+ forwards\)', printed)
    assert 'for i in ' in printed and 'print(i)' in printed


def test_tables_are_drawn_from_results():
    assert plot.render(README) == README, "run: python plot.py"


def test_tables_of_results_to_come(monkeypatch):
    """Drawn as soon as README.md has their block; ways that do not agree with the plain loop do not count."""
    way = dict(shape='qwen3_6_35b_a3b', tokens=64, batch=1, steps=10, way='graph', ms=4.0, tokens_per_s=16000.0,
               read_bytes=6e9, of_limit=0.5, bound='bytes', rel_error=0.01)
    results = [dict(way='copy'), dict(shape=way['shape'], way='weights', parameters=1.386e9), way,
               way | dict(way='compiled', ms=3.0, tokens_per_s=21333.0, rel_error=0.5),         # wrong
               way | dict(way='compiled_kernels', ms=2.0, tokens_per_s=32000.0, rel_error=None),        # nan
               way | dict(way='kernels', ms=5.0, tokens_per_s=12800.0),
               way | dict(way='eager', ms=20.0, tokens_per_s=3200.0),
               dict(shape=way['shape'], way='compiled_kernels', error='x'),
               way | dict(way='eager', batch=64)]                                               # nothing beside it
    val = dict.fromkeys('accuracy accuracy_noisy accuracy_t accuracy_quarter linearity effective_rank '
                        'latent_variance'.split(), 0.5)
    arm = dict(arm='A', label='everything', seed=1, tokens=1e6, validation=val,
               samples={'8': dict(gen_ppl=12.34, token_entropy=5.0)})
    files = dict(ldlm_speed=dict(hardware='H', results=results),
                 ldlm_ablations=dict(hardware='H', results=[arm, arm | dict(samples={})], config=dict(nfe='4,8')))
    monkeypatch.setattr(plot, 'load_all', files.get)
    text = plot.render(README + ''.join(
        f'<!-- {name} -->\n<!-- end -->\n' for name in plot.PENDING if f'<!-- {name} -->' not in README))
    assert '| 10 | 4.00 | 16,000 | 6.0 GB | 50% | 12,800 | 3,200 | 3,238 |  |' in text
    assert '21,333' not in text and '32,000' not in text
    assert '| A: everything | 1 | 50.0% |' in text and '| 12.3 | 5.00 |' in text and '| - | - |' in text


@pytest.mark.parametrize('file', sorted((ROOT / 'results').glob('*.json')), ids=lambda f: f.name)
def test_every_result_says_where_it_comes_from(file):
    r = json.loads(file.read_text())
    for key in ('command', 'commit', 'hardware', 'date', 'wall_minutes', 'config'): assert r[key], key
    assert r['commit'] != 'unknown' and (r.get('validation') or r.get('results'))


def test_every_file_and_config_it_names_exists():
    for name in re.findall(r'\]\((\w+\.(?:py|md))\)|(config/\w+\.py)', README):
        assert (ROOT / (name[0] or name[1])).exists(), name


def test_weights_fit_the_repository():
    sizes = [f.stat().st_size for f in (ROOT / 'weights').iterdir()]
    assert sum(sizes) <= 25 * 2 ** 20 and max(sizes) <= 16 * 2 ** 20


def test_models_at_equal_entropy():
    """Between two temperatures the middle is the geometric mean; what never has that entropy has no number."""
    point = lambda entropy, ppl, speed: dict(token_entropy=entropy, gen_ppl=ppl, tokens_per_s=speed)
    names = 'gen_ppl,n_steps={},eta={},temperature={}'
    sweep = dict(results={names.format(n, eta, t): point(6 + t, ppl * 4 ** t * (1 + eta), 1e6 / n)
                          for n, ppl in ((4, 100), (16, 25)) for eta in (0.0, 1.0) for t in (0, 1)})
    single = dict(results={f'gen_ppl,temperature={t}': point(6 + t, 10.0, 5e3) for t in (0, 1)})
    assert plot.at_entropy(sweep, 6.5) == {
        (4, 'eta=0.0'): pytest.approx((200, 2.5e5)), (16, 'eta=0.0'): pytest.approx((50, 62500)),
        (4, 'eta=1.0'): pytest.approx((400, 2.5e5)), (16, 'eta=1.0'): pytest.approx((100, 62500))}
    assert plot.at_entropy(sweep, 6.25)[4, 'eta=0.0'][0] == pytest.approx(100 * 2 ** 0.5)
    assert plot.at_entropy(sweep, 7.1) == {}
    lines = plot.ldlm_lines(dict(a=single, b=sweep))
    assert list(lines) == ['a', 'b, eta 0.0', 'b, eta 1.0'] and lines['a'] == {None: pytest.approx((10, 5e3))}
