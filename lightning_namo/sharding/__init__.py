"""Where shards are, which rank works on which matrix, and what is communicated for it. Knows no optimizer."""
