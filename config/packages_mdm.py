# ~100M parameters of masked diffusion on the source of the installed Python packages; 7 minutes on one H100.
# config/packages_ar.py is the autoregressive baseline on the same tokens.
out_dir = 'out/packages_mdm'
dataset = 'packages'
data_dir = 'data/packages-bpe-16384'
vocab_size = 16384
seq_len = 1024
n_layer = 12
n_head = 12
n_kv_head = 12
n_embd = 768
n_ff = 2048
global_batch_size = 64
micro_batch_size = 32
max_iters = 2200
optimizer = 'muon'
lr = 2e-3
warmup_iters = 50
eval_interval = 500
eval_rows = 64
eval_draws = 4
save_interval = 0
log_interval = 20
sample_tokens = 128
sample_steps = 128
result = 'results/packages_mdm.json'
