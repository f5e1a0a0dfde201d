"""From a mask and two sets of rows to numbers: slices, kernels, partial results, messages."""
