"""Data-dependent Sample Complexity of Deep Neural Networks via Lipschitz Augmentation (arXiv 1905.03684)."""
