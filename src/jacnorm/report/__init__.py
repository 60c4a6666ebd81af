"""From declared claims and stored tables to verdicts, and from verdicts to a page that a person can check."""
