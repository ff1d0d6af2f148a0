"""README's tables, from results/*.json and nothing else.

    python plot.py              # rewrite every block between <!-- name --> and <!-- end --> in README.md
    python plot.py --check      # only say whether README.md is up to date (the tests do)
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent


def load(name):
    return json.loads((HERE / 'results' / f'{name}.json').read_text())


def table(*rows):
    """Markdown; the first row is the head."""
    lines = ['| ' + ' | '.join(map(str, row)) + ' |' for row in rows]
    return '\n'.join([lines[0], '|' + ' --- |' * len(rows[0]), *lines[1:]])


def bits(v, sign=True):
    """Bits per byte, with its sign if it is an upper bound."""
    return ('<= ' if sign and v['estimator'].startswith('upper') else '') + f"{v['bits_per_byte']:.3f}"


def quickstart():
    r, e = load('quickstart'), load('quickstart_eval')['results']
    s = e['samples']
    return table(
        ('what `config/quickstart.py` gave', r['hardware']),
        ('time, data preparation and validation included', f"{r['wall_minutes']:.1f} minutes"),
        ('parameters, training tokens, speed', f"{r['parameters'] / 1e6:.2f}M, {r['tokens'] / 1e6:.1f}M, "
                                               f"{r['tokens_per_s'] / 1e3:.1f}k tokens/s"),
        ('validation, unseen modules of the standard library', f"{bits(e['nll'])} bits/byte"),
        ('the same for a token bigram', f"{e['bigram']['bits_per_byte']:.3f} bits/byte"),
        (f"lines that parse, of {s['n']} samples", f"{s['lines_that_parse']:.0%} of {s['lines']}"),
        ('longest match with the training text',
         f"{s['longest_match_chars']} characters (median {s['median_match_chars']:.0f})"))


def packages():
    rows = [('bits per byte', 'networkx', 'mpmath, pydantic, jinja2', 'held-out files', 'tokens/s', 'MFU', 'train',
             'peak memory')]
    for name, label in (('packages_ar', 'autoregressive (exact)'), ('packages_mdm', 'masked diffusion (upper bound)')):
        r, test, inside = load(name), load(f'{name}_test'), load(f'{name}_val_in')
        rows.append((label, bits(r['validation']), bits(test['results']['nll']), bits(inside['results']['nll']),
                     f"{r['tokens_per_s'] / 1e3:.0f}k", f"{r['mfu']:.1%}", f"{r['train_minutes']:.1f} min",
                     f"{r['peak_gib']:.1f} GiB"))
    return table(*rows)


def weights():
    r = load('weights')
    rows = [('`weights/`', f"{r['parameters'] / 1e6:.1f}M parameters; {r['steps']:,} steps, "
             f"{r['tokens'] / 1e6:.0f}M tokens, {r['train_minutes']:.1f} minutes on one {r['hardware']}")]
    for split, label in (('val', 'networkx'), ('test', 'mpmath, pydantic, jinja2'), ('val_in', 'held-out files')):
        e = load(f'weights_{split}')
        rows.append((label, f"{bits(e['results']['nll'])} bits/byte ({e['config']['draws']} draws per row)"))
    return table(*rows)


def smollm2():
    rows = [('SmolLM2-135M-Instruct (4-bit), autoregressive', 'bits/byte', 'tokens')]
    for split, label in (('val', 'networkx'), ('test', 'mpmath, pydantic, jinja2'), ('val_in', 'other packages')):
        r = load(f'smollm2_{split}')['results']['nll']
        rows.append((label, f"{r['bits_per_byte']:.3f} +- {r['stderr'] / r['nats_per_token'] * r['bits_per_byte']:.3f}",
                     f"{r['n_tokens']:,}"))
    return table(*rows)


BLOCKS = dict(quickstart=quickstart, packages=packages, weights=weights, smollm2=smollm2)


def render(text):
    """README's text with every block redrawn."""
    for name, draw in BLOCKS.items():
        start, end = f'<!-- {name} -->', '<!-- end -->'
        if start not in text: raise SystemExit(f"README.md has no block {start}")
        head, rest = text.split(start, 1)
        text = f'{head}{start}\n{draw()}\n{end}{rest.split(end, 1)[1]}'
    return text


if __name__ == '__main__':
    if sys.argv[1:] not in ([], ['--check']): raise SystemExit(__doc__.strip())
    readme = HERE / 'README.md'
    old = readme.read_text()
    new = render(old)
    if '--check' in sys.argv[1:]:
        if old != new: raise SystemExit("README.md is not what results/*.json say: python plot.py")
    else: readme.write_text(new)
