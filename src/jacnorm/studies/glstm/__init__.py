"""Study of over-squashing as sensitivity and as storage capacity (Blayney et al. 2025, arXiv 2510.08450)."""
