"""One HDF5 file <-> ``{name: ndarray}`` and metadata. Knows h5py and NumPy, no framework."""
