# For bench.py: the shape of SmolLM2-135M, rows about as in config/repr_align_smollm2.py.
packed = True
doc_len = 1000.0
batch = 32
vocab_size = 49152
n_layer = 30
n_head = 9
n_kv_head = 3
n_embd = 576
n_ff = 1536
