# What config/quickstart.py's model is worth: the table at the top of the README.
out_dir = 'out/quickstart'
tasks = 'nll,bigram,samples'
n_rows = 512
draws = 4
n_samples = 32
max_new_tokens = 96
n_steps = 96
temperature = 0.8
top_k = 0
commit = 'ancestral'
score = 'random'
remask = 'none'
