"""Tables and figures, from results/*.json (and PUBLISHED: numbers of others, quoted).

    python plot.py                  # rewrite every block between <!-- name --> and <!-- end --> in README.md
    python plot.py --check          # only say whether README.md is up to date (the tests do)
    python plot.py --table_of=results/eval_a.json,results/eval_b.json --out=table.csv      # or .md; '' = the screen
    python plot.py --pass_at_k=results/eval_a.json,results/eval_b.json --out=pass_at_k.png
    python plot.py --sweep=results/sweep.json --metric=pass@1 --out=sweep.png
    python plot.py --pareto_of=results/a_samples.json,results/b_samples.json --out=pareto.png      # of gen_ppl sweeps
    python plot.py --curves=results/a.json,results/b.json --metric=loss --x=minutes --out=curves.png   # of train.py
"""
import csv
import io
import json
import math
import re
from pathlib import Path
from statistics import harmonic_mean, mean

HERE = Path(__file__).parent


def load(name):
    return json.loads((HERE / 'results' / f'{name}.json').read_text())


def load_all(name):
    """results/name.json, with the rows of name_*.json, the parts of the run that another GPU took, behind its own."""
    runs = [load(name), *(load(f.stem) for f in sorted((HERE / 'results').glob(f'{name}_*.json')))]
    assert len({run['hardware'] for run in runs}) == 1, f'{name}: results of different hardware'
    return runs[0] | dict(results=[row for run in runs for row in run['results']])


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


# Percent, as in the README of github.com/pengzhangzhi/Open-dLLM; not measured by us. Their infilling average is over
# holes of fixed lengths; "oracle" knows the answer's length.
PUBLISHED = {
    'Open-dCoder 0.5B': dict(humaneval=(20.8, 38.4), mbpp=(16.7, 38.4), infill=(32.5, 77.4), santacoder=(29.6, 56.4)),
    'LLaDA 8B': dict(humaneval=(35.4, 50.0), mbpp=(38.8, 53.4), infill=(48.3, None), santacoder=(35.1, None)),
    'Dream 7B': dict(humaneval=(56.7, 59.2), mbpp=(55.4, 56.2), infill=(39.4, None), santacoder=(40.7, None)),
    'DiffuCoder 7B': dict(infill=(54.8, None), santacoder=(38.8, None)),
}


def evaluation():
    """Ours from results/<name>_{val,humaneval,infill_single,infill_multi,infill_random}.json, SmolLM2's bits per byte
    on 512 rows from alignment_teacher.json; the rest as published."""
    pair = lambda values: ' / '.join('-' if v is None else f'{v:.1f}' for v in values) if values else ''
    rows = [('percent; holes: average over lengths / oracle length', 'networkx, bits/byte', 'HumanEval pass@1 / @10',
             'MBPP pass@1 / @10', 'single lines, pass@1', 'exact', 'several lines, pass@1', 'exact',
             'random spans, pass@1', 'exact', 'SantaCoder-FIM, exact')]
    for name, label in (('weights', '`weights/`, 11.7M, masked diffusion'),
                        ('converted', 'SmolLM2-135M-Instruct (4-bit), made a masked diffusion model'),
                        ('smollm2', 'SmolLM2-135M-Instruct (4-bit), autoregressive, prefix alone')):
        if not (HERE / f'results/{name}_infill_single.json').exists(): continue
        code, holes = load(f'{name}_humaneval')['results']['humaneval'], []
        for task in ('infill_single', 'infill_multi', 'infill_random'):
            r = load(f'{name}_{task}')['results'][task] if (HERE / f'results/{name}_{task}.json').exists() else {}
            lengths = r['by_length'] if 'by_length' in r else dict(oracle=r)
            groups = [r] if name == 'smollm2' else [r.get('average'), lengths['oracle']]
            holes += [pair([g and 100 * g[k] for g in groups]) if r else '' for k in ('pass@1', 'exact_match')]
        val = 'alignment_teacher' if name == 'smollm2' else f'{name}_val'
        rows.append((label, bits(load(val)['results']['nll']),
                     pair([100 * code['pass@1'], 100 * code['pass@10']]), '', *holes, ''))
    for name, p in PUBLISHED.items():
        rows.append((f'{name} (published)', '', pair(p.get('humaneval')), pair(p.get('mbpp')), pair(p['infill']),
                     *[''] * 5, pair(p['santacoder'])))
    return table(*rows)


def canonical():
    rows = [('reference solutions in the sandbox', 'problems', 'pass', 'programs/s')]
    for file in ('canonical', 'canonical_mbpp'):
        r = load(file)
        rows += [(f'`{task}`' + (' (all splits)' if task == 'mbpp' else ''), f"{x['n_problems']:,}",
                  f"{x['pass@1']:.0%}", f"{x['programs_per_s']:.0f}") for task, x in r['results'].items()]
    return table(*rows)


def sandbox():
    return table(('HumanEval\'s solutions', 'programs/s', 'ms each'),
                 *((row['way'], f"{row['programs_per_s']:.0f}", f"{row['ms']:.1f}")
                   for row in load('bench_sandbox')['results']))


def speed():
    dense, packed = load('bench_train'), load('bench_packed')
    labels = dict(
        hf_eager='transformers, SDPA', hf_eager_compact='transformers, head at masked rows only',
        hf_compile='transformers, torch.compile',
        hf_compile_compact='transformers, torch.compile, head at masked rows only',
        flex='the same with FlexAttention', varlen='the same with varlen attention', liger='Liger, as shipped',
        liger_compact='Liger, head at masked rows only', liger_tuned='Liger, tuned by us', ours_eager='ours, eager',
        ours='ours')
    largest = [r for f in sorted((HERE / 'results').glob('bench_largest_*.json')) for r in load(f.stem)['results']]
    found = [{r['peer']: r for r in results if r.get('agrees') and 'tokens_per_s' in r}
             for results in (dense['results'], largest, packed['results'])]
    c, rows = dense['config'], [(f"training step, {dense['hardware']}", 'tokens/s', 'ours is', 'peak memory', 'MFU',
                                 'largest: tokens/s', 'ours is', 'rows', 'packed rows: tokens/s', 'ours is',
                                 'peak memory')]
    for peer, label in labels.items():
        cells = []
        for peers, more in zip(found, (('memory', 'mfu'), ('rows',), ('memory',))):
            r = peers.get(peer)
            shown = dict(memory=f"{r['peak_gib']:.1f} GiB", mfu=f"{r['mfu']:.1%}", rows=r['batch']) if r else {}
            cells += [f"{r['tokens_per_s'] / 1e3:.1f}k",
                      f"{peers['ours']['tokens_per_s'] / r['tokens_per_s']:.2f}x"] if r else ['', '']
            cells += [shown.get(k, '') for k in more]
        rows.append((label, *cells))
    assert (c['batch'], c['seq_len'], c['n_layer'], c['n_embd']) == (16, 1024, 24, 896)     # what the text says
    return table(*rows)


def step_profile():
    """Where the milliseconds of our step go."""
    profile = load('bench_profile')
    c, (r,) = profile['config'], profile['results']
    ms = r['profile_ms']
    attention = 12 * c['n_layer'] * c['n_embd'] * c['batch'] * c['seq_len'] ** 2
    products = (r['mfu'] * c['peak_tflops'] * 1e12 * r['median_ms'] / 1e3 - attention) / ms['matmul'] * 1e3
    roof = load('bench_kernels')['results'][0]['teraflops']
    labels = dict(matmul=f'matrix products, at {products / 1e12:.0f} TFLOP/s (one large product: {roof:.0f})',
                  attention="attention, cuDNN's", triton='our kernels', optimizer='AdamW and clipping',
                  fused="what torch.compile fuses", copies='copies', other="PyTorch's other kernels")
    rows = [(f"of {r['median_ms']:.1f} ms, {r['tokens_per_s'] / 1e3:.1f}k tokens/s", 'ms', 'share')]
    labels['idle'], ms['idle'] = 'no kernel', r['median_ms'] - sum(ms.values())
    rows += [(label, f'{ms[k]:.1f}', f"{ms[k] / r['median_ms']:.0%}") for k, label in labels.items()]
    return table(*rows)


def kernel_speed():
    """Forward and backward together."""
    r = load('bench_kernels')
    rows = [(f"forward + backward, ms; {r['hardware']}", 'reference', 'torch.compile', 'Liger', 'ours',
             'ours: rate', 'of the roof', 'memory: torch.compile', 'ours')]
    others = dict(attention='flex')                 # the peer in the place of torch.compile
    for kernel in dict.fromkeys(x['kernel'] for x in r['results'][2:]):
        ways = {x['way']: x for x in r['results'] if x['kernel'] == kernel and 'forward_ms' in x}
        ms = {way: f"{x['forward_ms'] + x['backward_ms']:.3f}" for way, x in ways.items()}
        other, x = others.get(kernel, 'compiled'), ways['ours']
        rate = f"{x['teraflops']:.0f} TFLOP/s" if 'teraflops' in x else f"{x['gb_per_s']:,.0f} GB/s"
        rows.append((f'`{kernel}`', ms['reference'], ms[other] + ' (FlexAttention)' * (other == 'flex'),
                     ms.get('liger', ''), ms['ours'], rate, f"{x['of_roof']:.0%}",
                     f"{ways[other]['peak_mib']:,.0f} MiB", f"{x['peak_mib']:,.0f} MiB"))
    return table(*rows)


# Arms of experiments/alignment.py, in groups: {the arm whose final loss is the goal: (title, {arm: label})}
GROUPS = dict(
    plain=('SmolLM2-135M at a learning rate of 3e-4', dict(
        plain='no alignment (a)',
        align='alignment, weight 10 (b)',
        align1='alignment, weight 1',
        decay='alignment, its weight falls to 0 by half-time',
        freeze='alignment, MLPs frozen',
        scratch='from scratch at 1e-3 (d)')),
    plain_lr=('at 1e-3, and other recipes', dict(
        plain_lr='no alignment',
        align_lr='alignment, weight 10',
        align1_lr='alignment, weight 1',
        decay_lr='alignment, its weight falls to 0 by half-time',
        every5='alignment of every 5th layer',
        last='alignment of the last layer',
        visible='alignment at visible tokens only',
        visible_decay='alignment at visible tokens only, its weight falls to 0 by half-time',
        opening='alignment, attention opened by degrees',
        opening_plain='no alignment, attention opened by degrees',
        warming_plain='no alignment, noise raised by degrees',
        plain_lr2='no alignment, 2e-3',
        align_lr2='alignment, 2e-3',
        plain_muon='no alignment, Muon 2e-3',
        align_muon='alignment, Muon 2e-3')),
    gradient_broken=("Open-dLLM's loss, 1e-3", dict(
        gradient_broken='the gradient of its code (emulated: its speed says nothing)',
        gradient_broken_align='the gradient of its code, alignment',
        gradient_plain='the right gradient',
        gradient_align='the right gradient, alignment')),
    frac10_plain=('10% of the data, three epochs, 1e-3', dict(
        frac10_plain='no alignment', frac10_align='alignment')),
    frac1_plain=('1% of the data, eleven epochs, 1e-3', dict(
        frac1_plain='no alignment', frac1_align='alignment')),
    own_plain=('from a small autoregressive model of our own, 1e-3', dict(
        own_plain='no alignment', own_align='alignment')))
ARMS = {arm: (label, goal) for goal, (_, labels) in GROUPS.items() for arm, label in labels.items()}


def arms():
    """{arm: its results, curves averaged over seeds}. minutes: of training alone, by the mean speed after warm-up."""
    found = {}
    for arm in [*ARMS, 'own_ar']:
        files = sorted((HERE / 'results').glob(f'alignment_{arm}_[0-9]*.json'))
        runs = [json.loads(f.read_text()) for f in files]
        if not runs: continue
        speed = mean(harmonic_mean([p['tokens_per_s'] for p in r['curve'] if p.get('tokens_per_s')][2:]) for r in runs)
        curves = [[(float(p['step']), p['val_bits_per_byte']) for p in r['curve'] if 'val_bits_per_byte' in p]
                  for r in runs]
        steps, bits_per_byte = zip(*((at[0][0], mean(b for _, b in at)) for at in zip(*curves)))
        minutes = [step * runs[0]['tokens'] / runs[0]['steps'] / speed / 60 for step in steps]
        found[arm] = dict(runs=runs, speed=speed, steps=steps, minutes=minutes, bits=bits_per_byte)
    return found


def reached(curve, xs, goal):
    """Where the curve first is as low as the goal, on a line between two points of it; None: never."""
    for i, y in enumerate(curve):
        if y <= goal:
            return xs[i] if i == 0 else xs[i - 1] + (xs[i] - xs[i - 1]) * (curve[i - 1] - goal) / (curve[i - 1] - y)
    return None


def race(found, arm, goal):
    """[steps, minutes] to the final loss of the arm `goal`, and how many times fewer they are than its own. At most
    those to the first validation, if that is below: the line from step 0 says nothing."""
    if goal not in found: return ['', '']
    cells, target, f, g = [], found[goal]['bits'][-1], found[arm], found[goal]
    early = f['bits'][1] <= target
    for x, form in (('steps', '.0f'), ('minutes', '.2f')):
        at, its = f[x][1] if early else reached(f['bits'], f[x], target), reached(g['bits'], g[x], target)
        cells.append(f'> {f[x][-1]:{form}}' if at is None else
                     f"{'<= ' * early}{at:{form}} ({'>= ' * early}{its / max(at, 1e-9):.1f}x)")
    return cells


def alignment():
    found, blocks = arms(), []
    for goal, (title, labels) in GROUPS.items():
        if goal not in found: continue
        short = 'scratch' in found and goal == 'plain'                 # the race against (d), too
        rows = [(title, 'bits/byte', 'tokens', 'tokens/s', 'peak memory', "steps to the first row's loss", 'minutes',
                 *['steps to the loss that (d) ends at', 'minutes'] * short)]
        for arm in labels:
            if arm not in found: continue
            r = found[arm]['runs'][0]
            here, there = (run.get('hardware') for run in (r, found[goal]['runs'][0]))
            other = f' (another machine: {here})' * (here != there)
            rows.append((labels[arm] + other, ', '.join(bits(r['validation']) for r in found[arm]['runs']),
                         f"{r['tokens'] / 1e6:.1f}M", f"{found[arm]['speed'] / 1e3:.0f}k",
                         f"{r['peak_gib'] or 0:.1f} GiB", *race(found, arm, goal),
                         *(race(found, arm, 'scratch') if short else [])))
        blank = [''] * (len(rows[0]) - 2)
        if goal == 'plain' and (HERE / 'results/alignment_teacher.json').exists():
            e = load('alignment_teacher')['results']
            rows += [('SmolLM2 left to right (exact)', bits(e['nll']), *blank),
                     ('token bigram', bits(e['bigram'], sign=False), *blank)]
        if goal == 'own_plain' and 'own_ar' in found:
            rows.append(('itself, left to right (exact)', bits(found['own_ar']['runs'][0]['validation']), *blank))
        blocks.append(table(*rows))
        if goal == 'gradient_broken':
            blocks.append("![Open-dLLM's loss with either gradient](results/alignment_gradient.png)")
    if 'plain' in found: blocks.insert(0, '![Validation loss against steps and time](results/alignment.png)')
    for file in ('bench_align_smollm2', 'bench_align'):
        if not (HERE / f'results/{file}.json').exists(): continue
        r = load(file)
        c, ok = r['config'], [x for x in r['results'] if x.get('agrees') and 'median_ms' in x]
        plain = next(x['median_ms'] for x in ok if x['peer'] == 'ours')
        labels = dict(ours='masked diffusion', ours_align='with alignment', ours_freeze='MLPs frozen',
                      ours_align_freeze='with alignment, MLPs frozen',
                      ours_stacked='with alignment by stacked fp32 copies',
                      hf_stacked='the same in transformers, torch.compile')
        shape = f"{c['n_layer']} layers of {c['n_embd']}, {c['batch']} x {c['seq_len']:,} tokens, {r['hardware']}"
        blocks.append(table((f'training step, {shape}', 'tokens/s', 'plain steps', 'peak memory'), *(
            (labels[x['peer']], f"{x['tokens_per_s'] / 1e3:.1f}k", f"{x['median_ms'] / plain:.2f}",
             f"{x['peak_gib'] or 0:.1f} GiB") for x in ok)))
    return '\n\n'.join(blocks) or 'Measurements are to come.'


def alignment_figure(out):
    """out, and beside it the curves of Open-dLLM's loss: over steps alone, since the broken gradient is emulated."""
    found, out = arms(), Path(out)
    label = lambda arm: ARMS[arm][0] + ', 1e-3' * arm.endswith('_lr')
    panel = lambda x, of: {label(arm): (found[arm][x][1:], found[arm]['bits'][1:]) for arm in of}     # after step 0
    for name, shown in (('', 'plain align freeze scratch plain_lr align_lr'.split()),
                        ('_gradient', GROUPS['gradient_broken'][1])):
        if of := [arm for arm in shown if arm in found]:
            beside = None if name else ('minutes of training', panel('minutes', of))
            figure('', 'steps', 'validation, bits/byte (upper bound)', panel('steps', of),
                   out.with_stem(out.stem + name), beside=beside)


# Tokens/s of Open-dLLM's latent benchmark, 64 tokens, batch 1, (10, 4) steps: its README (RTX 5090, fp32, eager), and
# its script run on one H100 in bf16. Its loop multiplies the last prediction by 0; ours is the one that samples.
# The script builds a denoiser with adaLN; which one the README timed is not said, its sizes are those without.
OPEN_DLLM_LATENT = {'qwen3_6_35b_a3b': ((3238, 6500), ()), 'qwen3_6_35b_a3b adaLN': ((), (2061, 3616)),
                    'qwen3_6_27b': ((745, 1500), ()), 'qwen3_6_27b adaLN': ((), (1416, 2813))}


def ldlm_speed():
    """Batch 1, 64 tokens: the sampler's graph, the plain loop; then larger batches, more tokens."""
    r = load_all('ldlm_speed')
    right = lambda row: 'ms' in row and (row.get('rel_error', 0) or 0) < 0.1 and row.get('rel_error', 0) is not None
    sizes = {p['shape']: p['parameters'] for p in r['results'] if p['way'] == 'weights'}
    label = lambda shape: f"{shape}, {sizes[shape] / 1e9:.2f}B"
    group = {}
    for row in filter(right, r['results']):
        group.setdefault((row['shape'], row['tokens'], row['batch'], row['steps']), {})[row['way']] = row
    one = [(f"64 tokens, batch 1, {r['hardware']}, bf16", 'steps', 'ms', 'tokens/s', 'must read', 'of the limit',
            'kernel after kernel, tokens/s', 'plain loop, tokens/s', 'Open-dLLM, published (RTX 5090, fp32)',
            'its script on an H100, bf16')]
    speed = lambda way, key, form=',.0f': f'{way[key]:{form}}' if way else ''
    for (shape, tokens, batch, steps), ways in group.items():
        if (batch, tokens) != (1, 64) or 'graph' not in ways: continue
        graph = ways['graph']
        theirs = [f'{dict(zip((10, 4), pair))[steps]:,}' if pair else '' for pair in OPEN_DLLM_LATENT.get(shape, ())]
        one.append((label(shape), steps, f"{graph['ms']:.2f}", speed(graph, 'tokens_per_s'),
                    f"{graph['read_bytes'] / 1e9:.1f} GB", speed(graph, 'of_limit', '.0%'),
                    *(speed(ways.get(way), 'tokens_per_s') for way in ('kernels', 'eager')), *(theirs or ['', ''])))
    steps = max(k[3] for k in group)
    batches = sorted({k[2] for k in group})
    many = [(f'tokens/s, {steps} steps', *(f'batch {b}' for b in batches))]
    for shape, tokens in dict.fromkeys(k[:2] for k in group):
        found = [group.get((shape, tokens, b, steps), {}).get('graph') for b in batches]
        if sum(map(bool, found)) > 1: many.append((f'{label(shape)}, {tokens} tokens', *(
            speed(w, 'tokens_per_s') and f"{speed(w, 'tokens_per_s')} ({w['of_limit']:.0%} of the {w['bound']} limit)"
            for w in found)))
    return table(*one) + '\n\n' + table(*many)


def sweep_point(name):
    """'gen_ppl,n_steps=8,eta=1.0' -> 'gen_ppl', 8 (None: not swept), ['eta=1.0']."""
    task, *settings = name.split(',')
    steps = next((int(x[8:]) for x in settings if x.startswith('n_steps=')), None)
    return task, steps, [x for x in settings if not x.startswith('n_steps=')]


LDLM_SAMPLES = {'autoregressive': 'ldlm_ar_continued', 'masked diffusion': 'ldlm_mdm_continued',
                'masked diffusion, lr 4e-3': 'ldlm_mdm_lr4_continued', 'latent diffusion': 'ldlm_small_b256_continued',
                'what the documents say': 'ldlm_real'}


def between(points, x):
    """y at x on the straight lines through the points (x, y); None outside of them."""
    points = sorted(points)
    for (a, ya), (b, yb) in zip(points, points[1:]):
        if a <= x <= b and a < b: return ya + (x - a) / (b - a) * (yb - ya)


def line_of(label, others):
    """A line joins temperatures: 'latent diffusion, eta 0.0'."""
    return ', '.join([label, *(o for o in others if not o.startswith('temperature='))]).replace('=', ' ')


ENTROPY = 6.6                   # nats per token: near that of the documents, every model has settings on both sides


def at_entropy(result, entropy=ENTROPY):
    """{(steps, settings but the temperature): (perplexity, tokens/s)} where the samples' tokens have this entropy:
    between temperatures, in logs."""
    groups, found = {}, {}
    for name, x in result['results'].items():
        _, steps, others = sweep_point(name)
        groups.setdefault((steps, *(o for o in others if not o.startswith('temperature='))), []).append(x)
    for key, of in groups.items():
        at = [between([(x['token_entropy'], math.log(x[k])) for x in of], entropy) for k in ('gen_ppl', 'tokens_per_s')]
        if None not in at: found[key] = tuple(map(math.exp, at))
    return found


def ldlm_lines(results):
    """{model and settings: {steps, None without a choice: (perplexity, tokens/s)}} at ENTROPY, without real_ppl."""
    lines = {}
    for label, r in results.items():
        for (steps, *others), x in ({} if 'real_ppl' in r['results'] else at_entropy(r)).items():
            lines.setdefault(line_of(label, others), {})[steps] = x
    return lines


def ldlm_samples():
    """Continuations of unseen documents: perplexity under another model at equal entropy, and speed; then points as
    measured, at the most steps. Of one model's settings, those that no other one beats in both."""
    found = {label: load(name) for label, name in LDLM_SAMPLES.items()}
    first = found['autoregressive']
    lines = ldlm_lines(found)
    steps = sorted({n for line in lines.values() for n in line}, key=lambda n: n or 1e9)
    equal = [(f"perplexity under {first['config']['scorer']} at entropy {ENTROPY} (tokens/s)",
              *(f'{n} steps' if n else 'token by token' for n in steps))]
    for label, line in lines.items():
        equal.append((label, *(f'{line[n][0]:.0f} ({line[n][1] / 1e3:.1f}k)' if n in line else '' for n in steps)))
    best = [[min((of[n][0] for k, of in lines.items() if k.startswith(kind) and n in of), default=None) for n in steps]
            for kind in ('latent', 'masked')]
    equal.append(('latent over masked diffusion, the best of each', *(f'{a / b:.2f}' if a and b else '' for a, b in zip(
        *best))))
    points = [('continuations', 'settings', 'steps', 'perplexity', 'entropy', 'lines that parse',
               f"tokens/s, batch {first['config']['batch_size']}, {first['hardware']}")]
    for label, r in found.items():
        rows = []
        for name, x in r['results'].items():
            _, n, others = sweep_point(name)
            beaten = any(sweep_point(other)[1] == n and y['gen_ppl'] < x['gen_ppl']
                         and y['token_entropy'] > x['token_entropy'] for other, y in r['results'].items())
            if n in (None, 128) and not beaten: rows.append((n or 0, ', '.join(others).replace('=', ' '), x))
        for n, others, x in sorted(rows, key=lambda row: row[:2]):
            n = n or x.get('settings', {}).get('max_new_tokens', '')
            speed = f"{x['tokens_per_s'] / 1e3:.1f}k" if 'tokens_per_s' in x else ''
            points.append((label, others, n, f"{x['gen_ppl']:.1f}", f"{x['token_entropy']:.2f}",
                           f"{x['lines_that_parse']:.0%}", speed))
    return '\n\n'.join(['![Perplexity, entropy, speed](results/ldlm_pareto.png)', table(*equal), table(*points)])


def ldlm_figure(out):
    """Left: perplexity against entropy at 128 steps, a point per temperature. Right: at equal entropy against speed, a
    point per number of steps."""
    found = {label: load(name) for label, name in LDLM_SAMPLES.items()}
    by_entropy, notes = {}, [{}, {}]
    for label, r in found.items():
        for name, x in r['results'].items():
            _, steps, others = sweep_point(name)
            if steps not in (None, 128): continue
            key = line_of(label, others)
            for values, v in zip(by_entropy.setdefault(key, ([], [])), (x['token_entropy'], x['gen_ppl'])):
                values.append(v)
            notes[0].setdefault(key, []).append(others[-1].split('=')[1] if others else '')
    by_speed = {key: ([], []) for key in by_entropy}                            # the same colours
    for key, line in ldlm_lines(found).items():
        by_speed[key] = [speed for _, speed in line.values()], [ppl for ppl, _ in line.values()]
        notes[1][key] = [str(n or '') for n in line]
    scorer = found['autoregressive']['config']['scorer']
    figure('', 'entropy, 128 steps, by temperature', f'perplexity under {scorer}', by_entropy, out, log_x=True,
           log_y=True, beside=(f'tokens/s at entropy {ENTROPY}, by steps', by_speed), notes=notes)


def ldlm_ablations():
    r = load_all('ldlm_ablations')
    nfe = r['config']['nfe'].split(',')[-1]
    shares = 'accuracy', 'accuracy_noisy', 'accuracy_t', 'accuracy_quarter'
    lines = [(f"{r['results'][0]['tokens'] / 1e6:.0f}M tokens each, {r['hardware']}", 'seed', 'right from z0',
              'at its own sigma_dec', 'from z_hat(t)', 't < 1/4', 'linearity', 'effective rank', 'variance',
              f'gen. perplexity, {nfe} steps', 'entropy')]
    for row in sorted(r['results'], key=lambda row: (row['arm'], row['seed'])):
        v, s = row['validation'], row['samples'].get(nfe, {})
        lines.append((f"{row['arm']}: {row['label']}", row['seed'], *(f"{v[k]:.1%}" for k in shares),
                      f"{v['linearity']:.3f}", f"{v['effective_rank']:.0f}", f"{v['latent_variance']:.2f}",
                      *(f'{s[k]:{form}}' if s.get(k) is not None else '-' for k, form in (
                          ('gen_ppl', '.1f'), ('token_entropy', '.2f')))))
    return table(*lines)


# drawn where README.md has the block already
PENDING = dict(ldlm_speed=ldlm_speed, ldlm_samples=ldlm_samples, ldlm_ablations=ldlm_ablations)
BLOCKS = dict(quickstart=quickstart, packages=packages, weights=weights, smollm2=smollm2, evaluation=evaluation,
              canonical=canonical, sandbox=sandbox, speed=speed, step_profile=step_profile, kernel_speed=kernel_speed,
              alignment=alignment, **PENDING)


def render(text):
    """README's text with every block redrawn."""
    for name, draw in BLOCKS.items():
        start, end = f'<!-- {name} -->', '<!-- end -->'
        if start not in text and name in PENDING: continue
        if start not in text: raise SystemExit(f"README.md has no block {start}")
        head, rest = text.split(start, 1)
        text = f'{head}{start}\n{draw()}\n{end}{rest.split(end, 1)[1]}'
    return text


# ---- of eval.py's results ----------------------------------------------------------------------------------
def numbers(result):
    """One result of eval.py -> {column: number} of what belongs into a table."""
    out = {}
    for task, r in result['results'].items():
        if task == 'nll': out['bits/byte'] = bits(r)
        if task == 'lm_eval':
            out |= {f"{name} {k.split(',')[0]}": v for name, m in r['results'].items() for k, v in m.items()
                    if isinstance(v, float) and 'stderr' not in k}
            continue
        groups = {'': r, ' average': r.get('average', {})} | {f' {k}': v for k, v in r.get('by_length', {}).items()}
        for group, values in groups.items():
            shown = 'pass@1', 'pass@10', 'exact_match', 'gen_ppl', 'token_entropy', 'lines_that_parse'
            out |= {f'{task}{group} {k}': values[k] for k in shown if values.get(k) is not None}
    return out


def read(file):
    try: return json.loads(Path(file).read_text())
    except (OSError, ValueError) as e: raise SystemExit(f"{file}: {e}") from None


def eval_result(file):
    result = read(file)
    if not isinstance(result, dict) or not {'model', 'results', 'config'} <= result.keys():
        raise SystemExit(f"{file} is not a result of eval.py")
    return result


def results_table(files, as_csv=False):
    """Rows: files; columns: every number that any of them has. Bounds carry their sign."""
    loaded = list(map(eval_result, files))
    rows = [numbers(r) for r in loaded]
    columns = list(dict.fromkeys(c for row in rows for c in row))
    head = ['model', *columns]
    names = [r['model']['path'] if r['model'] else 'reference solutions' for r in loaded]
    cell = lambda v: v if isinstance(v, str) else f'{v:.4f}'
    body = [[name, *(cell(row.get(c, '')) for c in columns)] for name, row in zip(names, rows)]
    if not as_csv: return table(head, *body) + '\n'
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([head, *body])
    return text.getvalue()


def figure(title, xlabel, ylabel, lines, out, log_x=False, marker='o', beside=None, notes=(), log_y=False):
    """lines: {label: (xs, ys)}; notes: per panel {label: a text per point}. beside: xlabel and lines of a second panel.
    log_x: of the last panel, with a tick at every x; with notes without."""
    try:
        import matplotlib.ticker
    except ImportError: raise SystemExit("figures need: pip install matplotlib") from None
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    panels = [(xlabel, lines), *([beside] if beside else [])]
    beside_it = dict(loc='center left', bbox_to_anchor=(1, 0.5)) if notes else {}
    fig, axes = plt.subplots(1, len(panels), figsize=(4 + 3 * len(panels), 4.2), dpi=150, squeeze=False, sharey=True)
    for i, (ax, (xlabel, lines)) in enumerate(zip(axes[0], panels)):
        texts = notes[i] if notes else {}
        for label, (xs, ys) in lines.items():
            ax.plot(xs, ys, marker=marker, ms=4, lw=1.6, label=label)
            for x, y, note in zip(xs, ys, texts.get(label, [])):
                ax.annotate(note, (x, y), xytext=(4, 4), textcoords='offset points', fontsize=7)
        if log_x and ax is axes[0, -1]:
            ax.set_xscale('log')
            ax.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=''))
            ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        if log_y: ax.set_yscale('log')
        if log_x and not notes:
            ticks = sorted({x for xs, _ in lines.values() for x in xs})
            ax.set_xticks(ticks, [f'{t:g}' for t in ticks])
            ax.minorticks_off()
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel if ax is axes[0, 0] else '')
        if marker and all(isinstance(x, int) for xs, _ in lines.values() for x in xs):
            ax.set_xticks(range(1, 1 + max(max(xs) for xs, _ in lines.values())))
        ax.grid(alpha=0.3)
        ax.spines[['top', 'right']].set_visible(False)
        if ax is axes[0, -1]: ax.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, **beside_it)
    fig.tight_layout()
    fig.savefig(out)
    print(f"wrote {out}")


def pass_at_k_curves(files, out):
    """pass@k over k = 1..n of every task in the files that has at least two samples per problem."""
    from benchmarks import pass_at_k
    lines = {}
    for f in files:
        result = eval_result(f)
        n = result['config']['n_samples']
        for task, r in result['results'].items():
            if n > 1 and 'n_passed' in r:
                ys = [sum(pass_at_k(n, c, k) for c in r['n_passed']) / len(r['n_passed']) for k in range(1, n + 1)]
                lines[f"{result['model']['path']}, {task}"] = (list(range(1, n + 1)), ys)
    if not lines: raise SystemExit("no task with executed programs and n_samples > 1 in these files")
    figure('pass@k', 'k', 'share of problems', lines, out)


def sweep_lines(result, metric):
    """x: the first swept key; a line for every task and choice of the others. -> key, {label: (xs, ys)}"""
    lines, first = {}, None
    for name, r in result['results'].items():
        task, *point = name.split(',')
        values = r.get('average') or r
        if not point or metric not in values: continue
        key, x = point[0].split('=')
        first = first or key
        xs, ys = lines.setdefault(', '.join([task, *point[1:]]), ([], []))
        try: xs.append(float(x))
        except ValueError: xs.append(x)
        ys.append(values[metric])
    if not lines: raise SystemExit(f"no sweep in this file has the metric {metric!r}")
    return first, lines


def pareto(files, out):
    """Perplexity of samples against the entropy of their tokens and against speed, a line per model and settings, a
    point per number of steps (without steps: a line per model, a point per setting): low perplexity with low entropy
    is repetition. From eval.py --tasks=gen_ppl, with or without --sweep; real_ppl is a point."""
    by_entropy, by_speed, notes, scorers = {}, {}, {}, set()
    for f in files:
        result = eval_result(f)
        points = {name: r for name, r in result['results'].items() if r.get('gen_ppl')}
        if not points: raise SystemExit(f"{f} has no gen_ppl")
        for name, r in points.items():
            task, steps, rest = sweep_point(name)
            path = Path(result['model']['path'])
            path = path.parent if re.fullmatch(r'(best|step)-\d+', path.name) else path
            model = f"{path.name} ({result['model']['objective']})"
            shown = rest if steps else [x.split('=')[0] for x in rest]
            label = ', '.join(['what the documents say' if task == 'real_ppl' else model, *shown])
            for lines, x in ((by_entropy, 'token_entropy'), (by_speed, 'tokens_per_s')):
                if x not in r: continue
                xs, ys = lines.setdefault(label, ([], []))
                xs.append(r[x]), ys.append(r['gen_ppl'])
            notes.setdefault(label, []).append(str(steps or ', '.join(x.split('=')[1] for x in rest)))
            scorers.add(r['scorer'])
    if len(scorers) > 1: raise SystemExit(f"perplexities of different scorers: {', '.join(sorted(scorers))}")
    figure('', 'entropy of the tokens, nats', f'perplexity under {scorers.pop()}', by_entropy, out, log_x=True,
           beside=('tokens/s', by_speed) if by_speed else None, notes=[notes, notes], log_y=True)


def training_curves(files, metric, x):
    """{file's name, of out/x/result.json x: (xs, ys)} from train.py's results: lines of metrics.jsonl that have both
    keys."""
    lines = {}
    for file in files:
        points = [p for p in read(file).get('curve', []) if metric in p and x in p]
        if not points: raise SystemExit(f"{file} has no curve of {metric!r} over {x!r}")
        label = Path(file).parent.name if Path(file).stem == 'result' else Path(file).stem
        lines[label] = [p[x] for p in points], [p[metric] for p in points]
    return lines


if __name__ == '__main__':
    check = False               # only compare README.md with results/
    table_of = ''               # comma list of eval.py's results
    pass_at_k = ''              # comma list of eval.py's results with n_samples > 1
    sweep = ''                  # one result of eval.py --sweep
    pareto_of = ''              # comma list of eval.py's gen_ppl results
    metric = 'pass@1'           # of the sweep: pass@1, pass@10, exact_match, gen_ppl, bits_per_byte, token_entropy, ...
    curves = ''                 # comma list of train.py's results; metric: a key of metrics.jsonl, loss or val_...
    x = 'step'                  # of the curves: step, minutes or tokens
    out = ''                    # .md, .csv or .png
    from configurator import configure
    configure(globals(), quiet=True)
    if (pass_at_k or sweep or pareto_of or curves) and not out.endswith(('.png', '.pdf', '.svg')):
        raise SystemExit("a figure needs --out=x.png (or .pdf, .svg)")
    if table_of and not out.endswith(('.md', '.csv')) and out: raise SystemExit("a table needs --out=x.md or x.csv")
    if out and not Path(out).parent.is_dir(): raise SystemExit(f"no directory {Path(out).parent}")
    for file in filter(None, f'{table_of},{pass_at_k},{sweep},{pareto_of},{curves}'.split(',')):
        if not Path(file).is_file(): raise SystemExit(f"no such file: {file}")
    if table_of:
        text = results_table(table_of.split(','), out.endswith('.csv'))
        if out: Path(out).write_text(text)
        print(text, end='')
    elif pass_at_k: pass_at_k_curves(pass_at_k.split(','), out)
    elif pareto_of: pareto(pareto_of.split(','), out)
    elif curves: figure('', x, metric, training_curves(curves.split(','), metric, x), out, marker='')
    elif sweep:
        result = eval_result(sweep)
        key, lines = sweep_lines(result, metric)
        figure(result['model']['path'], key, metric, lines, out, log_x=key == 'n_steps')
    else:
        readme = HERE / 'README.md'
        old = readme.read_text()
        new = render(old)
        if not check:
            readme.write_text(new)
            alignment_figure(HERE / 'results/alignment.png')
            ldlm_figure(HERE / 'results/ldlm_pareto.png')
        elif old != new: raise SystemExit("README.md is not what results/*.json say: python plot.py")
