"""What lies where: pages of weights, pages of the KV cache, rows of activations, and the memory they take."""
