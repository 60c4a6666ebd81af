"""Study of normalisation in attention (Mudarisov, Burtsev, Petrova and State 2025, arXiv 2508.17821)."""
