"""One thread per process: `pytest -n auto` runs as many processes as there are cores."""
import os

for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(name, '1')
