"""The paper's LSTMs: they read the gradient as one vector, and fit one shape of network."""
