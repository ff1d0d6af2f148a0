# The model in weights/: 11.5M parameters, under 6 minutes on one H100. Then:
#   python checkpoint.py --out_dir=out/weights --export=weights --max_shard_mb=12
out_dir = 'out/weights'
dataset = 'packages'
data_dir = 'data/packages-bpe-8192'
vocab_size = 8192
seq_len = 512
n_layer = 12
n_head = 4
n_kv_head = 4
n_embd = 256
n_ff = 704
global_batch_size = 128
max_iters = 6400
weighting = 'flat'
optimizer = 'muon'
lr = 4e-3
warmup_iters = 100
eval_interval = 1000
eval_rows = 128
eval_draws = 4
save_interval = 0
log_interval = 50
result = 'results/weights.json'
