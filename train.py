"""Train a language model: any objective, one process or many. Reads top to bottom: settings, setup, data, model, loop.

    python train.py config/quickstart.py                        # five minutes on two CPU cores
    python train.py config/quickstart.py --objective=ar         # the autoregressive baseline on the same tokens
    torchrun --standalone --nproc_per_node=8 train.py config/x.py --micro_batch_size=16
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=host:29500 train.py config/x.py

The same command again resumes from the last checkpoint in out_dir. Data order and noise are functions of (seed, step,
row), so any number of processes and micro-steps computes the same thing, and a run may resume on other hardware.
"""
import contextlib
import functools
import json
import math
import os
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import data
from configurator import configure, dump
from model import ModelConfig, Transformer
from muon import Muon

# ---- settings: every name is a key of config files and of the command line ---------------------------------------
out_dir = 'out/run'                 # checkpoints, metrics.jsonl, config.py
init_from = 'scratch'               # scratch; resume (must find a checkpoint in out_dir); a checkpoint or Hugging Face path
objective = 'mdm'                   # ar or mdm
weighting = 'elbo'                  # mdm: elbo (the bound), flat, planner
shift = False                       # mdm from scratch: hidden row i-1 predicts token i; converted AR models always do
t_min = 1e-3                        # mdm: smallest noise level
# data
dataset = 'stdlib'                  # stdlib, packages, files (path or glob), or a hub dataset by name
subset = ''                         # hub: the dataset's configuration name
key = 'text'                        # column with the text; 'messages' or 'prompt,response' for SFT
max_docs = 0                        # stop after so many documents (0 = all)
data_dir = ''                       # where the tokens are; default data/<dataset>-<tokenizer>
tokenizer = ''                      # bpe (own), bytes, a directory or hub name; default: init_from's, else bpe
vocab_size = 4096                   # of an own bpe
seq_len = 1024                      # tokens per row
val_split = 'val'                   # split that validation reads
# model (from scratch)
n_layer = 12
n_head = 12
n_kv_head = 12                      # key/value heads: fewer = grouped-query attention
n_embd = 768
n_ff = 2048                         # width of the SwiGLU
rope_theta = 1e4
qk_norm = True                      # RMSNorm on queries and keys (Qwen3)
tied = True                         # the head is the embedding
# optimisation
global_batch_size = 64              # rows per optimizer step, over all processes
micro_batch_size = 0                # rows per forward; 0 = global_batch_size / processes
max_iters = 1000                    # optimizer steps
max_minutes = 0.0                   # stop (and save) after so long; 0 = never
optimizer = 'adamw'                 # adamw, or muon (the blocks' matrices; the rest by adamw)
lr = 6e-4
min_lr_ratio = 0.1                  # of the cosine's end
warmup_iters = 100
weight_decay = 0.1                  # not on norms and biases
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
seed = 1337
# evaluation, logging, checkpoints
eval_interval = 250                 # steps; 0 = only at the end
eval_rows = 128                     # validation rows; 0 = all
eval_draws = 1                      # noise draws per row of the bound
final_eval_rows = 0                 # at the end; 0 = all
eval_seed = 0
sample_prompt = ''                  # text to continue at each evaluation
sample_tokens = 96                  # tokens per sample; 0 = no samples
sample_steps = 96
sample_temperature = 0.8
sample_commit = 'ancestral'         # schedule, ancestral, threshold
sample_score = 'random'             # confidence, margin, entropy, random
log_interval = 10                   # steps
log = ''                            # wandb or tensorboard, beside metrics.jsonl
save_interval = 500                 # steps; 0 = only at the end
keep_last = 1                       # rolling checkpoints to keep
export_dtype = 'bfloat16'           # of out_dir/export, written at the end
push_to_hub = ''                    # user/name: upload the export with a model card
result = ''                         # results/x.json: where to leave the numbers of this run
# system
device = ''                         # cuda or cpu; default: cuda when there is one
compile = True                      # torch.compile per block, on GPUs
deterministic = False               # the same bits twice on a GPU, slower
if __name__ != '__main__': raise ImportError("train.py is a script: nothing imports it")
config = configure(globals())

# ---- setup -------------------------------------------------------------------------------------------------------
started = time.time()
rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
if device == 'cuda':
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    torch.cuda.set_device(device)
    torch.set_num_threads(1)        # the CPU only prepares data here; a spinning pool would starve the launches
on_gpu = device.startswith('cuda')
if world > 1: dist.init_process_group('nccl' if on_gpu else 'gloo')
if deterministic:
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
torch.manual_seed(seed)
autocast = torch.autocast('cuda', torch.bfloat16) if on_gpu else contextlib.nullcontext()
is_main = rank == 0
say = (lambda text: tqdm.write(str(text))) if is_main else (lambda text: None)

if global_batch_size % (world * (micro_batch_size or 1)) or global_batch_size % world:
    raise SystemExit(f"global_batch_size {global_batch_size} must be a multiple of processes x micro_batch_size "
                     f"= {world} x {micro_batch_size or 1}")
micro = micro_batch_size or global_batch_size // world
accumulation = global_batch_size // (world * micro)
if optimizer not in ('adamw', 'muon'): raise SystemExit(f"optimizer must be adamw or muon, got {optimizer!r}")

# ---- data --------------------------------------------------------------------------------------------------------
resume_from = checkpoint.find(out_dir)
if init_from == 'resume' and resume_from is None: raise SystemExit(f"init_from=resume: there is no checkpoint in {out_dir}")
pretrained = init_from not in ('scratch', 'resume')
tokenizer = tokenizer or (init_from if pretrained else 'bpe')
slug = lambda text: ''.join(c if c.isalnum() else '_' for c in text.strip('./'))
data_dir = data_dir or f"data/{slug(dataset)}-{slug(tokenizer)}{f'-{vocab_size}' if tokenizer == 'bpe' else ''}"
if is_main: data.prepare(dataset, data_dir, tokenizer=tokenizer, vocab_size=vocab_size, subset=subset, key=key, max_docs=max_docs)
if world > 1: dist.barrier()

# ---- model -------------------------------------------------------------------------------------------------------
start_step, tokens_seen, best_val, minutes_before = 0, 0, math.inf, 0.0
if resume_from:
    state = json.loads((resume_from / 'state.json').read_text())
    free = {'init_from', 'max_iters', 'max_minutes', 'eval_interval', 'eval_rows', 'eval_draws', 'final_eval_rows', 'eval_seed',
            'log_interval', 'log', 'save_interval', 'keep_last', 'export_dtype', 'push_to_hub', 'result', 'device', 'compile',
            'deterministic', 'micro_batch_size', 'out_dir', 'data_dir', 'val_split'}
    changed = [f"{k} {state['config'].get(k)!r} -> {v!r}" for k, v in config.items()
               if k not in free and not k.startswith('sample_') and state['config'].get(k) != v]
    if changed: raise SystemExit(f"{out_dir} holds a run with other settings ({', '.join(changed)}): "
                                 f"choose another --out_dir, or delete it to start anew")
    say(f"resuming from {resume_from}")
    obj, tok = checkpoint.load_checkpoint(str(resume_from), weighting=weighting)
    start_step, tokens_seen, best_val = state['step'], state['tokens'], state['best_val']
    minutes_before = state['minutes']
elif pretrained:
    obj, tok = checkpoint.load_checkpoint(init_from, objective=objective, weighting=weighting)
    if obj.separator is None: obj.separator = tok.sep_id        # our documents start with one: DESIGN decision 2
else:
    tok = data.load_tokenizer(f'{data_dir}/tokenizer')
    cfg = ModelConfig(vocab_size=-(-tok.vocab_size // 64) * 64, n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head,
                      n_embd=n_embd, n_ff=n_ff, head_dim=n_embd // n_head, rope_theta=rope_theta, qk_norm=qk_norm, tied=tied,
                      max_seq_len=seq_len)
    model = Transformer(cfg)
    mask_id = tok.mask_id if tok.mask_id is not None or objective == 'ar' else checkpoint.find_mask_id(model, tok)
    obj = checkpoint.make_objective(objective, model, mask_id=mask_id, shift=shift, weighting=weighting, t_min=t_min,
                                    separator=tok.sep_id, eos_id=tok.eos_id)
obj.to(device).train()
model = obj.model
train_data = data.Corpus(data_dir, 'train', seq_len, model.cfg.vocab_size)
val_data = data.Corpus(data_dir, val_split, seq_len, model.cfg.vocab_size)

groups, optimizers = obj.param_groups(weight_decay), []
if optimizer == 'muon':             # the blocks' matrices; embedding, head and vectors stay with AdamW
    rows = model.fused_rows()
    matrices = {p: rows.get(n.rsplit('.', 2)[-2]) for n, p in model.layers.named_parameters() if p.ndim == 2 and p.requires_grad}
    optimizers.append(Muon([dict(params=[p], rows=r) for p, r in matrices.items()], lr, weight_decay))
    for g in groups: g['params'] = [p for p in g['params'] if p not in matrices]
optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=1e-8, fused=on_gpu))
peak_lrs = [[g['lr'] for g in opt.param_groups] for opt in optimizers]
if resume_from: checkpoint.load_optimizers(resume_from, obj, optimizers)

compiled = compile and on_gpu
if compiled:
    for block in model.layers: block.compile(dynamic=False)
ddp = DistributedDataParallel(obj, gradient_as_bucket_view=True) if world > 1 else obj

out = Path(out_dir)
flops_per_token = model.flops_per_token(seq_len, scored=0.5 if objective == 'mdm' else 1.0)
PEAK = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12, 'B200': 2250e12, 'L40S': 362e12, '4090': 165e12, '5090': 210e12}
gpu = torch.cuda.get_device_name() if on_gpu else ''
peak_flops = next((f for name, f in PEAK.items() if name in gpu), 0) * world
if is_main:
    out.mkdir(parents=True, exist_ok=True)
    (out / 'config.py').write_text(dump(config), encoding='utf-8')
    metrics_file = out / 'metrics.jsonl'                        # a resumed run forgets what came after its checkpoint
    old = [line for line in metrics_file.read_text().splitlines() if json.loads(line)['step'] <= start_step] \
        if metrics_file.exists() and start_step else []
    metrics_file.write_text(''.join(line + '\n' for line in old))
    say(f"{obj.name}: {model.n_params() / 1e6:.2f}M parameters ({model.n_params(False) / 1e6:.2f}M without embeddings) on "
        f"{gpu or 'CPU'}{f' x {world}' if world > 1 else ''}; {len(train_data):,} rows of {seq_len} tokens, "
        f"{global_batch_size * seq_len:,} tokens per step in {accumulation} micro-step(s)")
    if not pretrained and not resume_from:
        say(f"loss to expect at the start: ln {model.cfg.vocab_size} = {math.log(model.cfg.vocab_size):.2f} nats per token")
tracker = None
if is_main and log == 'wandb':
    import wandb
    tracker = wandb.init(project='nano-dlm', name=out.name, config=config, resume='allow')
elif is_main and log == 'tensorboard':
    from torch.utils.tensorboard import SummaryWriter
    tracker = SummaryWriter(out / 'tensorboard')
elif log not in ('', 'wandb', 'tensorboard'): raise SystemExit(f"log must be wandb or tensorboard, got {log!r}")


def record(step, **metrics):
    """One line of metrics.jsonl, and the scalars to wandb or tensorboard."""
    with open(out / 'metrics.jsonl', 'a') as f: f.write(json.dumps(dict(step=step, **metrics)) + '\n')
    scalars = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
    if log == 'wandb': tracker.log(scalars, step=step)
    elif tracker is not None:
        for k, v in scalars.items(): tracker.add_scalar(k, v, step)


def learning_rate(step):
    """Share of the peak: linear warm-up, then a cosine down to min_lr_ratio at max_iters."""
    if step < warmup_iters: return (step + 1) / (warmup_iters + 1)
    progress = min((step - warmup_iters) / max(max_iters - warmup_iters, 1), 1)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def prepared(step, i):
    """Micro-batch i of this rank: rows of the global batch, noise drawn, in pinned memory. Runs in a thread, ahead."""
    lo = (i * world + rank) * micro
    batch = obj.prepare(train_data.batch(step, lo, lo + micro, global_batch_size, seed), seed)
    return batch.pin() if on_gpu else batch


@functools.cache
def eval_bytes(n_rows):
    """Bytes of text that the scored tokens of the validation rows stand for (EOS: none)."""
    return sum(val_data.target_bytes(b) for b in val_data.eval_batches(n_rows, 64))


@torch.no_grad()
def evaluate(step, n_rows):
    """Validation from its own seed, with uncompiled blocks; a sample; the best checkpoint."""
    global best_val
    obj.eval()
    with torch.compiler.set_stance('force_eager'), autocast:
        batches = (b.to(device) for b in val_data.eval_batches(n_rows, max(micro, 8), rank, world))
        val = obj.validate(batches, eval_seed, eval_draws)
        bound = '' if obj.name == 'ar' else '<= '
        val['bits_per_byte'] = val['nats_per_token'] * val['n_tokens'] / math.log(2) / eval_bytes(n_rows)
        say(f"step {step}: validation {bound}{val['nats_per_token']:.4f} +- {val['stderr']:.4f} nats/token, "
            f"{bound}{val['bits_per_byte']:.3f} bits/byte ({val['n_rows']} rows x {eval_draws} draw(s))")
        if is_main and sample_tokens:
            ids, nfe = obj.sample([tok.encode(sample_prompt)], sample_tokens, n_steps=sample_steps, seed=step, score=sample_score,
                                  temperature=sample_temperature, commit=sample_commit)
            say('    ' + tok.decode(ids[0]).replace('\n', '\n    '))
    obj.train()
    if is_main:
        record(step, **{f'val_{k}': v for k, v in val.items()})
        if val['nats_per_token'] < best_val and 0 < step:
            checkpoint.save_checkpoint(out, 'best', obj, tok, run_state(step, val))
    if step: best_val = min(best_val, val['nats_per_token'])
    return val


def run_state(step, val=None):
    return dict(step=step, tokens=tokens_seen, best_val=best_val, minutes=minutes_before + (time.time() - loop_started) / 60,
                config=config, val=val or {})


def save(step):
    if is_main: checkpoint.save_checkpoint(out, 'step', obj, tok, run_state(step), optimizers, keep_last)


# ---- loop --------------------------------------------------------------------------------------------------------
stop_signal = []
for sig in (signal.SIGINT, signal.SIGTERM): signal.signal(sig, lambda number, frame: stop_signal.append(number))
if start_step >= max_iters: say(f"this run is finished ({start_step} steps): raise --max_iters or choose another --out_dir")
loop_started = last_time = time.time()
bar = tqdm(total=max_iters, initial=start_step, disable=None if is_main else True, unit='step', dynamic_ncols=True)
ahead = ThreadPoolExecutor(1)
pending = ahead.submit(prepared, start_step, 0) if start_step < max_iters else None
step, bad_steps, speeds, window, val = start_step, 0, [], 0, {}
try:
    if start_step == 0 and eval_interval and max_iters: val = evaluate(0, eval_rows)
    last_time = time.time()
    while step < max_iters:
        scale = learning_rate(step)
        for opt, peaks in zip(optimizers, peak_lrs):
            for group, peak in zip(opt.param_groups, peaks): group['lr'] = peak * scale
        sums = None
        for i in range(accumulation):
            batch = pending.result()
            nxt = (step, i + 1) if i + 1 < accumulation else (step + 1, 0)
            if nxt[0] < max_iters: pending = ahead.submit(prepared, *nxt)
            with autocast, (ddp.no_sync() if world > 1 and i + 1 < accumulation else contextlib.nullcontext()):
                loss, stats = ddp(batch.to(device, non_blocking=True))
                (loss * world).backward()                       # DDP averages; the loss is already over the global batch
            flat = torch.cat([loss.detach().reshape(1), *(s.detach().flatten().float() for s in stats.values())])
            sums = flat if sums is None else sums + flat
        out_of_time = max_minutes and (time.time() - loop_started) / 60 + minutes_before >= max_minutes
        sums = torch.cat([sums, sums.new_tensor([float(bool(stop_signal)), float(is_main and bool(out_of_time))])])
        if world > 1: dist.all_reduce(sums)                     # one small message: loss, stats and the wish to stop
        grad_norm = torch.nn.utils.clip_grad_norm_(obj.parameters(), grad_clip if grad_clip else math.inf).item()
        train_loss, *flat, stop_asked, time_is_up = sums.tolist()
        reduced = {}
        for name, s in stats.items():
            reduced[name], flat = torch.tensor(flat[:s.numel()]).view_as(s), flat[s.numel():]
        if math.isfinite(grad_norm) and math.isfinite(train_loss):
            for opt in optimizers: opt.step()
            obj.after_step(reduced)
            bad_steps = 0
        else:
            bad_steps += 1
            say(f"step {step}: loss {train_loss}, gradient norm {grad_norm}: step skipped ({bad_steps} in a row)")
            if bad_steps == 5: raise SystemExit("five non-finite steps in a row: lower --lr, raise --warmup_iters, or look at the "
                                                f"data; the last checkpoint is {checkpoint.find(out_dir)}")
        for opt in optimizers: opt.zero_grad(set_to_none=True)
        step, window = step + 1, window + 1
        tokens_seen += global_batch_size * seq_len
        bar.update()

        if step % log_interval == 0 or step == max_iters:
            seconds, last_time = time.time() - last_time, time.time()
            speed, window = window * global_batch_size * seq_len / seconds, 0
            if step - start_step > 2 * log_interval: speeds.append(speed)
            mfu = flops_per_token * speed / peak_flops if peak_flops else None
            show = f"loss {train_loss:.3f} | {speed / 1e3:.1f}k tok/s" + (f" | MFU {mfu:.1%}" if mfu else '')
            bar.set_postfix_str(show)
            if is_main:
                if bar.disable: say(f"step {step}/{max_iters}: {show} | lr x {scale:.2f} | ETA "
                                    f"{(max_iters - step) * global_batch_size * seq_len / speed / 60:.1f} min")
                ratios = {k: (v[0] / v[1].clamp(min=1e-9)).tolist() for k, v in reduced.items()}
                record(step, loss=train_loss, grad_norm=grad_norm, lr=lr * scale, tokens=tokens_seen, tokens_per_s=speed,
                       **ratios, **({'mfu': mfu} if mfu else {}))
        stopping = stop_asked or time_is_up
        if stopping: say(f"stopping after step {step}: " + ('time is up' if time_is_up else 'signal') + ', saving')
        if stopping or step == max_iters or (save_interval and step % save_interval == 0): save(step)
        if eval_interval and step % eval_interval == 0 and step < max_iters and not stopping:
            val = evaluate(step, eval_rows)
            last_time, window = time.time(), 0
        if stop_asked: break
        if time_is_up: break
    train_minutes = minutes_before + (time.time() - loop_started) / 60
    bar.close()
    if not stop_signal and (step > start_step or not (out / 'export').exists()): val = evaluate(step, final_eval_rows)
except torch.OutOfMemoryError:
    raise SystemExit(f"out of GPU memory: lower --micro_batch_size (now {micro}; the result stays the same), --seq_len or the "
                     "model's size") from None
except OSError as e:
    if e.errno == 28: raise SystemExit(f"the disk is full ({e}); the last checkpoint is {checkpoint.find(out_dir)}") from None
    raise
finally:
    bar.close()
    ahead.shutdown(wait=False, cancel_futures=True)

# ---- leave the results -------------------------------------------------------------------------------------------
if is_main and not stop_signal and val:
    model.save_pretrained(out / 'export', tok, obj.dlm, getattr(torch, export_dtype))
    if push_to_hub: checkpoint.push_to_hub(out / 'export', push_to_hub, checkpoint.model_card(obj, run_state(step, val), push_to_hub))
    speed = statistics.median(speeds) if speeds else None
    facts = checkpoint.provenance(device, started) | dict(
        parameters=model.n_params(), steps=step, tokens=tokens_seen, train_minutes=round(train_minutes, 2), tokens_per_s=speed,
        mfu=flops_per_token * speed / peak_flops if peak_flops and speed else None,
        validation=val | dict(estimator='exact' if obj.name == 'ar' else 'upper bound, count', draws=eval_draws, seed=eval_seed,
                              split=val_split, dataset=dataset, dataset_sha256=train_data.meta.get('sha256')),
        config=config)
    for file in filter(None, (out / 'result.json', result)): checkpoint.write_json(file, facts)
    say(f"done in {train_minutes:.1f} minutes: {out}/export (Hugging Face format), {out}/result.json\n"
        f"    python sample.py --path={out_dir}")
if world > 1: dist.destroy_process_group()
