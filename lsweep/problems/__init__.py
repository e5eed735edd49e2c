"""Problems: the user's network, data and loss, as batches and tensors by name."""
