"""When to save, and how to do it behind training. Knows neither a framework nor HDF5."""
