"""sample.py: holes in a text, what is shown (terminal, page), and the script itself, its errors included."""
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

import sample
import solve
from ar import AR
from checkpoint import save_checkpoint
from data import byte_tokenizer
from mdm import MDM
from model import ModelConfig, Transformer

TOK = byte_tokenizer()


def save_tiny(directory, kind):
    """A checkpoint of a random model over bytes."""
    torch.manual_seed(0)
    shape = dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=32, n_ff=48, head_dim=16)
    model = Transformer(ModelConfig(vocab_size=TOK.vocab_size, **shape))
    objective = kind(model, TOK.mask_id, separator=TOK.sep_id, eos_id=TOK.eos_id)
    save_checkpoint(directory, 'step', objective, TOK, dict(step=1))
    return directory


@pytest.fixture(scope='module')
def mdm_dir(tmp_path_factory): return save_tiny(tmp_path_factory.mktemp('mdm'), MDM)


def in_process(monkeypatch, *args):
    """The script without the seconds that a new process takes to import torch."""
    code = compile(Path(sample.__file__).read_text(encoding='utf-8'), sample.__file__, 'exec')
    monkeypatch.setattr(sys, 'argv', ['sample.py', *map(str, args)])
    exec(code, {'__name__': '__main__', '__file__': sample.__file__, '__doc__': ''})


# -- holes --------------------------------------------------------------------------------------------------

def test_holes():
    assert sample.parse_holes('a<hole>b<hole:3>', 16) == ['a', 16, 'b', 3, '']
    assert sample.parse_holes('<hole:012>\n', 0) == ['', 12, '\n']
    assert sample.parse_holes('if a < b: <hole>', 2) == ['if a < b: ', 2, '']
    for text, hole_len, says in (('no marker', 16, '<hole>'), ('<hole:0>', 16, "'0'"), ('<hole>', 0, "'0'"),
                                 ('<hole:x>', 16, "'x'"), ('<hole:-3>', 16, "'-3'"), ('<hole:>', 16, "''")):
        with pytest.raises(SystemExit, match=re.escape(says)): sample.parse_holes(text, hole_len)


# -- tokens as text -----------------------------------------------------------------------------------------

def test_characters_spread_over_tokens():
    """The byte tokenizer is the worst case: é is two tokens, € three, 🙂 four."""
    ids, smile = TOK.encode('aé€🙂\n'), ['🙂', '', '', '', '\n']
    assert sample.token_texts(TOK, ids, TOK.mask_id) == ['a', 'é', '', '€', '', '', *smile]
    ids[4] = TOK.mask_id                                                # in the middle of the €
    assert sample.token_texts(TOK, ids, TOK.mask_id) == ['a', 'é', '', '\ufffd', None, '\ufffd', *smile]
    assert sample.token_texts(TOK, [TOK.sep_id, ids[0], TOK.eos_id], TOK.mask_id) == ['', 'a', '']
    assert sample.token_texts(TOK, [], TOK.mask_id) == []


def states():
    """Three states of two samples: no token, one, all; the second sample is awkward."""
    a = [[('p', None), (None, 0), (None, 0)],
         [('p', None), (None, 0), ('x', .5)],
         [('p', None), ('\n', .1), ('x', .5)]]
    b = [[('', None), (None, 0), ('\t', .2)],
         [('', None), ('</script><!--&"', .9), ('\t', .2)],
         [('', None), ('<b>\u2028日本', .9), ('\x1b[2J\r', 1.0)]]
    return [list(rows) for rows in zip(a, b)]


# -- page ---------------------------------------------------------------------------------------------------

def test_page_holds_every_state_and_no_text_escapes():
    page = sample.html_page(states(), dict(out_dir='</title>x', nfe=2))
    script = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert len(script) == 1 and '<' not in script[0] and page.count('</script>') == 2
    data = json.loads(script[0])
    assert data['facts'] == dict(out_dir='</title>x', nfe=2)
    for which, steps in enumerate(data['samples']):                     # replay, as the page does
        row = {}
        for step, delta in enumerate(steps):
            for i, text, conf in delta: row[i] = (text, conf)
            assert list(row.values()) == states()[step][which]
    assert 'http' not in page.replace(script[0], '') and ' src=' not in page            # works offline


# -- terminal -----------------------------------------------------------------------------------------------

def columns(line):
    line = re.sub(r'\x1b\[[0-9;]*m', '', line)
    assert line.isprintable(), line
    return sum(2 if unicodedata.east_asian_width(c) in 'WF' else 1 for c in line)


@pytest.mark.parametrize('width,height', [(80, 24), (7, 10), (3, 4), (1, 1)])
def test_frames_fit_the_terminal(width, height):
    long = [('def f():\n\treturn 日本語 ' * 9, None), *[(None, 0)] * 300, ('\x1b[2J\x07', .3)]
    for rows in [*states(), [long, long, long]]:
        lines = sample.frame(rows, rows, width, height, 'step 1')
        assert len(lines) <= height
        if width > 1: assert max(map(columns, lines)) <= width


def test_frame_shows_new_tokens_and_keeps_the_window_at_the_masks():
    before, after = states()[0][0], states()[1][0]
    (line,), front = sample.wrap(after, before, 80)
    assert front == 0 and '\x1b[30;48;5;221mx' in line and '\x1b[1mp' in line and '▒' in line
    assert '48;5;221' not in sample.wrap(after, after, 80)[0][0]
    tall = [('line\n' * 50, None), (None, 0), ('\n' * 50, None)]
    assert any('▒' in line for line in sample.frame([tall], [tall], 80, 12, ''))
    assert sample.wrap([('a\n\tb', None)], [], 80)[0][1].endswith('    b\x1b[0m')


def test_watch_counts_tokens_and_shows_nothing_in_a_pipe(capsys):
    watch = sample.Watch(TOK, TOK.mask_id, [True, False, False], n=1, keep=True)
    M = TOK.mask_id
    for row in ([TOK.sep_id, M, M], [TOK.sep_id, M, 5], [TOK.sep_id, 6, 5]):
        watch.append((torch.tensor([row]), torch.tensor([[1.0, 0.0, 0.456]])))
    watch.close(erase=True)
    assert len(watch) == 3 and watch[0] == [[('', None), (None, 0.0), (None, 0.46)]]
    assert [sample.as_text(rows[0]).count('▒') for rows in watch] == [2, 1, 0]
    assert capsys.readouterr().out == ''


# -- the script ---------------------------------------------------------------------------------------------

FIELDS = set("""out_dir objective prompt infill text completion sample n max_new_tokens nfe
n_steps temperature top_k top_p commit score remask tau block_len eta time_grid seed""".split())


def test_infilling_in_a_process_of_its_own(mdm_dir, tmp_path):
    """From another directory, with stdout in a pipe."""
    template, out = 'def é(a):\n\treturn <hole:5>\n# </script> <hole>end\n', tmp_path / 'new/x.jsonl'
    done = subprocess.run(
        [sys.executable, sample.__file__, f'--out_dir={mdm_dir}', f'--infill={template}', '--hole_len=3',
         '--n=2', '--n_steps=4', '--show', '--delay=9', f'--html={tmp_path}/x.html', f'--out={out}',
         '--history', '--device=cpu'], capture_output=True, text=True, encoding='utf-8', cwd='/', timeout=60)
    assert done.returncode == 0, done.stderr
    assert '\x1b' not in done.stdout and re.search(r'16 new tokens in \d forwards of 2 sample', done.stdout)
    assert '/16' in done.stderr                                     # a bar of tokens instead of an animation
    assert '<script type="application/json"' in (tmp_path / 'x.html').read_text(encoding='utf-8')
    records = [json.loads(line) for line in out.read_text(encoding='utf-8').splitlines()]
    assert [r['sample'] for r in records] == [0, 1] and records[0]['text'] != records[1]['text']
    for r in records:
        assert set(r) == FIELDS | {'history'} and r['infill'] == template
        assert r['nfe'] <= r['n_steps'] == 4
        first, second = r['completion']                                 # what was given is there verbatim
        assert r['text'] == f'def é(a):\n\treturn {first}\n# </script> {second}end\n'
        assert len(r['history']) == r['nfe'] + 1 and r['history'][-1] == r['text']
        assert r['history'][0] == template.replace('<hole:5>', '▒' * 5).replace('<hole>', '▒' * 3)
        assert r['text'] in done.stdout


def test_a_hole_that_cuts_a_token_in_two(mdm_dir, monkeypatch, capsys):
    """Bytes never join; a tokenizer that does gets a note."""
    for joins, infill, noted in ((False, 'a:<hole:2>return', False), (True, 'a:<hole:2>return', True),
                                 (True, 'a:\n<hole:2>', True), (True, 'a:<hole:2>\n    return', False),
                                 (True, 'range(<hole:2>):', False)):
        monkeypatch.setattr('tokenizer.Tokenizer.joins_blanks', lambda self, joins=joins: joins)
        in_process(monkeypatch, f'--out_dir={mdm_dir}', f'--infill={infill}', '--n=1', '--n_steps=1', '--device=cpu')
        assert ('joins a line break' in capsys.readouterr().out) is noted, infill


def test_prompt_from_a_file_shown_in_a_terminal(mdm_dir, tmp_path, monkeypatch, capsys):
    """Every line ending of the file stays; the terminal gets its cursor back, after Ctrl-C too."""
    (tmp_path / 'prompt.txt').write_bytes('naïve:\r\n'.encode())
    args = (f'--out_dir={mdm_dir}', f'--prompt_file={tmp_path}/prompt.txt', '--max_new_tokens=6', '--show',
            '--delay=0', f'--out={tmp_path}/x.jsonl', '--commit=threshold', '--device=cpu')
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    in_process(monkeypatch, *args)
    shown = capsys.readouterr().out
    assert shown.count('\x1b[?25l') == shown.count('\x1b[?25h') == 1
    assert shown.count('▒') > 18 and '\r' not in shown
    for r in map(json.loads, open(tmp_path / 'x.jsonl', encoding='utf-8')):
        assert set(r) == FIELDS and r['prompt'] == 'naïve:\r\n'
        assert r['text'] == r['prompt'] + r['completion']

    def interrupted(*args, history, **settings): raise KeyboardInterrupt
    monkeypatch.setattr(MDM, 'sample', interrupted)
    with pytest.raises(SystemExit) as e: in_process(monkeypatch, *args)
    assert e.value.code == 130 and capsys.readouterr().out.endswith('\x1b[?7h\x1b[?25h')


def test_autoregressive(tmp_path, monkeypatch, capsys):
    """Two calls append to one file; the first state is the prompt alone, and every step adds a token."""
    path = save_tiny(tmp_path / 'ar', AR)
    for seed in 0, 1:
        in_process(monkeypatch, f'--out_dir={path}', '--prompt=ab', '--max_new_tokens=4', '--n=1',
                   f'--seed={seed}', '--device=cpu', f'--out={tmp_path}/x.jsonl', '--history',
                   f'--html={tmp_path}/x.html')
    records = [json.loads(line) for line in open(tmp_path / 'x.jsonl', encoding='utf-8')]
    assert [r['seed'] for r in records] == [0, 1]
    assert all(r['history'][0] == 'ab' and len(r['history']) == r['nfe'] + 1 for r in records)
    with pytest.raises(SystemExit, match='not fill holes'):
        in_process(monkeypatch, f'--out_dir={path}', '--infill=a<hole>b')


def test_settings_without_use_are_named(mdm_dir, tmp_path, monkeypatch, capsys):
    """Where the objective has no use for what was asked for. Defaults are not mentioned; every setting has a use."""
    run = lambda path, *args: in_process(monkeypatch, f'--out_dir={path}', '--max_new_tokens=2', '--n=1', '--n_steps=2',
                                         '--device=cpu', *args) or capsys.readouterr().out
    assert 'mdm, which has no use for eta, time_grid' in run(mdm_dir, '--eta=0.5', '--time_grid=uniform', '--top_k=3')
    assert 'no use' not in run(mdm_dir, '--commit=schedule', '--block_len=2')
    assert 'ar, which has no use for n_steps, commit\n' in run(save_tiny(tmp_path / 'ar', AR), '--commit=schedule')
    assert set(sum(sample.USED.values(), [])) == {*solve.SAMPLER, 'seed'}


@pytest.mark.parametrize('args,says', [
    (['--out_dir=/no/such/run'], '/no/such/run'),
    (['--infill=no marker'], '<hole>'),
    (['--infill=a<hole>b', '--hole_len=0'], 'at least one token'),
    (['--infill=a<hole>b', '--prompt=c'], '--prompt or --infill'),
    (['--commit=best'], 'commit must be one of'),
    (['--score=best'], 'score must be one of'),
    (['--remask=p2'], 'commit'),
    (['--objective=gpt'], 'objective must be'),
    (['--shift=maybe'], 'true or false'),
    (['--mask_id=9999'], 'mask_id 9999'),
    (['--n=0'], 'n must be at least 1'),
    (['--max_new_tokens=0'], 'max_new_tokens must be at least 1'),
    (['--n_steps=0'], 'n_steps must be at least 1'),
    (['--temperature=-1'], 'temperature must be at least 0'),
    (['--block_len=-1'], 'block_len must be at least 0'),
    (['--top_p=0'], 'top_p'),
    (['--history'], '--out'),
    (['--prompt_file=/no/such/file'], '/no/such/file'),
    (['--html=/dev/null/x.html'], 'cannot write /dev/null/x.html'),
    (['--device=gpu'], '--device=gpu'),
    (['--promt=a'], "did you mean 'prompt'"),
])
def test_mistakes_end_in_one_line(mdm_dir, monkeypatch, args, says):
    with pytest.raises(SystemExit) as e: in_process(monkeypatch, f'--out_dir={mdm_dir}', *args)
    assert says in str(e.value) and '\n' not in str(e.value)


def test_an_empty_directory_is_no_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='holds no checkpoint. Train one'):
        in_process(monkeypatch, f'--out_dir={tmp_path}')


def test_chat_puts_the_prompt_where_training_had_it(mdm_dir, monkeypatch, capsys):
    """Without a chat template: paragraphs, as data.py writes them. SmolLM2's template is tested in test_data.py."""
    in_process(monkeypatch, f'--out_dir={mdm_dir}', '--chat=true', '--prompt=hi', '--n=1', '--max_new_tokens=2')
    assert 'user: hi\n\nassistant: ' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='chat needs a --prompt'):
        in_process(monkeypatch, f'--out_dir={mdm_dir}', '--chat=true')
