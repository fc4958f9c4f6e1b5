"""Optimizers for users: ordinary ``torch.optim.Optimizer`` classes around the mathematics."""
