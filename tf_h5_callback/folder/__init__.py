"""A folder of checkpoints: which there are, which is the newest intact one, which are kept."""
