"""Meta-training, evaluation, baselines and reports."""
