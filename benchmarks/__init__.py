"""pytest-benchmark suites for the region ops, and the stock PyTorch forms they are held against."""
