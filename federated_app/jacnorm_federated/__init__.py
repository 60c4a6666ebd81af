"""The study `fedgtst` as a Flower app."""
