"""Studies: one file each, `get_config(arg)` with the dataset as argument."""
