"""What of a checkpoint goes where: by name, shape and dtype. Knows no framework."""
