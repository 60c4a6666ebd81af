"""On the Stability of the Jacobian Matrix in Deep Neural Networks (Dadoun et al., arXiv 2506.08764)."""
