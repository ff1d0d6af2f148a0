"""Run programs that nobody has read against tests; the verdict is one that the program cannot forge.

    verdict = execute(solution, 'assert add(1, 2) == 3')        # Verdict(passed, status, detail, seconds)
    python sandbox.py                                           # what this machine guarantees

The tests never enter the process that runs the program. A *tester* runs them; a name that they do not define
is a `Remote`: calling it sends the arguments to the *candidate*, which runs the solution, and returns the
result. Both go by value, as basic types (VALUES; a subclass goes as its base); any other object stays with
the candidate, and the test holds a Remote for it. So a program sees arguments and chooses results; it sees no
expected value, decides no `==`, and its output and exit status count for nothing.

    caller - server, one per worker +- fork -> tester: the test, the expected values, the verdict
                                    +- zygote - fork -> candidate: the solution; no ancestor ever saw a test

The candidate is confined by Landlock (it reads the standard library and numpy, writes nothing), seccomp (no
other process, no network), resource limits and, under root, a user of its own. `guarantees()` says what is
missing here. For reproducible verdicts it has one hash seed, one random seed, no environment, no input.

Differences from one process: arguments and results are copies (changed arguments come back from a call that
returns None, as in-place functions do); objects of the solution's classes can be made, called, read, set,
indexed, iterated and printed by a test, but equal only themselves and have no operators, and what they answer
is the program's word; tests cannot hand over their own functions, nor name exception classes of the solution
(but their builtin bases). Programs cannot write files, start processes or import other packages.
"""
import ast
import builtins
import collections
import ctypes
import datetime
import errno
import gc
import importlib
import importlib.util
import json
import os
import platform
import queue
import random
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import types
from decimal import Decimal
from fractions import Fraction
from itertools import islice, pairwise
from typing import NamedTuple

MAX_MESSAGE = 1 << 25           # bytes of one call or result
MAX_TASKS = 32                  # threads that a candidate may add
MAX_FILE = 1 << 20              # bytes; only where Landlock does not forbid every write


class Verdict(NamedTuple):
    passed: bool
    status: str                 # 'passed', 'failed', 'timeout', 'memory', 'crashed' (it ended, or sent garbage)
    detail: str                 # one printable line, for the log
    seconds: float


def execute(solution, test, timeout=10.0, memory_mb=1024, setup='', without=()):
    """-> Verdict on one program: for many, execute_many saves the start of the server.

    solution: the program. test: trusted code that calls what the program defines. setup: trusted code that the
    test needs besides; of its functions those without a body (a docstring only) are the program's to define.
    timeout: seconds of wall time. memory_mb: address space that either side may add. without: layers to leave
    out, for tests of what remains.
    """
    [(_, verdict)] = execute_many([(solution, test, setup)], timeout, memory_mb, 1, without)
    return verdict


def execute_many(jobs, timeout=10.0, memory_mb=1024, workers=None, without=()):
    """jobs: [(solution, test[, setup[, timeout]])]. Yields (index, Verdict) as they end.

    workers: servers, each of which runs one program at a time; None: one per CPU.
    """
    todo, done, servers = queue.SimpleQueue(), queue.SimpleQueue(), []
    for i, (solution, test, *more) in enumerate(jobs):
        setup, seconds = [*more, *('', timeout)[len(more):]]
        todo.put((i, dict(solution=solution, test=test, setup=setup, timeout=seconds, memory_mb=memory_mb)))

    def work(server):
        try:
            while True:
                i, job = todo.get_nowait()
                done.put((i, server.run(job)))
        except queue.Empty: pass
        except BaseException as e: done.put((None, e))          # raised where the verdicts are read
        finally: server.close()

    n, cpus = todo.qsize(), len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()
    try:
        for _ in range(min(workers or cpus, n)): servers.append(Server(without))
        for server in servers: threading.Thread(target=work, args=(server,), daemon=True).start()
        for _ in range(n):
            i, verdict = done.get()
            if i is None: raise verdict
            yield i, verdict
    finally:                                                    # also if the caller stops early
        for server in servers: server.close()


def guarantees(without=()):
    """-> lines that say what holds on this machine, and what does NOT."""
    server = Server(without)
    server.close()
    landlock, seccomp, user = (server.layers[name] for name in LAYERS)
    linux = sys.platform == 'linux'
    rows = [(True, 'verdict: tests and expected values stay in another process'),
            (True, 'time: killed at the timeout'),
            (linux and seccomp, 'memory: limited (RLIMIT_AS)'),
            (landlock, f'files: reads only the standard library and numpy, writes none (Landlock {landlock})'),
            (seccomp, 'processes: starts and signals none, so nothing outlives the verdict (seccomp)'),
            (linux and user, f'threads: at most {MAX_TASKS} (RLIMIT_NPROC)'),
            (seccomp, 'network: none (seccomp)'),
            (landlock or user == 'own', "secrecy: the memory of other processes is out of reach")]
    return [line if held else f'NOT guaranteed: {line.split(":")[0]}' for held, line in rows]


class Server:
    """The process that starts testers and candidates. It imports neither torch nor the caller's modules."""
    def __init__(self, without=()):
        numpy = importlib.util.find_spec('numpy')
        self.argv = [sys.executable, '-s', '-S', '-P', os.path.abspath(__file__), '--serve',
                     os.path.dirname(numpy.origin) if numpy else '', *without]
        self.env = {k: os.environ[k] for k in ('LD_LIBRARY_PATH', 'TMPDIR') if k in os.environ}
        self.env |= dict(PYTHONHASHSEED='0', OPENBLAS_NUM_THREADS='1', OMP_NUM_THREADS='1')
        self.lock, self.closed = threading.Lock(), False
        self.start()

    def start(self):
        with self.lock:
            if self.closed: raise RuntimeError('the server is closed')
            self.process = subprocess.Popen(
                self.argv, env=self.env, cwd='/', start_new_session=True, bufsize=0,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        hello = self.read(60)
        if not hello: raise SystemExit(f'the sandbox does not start: see {" ".join(self.argv)}')
        self.layers = json.loads(hello)

    def read(self, timeout):
        """-> one line; nothing if the server ended or is silent for so long."""
        deadline, text = time.monotonic() + timeout, b''
        while not text.endswith(b'\n'):
            left = max(0, deadline - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]: return b''
            chunk = self.process.stdout.read(1 << 16)
            if not chunk: return b''
            text += chunk
        return text

    def run(self, job):
        try:
            data = json.dumps(job).encode() + b'\n'
            while data: data = data[self.process.stdin.write(data):]
            answer = self.read(job['timeout'] + 30)
        except BrokenPipeError: answer = b''
        if not answer:                                          # killed by a program, without seccomp
            self.stop()
            self.start()
        status, detail, seconds = json.loads(answer or '["crashed", "the server was lost", 0]')
        detail = ''.join(c if c.isprintable() else ' ' for c in detail)[:200]
        return Verdict(status == 'passed', status, detail, seconds)

    def stop(self):
        """At the end of its input a server kills what it started and leaves."""
        self.process.stdin.close()
        try: self.process.wait(5)
        except subprocess.TimeoutExpired: os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def close(self):
        with self.lock:
            if not self.closed: self.closed = not self.stop()


# ---- values: the only things that pass between tester and candidate ----

COLLECTIONS = {t.__name__: t for t in (list, tuple, set, frozenset, collections.deque)}        # type(parts)
VALUES = {                                                      # type: its parts; type(*parts) equals it
    int: lambda x: (hex(x), 16),                                # those of more than 53 bits
    complex: lambda x: (x.real, x.imag),
    bytes: lambda x: (x.decode('latin-1'), 'latin-1'),
    bytearray: lambda x: (x.decode('latin-1'), 'latin-1'),
    range: lambda x: (x.start, x.stop, x.step),
    Decimal: lambda x: (str(x),),
    Fraction: lambda x: (x.numerator, x.denominator),
    datetime.datetime: lambda x: (x.year, x.month, x.day, x.hour, x.minute, x.second, x.microsecond),
    datetime.date: lambda x: (x.year, x.month, x.day),
    datetime.time: lambda x: (x.hour, x.minute, x.second, x.microsecond),
    datetime.timedelta: lambda x: (x.days, x.seconds, x.microseconds),
}
BY_NAME = {t.__name__: t for t in VALUES}


def pack(x, other):
    """Value -> JSON: str, bool, None, float, small int as they are, else [type, *parts]; other(x) for objects."""
    kind, np = type(x), sys.modules.get('numpy')
    if x is None or kind is str or kind is bool or kind is float: return x
    if np and isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in 'biufcSU':
        return ['numpy', x.dtype.str, list(x.shape), *(pack(v, other) for v in x.ravel().tolist())]
    if isinstance(x, int): return int(x) if abs(x) < 2**53 else ['int', *VALUES[int](x)]
    if isinstance(x, float): return float.__float__(x)
    if isinstance(x, str): return ''.join(x)
    for name, base in COLLECTIONS.items():
        if isinstance(x, base): return [name, *(pack(v, other) for v in x)]
    if isinstance(x, dict): return ['dict', *(pack(v, other) for item in x.items() for v in item)]
    if isinstance(x, type) and getattr(builtins, x.__name__, None) is x: return ['type', x.__name__]
    for base, parts in VALUES.items():
        if isinstance(x, base) and getattr(x, 'tzinfo', None) is None: return [base.__name__, *parts(x)]
    return other(x)


def unpack(x, other):
    """The inverse. x may be any JSON at all: what is no value ends in one of the usual exceptions."""
    if type(x) is not list: return x
    name, *parts = x
    if name in COLLECTIONS: return COLLECTIONS[name](unpack(v, other) for v in parts)
    if name == 'dict': return {unpack(k, other): unpack(v, other) for k, v in zip(parts[::2], parts[1::2])}
    if name in BY_NAME: return BY_NAME[name](*parts)
    if name == 'numpy':
        import numpy as np
        dtype, shape, *flat = parts
        if np.dtype(dtype).kind not in 'biufcSU': raise ValueError(f'{dtype=}')
        return np.array([unpack(v, other) for v in flat], dtype).reshape(shape)[()]     # 0-d: a scalar
    if name == 'type' and isinstance(kind := getattr(builtins, parts[0]), type): return kind
    return other(name, *parts)


def send(sock, message):
    data = json.dumps(message).encode()
    if len(data) > MAX_MESSAGE: raise ValueError('too large to pass between test and program')
    sock.sendall(struct.pack('>I', len(data)) + data)


def receive(sock):
    def exactly(n):
        data = bytearray()
        while len(data) < n:
            chunk = sock.recv(min(n - len(data), 1 << 20))
            if not chunk: raise EOFError
            data += chunk
        return data
    size = struct.unpack('>I', exactly(4))[0]
    if size > MAX_MESSAGE: raise ValueError('message too large')
    return json.loads(exactly(size))


# ---- the tester ----

class Lost(BaseException):
    """No answer can be had from the candidate any more: (status, why). Not an Exception, which tests may catch."""


class Remote:
    """A global name of the candidate, or an object that lives there."""
    def __init__(self, candidate, *where): self.__dict__.update(_candidate=candidate, _reference=where)
    def __call__(self, *args, **kwargs): return self._candidate.ask('call', self, args, kwargs)
    def __getitem__(self, key): return self._candidate.ask('getitem', self, key)
    def __setitem__(self, key, value): self._candidate.ask('setitem', self, key, value)
    def __setattr__(self, name, value): self._candidate.ask('setattr', self, name, value)
    def __len__(self): return self._candidate.ask('len', self)
    def __str__(self): return str(self._candidate.ask('str', self))
    def __bool__(self): return True

    def __getattr__(self, name):
        if name.startswith('__'): raise AttributeError(name)    # protocols of copy, numpy, ...
        return self._candidate.ask('getattr', self, name)

    def __iter__(self):
        iterator = self._candidate.ask('iter', self)
        while item := self._candidate.ask('next', iterator): yield item[0]


class Candidate:
    """The tester's end of the line."""
    def __init__(self, sock): self.sock, self.remotes, self.lost = sock, {}, None

    def ask(self, op, *args):
        if self.lost: raise self.lost
        packed = [pack(a, self.reference) for a in args]        # what cannot go is the test's error
        try:
            send(self.sock, [op, *packed])
            kind, *rest = [unpack(part, self.remote) for part in receive(self.sock)]
            value, changed = rest
        except (EOFError, ConnectionError): self.lost = Lost('crashed', 'the program ended')
        except MemoryError: self.lost = Lost('memory', 'the answer is too large')
        except Exception as e: self.lost = Lost('crashed', f'not an answer: {type(e).__name__}: {e}')
        if self.lost: raise self.lost
        if kind != 'value': raise self.exception(value, changed)
        if op == 'call' and value is None and type(changed) is tuple:       # worked in place
            for old, new in zip(args[1], changed): replace(old, new)
        return value

    def reference(self, x):
        if isinstance(x, Remote): return list(x._reference)
        if getattr(builtins, getattr(x, '__name__', ''), None) is x: return ['global', x.__name__]
        raise TypeError(f'the test cannot pass a {type(x).__name__} to the program')

    def remote(self, name, key):
        if name != 'object' or type(key) is not int: raise ValueError(f'no such kind of value: {name!r:.20}')
        return self.remotes.setdefault(key, Remote(self, 'object', key))

    def exception(self, names, message):
        """The nearest builtin of an exception's classes, but none that would end a loop of the test early."""
        for name in names if type(names) is list else []:
            kind = getattr(builtins, str(name), None)
            if isinstance(kind, type) and issubclass(kind, Exception) and 'Stop' not in kind.__name__:
                try: return kind(str(message))
                except TypeError: pass                          # UnicodeDecodeError needs more: then its base
        return Exception(str(message))


def replace(old, new):
    """Let the container `old` have the content of `new`."""
    if type(old) is not type(new): return
    if isinstance(old, (list, bytearray)): old[:] = new
    elif isinstance(old, (dict, set)): old.clear(), old.update(new)
    elif isinstance(old, collections.deque): old.clear(), old.extend(new)
    elif type(old).__name__ == 'ndarray': old[...] = new


def judge(candidate, solution, setup, test):
    """-> status, detail. Runs the trusted code."""
    names = dict(__name__='test')
    try:
        candidate.ask('load', solution)
        exec(compile(setup, 'setup', 'exec'), names)
        for node in ast.parse(setup).body:                      # a stub is what the program was asked for
            body = {type(s) for s in getattr(node, 'body', [node])}
            if isinstance(node, ast.FunctionDef) and body <= {ast.Pass, ast.Expr, ast.Import}:
                names[node.name] = Remote(candidate, 'global', node.name)
        tree = ast.parse(test)
        names |= unknown_names(tree, names, candidate)
        exec(compile(tree, 'test', 'exec'), names)
        if candidate.lost: raise candidate.lost                 # the test caught everything
        return 'passed', ''
    except Lost as e: status, what = e.args
    except MemoryError as e: status, what = 'memory', f'MemoryError: {e}'
    except BaseException as e:                                  # SystemExit too is no pass
        at = [n for f, n in traceback.walk_tb(e.__traceback__) if f.f_code.co_filename == 'test']
        status, what = 'failed', ': '.join(filter(None, (type(e).__name__, str(e)[:120])))
        if at: what += ' in: ' + test.split('\n')[at[-1] - 1].strip()
    return status, what


def unknown_names(tree, known, candidate):
    """The names that a test reads and nobody but the program can define, as Remotes."""
    nodes = list(ast.walk(tree))
    names = {n.id for n in nodes if isinstance(n, ast.Name)}
    read = names - set(known)
    modules = {n.value.id for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
    modules &= read & sys.stdlib_module_names                   # MBPP/596 counts on the program to import sys
    unknown = {n for n in read - modules if not hasattr(builtins, n)}
    if len(names) == 1: unknown = read                          # MBPP/126 asks for a function named sum
    remotes = {n: Remote(candidate, 'global', n) for n in unknown}
    return remotes | {n: importlib.import_module(n) for n in modules}


# ---- the candidate ----

def serve(sock):
    """Run the solution, then answer calls, for ever."""
    module, objects, numbers = types.ModuleType('solution'), [], {}
    sys.modules['solution'] = module

    def reference(x):
        if id(x) not in numbers: objects.append(x)              # kept alive, so that its id stays its own
        return ['object', numbers.setdefault(id(x), len(objects) - 1)]

    def find(kind, key):
        if kind == 'object': return objects[key]
        if hasattr(module, key): return getattr(module, key)
        if hasattr(builtins, key): return getattr(builtins, key)
        raise NameError(f'name {key!r} is not defined')

    operations = dict(
        load=lambda text: exec(compile(text, 'solution', 'exec'), module.__dict__),
        call=lambda f, args, kwargs: f(*args, **kwargs), getattr=getattr, setattr=setattr, str=str, len=len,
        iter=iter, next=lambda iterator: list(islice(iterator, 1)),
        getitem=lambda x, key: x[key], setitem=lambda x, key, value: x.__setitem__(key, value))
    while True:
        op, *packed = receive(sock)
        try:
            args = [unpack(a, find) for a in packed]
            value = operations[op](*args)
            in_place = op == 'call' and value is None
            answer = ['value', pack(value, reference), pack(args[1] if in_place else None, reference)]
            if in_place and answer[2] == packed[1]: answer[2] = None
            send(sock, answer)
        except Exception as e:                                  # SystemExit and its like end the process
            try: message = str(e)[:1000]
            except Exception: message = ''
            send(sock, ['error', ['list', *(c.__name__ for c in type(e).__mro__)], message])


def candidate(sock, tmp, order, layers):
    """The process of one program: never returns."""
    os.setsid()
    os.chdir(tmp)
    os.environ.clear()
    keep_only(sock, layers.ruleset)
    layers.confine(order['memory_mb'], order['timeout'])
    random.seed(0)
    try: serve(socket.socket(fileno=sock))
    except SystemExit: os._exit(0)
    except BaseException: os._exit(1)


# ---- confinement: what a process gives up before it runs the program ----

LAYERS = 'landlock', 'seccomp', 'user'

# What seccomp denies (x86_64 and aarch64 numbers): whatever concerns other processes; what Landlock leaves open in
# the file system (modes, owners, times); networks; memory beside RLIMIT_AS; and every system call since 2019.
DENIED = '''
    fork 57 -  vfork 58 -  execve 59 221  execveat 322 281  unshare 272 97  kill 62 129  tkill 200 130
    tgkill 234 131  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240  ptrace 101 117
    process_vm_readv 310 270  process_vm_writev 311 271  setpriority 141 140  personality 135 92
    sched_setaffinity 203 122  sched_setscheduler 144 119  sched_setparam 142 118  sched_setattr 314 274
    ioprio_set 251 30  migrate_pages 256 238  move_pages 279 239  chmod 90 -  fchmod 91 52  fchmodat 268 53
    chown 92 -  lchown 94 -  fchown 93 55  fchownat 260 54  utime 132 -  utimes 235 -  futimesat 261 -
    utimensat 280 88  setxattr 188 5  lsetxattr 189 6  fsetxattr 190 7  removexattr 197 14
    lremovexattr 198 15  fremovexattr 199 16  truncate 76 45  open_by_handle_at 304 265
    name_to_handle_at 303 264  memfd_create 319 279  socket 41 198  shmget 29 194  shmat 30 196
    shmctl 31 195  semget 64 190  semop 65 193  semctl 66 191  semtimedop 220 192  msgget 68 186
    msgsnd 69 189  msgrcv 70 188  msgctl 71 187  mq_open 240 180  mq_unlink 241 181  add_key 248 217
    request_key 249 218  keyctl 250 219  bpf 321 280  perf_event_open 298 241  userfaultfd 323 282
    inotify_add_watch 254 27'''
MACHINES = dict(x86_64=(0, 0xC000003E), aarch64=(1, 0xC00000B7))            # column above, AUDIT_ARCH_*
ALLOW, DENY = 0x7FFF0000, 0x50000 | errno.EPERM
CONDITIONS = [                                                  # call, argument, test, values, then (else the other)
    ((56, 220), 0, '&', [0x10000], ALLOW),                      # clone: threads
    ((302, 261), 0, '=', [0], ALLOW),                           # prlimit64: its own limits
    ((72, 25), 1, '=', [8, 10, 15], DENY),                      # fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX: signals
    ((16, 29), 1, '=', [0x8901, 0x8902], DENY),                 # ioctl: FIOSETOWN, SIOCSPGRP: signals too
]
WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3                     # of Landlock


def libc(name, *args):
    """A function of the C library; raises OSError."""
    if sys.platform != 'linux': raise OSError(f'no {name} here')
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(
        *(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    if result < 0: raise OSError(ctypes.get_errno(), f'{name}{args[:1]}')
    return result


def readable_paths(numpy_dir):
    """-> files and directories that a program may read. Not site-packages: answers may be installed there."""
    paths = '/dev/null /dev/urandom /etc/ld.so.cache /etc/localtime /usr/share/zoneinfo'.split()
    stdlib = sysconfig.get_path('stdlib')
    paths += [e.path for e in os.scandir(stdlib) if e.name not in ('site-packages', 'dist-packages')]
    if numpy_dir: paths += [numpy_dir, numpy_dir + '.libs']
    with open('/proc/self/maps') as f:
        mapped = {os.path.dirname(line.split()[-1]) for line in f if '.so' in line}
    for folder in mapped | {'/lib64', '/usr/lib64', os.path.dirname(stdlib)}:
        if os.path.isdir(folder): paths += [e.path for e in os.scandir(folder) if '.so' in e.name]
    return paths


def landlock(paths, folders):
    """-> (ABI, descriptor of a ruleset): everything is denied but reading `paths` and listing `folders`."""
    abi = libc('syscall', 444, None, 0, 1)
    every_right = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1      # that this kernel knows
    ruleset = libc('syscall', 444, struct.pack('<Q', every_right), 8, 0)
    for path in [*paths, *folders]:
        try: fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError: continue
        rights = READ_DIR if path in folders else READ_DIR | READ_FILE
        if not stat.S_ISDIR(os.fstat(fd).st_mode): rights = READ_FILE | WRITE_FILE * (path == '/dev/null')
        libc('syscall', 445, ruleset, 1, struct.pack('<Qi', rights, fd), 0)
        os.close(fd)
    return abi, ruleset


def seccomp():
    """-> a BPF program, an instruction = (code, jump if true, jump if false, constant); its struct sock_fprog."""
    column, arch = MACHINES[platform.machine()]
    load, equal, at_least, any_bit, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    unknown, kill = 0x50000 | errno.ENOSYS, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (leave, 0, 0, kill),
               (load, 0, 0, 0), (at_least, 0, 1, 424), (leave, 0, 0, unknown)]  # x32 calls too
    for number in DENIED.split()[1 + column::3]:
        if number != '-': program += [(equal, 0, 1, int(number)), (leave, 0, 0, DENY)]
    for numbers, argument, test, values, then in CONDITIONS:
        program += [(equal, 0, 2 * len(values) + 2, numbers[column]), (load, 0, 0, 16 + 8 * argument)]
        code = any_bit if test == '&' else equal
        for value in values: program += [(code, 0, 1, value), (leave, 0, 0, then)]
        program += [(leave, 0, 0, DENY if then == ALLOW else ALLOW)]
    program += [(leave, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b''.join(struct.pack('<HBBI', *i) for i in program))
    return code, struct.pack('@HP', len(program), ctypes.addressof(code))


class Layers:
    """What this machine offers: found out once, in the zygote; then confine() runs in each candidate."""
    def __init__(self, numpy_dir, without):
        self.uid = self.landlock = self.seccomp = None
        self.ruleset, self.tasks = 2, own_tasks() + MAX_TASKS
        if os.getuid() == 0 and 'user' not in without:          # RLIMIT_NPROC does not bind root
            self.tasks = MAX_TASKS
            for self.uid in (1 << 30) + os.getpid(), 65534, 0, None:        # 0: at least no capabilities
                if self.uid is None or self.trial(): break
        if 'landlock' not in without:
            listed = [sysconfig.get_path('stdlib')]
            try: self.landlock, self.ruleset = landlock(readable_paths(numpy_dir), listed)
            except OSError: pass
            if not self.trial(): self.landlock = None
        if 'seccomp' not in without and sys.platform == 'linux' and platform.machine() in MACHINES:
            self.seccomp = seccomp()
            if not self.trial(): self.seccomp = None

    def trial(self):
        """Is all this possible, and the standard library still readable? Some containers forbid a layer."""
        pid = os.fork()
        if pid == 0:
            try:
                self.confine(1024, 10)
                open(ast.__file__).close()
                os.listdir(sysconfig.get_path('stdlib'))
                os._exit(0)
            finally: os._exit(1)
        return os.waitpid(pid, 0)[1] == 0

    def held(self):
        user = 'own' if self.uid else 'ordinary' if os.getuid() else ''
        return dict(landlock=self.landlock, seccomp=bool(self.seccomp), user=user)

    def confine(self, memory_mb, cpu_seconds):
        limit(memory_mb, cpu_seconds)
        lower(RLIMIT_FSIZE=MAX_FILE, RLIMIT_NOFILE=64, RLIMIT_NPROC=self.tasks)
        if self.uid is not None: drop_root(self.uid)
        if self.landlock or self.seccomp: libc('prctl', 38, 1, 0, 0, 0)     # PR_SET_NO_NEW_PRIVS
        if self.landlock:
            libc('syscall', 446, self.ruleset, 0)
            os.close(self.ruleset)
        if self.seccomp: libc('prctl', 22, 2, self.seccomp[1], 0, 0)        # PR_SET_SECCOMP: the last


def own_tasks():
    """-> the number of threads that this user has now, on Linux."""
    if sys.platform != 'linux': return 1 << 12
    n = 0
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try: n += len(os.listdir(f'/proc/{pid}/task')) if os.stat(f'/proc/{pid}').st_uid == os.getuid() else 0
        except OSError: pass                                    # it ended meanwhile
    return n


def lower(**limits):
    for name, value in limits.items():
        hard = resource.getrlimit(getattr(resource, name))[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(getattr(resource, name), (value, value))


def limit(memory_mb, cpu_seconds):
    """Limits of testers and candidates alike; memory comes on top of what the process maps already."""
    lower(RLIMIT_CPU=int(cpu_seconds) + 2, RLIMIT_CORE=0)
    if sys.platform == 'linux':
        with open('/proc/self/statm') as f: mapped = int(f.read().split()[0]) * resource.getpagesize()
        lower(RLIMIT_AS=mapped + (memory_mb << 20))


def drop_root(uid):
    """Become a user who owns nothing. The capability to read all files stays if there is one: Python may be
    installed in root's home. Landlock overrules it."""
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        libc('prctl', 8, 1, 0, 0, 0)                            # PR_SET_KEEPCAPS
        os.setresuid(uid, uid, uid)
    for keep in 1 << 2, 0:                                      # CAP_DAC_READ_SEARCH
        sets = struct.pack('<6I', keep, keep, 0, 0, 0, 0)       # effective, permitted, inheritable; high words
        try: return libc('capset', struct.pack('<Ii', 0x20080522, 0), sets)
        except OSError: pass
    raise OSError('cannot drop capabilities')


# ---- the server and the zygote ----

def keep_only(*fds):
    """Close all descriptors but these; 0, 1 and 2 become /dev/null."""
    null = os.open('/dev/null', os.O_RDWR)
    for fd in range(3): os.dup2(null, fd)
    for low, high in pairwise(sorted({2, *fds, 1 << 16})): os.closerange(low + 1, high)


def zygote(control, numpy_dir, without):
    """Start a candidate per order, end it when the server says so or is gone. Knows no tests, no solutions."""
    layers = Layers(numpy_dir, without)
    control.send(json.dumps(layers.held()).encode())
    while True:
        message, fds, *_ = socket.recv_fds(control, 4096, 1)
        if not message: os._exit(0)
        order = json.loads(message)
        if order['numpy']: preload_numpy(numpy_dir)
        tmp = tempfile.mkdtemp(prefix='sandbox-')
        if layers.uid and not layers.landlock: os.chown(tmp, layers.uid, layers.uid)
        pid = os.fork()
        if pid == 0: candidate(fds[0], tmp, order, layers)
        os.close(fds[0])
        more = control.recv(1)
        for kill in os.kill, os.killpg:                         # the group matters where seccomp is missing
            try: kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError): pass
        status = os.waitpid(pid, 0)[1]
        shutil.rmtree(tmp, ignore_errors=True)
        if not more: os._exit(0)
        control.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())


def preload_numpy(numpy_dir):
    """Once, before the forks. Its directory does not stay on the path: other packages live there."""
    if not numpy_dir or 'numpy' in sys.modules: return
    sys.path.append(os.path.dirname(numpy_dir))
    importlib.import_module('numpy')
    sys.path.pop()


def run_job(job, control, numpy_dir):
    """-> status, detail, seconds; None if the caller is gone."""
    ours, theirs = socket.socketpair()
    numpy = any('numpy' in job[k] for k in ('solution', 'test', 'setup'))
    order = dict(numpy=numpy, memory_mb=job['memory_mb'], timeout=job['timeout'])
    socket.send_fds(control, [json.dumps(order).encode()], [theirs.fileno()])
    theirs.close()
    if numpy: preload_numpy(numpy_dir)
    out, verdict = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        keep_only(ours.fileno(), verdict)
        limit(job['memory_mb'], job['timeout'])
        random.seed(0)
        status, detail = judge(Candidate(ours), job['solution'], job['setup'], job['test'])
        os.write(verdict, json.dumps([status, detail[:500]]).encode())
        os._exit(0)
    ours.close()
    os.close(verdict)
    deadline, text, more, gone = started + job['timeout'], b'', True, False
    while more and not gone and (left := deadline - time.monotonic()) > 0:
        ready = select.select([out, 0], [], [], left)[0]
        gone = 0 in ready                                       # before the verdict the caller can only leave
        if out in ready: text += (more := os.read(out, 1 << 16))
    os.close(out)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if gone: return None
    control.send(b'.')
    exit_code, seconds = json.loads(control.recv(64)), time.monotonic() - started
    if more: return 'timeout', f'no verdict after {job["timeout"]} s', seconds
    if not text: return 'crashed', 'the tester ended without a verdict', seconds
    status, detail = json.loads(text)
    if detail == 'the program ended': detail += f' with exit code {exit_code}'
    return status, detail, seconds


def main():
    """The server: jobs come as lines of JSON, verdicts go as lines of JSON."""
    numpy_dir, *without = sys.argv[2:]
    if sys.platform == 'linux': libc('prctl', 4, 0, 0, 0, 0)    # PR_SET_DUMPABLE: nobody traces us
    sys.path[:] = [p for p in sys.path if 'site-packages' not in p and p != os.path.dirname(__file__)]
    control, other = socket.socketpair()
    gc.freeze()
    if os.fork() == 0:
        keep_only(other.fileno())
        zygote(other, numpy_dir, without)
    other.close()
    try: serve_jobs(control, numpy_dir)
    finally:
        control.close()                                         # tells the zygote to end
        os.wait()


def serve_jobs(control, numpy_dir):
    held = control.recv(4096)
    os.write(1, held + b'\n')
    pending = b''
    while held:
        while b'\n' not in pending:
            chunk = os.read(0, 1 << 20)
            if not chunk: return
            pending += chunk
        line, _, pending = pending.partition(b'\n')
        answer = run_job(json.loads(line), control, numpy_dir)
        if answer is None: return
        os.write(1, json.dumps(answer).encode() + b'\n')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--serve']: main()
    elif sys.argv[1:]: raise SystemExit(f"sandbox.py takes no arguments, got {sys.argv[1]!r}")
    else: print(*guarantees(), sep='\n')
