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
