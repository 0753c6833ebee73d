"""Where every gold and rollout token stands in a row, and what it sees."""
