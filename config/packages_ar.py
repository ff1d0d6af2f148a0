# ~100M parameters, left to right, on the source of the installed Python packages; 7 minutes on one H100.
# The baseline of config/packages_mdm.py: the same tokens in the same order.
out_dir = 'out/packages_ar'
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
objective = 'ar'
warmup_iters = 50
eval_interval = 500
eval_rows = 64
eval_draws = 1
save_interval = 0
log_interval = 20
sample_tokens = 128
sample_steps = 128
result = 'results/packages_ar.json'
