"""Which parameters are hidden matrices, which take AdamW, and why."""
