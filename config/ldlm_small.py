# Latent diffusion of Python code, ~100M trainable parameters, one H100 [S: sizes of our own].
# The encoder is our own autoregressive model, trained on the same corpus (config/packages_ar.py): say so beside results.
#   python train.py config/packages_ar.py && python train.py config/ldlm_small.py
# sigma_dec: at d = 512, sigma 3 leaves at most 39 bits per latent (less noise more), one latent per token [D].
objective = 'ldlm'
out_dir = 'out/ldlm_small'
encoder = 'out/packages_ar'
encoder_layer = -3
dataset = 'packages'
data_dir = 'data/packages-bpe-16384'
seq_len = 193               # separator, 64 tokens of prefix, a chunk of 128
prefix_len = 64
n_embd = 512
n_head = 8
n_ff = 1360
n_layer = 12
perceiver_layers = 4
decoder_layers = 2
sigma_dec = 3.0
encoder_warmup = 300
global_batch_size = 256     # 512 and half the steps write worse, at 4e-3 and 8e-3
micro_batch_size = 256
max_iters = 2600            # 7 minutes on one H100
max_minutes = 0.0
ema_decay = 0.999
optimizer = 'muon'
lr = 4e-3                   # 2.8e-3 and less write worse (LOG.md)
warmup_iters = 100
eval_interval = 500
eval_rows = 512
save_interval = 0
log_interval = 20
sample_tokens = 128
sample_steps = 64
