"""PyTorch's names and layouts of the networks that are here, both ways."""
