"""Study of federated transferability by statistics tuning (Ma et al. 2024, arXiv 2410.13045)."""
