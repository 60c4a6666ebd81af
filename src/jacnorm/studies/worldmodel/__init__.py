"""Study of Jacobian regularisation in world models (Fang et al. 2024, arXiv 2501.00195)."""
